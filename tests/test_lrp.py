"""LRP and deep Taylor decomposition of whole networks: conservation, families, the options.

Single layers: ``test_lrp_rules.py``. Networks against zennit: ``test_parity_zennit.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import OptionError, UnsupportedOpError
from onnx_attrib.compiler import prepare

from . import numeric
from .lrp_reference import (
    HIGH,
    LOW,
    OPTIONS,
    RULES,
    close,
    explain,
    plus,
    relevance,
    share,
    simple,
    stable,
    text,
    wsquare_rule,
    zbox_rule,
    zplus_rule,
)
from .numeric import Array


def network(rng: np.random.Generator, bias: float = 0.0, head: str = "") -> ModelProto:
    """Convolutions with BatchNormalization, a residual, both pools and two dense layers."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)

    weights = {"w1": normal(6, 2, 3, 3), "w2": normal(6, 6, 3, 3), "w3": normal(24, 8)}
    weights |= {"w4": normal(8, 4), "s": 1 + rng.random(6), "v": 0.5 + rng.random(6)}
    weights |= {f"b{k}": bias * normal(n) for k, n in ((1, 6), (2, 6), (3, 8), (4, 4))}
    return text(
        f"""g (float[N, 2, 8, 8] x) => (float[N, 4] y) {{
            c1 = Conv<pads=[1, 1, 1, 1]>(x, w1) n1 = BatchNormalization(c1, s, b1, b2, v)
            r1 = Relu(n1) p1 = MaxPool<kernel_shape=[3, 3], strides=[2, 2]>(r1)
            c2 = Conv<pads=[1, 1, 1, 1]>(p1, w2, b2) r2 = Relu(c2) a = Add(r2, p1)
            p2 = AveragePool<kernel_shape=[2, 2], strides=[1, 1]>(a)
            f = Flatten(p2) d = MatMul(f, w3) e = Add(d, b3) r3 = Relu(e)
            {head or "y = Gemm(r3, w4, b4)"} }}""",
        **weights,
    )


def test_epsilon_is_gradient_times_input() -> None:
    """On networks of ReLUs without biases, LRP-0 is gradient × input (Ancona et al. 2017)."""
    rng = np.random.default_rng(3)
    model, x = network(rng), rng.standard_normal((3, 2, 8, 8)).astype(np.float32)
    found = relevance(model, x, target=2, epsilon=0)
    assert close(found, relevance(model, x, target=2, method="gradient-x-input"), 1e-4)


CONSERVING: list[dict[str, Any]] = [
    {"rule": "epsilon", "epsilon": 1e-9},
    {"rule": "gamma"},
    {"rule": "wsquare"},
    {"rule": "flat"},
    {"composite": "epsilon-plus"},
    {"composite": "epsilon-plus-flat"},
    {"composite": "epsilon-gamma-box", "low": -3, "high": 3},
    {"composite": "attn-lrp"},
    {"method": "deep-taylor"},
    {"method": "deep-taylor", "low": -3, "high": 3},
]


@pytest.mark.parametrize("options", CONSERVING, ids=str)
def test_conservation(options: dict[str, Any]) -> None:
    """Without biases all of S arrives."""
    rng = np.random.default_rng(5)
    model, x = network(rng), rng.standard_normal((4, 2, 8, 8)).astype(np.float32)
    result = explain(model, x, target="argmax", **options)
    found = result["x_attribution"]
    size = np.abs(found).sum((1, 2, 3))
    assert (np.abs(found.sum((1, 2, 3)) - result["y"].max(1)) <= 1e-4 * size).all()


