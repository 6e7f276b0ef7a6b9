"""Relevance does not depend on how sums, averages, normalisations and loops are spelled.

What is compared differs in its nodes and not in what it computes; what the attribution is follows
from a restatement of one of the spellings, here or in ``test_lrp.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib.compiler import prepare

from . import numeric
from .numeric import Array

STABILIZER = 1e-6
OPTIONS: dict[str, dict[str, Any]] = {
    "lrp": {"method": "lrp"},
    "zplus": {"method": "lrp", "rule": "zplus"},
    "flat first": {"method": "lrp", "composite": "epsilon-plus-flat"},
    "deep-taylor": {"method": "deep-taylor"},
}


def text(head: str, body: str, **weights: Array) -> ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {head} {{ {body} }}')
    for name, value in weights.items():
        value = value if value.dtype.kind == "i" else value.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def relevances(
    model: ModelProto, feeds: dict[str, Array], inner: bool = False, **options: Any
) -> dict[str, Array]:
    """The attribution of each input, or of 'r' inside, in float64, S being Σ y."""
    names = ["r"] if inner else [info.name for info in model.graph.input]
    compiled = onnx_attrib.compile(model, target="seed", inputs=names, **options)
    numeric.check_graph(compiled)
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    y = numeric.run(model, feeds)[model.graph.output[0].name]
    result = numeric.run(compiled, {**feeds, "seed": np.ones_like(y)})
    return {name: result[f"{name}_attribution"].astype(np.float64) for name in names}


def assert_alike(found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, value in expected.items():
        assert np.isfinite(value).all()
        assert np.abs(value).max() > 0
        off = np.abs(found[name] - value).max() / np.abs(value).max()
        assert off <= 1e-5, f"{name}: {off:.3g}"


# -- sums ------------------------------------------------------------------------------------------

RESIDUALS = {
    "bias first": "m = MatMul(x, w) k = Add(m, b) y = Add(h, k)",
    "bias last": "m = MatMul(x, w) k = Add(h, m) y = Add(k, b)",
    "bias with the other": "m = MatMul(x, w) k = Add(h, b) y = Add(k, m)",
    "one sum": "m = MatMul(x, w) y = Sum(b, h, m)",
    "subtracted": "m = MatMul(x, w) k = Add(m, h) y = Sub(k, minus)",
    "behind a transpose": """t = Transpose(x) u = Transpose(w) n = MatMul(u, t)
        m = Transpose(n) k = Add(h, m) y = Add(k, b)""",
    "a dense layer": "m = Gemm(x, w) k = Add(h, m) y = Add(b, k)",
    "an einsum": 'm = Einsum<equation="ni,io->no">(x, w) k = Add(h, m) y = Add(k, b)',
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("spelling", [*RESIDUALS][1:])
def test_a_layer_takes_the_constants_of_its_sum(spelling: str, how: str) -> None:
    """(h + W x) + b is h + (W x + b), in any order; its layer has the bias b."""
    rng = np.random.default_rng([len(spelling), len(how)])
    weights = {"w": rng.standard_normal((6, 4)), "b": rng.standard_normal(4)}
    weights["minus"] = -weights["b"]
    feeds = {"x": rng.standard_normal((5, 6)), "h": rng.standard_normal((5, 4))}
    head = "(float[N, 6] x, float[N, 4] h) => (float[N, 4] y)"
    expected = relevances(text(head, RESIDUALS["bias first"], **weights), feeds, **OPTIONS[how])
    model = text(head, RESIDUALS[spelling], **weights)
    if spelling == "behind a transpose":
        # W from the left is no layer that a bias belongs to: the constant is the sum's.
        y = feeds["h"] + feeds["x"] @ weights["w"] + weights["b"]
        ratio = y / (y + np.where(y < 0, -STABILIZER, STABILIZER))
        m, h = (np.abs(t) for t in (feeds["x"] @ weights["w"], feeds["h"]))
        part = weights["b"] * h / (h + m) if how == "deep-taylor" else 0.0
        expected = {"h": (feeds["h"] + part) * ratio}
    assert_alike(relevances(model, feeds, **OPTIONS[how]), expected)


def test_a_layer_takes_constants_behind_moves() -> None:
    """What is between the layer and the sum moves its channels."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((4, 3, 1, 1)), "b": rng.standard_normal(4)}
    feeds = {"x": rng.standard_normal((2, 3, 2, 5)), "h": rng.standard_normal((2, 2, 5, 4))}
    head = "(float[N, 3, 2, 5] x, float[N, 2, 5, 4] h) => (float[N, 2, 5, 4] y)"
    inside = "c = Conv(x, w, b) t = Transpose<perm=[0, 2, 3, 1]>(c) y = Add(h, t)"
    behind = "c = Conv(x, w) t = Transpose<perm=[0, 2, 3, 1]>(c) k = Add(h, t) y = Add(k, b)"
    for options in OPTIONS.values():
        expected = relevances(text(head, inside, **weights), feeds, **options)
        assert_alike(relevances(text(head, behind, **weights), feeds, **options), expected)


