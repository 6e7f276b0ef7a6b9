"""Subgraphs: sealed as protobufs, and opened to be looked into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, NodeProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from onnx_attrib.ir.copying import Copying
from onnx_attrib.ir.declarations import declaration, dimension
from onnx_attrib.ir.nodes import Node, set_aside, spelled_out
from onnx_attrib.ir.reading import OPSET
from onnx_attrib.ir.tensors import Tensor
from onnx_attrib.protos import captures_of, rename_captures, subgraphs


class Sealing(Copying):
    """What can be ordered, dropped, and moved into or out of subgraphs."""

    def sort(self) -> None:
        """Order the nodes topologically (iteratively; stable for an already sorted graph)."""
        self.nodes[:] = self.in_order(self.nodes)

    def in_order(self, nodes: Sequence[Node]) -> list[Node]:
        """``nodes`` in topological order; ties keep their order."""
        producer = {t.name: i for i, node in enumerate(nodes) for t in node.outputs if t.name}
        needs = [
            sorted({producer[t.name] for t in self.uses(node) if t.name in producer})
            for node in nodes
        ]
        state, order = [0] * len(nodes), list[Node]()
        for start in range(len(nodes)):
            stack = [start]
            while stack:
                i = stack[-1]
                if state[i] == 0:
                    state[i] = 1
                    stack.extend(j for j in reversed(needs[i]) if state[j] == 0)
                else:
                    stack.pop()
                    if state[i] == 1:
                        state[i] = 2
                        order.append(nodes[i])
        return order

    def prune(self, nodes: Sequence[Node], outputs: Iterable[Tensor]) -> list[Node]:
        """``nodes`` (sorted) without those that no output needs."""
        needed = {tensor.name for tensor in outputs}
        kept = []
        for node in reversed(nodes):
            if any(tensor.name in needed for tensor in node.outputs if tensor.name):
                needed.update(tensor.name for tensor in self.uses(node))
                kept.append(node)
        return kept[::-1]

    def subgraph(
        self,
        name: str,
        nodes: Sequence[Node],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        hoist: bool = True,
    ) -> GraphProto:
        """Seal ``nodes`` as a subgraph; constants and outer tensors are captured by name.

        What does not depend on the subgraph's inputs is emitted outside instead: it is computed
        once, not in every iteration. Unless ``hoist`` is false: a branch must not run untaken.
        """
        live = self.prune(self.in_order(spelled_out(nodes)), outputs)
        varying = {tensor.name for tensor in inputs}
        inner: list[Node] = []
        for node in live:
            if not hoist or any(tensor.name in varying for tensor in self.uses(node)):
                varying.update(tensor.name for tensor in node.outputs)
                inner.append(node)
            else:
                self._sink.append(node)
        own = {tensor.name for node in inner for tensor in node.outputs}
        results = []
        with self.collect() as ends:
            for tensor in outputs:
                # An output must come from a node inside, and be one output only.
                results.append(tensor if tensor.name in own else self.op.Identity(tensor))
                own.discard(tensor.name)
        return helper.make_graph(
            [self.proto(node) for node in (*inner, *ends)],
            name,
            [declaration(tensor) for tensor in inputs],
            [declaration(tensor) for tensor in results],
        )

    @contextmanager
    def within(self, node: Node) -> Iterator[None]:
        """Let the body of a Loop that was emitted stand for the graph, to be rewritten."""
        proto = NodeProto()
        proto.CopyFrom(node.kept)
        (body,) = subgraphs(proto)
        inputs, outputs = (
            [self._tensor(info.name) for info in infos] for infos in (body.input, body.output)
        )
        nodes = [self._reopened(inner) for inner in body.node]
        with self.standing(nodes, inputs, outputs):
            yield
        made = [t for inner in nodes for t in inner.outputs if t.name in self.stated]
        ends = {t.name for t in outputs}
        del body.node[:]
        body.node.extend(self.proto(inner) for inner in spelled_out(nodes))
        body.value_info.extend(
            OnnxExporter.export_value_info_proto(t, True) for t in made if t.name not in ends
        )
        self.reseal(node, proto)

    @contextmanager
    def standing(
        self, nodes: list[Node], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Iterator[None]:
        """Let ``nodes``, a list that may change, stand for the graph.

        What they read from outside, constants aside, counts among the inputs.
        """
        own = {t.name for node in nodes for t in node.outputs} | {t.name for t in inputs}
        read = {t.name: t for node in nodes for t in self.uses(node) if t.name not in own}
        outer, sink = (self.gs.nodes, self.gs.inputs, self.gs.outputs), self._sink
        self.gs.nodes = self._sink = nodes
        self.gs.inputs = [*inputs, *(t for t in read.values() if self.value(t) is None)]
        self.gs.outputs = list(outputs)
        try:
            yield
        finally:
            (self.gs.nodes, self.gs.inputs, self.gs.outputs), self._sink = outer, sink

    def _reopened(self, proto: NodeProto) -> Node:
        """A node of a sealed subgraph, on the tensors that it was sealed from."""
        copy = NodeProto()
        copy.CopyFrom(proto)
        kept = set_aside(copy)
        outputs = [self._tensor(name) if name else gs.Variable.empty() for name in proto.output]
        for tensor in outputs:
            list.clear(tensor.inputs)  # the node that was sealed
        node = gs.Node(
            proto.op_type,
            proto.name,
            OnnxImporter.import_attributes(copy.attribute, {}, {}, OPSET, None),
            [self._tensor(name) if name else gs.Variable.empty() for name in proto.input],
            outputs,
            proto.domain or None,
        )
        if kept is not None:
            node.kept, node.captures = kept, [self._tensor(name) for name in captures_of(kept)]
        return node

    def open(
        self, body: GraphProto, inputs: Sequence[Tensor], captures: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Emit the nodes of a subgraph here and return its outputs.

        ``inputs`` stand for the subgraph's own, ``captures`` for the outer tensors it reads, by
        name. Subgraphs inside it stay sealed.
        """
        bound = dict(captures)
        bound.update(zip((t.name for t in body.input), inputs, strict=True))
        for tensor in body.initializer:
            bound[tensor.name] = self.constant(onnx.numpy_helper.to_array(tensor))
        declared = {info.name: info for info in (*body.value_info, *body.output)}
        for proto in body.node:
            self._open_node(proto, bound, declared)
        return [bound[tensor.name] for tensor in body.output]

    def _open_node(
        self,
        proto: NodeProto,
        bound: dict[str, Tensor],
        declared: Mapping[str, onnx.ValueInfoProto],
    ) -> None:
        copy = NodeProto()
        copy.CopyFrom(proto)
        kept = set_aside(copy)
        outputs = [
            self.declared(name, declared.get(name)) if name else gs.Variable.empty()
            for name in proto.output
        ]
        node = gs.Node(
            proto.op_type,
            self.fresh(proto.name or f"attrib/{proto.op_type}.node"),
            OnnxImporter.import_attributes(copy.attribute, {}, {}, OPSET, None),
            [bound[name] if name else gs.Variable.empty() for name in proto.input],
            outputs,
            proto.domain or None,
        )
        if kept is not None:
            captured = captures_of(kept)
            for inner in subgraphs(kept):
                rename_captures(inner, {name: bound[name].name for name in captured})
            node.kept, node.captures = kept, [bound[name] for name in captured]
        self._infer_more(node)
        bound.update((n, t) for n, t in zip(proto.output, outputs, strict=True) if n)
        self._sink.append(node)

    def declared(self, name: str, info: onnx.ValueInfoProto | None) -> Tensor:
        """A new tensor for an opened subgraph, with what its declaration says for sure.

        Symbols are left out: at another point they may stand for another size.
        """
        tensor = gs.Variable(self.fresh(name))
        self._tensors[tensor.name] = tensor
        if info is not None and info.type.HasField("tensor_type"):
            declared = info.type.tensor_type
            if declared.elem_type:
                tensor.dtype = helper.tensor_dtype_to_np_dtype(declared.elem_type)
            if declared.HasField("shape"):
                dims = [dimension(dim) for dim in declared.shape.dim]
                tensor.shape = [dim if isinstance(dim, int) else None for dim in dims]
        return tensor

    def _infer_more(self, node: Node) -> None:
        """Infer types and shapes; keep the declared sizes that inference leaves open."""
        typed = all(tensor.dtype is not None for tensor in node.inputs if tensor.name)
        if not typed or not onnx.defs.has(node.op, node.domain or ""):
            return
        declared = [self.shape(tensor) for tensor in node.outputs]
        self.infer(node)
        for tensor, known in zip(node.outputs, declared, strict=True):
            shape = self.shape(tensor)
            if shape is not None and known is not None and len(shape) == len(known):
                tensor.shape = [k if d is None else d for d, k in zip(shape, known, strict=True)]

    def emit_steps(self, node: Node, formal: str, like: Tensor) -> Tensor:
        """Let a Scan or Loop also emit its body's input ``formal``, as it is at every step.

        ``like`` has its type and shape. Returns the new scan output [steps, …].
        """
        kept = NodeProto()
        kept.CopyFrom(node.kept)
        attributes = {attribute.name: attribute for attribute in kept.attribute}
        body = attributes["body"].g
        index = len(body.output) - (node.op == "Loop")
        name = self.fresh("attrib/step")
        body.node.append(helper.make_node("Identity", [formal], [name]))
        step = gs.Variable(name, like.dtype, like.shape)
        body.output.append(declaration(step))
        for key in ("scan_output_axes", "scan_output_directions"):
            if key in attributes:
                attributes[key].ints.append(0)
        node.kept = kept
        shape = None if like.shape is None else [None, *like.shape]
        steps = gs.Variable(self.fresh("attrib/steps"), like.dtype, shape)
        self._tensors[steps.name] = steps
        self.give_output(node, index, steps)
        return steps