def test_every_family() -> None:
    """Operators of every class pass all of S, where no constant takes part."""
    rng = np.random.default_rng(8)
    w = {"a": rng.standard_normal((6, 6)), "u": rng.standard_normal((1, 20, 6))}
    w |= {"v": rng.standard_normal((1, 20, 5)), "k": rng.standard_normal((1, 15, 6))}
    w |= {"l": rng.standard_normal((1, 15, 5)), "s": 1 + rng.random(6), "o": np.zeros(6)}
    bodies = {
        "gate": "h = MatMul(x, a) g = Sigmoid(h) p = Mul(x, g) y = ReduceSum<keepdims=0>(p)",
        "norm": "h = LayerNormalization(x, s, o) p = MatMul(h, a) y = ReduceSum<keepdims=0>(p)",
        "spelled norm": """m = ReduceMean(x, last) c = Sub(x, m) q = Mul(c, c)
            t = ReduceMean(q, last) e = Sqrt(t) h = Div(c, e) p = MatMul(h, a)
            y = ReduceSum<keepdims=0>(p)""",
        "products": """t = Transpose<perm=[0, 2, 1]>(x) h = MatMul(x, t) p = MatMul(h, x)
            y = ReduceSum<keepdims=0>(p)""",
        "lstm": """t = Transpose<perm=[1, 0, 2]>(x) h, i, j = LSTM<hidden_size=5>(t, u, v)
            y = ReduceSum<keepdims=0>(h)""",
        "gru": """t = Transpose<perm=[1, 0, 2]>(x) h, i = GRU<hidden_size=5>(t, k, l)
            y = ReduceSum<keepdims=0>(h)""",
        "maxima": """h = MatMul(x, a) p = Max(x, h) q = ReduceMax(p, last)
            y = ReduceSum<keepdims=0>(q)""",
        "largest": """n = Constant<value_ints=[2]>() h, i = TopK(x, n) p = Exp(h)
            y = ReduceSum<keepdims=0>(p)""",
    }
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    for name, body in bodies.items():
        model = text(f"g (float[N, 3, 6] x) => (float y) {{ {body} }}", last=np.array([-1]), **w)
        for product in ("uniform", "signal"):
            result = explain(model, x, epsilon=1e-9, product=product)
            found = result["x_attribution"]
            # In a GRU, 1 − z as a factor gets a half, of which the one takes its part.
            missing = abs(found.sum() - result["y"]) / np.abs(found).sum()
            assert np.isfinite(found).all(), name
            if (name, product) != ("gru", "uniform"):
                assert missing <= 1e-4, (name, product, missing)


FAMILIES = ("resnet18", "vgg11_bn", "mobilenet", "inception", "genomics", "vit", "squeeze_excite",
            "gated_product", "silu", "reused_relu", "adjacent", "group_norms", "dilated_pool",
            "dense_block", "mlp", "encoder")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Without biases and constant tokens all of S arrives, whatever the architecture.

    Gates and attention weights get nothing: a softmax does not conserve (Achtibat et al. 2024).
    """
    torch = pytest.importorskip("torch")
    from . import zoo

    module, x = zoo.build(name), zoo.sample(name, 2, 5)
    with torch.no_grad():
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            if key.endswith(("bias", "running_mean", "token", "positions")):
                value.zero_()
    for exporter in zoo.EXPORTERS:
        model = zoo.export(module, x, exporter)
        for options in ({}, {"composite": "attn-lrp"}):
            found = explain(
                model, x.numpy(), target="argmax", epsilon=1e-9, product="signal", **options
            )
            relevances = found.pop("x_attribution").reshape(2, -1).astype(np.float64)
            (y,) = found.values()
            size = np.abs(relevances).sum(1)
            assert (np.abs(relevances.sum(1) - y.max(1)) <= 1e-4 * size).all()


def test_batch_and_targets() -> None:
    """A sample's relevance does not depend on the others; several targets and methods at once."""
    rng = np.random.default_rng(9)
    model, x = network(rng, 0.3), rng.standard_normal((7, 2, 8, 8)).astype(np.float32)
    options = {"composite": "epsilon-plus-flat"}
    together = relevance(model, x, target="argmax", **options)
    alone = np.concatenate(
        [relevance(model, x[n : n + 1], target="argmax", **options) for n in range(7)]
    )
    assert close(together, alone)
    compiled = onnx_attrib.compile(
        model, method=["lrp", "deep-taylor"], targets="top3", low=-3, high=3
    )
    result = numeric.run(compiled, {"x": x})
    assert result["x_attribution_deep-taylor"].shape == (7, 3, 2, 8, 8)
    first = relevance(model, x, target="argmax", method="deep-taylor", low=-3, high=3)
    assert close(result["x_attribution_deep-taylor"][:, 0], first)