@pytest.mark.parametrize("how", ["lrp", "deep-taylor"])
def test_sums_of_many_terms(how: str) -> None:
    """R_t = t R / (Σ t + c) in any association; without biases c is shared by |t|."""
    rng = np.random.default_rng(2)
    a, b, d, c = (rng.standard_normal((4, 3)) for _ in range(4))
    head = "(float[4, 3] a, float[4, 3] b, float[4, 3] d) => (float[4, 3] y)"
    y = a + b + d + c
    ratio = y / (y + np.where(y < 0, -STABILIZER, STABILIZER))
    part = c / (np.abs(a) + np.abs(b) + np.abs(d)) if how == "deep-taylor" else 0.0
    terms = {"a": a, "b": b, "d": d}
    expected = {name: (t + part * np.abs(t)) * ratio for name, t in terms.items()}
    for body in (
        "k = Add(a, b) l = Add(k, d) y = Add(l, c)",
        "k = Add(a, c) l = Add(b, d) y = Add(k, l)",
        "k = Add(c, d) l = Sum(b, k) y = Add(a, l)",
        "k = Sub(d, minus) l = Sum(b, k, a) y = Identity(l)",
    ):
        model = text(head, body, c=c, minus=-c)
        assert_alike(relevances(model, terms, method=how), expected)


def test_what_is_read_twice_is_a_sum_of_its_own() -> None:
    """As in residual networks, where each sum is a tensor that the next block reads too."""
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((4, 4)), rng.standard_normal((3, 4))
    head = "(float[N, 4] x) => (float[N, 4] y)"
    body = "m = MatMul(x, w) k = Add(x, m) n = MatMul(k, w) y = Add(k, n)"
    found = relevances(text(head, body, w=w), {"x": x}, method="lrp")["x"]

    def shared(h: Array, r: Array) -> Array:
        z = h @ w
        s = r / stable(h + z)
        return h * s + h * ((z * s / stable(z)) @ w.T)

    k = x + x @ w
    assert_alike({"x": found}, {"x": shared(x, shared(k, k + k @ w))})


def stable(z: Array) -> Array:
    return z + np.where(z < 0, -STABILIZER, STABILIZER)


@pytest.mark.parametrize("how", ["lrp", "deep-taylor"])
def test_averages(how: str) -> None:
    """A sum divided by the number of its terms has an average's stabiliser: R x / (n (y + ε))."""
    rng = np.random.default_rng(4)
    x = 1e-5 * rng.standard_normal((2, 3, 4, 5))
    y = x.mean((2, 3), keepdims=True)
    expected = {"x": x / 20 * y / stable(y)}
    head = "(float[N, 3, 4, 5] x) => (float[N, C, H, W] y)"
    for body in (
        "y = GlobalAveragePool(x)",
        "y = ReduceMean(x, axes)",
        "s = ReduceSum(x, axes) y = Div(s, n)",
        "s = ReduceSum<keepdims=0>(x, axes) u = Unsqueeze(s, axes) y = Mul(part, u)",
        "m = ReduceMean(x, axes) t = Mul(m, n) y = Mul(t, part)",
    ):
        model = text(head, body, axes=np.array([2, 3]), n=np.array(20.0), part=np.array(1 / 20))
        assert_alike(relevances(model, {"x": x}, method=how), expected)


