"""The graph being compiled: a thin layer over onnx-graphsurgeon.

Operators are emitted by their ONNX names (``graph.op.Mul(a, b)``); every tensor knows its dtype
and, as far as it can be told, its shape. The layer also carries what graphsurgeon cannot:
metadata, documentation strings, attributes of types it drops, and subgraphs. These stay protobufs
here; a rule that has to look inside one opens a copy of it (:meth:`Graph.open`).

:class:`Graph` is built in layers, one a module: reading, emitting, copying, sealing subgraphs, and
taking a model in and giving it back.
"""

from onnx_attrib.ir.emitting import IR_VERSION, Emitter
from onnx_attrib.ir.graph import Graph
from onnx_attrib.ir.nodes import INTERNAL, Node, annotate, bodies, operands, spelled_out
from onnx_attrib.ir.reading import OPSET
from onnx_attrib.ir.tensors import (
    Dim,
    Shape,
    Tensor,
    Values,
    is_float,
    is_integer,
    is_narrow,
    is_tensor,
    static,
)
from onnx_attrib.protos import captured_names, subgraphs

__all__ = [
    "INTERNAL",
    "IR_VERSION",
    "OPSET",
    "Dim",
    "Emitter",
    "Graph",
    "Node",
    "Shape",
    "Tensor",
    "Values",
    "annotate",
    "bodies",
    "captured_names",
    "is_float",
    "is_integer",
    "is_narrow",
    "is_tensor",
    "operands",
    "spelled_out",
    "static",
    "subgraphs",
]
