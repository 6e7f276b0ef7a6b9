"""Linear operators that select, place or repeat entries.

Where an operator's transpose has a fast form (Pad for Slice, Split for Concat) the row gives it.
Any other operator that only copies entries is transposed by :func:`replay`: applied to the numbers
of the entries it shows where each came from, and a scatter-add brings the cotangents there.

Integer arithmetic on shapes goes through :func:`calc`: done here where the numbers are known, in
the graph where they are not. Duplicate indices are added up by ScatterElements only: ONNX Runtime's
ScatterND loses additions when it runs on several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from onnx_attrib.ir import Node, Tensor, is_tensor, static
from onnx_attrib.rules.base import Linear, Site, add
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.shape import DATA_ONLY

Ints = Any
"""Whole numbers: a numpy array where known at compile time, an int64 tensor where not."""

SAME_INDICES = "exact where the indices are the same at x and x̄"
SAME_CONDITION = "exact where the condition is the same at x and x̄"
SAME_CHOICE = "exact where the condition is the same at x and x̄, or an operand changes"
SAME_PLACES = "exact where it starts and ends at the same places at x and x̄"

ZERO, ONE = np.zeros(1, np.int64), np.ones(1, np.int64)
_LAST = np.iinfo(np.int64).max
_NUMPY: dict[str, Callable[..., Ints]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Less": np.less,
    "Max": np.maximum,
    "Min": np.minimum,
    "Reshape": np.reshape,
    "Where": np.where,
}


# -- whole numbers, now or at run time -------------------------------------------------------------


def calc(s: Site, name: str, *operands: Ints) -> Ints:
    """One step of integer arithmetic."""
    if any(is_tensor(operand) for operand in operands):
        return s.graph.emit(name, *operands)
    return _NUMPY[name](*operands)


def join(s: Site, *parts: Ints) -> Ints:
    """Vectors end to end."""
    if any(is_tensor(part) for part in parts):
        return s.op.Concat(*parts, axis=0)
    return np.concatenate(parts)


def whole_numbers(s: Site, i: int) -> Ints:
    """The integer input ``i``, or None if it is absent."""
    known, tensor = s.value(i), s.optional(i)
    if known is not None:
        return known.astype(np.int64)
    if tensor is None or s.graph.dtype(tensor) == np.int64:
        return tensor
    return s.op.Cast(tensor, to=np.dtype(np.int64))


def sizes(s: Site, tensor: Tensor, axes: Ints = None) -> Ints:
    """The sizes of ``tensor`` along ``axes`` (all of them, if None)."""
    shape = s.shape(tensor)
    if shape is not None and not is_tensor(axes):
        known = static(shape if axes is None else tuple(shape[k] for k in axes))
        if known is not None:
            return np.array(known, np.int64)
    full = s.op.Shape(tensor)
    return full if axes is None else s.op.Gather(full, axes)


def count_up(s: Site, size: Ints) -> Ints:
    """0, 1, … up to a size, given as a vector of one entry."""
    if isinstance(size, np.ndarray):
        return np.arange(size.item())
    return s.op.Range(np.int64(0), s.op.Squeeze(size, [0]), np.int64(1))


def axis_of(s: Site, like: Tensor) -> int:
    """The axis attribute, counted from the front."""
    axis = int(s.attr("axis"))
    return axis if axis >= 0 else axis + s.rank(like)


# -- transposes by position ------------------------------------------------------------------------


def scatter(s: Site, m: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """Add each entry of ``m`` at a flat position in zeros shaped like ``like``."""
    op = s.op
    zeros = op.Reshape(s.zeros_like(like), [-1])
    flat = op.ScatterElements(
        zeros, op.Reshape(positions, [-1]), op.Reshape(m, [-1]), axis=0, reduction="add"
    )
    return s.reshape(flat, like)


def replay(s: Site, i: int) -> Tensor:
    """Transpose of an operator that copies entries of input ``i`` to its only output."""
    op, x, inputs = s.op, s.x(i), list(s.inputs)
    number = op.Range(np.int64(0), op.Size(x), np.int64(1))
    inputs[i] = op.Reshape(number, s.shape_of(x))
    return scatter(s, s.m, s.graph.emit(s.node.op, *inputs, **s.node.attrs), x)


def along(s: Site, indices: Ints, axis: int, like: Tensor) -> Tensor:
    """A vector of indices along ``axis``, repeated to the shape of ``like``."""
    column = s.op.Reshape(indices, [-1, *[1] * (s.rank(s.x()) - axis - 1)])
    return s.op.Expand(column, s.op.Shape(like))


# -- joining and splitting -------------------------------------------------------------------------


def concat_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = [X₀ | X₁ | …] along an axis. Backward returns the part of M that is Xᵢ's."""
    if len(s.inputs) == 1:
        return s.m
    key = "concat", s.m.name
    if key not in s.made:
        axis = s.attr("axis")
        parts = [sizes(s, s.x(k), np.array([axis])) for k in range(len(s.inputs))]
        s.made[key] = s.op.Split(s.m, join(s, *parts), axis=axis, outputs=len(parts))
    part: Tensor = s.made[key][i]
    return part


