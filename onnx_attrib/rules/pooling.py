"""Pooling: averages are linear, maxima pick a winner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from onnx_attrib.ir import Tensor, static
from onnx_attrib.rules.base import Linear, MaxLike, Site, Unsupported, add
from onnx_attrib.rules.broadcast import expand
from onnx_attrib.rules.convolution import (
    Ints,
    Window,
    ints,
    padding,
    scatter,
    size_vector,
    sizes,
    window_of,
    with_sizes,
)


def pool_window(site: Site) -> Window:
    """The window of a pooling operator."""
    window = window_of(site, ints(site, "kernel_shape"))
    if same_padded(site) and window.extent != window.kernel:
        raise Unsupported("auto_pad SAME with dilations, where runtimes disagree")
    size, out = sizes(site, site.x()), sizes(site, site.y)
    if site.attr("ceil_mode") and size is not None and out not in (None, rounded_up(size, window)):
        raise Unsupported(
            "ceil_mode with a window all in the padding: shape inference and runtimes disagree"
        )
    return window


def same_padded(site: Site) -> bool:
    """Whether the padding follows from the size of the data."""
    return bool(site.attr("auto_pad").startswith("SAME"))


def rounded_up(size: Ints, window: Window) -> Ints:
    """Sizes of the output under ``ceil_mode``: no window starts in the padding at the end."""
    result = []
    for j, length in enumerate(size):
        begin = window.begin[j] if window.begin is not None else 0
        end = window.end[j] if window.end is not None else 0
        stride = window.strides[j]
        count = -(-(length + begin + end - window.extent[j]) // stride) + 1
        result.append(min(count, -(-(length + begin) // stride)))
    return tuple(result)


# -- averages --------------------------------------------------------------------------------------


def average_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, C, out…] = the mean of X[N, C, …] in each window.

    Backward returns M divided by the entries each window counts, added up where it read: the
    transposed convolution by a constant kernel. Without overlap that is nearest-neighbour
    resizing; with unit stride, pooling is its own transpose.
    """
    window, m = pool_window(s), s.m
    if same_padded(s) and any(
        k < gap for k, gap in zip(window.kernel, window.strides, strict=True)
    ):
        raise Unsupported("auto_pad SAME with strides beyond the kernel, where runtimes disagree")
    if counts_differ(s, window):
        m = s.op.Mul(m, share_of_full(s, window))
    mean = 1 / math.prod(window.kernel)
    if tiles(s, window):
        return enlarged(s, s.op.Mul(m, mean), window)
    turned = turned_pads(window)
    if turned is not None:
        return s.op.AveragePool(m, kernel_shape=window.kernel, pads=turned, count_include_pad=1)
    kernel = np.full((1, 1, *window.kernel), mean, s.graph.dtype(m))
    channelwise = with_sizes(s, m, [-1, 1], s.y)
    return s.reshape(scatter(s, channelwise, s.graph.constant(kernel), window, 1), s.x())


def tiles(s: Site, window: Window) -> bool:
    """Whether the windows lie side by side from the first entry on, none reaching past the end."""
    side_by_side = window.kernel == window.strides == window.extent
    return side_by_side and not window.padded and not s.attr("ceil_mode")