TURNED = "Transpose<perm=[0, 2, 1]>"
HEADS = (
    f"m = MatMul(x, w) b = Add(m, c) r = Reshape(b, heads) t = {TURNED}(r)",
    f"m = MatMul(x, w) r = Reshape(m, heads) b = Add(r, k) t = {TURNED}(b)",
    f"m = MatMul(x, w) r = Reshape(m, heads) u = {TURNED}(r) t = Add(u, l)",
)


@pytest.mark.parametrize("how", OPTIONS)
def test_biases_of_heads(how: str) -> None:
    """A bias may follow once the channels are split into heads."""
    rng = np.random.default_rng(8)
    c, w, x = (rng.standard_normal(shape) for shape in (12, (5, 12), (4, 5)))
    weights = {"w": w, "c": c, "k": c.reshape(3, 4), "l": c.reshape(3, 4).T[None]}
    weights["heads"] = np.array([0, 3, 4])
    head = "(float[N, 5] x) => (float[N, A, B] t)"
    first, *others = (text(head, body, **weights) for body in HEADS)
    expected = relevances(first, {"x": x}, **OPTIONS[how])
    for model in others:
        assert_alike(relevances(model, {"x": x}, **OPTIONS[how]), expected)


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("between", ["r = Relu(h)", "r = Add(h, g)"])
def test_batch_normalizations_without_a_layer(between: str, how: str) -> None:
    """They pass relevance on, with their own operator or in three."""
    rng = np.random.default_rng([len(between), len(how)])
    s, b, m, v = (0.5 + rng.random(4) for _ in range(4))
    weights = {"w": rng.standard_normal((4, 3, 1, 1)), "u": rng.standard_normal((2, 4, 1, 1))}
    weights |= {"s": s, "b": b, "m": m, "v": v}
    columns = {"mc": m, "ic": 1 / np.sqrt(v + 1e-5), "sc": s, "bc": b}
    columns |= {"fc": s / np.sqrt(v + 1e-5), "oc": b - m * s / np.sqrt(v + 1e-5)}
    weights |= {name: value.reshape(4, 1, 1) for name, value in columns.items()}
    spellings = (
        "n = BatchNormalization(r, s, b, m, v)",
        "a = Sub(r, mc) i = Mul(a, ic) o = Mul(i, sc) n = Add(o, bc)",
        "o = Mul(fc, r) n = Add(oc, o)",
    )
    head = "(float[N, 3, 4, 4] x, float[N, 4, 4, 4] g) => (float[N, 2, 4, 4] y)"
    body = f"h = Conv(x, w) {between} {{}} y = Conv(n, u)"
    if "g" not in between:
        head = "(float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y)"
    first, *others = (text(head, body.format(one), **weights) for one in spellings)
    feeds = {"x": rng.standard_normal((2, 3, 4, 4)), "g": rng.standard_normal((2, 4, 4, 4))}
    feeds = {info.name: feeds[info.name] for info in first.graph.input}
    # Further back the ε rule divides by numbers near zero.
    found = relevances(first, feeds, inner=True, **OPTIONS[how])
    for model in others:
        assert_alike(relevances(model, feeds, inner=True, **OPTIONS[how]), found)


# -- normalisations --------------------------------------------------------------------------------