def split_pull(s: Site, i: int) -> Tensor:
    """Forward form Y₀, Y₁, … = parts of X along an axis. Backward returns [M₀ | M₁ | …].

    A part that nothing flows back from counts as zeros.
    """
    pieces = [
        s.zeros_like(y) if m is None else m for m, y in zip(s.cotangents, s.outputs, strict=True)
    ]
    return s.op.Concat(*pieces, axis=s.attr("axis"))


add(Linear(op="Concat", pull=concat_pull, flow="moves"))
add(Linear(op="Split", pull=split_pull, blocked=DATA_ONLY, flow="moves"))


# -- slices and pads -------------------------------------------------------------------------------


def slice_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = X[start : end : step] along some axes.

    Backward returns zeros of X's shape with M at the entries read: M is turned around where the
    step is negative, spread by the step, and padded to X's sizes.
    """
    starts, axes, steps = (whole_numbers(s, k) for k in (1, 3, 4))
    if axes is None:
        axes = count_up(s, sizes(s, s.x(1)))
    steps = ONE if steps is None else steps
    vague = is_tensor(axes) or s.shape(s.y) is None
    if is_tensor(steps) or (vague and np.any(steps != 1)):
        return replay(s, i)

    extent, count = sizes(s, s.x(), axes), sizes(s, s.y, axes)
    first = calc(s, "Where", calc(s, "Less", starts, 0), calc(s, "Add", starts, extent), starts)
    top = calc(s, "Sub", extent, (steps < 0).astype(np.int64))
    first = calc(s, "Max", calc(s, "Min", first, top), ZERO)
    stride = np.abs(steps)
    before = first
    if np.any(steps < 0):
        moves = calc(s, "Max", calc(s, "Sub", count, ONE), ZERO)
        before = calc(s, "Add", first, calc(s, "Mul", moves, np.minimum(steps, 0)))
    after = calc(s, "Sub", calc(s, "Sub", extent, before), calc(s, "Mul", count, stride))

    m = s.m
    if np.any(steps < 0):
        turned = axes[steps < 0]
        ends = np.full(len(turned), -_LAST)
        m = s.op.Slice(m, -np.ones_like(turned), ends, turned, -np.ones_like(turned))
    for place in np.flatnonzero(stride > 1):
        m = spread(s, m, int(axes[place]), int(stride[place]))
    return s.op.Pad(m, join(s, before, after), None, axes)


def spread(s: Site, m: Tensor, axis: int, step: int) -> Tensor:
    """Put ``step`` − 1 zeros behind each entry along ``axis``."""
    rank = s.rank(s.y)
    axis %= rank
    column = s.op.Unsqueeze(m, [axis + 1])
    factors = np.ones(rank + 1, np.int64)
    factors[axis + 1] = step - 1
    zero = np.zeros(1, s.graph.dtype(m))
    gap = s.op.ConstantOfShape(calc(s, "Mul", sizes(s, column), factors), value=zero)
    wide = s.op.Concat(column, gap, axis=axis + 1)
    factors[axis], factors[axis + 1] = step, 1
    shape = calc(s, "Mul", sizes(s, m), np.delete(factors, axis + 1))
    return s.op.Reshape(wide, shape, allowzero=1)


def pad_pull(s: Site, i: int) -> Tensor:
    """Forward form: X with pads before and after each axis, filled with a constant c or copies.

    Backward returns M without the pads (negative pads are filled with zeros); the pads' share goes
    to the entries they copied, or, summed, to c.
    """
    pads, axes, mode = whole_numbers(s, 1), whole_numbers(s, 3), s.attr("mode")
    if i == 2:
        zeros = s.zeros_like(s.x())
        copies = s.op.Pad(zeros, pads, np.ones((), s.graph.dtype(zeros)), axes)
        share = s.op.Where(s.op.Equal(copies, 0.0), 0.0, s.m)
        return s.reshape(s.op.ReduceSum(share, keepdims=0), s.x(2))
    if mode == "constant":
        return s.op.Pad(s.m, calc(s, "Neg", pads), None, axes)
    if is_tensor(pads) or is_tensor(axes) or np.any(pads < 0):
        return replay(s, i)
    axes = np.arange(s.rank(s.x())) if axes is None else axes % s.rank(s.x())
    m = s.m
    for axis, before, after in zip(axes, *pads.reshape(2, -1), strict=True):
        if before or after:
            m = fold_in(s, m, int(axis), np.array([before, after]))
    return m


def fold_in(s: Site, m: Tensor, axis: int, pads: np.ndarray) -> Tensor:
    """Take pads that copied entries off one axis and add them where they came from."""
    op, before, mode = s.op, pads[:1], s.attr("mode")
    extent = sizes(s, s.x(), np.array([axis]))
    source = op.Pad(count_up(s, extent), pads, mode=mode)
    end = calc(s, "Add", before, extent)

    def border(tensor: Any, k: int) -> Tensor:
        head = op.Slice(tensor, [0], before, [k])
        return op.Concat(head, op.Slice(tensor, end, [_LAST], [k]), axis=k)

    core, rim = op.Slice(m, before, end, [axis]), border(m, axis)
    index = along(s, border(source, 0), axis, rim)
    return op.ScatterElements(core, index, rim, axis=axis, reduction="add")


add(Linear(op="Slice", pull=slice_pull, blocked=DATA_ONLY, caveat=SAME_PLACES, flow="moves"))
add(Linear(op="Pad", pull=pad_pull, blocked=frozenset({1, 3}), flow="moves"))


# -- gathering -------------------------------------------------------------------------------------


def gather_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[…, j…, …] = X[…, index[j…], …] along an axis.

    Backward returns zeros of X's shape to which M is added at the indices. One known index needs
    no scattering: its M is padded.
    """
    if s.shape(s.x()) is None or s.shape(s.x(1)) is None:
        return replay(s, i)
    op, x, axis, index = s.op, s.x(), axis_of(s, s.x()), whole_numbers(s, 1)
    place = np.array([axis])
    m, order = s.m, s.rank(s.x(1))
    if order == 0:
        m = op.Unsqueeze(m, [axis])
    elif order > 1:
        rest = np.arange(s.rank(x))
        head, tail = sizes(s, x, rest[:axis]), sizes(s, x, rest[axis + 1 :])
        m = op.Reshape(m, join(s, head, np.array([-1]), tail))
    if isinstance(index, np.ndarray) and index.size == 1:
        before, extent = index.reshape(1), sizes(s, x, place)
        before = calc(s, "Add", before, extent) if before < 0 else before
        after = calc(s, "Sub", calc(s, "Sub", extent, before), np.array([1]))
        return op.Pad(m, join(s, before, after), None, place)
    index = along(s, index, axis, m)
    return op.ScatterElements(s.zeros_like(x), index, m, axis=axis, reduction="add")


