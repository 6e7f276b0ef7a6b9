"""Operators that have no CUDA kernel, spelled by those that have one.

``SPELLINGS[operator](site)`` emits the outputs of one node, from its inputs alone; it raises
:class:`~onnx_attrib.rules.Unsupported` for a node that it cannot spell. :func:`in_wider_type` does
the same for operators whose CUDA kernels lack a type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_attrib import rules
from onnx_attrib.ir import OPSET, Node, Tensor
from onnx_attrib.kernels import bound, placement
from onnx_attrib.rules import Composite, Site, Unsupported
from onnx_attrib.rules.convolution import ints, transposed_window
from onnx_attrib.rules.indexing import ONE, axis_of, calc, count_up, join, sizes, whole_numbers
from onnx_attrib.rules.lp_pooling import global_sum, powers, window_sums
from onnx_attrib.rules.recurrent import definition
from onnx_attrib.rules.resize import identity
from onnx_attrib.rules.signal import frame_length, known_axis, parts

Outputs = Sequence[Tensor | None]
Spelling = Callable[[Site], Outputs]

# -- functions of one number -----------------------------------------------------------------------


def tangent(s: Site) -> Outputs:
    """sin x / cos x."""
    return [s.op.Div(s.op.Sin(s.x()), s.op.Cos(s.x()))]


def hyperbolic_cosine(s: Site) -> Outputs:
    """½ e^|x| + ½ e^−|x|, with e^|x| as a square: it may be beyond the type when half of it is not.

    The cosine of 88.9 is 2⁻¹ · e^88.9 in float32, which only holds numbers up to e^88.7.
    """
    op = s.op
    grown = op.Exp(op.Mul(op.Abs(s.x()), 0.5))
    shrunk = op.Reciprocal(grown)
    return [op.Add(op.Mul(op.Mul(grown, 0.5), grown), op.Mul(op.Mul(shrunk, 0.5), shrunk))]


def hyperbolic_sine(s: Site) -> Outputs:
    """tanh x · cosh x: exact near zero, where a difference of exponentials is not."""
    return [s.op.Mul(s.op.Tanh(s.x()), hyperbolic_cosine(s)[0])]


def log_of_one_plus(s: Site, x: Tensor) -> Tensor:
    """log(1 + x) for x ≥ −1, exact for small x: log(w) · x / (w − 1), w = 1 + x as rounded."""
    op = s.op
    whole = op.Add(x, 1.0)
    step = op.Sub(whole, 1.0)
    same = op.Equal(step, 0.0)
    ratio = op.Div(x, op.Where(same, 1.0, step))
    result: Tensor = op.Where(same, x, op.Mul(op.Log(whole), ratio))
    return result


def for_large(s: Site, size: Tensor, near: Callable[[Tensor], Tensor]) -> Tensor:
    """``near`` (size), and log(2 · size) where its square would be beyond the type."""
    op, kind = s.op, s.graph.dtype(s.x())
    limit = {2: 1e2, 4: 1e6, 8: 1e9}[kind.itemsize]
    large = op.Greater(size, limit)
    far = op.Add(op.Log(op.Max(size, limit)), float(np.log(2)))
    result: Tensor = op.Where(large, far, near(op.Where(large, 1.0, size)))
    return result


def inverse_hyperbolic_sine(s: Site) -> Outputs:
    """± log(1 + |x| + x² / (1 + √(1 + x²)))."""
    op, size = s.op, s.op.Abs(s.x())

    def near(a: Tensor) -> Tensor:
        square = op.Mul(a, a)
        more = op.Div(square, op.Add(op.Sqrt(op.Add(square, 1.0)), 1.0))
        return log_of_one_plus(s, op.Add(a, more))

    return [op.Mul(op.Sign(s.x()), for_large(s, size, near))]


def inverse_hyperbolic_cosine(s: Site) -> Outputs:
    """log(1 + t + √t · √(t + 2)), t = x − 1."""
    op = s.op

    def near(x: Tensor) -> Tensor:
        t = op.Sub(x, 1.0)
        root = op.Mul(op.Sqrt(t), op.Sqrt(op.Add(t, 2.0)))
        return log_of_one_plus(s, op.Add(t, root))

    return [for_large(s, s.x(), near)]


def inverse_hyperbolic_tangent(s: Site) -> Outputs:
    """± ½ (log(1 + |x|) − log(1 − |x|))."""
    op, size = s.op, s.op.Abs(s.x())
    twice = op.Sub(log_of_one_plus(s, size), log_of_one_plus(s, op.Neg(size)))
    return [op.Mul(op.Mul(op.Sign(s.x()), 0.5), twice)]


def continuous_elu(s: Site) -> Outputs:
    """max(0, x) + min(0, α (e^(x/α) − 1))."""
    op, alpha = s.op, float(s.attr("alpha"))
    grown = op.Mul(op.Sub(op.Exp(op.Mul(s.x(), 1 / alpha)), 1.0), alpha)
    return [op.Add(op.Max(s.x(), 0.0), op.Min(grown, 0.0))]


def mean(s: Site) -> Outputs:
    """The sum divided by the number of operands."""
    operands = [t for t in s.inputs if t is not None]
    total = s.op.Sum(*operands) if len(operands) > 1 else operands[0]
    return [s.op.Mul(total, 1 / len(operands))]


# -- choices of entries ----------------------------------------------------------------------------


def one_hot_maximum(s: Site) -> Outputs:
    """Hardmax: 1 at the first of the largest entries along the axis."""
    op, axis, rank = s.op, axis_of(s, s.x()), s.rank(s.x())
    places = op.Reshape(as_tensor(s, count_up(s, sizes(s, s.x(), [axis]))), _column(axis, rank))
    first = op.ArgMax(s.x(), axis=axis, keepdims=1)
    return [op.Cast(op.Equal(places, first), to=s.graph.dtype(s.x()))]


def _column(axis: int, rank: int) -> list[int]:
    return [-1 if k == axis else 1 for k in range(rank)]


def as_tensor(s: Site, numbers: Any) -> Tensor:
    """Whole numbers as a tensor, whether they are known now or at run time."""
    return s.graph.constant(numbers) if isinstance(numbers, np.ndarray) else numbers


def last_extreme(s: Site) -> Outputs:
    """ArgMax or ArgMin with ``select_last_index``: the first of the reversed entries."""
    op, axis, x = s.op, axis_of(s, s.x()), s.x()
    backwards = op.Slice(x, [-1], [np.iinfo(np.int64).min], [axis], [-1])
    attributes = {k: v for k, v in s.node.attrs.items() if k != "select_last_index"}
    found = s.graph.emit(s.node.op, backwards, **attributes)
    length = sizes(s, x, [axis])
    if isinstance(length, np.ndarray):
        return [op.Sub(np.int64(length.item() - 1), found)]
    # (A subtraction would wait for the length to come from the host.)
    falling = op.Range(op.Squeeze(op.Sub(length, ONE), [0]), np.int64(-1), np.int64(-1))
    return [op.Gather(falling, found)]


def one_hot(s: Site) -> Outputs:
    """OneHot with indices, a depth or values of other types, by comparison along a new axis."""
    op, wide = s.op, np.dtype(np.int64)
    index, depth = (op.Cast(s.x(i), to=wide) for i in (0, 1))
    known = s.value(1)
    count = op.Reshape(depth, [1]) if known is None else known.reshape(1).astype(np.int64)
    rank = s.rank(s.x())
    axis = int(s.attr("axis")) % (rank + 1)
    places = op.Reshape(as_tensor(s, count_up(s, count)), _column(axis, rank + 1))
    # An index counts from the end if it is negative; one out of range marks nothing.
    index = op.Where(op.Less(index, 0), op.Add(index, depth), index)
    marked = op.Equal(places, op.Unsqueeze(index, [axis]))
    off, on = op.Split(s.x(2), axis=0, num_outputs=2, outputs=2)
    return [op.Where(marked, on, off)]


# -- windows ---------------------------------------------------------------------------------------


def max_unpool(s: Site) -> Outputs:
    """Zeros with each entry of X at its place."""
    op, shape = s.op, s.optional(2)
    if shape is None:
        shape = s.graph.constant(_unpooled(s), np.int64) if s.shape(s.y) else None
    if shape is None:
        raise Unsupported("the shape of its output is unknown")
    zero = np.zeros(1, s.graph.dtype(s.x()))
    zeros = op.Reshape(op.ConstantOfShape(shape, value=zero), [-1])
    place, entries = op.Reshape(s.x(1), [-1]), op.Reshape(s.x(), [-1])
    return [op.Reshape(op.ScatterElements(zeros, place, entries, axis=0), shape)]


def _unpooled(s: Site) -> Sequence[int]:
    shape = s.shape(s.y) or ()
    if not all(isinstance(dim, int) for dim in shape):
        raise Unsupported("the size of its output is known only at run time")
    return [int(dim) for dim in shape if isinstance(dim, int)]


def lp_pool(s: Site) -> Outputs:
    """(Σ |x|^p)^(1/p) over windows."""
    return [_root(s, window_sums(s, powers(s)))]


def global_lp_pool(s: Site) -> Outputs:
    """(Σ |x|^p)^(1/p) over all positions."""
    return [_root(s, global_sum(s, powers(s)))]


def _root(s: Site, total: Tensor) -> Tensor:
    p = int(s.attr("p"))
    result: Tensor = total if p == 1 else s.op.Sqrt(total) if p == 2 else s.op.Pow(total, 1 / p)
    return result


def transposed_convolution(s: Site) -> Outputs:
    """A ConvTranspose with as much padding on both sides as there is on the smaller, cropped."""
    op, window = s.op, transposed_window(s)
    if window.begin is None or window.end is None:
        raise Unsupported("its padding is known only at run time")
    pads = [max(min(pair), 0) for pair in zip(window.begin, window.end, strict=True)]
    # What the original adds at the end beyond the windows.
    surplus = [max(-end, 0) for end in window.end]
    kept = {k: s.attr(k) for k in ("kernel_shape", "strides", "dilations", "group") if s.attr(k)}
    full = op.ConvTranspose(
        *[s.optional(i) for i in range(3)], pads=pads + pads, output_padding=surplus, **kept
    )
    starts = [begin - pad for begin, pad in zip(window.begin, pads, strict=True)]
    over = [max(end, 0) - pad for end, pad in zip(window.end, pads, strict=True)]
    if not any(starts + over):
        return [full]
    most = np.iinfo(np.int64).max
    return [op.Slice(full, starts, [-more if more else most for more in over], window.axes)]


def column_to_image(s: Site) -> Outputs:
    """Col2Im as a ConvTranspose of the blocks [N · C, K, …] by K kernels with one entry each."""
    op, image, block = s.op, whole_numbers(s, 1), whole_numbers(s, 2)
    if not isinstance(image, np.ndarray) or not isinstance(block, np.ndarray):
        raise Unsupported("its image or block shape is known only at run time")
    kind, count, spatial = s.graph.dtype(s.x()), int(np.prod(block)), len(block)
    strides, dilations = (ints(s, name) or (1,) * spatial for name in ("strides", "dilations"))
    pads = ints(s, "pads") or (0,) * 2 * spatial
    begin, end = np.array(pads[:spatial]), np.array(pads[spatial:])
    reach = (block - 1) * dilations + 1
    blocks = (image + begin + end - reach) // strides + 1
    kernel = np.eye(count, dtype=kind).reshape(count, 1, *block)
    alone = op.Reshape(s.x(), [-1, count, *blocks])
    full = op.ConvTranspose(alone, kernel, strides=strides, dilations=dilations)
    # Entries behind the last block are zero.
    missing = np.maximum(begin + image - ((blocks - 1) * strides + reach), 0)
    if missing.any():
        full = op.Pad(full, [0] * (2 + spatial) + [0, 0, *missing])
    cut = op.Slice(full, begin, begin + image, np.arange(2, 2 + spatial))
    lead = op.Shape(s.x(), end=1)
    return [op.Reshape(cut, op.Concat(lead, [-1], image, axis=0))]


def affine_grid(s: Site) -> Outputs:
    """θ · (x, y, …, 1) at each position of the output, coordinates in [−1, 1], x first."""
    op, theta, kind = s.op, s.x(), s.graph.dtype(s.x())
    size = whole_numbers(s, 1)
    rows = (s.shape(theta) or (None, None))[1]
    if not isinstance(rows, int):
        raise Unsupported("whether its grid is flat or in space is known only at run time")
    known, axes = isinstance(size, np.ndarray), list[Tensor]()
    spatial = size[2:] if known else op.Slice(size, [2], [2 + rows], [0])
    for k in range(rows):
        length = spatial[k : k + 1] if known else op.Gather(spatial, [k])
        place = op.Cast(as_tensor(s, count_up(s, length)), to=kind)
        count = op.Cast(as_tensor(s, length), to=kind)
        if s.attr("align_corners"):
            place = op.Mul(place, op.Div(np.array(2, kind), op.Max(op.Sub(count, 1.0), 1.0)))
            line = op.Sub(place, 1.0)
        else:
            line = op.Sub(op.Div(op.Add(op.Mul(place, 2.0), 1.0), count), 1.0)
        line = op.Reshape(line, [*_column(k, rows), 1])
        axes.append(op.Expand(line, join(s, spatial, ONE)))
    points = op.Concat(*reversed(axes), axis=-1)
    points = op.Reshape(points, [-1, rows])
    turn, shift = op.Split(theta, [rows, 1], axis=2, outputs=2)
    turn, shift = (op.Transpose(part, perm=[0, 2, 1]) for part in (turn, shift))
    moved = op.Add(op.MatMul(points, turn), shift)
    return [op.Reshape(moved, op.Concat(op.Shape(theta, end=1), spatial, [rows], axis=0))]


# -- Fourier transforms ----------------------------------------------------------------------------

_LARGEST = 1024
"""Samples up to which the matrix of a transform is used; ONNX Runtime folds it when it loads."""


def transformed(
    s: Site, samples: Any, entries: Any, length: Tensor | None, **attributes: Any
) -> Tensor:
    """[samples · entries, bins, 1 or 2]: the spectra of the unit vectors, by way of float64."""
    op, count = s.op, samples * entries
    eye = identity(s, count, np.dtype(np.float64))
    units = op.Reshape(eye, join(s, -ONE, samples, entries))
    spectra = op.DFT(units, length, np.int64(1), **attributes)
    result: Tensor = op.Cast(spectra, to=s.graph.dtype(s.x()))
    return result


def fourier(s: Site) -> Outputs:
    """A product with the matrix of the transform: that of the unit vectors."""
    op, x, axis, rank = s.op, s.x(), known_axis(s), s.rank(s.x())
    signal = None if axis is None else sizes(s, x, [axis, rank - 1])
    if axis is None or not isinstance(signal, np.ndarray) or signal[0] > _LARGEST:
        raise Unsupported(f"a transform of unknown length, or of more than {_LARGEST} samples")
    if s.optional(1) is not None and s.value(1) is None:
        raise Unsupported("its length is known only at run time")
    length, attributes = s.optional(1), s.node.attrs
    spectra = transformed(s, signal[:1], signal[1:], length, **attributes)
    tail = sizes(s, spectra, [1, 2])
    order = [k for k in range(rank - 1) if k != axis] + [axis, rank - 1]
    flat = op.Reshape(op.Transpose(x, perm=order), [*[0] * (rank - 2), -1])
    y = op.MatMul(flat, op.Flatten(spectra))
    y = op.Reshape(y, join(s, np.zeros(rank - 2, np.int64), tail))
    return [op.Transpose(y, perm=[int(k) for k in np.argsort(order)])]


def short_time_fourier(s: Site) -> Outputs:
    """Frames of the signal times the window, by the matrix of the transform."""
    op, x, window = s.op, s.x(), s.optional(2)
    if s.rank(x) == 2:
        return short_time_fourier(s.at([op.Unsqueeze(x, [2]), *s.inputs[1:]]))
    size, entries, step, length = frame_length(s), parts(s, x), s.value(1), sizes(s, x, [1])
    if not isinstance(join(s, size, entries), np.ndarray) or size.item() > _LARGEST or step is None:
        raise Unsupported(f"frames of unknown length, or of more than {_LARGEST} samples")
    room = calc(s, "Sub", length, size)
    if isinstance(room, np.ndarray):
        frames: Any = room // step + 1
    else:
        frames = op.Add(op.Div(room, step.reshape(1)), ONE)
    start = op.Mul(as_tensor(s, count_up(s, frames)), step)
    place = op.Add(op.Unsqueeze(start, [1]), count_up(s, size))
    read = op.Gather(x, place, axis=1)
    if window is not None:
        read = op.Mul(read, op.Unsqueeze(window, [1]))
    bins = size // 2 + 1 if s.attr("onesided") else size
    matrix = op.Flatten(op.Slice(transformed(s, size, entries, None), [0], bins, [1]))
    y = op.MatMul(op.Reshape(read, [0, 0, -1]), matrix)
    return [op.Reshape(y, [0, 0, *bins, 2])]


# -- by definitions that the rules have ------------------------------------------------------------


def by_rule(s: Site) -> Outputs:
    """What the rule table says that the operator is."""
    rule = rules.lookup(s.node.op, s.node.domain, (0,))
    if not isinstance(rule, Composite):
        raise Unsupported("no definition")
    return rule.decompose(s)


class _Whole:
    """Walks a definition without leaving anything out."""

    def share(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> list[Node]:
        return list(nodes)


def recurrent(s: Site) -> Outputs:
    """RNN, GRU or LSTM as a Scan over its cell."""
    return definition(_Whole(), s)[0]


SPELLINGS: Mapping[str, Spelling] = {
    "Acosh": inverse_hyperbolic_cosine,
    "AffineGrid": affine_grid,
    "ArgMax": last_extreme,
    "ArgMin": last_extreme,
    "Asinh": inverse_hyperbolic_sine,
    "Atanh": inverse_hyperbolic_tangent,
    "Celu": continuous_elu,
    "Col2Im": column_to_image,
    "ConvTranspose": transposed_convolution,
    "Cosh": hyperbolic_cosine,
    "DFT": fourier,
    "DeformConv": by_rule,
    "Det": by_rule,
    "GRU": recurrent,
    "GlobalLpPool": global_lp_pool,
    "GroupNormalization": by_rule,
    "Hardmax": one_hot_maximum,
    "LSTM": recurrent,
    "LpNormalization": by_rule,
    "LpPool": lp_pool,
    "MaxUnpool": max_unpool,
    "Mean": mean,
    "MeanVarianceNormalization": by_rule,
    "OneHot": one_hot,
    "RNN": recurrent,
    "STFT": short_time_fourier,
    "Sinh": hyperbolic_sine,
    "Tan": tangent,
}

# -- types -----------------------------------------------------------------------------------------

_EXACT = frozenset(
    """
    Abs ArgMax ArgMin Clip Compress Concat DepthToSpace Equal Expand Gather GatherElements GatherND
    Greater GreaterOrEqual Less LessOrEqual Max Min Mod NonZero OneHot Pad Relu ReverseSequence
    ScatterElements ScatterND Sign Slice SpaceToDepth Split Tile TopK Transpose
    Trilu Where
    """.split()
)
"""Operators that give the same numbers in every type that holds them."""
_WIDER = {
    1: (np.int32, np.int64, np.float32),
    2: (np.int32, np.int64, np.float32),
    4: (np.int64, np.float64),
    8: (),
}


def in_wider_type(s: Site) -> Outputs | None:
    """The operator in a type that holds all numbers of its own and has a CUDA kernel, or None."""
    node, op = s.node, s.op
    given = [None if t is None else s.graph.dtype(t) for t in s.inputs]
    made = [s.graph.dtype(t) for t in s.outputs]
    for kind, wide in _widenings(node, [kind for kind in given if kind is not None]):
        types = [[wide if t == kind else t for t in kinds] for kinds in (given, made)]
        if placement(node.op, "", OPSET, bound(node.op, "", OPSET, *types)) != "cuda":
            continue
        inputs = [
            op.Cast(t, to=wide) if t is not None and own == kind else t
            for t, own in zip(s.inputs, given, strict=True)
        ]
        found = s.graph.emit(node.op, *inputs, outputs=len(made), **node.attrs)
        results = found if isinstance(found, tuple) else (found,)
        return [
            op.Cast(t, to=kind) if own == kind else t for t, own in zip(results, made, strict=True)
        ]
    return None


def _widenings(node: Node, kinds: Sequence[np.dtype[Any]]) -> Iterator[tuple[Any, Any]]:
    """A type among those of the inputs, and one that might stand in for it."""
    exact = node.op in _EXACT and node.attrs.get("reduction", "none") == "none"
    for kind in dict.fromkeys(kinds):
        if node.op == "GridSample" and kind == np.float16:
            yield kind, np.dtype(np.float32)
        elif exact and kind.kind in "biu":
            yield from ((kind, np.dtype(wide)) for wide in _WIDER[kind.itemsize])


__all__ = ["SPELLINGS", "in_wider_type"]
