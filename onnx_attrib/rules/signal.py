"""Fourier transforms: linear, and transposed by the operator's own matrix.

The matrix is the operator applied to unit vectors, so it is right in every configuration, and is
folded when the compiled graph is loaded: what runs is one matrix product. Where it would be large,
or its size is known only at run time, the transform is transposed by the transform back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Bilinear, Linear, Site, Unsupported, add
from onnx_attrib.rules.indexing import ONE, Ints, calc, count_up, join, sizes
from onnx_attrib.rules.resize import identity
from onnx_attrib.rules.shape import DATA_ONLY

_LARGEST = 1024
"""Samples up to which the matrix is used."""


def parts(s: Site, tensor: Tensor) -> Ints:
    """1 for real, 2 for complex entries, as a vector of one entry."""
    return sizes(s, tensor, [s.rank(tensor) - 1])


def unit_signals(s: Site, samples: Ints, entries: Ints) -> Tensor:
    """[samples · entries, samples, entries]: every unit vector as a signal."""
    eye = identity(s, samples * entries, s.graph.dtype(s.x()))
    return s.op.Reshape(eye, join(s, -ONE, samples, entries))


def scalar(s: Site, i: int) -> Tensor | None:
    """The integer input ``i`` as a vector of one entry, or None if it is absent."""
    given = s.optional(i)
    if given is None:
        return None
    return s.op.Reshape(s.op.Cast(given, to=np.dtype(np.int64)), [1])


# -- DFT -------------------------------------------------------------------------------------------


def dft_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = F · X along an axis, [… n … 1 or 2] to [… k … 1 or 2].

    Backward returns Fᵀ · M.
    """
    axis, last = known_axis(s), s.rank(s.x()) - 1
    if axis is not None:
        signal = sizes(s, s.x(), [axis, last])
        if isinstance(signal, np.ndarray) and signal[0] <= _LARGEST:
            return by_matrix(s, axis, signal[:1], signal[1:])
    return real_spectrum(s) if one_sided_inverse(s) else by_transform(s)


def known_axis(s: Site) -> int | None:
    """The axis transformed, from the front; None if it is given at run time."""
    axis = s.value(2) if s.optional(2) is not None else np.array(-2)
    return None if axis is None else int(axis.item()) % s.rank(s.x())


def one_sided_inverse(s: Site) -> bool:
    """Whether half a spectrum becomes a real signal."""
    return bool(s.attr("inverse") and s.attr("onesided"))


def by_matrix(s: Site, axis: int, samples: Ints, entries: Ints) -> Tensor:
    """Fᵀ · M, by the transforms of the unit vectors."""
    op, rank = s.op, s.rank(s.x())
    units = unit_signals(s, samples, entries)
    matrix = op.DFT(units, s.optional(1), np.int64(1), **s.node.attrs)
    matrix = op.Flatten(matrix)
    # The axis goes last but one, and with the parts becomes one.
    order = [k for k in range(rank - 1) if k != axis] + [axis, rank - 1]
    back = [int(k) for k in np.argsort(order)]
    m = op.Transpose(s.m, perm=order)
    m = op.Reshape(m, [*[0] * (rank - 2), -1])
    m = op.MatMul(m, op.Transpose(matrix))
    m = op.Reshape(m, [*[0] * (rank - 2), *samples, *entries])
    return op.Transpose(m, perm=back)


def along(s: Site, tensor: Tensor) -> Ints:
    """The size of ``tensor`` along the axis transformed, as a vector of one entry."""
    axis = known_axis(s)
    if axis is not None:
        return sizes(s, tensor, [axis])
    rank, given = np.array([s.rank(tensor)]), scalar(s, 2)
    return s.op.Gather(s.op.Shape(tensor), s.op.Mod(s.op.Add(given, rank), rank))


def sized(s: Site, tensor: Tensor, size: Ints) -> Tensor:
    """``tensor`` cut, or filled up with zeros, to ``size`` along the axis transformed."""
    op, axis = s.op, known_axis(s)
    axes = scalar(s, 2) if axis is None else [axis]
    missing = calc(s, "Sub", size, along(s, tensor))
    return op.Pad(tensor, join(s, np.zeros(1, np.int64), missing), None, axes)


def transform(s: Site, m: Tensor, length: Ints, **attributes: Any) -> Tensor:
    """The DFT of ``m`` along the same axis, in another way."""
    known = known_axis(s)
    axis = s.x(2) if known is None else np.int64(known)
    return s.op.DFT(m, s.op.Reshape(length, np.zeros(0, np.int64)), axis, **attributes)


