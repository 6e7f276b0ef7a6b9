"""Operators that pick one of several entries: maxima and minima over axes or over operands.

A maximum with one varying operand is a piecewise linear activation (Max(x, 0) is a ReLU); with
several it picks between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Elementwise, MaxLike, Site, add, only
from onnx_attrib.rules.indexing import Ints, calc, count_up, sizes
from onnx_attrib.rules.rectifiers import maximum_rectifies, minimum_rectifies
from onnx_attrib.rules.reduction import kept, reduced_axes, unreduced
from onnx_attrib.rules.shape import DATA_ONLY

# -- over axes -------------------------------------------------------------------------------------
# Positions have the shape of the output and count along the reduced axes taken as one.


def only_axis(s: Site) -> int | None:
    """The one axis that is reduced, or None if there are more or they are not known."""
    axes = reduced_axes(s)
    return axes[0] if axes is not None and len(axes) == 1 else None


def numbers(s: Site) -> Ints:
    """The position of each entry, in a shape that broadcasts to the input's."""
    axes, rank = reduced_axes(s), s.rank(s.x())
    position: Ints = np.zeros((), np.int64)
    for axis in range(rank) if axes is None else axes:
        place = np.array([axis])
        if axes is None:
            # A reduced axis counts in full, any other as one.
            full = s.op.Gather(s.op.Shape(s.x()), place)
            size = s.op.Div(full, s.op.Gather(s.op.Shape(unreduced(s)), place))
            count = s.op.Mod(count_up(s, full), size)
        else:
            size = sizes(s, s.x(), place)
            count = count_up(s, size)
        count = calc(s, "Reshape", count, [-1, *[1] * (rank - axis - 1)])
        position = calc(s, "Add", calc(s, "Mul", position, size), count)
    return position


def reduction(op: str, arg: str, sense: int) -> None:
    """Forward form: the largest (smallest) entry over some axes.

    Along one known axis positions are found and used by ArgMax, GatherElements and
    ScatterElements; over others by comparing the entries with the output, and their numbers with
    the position.
    """

    def winner(s: Site) -> Tensor:
        axis = only_axis(s)
        if axis is not None:
            return s.graph.emit(arg, s.x(), axis=axis, keepdims=s.attr("keepdims"))
        best = s.op.Equal(s.x(), kept(s, s.y))
        first = s.op.Where(best, numbers(s), np.int64(np.iinfo(np.int64).max))
        return s.graph.emit("ReduceMin", first, s.optional(1), **s.node.attrs)

    def take(s: Site, values: Sequence[Tensor | None], position: Tensor) -> Tensor:
        axis, value = only_axis(s), values[0]
        if value is None:
            return s.zeros_like(s.y)
        place = kept(s, position)
        if axis is None:
            there = s.op.Where(s.op.Equal(numbers(s), place), value, 0.0)
            return s.graph.emit("ReduceSum", there, s.optional(1), **s.node.attrs)
        entry = s.op.GatherElements(value, place, axis=axis)
        return entry if s.attr("keepdims") else s.op.Squeeze(entry, [axis])

    def put(s: Site, values: Tensor, position: Tensor) -> dict[int, Tensor]:
        axis, share, place = only_axis(s), kept(s, values), kept(s, position)
        if axis is None:
            return {0: s.op.Where(s.op.Equal(numbers(s), place), share, 0.0)}
        return {0: s.op.ScatterElements(s.zeros_like(s.x()), place, share, axis=axis)}

    add(MaxLike(op=op, winner=winner, take=take, put=put, sense=sense, blocked=DATA_ONLY))


reduction("ReduceMax", "ArgMax", 1)
reduction("ReduceMin", "ArgMin", -1)


# -- over operands ---------------------------------------------------------------------------------


def operand_take(s: Site, values: Sequence[Tensor | None], position: Tensor) -> Tensor:
    zero = np.zeros((), s.graph.dtype(s.y))
    result: Tensor = zero
    for k, value in enumerate(values):
        if value is not None:
            result = s.op.Where(s.op.Equal(position, np.int64(k)), value, result)
    return result


def operand_put(s: Site, values: Tensor, position: Tensor) -> dict[int, Tensor]:
    return {i: s.op.Where(s.op.Equal(position, np.int64(i)), values, 0.0) for i in s.active}


_SINGLE = 4
"""Operands up to which one varying operand among constants is an activation."""


def extremum(op: str, beyond: str, sense: int) -> None:
    """Forward form: the largest (smallest) of several broadcast operands."""

    def winner(s: Site) -> Tensor:
        """The first of the largest. Operands are compared with each other, not with the output:
        onnxruntime may round that to 16 bits and not them."""
        best, position = s.x(0), np.int64(0)
        for k in range(1, len(s.inputs)):
            position = s.op.Where(s.graph.emit(beyond, s.x(k), best), np.int64(k), position)
            best = s.graph.emit(op, best, s.x(k))
        return position

    def mask(k: int) -> Elementwise:
        def chosen(s: Site) -> Tensor:
            others = [s.x(j) for j in range(len(s.inputs)) if j != k]
            if not others:
                return s.op.Equal(s.y, s.y)
            bound = others[0] if len(others) == 1 else s.graph.emit(op, *others)
            return s.graph.emit(beyond, s.y, bound)

        return Elementwise(
            op=op,
            derivative=chosen,
            operand=k,
            piecewise=True,
            relu_like=lambda s: rectifies(s, k),
            broadcasts=True,
            covers=only(k),
        )

    rectifies = maximum_rectifies if sense > 0 else minimum_rectifies
    for k in range(_SINGLE):
        add(mask(k))
    add(
        MaxLike(
            op=op,
            winner=winner,
            take=operand_take,
            put=operand_put,
            sense=sense,
            broadcasts=True,
        )
    )


extremum("Max", "Greater", 1)
extremum("Min", "Less", -1)
