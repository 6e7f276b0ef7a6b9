"""TopK: the k largest (or smallest) entries along an axis, in order.

Differences follow the definition, knockouts of pairs, where that is short. Where the sizes are
known at run time only, or k is large, they follow the ranks that entries take between x̄ and x.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Site, Unsupported, add
from onnx_attrib.rules.broadcast import expand
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.indexing import axis_of, count_up, sizes
from onnx_attrib.rules.reduction import halves
from onnx_attrib.rules.sampling import in_type_of, widened
from onnx_attrib.rules.shape import DATA_ONLY

_LARGEST_K = 32
"""Entries up to which TopK is spelled out for comparison with a reference."""


def top_k_pull(s: Site, i: int) -> Tensor:
    """Forward form: the k largest (smallest) entries along an axis, and where they were.

    Backward returns zeros of X's shape with M there.
    """
    return s.op.ScatterElements(s.zeros_like(s.x()), s.outputs[1], s.m, axis=s.attr("axis"))


# -- by knockouts ----------------------------------------------------------------------------------


def rounds(s: Site) -> tuple[int, int] | None:
    """How many of how many entries are picked; None where the definition is not written down."""
    count, extent = s.value(1), sizes(s, s.x(), np.array([axis_of(s, s.x())]))
    if count is None or count.size != 1:
        return None
    if count.item() == 1:
        return 1, 0
    known = isinstance(extent, np.ndarray) and count.item() <= _LARGEST_K
    return (int(count.item()), int(extent[0])) if known and s.attr("sorted") else None


def top_k_definition(s: Site) -> Sequence[Tensor | None]:
    """k knockouts: the winner of pairwise maxima leaves, the minima play on.

    Every pair conserves differences, which picking the entries by their positions would not.
    """
    axis, known = axis_of(s, s.x()), rounds(s)
    most, least = ("Max", "Min") if s.attr("largest") else ("Min", "Max")
    if known is None:
        # Right at one point, which is all that methods without a reference ask for.
        if s.reference is not None:
            raise Unsupported(f"only {_LARGEST_K} of a known number of entries, sorted")
        return [s.op.GatherElements(s.x(), s.outputs[1], axis=axis), None]
    count, players = known
    if count == 1:
        place = s.graph.constant([axis], np.int64)
        return [s.graph.emit(f"Reduce{most}", s.x(), place, keepdims=1), None]
    picked, field = [], s.x()
    for _ in range(count):
        losers, left = [], players
        while left > 1:
            first, second, *bye = halves(s, field, left, axis)
            losers.append(s.graph.emit(least, first, second))
            field = s.op.Concat(s.graph.emit(most, first, second), *bye, axis=axis)
            left -= left // 2
        picked.append(field)
        players -= 1
        field = s.op.Concat(*losers, axis=axis) if losers else field
    return [s.op.Concat(*picked, axis=axis), None]


# -- by ranks --------------------------------------------------------------------------------------
# The axis is moved to the end: entries are [..., n], pairs of an entry and another one [..., n, n].


def top_k_difference(s: Site, i: int) -> Tensor | None:
    """Forward form: the k largest (smallest) entries z along an axis, in order.

    On the line from z̄ to z an entry takes one rank after the other. Backward returns, for each,
    the mean of M at its rank along that line (zero beyond k). As the k largest are continuous and
    piecewise linear there, that conserves their difference.
    """
    if rounds(s) is not None:
        return None
    if not s.attr("sorted"):
        raise Unsupported("unsorted: which entry comes where is up to the runtime")
    op, x = s.op, s.x()
    here, there = (widened(s, last(s, t)) for t in (x, expand(s, ref(s).x(), x)))
    if not s.attr("largest"):
        here, there = op.Neg(here), op.Neg(there)
    ranks, durations = course(s, here, there)
    m = widened(s, last(s, s.m))
    beyond = op.Gather(op.Shape(m), np.int64(-1))
    flat = op.Reshape(op.Min(ranks, beyond), [*[0] * (s.rank(x) - 1), -1])
    at_rank = op.GatherElements(op.Pad(m, [0, 1], None, [-1]), flat, axis=-1)
    mean = op.ReduceSum(op.Mul(op.Reshape(at_rank, op.Shape(ranks)), durations), [-1], keepdims=0)
    return s.shaped(last(s, in_type_of(s, mean, x)), x)


def last(s: Site, tensor: Tensor) -> Tensor:
    """``tensor`` with the axis and the last one exchanged."""
    axis, order = axis_of(s, s.x()), list(range(s.rank(s.x())))
    if axis == order[-1]:
        return tensor
    order[axis], order[-1] = order[-1], order[axis]
    return s.op.Transpose(tensor, perm=order)


def course(s: Site, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks of each entry from x̄ to x, and how long it has each: both [..., n, n + 1].

    Two entries change places where the lines between their values cross; ties at an end are
    decided by the other end, and else by position.
    """
    op = s.op
    own, other = ([op.Unsqueeze(t, [k]) for t in (there, here)] for k in (-1, -2))
    numbers = count_up(s, op.Shape(here, start=-1))
    earlier = op.Less(op.Unsqueeze(numbers, [0]), op.Unsqueeze(numbers, [1]))
    ahead, level = (
        [f(b, a) for a, b in zip(own, other, strict=True)] for f in (op.Greater, op.Equal)
    )
    first = op.Or(ahead[0], op.And(level[0], op.Or(ahead[1], op.And(level[1], earlier))))
    final = op.Or(ahead[1], op.And(level[1], first))
    gaps = [op.Abs(op.Sub(b, a)) for a, b in zip(own, other, strict=True)]
    crosses, end = op.Xor(first, final), np.ones((), s.graph.dtype(here))
    time = op.Where(crosses, op.Div(gaps[0], op.Add(*gaps)), end)
    turn = op.Where(crosses, op.Where(final, np.int64(1), np.int64(-1)), np.int64(0))
    time, order = op.TopK(time, op.Shape(here, start=-1), axis=-1, largest=0, outputs=2)
    turns = op.CumSum(op.GatherElements(turn, order, axis=-1), np.int64(-1))
    start = op.ReduceSum(op.Cast(first, to=np.dtype(np.int64)), [-1], keepdims=1)
    ranks = op.Concat(start, op.Add(start, turns), axis=-1)
    durations = op.Sub(op.Pad(time, [0, 1], end, [-1]), op.Pad(time, [1, 0], None, [-1]))
    return ranks, durations


add(
    Composite(
        op="TopK",
        decompose=top_k_definition,
        pull=top_k_pull,
        difference=top_k_difference,
        blocked=DATA_ONLY,
        moves=True,
    )
)
