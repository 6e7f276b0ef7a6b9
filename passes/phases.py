"""Compute the gradients of strided convolutions phase by phase, for ONNX Runtime's CPU kernels.

What a transposed convolution of stride s has at x = s · q + r is, for each phase r, a convolution
by every s-th entry of the kernel. ONNX Runtime's convolutions are faster than its transposed one,
and add a sum on the way:

- ConvTranspose(m, W), stride 2 → four convolutions, interleaved
  (512 → 256 channels, 3×3, 7² → 14²: 1.5 ms → 1.2 ms; 2² → 4², batch 8: 3.4 ms → 1.6 ms);
- Add of two such (a block and its shortcut) → the phases added, and interleaved once
  (128 → 64 channels, 3×3 and 1×1, 28² → 56²: 1.5 ms → 1.1 ms);
- ConvTranspose(m, W), stride 2, 1×1 → the convolution of m with zeros between
  (2048 → 1024 channels, 2² → 4², batch 8: 6.2 ms → 4.6 ms);
- ConvTranspose(m, W), stride 2, each channel by itself → one convolution of m with zeros between
  (96 channels, 3×3, 14² → 28²: 0.28 ms → 0.21 ms).

Zeros between are a product of m enlarged with a mask that a convolution makes from one channel,
both in ONNX Runtime's layout (48 channels, 56² → 112², with the convolution after: 1.02 ms →
0.86 ms).

Precondition: a finished, sorted graph. Postcondition: the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_attrib.ir import Dim, Graph, Node, Tensor, static
from onnx_attrib.job import Job
from onnx_attrib.passes.rewriting import Rewriting, for_cpu

_STRIDE = 2
_BLOCK = 16
"""Channels in a block of ONNX Runtime's layout."""
Phases = dict[tuple[int, int], Tensor | None]
"""What is at x = s · q + r, by r for each axis; None: zeros."""


def phases(job: Job) -> None:
    """Rewrite the transposed convolutions that the sweeps have emitted."""
    if not for_cpu(job):
        return
    graph = job.graph
    rewriting = Rewriting(graph)
    added = [t for node in graph.nodes if node.op == "Add" for t in node.inputs]
    split = _Split(rewriting, {t.name for t in added if rewriting.readers(t) == 1})
    rewriting.each(split.rewrite)


