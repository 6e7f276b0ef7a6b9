"""Pooling over regions given as boxes: RoiAlign and MaxRoiPool.

No derivative flows to the boxes, as in every framework: detectors train them apart. Where the boxes
move with the input, what they change is not attributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Site, Structured, add
from onnx_attrib.rules.indexing import count_up, sizes
from onnx_attrib.rules.sampling import as_float, in_type_of, widened
from onnx_attrib.rules.shape import DATA_ONLY

_SIDES = ("height", "width")
INT = np.dtype(np.int64)


# -- RoiAlign: where it samples --------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """The positions along one axis that each bin of each region reads, [R, bins, samples].

    ``place`` is held inside the data; ``valid``: it was there, or less than one entry outside;
    ``used``: the region has that many samples; ``count`` [R, 1, 1]: how many it has.
    """

    place: Tensor
    valid: Tensor
    used: Tensor | None
    count: Tensor


def samples(s: Site, axis: int) -> Samples:
    """The samples along the rows (axis 0) or columns (1) of the data."""
    op, rois = s.op, widened(s, s.x(1))
    kind, ratio = s.graph.dtype(rois), int(s.attr("sampling_ratio"))
    half_pixel = s.attr("coordinate_transformation_mode") == "half_pixel"
    bins = int(s.attr(f"output_{_SIDES[axis]}"))
    # Boxes are [x₁, y₁, x₂, y₂].
    scaled = op.Mul(rois, float(s.attr("spatial_scale")))
    if half_pixel:
        scaled = op.Sub(scaled, 0.5)
    start = op.Slice(scaled, [1 - axis], [2 - axis], [1])
    length = op.Sub(op.Slice(scaled, [3 - axis], [4 - axis], [1]), start)
    if not half_pixel:
        length = op.Max(length, 1.0)
    length, start = op.Unsqueeze(length, [2]), op.Unsqueeze(start, [2])
    size = op.Div(length, float(bins))
    numbers, used = np.arange(ratio, dtype=kind), None
    count = s.graph.constant(np.full((1, 1, 1), ratio, kind))
    if ratio <= 0:
        count = op.Ceil(size)
        all_counts = op.Concat(np.ones(1, kind), op.Reshape(count, [-1]), axis=0)
        most = op.ReduceMax(all_counts, keepdims=1)
        numbers = op.Cast(count_up(s, op.Cast(most, to=INT)), to=kind)
        used, count = op.Less(numbers, count), op.Max(count, 1.0)
    within = op.Div(op.Mul(op.Add(numbers, np.array(0.5, kind)), size), count)
    bin_starts = op.Add(op.Mul(size, np.arange(bins, dtype=kind).reshape(-1, 1)), start)
    place = op.Add(bin_starts, within)
    extent = as_float(s, sizes(s, s.x(), [2 + axis]), kind)
    valid = op.And(op.GreaterOrEqual(place, -1.0), op.LessOrEqual(place, extent))
    held = op.Max(op.Min(place, op.Sub(extent, 1.0)), 0.0)
    return Samples(held, valid, used, count)


def weights(s: Site, axis: int) -> Tensor:
    """[R, bins, size]: the part of each entry along an axis in the mean over each bin."""
    op, at = s.op, samples(s, axis)
    kind = s.graph.dtype(at.place)
    entries = op.Cast(count_up(s, sizes(s, s.x(), [2 + axis])), to=kind)
    distance = op.Abs(op.Sub(op.Unsqueeze(at.place, [3]), entries))
    share = op.Max(op.Sub(np.ones((), kind), distance), 0.0)
    counted = at.valid if at.used is None else op.And(at.valid, at.used)
    share = op.Where(op.Unsqueeze(counted, [3]), share, 0.0)
    return op.Div(op.ReduceSum(share, [2], keepdims=0), at.count)


def align_pull(s: Site) -> Tensor:
    """Forward form Y[r] = Aᵣ · X[batch r] · Bᵣᵀ, [R, C, h, w], for weights Aᵣ [h, H], Bᵣ [w, W].

    Backward returns, for each sample, Σ_r Aᵣᵀ · M[r] · Bᵣ over its regions r, [N, C, H, W]: the
    columns of all regions stand side by side, with zeros for those of other samples.
    """
    op, m, x = s.op, widened(s, s.m), s.x()
    rows, columns = weights(s, 0), weights(s, 1)
    tall = op.MatMul(op.Unsqueeze(op.Transpose(rows, perm=[0, 2, 1]), [1]), m)
    tall = op.Transpose(tall, perm=[1, 2, 0, 3])
    channels = sizes(s, x, [1, 2])
    shape = (
        [int(np.prod(channels)), -1]
        if isinstance(channels, np.ndarray)
        else op.Concat(op.ReduceProd(channels), [-1], axis=0)
    )
    side_by_side = op.Reshape(tall, shape)
    numbers = op.Unsqueeze(count_up(s, sizes(s, x, [0])), [1])
    own = op.Cast(op.Equal(numbers, s.x(2)), to=s.graph.dtype(columns))
    wide = op.Mul(op.Unsqueeze(own, [2, 3]), columns)
    wide = op.Reshape(wide, op.Concat(op.Shape(numbers, end=1), [-1], op.Shape(x, start=3), axis=0))
    return s.reshape(in_type_of(s, op.MatMul(side_by_side, wide), x), x)


# -- RoiAlign, the largest -------------------------------------------------------------------------


def corners(s: Site, axis: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Entries around each sample along an axis, their weights and which of them count.

    All are [R, bins, 2 · samples].
    """
    op, at = s.op, samples(s, axis)
    low = op.Floor(at.place)
    fraction = op.Sub(at.place, low)
    last = op.Sub(as_float(s, sizes(s, s.x(), [2 + axis]), s.graph.dtype(low)), 1.0)
    entry = op.Concat(low, op.Min(op.Add(low, 1.0), last), axis=2)
    rest = op.Sub(np.ones((), s.graph.dtype(low)), fraction)
    valid = op.Concat(at.valid, at.valid, axis=2)
    weight = op.Where(valid, op.Concat(rest, fraction, axis=2), 0.0)
    used = None
    if at.used is not None:
        there = op.Expand(at.used, op.Shape(at.place))
        used = op.Concat(there, there, axis=2)
    return op.Cast(entry, to=INT), weight, used