def test_merged_layers() -> None:
    """A BatchNormalization is part of the convolution before it, however it is spelled."""
    rng = np.random.default_rng(10)
    model, x = network(rng, 0.5), rng.standard_normal((2, 2, 8, 8)).astype(np.float32)
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    factor = held["s"] / np.sqrt(held["v"] + 1e-5)
    folded = ModelProto()
    folded.CopyFrom(model)
    del folded.graph.node[1]
    folded.graph.node[0].output[0] = "n1"
    folded.graph.node[0].input.append("b0")
    for t in folded.graph.initializer:
        if t.name == "w1":
            t.CopyFrom(numpy_helper.from_array(held["w1"] * factor[:, None, None, None], "w1"))
    bias = held["b1"] - held["b2"] * factor
    folded.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), "b0"))
    for rule in RULES:
        found, expected = (relevance(m, x, rule=rule, **OPTIONS) for m in (model, folded))
        assert close(found, expected, 1e-4), rule


def test_normalization_that_no_layer_precedes_passes() -> None:
    rng = np.random.default_rng(11)
    one = {"s": 1 + rng.random(3), "b": rng.random(3), "m": rng.random(3), "v": 1 + rng.random(3)}
    body = "n = BatchNormalization(x, s, b, m, v) y = Conv(n, w)"
    model = text(
        f"g (float[N, 3, 5, 5] x) => (float[N, C, H, W] y) {{ {body} }}",
        w=rng.standard_normal((4, 3, 3, 3)),
        **one,
    )
    x = rng.standard_normal((1, 3, 5, 5)).astype(np.float32)
    result = explain(model, x, rule="flat", inputs=["x", "n"])
    np.testing.assert_allclose(result["x_attribution"], result["n_attribution"], rtol=1e-5)


# -- attention -------------------------------------------------------------------------------------


def test_softmax() -> None:
    """R_i = x_i (R_i − s_i Σ_j R_j), Achtibat et al. 2024, Proposition 3.1."""
    rng = np.random.default_rng(12)
    body = "s = Softmax(x) y = Mul(s, c)"
    c = rng.standard_normal(6)
    model = text(f"g (float[N, 6] x) => (float[N, 6] y) {{ {body} }}", c=c)
    x = rng.standard_normal((3, 6))
    e = np.exp(x - x.max(1, keepdims=True))
    s = e / e.sum(1, keepdims=True)
    r = s * c
    expected = x * (r - s * r.sum(1, keepdims=True))
    for composite in ("attn-lrp", "epsilon-plus", "none"):
        found = relevance(model, x.astype(np.float32), composite=composite)
        assert close(found, expected)
    spelled = text(
        """g (float[N, 6] x) => (float[N, 6] y) { m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d)
            t = ReduceSum(e, last) s = Div(e, t) y = Mul(s, c) }""",
        c=c,
        last=np.array([-1]),
    )
    assert close(relevance(spelled, x.astype(np.float32)), expected)


def test_masked_softmax() -> None:
    """Where a logit is −∞ no relevance flows, and none is NaN."""
    body = "z = Add(x, mask) s = Softmax(z) y = Mul(s, c)"
    model = text(
        f"g (float[N, 4] x) => (float[N, 4] y) {{ {body} }}",
        mask=np.array([0, -np.inf, 0, 0]),
        c=np.arange(4.0),
    )
    found = relevance(model, np.array([[1, 2, -1, 0.5]], np.float32))
    assert np.isfinite(found).all()
    assert found[0, 1] == 0
    assert (found[0, [0, 2, 3]] != 0).all()


def test_attention() -> None:
    """A · V: half to each factor by the ε rule; all to V, if gates get none."""
    rng = np.random.default_rng(13)
    body = "s = Softmax(q) y = MatMul(s, v)"
    model = text(f"g (float[N, 4, 5] q, float[N, 5, 3] v) => (float[N, 4, 3] y) {{ {body} }}")
    q, v = (rng.standard_normal(shape) for shape in ((2, 4, 5), (2, 5, 3)))
    e = np.exp(q - q.max(-1, keepdims=True))
    s = e / e.sum(-1, keepdims=True)
    y = s @ v
    ratio = y / stable(y)
    feeds = {"q": q.astype(np.float32), "v": v.astype(np.float32)}
    to_v = v * np.einsum("nij,nik->njk", s, ratio)
    to_s = 0.5 * s * np.einsum("nik,njk->nij", ratio, v)
    result = explain(model, feeds, composite="attn-lrp")
    assert close(result["v_attribution"], to_v / 2)
    assert close(result["q_attribution"], q * (to_s - s * to_s.sum(-1, keepdims=True)), 1e-4)
    job = prepare(model, "lrp", target="seed", product="signal")
    result = explain(model, feeds, product="signal")
    assert close(result["v_attribution"], to_v)
    assert not result["q_attribution"].any()
    assert any("nothing flows back to 'q'" in note for note in job.notes)


