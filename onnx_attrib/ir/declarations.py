"""Declared types and shapes: between the graph's tensors and ONNX's protobufs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TypeProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_attrib.ir.tensors import Dim, Tensor


def declaration(tensor: Tensor) -> onnx.ValueInfoProto:
    """An input or output of a subgraph: type and rank.

    Sizes are left to run time: what is known as batch 1 may be a batch of N there.
    """
    free = gs.Variable(tensor.name, tensor.dtype, tensor.shape and [None] * len(tensor.shape))
    return OnnxExporter.export_value_info_proto(free, True)


def rank_of(info: onnx.ValueInfoProto) -> int | None:
    """The rank that is declared, if one is."""
    kind = info.type.tensor_type
    return len(kind.shape.dim) if kind.HasField("shape") else None


def dimension(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    """A size, a symbol, or None where nothing is said."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param else None


def type_proto(tensor: Tensor) -> TypeProto:
    """A tensor's type and shape as ONNX writes them."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    shape = None if tensor.shape is None else list(tensor.shape)
    if getattr(tensor, "type", "tensor_type") == "sequence_type":
        return helper.make_sequence_type_proto(helper.make_tensor_type_proto(elem_type, shape))
    return helper.make_tensor_type_proto(elem_type, shape)
