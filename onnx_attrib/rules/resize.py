"""Resize: linear in the data, one axis after the other.

The matrix of each axis is the operator itself, applied to an identity matrix. So every mode,
rounding and coordinate transformation is transposed exactly as the runtime computes it, and the
matrix of a known size is folded when the compiled graph is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_attrib.ir import Shape, Tensor, is_narrow
from onnx_attrib.rules.base import Linear, Site, Unsupported, add
from onnx_attrib.rules.indexing import Ints, join, sizes, whole_numbers
from onnx_attrib.rules.shape import DATA_ONLY

ROI, SCALES, SIZES = 1, 2, 3
"""Inputs of Resize."""

# An integer factor with these repeats every entry that many times.
_REPEATING = {("asymmetric", "floor")} | {
    (f"{prefix}half_pixel{suffix}", f"round_prefer_{way}")
    for prefix, suffix in (("", ""), ("", "_symmetric"), ("pytorch_", ""))
    for way in ("floor", "ceil")
}


def resize_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = X, resampled along some axes: Y = X ×ₖ Aₖ, Aₖ [outₖ, inₖ], plus a constant.

    Backward returns M ×ₖ Aₖᵀ. Nearest-neighbour enlarging by integers is the sum over each block.
    """
    blocks = block_sizes(s)
    if blocks is not None:
        average = s.op.AveragePool(s.m, kernel_shape=blocks, strides=blocks)
        return s.op.Mul(average, float(np.prod(blocks)))
    m = s.m
    for entry, axis in enumerate(listed_axes(s)):
        if not unchanged(s, entry, axis):
            m = transposed(s, m, axis_matrix(s, entry, axis), axis)
    return m


def listed_axes(s: Site) -> list[int]:
    """The axes that scales or sizes speak about, in their order."""
    rank = s.rank(s.x())
    axes = s.attr("axes")
    return list(range(rank)) if axes is None else [int(axis) % rank for axis in axes]


def stretched(s: Site) -> bool:
    """Whether each axis has a size of its own, not one that keeps the aspect ratio."""
    return s.optional(SIZES) is None or s.attr("keep_aspect_ratio_policy") == "stretch"


def cropped(s: Site) -> bool:
    """Whether only a region is resampled."""
    return bool(s.attr("coordinate_transformation_mode") == "tf_crop_and_resize")


def unchanged(s: Site, entry: int, axis: int) -> bool:
    """Whether an axis is known to stay as it is."""
    if cropped(s):
        region, count = s.value(ROI), len(listed_axes(s))
        if region is None or (region[entry], region[entry + count]) != (0, 1):
            return False
    if s.optional(SIZES) is None:
        scales = s.value(SCALES)
        return scales is not None and bool(scales[entry] == 1)
    before, after = s.shape(s.x()) or (), s.shape(s.y) or ()
    return stretched(s) and before[axis] is not None and before[axis] == after[axis]


def block_sizes(s: Site) -> list[int] | None:
    """By how much each spatial axis is repeated, if all that happens is repeating."""
    how = (s.attr("coordinate_transformation_mode"), s.attr("nearest_mode"))
    rank = s.rank(s.x())
    if s.attr("mode") != "nearest" or how not in _REPEATING or not 3 <= rank <= 5:
        return None
    before, after = s.shape(s.x()) or (), s.shape(s.y) or ()
    blocks = [1] * rank
    for entry, axis in enumerate(listed_axes(s)):
        factor = 1.0 if unchanged(s, entry, axis) else known_factor(s, entry, axis, before, after)
        if factor is None or factor < 1 or factor % 1:
            return None
        blocks[axis] = int(factor)
    return blocks[2:] if blocks[:2] == [1, 1] else None


def known_factor(s: Site, entry: int, axis: int, before: Shape, after: Shape) -> float | None:
    """The factor of an axis, or None if it is not known at compile time."""
    if s.optional(SIZES) is None:
        scales = s.value(SCALES)
        return None if scales is None else float(scales[entry])
    size, out = before[axis], after[axis]
    if not isinstance(size, int) or not isinstance(out, int) or not size or not stretched(s):
        return None
    return out / size