MEAN = "m = ReduceMean(x, last) c = Sub(x, m)"
NORMALIZATIONS = {
    "by parts": f"""{MEAN} q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, tiny) s = Sqrt(e)
        n = Div(c, s) g = Mul(n, scale) h = Add(g, shift)""",
    "inverse root": f"""{MEAN} q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, tiny)
        s = Pow(e, half) i = Mul(s, scale) g = Mul(i, c) h = Add(shift, g)""",
    "line": """m = ReduceMean(x, last) c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, last)
        e = Add(tiny, v) s = Sqrt(e) r = Reciprocal(s) a = Mul(r, scale) u = Mul(x, a) n = Neg(m)
        k = Mul(n, a) o = Add(k, shift) h = Add(u, o)""",
    "line, subtracted": """m = ReduceMean(x, last) c = Sub(x, m) q = Mul(c, c)
        v = ReduceMean(q, last) e = Add(tiny, v) s = Sqrt(e) r = Reciprocal(s) a = Mul(r, scale)
        u = Mul(x, a) k = Mul(m, a) o = Sub(shift, k) h = Add(u, o)""",
    "second moment": """m = ReduceMean(x, last) p = Mul(x, x) o = ReduceMean(p, last)
        q = Mul(m, m) d = Sub(o, q) v = Max(d, zero) e = Add(v, tiny) s = Sqrt(e) c = Sub(x, m)
        n = Div(c, s) g = Mul(scale, n) h = Add(g, shift)""",
    "pooled": """m = GlobalAveragePool(x) c = Sub(x, m) q = Mul(c, c) v = GlobalAveragePool(q)
        e = Add(v, tiny) s = Sqrt(e) n = Div(c, s) g = Mul(n, scale) h = Add(g, shift)""",
    "sums over sizes": """f = ReduceSum(x, last) m = Div(f, eight) z = Shape(x) b = Expand(m, z)
        c = Sub(x, b) q = ReduceSumSquare(c, last) v = Div(q, eight) e = Add(v, tiny) s = Sqrt(e)
        i = Div(one, s) n = Mul(c, i) g = Mul(n, scale) h = Add(g, shift)""",
    "turned": """p = Transpose<perm=[0, 2, 1]>(x) m = ReduceMean(p, middle) c = Sub(p, m)
        q = Mul(c, c) v = ReduceMean(q, middle) e = Add(v, tiny) s = Sqrt(e) n = Div(c, s)
        b = Transpose<perm=[0, 2, 1]>(n) g = Mul(b, scale) h = Add(g, shift)""",
}


def normalized(spelling: str, rng: np.random.Generator) -> tuple[ModelProto, ModelProto]:
    """A dense layer behind a normalisation, spelled out, and with the operator."""
    numbers = {"tiny": 1e-3, "two": 2.0, "half": -0.5, "eight": 8.0, "one": 1.0, "zero": 0.0}
    weights = {name: np.array(value) for name, value in numbers.items()}
    weights |= {"scale": rng.standard_normal(8), "shift": rng.standard_normal(8)}
    weights |= {"w": rng.standard_normal((8, 8)), "out": rng.standard_normal((8, 5))}
    weights |= {"last": np.array([-1]), "middle": np.array([1])}
    head = "(float[N, 6, 8] t) => (float[N, 6, 5] y)"
    parts = [f"x = MatMul(t, w) {body} y = MatMul(h, out)" for body in (
        NORMALIZATIONS[spelling],
        "h = LayerNormalization<epsilon=0.001>(x, scale, shift)",
    )]  # fmt: skip
    spelled, whole = (text(head, part, **weights) for part in parts)
    return spelled, whole


@pytest.mark.parametrize("how", ["lrp", "flat first", "deep-taylor"])
@pytest.mark.parametrize("spelling", NORMALIZATIONS)
def test_normalizations(spelling: str, how: str) -> None:
    """However it is spelled, a layer normalisation is treated as the operator."""
    rng = np.random.default_rng([len(spelling), len(how), 1])
    spelled, whole = normalized(spelling, rng)
    feeds = {"t": rng.standard_normal((3, 6, 8))}
    expected = relevances(whole, feeds, **OPTIONS[how])
    assert_alike(relevances(spelled, feeds, **OPTIONS[how]), expected)


