"""Small models with random weights for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

import onnx_attrib
from onnx_attrib import Explainer

from .numeric.models import session

Array = Any


def built(
    nodes: Sequence[NodeProto],
    weights: dict[str, Array],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, list[Any]],
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(k, kind, shape) for k, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in outputs.items()],
        [from_array(np.asarray(a), k) for k, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def dense(
    rng: np.random.Generator, features: int, classes: int = 4, batch: Any = "N", hidden: int = 7
) -> ModelProto:
    """x [N, features] → tanh layer → y [N, classes]."""
    weights = {
        "w1": rng.normal(size=(features, hidden)).astype(np.float32),
        "b1": rng.normal(size=hidden).astype(np.float32),
        "w2": rng.normal(size=(hidden, classes)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["z1"]),
        helper.make_node("Add", ["z1", "b1"], ["a1"]),
        helper.make_node("Tanh", ["a1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["y"]),
    ]
    x = {"x": (TensorProto.FLOAT, [batch, features])}
    return built(nodes, weights, x, {"y": [batch, classes]})


def linear(rng: np.random.Generator, features: int, classes: int = 3) -> ModelProto:
    """x [N, features] → y [N, classes], one matrix."""
    weights = {"w": rng.normal(size=(features, classes)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    x = {"x": (TensorProto.FLOAT, ["N", features])}
    return built(nodes, weights, x, {"y": ["N", classes]})


def picture(
    rng: np.random.Generator, size: tuple[int, int, int], classes: int = 3, last: bool = False
) -> ModelProto:
    """x [N, C, H, W] (or [N, H, W, C]) → convolution, ReLU, mean → y [N, classes]."""
    channels, height, width = size
    weights = {
        "k": rng.normal(size=(5, channels, 3, 3)).astype(np.float32),
        "b": rng.normal(size=5).astype(np.float32),
        "w": rng.normal(size=(5, classes)).astype(np.float32),
    }
    nodes = [
        *([helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])] if last else []),
        helper.make_node("Conv", ["t" if last else "x", "k", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    weights["axes"] = np.array([2, 3], np.int64)
    nodes[-2].input.append("axes")
    shape = ["N", height, width, channels] if last else ["N", channels, height, width]
    return built(nodes, weights, {"x": (TensorProto.FLOAT, shape)}, {"y": ["N", classes]})


def tokens(rng: np.random.Generator, length: int, words: int = 11, width: int = 5) -> ModelProto:
    """ids [N, T], mask [N, T] → embedding, gated sum over positions → y [N, 3]."""
    weights = {
        "table": rng.normal(size=(words, width)).astype(np.float32),
        "w1": rng.normal(size=(width, 6)).astype(np.float32),
        "w2": rng.normal(size=(6, 3)).astype(np.float32),
        "last": np.array([-1], np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["gate"]),
        helper.make_node("MatMul", ["embedded", "w1"], ["z"]),
        helper.make_node("Tanh", ["z"], ["h"]),
        helper.make_node("Mul", ["h", "gate"], ["g"]),
        helper.make_node("ReduceSum", ["g", "axis"], ["s"], keepdims=0),
        helper.make_node("Tanh", ["s"], ["u"]),
        helper.make_node("MatMul", ["u", "w2"], ["y"]),
    ]
    inputs = {
        "ids": (TensorProto.INT64, ["N", length]),
        "mask": (TensorProto.FLOAT, ["N", length]),
    }
    return built(nodes, weights, inputs, {"y": ["N", 3]})


class Slow:
    """A model evaluated one sample at a time, without the package."""

    def __init__(self, model: ModelProto, output: str = "y") -> None:
        self._session, self._output = session(model), output

    def __call__(self, feeds: dict[str, Array]) -> Array:
        """The output [r, …] of one sample, whose inputs have no batch axis."""
        given = {name: np.asarray(a)[None] for name, a in feeds.items()}
        (found,) = self._session.run([self._output], given)
        return np.asarray(found)[0].astype(np.float64)


def attributions(model: ModelProto, method: str, x: Array, target: Array, **options: Any) -> Array:
    """What the compiled graph attributes, in float64."""
    explain = Explainer(onnx_attrib.compile(model, method, **options), threads=1)
    return explain(x, target=target).attributions["x"].astype(np.float64)


def parts_of(kind: str, shape: tuple[int, ...]) -> list[list[int]]:
    """The flat entries of each feature, written out."""
    places = np.arange(int(np.prod(shape))).reshape(shape)
    if kind == "columns":
        return [[i] for i in range(places.size)]
    if kind == "pixels":
        return [list(places[:, i, j]) for i in range(shape[1]) for j in range(shape[2])]
    return [list(row) for row in places.reshape(-1, shape[-1])]


def removed(x: Array, reference: Array, entries: list[int]) -> Array:
    flat = x.reshape(-1).copy()
    flat[entries] = reference.reshape(-1)[entries]
    return flat.reshape(x.shape)
