"""Operators written as protobufs, for models that are not yet a :class:`onnx_attrib.ir.Graph`.

Passes that change a model before its shapes are known replace a node by others: they are told
what the file says about the node (:class:`Call`) and write its definition (:class:`Writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from onnx_attrib.ir import Shape, subgraphs
from onnx_attrib.ml_types import complete

Types = Mapping[str, TypeProto]


class Writer:
    """Writes nodes by their ONNX names: ``op.Mul(a, b)``. Tensors are names.

    Operands may also be arrays, lists of integers (int64 constants) or None (left out). One
    output is returned as a name, several as a tuple. Attributes that are None are left out.
    """

    def __init__(self, taken: set[str], label: str) -> None:
        self.nodes: list[NodeProto] = []
        self._taken = taken
        self._label = label
        self.op = self

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        return partial(self.write, op_type)

    def write(self, op_type: str, *operands: Any, outputs: int = 1, **attrs: Any) -> Any:
        """Append a node."""
        names = [self.fresh(op_type) for _ in range(outputs)]
        inputs = [self._operand(operand) for operand in operands]
        attrs = {k: v for k, v in attrs.items() if v is not None}
        node = helper.make_node(op_type, inputs, names, name=names[0], **attrs)
        self.nodes.append(node)
        return names[0] if outputs == 1 else tuple(names)

    def fresh(self, stem: str) -> str:
        """A name that nothing else in the model has."""
        base = name = f"{self._label}/{stem}"
        count = 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def _operand(self, operand: Any) -> str:
        if operand is None:
            return ""
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand, np.int64) if isinstance(operand, list) else operand
        value: str = self.write("Constant", value=numpy_helper.from_array(array))
        return value


@dataclass(frozen=True)
class Call:
    """A node to replace, with what is known of its inputs' types."""

    node: NodeProto
    version: int
    types: Types
    constants: Mapping[str, TensorProto]

    def has(self, i: int) -> bool:
        return i < len(self.node.input) and bool(self.node.input[i])

    def x(self, i: int) -> str | None:
        """The name of input ``i``, or None."""
        return self.node.input[i] if self.has(i) else None

    def wants(self, i: int) -> bool:
        """Whether the model names output ``i``."""
        return i < len(self.node.output) and bool(self.node.output[i])

    def attr(self, name: str) -> Any:
        """An attribute's value, or the operator's default for it, or None."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return _text(helper.get_attribute_value(attribute))
        declared = onnx.defs.get_schema(self.node.op_type, self.version).attributes.get(name)
        if declared is None or not declared.default_value.name:
            return None
        return _text(helper.get_attribute_value(declared.default_value))

    def dtype(self, i: int = 0) -> np.dtype[Any]:
        """The element type of input ``i``."""
        kind = self.types.get(self.node.input[i])
        if kind is None or not kind.tensor_type.elem_type:
            raise Inexpressible(f"the type of its input '{self.node.input[i]}' is unknown")
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))

    def shape(self, i: int = 0) -> Shape | None:
        """The shape of input ``i``, as far as it is known."""
        kind = self.types.get(self.node.input[i]) if self.has(i) else None
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return tuple(
            int(d.dim_value) if d.HasField("dim_value") else d.dim_param or None
            for d in kind.tensor_type.shape.dim
        )

    def rank(self, i: int = 0) -> int:
        shape = self.shape(i)
        if shape is None:
            raise Inexpressible(f"the rank of its input '{self.node.input[i]}' is unknown")
        return len(shape)

    def value(self, i: int) -> np.ndarray | None:
        """The value of input ``i`` if it is a constant."""
        tensor = self.constants.get(self.node.input[i]) if self.has(i) else None
        return None if tensor is None else numpy_helper.to_array(tensor)


class Inexpressible(Exception):
    """Raised by a definition that cannot be written for this node; the message says why."""


Definition = Callable[[Writer, Call], Sequence[str | None]]
"""Writes what a node computes; returns the name of each output (None for one not needed)."""


@dataclass
class Rewriter:
    """Replaces nodes of a model, in its subgraphs too.

    ``choose`` gives the definition of a node, or None to keep it. ``refused`` collects a line
    for each node whose definition could not be written.
    """

    choose: Callable[[NodeProto], Definition | None]
    version: int
    refused: list[str] = field(default_factory=list)

    def run(self, model: ModelProto) -> int:
        """Rewrite ``model`` in place; returns how many nodes were replaced."""
        self._replaced, self._taken = 0, set(taken_names(model.graph))
        if any(self.choose(node) for node in all_nodes(model.graph)):
            self._graph(model.graph, {}, {})
        return self._replaced

    def _graph(self, graph: GraphProto, types: Types, constants: Mapping[str, TensorProto]) -> None:
        types = {**types, **declared(graph)}
        constants = {**constants, **constant_values(graph)}
        nodes = []
        for node in graph.node:
            for inner in subgraphs(node):
                self._graph(inner, types, constants)
            nodes.extend(self._rewritten(node, types, constants))
        del graph.node[:]
        graph.node.extend(nodes)

    def _rewritten(
        self, node: NodeProto, types: Types, constants: Mapping[str, TensorProto]
    ) -> list[NodeProto]:
        kept = NodeProto()
        kept.CopyFrom(node)
        definition = self.choose(node)
        if definition is None:
            return [kept]
        writer = Writer(self._taken, node.name or f"{node.output[0]}/{node.op_type}")
        try:
            results = definition(writer, Call(kept, self.version, types, constants))
        except Inexpressible as reason:
            self.refused.append(f"{node.op_type} '{node.name or node.output[0]}': {reason}")
            return [kept]
        self._replaced += 1
        return renamed(writer, kept, results)


def renamed(writer: Writer, node: NodeProto, results: Sequence[str | None]) -> list[NodeProto]:
    """The writer's nodes, computing the outputs of ``node`` under their own names."""
    inner = {name for written in writer.nodes for name in written.output}
    names: dict[str, str] = {}
    for result, output in zip(results, node.output, strict=False):
        if result is None or not output:
            continue
        if result in inner and result not in names:
            names[result] = output
        else:
            writer.nodes.append(helper.make_node("Identity", [result], [output]))
    for written in writer.nodes:
        written.input[:] = [names.get(name, name) for name in written.input]
        written.output[:] = [names.get(name, name) for name in written.output]
    return writer.nodes


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


