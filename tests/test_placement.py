"""Where nodes run in a CUDA session, against what ONNX Runtime's own CUDA provider said.

``data/placement.json`` holds, for models of onnx's node cases and for those below, how many nodes
the provider of the named release left to the CPU (arithmetic with sizes aside), and how many copies
it made to the host and from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import onnx_attrib
from onnx_attrib import kernels
from onnx_attrib.inspection import inspect
from onnx_attrib.placement import placed

from .command import call

RECORDED = json.loads((Path(__file__).parent / "data" / "placement.json").read_text())
Counts = list[int]


def counts(model: ModelProto) -> Counts:
    found = placed(model)
    to_host = sum(copy.direction == "to host" for copy in found.copies)
    return [len(found.fallbacks), to_host, len(found.copies) - to_host]


def parsed(text: str, opset: int = 21) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')


# -- models ----------------------------------------------------------------------------------------

CNN = """g (float[N, 3, 9, 9] x) => (float[N, 5] y)
<float[8] b = {1, 0, 1, 0, 1, 0, 1, 0}, int64[2] flat = {0, -1}>
{ c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)  r = Relu(c)
  p = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(r)
  d = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(p, v)  e = Sigmoid(d)
  a = GlobalAveragePool(e)  f = Reshape(a, flat)  y = MatMul(f, m) }"""
LSTM = """g (float[N, T, 3] x) => (float[N, 4] y) <int64[1] first = {0}>
{ t = Transpose<perm = [1, 0, 2]>(x)  h, s = LSTM<hidden_size = 4>(t, w, r)
  y = Squeeze(s, first) }"""
ATTENTION = """g (float[N, S, 8] x) => (float[N, 4] y) <int64[1] one = {1}, float scale = {0.35}>
{ q = MatMul(x, wq)  k = MatMul(x, wk)  t = Transpose<perm = [0, 2, 1]>(k)  u = MatMul(q, t)
  z = Mul(u, scale)  a = Softmax(z)  o = MatMul(a, x)  n = LayerNormalization(o, g, b)
  l = Gelu(n)  s = ReduceMean<keepdims = 0>(l, one)  y = MatMul(s, wy) }"""
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    CNN: {"w": (8, 3, 3, 3), "v": (6, 8, 3, 3), "m": (6, 5)},
    LSTM: {"w": (1, 16, 3), "r": (1, 16, 4)},
    ATTENTION: {"wq": (8, 8), "wk": (8, 8), "g": (8,), "b": (8,), "wy": (8, 4)},
}
NETWORKS = {"cnn": CNN, "lstm": LSTM, "attention": ATTENTION}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient": ("gradient", {}),
    "deeplift": ("deeplift", {}),
    "deeplift, given": ("deeplift", {"baseline": "input"}),
    "reveal-cancel": ("deeplift", {"rule": "reveal-cancel", "baseline": "input"}),
    "integrated-gradients": ("integrated-gradients", {}),
    "smoothgrad": ("smoothgrad", {}),
    "expected-gradients": ("expected-gradients", {"baseline": "input"}),
    "deep-shap": ("deep-shap", {"baseline": "input"}),
    "lrp": ("lrp", {}),
    "occlusion": ("occlusion", {}),
}


def network(name: str) -> ModelProto:
    text = NETWORKS[name]
    model, rng = parsed(text), np.random.default_rng(1)
    for weight, shape in WEIGHTS[text].items():
        array = rng.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    return model


# Each asks something of its own.
SMALL = {
    "sizes": """g (float[N, M] x) => (float[P, Q] y) <int64 two = {2}, int64[1] rest = {-1},
        int64[1] zero = {0}>
        { s = Shape(x)  n = Gather(s, two0)  d = Div(n, two)  u = Unsqueeze(d, zero)
          t = Concat<axis = 0>(rest, u)  y = Reshape(x, t) }""",
    "a size times floats": """g (float[N, 4] x) => (float[N, 4] y)
        { n = Size(x)  f = Cast<to = 1>(n)  q = Sqrt(f)  y = Mul(x, q) }""",
    "a size in 16 bits": """g (float16[N, 4] x) => (float16[N, 4] y)
        { n = Size(x)  f = Cast<to = 10>(n)  q = Sqrt(f)  y = Mul(x, q) }""",
    "an index that is computed": """g (float[N, 4] x) => (float[N, K] y) <int64[1] zero = {0},
        int64[1] one = {1}>
        { m = ReduceMax<keepdims = 0>(x)  k = Cast<to = 7>(m)  e = Unsqueeze(k, zero)
          y = Slice(x, zero, e, one) }""",
    "a constant on both sides": """g (float[N, 4] x, int64 n) => (float[N, 4] y)
        <int64[1] one = {1}, float zero = {0}>
        { i = Loop<body = step (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {
              d = Identity(c)  r = Unsqueeze(s, one)  q = Squeeze(r, one)
              k = Cast<to = 7>(q)  a = Add(k, one)  t = Cast<to = 1>(a) }>(n, , x)
          y = Add(i, zero) }""",
    "sizes from outside": """g (float[N, 4] x, int64 n) => (float[N, 4] y)
        { o = Shape(x)
          y = Loop<body = step (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {
              d = Identity(c)  h = Shape(s)  m = Mul(h, o)  q = Sqrt0(m)
              e = Expand(s, q)  t = Tanh(e) }>(n, , x) }""",
    "a condition that is computed": """g (float[N, 4] x) => (float[N, 4] y) <float zero = {0}>
        { m = ReduceMax<keepdims = 0>(x)  c = Greater(m, zero)
          y = If<then_branch = yes () => (float[N, 4] a) { a = Tanh(x) },
                 else_branch = no () => (float[N, 4] b) { b = Atan(x) }>(c) }""",
    "an input of both sides": """g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y)
        { a = Tan(x)  b = Exp(x)  c = Mul(a, b)  y = Add(c, z) }""",
    "in a row": "g (float[N, 4] x) => (float[N, 4] y) { a = Tan(x) b = Atan(a) y = Exp(b) }",
    "types": """g (float[N, 4] x) => (bool[N, 4] y)
        { a = Cast<to = 3>(x)  b = Cast<to = 6>(x)  c = Less(a, a)  d = Less(b, b)
          y = Or(c, d) }""",
    "recurrence": """g (float[T, N, 3] x, float[1, 12, 3] w, float[1, 12, 4] r)
        => (float[T, 1, N, 4] y) { y = GRU<hidden_size = 4>(x, w, r) }""",
    "recurrence of cuDNN's kind": """g (float[T, N, 3] x, float[1, 12, 3] w, float[1, 12, 4] r)
        => (float[T, 1, N, 4] y) { y = GRU<hidden_size = 4, linear_before_reset = 1>(x, w, r) }""",
    "pads": """g (float[N, 4, 5, 5] x, float[4, 2, 3, 3] w) => (float[N, 2, P, Q] y)
        { y = ConvTranspose<pads = [1, 0, 0, 0]>(x, w) }""",
}


def small(name: str) -> ModelProto:
    text = SMALL[name].replace("two0", "two").replace("Sqrt0", "Identity")
    return parsed(text)


def own_models() -> Iterator[tuple[str, ModelProto]]:
    """Every model of this file, by the name in the record."""
    for name in SMALL:
        yield name, small(name)
    for name in NETWORKS:
        for label, (method, options) in METHODS.items():
            yield f"{name}: {label}", compiled(name, method, options)


def compiled(name: str, method: str, options: dict[str, Any]) -> ModelProto:
    return onnx_attrib.compile(network(name), method, target="argmax", **options)


# -- against the provider --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name: str) -> None:
    assert counts(small(name)) == RECORDED["models"][name]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("label", METHODS)
def test_compiled_models_stay_on_cuda(name: str, label: str) -> None:
    """No fallback and no copy, by the provider's own word."""
    assert RECORDED["models"][f"{name}: {label}"] == [0, 0, 0]
    found = placed(compiled(name, *METHODS[label]))
    assert found.on_cuda, [*found.fallbacks, *found.copies]


@cache
def node_cases() -> dict[str, ModelProto]:
    from onnx.backend.test.case.node import collect_testcases

    return {case.name: case.model for case in collect_testcases(None) if case.model is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_node_cases() -> None:
    """Single operators of all opsets, and the functions that define some."""
    if onnx.__version__ != RECORDED["onnx"]:
        pytest.skip("the cases of another onnx")
    assert RECORDED["onnxruntime"] == kernels.VERSION
    cases, wrong = node_cases(), {}
    for name, recorded in RECORDED["node cases"].items():
        found = counts(cases[name])
        if found != recorded:
            wrong[name] = found, recorded
    assert not wrong


def test_known_sizes_are_numbers() -> None:
    """The last size is known, the first is not: what is made of it is no arithmetic at run time."""
    model = parsed("""g (float[N, 4, 16] x) => (float[N, 4, 16] y)
        <int64[1] last = {-1}, int64[1] end = {9223372036854775807}, int64 two = {2}>
        { s = Shape(x)  d = Slice(s, last, end)  f = Cast<to = 1>(d)  q = Sqrt(f)
          g2 = Gather(s, two)  h = Cast<to = 1>(g2)  r = Div(q, h)  t = Tanh(x)  y = Mul(t, r) }""")
    assert len(placed(model).copies) == 1
    made = onnx_attrib.compile(model, "gradient", target="seed")
    assert placed(made).on_cuda
    assert placed(made).shapes == 0


def test_counts_are_numbers_on_the_device() -> None:
    """A mean over an axis of unknown size divides by it."""
    model = parsed("""g (float[N, S, 4] x) => (float[N, 4] y) <int64[1] one = {1}>
        { e = Exp(x)  y = ReduceMean<keepdims = 0>(e, one) }""")
    assert placed(onnx_attrib.compile(model, "gradient", target="argmax")).on_cuda


# -- what people see -------------------------------------------------------------------------------


def test_reasons() -> None:
    found = placed(small("an input of both sides"))
    assert [str(f) for f in found.fallbacks] == ["Tan 'a': no CUDA kernel"]
    assert [str(c) for c in found.copies] == [
        "from host: 'x', from a graph input to Exp",
        "from host: 'a', from Tan to Mul",
    ]
    assert [f.reason for f in placed(small("types")).fallbacks] == ["no CUDA kernel for int8"]
    (recurrent,) = placed(small("recurrence")).fallbacks
    assert recurrent.reason == "CUDA's kernel does not take linear_before_reset=0"
    (padded,) = placed(small("pads")).fallbacks
    assert padded.reason == "CUDA's kernel does not take uneven pads"


def test_inspect(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small("an input of both sides"), path)
    assert inspect(path).placement is None
    text = call("inspect", path, "--provider", "cuda").stdout
    assert f"kernels of ONNX Runtime {kernels.VERSION}" in text
    assert "Falls back to the CPU (1)\n  Tan 'a': no CUDA kernel\n" in text
    assert "Copied (2)" in text
    found = json.loads(call("inspect", path, "--provider", "cuda", "--json").stdout)["placement"]
    assert found["fallbacks"] == [{"operator": "Tan", "node": "a", "reason": "no CUDA kernel"}]
    assert len(found["copies"]) == 2


def test_inspect_compiled(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small("an input of both sides"), path)
    for provider, want in (("portable", "Falls back"), ("cuda", "no fallback to the CPU, no copy")):
        out = tmp_path / f"{provider}.onnx"
        call("compile", path, "-o", out, "--target", "seed", "--provider", provider)
        assert want in call("inspect", out, "--provider", "cuda").stdout
