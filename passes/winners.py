"""Find the winners of max pools by comparisons, for ONNX Runtime's CPU kernels.

MaxPool with its output Indices leaves the vectorized kernels and takes 15 to 35 ns an output.
Depthwise convolutions that read one entry of every window and compare it with the maximum take half
as long. The first that is equal to it takes off the bar what no other reaches, by which its offset
can be told in the end:

- Sub(Indices, where the samples start) → where the windows start + Σ e(k) · offset(k),
  e(k) = [x(k) = y, and no earlier entry is], a step that is a steep bounded activation
  (2×2 over 64 channels of 64²: 0.9 ms → 0.3 ms; 3×3 over 64 channels of 112²: 6.6 ms → 3.1 ms).

- Where(c, positions, positions) → Where of the floats that they are made of, which takes half as
  long as of integers (524,288 windows: 1.2 ms → 0.7 ms).

This is exact for positions below 2²⁴, offsets below 2²⁰ and numbers up to 2⁷⁶.

Precondition: a finished, sorted graph. Postcondition: the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from onnx_attrib.ir import Graph, Node, Tensor, static
from onnx_attrib.job import Job
from onnx_attrib.passes.pooled import pool_of
from onnx_attrib.passes.rewriting import Rewriting, for_cpu
from onnx_attrib.rules import Site, Unsupported
from onnx_attrib.rules.pooling import pool_window

_UP, _STEEP, _OUT = 2.0**22, 2.0**127, 2.0**126
"""Differences times the first two are zero, or 1 and more; less the third, they never are zero."""
_WHOLE = 1.5 * 2.0**23
"""A float32 beside this is rounded to a whole number."""
_BLOCK = 16
"""Channels in a block of ONNX Runtime's layout."""
_ENTRIES, _OUTPUTS = 9, 4096
"""Entries of a window up to which, and outputs of a sample from which on it pays."""
_COUNTABLE, _OFFSETS = 2**24, 2**20


def winners(job: Job) -> None:
    """Rewrite what computes positions from the indices of max pools."""
    if not for_cpu(job):
        return
    graph = job.graph
    rewriting = Rewriting(graph)
    rewriting.each(_Comparisons(rewriting).change)
    after = Rewriting(graph)
    for node in graph.nodes:
        if node.op == "MaxPool" and len(node.outputs) > 1 and not after.readers(node.outputs[1]):
            node.outputs = node.outputs[:1]


@dataclass
class _Comparisons:
    """``found``: positions as floats, by the names of the integers."""

    rewriting: Rewriting
    found: dict[str, Tensor] = field(default_factory=dict)

    def change(self, node: Node) -> None:
        """Let a node that gives positions, or chooses some, take those found by comparisons."""
        name, graph = node.outputs[0].name, self.rewriting.graph
        if node.op == "Where" and all(t.name in self.found for t in node.inputs[1:]):
            here, there = (self.found[t.name] for t in node.inputs[1:])
            self.found[name] = graph.op.Where(node.inputs[0], here, there)
        elif node.op == "Max" and [self.rewriting.number(t) for t in node.inputs[1:]] == [0]:
            pool = pool_of(self.rewriting, node.outputs[0])
            window = pool and _window(graph, pool)
            if pool is not None and window is not None:
                x, y = pool.inputs[0], pool.outputs[0]
                self.found[name] = window.positions(graph, x, y)
        if name in self.found:
            # For NaN in the data there is none, which the Cast makes the smallest integer.
            whole = graph.op.Cast(self.found[name], to=np.dtype(np.int64))
            node.op = "Max"
            Graph.let_read(node, [whole, graph.constant(0, np.int64)])


def _window(graph: Graph, pool: Node) -> _Window | None:
    """The window, if comparisons are exact and pay."""
    x, y = pool.inputs[0], pool.outputs[0]
    site = Site(graph, pool, (x,), (y,), (None,), ())
    size, out = (static((graph.shape(t) or (None,))[1:]) for t in (x, y))
    if x.dtype != np.float32 or size is None or out is None or len(size) != 3:
        return None
    try:
        window = pool_window(site)
    except Unsupported:
        return None
    if size[0] < _BLOCK or prod(size) > _COUNTABLE or prod(out) < _OUTPUTS:
        return None
    if window.begin is None or prod(window.kernel) > _ENTRIES:
        return None
    rows, columns = (
        np.arange(k) * d - b
        for k, d, b in zip(window.kernel, window.dilations, window.begin, strict=True)
    )
    found = _Window(window.strides, (rows, columns), size, out)
    return found if found.last < _OFFSETS else None