# What ONNX infers nothing for, and an operator whose output is like the first input as well.
_ALIKE = {"GroupNormalization": "InstanceNormalization"}


def infer_shapes(model: ModelProto, **options: bool) -> ModelProto:
    """ONNX's type and shape inference, also past operators that it knows nothing about."""
    nodes = list(all_nodes(model.graph))
    unknown = {
        k: node.op_type
        for k, node in enumerate(nodes)
        if not node.domain and node.op_type in _ALIKE
    }
    for k, name in unknown.items():
        nodes[k].op_type = _ALIKE[name]
    try:
        inferred = onnx.shape_inference.infer_shapes(model, **options)
    finally:
        for k, name in unknown.items():
            nodes[k].op_type = name
    results = list(all_nodes(inferred.graph)) if unknown else []
    for k, name in unknown.items():
        results[k].op_type = name
    if complete(inferred.graph, declared(inferred.graph), inferred.opset_import):
        return infer_shapes(inferred, **options)
    return inferred


def declared(graph: GraphProto) -> dict[str, TypeProto]:
    """Types by tensor name, as the graph states them."""
    types = {
        t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in graph.initializer
    }
    infos = (*graph.value_info, *graph.input, *graph.output)
    types.update((info.name, info.type) for info in infos if info.HasField("type"))
    return types


def constant_values(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializers and Constant nodes that hold a tensor, by name."""
    values = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain:
            values.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return values


def taken_names(graph: GraphProto) -> Iterator[str]:
    """Names in use, those of nodes and of inner graphs included."""
    yield from (info.name for info in (*graph.input, *graph.output))
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield node.name
        yield from node.output
        for inner in subgraphs(node):
            yield from taken_names(inner)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


__all__ = [
    "Call",
    "Definition",
    "Inexpressible",
    "Rewriter",
    "Writer",
    "all_nodes",
    "constant_values",
    "declared",
    "renamed",
    "taken_names",
]
