"""Samples are traced through reshapes: one reference serves all. What mixes them is told."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_attrib
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.samples import Samples, kept_apart

from .numeric import Array

HEAD = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 6, 4] x) => (float y)
<float[4, 4] w = {1, -2, 0.5, 1, 0.3, 1, -1, 2, 0.7, -0.2, 1, 1, 0.1, 2, -1, 0.4},
 float[1, 1, 4] token = {0.5, -1, 2, 0.25}, int64 zero = {0}, int64 one = {1},
 int64[1] first = {0}, int64[1] second = {1}, int64[1] back = {-1}, int64[1] far = {-1000},
 int64[4] heads = {-1, 6, 2, 2}, int64[3] apart = {-1, 6, 2}, int64[4] again = {-1, 2, 6, 2},
 int64[3] whole = {-1, 6, 4}, int64[3] across = {6, -1, 2}, int64[3] early = {6, -1, 4},
 int64[2] rows = {-1, 4}, int64[3] three = {-1, 1, 1}, int64[3] minus = {-1, -1, -1},
 float half = {0.5}>
"""
PRODUCT = "k = Transpose<perm=[0, 2, 1]>(s) q = MatMul(s, k) p = Softmax<axis=2>(q)"

ALONE = {
    "heads in the batch": f"""{{
        a = Reshape(x, heads) b = Transpose<perm=[0, 2, 1, 3]>(a) s = Reshape(b, apart) {PRODUCT}
        v = MatMul(p, s) c = Reshape(v, again) d = Transpose<perm=[0, 2, 1, 3]>(c)
        y = Reshape(d, whole) }}""",
    "heads beside the batch": f"""{{
        a = Transpose<perm=[1, 0, 2]>(x) b = Reshape(a, across)
        s = Transpose<perm=[1, 0, 2]>(b) {PRODUCT} v = MatMul(p, s)
        c = Transpose<perm=[1, 0, 2]>(v) d = Reshape(c, early)
        y = Transpose<perm=[1, 0, 2]>(d) }}""",
    "tokens before the batch": """{
        a = Transpose<perm=[1, 0, 2]>(x) b = Reshape(a, rows) c = MatMul(b, w) d = Tanh(c)
        e = Mul(d, b) f = Reshape(e, early) y = Transpose<perm=[1, 0, 2]>(f) }""",
    "tokens after the batch": """{
        a = Flatten<axis=2>(x) b = MatMul(a, w) c = Sigmoid(b) d = Mul(c, a)
        y = Reshape(d, whole) }""",
    "a token for each": """{
        s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, first)
        o = Slice(minus, second, back) size = Concat<axis=0>(u, second, back)
        flat = Concat<axis=0>(u, second, second) ones = ConstantOfShape(s) t = Shape(token)
        e = Expand(token, flat) h = Concat<axis=1>(e, x) m = MatMul(h, w) y = Tanh(m) }""",
}
MIXED = {
    "a reshape across samples": """{
        a = Reshape(x, early) b = Softmax<axis=0>(a) c = Mul(b, a) y = Reshape(c, whole) }""",
    "the batch reversed": """{
        r = Slice(x, back, far, first, back) y = Mul(x, r) }""",
    "samples picked": """{
        s = Shape(x) n = Gather(s, zero) i = Range(zero, n, one) j = Sub(n, i) l = Sub(j, one)
        r = Gather<axis=0>(x, l) y = Mul(x, r) }""",
    "a sum over other samples": """{
        e = Einsum<equation="nij,mij->n">(x, x) f = Reshape(e, three) y = Mul(x, f) }""",
    "the number of samples": """{
        s = Shape(x) n = Gather(s, zero) f = Cast<to=1>(n) y = Mul(x, f) }""",
}


def model_of(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEAD + body)
    onnx.checker.check_model(model)
    return model


