"""The graph as it is read: its tensors, its nodes, their attributes and constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import NodeProto, TensorProto, helper
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from onnx_attrib.ir.nodes import Node, kept_of, operands, proto_of
from onnx_attrib.ir.tensors import Shape, Tensor

Surgeon: TypeAlias = gs.Graph

OPSET = 21
"""Emitted opset: the newest that has CUDA kernels for MaxPool, Elu and their like."""


class Reading:
    """What a graph can be asked."""

    gs: Surgeon
    own: frozenset[str]
    """The names of the model's own tensors."""
    stated: set[str]
    """The names of tensors whose type and shape are written to the file."""
    _imports: dict[str, int]
    _initializers: dict[str, TensorProto]
    _tensors: dict[str, Tensor]

    @property
    def nodes(self) -> list[Node]:
        return self.gs.nodes

    @property
    def inputs(self) -> list[Tensor]:
        return self.gs.inputs

    @property
    def outputs(self) -> list[Tensor]:
        return self.gs.outputs

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            # graphsurgeon knows only what a node reads: not a weight that only subgraphs use.
            kept = self._initializers.get(name)
            self._tensors[name] = (
                gs.Variable(name) if kept is None else OnnxImporter.import_tensor(kept)
            )
        return self._tensors[name]

    def find(self, name: str) -> Tensor | None:
        """The tensor of that name, or None."""
        return self._tensors.get(name)

    def tensors(self) -> Mapping[str, Tensor]:
        """Every named tensor of the graph."""
        return self._tensors

    def uses(self, node: Node) -> list[Tensor]:
        """What a node reads: its inputs, then what its subgraphs capture."""
        return [tensor for tensor in operands(node) if tensor.name]

    def proto(self, node: Node) -> NodeProto:
        """The node as ONNX writes it, with everything graphsurgeon set aside restored."""
        return proto_of(node)

    def version(self, domain: str | None) -> int:
        """The version of a domain's operators that the model imports."""
        return self._imports.get(domain, 1) if domain else OPSET

    def attr(self, node: Node, name: str) -> Any:
        """An attribute's value, or the operator's default for it, or None."""
        if name in node.attrs:
            value = node.attrs[name]
            return value.values if isinstance(value, gs.Constant) else value
        kept = kept_of(node)
        for attribute in kept.attribute if kept else ():
            if attribute.name == name:
                return helper.get_attribute_value(attribute)
        schema = onnx.defs.get_schema(node.op, self.version(node.domain), node.domain or "")
        declared = schema.attributes.get(name)
        if declared is None or not declared.default_value.name:
            return None
        value = helper.get_attribute_value(declared.default_value)
        return value.decode() if isinstance(value, bytes) else value

    @staticmethod
    def dtype(tensor: Tensor) -> np.dtype[Any]:
        return np.dtype(tensor.dtype)

    @staticmethod
    def shape(tensor: Tensor) -> Shape | None:
        return None if tensor.shape is None else tuple(tensor.shape)

    def value(self, tensor: Tensor | None) -> np.ndarray | None:
        """A constant's value; None for anything computed at run time (or absent)."""
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values)
        return None