def axis_matrix(s: Site, entry: int, axis: int) -> Tensor:
    """[in, out]: each unit vector, resampled along one axis; in the type of the data."""
    x, op = s.x(), s.op
    kind = s.graph.dtype(x)
    extent, out = sizes(s, x, [axis]), sizes(s, s.y, [axis])
    eye = identity(s, extent, np.dtype(np.float32) if is_narrow(kind) else kind)
    if stretched(s):
        matrix = op.Resize(
            eye,
            beside_unit(s, s.optional(ROI), [entry, entry + len(listed_axes(s))], pairs=True),
            beside_unit(s, s.optional(SCALES), [entry]),
            None if s.optional(SIZES) is None else join(s, extent, out),
            **attributes(s, "axes", "keep_aspect_ratio_policy"),
        )
    else:
        matrix = probed(s, eye, extent, axis)
    dims = (s.shape(x) or ())[axis], (s.shape(s.y) or ())[axis]
    matrix.shape = list(dims)
    return op.Cast(matrix, to=kind) if is_narrow(kind) else matrix


def attributes(s: Site, *without: str) -> dict[str, Any]:
    """The node's attributes except those named; nothing is extrapolated but zeros."""
    kept = {name: s.attr(name) for name in s.node.attrs if name not in without}
    return {**kept, "extrapolation_value": 0.0}


def identity(s: Site, extent: Ints, kind: np.dtype[Any]) -> Tensor:
    """The identity matrix of a size given as a vector of one entry."""
    square = s.op.ConstantOfShape(join(s, extent, extent), value=np.zeros(1, kind))
    return s.op.EyeLike(square)


def beside_unit(
    s: Site, values: Tensor | None, entries: list[int], pairs: bool = False
) -> Tensor | np.ndarray | None:
    """Entries of the scales (of the region, if ``pairs``), behind those of an axis left alone."""
    if values is None or s.shape(values) == (0,) or (pairs and not cropped(s)):
        return None
    unit = np.array([[0.0], [1.0]] if pairs else [[1.0]], s.graph.dtype(values))
    picked = s.op.Gather(values, [[entry] for entry in entries])
    return s.op.Reshape(s.op.Concat(unit, picked, axis=1), [-1])


def probed(s: Site, eye: Tensor, extent: Ints, axis: int) -> Tensor:
    """[in, out] where one factor for all axes follows from all their sizes.

    Resamples data of the original sizes: a unit vector along ``axis``, constant along the others,
    which keep it so.
    """
    op, listed, rank = s.op, listed_axes(s), s.rank(s.x())
    free = next((k for k in range(rank) if k not in listed), None)
    if free is None or cropped(s):
        raise Unsupported("keep_aspect_ratio_policy over all axes, or with a region")
    place = [1] * rank
    place[free] = place[axis] = -1
    known = sizes(s, s.x(), listed)
    unit = op.Unsqueeze(eye, [k for k in range(rank) if place[k] == 1])
    parts = [np.ones(1, np.int64)] * rank
    for k, size in zip(listed, _each(s, known, len(listed)), strict=True):
        parts[k] = size
    parts[free] = extent
    probe = op.Expand(unit, join(s, *parts))
    resized = op.Resize(probe, None, None, whole_numbers(s, SIZES), **attributes(s))
    others = [k for k in listed if k != axis]
    if others:
        resized = op.Slice(resized, [0] * len(others), [1] * len(others), others)
    matrix = op.Squeeze(resized, [k for k in range(rank) if place[k] == 1])
    return matrix if free < axis else op.Transpose(matrix)


def _each(s: Site, vector: Ints, count: int) -> list[Ints]:
    """The entries of a vector, as vectors of one entry."""
    if isinstance(vector, np.ndarray) or count == 1:
        return list(vector.reshape(-1, 1)) if isinstance(vector, np.ndarray) else [vector]
    return list(s.op.Split(vector, num_outputs=count, axis=0, outputs=count))


def transposed(s: Site, m: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``m`` times the transpose of ``matrix`` [in, out] along ``axis``: sizes out become in."""
    op, last = s.op, s.rank(m) - 1
    if axis == last - 1:
        return op.MatMul(matrix, m)
    if axis == last:
        return op.MatMul(m, op.Transpose(matrix))
    swap = list(range(last + 1))
    swap[axis], swap[last] = last, axis
    turned = op.MatMul(op.Transpose(m, perm=swap), op.Transpose(matrix))
    return op.Transpose(turned, perm=swap)


add(Linear(op="Resize", pull=resize_pull, blocked=DATA_ONLY))