def test_layer_normalization() -> None:
    """Identity through the division, proportion through the centring, the bias absorbed."""
    rng = np.random.default_rng(14)
    s, b, x = 1 + rng.random(6), rng.standard_normal(6), rng.standard_normal((3, 6))
    body = "y = LayerNormalization<epsilon=0.01>(x, s, b)"
    model = text(f"g (float[N, 6] x) => (float[N, 6] y) {{ {body} }}", s=s, b=b)
    centred = x - x.mean(1, keepdims=True)
    y = centred / np.sqrt(centred.var(1, keepdims=True) + 0.01) * s + b
    r = (y - b) / stable(y) * y
    matrix = np.eye(6) - 1 / 6
    expected = np.stack([share(x[n][:, None] * matrix, 0, r[n]) for n in range(3)])
    found = relevance(model, x.astype(np.float32), composite="attn-lrp")
    assert close(found, expected, 1e-4)


def test_products() -> None:
    """x · σ(z): half to each, or all to the signal; of a quotient all goes to the numerator."""
    body = "s = Sigmoid(z) t = Sub(one, s) y = Mul(t, x)"
    head = "g (float[N, 3] x, float[N, 3] z) => (float[N, 3] y)"
    gated = text(f"{head} {{ {body} }}", one=np.ones(1))
    quotient = text(f"{head} {{ y = Div(x, z) }}")
    inverse = text(f"{head} {{ r = Reciprocal(z) y = Mul(r, x) }}")
    rng = np.random.default_rng(15)
    feeds = {n: (1 + rng.random((2, 3))).astype(np.float32) for n in ("x", "z")}
    result = explain(gated, feeds, product="uniform")
    np.testing.assert_allclose(result["x_attribution"], result["y"] / 2, rtol=1e-5)
    result = explain(gated, feeds, product="signal")
    np.testing.assert_allclose(result["x_attribution"], result["y"], rtol=1e-5)
    assert not result["z_attribution"].any()
    for model in (quotient, inverse):
        result = explain(model, feeds)
        np.testing.assert_allclose(result["x_attribution"], result["y"], rtol=1e-5)
        assert not result["z_attribution"].any()


# -- first layers ----------------------------------------------------------------------------------


def test_first_layers() -> None:
    """Layers that no other precedes: one in each branch, whatever is attributed."""
    rng = np.random.default_rng(16)
    w = {k: rng.standard_normal((4, 4)) for k in "abc"}
    model = text(
        """g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) {
            h = MatMul(x, a) u = Relu(h) k = MatMul(z, b) p = Add(u, k) y = MatMul(p, c) }""",
        **w,
    )
    feeds = {n: rng.standard_normal((2, 4)).astype(np.float32) for n in ("x", "z")}
    named = {"h": "flat", "k": "flat"}
    first = explain(model, feeds, composite="epsilon-plus-flat", inputs=["x", "z", "u"])
    by_name = explain(model, feeds, rules=named, inputs=["x", "z", "u"])
    later = explain(model, feeds, composite="epsilon-plus-flat", inputs=["u"])
    for name in ("x", "z", "u"):
        np.testing.assert_allclose(first[f"{name}_attribution"], by_name[f"{name}_attribution"])
    np.testing.assert_allclose(first["u_attribution"], later["u_attribution"], rtol=1e-6)