def by_transform(s: Site) -> Tensor:
    """Fᵀ · M = length · F⁻¹ M, cut or filled up to X's size; the inverse's is F M / length."""
    op, x = s.op, s.x()
    length = scalar(s, 1)
    length = along(s, x) if length is None else length
    inverse = int(s.attr("inverse"))
    kind = s.graph.dtype(s.m)
    back = transform(s, s.m, length, inverse=1 - inverse)
    factor = op.Cast(op.Reshape(length, [1]), to=kind)
    back = op.Div(back, factor) if inverse else op.Mul(back, factor)
    back = op.Slice(back, [0], parts(s, x), [-1])
    return s.shaped(sized(s, back, along(s, x)), x)


def real_spectrum(s: Site) -> Tensor:
    """For y = Re Σ_k cₖ · xₖ · e^{2πijk/n} / n: cₖ · F M / n, where cₖ counts mirrored entries.

    The first entry, and the last one of an even length, have no mirror image: c = 1, else 2.
    """
    op, x = s.op, s.x()
    if s.optional(1) is not None:
        raise Unsupported("dft_length of a one-sided inverse whose size is known only at run time")
    length, count = along(s, s.y), along(s, x)
    kind = s.graph.dtype(s.m)
    back = transform(s, s.m, length, onesided=1)
    inner = op.Sub(count, np.array([2]))
    single = np.ones(1, kind)
    twice = op.ConstantOfShape(op.Max(inner, np.array([0])), value=np.full(1, 2, kind))
    factors = op.Concat(single, twice, single, axis=0)
    axis = known_axis(s)
    place = scalar(s, 2) if axis is None else s.graph.constant([axis], np.int64)
    rank = np.array([s.rank(x)])
    place = op.Mod(op.Add(place, rank), rank)
    shape = op.ScatterElements(np.ones(s.rank(x), np.int64), place, np.array([-1]))
    factors = op.Div(op.Reshape(factors, shape), op.Cast(length, to=kind))
    return s.shaped(op.Mul(back, factors), x)


add(Linear(op="DFT", pull=dft_pull, blocked=DATA_ONLY))


# -- STFT ------------------------------------------------------------------------------------------


def stft_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[b, f] = F · (W ⊙ X[b, f · step + 0 … L − 1]), [B, T, 1 or 2], window W [L].

    Backward returns, from the frames G = Fᵀ · M [B, f, L, 1 or 2], W ⊙ G added up where the frames
    were; and Σ_{b, f} of the frames ⊙ G. ONNX Runtime takes X [B, T] too.
    """
    op, x, window = s.op, s.x(), s.optional(2)
    if s.rank(x) == 2:
        share = stft_pull(s.at([op.Unsqueeze(x, [2]), *s.inputs[1:]]), i)
        return op.Squeeze(share, [2]) if i == 0 else share
    frames = frame_gradients(s)
    step, size = scalar(s, 1), frame_length(s)
    start = op.Mul(count_up(s, sizes(s, s.y, [1])), step)
    place = op.Add(op.Unsqueeze(start, [1]), count_up(s, size))
    if i == 2:
        read = op.Gather(x, place, axis=1)
        return op.ReduceSum(op.Mul(read, frames), [0, 1, 3], keepdims=0)
    if window is not None:
        frames = op.Mul(frames, op.Unsqueeze(window, [1]))
    lead, tail = op.Shape(frames, end=1), op.Shape(frames, start=3)
    flat = op.Reshape(frames, op.Concat(lead, [-1], tail, axis=0))
    index = op.Expand(op.Reshape(place, [1, -1, 1]), op.Shape(flat))
    return op.ScatterElements(s.zeros_like(x), index, flat, axis=1, reduction="add")


def frame_length(s: Site) -> Ints:
    """L, as a vector of one entry."""
    given, known, window = scalar(s, 3), s.value(3), s.optional(2)
    if known is not None:
        return known.astype(np.int64).reshape(1)
    if window is not None:
        return sizes(s, window, [0])
    if given is None:
        raise Unsupported("neither a window nor a frame length")
    return given


def frame_gradients(s: Site) -> Tensor:
    """Fᵀ · M, [B, f, L, 1 or 2]: every frame's own, before the window."""
    op, entries, size = s.op, parts(s, s.x()), frame_length(s)
    if not isinstance(join(s, entries, size), np.ndarray) or size.item() > _LARGEST:
        # All bins of the transform back; those of M stand at the front.
        back = op.DFT(s.m, op.Reshape(size, np.zeros(0, np.int64)), np.int64(2), inverse=1)
        back = op.Mul(back, op.Cast(op.Reshape(size, [1]), to=s.graph.dtype(s.m)))
        return op.Slice(back, [0], entries, [3])
    bins = size // 2 + 1 if s.attr("onesided") else size
    spectra = op.DFT(unit_signals(s, size, entries), None, np.int64(1))
    matrix = op.Flatten(op.Slice(spectra, [0], bins, [1]))
    frames = op.MatMul(op.Reshape(s.m, [0, 0, -1]), op.Transpose(matrix))
    return op.Reshape(frames, [0, 0, *size, *entries])


add(Bilinear(op="STFT", pull=stft_pull, blocked=frozenset({1, 3})))
