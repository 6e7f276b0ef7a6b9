"""RevealCancel, alone and together with Rescale, against the paper's formulas restated slowly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import from_array, to_array

import onnx_attrib
from onnx_attrib.errors import OptionError

from . import numeric
from .numeric import Array
from .reveal_cancel_networks import (
    FUNCTIONS,
    MINIMUM,
    RULES,
    block,
    cnn,
    explain,
    mlp,
    motifs,
    normal,
    samples,
    text,
)
from .reveal_cancel_reference import Net


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("make", [mlp, cnn, motifs])
def test_equals_the_paper(make: Callable[[np.random.Generator, str], Net], f: str) -> None:
    rng = np.random.default_rng([FUNCTIONS.index(f), len(make.__name__)])
    net = make(rng, f)
    for rule in RULES:
        x, base, target = samples(net, rng, str(rng.choice(["zeros", "shared", "paired"])))
        feeds = {"x": x, "x_baseline": base, "target": target}
        compiled = onnx_attrib.compile(net.model(), rule=rule, baseline="input", delta=True)
        session = numeric.session(compiled)
        names = [output.name for output in compiled.graph.output]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        expected = net.attributions(x, base, target, rule)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(
            found["x_attribution"], expected, rtol=0, atol=1e-4 * largest, err_msg=rule
        )
        assert np.abs(found["convergence_delta"]).max() < 1e-4 * max(largest, 1)
        # A sample alone, against a reference of its own.
        alone = {"x": x[3:4], "x_baseline": base[3:4] if len(base) > 1 else base}
        (single,) = session.run(["x_attribution"], {**alone, "target": target[3:4]})
        np.testing.assert_allclose(
            single[0], found["x_attribution"][3], rtol=0, atol=1e-5 * largest
        )


def test_the_rules_differ() -> None:
    """Each of the four gives something else on a network with both kinds of layers."""
    rng = np.random.default_rng(5)
    net = motifs(rng, "Tanh")
    x, base, target = samples(net, rng, "paired")
    feeds = {"x": x, "x_baseline": base, "target": target}
    found = [explain(net.model(), feeds, rule=rule)["x_attribution"] for rule in RULES]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert np.abs(a - b).max() > 0.01 * np.abs(a).max()


def test_baseline_zeros_is_the_default() -> None:
    rng = np.random.default_rng(6)
    net = mlp(rng, "Relu")
    x, base, target = samples(net, rng, "zeros")
    found = explain(net.model(), {"x": x, "target": target}, baseline="zeros")
    expected = net.attributions(x, base, target, "reveal-cancel")
    np.testing.assert_allclose(found["x_attribution"], expected, atol=1e-4 * np.abs(expected).max())


# -- corners ---------------------------------------------------------------------------------------


def test_spelling_of_a_layer() -> None:
    """Gemm with a bias, its negative twice over, and MatMul, Add, Mul, Sub are one layer."""
    rng = np.random.default_rng(8)
    w, b, v = normal(rng, 6, 5), normal(rng, 5), normal(rng, 5, 1)
    scale = np.float32([2, -1, 0.5, -3, 1])
    end = "r = Tanh(h) y = MatMul(r, v)"
    spellings = [
        block("h = Gemm(x, w, b)", end, shape="6", outputs=1, w=w * scale, b=b * scale, v=v),
        block(
            "h = Gemm<alpha=-1.0>(x, w, b)",
            end,
            shape="6",
            outputs=1,
            w=-w * scale,
            b=b * scale,
            v=v,
        ),
        block(
            "m = MatMul(x, w) n = Neg(m) a = Sub(b, n) h = Mul(a, s)",
            end,
            shape="6",
            outputs=1,
            w=w,
            b=b,
            s=scale,
            v=v,
        ),
        block(
            "t = Transpose<perm=[1, 0]>(x) m = MatMul(k, t) u = Transpose<perm=[1, 0]>(m)"
            "d = Div(u, q) h = Add(c, d)",
            end,
            shape="6",
            outputs=1,
            k=w.T,
            q=1 / scale,
            c=b * scale,
            v=v,
        ),
    ]
    feeds = {"x": normal(rng, 7, 6), "x_baseline": normal(rng, 1, 6)}
    first, *others = (explain(model, feeds)["x_attribution"] for model in spellings)
    for other in others:
        np.testing.assert_allclose(other, first, atol=2e-5 * np.abs(first).max())


def test_spelling_of_an_activation() -> None:
    """A region of operators is one nonlinearity: Gelu, and x · Φ(x) with Erf."""
    rng = np.random.default_rng(9)
    constants = {"w": normal(rng, 6, 5), "v": normal(rng, 5, 1)}
    one = block("h = MatMul(x, w) g = Gelu(h) y = MatMul(g, v)", shape="6", outputs=1, **constants)
    spelled = block(
        "h = MatMul(x, w) a = Mul(h, k) e = Erf(a) f = Add(e, i) b = Mul(h, f)"
        "g = Mul(b, j) y = MatMul(g, v)",
        shape="6",
        outputs=1,
        k=np.sqrt(0.5),
        i=1,
        j=0.5,
        **constants,
    )
    feeds = {"x": normal(rng, 7, 6), "x_baseline": normal(rng, 7, 6)}
    a, b = (explain(model, feeds)["x_attribution"] for model in (one, spelled))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_zero_weights_and_no_difference() -> None:
    """Weights of zero, inputs equal to their reference, units dead at both: halves, and no NaN."""
    rng = np.random.default_rng(10)
    net = Net((6,), rng)
    weight = net.draw(6, 8)
    weight[rng.random(weight.shape) < 0.4] = 0
    weight[:, 0] = 0
    bias = net.draw(8)
    bias[1] = -20
    net.dense(8, weight=weight, bias=bias)
    net.apply("Relu")
    net.dense(5)
    net.apply("Relu")
    net.dense(2)
    base = normal(rng, 7, 6)
    x = np.where(rng.random((7, 6)) < 0.5, base, normal(rng, 7, 6))
    x[0] = base[0]
    target = rng.integers(0, 2, 7)
    model = net.model()
    found = explain(model, {"x": x, "x_baseline": base, "target": target})["x_attribution"]
    expected = net.attributions(x, base, target, "reveal-cancel")
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert not found[0].any()


def test_multiplier_where_nothing_differs() -> None:
    """x₁ is dead at x and x̄ but not at x̄ + Δ⁺, so its multiplier matters: half of each part's."""
    rng = np.random.default_rng(11)
    net = Net((2,), rng)
    net.dense(2, weight=np.float32([[3, 1], [-3, 1]]), bias=np.float32([-1, 0]))
    net.apply("Relu")
    net.dense(2, weight=np.float32([[1, -2], [1, 1]]), bias=np.float32([-0.5, 0.5]))
    net.apply("Relu")
    net.dense(1, weight=np.float32([[1], [3]]))
    x, base = np.float32([[1, 0.9]]), np.zeros((1, 2), np.float32)
    expected = net.attributions(x, base, [0], "reveal-cancel")
    found = explain(net.model(), {"x": x, "x_baseline": base})["x_attribution"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rescaled = net.attributions(x, base, [0], "rescale")
    assert np.abs(expected - rescaled).max() > 0.1


@pytest.mark.parametrize("f", FUNCTIONS)
def test_saturated(f: str) -> None:
    """Units far in their flat parts, with parts much larger than the whole difference."""
    rng = np.random.default_rng(12)
    net = Net((10,), rng)
    net.dense(8, weight=net.draw(10, 8, scale=12))
    net.apply(f)
    net.dense(3)
    x, base, target = normal(rng, 7, 10), normal(rng, 7, 10), rng.integers(0, 3, 7)
    feeds = {"x": x, "x_baseline": base, "target": target}
    found = explain(net.model(), feeds)
    # The next layer below is the input: the signs that matter are those of Δx.
    expected = net.attributions(x, base, target, "reveal-cancel")
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found["x_attribution"], expected, atol=1e-4 * largest)
    assert np.abs(found["convergence_delta"]).max() < 1e-4 * largest


