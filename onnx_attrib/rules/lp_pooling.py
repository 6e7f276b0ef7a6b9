"""Norms over windows, and the inverse of maximum pooling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, add
from onnx_attrib.rules.convolution import padding, scatter, size_vector, with_sizes
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.indexing import SAME_INDICES
from onnx_attrib.rules.pooling import pool_window
from onnx_attrib.rules.shape import DATA_ONLY

# -- y = (Σ |x|^p)^(1/p) ---------------------------------------------------------------------------
# Closed secants: for S(a, b) = Σ_k a^k · b^(p−1−k), k < p, Δ|x|^p = Δ|x| · S(|x|, |x̄|), and so
# Δy = ΔΣ / S(y, ȳ). With x̄ = x these are the derivatives.


def mixed(s: Site, a: Tensor, b: Tensor) -> Tensor:
    """S(a, b)."""
    op, total, power = s.op, None, b
    for _ in range(int(s.attr("p")) - 1):
        total = op.Add(a, b) if total is None else op.Add(op.Mul(total, a), power)
        power = op.Mul(power, b)
    one = np.ones((), s.graph.dtype(a))
    return op.Add(op.Mul(a, 0.0), one) if total is None else total


def norm_share(s: Site, base: Site, spread: Callable[[Site, Tensor], Tensor]) -> Tensor:
    """M / S(y, ȳ), brought by ``spread`` to the data's entries, times S(|x|, |x̄|) · Δ|x| / Δx."""
    op, x, b = s.op, s.x(), base.x()
    both = mixed(s, s.y, base.y)
    # A window of nothing but zeros passes nothing.
    some = op.Greater(both, float(np.finfo(s.graph.dtype(x)).tiny))
    m = spread(s, op.Where(some, op.Div(s.m, both), 0.0))
    if int(s.attr("p")) % 2 == 0:
        return op.Mul(m, mixed(s, x, b))
    size, size_b, sign = op.Abs(x), op.Abs(b), op.Sign(x)
    if base is not s:
        step = op.Sub(x, b)
        rise = op.Div(op.Sub(size, size_b), step)
        sign = op.Where(op.Equal(step, 0.0), sign, rise)
    return op.Mul(op.Mul(m, sign), mixed(s, size, size_b))


def over_windows(s: Site, m: Tensor) -> Tensor:
    """[N, C, out…] added up where each window read, [N, C, …]."""
    window = pool_window(s)
    kernel = s.graph.constant(np.ones((1, 1, *window.kernel), s.graph.dtype(m)))
    alone = with_sizes(s, m, [-1, 1], s.y)
    return s.reshape(scatter(s, alone, kernel, window, 1), s.x())


def everywhere(s: Site, m: Tensor) -> Tensor:
    """[N, C, 1…]: one entry stands for all."""
    return m


def powers(s: Site) -> Tensor:
    """|x|^p."""
    op, p = s.op, int(s.attr("p"))
    size = s.x() if p % 2 == 0 else op.Abs(s.x())
    return size if p == 1 else op.Pow(size, float(p))


def root(s: Site, total: Tensor) -> Tensor:
    """total^(1/p), where a total of zero counts as the smallest number: the root has a slope."""
    op, p, tiny = s.op, int(s.attr("p")), float(np.finfo(s.graph.dtype(total)).tiny)
    return total if p == 1 else op.Pow(op.Max(total, tiny), 1 / p)


def window_sums(s: Site, terms: Tensor) -> Tensor:
    """[N, C, out…]: the sum of ``terms`` [N, C, …] over each window, a convolution by ones."""
    op, window = s.op, pool_window(s)
    alone = with_sizes(s, terms, [-1, 1], s.x())
    if window.begin is None or window.end is None:
        first, last = padding(s, window)
        alone = op.Pad(alone, op.Concat([0, 0], first, [0, 0], last, axis=0))
        pads = [0] * 2 * len(window.kernel)
        room = [0] * len(window.kernel)
    else:
        # Room for a last window that reaches past the data; the output says how many there are.
        room = [stride - 1 if s.attr("ceil_mode") else 0 for stride in window.strides]
        pads = [*window.begin, *(pad + more for pad, more in zip(window.end, room, strict=True))]
    sums = op.Conv(
        alone,
        np.ones((1, 1, *window.kernel), s.graph.dtype(terms)),
        strides=window.strides,
        dilations=window.dilations,
        pads=pads,
    )
    if any(room):
        sums = op.Slice(sums, [0] * len(room), size_vector(s, s.y), window.axes)
    shape = op.Concat(op.Shape(terms, end=2), op.Shape(sums, start=2), axis=0)
    return s.shaped(op.Reshape(sums, shape), s.y)


def global_sum(s: Site, terms: Tensor) -> Tensor:
    """[N, C, 1…]: the sum over all positions."""
    return s.op.ReduceSum(terms, list(range(2, s.rank(terms))), keepdims=1)


def norm(
    name: str,
    total: Callable[[Site, Tensor], Tensor],
    spread: Callable[[Site, Tensor], Tensor],
) -> None:
    """Forward form Y = (Σ |X|^p)^(1/p) over windows of X[N, C, …], or over all positions.

    Backward returns :func:`norm_share`, [N, C, …].
    """
    add(
        Composite(
            op=name,
            pull=lambda s, i: norm_share(s, s, spread),
            difference=lambda s, i: norm_share(s, ref(s), spread),
            decompose=lambda s: [root(s, total(s, powers(s)))],
        )
    )


norm("LpPool", window_sums, over_windows)
norm("GlobalLpPool", global_sum, everywhere)


# -- MaxUnpool -------------------------------------------------------------------------------------


def max_unpool_pull(s: Site, i: int) -> Tensor:
    """Forward form: each entry of X written at its place in zeros Y, counted through all of Y.

    Backward returns M read at the places. Where several entries have the same place, the last one
    was written. The places are data to nobody: what moves them is not attributed.
    """
    op, place = s.op, s.op.Reshape(s.x(1), [-1])
    number = op.Range(np.int64(0), op.Size(s.x()), np.int64(1))
    nobody = op.ConstantOfShape(op.Shape(op.Reshape(s.m, [-1])), value=np.zeros(1, np.int64))
    writer = op.ScatterElements(nobody, place, number, axis=0, reduction="max")
    stays = op.Equal(op.GatherElements(writer, place, axis=0), number)
    read = op.GatherElements(op.Reshape(s.m, [-1]), place, axis=0)
    return s.reshape(op.Where(stays, read, 0.0), s.x())


add(
    Linear(
        op="MaxUnpool", pull=max_unpool_pull, blocked=DATA_ONLY, caveat=SAME_INDICES, flow="moves"
    )
)
