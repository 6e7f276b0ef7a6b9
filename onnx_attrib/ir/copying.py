"""Nodes evaluated again on other tensors, and nodes given other operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_graphsurgeon as gs
from onnx import NodeProto

from onnx_attrib.ir.emitting import Emitting
from onnx_attrib.ir.nodes import Node, captures, kept_of
from onnx_attrib.ir.tensors import Dim, Tensor, Values
from onnx_attrib.protos import captures_of, rename_captures, subgraphs


class Copying(Emitting):
    """What can be repeated or rewired in a graph."""

    def replicate(
        self,
        nodes: Iterable[Node],
        substitution: Mapping[str, Tensor],
        dims: Mapping[str, Dim] | None = None,
    ) -> Values:
        """Evaluate ``nodes`` (in topological order) again with some tensors substituted.

        Only nodes that depend on a substituted tensor are copied. ``dims`` renames symbolic
        dimensions: the copies' shapes are the originals' with these replaced.
        """
        mapping = dict(substitution)
        for node in nodes:
            if not any(tensor.name in mapping for tensor in self.uses(node)):
                continue
            fixed = [t for t in node.outputs if t.name in substitution]
            copy = gs.Node(
                node.op,
                self.fresh(f"{node.name or node.op}/copy"),
                dict(node.attrs),
                [mapping.get(t.name, t) for t in node.inputs],
                [self._copy_tensor(t, dims or {}) for t in node.outputs],
                node.domain,
            )
            self._copy_extras(node, copy, mapping)
            for original, replica in zip(node.outputs, copy.outputs, strict=True):
                if original.name and original.name not in substitution:
                    mapping[original.name] = replica
            if len(fixed) < len(node.outputs):
                self._sink.append(copy)
        return Values(mapping)

    def repeat(
        self, node: Node, inputs: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """The outputs of a node for other inputs; they have the types and shapes of ``like``."""
        copy = gs.Node(
            node.op,
            self.fresh(f"{node.name or node.op}/copy"),
            dict(node.attrs),
            [gs.Variable.empty() if x is None else x for x in inputs],
            [self._copy_tensor(t, {}) for t in like],
            node.domain,
        )
        self._copy_extras(node, copy, {})
        self._sink.append(copy)
        return list(copy.outputs)

    def _copy_tensor(self, tensor: Tensor, dims: Mapping[str, Dim]) -> Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        shape = self.shape(tensor)
        if shape is not None:
            shape = tuple(dims.get(dim, dim) if isinstance(dim, str) else dim for dim in shape)
        name = self.fresh(f"{tensor.name}/copy")
        replica = gs.Variable(name, tensor.dtype, None if shape is None else list(shape))
        self._tensors[name] = replica
        return replica

    def _copy_extras(self, node: Node, copy: Node, mapping: Mapping[str, Tensor]) -> None:
        kept, captured = kept_of(node), captures(node)
        if kept is None:
            return
        renamed = {t.name: mapping[t.name].name for t in captured if t.name in mapping}
        if renamed:
            original, kept = kept, NodeProto()
            kept.CopyFrom(original)
            for inner in subgraphs(kept):
                rename_captures(inner, renamed)
        copy.kept = kept
        copy.captures = [mapping.get(t.name, t) for t in captured]

    def rewire(self, node: Node, renamed: Mapping[str, Tensor]) -> None:
        """Let ``node`` read other tensors in place of those named."""
        if not any(tensor.name in renamed for tensor in self.uses(node)):
            return
        for i, tensor in enumerate(node.inputs):
            if tensor.name in renamed:
                _let_read(node, i, renamed[tensor.name])
        if captures(node):
            self._copy_extras(node, node, renamed)

    @staticmethod
    def let_read(node: Node, inputs: Sequence[Tensor]) -> None:
        """Give ``node`` these inputs.

        (Assigned to it, graphsurgeon would compare the node with all that read the former ones.)
        """
        for tensor in node.inputs:
            _forget(tensor, node)
        list.clear(node.inputs)
        node.inputs.extend(inputs)

    def reseal(self, node: Node, proto: NodeProto) -> None:
        """Give ``node`` the subgraphs of ``proto``, which may read other outer tensors."""
        node.kept = proto
        node.captures = [self._tensor(name) for name in captures_of(proto)]

    def give_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make ``tensor`` the output ``index`` of ``node``, which has none there yet."""
        outputs = list(node.outputs)
        outputs += [gs.Variable.empty() for _ in range(index + 1 - len(outputs))]
        outputs[index] = tensor
        node.outputs = outputs


def _let_read(node: Node, i: int, tensor: Tensor) -> None:
    _forget(node.inputs[i], node)
    list.__setitem__(node.inputs, i, tensor)
    list.append(tensor.outputs, node)


def _forget(tensor: Tensor, node: Node) -> None:
    """Take a node off the readers of a tensor, once."""
    readers = tensor.outputs
    list.pop(readers, next(k for k, reader in enumerate(readers) if reader is node))
