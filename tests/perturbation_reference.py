"""Occlusion and Shapley values restated slowly, and small models to try them on.

The loops are written from the definitions: Zeiler and Fergus 2014 with overlapping windows averaged
as in Captum, and the Shapley value as the mean marginal contribution over all orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

import onnx_attrib

from .test_contract import text

Array = np.ndarray
Score = Callable[[Array], Array]
"""From values of one tensor [N, …] to S of each sample [N]."""


# -- the definitions -------------------------------------------------------------------------------


def windows(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[Any]:
    """Slices of all windows: at multiples of the stride until the end is covered."""
    axes = []
    for size, w, s in zip(shape, window, stride, strict=True):
        starts = [0]
        while starts[-1] + w < size:
            starts.append(starts[-1] + s)
        axes.append([slice(start, min(start + w, size)) for start in starts])
    return list(itertools.product(*axes))


def occluded(
    score: Score, x: Array, base: Array, window: Sequence[int], stride: Sequence[int]
) -> Array:
    """The mean change over the windows that cover an entry."""
    total, count = np.zeros(x.shape), np.zeros(x.shape[1:])
    before = score(x).astype(np.float64)
    for where in windows(x.shape[1:], window, stride):
        there = x.copy()
        there[:, *where] = np.broadcast_to(base, x.shape)[:, *where]
        change = before - score(there)
        total[:, *where] += change.reshape(-1, *[1] * (x.ndim - 1))
        count[where] += 1
    return total / count


def shapley(score: Score, x: Array, base: Array, features: Sequence[Any]) -> Array:
    """The exact Shapley value of each feature (a list of slices), [N, features]."""
    base = np.broadcast_to(base, x.shape)
    total = np.zeros((len(x), len(features)))
    for order in itertools.permutations(range(len(features))):
        there = x.copy()
        before = score(there).astype(np.float64)
        for i in order:
            there[:, *features[i]] = base[:, *features[i]]
            after = score(there).astype(np.float64)
            total[:, i] += before - after
            before = after
    return total / math.factorial(len(features))


def session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def scored(
    model: ModelProto, seed: Array, name: str = "x", rest: Mapping[str, Array] | None = None
) -> Score:
    """S of each sample as a function of one input."""
    held = session(model)
    output = next(o.name for o in held.get_outputs() if "float" in o.type or "double" in o.type)

    def score(x: Array) -> Array:
        (y,) = held.run([output], {**(rest or {}), name: x})
        terms: Array = (seed * y).reshape(len(y), -1).sum(axis=1)
        return terms

    return score


# -- models ----------------------------------------------------------------------------------------


def cnn(rng: np.random.Generator, shape: str = "N, 3, 7, 6") -> ModelProto:
    """Convolution → ReLU → overlapping maximum → mean over positions → dense."""
    return text(
        f"""g (float[{shape}] x) => (float[{shape.split(",")[0]}, 4] y)
        {{
            c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            r = Relu(c)
            p = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(r)
            q = GlobalAveragePool(p)
            f = Flatten(q)
            y = Gemm(f, d)
        }}""",
        w=rng.standard_normal((5, 3, 3, 3)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
        d=rng.standard_normal((5, 4)).astype(np.float32),
    )


def trees(rng: np.random.Generator, classes: int = 1, columns: int = 4) -> ModelProto:
    """Random trees of depth 2 over [N, columns] as ai.onnx.ml writes them."""
    ids, nodes, modes, features, values, yes, no = [], [], [], [], [], [], []
    leaves: dict[str, list[Any]] = {"treeids": [], "nodeids": [], "ids": [], "weights": []}
    for tree in range(6):
        for node in range(7):
            inner = node < 3
            ids.append(tree)
            nodes.append(node)
            modes.append("BRANCH_LEQ" if inner else "LEAF")
            features.append(int(rng.integers(columns)) if inner else 0)
            values.append(float(rng.normal()) if inner else 0.0)
            yes.append(2 * node + 1 if inner else 0)
            no.append(2 * node + 2 if inner else 0)
            if not inner:
                leaves["treeids"].append(tree)
                leaves["nodeids"].append(node)
                leaves["ids"].append(int(rng.integers(classes)))
                leaves["weights"].append(float(rng.normal()))
    prefix = "class" if classes > 1 else "target"
    op = "TreeEnsembleClassifier" if classes > 1 else "TreeEnsembleRegressor"
    more: dict[str, Any] = {f"{prefix}_{key}": value for key, value in leaves.items()}
    more |= {"classlabels_int64s": [*range(classes)]} if classes > 1 else {"n_targets": 1}
    node = helper.make_node(
        op,
        ["x"],
        ["label", "y"] if classes > 1 else ["y"],
        domain="ai.onnx.ml",
        nodes_treeids=ids,
        nodes_nodeids=nodes,
        nodes_modes=modes,
        nodes_featureids=features,
        nodes_values=values,
        nodes_truenodeids=yes,
        nodes_falsenodeids=no,
        **more,
    )
    info = helper.make_tensor_value_info
    outputs = [info("y", TensorProto.FLOAT, ["N", classes])]
    outputs += [info("label", TensorProto.INT64, ["N"])] if classes > 1 else []
    graph = helper.make_graph(
        [node], "trees", [info("x", TensorProto.FLOAT, ["N", columns])], outputs
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def compiled_and_checked(source: ModelProto, method: str, **options: Any) -> ModelProto:
    compiled = onnx_attrib.compile(source, method, **options)
    onnx.checker.check_model(compiled, full_check=True)
    return compiled


def loops(model: ModelProto) -> int:
    return sum(node.op_type == "Loop" for node in model.graph.node)