def as_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of float32 tensors, all of them made narrow."""
    for tensor in model.graph.initializer:
        tensor.CopyFrom(from_array(to_array(tensor).astype(np.float16), tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


@pytest.mark.parametrize("make", [mlp, cnn])
def test_float16(make: Callable[[np.random.Generator, str], Net]) -> None:
    rng = np.random.default_rng(13)
    net = make(rng, "Relu")
    x, base, target = samples(net, rng, "shared")
    single = explain(net.model(), {"x": x, "x_baseline": base, "target": target})
    narrow = {"x": x.astype(np.float16), "x_baseline": base.astype(np.float16), "target": target}
    found = explain(as_float16(net.model()), narrow)
    assert found["x_attribution"].dtype == np.float16
    largest = np.abs(single["x_attribution"]).max()
    error = np.abs(found["x_attribution"].astype(float) - single["x_attribution"])
    # A difference that float16 rounds away may turn a sign; nothing else is off.
    assert np.mean(error > 0.02 * largest) < 0.02
    assert np.abs(found["convergence_delta"].astype(float)).max() < 0.02 * max(largest, 1)


# -- what else the network may hold ----------------------------------------------------------------


def conserved(model: onnx.ModelProto, x: Array, base: Array, **options: Any) -> dict[str, Array]:
    """The attributions, which sum to the difference that the model itself makes."""
    seed = normal(
        np.random.default_rng(0), 1, model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    )
    seed = np.repeat(seed, len(x), 0)
    found = explain(model, {"x": x, "x_baseline": base, "seed": seed}, target="seed", **options)
    source = numeric.session(model)
    values = [source.run(None, {"x": t})[0] for t in (x, np.broadcast_to(base, x.shape).copy())]
    change = (seed * (values[0] - values[1])).sum(1)
    for name, value in found.items():
        if name.endswith("_attribution"):
            sums = value.reshape(len(x), -1).sum(1)
            np.testing.assert_allclose(sums, change, atol=2e-4 * max(np.abs(change).max(), 1))
    return found


CASES = {
    "gate": "h = MatMul(x, w) s = Sigmoid(h) r = Relu(h) g = Mul(s, r) n = Relu(g)y = MatMul(n, v)",
    "softmax": "h = MatMul(x, w) r = Relu(h) s = Softmax(r) t = Tanh(s) y = MatMul(t, v)",
    "norm": "h = MatMul(x, w) z = LayerNormalization(h, a, b) r = Relu(z) y = MatMul(r, v)",
    "spelled norm": "h = MatMul(x, w) m = ReduceMean<keepdims=1>(h, l) c = Sub(h, m) d = Mul(c, c)"
    "e = ReduceMean<keepdims=1>(d, l) f = Add(e, i) g = Sqrt(f) k = Div(c, g)"
    "r = Relu(k) y = MatMul(r, v)",
    "poles": "h = MatMul(x, w) p = Softplus(h) q = Add(p, i) r = Reciprocal(q) t = Tanh(r)"
    "y = MatMul(t, v)",
    "root": "h = MatMul(x, w) p = Softplus(h) q = Sqrt(p) g = Log(p) t = Sub(q, g) u = Tanh(t)"
    "y = MatMul(u, v)",
    "entropy": "h = MatMul(x, w) s = Sigmoid(h) g = Log(s) e = Mul(s, g) r = Tanh(e)"
    "y = MatMul(r, v)",
    "moves": "h = MatMul(x, w) t = Transpose<perm=[1, 0]>(h) d, e = Split<num_outputs=2>(t)"
    "c = Concat<axis=0>(e, d) u = Transpose<perm=[1, 0]>(c) o = Pad(u, pads)"
    "q = Slice(o, start, end, l) r = Relu(q) y = MatMul(r, v)",
    "choice": "h = MatMul(x, w) t = Tanh(h) m = Max(h, t) n = Min(m, a) r = Relu(n)"
    "y = MatMul(r, v)",
    "sums": "h = MatMul(x, w) t = Tanh(h) s = Sum(h, t, b) d = Sub(a, s) e = Mean(d, h)"
    "m = ReduceSum<keepdims=1>(e, l) f = Sub(e, m) r = Relu(f) y = MatMul(r, v)",
    "slope": "h = MatMul(x, w) p = PRelu(h, b) q = LeakyRelu(p) e = Elu(q) c = Clip(e, lo, hi)"
    "y = MatMul(c, v)",
    "power": "h = MatMul(x, w) p = Mul(h, h) q = Pow(h, two) s = Add(p, q) r = Tanh(s)"
    "e = Exp(h) f = Sub(r, e) g = Relu(f) y = MatMul(g, v)",
    "branch": "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)",
}


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("name", CASES)
def test_conserves(name: str, rule: str) -> None:
    rng = np.random.default_rng(list(CASES).index(name))
    constants = {
        "w": normal(rng, 6, 8),
        "v": normal(rng, 8, 3),
        "a": normal(rng, 8),
        "b": normal(rng, 8),
        "i": 1.0,
        "lo": -0.5,
        "hi": 0.8,
        "two": 2.0,
    }
    whole = {"l": [1], "pads": [0, 1, 0, 2], "start": [1], "end": [9]}
    used = CASES[name]
    model = block(used, shape="6", outputs=3, **constants)
    for key, value in whole.items():
        model.graph.initializer.append(from_array(np.array(value, np.int64), key))
    x, base = normal(rng, 7, 6), normal(rng, 7, 6)
    conserved(model, x, base, rule=rule)
    conserved(model, x, base[:1], rule=rule)


def test_inner_tensors_too() -> None:
    """Of a layer's output, the two parts count with their own multipliers; x is not disturbed."""
    rng = np.random.default_rng(20)
    net = mlp(rng, "Tanh")
    x, base, _ = samples(net, rng, "paired")
    model = net.model()
    alone = conserved(model, x, base)
    inner = next(node.input[0] for node in model.graph.node if node.op_type == "Tanh")
    both = conserved(model, x, base, inputs=["x", inner])
    assert len([name for name in both if name.endswith("_attribution")]) == 2
    np.testing.assert_array_equal(both["x_attribution"], alone["x_attribution"])


