"""The source model in float64: its types widened, and ONNX's reference evaluator mended."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import (
    op_affine_grid,
    op_causal_conv_with_state,
    op_grid_sample,
    op_linear_attention,
)

from .. import recurrent_reference, reference_operators
from .models import FLOATS, Array, all_nodes, element_type, graphs

# Attributes that hold an element type, by any of the names that ONNX gives them.
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"}
)

# The reference evaluator spells this one out with casts to float32, unless told otherwise.
_STASHING = frozenset({"GroupNormalization"})
# The evaluator implements these in the type of their input, and refuses another stash_type.
_NOT_STASHING = frozenset({"LayerNormalization", "RMSNormalization"})


def widened(model: ModelProto) -> ModelProto:
    """The same computation in float64: weights, constants, casts and declared types.

    Casts to a narrower float become casts to float64, which is the function whose derivative a
    network in mixed precision stands for. Other types stay.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for graph in graphs(result.graph):
        _widen_graph(graph)
    for node in all_nodes(result):
        _widen_node(node)
    return result


def _widen_graph(graph: GraphProto) -> None:
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if element_type(info) in FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen_tensor(tensor)


def _widen_node(node: NodeProto) -> None:
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", from_array(np.zeros(1))))
    if node.op_type in _STASHING and not any(a.name == "stash_type" for a in node.attribute):
        node.attribute.append(helper.make_attribute("stash_type", TensorProto.FLOAT))
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif node.op_type in _NOT_STASHING and attribute.name == "stash_type":
            continue
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in FLOATS:
            attribute.i = TensorProto.DOUBLE
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            data = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            wide = helper.make_attribute("value", from_array(np.array(data, np.float64)))
            attribute.CopyFrom(wide)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in FLOATS:
        tensor.CopyFrom(from_array(to_array(tensor).astype(np.float64), tensor.name))


class Erf(OpRun):
    """The reference evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x), x.dtype),)


class LpNormalization(OpRun):
    """The reference evaluator's own forgets the absolute value of the definition."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array]:
        norm = np.sum(np.abs(x) ** p, axis=axis, keepdims=True) ** (1 / p)
        return (np.where(norm == 0, 0, x / norm),)


class Softsign(OpRun):
    """The reference evaluator's own fails for scalars."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(x / (1 + np.abs(x)), x.dtype),)


class GlobalMaxPool(OpRun):
    """The reference evaluator's own reduces one axis at a time and loses count."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class Evaluator(ReferenceEvaluator):
    """The reference evaluator with the operators above, in function bodies too."""

    def __init__(self, proto: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["new_ops"] = [
            Erf,
            GlobalMaxPool,
            LpNormalization,
            Softsign,
            *recurrent_reference.OPERATORS,
            *reference_operators.OPERATORS,
        ]
        super().__init__(proto, *args, **kwargs)


class _WideNumpy:
    """numpy for the operators of the evaluator that compute in float32 whatever they are given."""

    float32 = np.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_ROUNDING = (op_affine_grid, op_causal_conv_with_state, op_grid_sample, op_linear_attention)


@contextmanager
def wide_evaluator() -> Iterator[None]:
    """While it holds, the evaluator rounds nothing to float32."""
    with ExitStack() as stack:
        for module in _ROUNDING:
            stack.enter_context(mock.patch.object(module, "np", _WideNumpy()))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(np.errstate(all="ignore"))
        warnings.simplefilter("ignore")
        yield