def gather_elements_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[j] = X[j with index[j] along an axis]. Backward adds M there to zeros."""
    zeros, axis = s.zeros_like(s.x()), s.attr("axis")
    return s.op.ScatterElements(zeros, s.x(1), s.m, axis=axis, reduction="add")


add(Linear(op="Gather", pull=gather_pull, blocked=DATA_ONLY, caveat=SAME_INDICES, flow="moves"))
add(
    Linear(
        op="GatherElements",
        pull=gather_elements_pull,
        blocked=DATA_ONLY,
        caveat=SAME_INDICES,
        flow="moves",
    )
)
add(Linear(op="GatherND", pull=replay, blocked=DATA_ONLY, caveat=SAME_INDICES, flow="moves"))
add(Linear(op="Compress", pull=replay, blocked=DATA_ONLY, caveat=SAME_CONDITION, flow="moves"))


def one_hot_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = off + (on − off) · hit. Backward sums M over misses and over hits."""
    op = s.op
    hit = op.OneHot(s.x(0), s.x(1), np.array([0, 1], s.graph.dtype(s.y)), axis=s.attr("axis"))
    on = op.ReduceSum(op.Mul(s.m, hit), keepdims=0)
    off = op.ReduceSum(op.Mul(s.m, op.Sub(1.0, hit)), keepdims=0)
    return op.Concat(op.Unsqueeze(off, [0]), op.Unsqueeze(on, [0]), axis=0)


add(Linear(op="OneHot", pull=one_hot_pull, blocked=frozenset({0, 1})))


# -- choosing, repeating, rearranging --------------------------------------------------------------


