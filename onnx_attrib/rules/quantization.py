"""Numbers that were rounded to integers and back.

``QuantizeLinear`` followed by ``DequantizeLinear`` is a staircase. Its derivative is taken straight
through: one between the smallest and the largest number that the integers can stand for, zero
beyond. ``passes/quantized.py`` finds such pairs and turns the second into StraightThrough: the same
operator with one more input, the number that was quantized. It never leaves the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import INTERNAL, Tensor
from onnx_attrib.rules.base import Composite, Elementwise, Site, Unsupported, add

STRAIGHT_THROUGH = "StraightThrough"
QUANTIZED, SCALE, ZERO_POINT, SOURCE = range(4)
"""Inputs of StraightThrough."""


_HALF = 0.5 + 2**-10
"""How far rounding moves a number, in units of the scale; with a margin for its own rounding."""


def inside(s: Site) -> Tensor:
    """Where the number was rounded and not cut off."""
    op = s.op
    if s.optional(SCALE) is None:
        return op.Equal(s.y, s.y)
    if s.graph.dtype(s.x(QUANTIZED)).name.startswith("float"):
        raise Unsupported("numbers quantized to floats of 8 bits or less")
    reach = op.Mul(spread(s, s.x(SCALE)), _HALF)
    return op.LessOrEqual(op.Abs(op.Sub(s.x(SOURCE), s.y)), reach)


def dequantized(s: Site) -> Sequence[Tensor]:
    """(q − zero point) · scale."""
    op, q, scale = s.op, s.x(QUANTIZED), s.x(SCALE)
    dtype = s.graph.dtype(scale)
    y = op.Cast(q, to=dtype)
    if s.optional(ZERO_POINT) is not None:
        y = op.Sub(y, spread(s, op.Cast(s.x(ZERO_POINT), to=dtype)))
    return [op.Mul(y, spread(s, scale))]


def spread(s: Site, parameter: Tensor) -> Tensor:
    """A scale or zero point, to meet the tensor: one for all, for each index, or for a block."""
    op, q = s.op, s.x(QUANTIZED)
    if s.rank(parameter) == 0 or s.shape(parameter) == (1,):
        return parameter
    rank = s.rank(q)
    axis = s.node.attrs.get("axis", 1) % rank
    if s.rank(parameter) == 1:
        result: Tensor = op.Reshape(parameter, [-1 if k == axis else 1 for k in range(rank)])
        return result
    size = s.node.attrs.get("block_size", 0)
    if not size:
        raise Unsupported("a scale of the tensor's rank, without block_size")
    count = (s.shape(q) or ())[axis]
    if isinstance(count, int):
        block = s.graph.constant(np.arange(count) // size, np.int64)
    else:
        length = op.Squeeze(op.Shape(q, start=axis, end=axis + 1), [0])
        block = op.Div(op.Range(np.int64(0), length, np.int64(1)), np.int64(size))
    repeated: Tensor = op.Gather(parameter, block, axis=axis)
    return repeated


add(
    Elementwise(
        op=STRAIGHT_THROUGH,
        domain=INTERNAL,
        operand=SOURCE,
        derivative=inside,
        piecewise=True,
        blocked=frozenset({QUANTIZED, SCALE, ZERO_POINT}),
    )
)
# Of integers that are constants, or come from outside: linear in the scale.
add(
    Composite(
        op="DequantizeLinear",
        decompose=dequantized,
        blocked=frozenset({QUANTIZED, ZERO_POINT}),
    )
)
