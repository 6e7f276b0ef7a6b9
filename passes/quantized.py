"""Let attribution pass numbers that are rounded to integers and back.

:func:`mark` turns every operator that makes floats of quantized integers (DequantizeLinear, Cast
behind ConvInteger or MatMulInteger) into StraightThrough, with the number that the integer stands
for as one more input: what QuantizeLinear was given, moved and pooled as the integers were, or what
a convolution or matrix product of such numbers gives. :func:`unmark` takes it back; the forward
computation stays what it was, and of the numbers only those that a derivative asks for remain.

Precondition of both: a graph at opset 21. Postcondition of ``unmark``: standard operators only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, annotate, is_float, spelled_out
from onnx_attrib.job import Job
from onnx_attrib.rules.quantization import SOURCE, STRAIGHT_THROUGH

# Operators that give out entries of their first input, whatever these stand for.
_MOVES = frozenset(
    """
    Identity Reshape Flatten Squeeze Unsqueeze Transpose Slice Gather Expand Tile MaxPool
    DepthToSpace SpaceToDepth
    """.split()
)


def mark(job: Job) -> None:
    """Find what stands behind integers, and say so at the operators that turn them back."""
    graph = job.graph
    if not any(node.op == "QuantizeLinear" for node in graph.nodes):
        return
    graph.sort()
    finder = _Finder(graph)
    for node in list(graph.nodes):
        finder.visit(node)
    graph.sort()


def unmark(job: Job) -> None:
    """Restore the operators that ``mark`` changed, and their copies."""
    spelled_out(job.graph.nodes)


def leaks(graph: Graph, nodes: Sequence[Node], active: set[str]) -> list[Node]:
    """Nodes that make floats of quantized attributed numbers, and were not marked."""
    integers: set[str] = set()
    found = []
    for node in nodes:
        if node.op == "QuantizeLinear" and node.inputs[0].name in active:
            integers.add(node.outputs[0].name)
        elif any(t.name in integers for t in node.inputs) and node.op not in _SILENT:
            outputs = {t.name for t in node.outputs if t.name and not is_float(t.dtype)}
            integers |= outputs
            if len(outputs) < len([t for t in node.outputs if t.name]):
                found.append(node)
    return found


_PRODUCTS = frozenset("QLinearConv QLinearMatMul ConvInteger MatMulInteger".split())
STRAIGHT = _PRODUCTS | {"QuantizeLinear"}
"""Operators that give integers, which attribution passes where these are turned back to floats."""
# Barriers that read quantized numbers on purpose, and what was marked.
_SILENT = {row.op for row in rules.table() if isinstance(row, rules.Barrier)} - _PRODUCTS
_SILENT |= {STRAIGHT_THROUGH}


@dataclass(frozen=True)
class _Origin:
    """What an integer tensor stands for: ``source`` / ``scale`` + ``zero``, rounded."""

    source: Tensor
    scale: Tensor | None
    zero: Tensor | None


class _Finder:
    """Origins of integer tensors, computed along the sorted nodes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.origins: dict[str, _Origin] = {}

    def visit(self, node: Node) -> None:
        if node.domain:
            return
        if node.op == "QuantizeLinear":
            self._is(node, _Origin(node.inputs[0], node.inputs[1], _input(node, 2)))
        elif node.op in ("DequantizeLinear", "Cast"):
            self._turned_back(node)
        elif node.op in _MOVES:
            self._moved(node)
        elif node.op in ("QLinearConv", "QLinearMatMul"):
            self._quantized_product(node)
        elif node.op in ("ConvInteger", "MatMulInteger"):
            self._integer_product(node)

    def _is(self, node: Node, origin: _Origin) -> None:
        self.origins[node.outputs[0].name] = origin

    def _origin(self, tensor: Tensor) -> _Origin | None:
        return self.origins.get(tensor.name)

    def _turned_back(self, node: Node) -> None:
        origin = self._origin(node.inputs[0])
        if origin is None or not is_float(node.outputs[0].dtype):
            return
        same_scale = node.op == "Cast" or self._same(_input(node, 1), origin.scale)
        if same_scale and (node.op == "DequantizeLinear" or origin.scale is None):
            self._straight_through(node, origin.source)

    def _straight_through(self, node: Node, source: Tensor) -> None:
        padding = [gs.Variable.empty() for _ in range(SOURCE - len(node.inputs))]
        annotate(node, STRAIGHT_THROUGH, *padding, source)

    def _moved(self, node: Node) -> None:
        origin = self._origin(node.inputs[0])
        if origin is None or len([t for t in node.outputs if t.name]) > 1:
            return
        if origin.scale is not None and self.graph.shape(origin.scale) not in ((), (1,)):
            # An axis of scales may be another one behind.
            return
        source = self.graph.emit(node.op, origin.source, *node.inputs[1:], **node.attrs)
        self._is(node, _Origin(source, origin.scale, origin.zero))

    def _quantized_product(self, node: Node) -> None:
        """x, its scale and zero point, w and its, those of the result, and perhaps a bias."""
        op, (a, b) = self.graph.op, (node.inputs[:3], node.inputs[3:6])
        if not self._origin(a[0]) and not self._origin(b[0]):
            return
        if node.op == "QLinearMatMul":
            if any(self.graph.shape(scale) not in ((), (1,)) for scale in (a[1], b[1])):
                return
            y = op.MatMul(self._real(*a), self._real(*b))
        else:
            bias = _input(node, 8)
            if bias is not None:
                scale = op.Mul(a[1], b[1])
                bias = op.DequantizeLinear(bias, scale, axis=0)
            y = op.Conv(self._real(*a), self._real(*b, axis=0), bias, **node.attrs)
        self._is(node, _Origin(y, node.inputs[6], node.inputs[7]))

    def _integer_product(self, node: Node) -> None:
        """x and w without their zero points; the result is in units of both scales."""
        op, factors = self.graph.op, []
        operands = [(node.inputs[i], _input(node, i + 2)) for i in range(2)]
        if not any(self._origin(q) for q, _ in operands):
            return
        for q, zero in operands:
            origin = self._origin(q)
            if origin is None:
                wide = op.Cast(q, to=np.dtype(np.float32))
                if zero is not None:
                    wide = op.Sub(wide, op.Cast(zero, to=np.dtype(np.float32)))
                factors.append(wide)
            elif origin.scale is None or not self._same(zero, origin.zero):
                return
            else:
                factors.append(op.Div(self._real(q, origin.scale, zero), origin.scale))
        name = "Conv" if node.op == "ConvInteger" else "MatMul"
        y = self.graph.emit(name, *factors, **node.attrs)
        self._is(node, _Origin(y, None, None))

    def _real(self, q: Tensor, scale: Tensor, zero: Tensor | None, *, axis: int = 1) -> Tensor:
        """The floats that integers stand for, marked where these were quantized."""
        y: Tensor = self.graph.op.DequantizeLinear(q, scale, zero, axis=axis)
        origin = self._origin(q)
        if origin is not None:
            self._straight_through(y.inputs[0], origin.source)
        return y

    def _same(self, a: Tensor | None, b: Tensor | None) -> bool:
        # An absent zero point is zero.
        left, right = (np.zeros(()) if t is None else self.graph.value(t) for t in (a, b))
        if left is None or right is None:
            return a is not None and b is not None and _root(a).name == _root(b).name
        return bool(np.array_equal(left.ravel(), right.ravel()))


def _root(tensor: Tensor) -> Tensor:
    """The tensor that this one is another name of."""
    while tensor.inputs and tensor.inputs[0].op == "Identity":
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _input(node: Node, i: int) -> Any:
    return node.inputs[i] if i < len(node.inputs) and node.inputs[i].name else None


__all__ = ["STRAIGHT", "leaks", "mark", "unmark"]
