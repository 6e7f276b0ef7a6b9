"""Models that hold numbers in bfloat16.

ONNX Runtime's CPU kernels move bfloat16 (Reshape, Gather, Concat, …) and convert it, and hardly
compute in it. So models with such parts run where the graph that is added computes in float32, and
models that compute in bfloat16 themselves do on CUDA only.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

pytest.importorskip("onnxruntime")

import onnx_attrib

from . import numeric
from .numeric import Array

SIXTEEN = np.dtype(ml_dtypes.bfloat16)
WEIGHTS = {"w": (4, 3), "narrow": (2, 3), "table": (10, 3), "scale": (4,), "shift": (4,)}
MODELS = {
    "weights": ("float[N, 4] x", "float[N, 3] y", "c = Cast <to = 1> (w) h = MatMul (x, c)"),
    "input": ("bfloat16[N, 4] x", "float[N, 3] y", "f, c, h"),
    "both": ("bfloat16[N, 4] x", "bfloat16[N, 3] y", "f, c, h"),
    "inside": (
        "float[N, 4] x",
        "float[N, 3] y",
        """f = Cast <to = 16> (x) t = Transpose <perm = [0, 1]> (f) g = Cast <to = 1> (t)
        c = Cast <to = 1> (w) h = MatMul (g, c)""",
    ),
    "reshape": (
        "bfloat16[2, 4] x",
        "float[8, 3] y",
        """r = Reshape (x, pairs) b = Concat <axis = 0> (r, r) f = Cast <to = 1> (b)
        c = Cast <to = 1> (narrow) h = MatMul (f, c)""",
    ),
    "slice": (
        "bfloat16[N, 4] x",
        "float[N, 3] y",
        """s = Slice (x, one, three, one) f = Cast <to = 1> (s) c = Cast <to = 1> (narrow)
        h = MatMul (f, c)""",
    ),
    "embedding": (
        "int64[N, 4] x",
        "float[N, 3] y",
        "e = Gather (table, x) f = Cast <to = 1> (e) h = ReduceSum <keepdims = 0> (f, one)",
    ),
    "normalisation": (
        "bfloat16[N, 4] x",
        "bfloat16[N, 3] y",
        """n = LayerNormalization (x, scale, shift) f = Cast <to = 1> (n) c = Cast <to = 1> (w)
        h = MatMul (f, c)""",
    ),
}
SHORT = "f = Cast <to = 1> (x) c = Cast <to = 1> (w) h = MatMul (f, c)"


def built(name: str, kind: str = "bfloat16") -> ModelProto:
    """The model, or the same one with every number in float32 (``kind`` "float")."""
    x, y, body = MODELS[name]
    body = SHORT if body == "f, c, h" else body
    end = "s = Sigmoid (h) y = Cast <to = 16> (s)" if "bfloat16" in y else "y = Sigmoid (h)"
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g ({x}) => ({y})
        <int64[2] pairs = {{4, 2}}, int64[1] one = {{1}}, int64[1] three = {{3}}>
        {{ {body} {end} }}"""
    if kind == "float":
        text = text.replace("bfloat16", "float").replace("to = 16", "to = 1")
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for weight, shape in WEIGHTS.items():
        value = rng.standard_normal(shape).astype(SIXTEEN)
        value = value.astype(np.float32) if kind == "float" else value
        model.graph.initializer.append(numpy_helper.from_array(value, weight))
    onnx.checker.check_model(model, full_check=True)
    return model


def points(name: str) -> tuple[Array, Array]:
    """An input and a baseline that bfloat16 holds exactly."""
    rng = np.random.default_rng(1)
    if name == "embedding":
        return rng.integers(0, 10, (2, 4)), rng.integers(0, 10, (2, 4))
    x, other = (rng.standard_normal((2, 4)).astype(SIXTEEN) for _ in range(2))
    if MODELS[name][0].startswith("bfloat16"):
        return x, other
    return x.astype(np.float32), other.astype(np.float32)


@pytest.mark.parametrize(
    "method", ["gradient", "gradient-x-input", "deeplift", "integrated-gradients", "epsilon-lrp"]
)
@pytest.mark.parametrize("name", MODELS)
def test_like_in_float32(name: str, method: str) -> None:
    x, baseline = points(name)
    options: dict[str, Any] = {"baseline": "input"} if method[0] in "di" else {}
    found = []
    for kind in ("bfloat16", "float"):
        model = built(name, kind)
        compiled = onnx_attrib.compile(model, method=method, target="input", **options)
        numeric.check_graph(compiled, model)
        explain = onnx_attrib.Explainer(compiled, providers=["CPUExecutionProvider"])
        wide = {"x": x.astype(np.float32)} if kind == "float" and x.dtype == SIXTEEN else {"x": x}
        given = {"baseline": {"x": baseline.astype(wide["x"].dtype)}} if options else {}
        found.append(explain(wide, target=[1, 2] * (4 if name == "reshape" else 1), **given))
    ours, expected = found
    (attributed,) = expected.attributions
    for a, b in (
        (ours.outputs["y"], expected.outputs["y"]),
        (ours.attributions[attributed], expected.attributions[attributed]),
    ):
        error = np.abs(a.astype(np.float32) - b).max()
        assert error <= 2.0**-6 * np.abs(b).max(), error


@pytest.mark.parametrize("name", ["both", "embedding"])
def test_types_stay(name: str) -> None:
    """Attributions have the type of what they are of."""
    compiled = onnx_attrib.compile(built(name), method="deeplift", delta=True, baseline="input")
    types = {info.name: numeric.element_type(info) for info in compiled.graph.output}
    (attribution,) = [kind for key, kind in types.items() if key.endswith("_attribution")]
    assert attribution == onnx.TensorProto.BFLOAT16


def computing() -> ModelProto:
    """A network that computes in bfloat16."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (bfloat16[N, 4] x) => (bfloat16[N, 3] y) {
        h = MatMul (x, w) t = Tanh (h) k = Softmax (t) y = Mul (k, t) }"""
    )
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(SIXTEEN)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    return model


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_networks_in_bfloat16(method: str) -> None:
    """Compiled right (evaluated in float64), and refused in one line where there are no kernels."""
    model = computing()
    compiled = onnx_attrib.compile(model, method=method, target="seed")
    numeric.check_graph(compiled, model)
    rng = np.random.default_rng(2)
    x, seed = rng.standard_normal((2, 4)), rng.standard_normal((2, 3))
    wide = onnx.reference.ReferenceEvaluator(numeric.widened(compiled))
    y, attribution = wide.run(None, {"x": x, "seed": seed})
    source = onnx.reference.ReferenceEvaluator(numeric.widened(model))
    np.testing.assert_allclose(y, source.run(None, {"x": x})[0])
    if method == "deeplift":
        change = seed * (y - source.run(None, {"x": np.zeros_like(x)})[0])
        # Quotients of differences below the type's precision are taken from the derivative.
        np.testing.assert_allclose(attribution.sum(1), change.sum(1), rtol=1e-2)
    else:
        step = 1e-6 * rng.standard_normal(x.shape)
        ends = [np.sum(seed * source.run(None, {"x": x + s * step})[0]) for s in (1, -1)]
        np.testing.assert_allclose(np.sum(attribution * step), (ends[0] - ends[1]) / 2, rtol=1e-5)
    with pytest.raises(onnx_attrib.CompileError) as refusal:
        onnx_attrib.Explainer(compiled, providers=["CPUExecutionProvider"])
    assert "\n" not in str(refusal.value)
    assert "MatMul" in str(refusal.value)
