"""Reading data between its entries: GridSample, and the operators that go with it.

A position along an axis is read through a few taps: entries near by, with weights that are
polynomials of the position's fraction. Everything follows from the taps of each axis. Data gets the
cotangents back at the taps, times the weights; the position gets the taps' values, times the
weights' slopes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor, is_narrow
from onnx_attrib.rules.base import Composite, Linear, Site, Unsupported, add, only
from onnx_attrib.rules.convolution import ints, kernel_of
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.indexing import ONE, calc, count_up, join, sizes, whole_numbers
from onnx_attrib.rules.shape import DATA_ONLY

_A = -0.75
"""The constant of GridSample's cubic convolution."""

# Rows: the coefficients of 1, f, f², f³ for each tap, f being the position's fraction.
_WEIGHTS: dict[str, tuple[int, list[list[float]]]] = {
    "nearest": (0, [[1]]),
    "linear": (0, [[1, 0], [-1, 1]]),
    "cubic": (
        -1,
        [
            [0, 1, 0, 0],
            [_A, 0, -_A, 0],
            [-2 * _A, -_A - 3, 2 * _A + 3, _A],
            [_A, _A + 2, -_A - 2, -_A],
        ],
    ),
}
"""The first tap, counted from the position rounded down, and the weights."""


@dataclass(frozen=True)
class Taps:
    """What positions read along some axes: ``index``, ``weight`` and ``slope`` [N, P, taps].

    ``index`` counts in the axes taken as one; ``slope`` is the weight's derivative by the grid's
    coordinate of the axis that was last (None while nobody asks).
    """

    index: Tensor
    weight: Tensor
    slope: Tensor | None = None


def widened(s: Site, tensor: Tensor) -> Tensor:
    """``tensor`` in float32, if its own type is too short to tell positions apart."""
    if not is_narrow(s.graph.dtype(tensor)):
        return tensor
    return s.op.Cast(tensor, to=np.dtype(np.float32))


def as_float(s: Site, count: Any, kind: np.dtype[Any]) -> Tensor:
    """A count (a vector of one entry) as a number of that type."""
    if isinstance(count, np.ndarray):
        return s.graph.constant(count.reshape(()).astype(kind))
    return s.graph.number(count, kind)


# -- the taps of a grid ----------------------------------------------------------------------------


def axis_taps(s: Site, grid: Tensor, axis: int, slopes: bool) -> Taps:
    """The taps along one spatial axis of the data, for a grid [N, P, axes]."""
    op, spatial = s.op, s.rank(s.x()) - 2
    kind = s.graph.dtype(grid)
    extent = sizes(s, s.x(), [2 + axis])
    length = as_float(s, extent, kind)
    # The grid's coordinates come last axis first.
    column = op.Slice(grid, [spatial - 1 - axis], [spatial - axis], [2])
    last = op.Sub(length, 1.0)
    corners = bool(s.attr("align_corners"))
    if corners:
        stride = op.Mul(last, 0.5)
        position = op.Mul(op.Mul(op.Add(column, 1.0), 0.5), last)
    else:
        stride = op.Mul(length, 0.5)
        position = op.Mul(op.Sub(op.Mul(op.Add(column, 1.0), length), 1.0), 0.5)
    mode = s.attr("mode")
    first, rows = _WEIGHTS[mode]
    base = op.Round(position) if mode == "nearest" else op.Floor(position)
    fraction = op.Sub(position, base)
    places = op.Add(base, np.arange(first, first + len(rows[0]), dtype=kind))
    weight = polynomial(s, rows, fraction)
    slope = op.Mul(polynomial(s, _derived(rows), fraction), stride) if slopes else None
    padding = s.attr("padding_mode")
    if padding == "zeros":
        inside = op.And(op.GreaterOrEqual(places, 0.0), op.LessOrEqual(places, last))
        weight = op.Where(inside, weight, 0.0)
        slope = None if slope is None else op.Where(inside, slope, 0.0)
    elif padding == "reflection":
        places = reflected(s, places, last, corners)
    places = op.Max(op.Min(places, last), 0.0)
    return Taps(op.Cast(places, to=np.dtype(np.int64)), weight, slope)


def polynomial(s: Site, rows: list[list[float]], fraction: Tensor) -> Tensor:
    """Σ_d rows[d] · fraction^d, [N, P, taps] for a fraction [N, P, 1]."""
    op, kind = s.op, s.graph.dtype(fraction)
    coefficients = [np.array(row, kind) for row in rows]
    total: Any = coefficients[-1]
    for row in coefficients[-2::-1]:
        total = op.Add(op.Mul(fraction, total), row)
    return total if len(rows) > 1 else op.Add(op.Mul(fraction, 0.0), total)