def test_preprocessing() -> None:
    """Arithmetic before the first layer passes relevance, and takes the box along."""
    rng = np.random.default_rng(17)
    w = rng.standard_normal((3, 4))
    mean, factor = rng.random(3), np.array([2, -3, 0.5])
    inside = text(
        "g (float[N, 3] x) => (float[N, 4] y) { c = Sub(x, m) s = Mul(c, f) y = MatMul(s, w) }",
        m=mean,
        f=factor,
        w=w,
    )
    outside = text("g (float[N, 3] x) => (float[N, 4] y) { y = MatMul(x, w) }", w=w)
    x = rng.random((2, 3)).astype(np.float32)
    scaled = ((x - mean) * factor).astype(np.float32)
    ends = [(end - mean) * factor for end in (0.0, 1.0)]
    box = {"low": np.minimum(*ends), "high": np.maximum(*ends)}
    for rule in ("zbox", "flat", "wsquare"):
        found = relevance(inside, x, rule=rule, low=0, high=1)
        assert close(found, relevance(outside, scaled, rule=rule, **box))


# -- deep Taylor -----------------------------------------------------------------------------------


def test_deep_taylor_is_lrp_without_biases() -> None:
    """z⁺ behind w² or z^B; biases have no part in any denominator."""
    rng = np.random.default_rng(18)
    w, v, b, c = (rng.standard_normal(shape) for shape in ((5, 6), (6, 3), 6, 3))
    body = "h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c)"
    model = text(f"g (float[N, 5] x) => (float[N, 3] y) {{ {body} }}", w=w, v=v, b=b, c=c)
    x = rng.standard_normal(5)
    hidden = plus(x @ w + b)
    s = np.array([0, (hidden @ v + c)[1], 0])
    middle = zplus_rule(hidden, v, np.zeros(3), s, v)
    for options, rule in (({}, wsquare_rule), ({"low": LOW, "high": HIGH}, zbox_rule)):
        expected = rule(x, w, np.zeros(6), middle, w)
        found = relevance(
            model, x[None].astype(np.float32), method="deep-taylor", target=1, **options
        )
        assert close(found, expected[None])


def test_deep_taylor_sums_with_constants() -> None:
    """A constant that no layer has merged takes nothing either."""
    rng = np.random.default_rng(19)
    body = "h = Conv(x, w) z = Relu(h) y = Add(z, c)"
    model = text(
        f"g (float[N, 2, 4, 4] x) => (float[N, 3, 2, 2] y) {{ {body} }}",
        w=rng.random((3, 2, 3, 3)),
        c=rng.random((3, 2, 2)),
    )
    x = rng.random((2, 2, 4, 4)).astype(np.float32)
    result = explain(model, x, method="deep-taylor")
    np.testing.assert_allclose(result["x_attribution"].sum(), result["y"].sum(), rtol=1e-5)


# -- options ---------------------------------------------------------------------------------------


def test_composites_are_rules_by_kind() -> None:
    """What each composite is, spelled out by name."""
    rng = np.random.default_rng(20)
    model, x = network(rng, 0.3), rng.standard_normal((2, 2, 8, 8)).astype(np.float32)
    box = {"low": -3, "high": 3}
    kinds = {
        "epsilon-plus": ("zplus", "zplus"),
        "epsilon-plus-flat": ("flat", "zplus"),
        "epsilon-gamma-box": ("zbox", "gamma"),
        "epsilon-alpha2-beta1": ("alpha2beta1", "alpha2beta1"),
        "epsilon_alpha2_beta1_flat": ("flat", "alpha2beta1"),
        "attn-lrp": ("epsilon", "epsilon"),
    }
    for composite, (first, other) in kinds.items():
        found = relevance(model, x, composite=composite, **box)
        expected = relevance(model, x, rules={"c1": first, "c2": other}, **box)
        assert close(found, expected), composite


def test_rules_from_files(tmp_path: Path) -> None:
    """JSON, TOML or a mapping; the first pattern that matches wins."""
    rng = np.random.default_rng(21)
    model, x = network(rng, 0.3), rng.standard_normal((2, 2, 8, 8)).astype(np.float32)
    rules = {"c1": {"rule": "gamma", "gamma": 0.1}, "c?": "zplus", "c2": "flat"}
    as_json, as_toml = tmp_path / "rules.json", tmp_path / "rules.toml"
    as_json.write_text(json.dumps(rules))
    as_toml.write_text('"c?" = "zplus"\nc2 = "flat"\n[c1]\nrule = "gamma"\ngamma = 0.1\n')
    expected = relevance(model, x, rules={"c1": rules["c1"], "c2": "zplus"})
    for given in (rules, as_json, str(as_json)):
        assert close(relevance(model, x, rules=given), expected)
    # In this file "c?" comes first.
    both = relevance(model, x, rules={"c1": "zplus", "c2": "zplus"})
    assert close(relevance(model, x, rules=as_toml), both)


