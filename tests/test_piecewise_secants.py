"""DeepLIFT through piecewise linear functions: the quotient, and the slope without a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

import onnx_attrib

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]


def hard_sigmoid(z: Array) -> Array:
    return np.clip(0.25 * z + 0.5, 0, 1)


FUNCTIONS: dict[str, tuple[str, dict[str, Any], list[float], Function, Function]] = {
    "relu6": ("Clip", {}, [0, 6], lambda z: np.clip(z, 0, 6), lambda z: (z > 0) & (z < 6)),
    "hardtanh": ("Clip", {}, [-1, 1], lambda z: np.clip(z, -1, 1), lambda z: abs(z) < 1),
    "leaky": (
        *("LeakyRelu", {"alpha": 0.125}, []),
        *(lambda z: np.where(z > 0, z, z / 8), lambda z: np.where(z > 0, 1, 0.125)),
    ),
    "abs": ("Abs", {}, [], abs, np.sign),
    "hard sigmoid": (
        *("HardSigmoid", {"alpha": 0.25, "beta": 0.5}, []),
        *(hard_sigmoid, lambda z: 0.25 * (abs(z) < 2)),
    ),
    "shrink": (
        *("Shrink", {"lambd": 0.5}, []),
        *(lambda z: np.where(abs(z) > 0.5, z, 0), lambda z: abs(z) > 0.5),
    ),
}


@pytest.mark.parametrize("baseline", ["fixed", "input"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_quotient_and_the_slope_without_a_step(
    name: str, baseline: str, rng: np.random.Generator
) -> None:
    """y = f(x₁ − x₂): both may change alike, so that z does not, and get the slope there."""
    op, attributes, bounds, f, slope = FUNCTIONS[name]
    count, width = 3, 400
    x, b = (rng.integers(-40, 41, (n, 2, width)) / 8 for n in (count, 1))
    same = rng.integers(2, size=(count, 1, width)).astype(bool)
    x = np.where(same, b + rng.integers(1, 9, same.shape) / 8, x)
    minus = numpy_helper.from_array(np.array([[1, -1]], np.float32), "minus")
    limits = [numpy_helper.from_array(np.array(v, np.float32), f"v{v}") for v in bounds]
    nodes = [
        helper.make_node("MatMul", ["minus", "x"], ["z"]),
        helper.make_node(op, ["z", *(t.name for t in limits)], ["h"], **attributes),
        helper.make_node("Flatten", ["h"], ["flat"]),
        helper.make_node("ReduceSum", ["flat", "one"], ["y"], keepdims=0),
    ]
    one = numpy_helper.from_array(np.array([1]), "one")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["N", 2, width])],
        [info("y", 1, ["N"])],
        [minus, one, *limits],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    given: Any = "input" if baseline == "input" else b.astype(np.float32)
    compiled = onnx_attrib.compile(model, "deeplift", baseline=given)
    session = ort.InferenceSession(compiled.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": x.astype(np.float32)}
    if baseline == "input":
        feeds["x_baseline"] = b.astype(np.float32)
    _, got = session.run(None, feeds)
    z, reference = x[:, 0] - x[:, 1], b[:, 0] - b[:, 1]
    step = z - reference
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = (f(z) - f(reference)) / step
    secant = np.where(step == 0, slope(reference), quotient)
    expected = np.stack([secant, -secant], 1) * (x - b)
    assert (step == 0).any()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