@pytest.mark.parametrize("rule", RULES[1:])
def test_bodies_follow_rescale(rule: str) -> None:
    """An If: inside, both rules are the same; around it, the sum stays exact."""
    source = """g (float[N, 6] x) => (float[N, 3] y) {
        h = MatMul(x, w)
        r = Relu(h)
        k = If (c) <
            then_branch = t () => (float[N, 8] p) { a = MatMul(r, q) b = Relu(a) p = MatMul(b, q) },
            else_branch = e () => (float[N, 8] p) { p = Identity(r) }
        >
        z = Tanh(k)
        y = MatMul(z, v)
    }"""
    rng = np.random.default_rng(21)
    model = text(source, w=normal(rng, 6, 8), q=normal(rng, 8, 8), v=normal(rng, 8, 3))
    model.graph.initializer.append(from_array(np.array(True), "c"))
    conserved(model, normal(rng, 7, 6), normal(rng, 1, 6), rule=rule)


def test_recurrence() -> None:
    rng = np.random.default_rng(22)
    source = """g (float[N, 5, 4] x) => (float[N, 3] y) {
        t = Transpose<perm=[1, 0, 2]>(x)
        all, last = GRU<hidden_size=6>(t, w, r)
        h = Squeeze(last, zero)
        e = MatMul(h, u)
        f = Relu(e)
        y = MatMul(f, v)
    }"""
    sizes = {"w": (1, 18, 4), "r": (1, 18, 6), "u": (6, 8), "v": (8, 3)}
    model = text(source, **{name: normal(rng, *size) for name, size in sizes.items()})
    model.graph.initializer.append(from_array(np.array([0]), "zero"))
    for rule in RULES[1:]:
        conserved(model, normal(rng, 7, 5, 4), normal(rng, 1, 5, 4), rule=rule)