def largest(s: Site) -> Tensor:
    """The largest of the products corner times weight, of all samples in each bin.

    That is what the runtime compares, and not the interpolated samples.
    """
    op, x, flat = s.op, s.x(), [0, 0, 0, -1]
    (row, down, there), (column, across, here) = corners(s, 0), corners(s, 1)

    def crossed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return op.Unsqueeze(left, [2, 4]), op.Unsqueeze(right, [1, 3])

    above, beside = crossed(row, column)
    image = op.Mul(op.Reshape(s.x(2), [-1, 1, 1, 1, 1]), sizes(s, x, [2]))
    place = op.Add(op.Mul(op.Add(image, above), sizes(s, x, [3])), beside)
    weight = in_type_of(s, op.Reshape(op.Mul(*crossed(down, across)), [*flat, 1]), x)
    entries = op.Flatten(op.Transpose(x, perm=[0, 2, 3, 1]), axis=3)
    products = op.Mul(op.Gather(entries, op.Reshape(place, flat)), weight)
    if there is not None and here is not None:
        used = op.Reshape(op.And(*crossed(there, here)), [*flat, 1])
        products = op.Where(used, products, lowest(s))
    best = op.ReduceMax(products, [3], keepdims=0)
    if there is not None and here is not None:
        # A box without any sample yields zero.
        best = op.Where(op.Greater(best, lowest(s)), best, 0.0)
    return op.Transpose(best, perm=[0, 3, 1, 2])


def lowest(s: Site) -> np.ndarray:
    """The lowest number of the data's type, as a scalar."""
    kind = s.graph.dtype(s.x())
    return np.array(np.finfo(kind).min, kind)


def align_shares(sweep: Any, s: Site) -> dict[int, Tensor]:
    """Mode avg by its matrices, mode max by its definition."""
    if s.attr("mode") == "avg":
        return {0: align_pull(s)}
    with s.graph.record() as nodes:
        y = largest(s)
    shares: dict[int, Tensor] = sweep.through(s, nodes, [y])
    return shares


SAME_REGIONS = "exact where the regions are the same at x and x̄"

add(
    Structured(
        op="RoiAlign",
        pull=align_shares,
        blocked=DATA_ONLY,
        transparent=False,
        caveat=SAME_REGIONS,
    )
)


# -- MaxRoiPool ------------------------------------------------------------------------------------


def bin_mask(s: Site, axis: int) -> Tensor:
    """[R, bins, size]: which entries along an axis each bin of each region covers."""
    op, rois = s.op, widened(s, s.x(1))
    kind, bins = s.graph.dtype(rois), int(s.attr("pooled_shape")[axis])
    # Boxes are [sample, x₁, y₁, x₂, y₂]; corners are rounded half away from zero.
    scaled = op.Mul(rois, float(s.attr("spatial_scale")))
    corner = op.Mul(op.Sign(scaled), op.Floor(op.Add(op.Abs(scaled), 0.5)))
    start = op.Slice(corner, [2 - axis], [3 - axis], [1])
    end = op.Slice(corner, [4 - axis], [5 - axis], [1])
    length = op.Max(op.Add(op.Sub(end, start), 1.0), 1.0)
    size, number = op.Div(length, float(bins)), np.arange(bins, dtype=kind)
    first = op.Add(op.Floor(op.Mul(size, number)), start)
    past = op.Add(op.Ceil(op.Mul(size, number + 1)), start)
    entry = op.Cast(count_up(s, sizes(s, s.x(), [2 + axis])), to=kind)
    after = op.GreaterOrEqual(entry, op.Unsqueeze(first, [2]))
    return op.And(after, op.Less(entry, op.Unsqueeze(past, [2])))


def max_roi_pool_definition(s: Site) -> Sequence[Tensor]:
    """The maximum over the columns of each bin, then over its rows; zero if it is empty."""
    op, rois = s.op, s.x(1)
    rows, columns = bin_mask(s, 0), bin_mask(s, 1)
    sample = op.Cast(op.Squeeze(op.Slice(rois, [0], [1], [1]), [1]), to=INT)
    best = op.Gather(s.x(), sample)
    for mask in (columns, rows):
        # [R, C, rows, columns] to [R, C, column bins, rows] to [R, C, row bins, column bins].
        covered = op.Where(op.Unsqueeze(mask, [1, 3]), op.Unsqueeze(best, [2]), lowest(s))
        best = op.ReduceMax(covered, [4], keepdims=0)
    empty = op.LessOrEqual(best, lowest(s))
    return [op.Where(empty, 0.0, best)]


add(
    Composite(
        op="MaxRoiPool",
        decompose=max_roi_pool_definition,
        blocked=DATA_ONLY,
        caveat=SAME_REGIONS,
    )
)
