"""Windows along the axes of a tensor, whose sizes may be known at run time only."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Dim, Graph, Tensor
from onnx_attrib.methods.base import Sizes

Size = int | Tensor
"""A number, or int64 [] where it is known at run time only."""


@dataclass(frozen=True)
class Axis:
    """Windows along one axis of a tensor, the last one cut at the edge.

    ``place``: which axis it is; ``size``: its length; ``windows``: how many there are.
    """

    graph: Graph
    place: int
    size: Size
    window: int
    stride: int
    windows: Size

    @property
    def whole(self) -> bool:
        """Whether one window is known to cover the axis."""
        return isinstance(self.windows, int) and self.windows == 1

    def places(self) -> Tensor:
        """0, 1, … along the axis."""
        zero, one = (self.graph.constant(k, np.int64) for k in (0, 1))
        result: Tensor = self.graph.op.Range(zero, as_tensor(self.graph, self.size), one)
        return result

    def covering(self) -> Tensor:
        """How many windows cover each entry."""
        op, places = self.graph.op, self.places()
        last = op.Min(op.Div(places, self.stride), op.Sub(as_tensor(self.graph, self.windows), 1))
        # A window that starts ``window`` entries before, or earlier, is over.
        over = op.Max(op.Sub(places, self.window - 1), 0)
        over = op.Div(op.Add(over, self.stride - 1), self.stride)
        result: Tensor = op.Add(op.Sub(last, over), 1)
        return result

    def patches(self) -> Tensor:
        """Which of the windows, where they do not overlap, each entry is in."""
        op, places = self.graph.op, self.places()
        result: Tensor = op.Mul(places, 0) if self.whole else op.Div(places, self.window)
        return result

    def lengths(self) -> Tensor:
        """How long that window is."""
        op, size = self.graph.op, as_tensor(self.graph, self.size)
        if self.whole:
            return size
        left = op.Sub(size, op.Mul(self.patches(), self.window))
        result: Tensor = op.Min(left, self.window)
        return result


def axes_of(
    graph: Graph, tensor: Tensor, samples: int | None, window: Sizes, stride: Sizes
) -> list[Axis]:
    """The axes of a tensor but the samples'; OptionError where the windows do not fit them."""
    shape = graph.shape(tensor)
    if shape is None:
        raise OptionError(f"the rank of '{tensor.name}' is unknown: it cannot be perturbed")
    places = [k for k in range(len(shape)) if k != samples]
    for name, sizes in (("window", window), ("stride", stride)):
        if isinstance(sizes, tuple) and len(sizes) != len(places):
            raise OptionError(
                f"{name} {_text(sizes)} does not fit '{tensor.name}' [{_text(shape)}]: give one "
                f"number, or {len(places)}: one for each axis but the batch's"
            )
    found = []
    for i, place in enumerate(places):
        known, each = shape[place], [s[i] if isinstance(s, tuple) else s for s in (window, stride)]
        if isinstance(known, int) and isinstance(window, tuple) and window[i] > known:
            raise OptionError(
                f"window {_text(window)} does not fit '{tensor.name}' [{_text(shape)}]: axis "
                f"{place} has size {known} ('all' or -1 is the whole axis)"
            )
        found.append(_axis(graph, tensor, place, *each))
    return found


def _axis(graph: Graph, tensor: Tensor, place: int, window: int, stride: int) -> Axis:
    known = (graph.shape(tensor) or ())[place]
    size: Size = known if isinstance(known, int) else _entry(graph, tensor, place)
    if window < 0 or (isinstance(size, int) and window >= size):
        return Axis(graph, place, size, window, stride, 1)
    if stride > window:
        raise OptionError(
            f"stride {stride} is larger than window {window}: entries of '{tensor.name}' between "
            "two windows would have no attribution"
        )
    if isinstance(size, int):
        return Axis(graph, place, size, window, stride, -(-(size - window) // stride) + 1)
    op = graph.op
    beyond = op.Add(op.Max(op.Sub(size, window), 0), stride - 1)
    return Axis(graph, place, size, window, stride, op.Add(op.Div(beyond, stride), 1))


def along(graph: Graph, tensor: Tensor, axis: Axis) -> list[int]:
    """The shape, for Reshape, of a vector along one of a tensor's axes."""
    return [-1 if k == axis.place else 1 for k in range(len(graph.shape(tensor) or ()))]


# -- sizes -----------------------------------------------------------------------------------------

_NOW = {"Add": operator.add, "Mul": operator.mul, "Div": operator.floordiv}


def calculated(graph: Graph, op: str, a: Size, b: Size) -> Size:
    """A sum, product or quotient: now, if both sides are known."""
    if isinstance(a, int) and isinstance(b, int):
        return int(_NOW[op](a, b))
    result: Tensor = graph.emit(op, as_tensor(graph, a), as_tensor(graph, b))
    return result


def product(graph: Graph, sizes: Sequence[Size]) -> Size:
    """All sizes multiplied."""
    total: Size = 1
    for size in sizes:
        total = calculated(graph, "Mul", total, size)
    return total


def summed(graph: Graph, sizes: Sequence[Size]) -> Size:
    """All sizes added."""
    total: Size = 0
    for size in sizes:
        total = calculated(graph, "Add", total, size)
    return total


def as_tensor(graph: Graph, size: Size) -> Tensor:
    """The size as int64 []."""
    return graph.constant(size, np.int64) if isinstance(size, int) else size


def _entry(graph: Graph, tensor: Tensor, axis: int) -> Tensor:
    """The size of an axis at run time."""
    result: Tensor = graph.op.Squeeze(graph.op.Shape(tensor, start=axis, end=axis + 1), [0])
    return result


def _text(sizes: Sequence[Dim]) -> str:
    return ", ".join("?" if d is None else str(d) for d in sizes)


__all__ = ["Axis", "Size", "along", "as_tensor", "axes_of", "calculated", "product", "summed"]