@pytest.mark.parametrize(
    "body",
    [
        # ε is added to the deviation, the deviation is of absolutes, or the mean is not taken off
        f"""{MEAN} q = Mul(c, c) v = ReduceMean(q, last) s = Sqrt(v) e = Add(s, tiny)
            h = Div(c, e)""",
        f"""{MEAN} q = Abs(c) v = ReduceMean(q, last) e = Add(v, tiny) p = Mul(e, e) s = Sqrt(p)
            h = Div(c, s)""",
        f"""{MEAN} q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, tiny) s = Sqrt(e)
            h = Div(x, s)""",
    ],
)
def test_what_is_almost_a_normalization(body: str) -> None:
    """It is followed node by node."""
    numbers = {"tiny": np.array(1e-3), "last": np.array([-1])}
    model = text("(float[N, 6, 8] x) => (float[N, 6, 8] h)", body, **numbers)
    clusters = prepare(model, "lrp", target="seed").parts[0].clusters.values()
    assert not [c for c in clusters if c.stand_in and c.stand_in.op == "LayerNormalization"]


def test_a_normalization_is_found_once_with_its_scale_and_shift() -> None:
    rng = np.random.default_rng(5)
    for spelling in NORMALIZATIONS:
        model, whole = normalized(spelling, rng)
        held = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
        clusters = prepare(model, "lrp", target="seed").parts[0].clusters
        (found,) = (
            c for c in clusters.values() if c.stand_in and c.stand_in.op == "LayerNormalization"
        )
        assert found.output.name == "h"
        assert found.stand_in is not None
        assert found.stand_in.attrs["epsilon"] == np.float32(1e-3)
        scale, shift = (t.values for t in found.operands)
        np.testing.assert_allclose(scale, held["scale"], 1e-6)
        np.testing.assert_allclose(shift, held["shift"], 1e-6, 1e-6)


@pytest.mark.parametrize("how", ["flat first", "deep-taylor"])
def test_a_normalization_that_no_layer_precedes_passes(how: str) -> None:
    """What first layers with a rule of their own send back is not in proportion to their input."""
    rng = np.random.default_rng(10)
    spelled, whole = normalized("second moment", rng)
    feeds = {"t": rng.standard_normal((3, 6, 8)).astype(np.float32)}
    for model in (spelled, whole):
        # Without the dense layer before it.
        node = next(n for n in model.graph.node if n.output[0] == "x")
        node.CopyFrom(onnx.helper.make_node("Identity", ["t"], ["x"]))
        compiled = onnx_attrib.compile(model, target=(0, 1), inputs=["t", "h"], **OPTIONS[how])
        result = numeric.run(compiled, feeds)
        assert np.abs(result["t_attribution"]).max() > 0
        np.testing.assert_allclose(result["t_attribution"], result["h_attribution"], 1e-6)


# -- loops -----------------------------------------------------------------------------------------


def recurrent(rng: np.random.Generator) -> tuple[ModelProto, ModelProto]:
    """An RNN, and the same as a Scan whose body adds the bias last."""
    w, r, b = (rng.standard_normal(shape) for shape in ((1, 7, 4), (1, 7, 7), (1, 14)))
    k = rng.standard_normal((7, 3))
    head = "(float[5, 2, 4] x) => (float[2, 3] y)"
    whole = text(
        head,
        "s, e = RNN<hidden_size=7>(x, w, r, b) z = Squeeze(e, first) y = MatMul(z, k)",
        **{"w": w, "r": r, "b": b, "k": k, "first": np.array([0])},
    )
    body = """body = step (float[2, 7] h, float[2, 4] i) => (float[2, 7] after) {
        p = MatMul(i, u) q = MatMul(h, v) a = Add(p, q) z = Add(a, c) after = Tanh(z) }"""
    spelled = text(
        head,
        f"e = Scan<num_scan_inputs=1, {body}>(start, x) y = MatMul(e, k)",
        u=w[0].T,
        v=r[0].T,
        c=b[0, :7] + b[0, 7:],
        k=k,
        start=np.zeros((2, 7)),
    )
    return whole, spelled


