"""Convolutions, forward and transposed: products of data, weight and a bias added.

Everything follows from one relation, held by a :class:`Window`: entry k of the kernel at output
position o meets the data at o · stride + k · dilation − begin. Scattering along it is the data
gradient of a convolution, gathering is that of a transposed one, and correlating data with outputs
is the weight gradient of both. The lowerings stay within what the CUDA provider runs: a transposed
convolution has equal pads on both sides of an axis, and is cropped where that is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_attrib.ir import Tensor, static
from onnx_attrib.rules.base import Bilinear, Site, Unsupported, add

Ints = tuple[int, ...]
_FEW = 8
"""Channels up to which the transposed convolution is the faster one."""


@dataclass(frozen=True)
class Window:
    """How a kernel slides over the data; one entry a spatial axis.

    ``begin`` and ``end``: the padding, None where it depends on sizes known only at run time
    (``auto_pad`` SAME with a stride; ``lower``: the odd entry goes before the data).
    """

    kernel: Ints
    strides: Ints
    dilations: Ints
    begin: Ints | None
    end: Ints | None
    lower: bool = False

    @property
    def extent(self) -> Ints:
        """Data entries from the kernel's first to its last, inclusive."""
        return extents(self.kernel, self.dilations)

    @property
    def axes(self) -> list[int]:
        """The spatial axes."""
        return [2 + j for j in range(len(self.kernel))]

    @property
    def padded(self) -> bool:
        """Whether there may be padding."""
        return self.begin is None or self.end is None or any(self.begin + self.end)

    @property
    def unit_stride(self) -> bool:
        return all(stride == 1 for stride in self.strides)


def extents(kernel: Ints, dilations: Ints) -> Ints:
    """Data entries from a kernel's first to its last, inclusive."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


# -- reading attributes and shapes -----------------------------------------------------------------


def ints(site: Site, name: str) -> Ints:
    """A list attribute (empty where absent)."""
    return tuple(site.attr(name) or ())


def sizes(site: Site, tensor: Tensor) -> Ints | None:
    """The spatial sizes, or None if one is known only at run time."""
    shape = site.shape(tensor)
    return None if shape is None else static(shape[2:])


def size_vector(site: Site, tensor: Tensor) -> Tensor:
    """The spatial sizes as an int64 tensor."""
    known = sizes(site, tensor)
    if known is None:
        return site.op.Shape(tensor, start=2)
    return site.graph.constant(known, np.int64)


def with_sizes(site: Site, tensor: Tensor, lead: Sequence[int], like: Tensor) -> Tensor:
    """``tensor`` with leading axes ``lead`` (as for Reshape) and the spatial axes of ``like``."""
    known = sizes(site, like)
    shape = (
        site.op.Concat(list(lead), site.op.Shape(like, start=2), axis=0)
        if known is None
        else [*lead, *known]
    )
    return site.op.Reshape(tensor, shape)


def swap_channels(site: Site, tensor: Tensor, spatial: int) -> Tensor:
    """Exchange the first two axes."""
    return site.op.Transpose(tensor, perm=[1, 0, *range(2, 2 + spatial)])


def kernel_of(site: Site) -> Ints:
    """The kernel's spatial sizes, from the attribute or the weight."""
    known = ints(site, "kernel_shape") or sizes(site, site.x(1))
    if not known:
        raise Unsupported("the size of the kernel is unknown")
    return known