def traced(body: str) -> Samples | None:
    graph = normalize(model_of(body))
    graph.sort()
    return kept_apart(graph, graph.inputs, graph.prune(graph.nodes, graph.outputs), "N")


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("name", ALONE)
def test_samples_that_stay_apart(name: str, rng: np.random.Generator) -> None:
    """One baseline for all gives each sample what it gets alone, and what it gets from its own."""
    assert traced(ALONE[name]) is not None
    explained = onnx_attrib.compile(
        model_of(ALONE[name]), "deeplift", target="seed", baseline="input", delta=True
    )
    x = rng.normal(size=(3, 6, 4)).astype(np.float32)
    base = rng.normal(size=(1, 6, 4)).astype(np.float32)
    y = run(model_of(ALONE[name]), {"x": x})["y"]
    seed = rng.normal(size=y.shape).astype(np.float32)
    found = run(explained, {"x": x, "seed": seed, "x_baseline": base})
    own = run(explained, {"x": x, "seed": seed, "x_baseline": np.repeat(base, 3, 0)})
    np.testing.assert_allclose(found["x_attribution"], own["x_attribution"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["convergence_delta"], 0, atol=1e-4)
    for k in range(3):
        part = slice(k, k + 1)
        alone = run(explained, {"x": x[part], "seed": seed[part], "x_baseline": base})
        np.testing.assert_allclose(
            found["x_attribution"][part], alone["x_attribution"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_meet(name: str, rng: np.random.Generator) -> None:
    """They are told, and the attributions of all together sum to the difference of all."""
    assert traced(MIXED[name]) is None
    explained = onnx_attrib.compile(
        model_of(MIXED[name]), "deeplift", target="seed", baseline="input"
    )
    x, base = (rng.normal(size=(3, 6, 4)).astype(np.float32) for _ in range(2))
    here, there = (run(model_of(MIXED[name]), {"x": value})["y"] for value in (x, base))
    seed = rng.normal(size=here.shape).astype(np.float32)
    found = run(explained, {"x": x, "seed": seed, "x_baseline": base})["x_attribution"]
    np.testing.assert_allclose(found.sum(), (seed * (here - there)).sum(), rtol=1e-4, atol=1e-4)


def test_the_reference_of_a_shared_baseline_is_folded() -> None:
    """With a fixed baseline no layer runs twice: the runtime finds the reference a constant."""
    explained = onnx_attrib.compile(
        model_of(ALONE["heads in the batch"]), "deeplift", target="seed"
    )
    copies = {name for node in explained.graph.node for name in node.output if "/copy" in name}
    fed = {info.name for info in explained.graph.input}
    for node in explained.graph.node:
        if fed.intersection(node.input):
            fed.update(node.output)
    assert copies
    assert not copies & fed


def test_sizes_are_found_by_example() -> None:
    """Numbers and multiples of the batch are; anything else stays open."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 6, T] x) => (float a, float b, float c, float d, float e, float f)
    <int64[1] back = {-1}, int64[1] first = {0}, int64[1] last = {2}, int64[1] one = {1},
     int64[2] rows = {-1, 2}, int64[4] pads = {1, 0, 0, 0}, float[1, 5] row = {1, 2, 3, 4, 5},
     int64 zero = {0}, int64 many = {512}, int64 unit = {1}>
    {
        s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, first)
        h = Concat<axis=0>(u, back) a = Reshape(x, h)
        l = Concat<axis=0>(u, one) b = Expand(row, l)
        r = ReduceMean(x, last) c = Reshape(r, rows)
        d = Pad(c, pads)
        e = Slice(x, first, back, last)
        k = Div(n, many) o = Add(k, unit) w = Unsqueeze(o, first) t = Concat<axis=0>(w, one)
        f = Expand(row, t)
    }""")
    graph = normalize(model)
    a, b, c, d, e, f = (graph.shape(graph.tensors()[name]) for name in "abcdef")
    assert (b, c) == (("N", 5), ("3*N", 2))
    assert a is not None
    assert a[0] == "N"
    for shape, axis in ((a, 1), (d, 0), (e, 2), (f, 0)):
        assert shape is not None
        assert not isinstance(shape[axis], int)
        assert not {"N", "T"} & set(str(shape[axis]).split("*"))


def test_large_constants_are_not_made_to_learn_their_size() -> None:
    """Six open dimensions are many entries, whatever sizes stand for them."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[A, B, C, D, E, F] x) => (float y)
    <int64[2] rows = {-1, 2}, int64[2] wide = {9999, 9999}>
    {
        s = Shape(x) z = ConstantOfShape(s) a = Add(x, z) b = Reshape(a, rows)
        many = ConstantOfShape(wide) some = ReduceSum<keepdims=0>(many) y = Add(b, some)
    }""")
    tracemalloc.start()
    normalize(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