def where_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = X₁ where C, else X₂. Backward returns M where that input was chosen."""
    if s.reference is not None and guards_quotient(s, i):
        # The quotient counts as 0 itself where the Where says so: nothing is chosen.
        return s.m
    chosen = s.op.Where(s.x(0), s.m, 0.0) if i == 1 else s.op.Where(s.x(0), 0.0, s.m)
    if s.reference is None or s.reference.x(0).name == s.x(0).name:
        return chosen
    return switched(s, i, chosen)


def switched(s: Site, i: int, chosen: Tensor) -> Tensor:
    """``chosen``, but where the condition is another one at x̄: there Y goes from X₁ to X₂.

    Both share ΔY in proportion to their own changes: M · sign ΔXᵢ · ΔY / (|ΔX₁| + |ΔX₂|). A jump
    between two that (almost) stay is the condition's own, and nobody's.
    """
    op, there = s.op, ref(s)
    steps = {k: op.Sub(s.x(k), there.x(k)) for k in s.active}
    moved = reduce(op.Add, (op.Abs(step) for step in steps.values()))
    change = op.Sub(s.y, there.y)
    paid = op.Greater(moved, op.Mul(op.Abs(change), s.tolerance(s.y) ** 2))
    switches = op.And(op.Xor(s.x(0), there.x(0)), paid)
    share = op.Div(op.Mul(op.Sign(steps[i]), change), moved)
    return op.Where(switches, op.Mul(s.m, share), chosen)


def guards_quotient(s: Site, i: int) -> bool:
    """Whether Y is a / b, or 0 where b = 0, with a / b at input ``i``."""
    quotient, zero = made_by(s.node.inputs[i], "Div"), s.value(3 - i)
    test = s.node.inputs[0]
    if i == 1:
        negated = made_by(test, "Not")
        test = negated.inputs[0] if negated else None
    equal = made_by(test, "Equal") if test is not None else None
    if quotient is None or equal is None or zero is None or np.any(zero != 0):
        return False
    for b, other in (equal.inputs, equal.inputs[::-1]):
        value = s.graph.value(other)
        if b.name == quotient.inputs[1].name and value is not None and not np.any(value != 0):
            return True
    return False


def made_by(tensor: Tensor, op: str) -> Node | None:
    """The ``op`` that computes a tensor, or None if it is not one."""
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op == op and not node.domain else None


def tile_pull(s: Site, i: int) -> Tensor:
    """Forward form: X repeated rₖ times along each axis k. Backward sums M over the copies.

    M is seen as [r₀, d₀, r₁, d₁, …] and summed over the axes of r.
    """
    op, rank = s.op, s.rank(s.x())
    repeats, extent = whole_numbers(s, 1), sizes(s, s.x())
    pairs = op.Concat(op.Reshape(repeats, [rank, 1]), op.Reshape(extent, [rank, 1]), axis=1)
    apart = op.Reshape(s.m, op.Reshape(pairs, [-1]))
    return op.ReduceSum(apart, list(range(0, 2 * rank, 2)), keepdims=0)


def depth_to_space_pull(s: Site, i: int) -> Tensor:
    """Forward form [N, C·b², H, W] → [N, C, H·b, W·b]. Backward is SpaceToDepth.

    That puts the position in the block before the channel (mode DCR); for CRD they are swapped.
    """
    block = s.attr("blocksize")
    deep = s.op.SpaceToDepth(s.m, blocksize=block)
    if s.attr("mode") == "DCR":
        return deep
    parts = join(s, np.array([0, block * block]), sizes(s, s.y, np.array([1])), np.array([-1]))
    return s.reshape(s.op.Transpose(s.op.Reshape(deep, parts), perm=[0, 2, 1, 3]), s.x())


def again(s: Site, **attributes: Any) -> Tensor:
    """The operator itself applied to M, with some attributes changed."""
    return s.graph.emit(s.node.op, s.m, *s.inputs[1:], **{**s.node.attrs, **attributes})


add(
    Linear(
        op="Expand",
        pull=lambda s, i: s.m,
        broadcasts=True,
        lazy=True,
        blocked=DATA_ONLY,
        flow="moves",
    )
)
add(
    Linear(
        op="Where",
        flow="moves",
        pull=where_pull,
        broadcasts=True,
        lazy=True,
        blocked=frozenset({0}),
        caveat=SAME_CHOICE,
    )
)
add(Linear(op="Tile", pull=tile_pull, blocked=DATA_ONLY, flow="moves"))
add(Linear(op="DepthToSpace", pull=depth_to_space_pull, flow="moves"))
add(
    Linear(
        op="SpaceToDepth",
        flow="moves",
        pull=lambda s, i: s.op.DepthToSpace(s.m, blocksize=s.attr("blocksize")),
    )
)
for name, caveat in (("Trilu", ""), ("ReverseSequence", SAME_PLACES)):
    # Each is its own transpose.
    add(
        Linear(
            op=name,
            pull=lambda s, i: again(s),
            flow="moves",
            blocked=DATA_ONLY,
            caveat=caveat,
        )
    )
add(
    Linear(
        op="CumSum",
        pull=lambda s, i: again(s, reverse=1 - s.attr("reverse")),
        blocked=DATA_ONLY,
        positive=True,
    )
)