@dataclass(frozen=True)
class _Window:
    """A window of two axes: ``reach`` holds where its entries are, of the first window.

    ``size`` and ``out``: channels, height and width of the data and of the output.
    """

    strides: tuple[int, ...]
    reach: tuple[np.ndarray, np.ndarray]
    size: tuple[int, ...]
    out: tuple[int, ...]

    def positions(self, graph: Graph, x: Tensor, y: Tensor) -> Tensor:
        """Where in its sample, flattened, each window found its maximum, as a float."""
        op, last = graph.op, self.last
        if not last:
            return op.Expand(self._starts(graph), op.Shape(y))
        bar = _scaled(graph, y, -_UP)
        everywhere = op.HardSigmoid(y, alpha=0.0, beta=1.0)
        for row in self.reach[0]:
            for column in self.reach[1]:
                least = bar
                for outside in self._outside(graph, everywhere, int(row), int(column)):
                    least = op.Add(outside, least)
                equal = op.Add(self._entry(graph, x, int(row), int(column)), least)
                first = op.HardSigmoid(equal, alpha=_STEEP, beta=1.0)
                part = self._offset(row, column) / last
                bar = op.Add(_scaled(graph, first, -_OUT * (1 + part)), bar)
        found = op.HardSigmoid(bar, alpha=-1 / _OUT, beta=-1.0)
        offset = _scaled(graph, found, float(last), _WHOLE)
        return op.Add(offset, op.Sub(self._starts(graph), _WHOLE))

    @property
    def last(self) -> int:
        """The offset of a window's last entry."""
        return self._offset(self.reach[0][-1], self.reach[1][-1])

    def _offset(self, row: int, column: int) -> int:
        """How far an entry is from its window's first, in the flattened sample."""
        return int((row - self.reach[0][0]) * self.size[2] + column - self.reach[1][0])

    def _starts(self, graph: Graph) -> Tensor:
        """[channels, height, width]: the position of each window's first entry."""
        channels, height, width = (np.arange(n, dtype=np.float32) for n in self.out)
        rows = height * self.strides[0] + self.reach[0][0]
        columns = width * self.strides[1] + self.reach[1][0]
        plane = rows[:, None] * self.size[2] + columns
        first = channels[:, None, None] * self.size[1] * self.size[2]
        result: Tensor = graph.op.Add(first.astype(np.float32), plane.astype(np.float32))
        return result

    def _entry(self, graph: Graph, x: Tensor, row: int, column: int) -> Tensor:
        """The entry of each window at a row and a column of the first, times ``_UP``."""
        kernel, begin, end = [], [], []
        for at, stride, size, out in zip(
            (row, column), self.strides, self.size[1:], self.out[1:], strict=True
        ):
            before, reach = max(-at, 0), max(at, 0) + 1
            after = max((out - 1) * stride + reach - before - size, 0)
            kernel.append(max(reach, size + before + after - out * stride + 1))
            begin.append(before)
            end.append(after)
        weight = np.zeros((self.size[0], 1, *kernel), np.float32)
        weight[:, :, max(row, 0), max(column, 0)] = _UP
        entry: Tensor = graph.op.Conv(
            x, weight, group=self.size[0], strides=self.strides, pads=begin + end
        )
        return entry

    def _outside(self, graph: Graph, everywhere: Tensor, row: int, column: int) -> list[Tensor]:
        """Tensors that are 0, and ``-_OUT`` where the entry of a window lies in the padding."""
        found = []
        for axis, at in enumerate((row, column)):
            stride, size, out = self.strides[axis], self.size[axis + 1], self.out[axis + 1]
            before = min(-(at // stride) if at < 0 else 0, out)
            after = max(out - 1 - (size - 1 - at) // stride, 0)
            if before:
                found.append(self._far(graph, everywhere, axis, before, 0))
            if after:
                found.append(self._far(graph, everywhere, axis, 0, after))
        return found

    def _far(self, graph: Graph, ones: Tensor, axis: int, before: int, after: int) -> Tensor:
        """``-_OUT`` at the first ``before`` and the last ``after`` places of an axis, 0 elsewhere:
        what a convolution reads in its own padding of a tensor of ones, less what it reads there.
        """
        kernel, pads = [1, 1], [0, 0, 0, 0]
        kernel[axis], pads[axis], pads[axis + 2] = 1 + before + after, before, after
        weight = np.zeros((self.size[0], kernel[0] * kernel[1]), np.float32)
        weight[:, 0 if before else -1] = _OUT
        weight = weight.reshape(-1, 1, *kernel)
        bias = np.full(self.size[0], -_OUT, np.float32)
        result: Tensor = graph.op.Conv(ones, weight, bias, group=self.size[0], pads=pads)
        return result


def _scaled(graph: Graph, tensor: Tensor, factor: float, constant: float = 0.0) -> Tensor:
    """``factor`` · tensor + ``constant``, as a depthwise convolution."""
    channels = int((graph.shape(tensor) or ())[1] or 0)
    weight = np.full((channels, 1, 1, 1), factor, np.float32)
    bias = [np.full(channels, constant, np.float32)] if constant else []
    result: Tensor = graph.op.Conv(tensor, weight, *bias, group=channels)
    return result


__all__ = ["winners"]