def _derived(rows: list[list[float]]) -> list[list[float]]:
    """The coefficients of the derivative."""
    higher = [[d * c for c in row] for d, row in enumerate(rows)][1:]
    return higher or [[0.0] * len(rows[0])]


def reflected(s: Site, places: Tensor, last: Tensor, corners: bool) -> Tensor:
    """Places outside the data, mirrored at its edges: first and last entry, or half beyond."""
    op, margin = s.op, 0.0 if corners else 0.5
    span = op.Add(last, 2 * margin)
    # One entry is mirrored onto itself; any period will do.
    period = op.Max(op.Mul(span, 2.0), 1.0)
    beyond = op.Mod(op.Abs(op.Add(places, margin)), period, fmod=1)
    return op.Round(op.Sub(op.Min(beyond, op.Sub(period, beyond)), margin))


def crossed(s: Site, taps: Sequence[Taps], slope_of: int | None = None) -> Taps:
    """The taps of all axes together: every combination, [N, P, taps₁ · taps₂ …].

    The weight of axis ``slope_of`` is replaced by its slope.
    """
    op, result = s.op, None
    for axis, tap in enumerate(taps):
        weight = tap.slope if axis == slope_of else tap.weight
        if weight is None:
            raise LookupError("slopes were not asked for")
        if result is None:
            result = Taps(tap.index, weight)
            continue
        extent = sizes(s, s.x(), [2 + axis])
        pair = (op.Unsqueeze(result.index, [3]), op.Unsqueeze(tap.index, [2]))
        index = op.Add(op.Mul(pair[0], extent), pair[1])
        both = op.Mul(op.Unsqueeze(result.weight, [3]), op.Unsqueeze(weight, [2]))
        result = Taps(op.Reshape(index, [0, 0, -1]), op.Reshape(both, [0, 0, -1]))
    if result is None:
        raise Unsupported("no spatial axis")
    return result


def taps_of(s: Site, grid: Tensor, slopes: bool = False) -> list[Taps]:
    """The taps of each spatial axis, for a grid [N, …, axes]."""
    spatial = s.rank(s.x()) - 2
    flat = s.op.Reshape(widened(s, grid), [0, -1, spatial])
    return [axis_taps(s, flat, axis, slopes) for axis in range(spatial)]


# -- GridSample ------------------------------------------------------------------------------------


def flat(s: Site, tensor: Tensor) -> Tensor:
    """[N, C, …] as [N, C, positions]."""
    return s.op.Reshape(widened(s, tensor), [0, 0, -1])


def everywhere(s: Site, index: Tensor, like: Tensor) -> Tensor:
    """[N, P, taps] as [N, C, P · taps], with the channels of ``like`` [N, C, …]."""
    column = s.op.Reshape(index, [0, 1, -1])
    lead = s.op.Shape(like, end=2)
    return s.op.Expand(column, s.op.Concat(lead, [1], axis=0))


def spread(s: Site, grid: Tensor) -> Tensor:
    """The transpose of sampling at ``grid``: M added up in the data's shape at the taps."""
    op, taps = s.op, crossed(s, taps_of(s, grid))
    m = flat(s, s.m)
    parts = op.Mul(op.Unsqueeze(m, [3]), op.Unsqueeze(taps.weight, [1]))
    index = everywhere(s, taps.index, m)
    zeros = flat(s, s.zeros_like(s.x()))
    total = op.ScatterElements(zeros, index, op.Reshape(parts, [0, 0, -1]), axis=2, reduction="add")
    return s.reshape(in_type_of(s, total, s.x()), s.x())