@dataclass
class _Split:
    """``summed``: names of tensors that nothing but one sum reads. ``apart``: their phases.

    ``masks``: ones at a phase and zeros elsewhere, by their sizes and the phase.
    """

    rewriting: Rewriting
    summed: set[str]
    apart: dict[str, Phases] = field(default_factory=dict)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.rewriting.graph

    def rewrite(self, node: Node) -> None:
        """Split a node, or interleave what it is the first to need whole."""
        graph, result = self.graph, node.outputs[0]
        if self._spread(node):
            return
        found = _phases(graph, node)
        if node.op == "Add" and all(t.name in self.apart for t in node.inputs):
            found = _added(graph, *(self.apart[t.name] for t in node.inputs))
        elif node.op == "Add":
            for tensor in node.inputs:
                apart = self.apart.get(tensor.name)
                whole = apart and self._whole(apart, tensor)
                if whole is not None:
                    graph.rewire(node, {tensor.name: whole})
        if found is not None and result.name in self.summed:
            self.apart[result.name] = found
        elif found is not None and (whole := self._whole(found, result)) is not None:
            node.op, node.attrs = "Identity", {}
            Graph.let_read(node, [whole])

    def _whole(self, apart: Phases, like: Tensor) -> Tensor | None:
        """The phases put together; None where some, but not all but one, are zeros."""
        given = {r: phase for r, phase in apart.items() if phase is not None}
        if len(given) == len(apart):
            return _interleaved(self.graph, apart, like)
        sizes = static((self.graph.shape(like) or (None,))[2:])
        if len(given) != 1 or sizes is None or any(n % _STRIDE for n in sizes):
            return None
        ((r, phase),) = given.items()
        return self._between(phase, like, r, inside=True)

    # -- zeros between -----------------------------------------------------------------------------

    def _spread(self, node: Node) -> bool:
        """Turn a depthwise one into a convolution by the turned kernel; whether it was one."""
        graph = self.graph
        sizes = _sizes(graph, node)
        if sizes is None or graph.attr(node, "group") != sizes[0][0] or sizes[1][0] != 1:
            return False
        (channels, *given), (_, *kernel), (_, *made) = sizes
        begin = list(graph.attr(node, "pads") or (0,) * 4)
        wide = [_STRIDE * n for n in given]
        before = [k - 1 - b for k, b in zip(kernel, begin, strict=False)]
        after = [
            out - n - b + k - 1 for out, n, b, k in zip(made, wide, before, kernel, strict=True)
        ]
        if min(before + after) < 0:
            return False
        m, weight = node.inputs
        # What a gate or a layer gives is in blocks.
        inside = self.rewriting.maker(m, "Conv", "Where") is not None
        spread = self._between(m, m, (0, 0), inside)
        turned = graph.op.Slice(weight, [-1, -1], [-(2**31)] * 2, [2, 3], [-1, -1])
        node.op = "Conv"
        Graph.let_read(node, [spread, turned])
        node.attrs = {"group": channels, "pads": before + after}
        return True

    def _between(self, phase: Tensor, like: Tensor, r: tuple[int, int], inside: bool) -> Tensor:
        """[N, C, 2 · h, 2 · w]: the phase r, [N, C, h, w], and zeros for all other.

        ``inside``: it is in blocks, and the product will be, with such a mask.
        """
        op = self.graph.op
        large = op.Resize(
            phase,
            None,
            np.array([1, 1, _STRIDE, _STRIDE], np.float32),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        batch, channels = (self.graph.shape(like) or (None, None))[:2]
        high, wide = (_STRIDE * int(n or 0) for n in (self.graph.shape(phase) or ())[2:])
        rows, columns = (
            (np.arange(n) % _STRIDE == k).astype(np.float32)
            for n, k in zip((high, wide), r, strict=True)
        )
        plane = np.outer(rows, columns)[None, None]
        key = (batch, channels, high, wide, r)
        mask = self.masks.get(key)
        if inside and mask is None and (count := self._count(batch)) is not None:
            one = op.Expand(plane, op.Concat(count, [1, high, wide], axis=0))
            one.shape = [batch, 1, high, wide]
            mask = op.Conv(one, np.ones((int(channels or 0), 1, 1, 1), np.float32))
            self.masks[key] = mask
        result: Tensor = op.Mul(large, mask if inside and mask is not None else plane)
        for tensor in (large, mask, result):
            if tensor is not None:
                tensor.shape = [batch, channels, high, wide]
        return result

    def _count(self, batch: Dim) -> Tensor | None:
        """[1]: the size of the batch, if a size of the model's inputs says it."""
        if isinstance(batch, int):
            return self.graph.constant([batch], np.int64)
        for tensor in self.graph.inputs:
            for axis, dim in enumerate(self.graph.shape(tensor) or ()):
                if dim == batch is not None:
                    size: Tensor = self.graph.op.Shape(tensor, start=axis, end=axis + 1)
                    return size
        return None


def _added(graph: Graph, one: Phases, other: Phases) -> Phases:
    return {
        r: graph.op.Add(a, b) if a is not None and b is not None else a if b is None else b
        for (r, a), b in zip(one.items(), other.values(), strict=True)
    }


# -- one transposed convolution --------------------------------------------------------------------


@dataclass(frozen=True)
class _Taps:
    """The kernel's entries for one phase along one axis, from ``last`` back to 0 by the stride.

    ``pads``: with them, the convolution by these has an output for every q.
    """

    last: int
    pads: tuple[int, int]


def _sizes(graph: Graph, node: Node) -> list[tuple[int, ...]] | None:
    """[channels, height, width] of a transposed convolution's input, weight and output.

    None if it is not one that a sweep has emitted, over two axes of known sizes with stride 2.
    """
    if node.op != "ConvTranspose" or node.outputs[0].name in graph.own or len(node.inputs) != 2:
        return None
    shapes = [graph.shape(t) for t in (*node.inputs, node.outputs[0])]
    found = [known for shape in shapes if (known := static(shape and shape[1:])) is not None]
    if len(found) != 3 or len(found[0]) != 3 or node.inputs[0].dtype != np.float32:
        return None
    plain = {"dilations": [1, 1], "strides": [_STRIDE, _STRIDE]}
    if any(list(graph.attr(node, name) or [1, 1]) != value for name, value in plain.items()):
        return None
    return found


def _phases(graph: Graph, node: Node) -> Phases | None:
    """The phases of a transposed convolution, or None if it is to stay as it is."""
    sizes = _sizes(graph, node)
    if sizes is None or graph.attr(node, "group") != 1:
        return None
    given, kernel, made = sizes
    if given[0] % _BLOCK or made[0] % _BLOCK:
        return None
    m, weight = node.inputs
    begin = list(graph.attr(node, "pads") or (0,) * 4)
    rows, columns = (
        [_taps(r, begin[j], kernel[j + 1], given[j + 1], made[j + 1]) for r in range(_STRIDE)]
        for j in range(2)
    )
    if any(taps is not None and min(taps.pads) < 0 for taps in rows + columns):
        return None
    return {
        (i, j): None if a is None or b is None else _convolved(graph, m, weight, a, b)
        for i, a in enumerate(rows)
        for j, b in enumerate(columns)
    }


def _taps(r: int, begin: int, kernel: int, given: int, made: int) -> _Taps | None:
    """The taps a of phase r, which meet m at q + (r + begin − a) / stride; None without any."""
    first = (r + begin) % _STRIDE
    if first >= kernel:
        return None
    last = first + (kernel - 1 - first) // _STRIDE * _STRIDE
    before, after = ((a - r - begin) // _STRIDE for a in (last, first))
    return _Taps(last, (before, -(-made // _STRIDE) - given - after))


def _convolved(graph: Graph, m: Tensor, weight: Tensor, rows: _Taps, columns: _Taps) -> Tensor:
    lasts, ends = [rows.last, columns.last], [-(2**31)] * 2
    taps = graph.op.Slice(weight, lasts, ends, [2, 3], [-_STRIDE] * 2)
    taps = graph.op.Transpose(taps, perm=[1, 0, 2, 3])
    pads = [rows.pads[0], columns.pads[0], rows.pads[1], columns.pads[1]]
    result: Tensor = graph.op.Conv(m, taps, pads=pads)
    return result


def _interleaved(graph: Graph, apart: Phases, like: Tensor) -> Tensor:
    """[N, C, H, W] of the phases, each [N, C, ⌈H/2⌉, ⌈W/2⌉]."""
    op, shape = graph.op, graph.shape(like) or ()
    _, channels, height, width = shape
    high, wide = -(-int(height or 0) // _STRIDE), -(-int(width or 0) // _STRIDE)
    lines = []
    for i in range(_STRIDE):
        line = op.Concat(*(op.Unsqueeze(apart[i, j], [4]) for j in range(_STRIDE)), axis=4)
        lines.append(op.Reshape(line, [0, channels, high, 1, wide * _STRIDE]))
    whole = op.Reshape(op.Concat(*lines, axis=3), [0, channels, high * _STRIDE, wide * _STRIDE])
    if (height, width) != (high * _STRIDE, wide * _STRIDE):
        whole = op.Slice(whole, [0, 0], [height, width], [2, 3])
    whole.shape = list(shape)
    result: Tensor = whole
    return result


__all__ = ["phases"]