@pytest.mark.parametrize("how", OPTIONS)
def test_loops(how: str) -> None:
    """A recurrent operator and its spelling as a loop: the same sums, and the same first layer."""
    rng = np.random.default_rng(6)
    whole, spelled = recurrent(rng)
    feeds = {"x": rng.standard_normal((5, 2, 4))}
    expected = relevances(whole, feeds, **OPTIONS[how])
    assert_alike(relevances(spelled, feeds, **OPTIONS[how]), expected)


@pytest.mark.parametrize("how", ["lrp", "deep-taylor"])
@pytest.mark.parametrize("cut", ["split", "slices"])
def test_gates_with_biases_of_their_own(cut: str, how: str) -> None:
    """A GRU whose gates are cut out of sums that have the biases of all of them."""
    rng = np.random.default_rng(9)
    w, r, b = (rng.standard_normal(shape) for shape in ((1, 15, 4), (1, 15, 5), (1, 30)))
    head = "(float[6, 2, 4] x) => (float[2, 3] y)"
    out = rng.standard_normal((5, 3))
    whole = text(
        head,
        """s, e = GRU<hidden_size=5, linear_before_reset=1>(x, w, r, b) z = Squeeze(e, first)
        y = MatMul(z, out)""",
        **{"w": w, "r": r, "b": b, "out": out, "first": np.array([0])},
    )
    names = ("z", "r", "n")
    parts = {
        "split": "{0}z, {0}r, {0}n = Split<axis=1, num_outputs=3>({0})",
        "slices": " ".join(
            f"{{0}}{name} = Slice({{0}}, from{k}, to{k}, both)" for k, name in enumerate(names)
        ),
    }[cut]
    cuts = {f"from{k}": np.array([0, 5 * k]) for k in range(3)}
    cuts |= {f"to{k}": np.array([2**31 - 1, 5 * k + 5]) for k in range(3)}
    body = f"""body = step (float[2, 5] h, float[2, 4] i) => (float[2, 5] after) {{
        j = MatMul(i, u) a = Add(j, c) k = MatMul(h, v) b = Add(k, d)
        {parts.format("a")} {parts.format("b")}
        zs = Add(az, bz) z = Sigmoid(zs) rs = Add(ar, br) g = Sigmoid(rs)
        m = Mul(g, bn) ns = Add(an, m) n = Tanh(ns)
        o = Sub(one, z) on = Mul(o, n) zh = Mul(z, h) after = Add(on, zh) }}"""
    spelled = text(
        head,
        f"e = Scan<num_scan_inputs=1, {body}>(start, x) y = MatMul(e, out)",
        **{"u": w[0].T, "v": r[0].T, "c": b[0, :15], "d": b[0, 15:], "out": out, **cuts},
        start=np.zeros((2, 5)),
        one=np.ones(1),
        both=np.array([0, 1]),
    )
    feeds = {"x": rng.standard_normal((6, 2, 4))}
    expected = relevances(whole, feeds, method=how)
    assert_alike(relevances(spelled, feeds, method=how), expected)


def test_box_in_loops() -> None:
    """The elements of an input have the input's range."""
    rng = np.random.default_rng(7)
    whole, spelled = recurrent(rng)
    feeds = {"x": rng.uniform(-1, 2, (5, 2, 4))}
    options = {"method": "deep-taylor", "low": -1, "high": 2}
    expected = relevances(whole, feeds, **options)
    assert_alike(relevances(spelled, feeds, **options), expected)