def window_of(site: Site, kernel: Ints) -> Window:
    """The window of a node that slides over its first input."""
    ones = (1,) * len(kernel)
    strides, dilations = ints(site, "strides") or ones, ints(site, "dilations") or ones
    mode = site.attr("auto_pad")
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = ints(site, "pads") if mode == "NOTSET" else ()
        pads = pads or (0,) * 2 * len(kernel)
        return Window(kernel, strides, dilations, pads[: len(kernel)], pads[len(kernel) :])
    lower = mode == "SAME_LOWER"
    extent, known = extents(kernel, dilations), sizes(site, site.x())
    if all(stride == 1 for stride in strides):
        totals = tuple(e - 1 for e in extent)
    elif known is not None:
        # The output has ⌈size / stride⌉ entries.
        totals = tuple(
            max((-(-size // stride) - 1) * stride + e - size, 0)
            for size, stride, e in zip(known, strides, extent, strict=True)
        )
    else:
        return Window(kernel, strides, dilations, None, None, lower)
    begin, end = split_padding(totals, lower)
    return Window(kernel, strides, dilations, begin, end, lower)


def split_padding(totals: Ints, lower: bool) -> tuple[Ints, Ints]:
    """Padding before and after the data; the odd entry goes after it, or before if ``lower``."""
    half = tuple(total // 2 for total in totals)
    rest = tuple(total - h for total, h in zip(totals, half, strict=True))
    return (rest, half) if lower else (half, rest)


def padding(site: Site, window: Window) -> tuple[Tensor, Tensor]:
    """Padding before and after the data as int64 tensors, computed at run time if need be."""
    graph, op = site.graph, site.op
    if window.begin is not None and window.end is not None:
        return graph.constant(window.begin, np.int64), graph.constant(window.end, np.int64)
    size, strides = size_vector(site, site.x()), list(window.strides)
    last = op.Mul(op.Div(op.Sub(size, 1), strides), strides)
    total = op.Max(op.Sub(op.Add(last, list(window.extent)), size), 0)
    half = op.Div(total, 2)
    rest = op.Sub(total, half)
    return (rest, half) if window.lower else (half, rest)


def transposed_window(site: Site) -> Window:
    """The window of a ConvTranspose, which slides over its output.

    ``end`` is the padding less the output padding. Negative, it counts the output entries at the
    end that no window reaches.
    """
    kernel = kernel_of(site)
    ones = (1,) * len(kernel)
    strides, dilations = ints(site, "strides") or ones, ints(site, "dilations") or ones
    surplus = ints(site, "output_padding") or (0,) * len(kernel)
    extent, mode = extents(kernel, dilations), site.attr("auto_pad")
    asked = ints(site, "output_shape")[-len(kernel) :]
    if asked:
        known = sizes(site, site.x())
        if known is None:
            return Window(kernel, strides, dilations, None, None, mode != "SAME_UPPER")
        totals = tuple(
            (size - 1) * stride + more + e - out
            for size, stride, more, e, out in zip(
                known, strides, surplus, extent, asked, strict=True
            )
        )
        # An output larger than the windows reach gets the rest at its end.
        begin, _ = split_padding(tuple(max(t, 0) for t in totals), mode != "SAME_UPPER")
        end = tuple(total - pad for total, pad in zip(totals, begin, strict=True))
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        if any(surplus):
            raise Unsupported("auto_pad SAME with output_padding, where runtimes disagree")
        totals = tuple(e - stride for e, stride in zip(extent, strides, strict=True))
        if min(totals) < 0:
            raise Unsupported(
                "auto_pad SAME with strides beyond the kernel, where runtimes disagree"
            )
        begin, end = split_padding(totals, mode == "SAME_LOWER")
    else:
        pads = (ints(site, "pads") if mode == "NOTSET" else ()) or (0,) * 2 * len(kernel)
        begin, end = pads[: len(kernel)], pads[len(kernel) :]
    reached = tuple(pad - more for pad, more in zip(end, surplus, strict=True))
    return Window(kernel, strides, dilations, begin, reached)


# -- the three sums --------------------------------------------------------------------------------


def scatter(site: Site, m: Tensor, weight: Tensor, window: Window, group: int) -> Tensor:
    """Each output's cotangent, times the kernel, added up where the window read the data.

    ``m`` is [N, M, out…] and ``weight`` [M, C/g, k…]; the result is [N, C, …] with the spatial
    sizes of the site's input. With unit stride this is a convolution by the turned kernel, unless
    the data has few channels, which ONNX Runtime's CPU convolution would compute in blocks of 16
    (64 channels of 64² to 3, 3×3: 0.81 ms, and 0.22 ms by the transposed one; but 1×1: 0.28 ms,
    and 0.33 ms).
    """
    begin, end, extent = window.begin, window.end, window.extent
    size, out = sizes(site, site.x()), sizes(site, site.y)
    channels = (site.shape(weight) or (None, None))[1]
    few = group == 1 and isinstance(channels, int) and channels <= _FEW
    narrow = few and max(extent) > 1 and size and out
    if begin is not None and end is not None and window.unit_stride and not narrow:
        before = [e - 1 - pad for e, pad in zip(extent, begin, strict=True)]
        after = [e - 1 - pad for e, pad in zip(extent, end, strict=True)]
        if min(before + after) >= 0:
            return site.op.Conv(
                m,
                turned(site, weight, window, group),
                dilations=window.dilations,
                group=group,
                pads=before + after,
            )
    if begin is None or size is None or out is None:
        return _scatter_any_size(site, m, weight, window, group)
    pads, surplus, starts = [], [], []
    for first, length, count, stride, e in zip(
        begin, size, out, window.strides, extent, strict=True
    ):
        over = (count - 1) * stride + e - first - length
        pad = max(min(first, over + stride - 1), 0)
        pads.append(pad)
        surplus.append(max(pad - over, 0))
        starts.append(first - pad)
    full = site.op.ConvTranspose(
        m,
        weight,
        strides=window.strides,
        dilations=window.dilations,
        group=group,
        pads=pads + pads,
        output_padding=surplus,
    )
    if sizes(site, full) == size and not any(starts):
        return full
    ends = [start + length for start, length in zip(starts, size, strict=True)]
    return site.op.Slice(full, starts, ends, window.axes)


def _scatter_any_size(site: Site, m: Tensor, weight: Tensor, window: Window, group: int) -> Tensor:
    """:func:`scatter` without a size known before run time: everything, then cropped."""
    op = site.op
    full = op.ConvTranspose(
        m,
        weight,
        strides=window.strides,
        dilations=window.dilations,
        group=group,
        output_padding=[stride - 1 for stride in window.strides],
    )
    begin, _ = padding(site, window)
    return op.Slice(full, begin, op.Add(begin, size_vector(site, site.x())), window.axes)


def turned(site: Site, weight: Tensor, window: Window, group: int) -> Tensor:
    """The kernel of the reverse convolution: [M, C/g, k…] to [C, M/g, k…], flipped in space.

    Emitted as nodes: ONNX Runtime folds them, and the file does not hold the weight twice.
    """
    op, kernel = site.op, window.kernel
    flip = [j for j, k in enumerate(kernel) if k > 1]
    if flip:
        backwards = [-1] * len(flip)
        ends = [-kernel[j] - 1 for j in flip]
        weight = op.Slice(weight, backwards, ends, [2 + j for j in flip], backwards)
    if group == 1:
        return swap_channels(site, weight, len(kernel))
    outputs, inputs = (site.shape(weight) or (None, None))[:2]
    if inputs == 1 and outputs == group:
        return weight
    if not isinstance(inputs, int):
        raise Unsupported("grouped, with a weight whose shape is unknown")
    split = op.Reshape(weight, [group, -1, inputs, *kernel])
    split = op.Transpose(split, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    return op.Reshape(split, [group * inputs, -1, *kernel])


def gather(site: Site, m: Tensor, weight: Tensor, window: Window, group: int) -> Tensor:
    """What each window reads of ``m``, times the kernel: the transpose of :func:`scatter`."""
    begin, end = window.begin or (), window.end or ()
    share = site.op.Conv(
        m,
        weight,
        strides=window.strides,
        dilations=window.dilations,
        group=group,
        pads=[*begin, *(max(pad, 0) for pad in end)],
    )
    # Windows that start where the output padding lies belong to no input entry.
    extra = [max(-pad, 0) // stride for pad, stride in zip(end, window.strides, strict=True)]
    cut = {axis: -more for axis, more in zip(window.axes, extra, strict=True) if more}
    if cut:
        share = site.op.Slice(share, [0] * len(cut), list(cut.values()), list(cut))
    return share


def correlate(site: Site, data: Tensor, out: Tensor, window: Window, group: int) -> Tensor:
    """At each kernel entry, Σ over samples and positions of the data there times ``out``.

    ``data`` is [N, C, …] and ``out`` [N, M, out…]; the result is [M, C/g, k…]. It is itself a
    convolution: samples stand in for channels, ``out`` for the kernel, and stride and dilation
    change places.
    """
    op, spatial = site.op, len(window.kernel)
    if window.begin is None or window.end is None:
        begin, end = padding(site, window)
        data = op.Pad(data, op.Concat([0, 0], begin, [0, 0], end, axis=0))
        pads, cut = [0] * 2 * spatial, True
    else:
        pads = [*window.begin, *(max(pad, 0) for pad in window.end)]
        cut = not window.unit_stride or min(window.end) < 0
    if group == 1:
        swapped = swap_channels(site, data, spatial)
    else:
        # [N, g·c, …] to [c, g·N, …]: every group its own samples.
        split = with_sizes(site, data, [0, group, -1], data)
        split = op.Transpose(split, perm=[2, 1, 0, *range(3, 3 + spatial)])
        swapped = with_sizes(site, split, [0, -1], data)
    share = op.Conv(
        swapped,
        swap_channels(site, out, spatial),
        strides=window.dilations,
        dilations=window.strides,
        group=group,
        pads=pads,
    )
    if cut:
        # Data past the last window makes room for entries past the kernel's end.
        share = op.Slice(share, [0] * spatial, list(window.kernel), window.axes)
    return swap_channels(site, share, spatial)


# -- rows ------------------------------------------------------------------------------------------


def bias_share(site: Site) -> Tensor:
    """[M]: the cotangents [N, M, …] summed over samples and positions."""
    axes = [0, *range(2, site.rank(site.m))]
    return site.op.ReduceSum(site.m, axes, keepdims=0)


def conv_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, M, out…] = X[N, C, …] ∗ W[M, C/g, k…] + B[M].

    Backward returns :func:`scatter` of M by W, [N, C, …]; :func:`correlate` of X and M,
    [M, C/g, k…]; and the sum of M over samples and positions, [M].
    """
    if i == 2:
        return bias_share(s)
    window, group = window_of(s, kernel_of(s)), int(s.attr("group"))
    if i == 0:
        return scatter(s, s.m, s.x(1), window, group)
    return correlate(s, s.x(0), s.m, window, group)


add(Bilinear(op="Conv", pull=conv_pull, layer="convolution", bias=2))


def conv_transpose_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[N, M, …] = X[N, C, in…] scattered by W[C, M/g, k…] + B[M].

    Backward returns :func:`gather` of M by W, [N, C, in…]; :func:`correlate` of M and X,
    [C, M/g, k…]; and the sum of M over samples and positions, [M].
    """
    if i == 2:
        return bias_share(s)
    window, group, m = transposed_window(s), int(s.attr("group")), s.m
    if window.begin is None:
        m, window = whole(s, window)
    if i == 0:
        return gather(s, m, s.x(1), window, group)
    return correlate(s, m, s.x(0), window, group)


def whole(s: Site, window: Window) -> tuple[Tensor, Window]:
    """M at all that the windows reach, for an ``output_shape`` cut from it at run time.

    Returns it with the window that needs no padding.
    """
    op, asked = s.op, list(ints(s, "output_shape")[-len(window.kernel) :])
    size, surplus = size_vector(s, s.x()), ints(s, "output_padding") or (0,) * len(asked)
    reach = op.Add(op.Mul(op.Sub(size, 1), list(window.strides)), list(window.extent))
    total = op.Max(op.Sub(op.Add(reach, list(surplus)), asked), 0)
    half = op.Div(total, 2)
    begin = op.Sub(total, half) if window.lower else half
    end = op.Sub(op.Sub(reach, begin), asked)
    none = (0,) * len(asked)
    m = op.Pad(s.m, op.Concat([0, 0], begin, [0, 0], end, axis=0))
    return m, replace(window, begin=none, end=none)


add(Bilinear(op="ConvTranspose", pull=conv_transpose_pull, layer="convolution", bias=2))