def test_patterns_without_a_layer_are_noted() -> None:
    model = network(np.random.default_rng(22))
    job = prepare(model, "lrp", rules={"c1": "flat", "r*": "zplus", "features.*": "zplus"})
    (first, second) = job.notes
    assert "no layer's name matches 'r*'" in first
    assert "'features.*'; layers are: c1, c2, d, y" in second


def test_refusals(tmp_path: Path) -> None:
    model = simple(2)
    broken, listed = tmp_path / "broken.json", tmp_path / "listed.json"
    broken.write_text("{")
    listed.write_text("[]")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rule": "z"}, "choose from: epsilon, zplus, gamma, alpha1beta0"),
        ({"composite": "plus"}, "choose from: none, epsilon-plus, epsilon-plus-flat"),
        ({"eps": 1}, "has no option 'eps'"),
        ({"epsilon": -1}, "at least 0"),
        ({"rule": "zbox"}, "'zbox' needs the input's range: give low and high"),
        ({"composite": "epsilon-gamma-box"}, "give low and high"),
        ({"rules": {"h": "zbox"}}, "give low and high"),
        ({"rule": "zbox", "low": 0}, "give both low and high"),
        ({"rule": "zbox", "low": 2, "high": 1}, "low is above high"),
        ({"rule": "zbox", "low": "none.npy", "high": 1}, "option 'low' must be a number"),
        ({"rules": {"h": "zbox"}, "low": np.zeros(7), "high": 1}, "does not fit 'x'"),
        ({"rules": tmp_path / "none.json"}, "cannot read the rules"),
        ({"rules": broken}, "are not JSON"),
        ({"rules": listed}, "no mapping"),
        ({"rules": {"h": "zpluss"}}, "rules, 'h': option 'rule' is 'zpluss'; choose from: eps"),
        ({"rules": {"h": {"rule": "gamma", "gama": 1}}}, "has no 'gama'"),
        ({"rules": {"h": {"gamma": 1}}}, "add 'rule'"),
        ({"product": "half"}, "choose from: auto, uniform, signal"),
    ]
    for options, message in cases:
        with pytest.raises(OptionError) as caught:
            onnx_attrib.compile(model, method="lrp", **options)
        assert message in str(caught.value), options
    with pytest.raises(UnsupportedOpError, match="output has the shape of their input"):
        onnx_attrib.compile(model, method="lrp", rule="pass")
    with pytest.raises(OptionError, match="give both low and high"):
        onnx_attrib.compile(model, method="deep-taylor", high=1)


def test_options_are_shown_and_kept() -> None:
    lrp = next(m for m in onnx_attrib.methods() if m.name == "lrp")
    shown = {option.name: option.default for option in lrp.options}
    assert shown == {
        "rule": "epsilon",
        "composite": "none",
        "epsilon": 1e-6,
        "gamma": 0.25,
        "low": None,
        "high": None,
        "rules": None,
        "product": "auto",
    }
    model = onnx_attrib.compile(
        simple(2), method="lrp", rules={"h": "zplus"}, low=np.zeros(3), high="1.5"
    )
    kept = json.loads({p.key: p.value for p in model.metadata_props}["onnx_attrib.options"])
    assert kept["rules"] == {"h": {"rule": "zplus"}}
    assert kept["high"] == 1.5


def test_half_precision() -> None:
    """In 16 bits stabilisers are at least the type's own rounding: nothing overflows."""
    rng = np.random.default_rng(23)
    model, x = network(rng, 0.3), rng.standard_normal((4, 2, 8, 8)).astype(np.float32)
    half = ModelProto()
    half.CopyFrom(model)
    for t in half.graph.initializer:
        t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float16), t.name))
    for info in (*half.graph.input, *half.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    options = {"composite": "epsilon-plus-flat", "target": 1}
    found = relevance(half, x.astype(np.float16), **options)
    assert np.isfinite(found).all()
    assert close(found, relevance(model, x, **options), 0.05)