# -- options ---------------------------------------------------------------------------------------


def test_option() -> None:
    model = text(MINIMUM)
    with pytest.raises(OptionError, match="rescale, reveal-cancel, genomics, genomics-converse"):
        onnx_attrib.compile(model, rule="reveal")
    for name in ("deeplift", "deep-shap"):
        listed = next(m for m in onnx_attrib.methods() if m.name == name)
        option = next(option for option in listed.options if option.name == "rule")
        assert option.default == "rescale"
    spelled = onnx_attrib.compile(model, rule="reveal_cancel")
    stored = {prop.key: prop.value for prop in spelled.metadata_props}
    assert json.loads(stored["onnx_attrib.options"])["rule"] == "reveal-cancel"


def test_deep_shap() -> None:
    """DeepSHAP takes the rule: the mean of DeepLIFT over the background."""
    rng = np.random.default_rng(30)
    net = cnn(rng, "Silu")
    x, background, target = samples(net, rng, "paired")
    model = net.model()
    one = onnx_attrib.compile(model, rule="reveal-cancel", baseline="input")
    session = numeric.session(one)
    rows = []
    for row in background[:3]:
        feeds = {"x": x, "x_baseline": row[None], "target": target}
        rows.append(session.run(["x_attribution"], feeds)[0])
    found = explain(
        model,
        {"x": x, "target": target},
        method="deep-shap",
        baseline=background[:3],
        chunk=2,
    )
    expected = np.mean(rows, 0)
    np.testing.assert_allclose(found["x_attribution"], expected, atol=1e-4 * np.abs(expected).max())


def test_several_targets() -> None:
    rng = np.random.default_rng(31)
    net = mlp(rng, "Gelu")
    x, base, _ = samples(net, rng, "shared")
    feeds = {"x": x, "x_baseline": base}
    found = explain(net.model(), feeds, targets=[2, 0])["x_attribution"]
    for k, target in enumerate((2, 0)):
        one = explain(net.model(), feeds, target=target)["x_attribution"]
        np.testing.assert_allclose(found[:, k], one, atol=1e-6)


# -- whole architectures ---------------------------------------------------------------------------


def architectures() -> list[str]:
    return [
        "mlp",
        "genomics",
        "squeeze_excite",
        "gated_product",
        "silu",
        "reused_relu",
        "adjacent",
        "group_norms",
        "dilated_pool",
        "dense_block",
        "encoder",
        "segmenter",
        "resnet18",
        "vgg11_bn",
        "mobilenet",
        "inception",
        "vit",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_architectures_conserve(name: str) -> None:
    """Within the same limits as with Rescale."""
    pytest.importorskip("torch")
    from .test_architectures import BATCH, Case, check_deeplift

    case = Case.make(name, "dynamo")
    for rule in RULES[1:]:
        for references in (1, BATCH):
            check_deeplift(case, references, rule=rule)