def in_type_of(s: Site, tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the type of ``like``."""
    kind = s.graph.dtype(like)
    return tensor if s.graph.dtype(tensor) == kind else s.op.Cast(tensor, to=kind)


def grid_slope(s: Site) -> Tensor:
    """[N, …, axes]: Σ over channels of M times the derivative of the sample by each coordinate."""
    op, grid, m = s.op, s.x(1), flat(s, s.m)
    taps = taps_of(s, grid, slopes=True)
    index = crossed(s, taps).index
    data = flat(s, s.x())
    values = op.GatherElements(data, everywhere(s, index, data), axis=2)
    values = op.Reshape(values, op.Concat(op.Shape(m), [-1], axis=0))
    weighted = op.ReduceSum(op.Mul(values, op.Unsqueeze(m, [3])), [1], keepdims=0)
    shares = [
        op.ReduceSum(op.Mul(weighted, crossed(s, taps, axis).weight), [2], keepdims=1)
        for axis in reversed(range(len(taps)))
    ]
    return s.reshape(in_type_of(s, op.Concat(*shares, axis=2), grid), grid)


def grid_sample_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, C, out…] = X[N, C, …], read at a grid [N, out…, axes] of positions.

    Backward returns M at the taps, [N, C, …]; and for each coordinate Σ_c M · ∂Y/∂coordinate,
    [N, out…, axes] (zero in mode nearest, and where positions are held at the border).
    """
    return spread(s, s.x(1)) if i == 0 else grid_slope(s)


def grid_sample_difference(s: Site, i: int) -> Tensor:
    """As :func:`grid_sample_pull`, for differences where data and positions both move.

    ΔY is what the data changes, sampled halfway between both grids (the mean of the samples), plus
    what the positions change in the data halfway. The latter is split by moving one coordinate
    after the other, in both orders, and divided by each coordinate's own difference.
    """
    op, grid, base = s.op, s.x(1), ref(s).x(1)
    if i == 0:
        base = op.Expand(base, s.shape_of(grid))
        return s.midpoint(spread(s, grid), spread(s, base))
    halfway = s.at([s.at_midpoint().x(0), grid])
    axes = s.rank(s.x()) - 2

    def score(moved: range) -> Tensor:
        mask = np.array([axis in moved for axis in range(axes)])
        place = op.Where(mask, grid, base)
        sample = s.graph.emit("GridSample", halfway.x(0), place, **s.node.attrs)
        return op.ReduceSum(op.Mul(s.m, sample), [1], keepdims=0)

    rises = []
    for axis in range(axes):
        up = op.Sub(score(range(axis + 1)), score(range(axis)))
        down = op.Sub(score(range(axis, axes)), score(range(axis + 1, axes)))
        rises.append(op.Unsqueeze(s.midpoint(up, down), [-1]))
    step = op.Sub(grid, base)
    quotient = op.Div(in_type_of(s, op.Concat(*rises, axis=-1), grid), step)
    return op.Where(op.Equal(step, 0.0), grid_slope(halfway), quotient)


def undefined(s: Site) -> Sequence[Tensor | None]:
    raise Unsupported("it has no definition in simpler operators")


add(Linear(op="GridSample", pull=grid_sample_pull, covers=only(0)))
add(
    Composite(
        op="GridSample",
        pull=grid_sample_pull,
        difference=grid_sample_difference,
        decompose=undefined,
    )
)


def affine_grid_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, out…, k] = G · θᵀ: positions G [out…, k + 1], the last 1, θ [N, k, k + 1].

    Backward returns Mᵀ · G, [N, k, k + 1]. G is the operator itself at θ = identity.
    """
    op, theta, size = s.op, s.x(), whole_numbers(s, 1)
    spatial, kind = s.rank(s.y) - 2, s.graph.dtype(theta)
    eye = np.eye(spatial, spatial + 1, dtype=kind)[None]
    one = join(s, ONE, op.Slice(size, [1], [2 + spatial]))
    plain = op.AffineGrid(eye, one, align_corners=s.attr("align_corners"))
    places = op.Reshape(plain, [1, -1, spatial])
    places = op.Pad(places, [0, 0, 0, 0, 0, 1], np.ones((), kind))
    m = op.Transpose(op.Reshape(s.m, [0, -1, spatial]), perm=[0, 2, 1])
    return op.MatMul(m, places)


add(Linear(op="AffineGrid", pull=affine_grid_pull, blocked=DATA_ONLY))


# -- DeformConv ------------------------------------------------------------------------------------


def deformed_grid(s: Site, kernel: tuple[int, ...]) -> Tensor:
    """[N · groups, K, P, 2]: where each kernel entry reads the data for each output position."""
    op, x, offset, count = s.op, s.x(), s.x(2), math.prod(kernel)
    kind = s.graph.dtype(offset)
    strides, dilations = ints(s, "strides") or (1, 1), ints(s, "dilations") or (1, 1)
    pads = ints(s, "pads") or (0, 0, 0, 0)
    moved = op.Reshape(offset, join(s, np.array([-1, count, 2]), sizes(s, offset, [2, 3])))
    columns = []
    for axis, entry in enumerate(np.indices(kernel).reshape(2, -1, 1, 1)):
        window = op.Mul(count_up(s, sizes(s, offset, [2 + axis])), np.int64(strides[axis]))
        window = op.Reshape(window, [-1, 1] if axis == 0 else [1, -1])
        place = op.Add(window, entry * dilations[axis] - pads[axis])
        place = op.Add(op.Cast(place, to=kind), op.Gather(moved, np.int64(axis), axis=2))
        length = as_float(s, sizes(s, x, [2 + axis]), kind)
        column = op.Sub(op.Div(op.Add(op.Mul(place, 2.0), 1.0), length), 1.0)
        columns.append(op.Unsqueeze(column, [-1]))
    return op.Reshape(op.Concat(*reversed(columns), axis=-1), [0, 0, -1, 2])


def deform_conv_definition(s: Site) -> Sequence[Tensor]:
    """GridSample at the kernel's entries, moved by the offsets; times the mask; then MatMul.

    X [N, C, H, W], W [M, C/g, k, k], offset [N, o · K · 2, h, w], bias [M], mask [N, o · K, h, w]
    with K kernel entries and o offset groups; columns are [N, g, C/g · K, h · w].
    """
    op, x, weight, mask, kernel = s.op, s.x(), s.x(1), s.optional(4), kernel_of(s)
    if len(kernel) != 2:
        raise Unsupported("only two spatial axes are run by ONNX Runtime")
    groups, offset_groups = np.array([s.attr("group")]), np.array([s.attr("offset_group")])
    batch, outputs, out = sizes(s, x, [0]), sizes(s, weight, [0]), sizes(s, s.x(2), [2, 3])
    known = isinstance(out, np.ndarray)
    positions = np.prod(out, keepdims=True) if known else op.ReduceProd(out)
    images, rest = calc(s, "Mul", batch, offset_groups), -ONE
    parts = op.Reshape(x, join(s, images, rest, sizes(s, x, [2, 3])))
    grid = deformed_grid(s, kernel)
    read = op.GridSample(parts, grid, mode="linear", padding_mode="zeros", align_corners=0)
    if mask is not None:
        read = op.Mul(read, op.Reshape(mask, join(s, images, ONE, rest, positions)))
    columns = op.Reshape(read, join(s, batch, groups, rest, positions))
    rows = op.Reshape(weight, join(s, groups, op.Div(outputs, groups), rest))
    y = op.Reshape(op.MatMul(rows, columns), join(s, batch, rest, out))
    return [y if s.optional(3) is None else op.Add(y, op.Unsqueeze(s.x(3), [1, 2]))]


add(Composite(op="DeformConv", decompose=deform_conv_definition))


# -- Col2Im, CenterCropPad -------------------------------------------------------------------------


def col2im_pull(s: Site, i: int) -> Tensor:
    """Forward form: blocks X[N, C · K, L] of K entries each, added up in an image Y[N, C, …].

    Backward returns the blocks of M: each spatial axis is read at [entry, block], then all entries
    go before all blocks.
    """
    op, spatial, m = s.op, s.rank(s.y) - 2, s.m
    ones = (1,) * spatial
    strides, dilations = ints(s, "strides") or ones, ints(s, "dilations") or ones
    pads, block = ints(s, "pads"), whole_numbers(s, 2)
    if any(pads):
        m = op.Pad(m, [0, 0, *pads[:spatial], 0, 0, *pads[spatial:]])
    for axis, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        # Each axis before this one has become two.
        place = 2 + 2 * axis
        entries = block[[axis]] if isinstance(block, np.ndarray) else op.Gather(block, [axis])
        reach = op.Mul(op.Sub(entries, ONE), np.int64(dilation))
        free = op.Sub(sizes(s, m, [place]), op.Add(reach, ONE))
        blocks = op.Add(op.Div(free, np.int64(stride)), ONE)
        entry = op.Mul(op.Unsqueeze(count_up(s, entries), [1]), np.int64(dilation))
        start = op.Mul(count_up(s, blocks), np.int64(stride))
        m = op.Gather(m, op.Add(entry, start), axis=place)
    order = [0, 1, *range(2, 2 + 2 * spatial, 2), *range(3, 2 + 2 * spatial, 2)]
    return s.reshape(op.Transpose(m, perm=order), s.x())


add(Linear(op="Col2Im", pull=col2im_pull, blocked=DATA_ONLY))


def center_crop_pad_pull(s: Site, i: int) -> Tensor:
    """Forward form: X, cropped or padded evenly on both sides to given sizes along some axes.

    Backward does the same to M, back to the sizes of X.
    """
    axes = s.attr("axes")
    return s.op.CenterCropPad(s.m, sizes(s, s.x(), axes), axes=axes)


add(Linear(op="CenterCropPad", pull=center_crop_pad_pull, blocked=DATA_ONLY, flow="moves"))