def enlarged(s: Site, m: Tensor, window: Window) -> Tensor:
    """Each entry repeated over its tile, and zeros where the data is longer than the tiles."""
    op, scales = s.op, np.array([1, 1, *window.kernel], np.float32)
    wide = op.Resize(
        m,
        None,
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    size, out = sizes(s, s.x()), sizes(s, s.y)
    lead = [0] * (4 + len(window.kernel))
    if size is None or out is None:
        covered = op.Mul(size_vector(s, s.y), list(window.kernel))
        rest = op.Sub(size_vector(s, s.x()), covered)
        return s.shaped(op.Pad(wide, op.Concat(lead, rest, axis=0)), s.x())
    left = [n - k * tile for n, k, tile in zip(size, out, window.kernel, strict=True)]
    return op.Pad(wide, lead + left) if any(left) else wide


def turned_pads(window: Window) -> list[int] | None:
    """Pads with which the pool is its own transpose, if it can be (equal on both sides)."""
    if window.begin != window.end or window.begin is None or not window.unit_stride:
        return None
    if window.extent != window.kernel:
        return None
    pads = [k - 1 - pad for k, pad in zip(window.kernel, window.begin, strict=True)]
    return pads + pads if min(pads) >= 0 else None


def counts_differ(s: Site, window: Window) -> bool:
    """Whether some window may count fewer entries than the kernel has."""
    if s.attr("ceil_mode"):
        return True
    return window.padded and not s.attr("count_include_pad")


def share_of_full(s: Site, window: Window) -> Tensor:
    """Kernel entries over the entries each window counts, broadcastable to the output.

    Counted are those in the data, with ``count_include_pad`` also those in the padding, but never
    those past it, where rounding up the output's size may place the end of the last window.
    """
    op, dtype, zero = s.op, s.graph.dtype(s.m), s.graph.constant(0, np.int64)
    begin, end = padding(s, window)
    size, out = size_vector(s, s.x()), size_vector(s, s.y)
    shares, rank = [], len(window.kernel)
    for j, (k, stride, dilation) in enumerate(
        zip(window.kernel, window.strides, window.dilations, strict=True)
    ):
        first = op.Mul(op.Range(zero, op.Gather(out, j), 1), stride)
        first = op.Sub(first, op.Gather(begin, j))
        entries = op.Add(op.Unsqueeze(first, [1]), [dilation * n for n in range(k)])
        if s.attr("count_include_pad"):
            counted = op.Less(entries, beside_data(s, op.Gather(op.Add(size, end), j)))
        else:
            inside = op.Less(entries, beside_data(s, op.Gather(size, j)))
            counted = op.And(op.GreaterOrEqual(entries, 0), inside)
        count = op.Max(op.ReduceSum(op.Cast(counted, to=dtype), [1], keepdims=0), 1.0)
        shares.append(op.Reshape(op.Div(float(k), count), [-1] + [1] * (rank - 1 - j)))
    return reduce(op.Mul, shares)


def beside_data(s: Site, number: Tensor) -> Tensor:
    """[1]: an integer scalar computed from shapes, made where the data lives.

    Shapes are on the host. A range takes its bounds there and is written on the device, so that
    no copy between the two is needed.
    """
    made = s.op.Range(number, s.op.Add(number, 1), 1)
    made.shape = [1]
    return made


add(Linear(op="AveragePool", pull=average_pull, positive=True))


def global_average_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, C, 1…] = the mean of X[N, C, …] over all positions.

    Backward returns M over their number, [N, C, 1…]: one entry stands for all positions.
    """
    op, known = s.op, sizes(s, s.x())
    if known is not None:
        return op.Mul(s.m, 1 / math.prod(known))
    share, vector = s.m, size_vector(s, s.x())
    for j in range(s.rank(s.x()) - 2):
        # One axis at a time: the number of positions may exceed float16.
        count = op.Cast(beside_data(s, op.Gather(vector, j)), to=s.graph.dtype(s.m))
        share = op.Div(share, count)
    return share


add(Linear(op="GlobalAveragePool", pull=global_average_pull, positive=True))


# -- maxima ----------------------------------------------------------------------------------------


def pool_winner(s: Site) -> Tensor:
    """Where in its sample, flattened, each window found its maximum.

    Asks for the operator's own indices, which count through all samples.
    """
    pool_window(s)
    op, attributes = s.op, dict(s.node.attrs)
    if s.attr("storage_order"):
        del attributes["storage_order"]
    _, picked = op.MaxPool(s.x(), outputs=2, **attributes)
    # A window of nothing but NaN or −∞ has no winner; the runtime says −1.
    return op.Max(op.Sub(picked, sample_starts(s, s.x())), 0)


def sample_starts(s: Site, x: Tensor) -> Tensor:
    """[N, 1…]: the position of each sample's first entry among all."""
    op, shape, rank = s.op, s.shape(x), s.rank(x)
    known = static(shape[1:]) if shape else None
    if known is None:
        length = op.Squeeze(op.Shape(op.Flatten(x), start=1, end=2))
    else:
        length = s.graph.constant(math.prod(known), np.int64)
    # The batch of a reference is known at run time only.
    starts = op.Range(s.graph.constant(0, np.int64), op.Size(x), length)
    return op.Reshape(starts, [-1] + [1] * (rank - 1))


def pool_take(s: Site, values: Sequence[Tensor | None], position: Tensor) -> Tensor:
    """The entry of ``values`` [N, C, …] at each position [N, C, out…]."""
    if values[0] is None:
        return s.zeros_like(s.y)
    op = s.op
    at = op.Flatten(expand(s, position, s.y))
    return s.reshape(op.GatherElements(op.Flatten(values[0]), at, axis=1), s.y)


def pool_put(s: Site, values: Tensor, position: Tensor) -> dict[int, Tensor]:
    """``values`` [N, C, out…] added up at their positions in zeros [N, C, …]."""
    op = s.op
    at = op.Flatten(expand(s, position, s.y))
    zeros = s.zeros_like(op.Flatten(s.x()))
    total = op.ScatterElements(zeros, at, op.Flatten(values), axis=1, reduction="add")
    return {0: s.reshape(total, s.x())}


add(MaxLike(op="MaxPool", winner=pool_winner, take=pool_take, put=pool_put))


def global_winner(s: Site) -> Tensor:
    """[N, C, 1…]: where in its channel, flattened, the maximum is."""
    flat = s.op.ArgMax(channels(s, s.x()), axis=2, keepdims=1)
    return s.op.Reshape(flat, [0, 0] + [1] * (s.rank(s.x()) - 2))


def channels(s: Site, tensor: Tensor) -> Tensor:
    """[N, C, …] as [N, C, positions]."""
    return s.op.Reshape(tensor, [0, 0, -1])


def global_take(s: Site, values: Sequence[Tensor | None], position: Tensor) -> Tensor:
    """The entry of ``values`` [N, C, …] at each position [N, C, 1…]."""
    if values[0] is None:
        return s.zeros_like(s.y)
    at = channels(s, expand(s, position, s.y))
    return s.reshape(s.op.GatherElements(channels(s, values[0]), at, axis=2), s.y)


def global_put(s: Site, values: Tensor, position: Tensor) -> dict[int, Tensor]:
    """``values`` [N, C, 1…] at their positions in zeros [N, C, …]."""
    at = channels(s, expand(s, position, s.y))
    zeros = s.zeros_like(channels(s, s.x()))
    total = s.op.ScatterElements(zeros, at, channels(s, values), axis=2)
    return {0: s.reshape(total, s.x())}


add(MaxLike(op="GlobalMaxPool", winner=global_winner, take=global_take, put=global_put))
