"""Sums, means and norms over axes.

The cotangent of a sum has one entry for all that were added. It stays that way (a kept axis of
size 1) until a rule needs it in full: see :mod:`onnx_attrib.rules.broadcast`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, Unsupported, add
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.indexing import sizes
from onnx_attrib.rules.shape import DATA_ONLY


def reduced_axes(s: Site) -> tuple[int, ...] | None:
    """The axes reduced, counted from the front; None if only known at run time."""
    axes = s.value(1)
    if s.shape(s.x()) is None or (axes is None and s.optional(1) is not None):
        return None
    rank = s.rank(s.x())
    if axes is not None and axes.size:
        return tuple(sorted({int(k) % rank for k in axes}))
    return () if s.attr("noop_with_empty_axes") else tuple(range(rank))


def unreduced(s: Site) -> Tensor:
    """The output with the reduced axes in place at size 1."""
    attributes = {**s.node.attrs, "keepdims": 1}
    return s.graph.emit(s.node.op, s.x(), s.optional(1), **attributes)


def kept(s: Site, tensor: Tensor) -> Tensor:
    """``tensor``, shaped like the output, with the reduced axes in place at size 1."""
    axes = reduced_axes(s)
    if axes is None:
        if not s.attr("keepdims"):
            tensor = s.op.Reshape(tensor, s.op.Shape(unreduced(s)))
        # Nothing shows which axes are lazy.
        return s.op.Expand(tensor, s.shape_of(s.x()))
    if axes and not s.attr("keepdims"):
        tensor = s.op.Unsqueeze(tensor, list(axes))
    have, dims = s.shape(tensor), s.shape(s.x()) or ()
    if have is None or any(have[k] != 1 for k in axes):
        # Inference could not tell; a cotangent of unknown shape would count as full.
        tensor = s.op.Identity(tensor)
        tensor.shape = [1 if k in axes else dim for k, dim in enumerate(dims)]
    return tensor


def mean_pull(s: Site, i: int) -> Tensor:
    """Forward form y = Σ x / n over some axes. Backward returns m / n, for each entry."""
    op, m = s.op, kept(s, s.m)
    axes = reduced_axes(s)
    if axes is not None:
        count = sizes(s, s.x(), np.array(axes, np.int64))
        if isinstance(count, np.ndarray):
            return op.Mul(m, 1.0 / float(np.prod(count)))
    total = op.Div(op.Size(s.x()), op.Max(op.Size(s.y), np.int64(1)))
    return op.Div(m, s.graph.number(total, s.graph.dtype(m)))


add(Linear(op="ReduceSum", pull=lambda s, i: kept(s, s.m), blocked=DATA_ONLY, positive=True))
add(Linear(op="ReduceMean", pull=mean_pull, blocked=DATA_ONLY, positive=True))


# -- by definition: an elementwise function, a sum, perhaps another function -----------------------


def total(s: Site, terms: Tensor) -> Tensor:
    """Sum ``terms`` over the axes that the operator reduces."""
    if reduced_axes(s) == ():
        raise Unsupported("noop_with_empty_axes: ONNX's versions differ on what it returns")
    result: Tensor = s.graph.emit("ReduceSum", terms, s.optional(1), **s.node.attrs)
    return result


def norm_pull(s: Site, i: int) -> Tensor:
    """Forward form y = √Σ x². Backward returns m · x / y, and zero where y is."""
    op = s.op
    share = op.Where(op.Equal(s.y, 0.0), 0.0, op.Div(s.m, s.y))
    return op.Mul(kept(s, share), s.x())


def norm_definition(s: Site) -> Sequence[Tensor]:
    """√Σ x², where a sum of zero counts as the smallest number: the root has a slope there."""
    tiny = 6e-8 if s.graph.dtype(s.x()) == np.float16 else 1.2e-38
    return [s.op.Sqrt(s.op.Max(total(s, s.op.Pow(s.x(), 2.0)), tiny))]


def product_pull(s: Site, i: int) -> Tensor:
    """Forward form y = Π x. Backward returns m · Π of the other entries.

    These are y / x if no entry is zero. If one is, only that one has a product left.
    """
    op, x, attributes = s.op, s.x(), {**s.node.attrs, "keepdims": 1}
    one, zero = np.ones((), s.graph.dtype(x)), np.zeros((), s.graph.dtype(x))
    vanishes = op.Equal(x, zero)
    entries = op.Where(vanishes, one, x)
    product = op.ReduceProd(entries, s.optional(1), **attributes)
    zeros = op.ReduceSum(op.Where(vanishes, one, zero), s.optional(1), **attributes)
    alone = op.Where(op.Equal(zeros, one), product, zero)
    others = op.Where(op.Equal(zeros, zero), op.Div(product, entries), zero)
    return op.Mul(kept(s, s.m), op.Where(vanishes, alone, others))


def halves(s: Site, tensor: Tensor, length: int, axis: int) -> Sequence[Tensor]:
    """The halves of ``tensor`` along an axis of known length, and an odd last entry."""
    half, odd = divmod(length, 2)
    parts = [half, half, 1][: 2 + odd]
    result: Sequence[Tensor] = s.op.Split(tensor, parts, axis=axis, outputs=len(parts))
    return result


def product_definition(s: Site) -> Sequence[Tensor]:
    """Products of pairs, halving each axis until one entry is left."""
    op, result, axes = s.op, s.x(), reduced_axes(s)
    count = None if axes is None else sizes(s, s.x(), np.array(axes, np.int64))
    if axes is None:
        return [product_by_place(s)]
    if not isinstance(count, np.ndarray):
        return [product_of_any_size(s, axes)]
    if not np.all(count):
        raise Unsupported("a product over an empty axis")
    for axis, length in zip(axes, count.tolist(), strict=True):
        while length > 1:
            left, right, *rest = halves(s, result, length, axis)
            result = op.Concat(op.Mul(left, right), *rest, axis=axis)
            length -= length // 2
    return [op.Squeeze(result, list(axes)) if axes and not s.attr("keepdims") else result]


def product_of_any_size(s: Site, axes: tuple[int, ...]) -> Tensor:
    """The product where sizes are known at run time only: all entries scattered to one."""
    op, rest = s.op, [k for k in range(s.rank(s.x())) if k not in axes]
    last = len(rest)
    rows = op.Reshape(op.Transpose(s.x(), perm=[*rest, *axes]), [*[0] * last, -1])
    ones = op.Expand(
        np.ones(1, s.graph.dtype(rows)), op.Concat(op.Shape(rows, end=last), [1], axis=0)
    )
    first = op.ConstantOfShape(op.Shape(rows), value=np.zeros(1, np.int64))
    product = op.Squeeze(op.ScatterElements(ones, first, rows, axis=last, reduction="mul"), [last])
    return op.Unsqueeze(product, list(axes)) if s.attr("keepdims") else product


def product_by_place(s: Site) -> Tensor:
    """The product where the axes are known at run time only: entries scattered to the output."""
    op, x, flat = s.op, s.x(), [-1]
    like = s.graph.emit(s.node.op, x, s.optional(1), **s.node.attrs)
    numbers = op.Range(np.int64(0), op.Size(like), np.int64(1))
    place = op.Expand(op.Reshape(numbers, op.Shape(unreduced(s))), op.Shape(x))
    ones = op.Expand(np.ones(1, s.graph.dtype(x)), op.Shape(numbers))
    product = op.ScatterElements(
        ones, op.Reshape(place, flat), op.Reshape(x, flat), axis=0, reduction="mul"
    )
    return s.reshape(product, like)


for name, definition in {
    "ReduceSumSquare": lambda s: [total(s, s.op.Pow(s.x(), 2.0))],
    "ReduceL1": lambda s: [total(s, s.op.Abs(s.x()))],
    "ReduceLogSum": lambda s: [s.op.Log(total(s, s.x()))],
}.items():
    add(Composite(op=name, decompose=definition, blocked=DATA_ONLY))
add(Composite(op="ReduceL2", decompose=norm_definition, pull=norm_pull, blocked=DATA_ONLY))
add(Composite(op="ReduceProd", decompose=product_definition, pull=product_pull, blocked=DATA_ONLY))


# -- log-sum-exp: a smooth maximum ---------------------------------------------------------------


def log_sum_exp_pull(s: Site, i: int) -> Tensor:
    """Forward form y = log Σ e^z. Backward returns m · e^(z − y)."""
    return s.op.Mul(kept(s, s.m), s.op.Exp(s.op.Sub(s.x(), kept(s, s.y))))


def log_sum_exp_difference(s: Site, i: int) -> Tensor:
    """Forward form y = log Σ e^z. Backward returns m · w with Σ w · Δz = Δy.

    With one shift for both points, e = e^(z − shift) and s = Σ e: w is the secant of the
    exponential, Δe/Δz, times that of the logarithm, Δy/Δs. The sums of both points cannot
    underflow together, and y itself is computed with a shift of its own.
    """
    op, z, base = s.op, s.x(), ref(s).x()
    axes, tolerance = s.optional(1), s.tolerance(z)
    shift = op.Max(op.ReduceMax(z, axes, keepdims=1), op.ReduceMax(base, axes, keepdims=1))
    e, e_base = op.Exp(op.Sub(z, shift)), op.Exp(op.Sub(base, shift))
    step = op.Sub(z, base)
    rise = op.Where(
        op.Greater(op.Abs(step), tolerance), op.Div(op.Sub(e, e_base), step), s.midpoint(e, e_base)
    )
    sum_here, sum_base = op.ReduceSum(e, axes, keepdims=1), op.ReduceSum(e_base, axes, keepdims=1)
    change, both = op.Sub(sum_here, sum_base), op.Add(sum_here, sum_base)
    far = op.Greater(op.Abs(change), op.Mul(both, tolerance))
    change_y = op.Sub(kept(s, s.y), kept(s, ref(s).y))
    slope = op.Where(far, op.Div(change_y, change), op.Mul(op.Reciprocal(both), 2.0))
    return op.Mul(op.Mul(kept(s, s.m), slope), rise)


add(
    Composite(
        op="ReduceLogSumExp",
        pull=log_sum_exp_pull,
        difference=log_sum_exp_difference,
        decompose=lambda s: [s.op.Log(total(s, s.op.Exp(s.x())))],
        blocked=DATA_ONLY,
        distribution=True,
    )
)
