"""Operators defined by others: softmax and the normalisations.

The definitions are numerically careful (a centred variance, a shifted exponential), and every
operator in them conserves differences. Gradients and differences have fused forms where that is
measurably faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, Unsupported, add, gate, only
from onnx_attrib.rules.elementwise import least, logarithmic_mean, ref, unmasked

# -- softmax ---------------------------------------------------------------------------------------


def guarded(s: Site) -> bool:
    """Whether a Where follows, which may replace the NaN of rows whose logits are all −∞."""
    readers = list(s.node.outputs[0].outputs)
    readers += [node for cast in readers if cast.op == "Cast" for node in cast.outputs[0].outputs]
    return any(node.op in ("Where", "IsNaN") for node in readers)


def softmax_pull(s: Site, i: int) -> Tensor:
    """Forward form y = softmax(z) along an axis. Backward returns y · (m − Σ m · y)."""
    op, y = s.op, s.y
    if guarded(s):
        y = op.Where(op.IsNaN(y), 0.0, y)
    weighted = op.Mul(s.m, y)
    total = op.ReduceSum(weighted, [s.attr("axis")], keepdims=1)
    result: Tensor = op.Sub(weighted, op.Mul(y, total))
    return result


def log_softmax_pull(s: Site, i: int) -> Tensor:
    """Forward form y = log softmax(z). Backward returns m − e^y · Σ m."""
    op = s.op
    total = op.ReduceSum(s.m, [s.attr("axis")], keepdims=1)
    result: Tensor = op.Sub(s.m, op.Mul(op.Exp(s.y), total))
    return result


def log_softmax_definition(s: Site) -> Sequence[Tensor]:
    """z − log Σ e^z: never overflows, and never divides by a sum that underflows."""
    op, z = s.op, s.x()
    axes = s.graph.constant([s.attr("axis")], np.int64)
    if guarded(s):
        nothing = op.Equal(op.ReduceMax(z, axes, keepdims=1), -np.inf)
        z = op.Where(nothing, 0.0, z)
    return [op.Sub(z, op.ReduceLogSumExp(z, axes, keepdims=1))]


def softmax_definition(s: Site) -> Sequence[Tensor]:
    return [s.op.Exp(log_softmax_definition(s)[0])]


def softmax_secants(s: Site) -> tuple[Tensor, Tensor]:
    """a = Δp / Δ(log p) for p = softmax(z), and 1 / Σ a along the axis.

    Σ Δp = 0, so that Σ a · Δz = Σ a · Δ(log Σ e^z): the secant of log Σ e^z is a / Σ a. At z = z̄
    both are p. log p is z − max z + log max p, which holds where p is zero for float32.
    """
    op, axes = s.op, s.graph.constant([s.attr("axis")], np.int64)
    logits, probabilities, sums = [], [], []
    for one in (s, ref(s)):
        p = op.Exp(one.y) if s.node.op == "LogSoftmax" else one.y
        if guarded(s):
            p = op.Where(op.IsNaN(p), 0.0, p)
        z = one.x() if finite(s.node.inputs[0]) else unmasked(s, one.x())
        top = op.ReduceMax(z, axes, keepdims=1)
        logits.append(z)
        probabilities.append(p)
        sums.append(op.Sub(top, op.Log(op.Max(op.ReduceMax(p, axes, keepdims=1), least(s, p)))))
    step = op.Sub(op.Sub(*logits), op.Sub(*sums))
    here, there = probabilities
    secant = logarithmic_mean(s, here, there, step)
    total = op.ReduceSum(secant, axes, keepdims=1)
    return secant, op.Reciprocal(op.Max(total, least(s, total)))


_KEEP_FINITE = frozenset("Mul Div Reshape Transpose Identity Cast Squeeze Unsqueeze".split())
_FINITE = frozenset("MatMul Gemm Einsum Conv".split())


def finite(tensor: Tensor) -> bool:
    """Whether a tensor is what a layer gives, at most scaled: no mask has put infinities there."""
    while tensor.inputs and tensor.inputs[0].op in _KEEP_FINITE:
        tensor = tensor.inputs[0].inputs[0]
    return bool(tensor.inputs) and tensor.inputs[0].op in _FINITE


def softmax_difference(s: Site, i: int) -> Tensor:
    """Forward form p = softmax(z). Backward returns a · (m − Σ m · a / Σ a), a = Δp / Δ(log p)."""
    op, m = s.op, s.m
    if guarded(s):
        # What becomes of the NaN is no difference of numbers.
        m = op.Where(op.Or(op.IsNaN(s.y), op.IsNaN(ref(s).y)), 0.0, m)
    secant, inverse = softmax_secants(s)
    weighted = op.Mul(m, secant)
    mean = op.Mul(op.ReduceSum(weighted, [s.attr("axis")], keepdims=1), inverse)
    result: Tensor = op.Sub(weighted, op.Mul(secant, mean))
    return result


def log_softmax_difference(s: Site, i: int) -> Tensor:
    """Forward form y = log softmax(z). Backward returns m − a · Σ m / Σ a, a = Δ(e^y) / Δy."""
    op = s.op
    secant, inverse = softmax_secants(s)
    total = op.Mul(op.ReduceSum(s.m, [s.attr("axis")], keepdims=1), inverse)
    result: Tensor = op.Sub(s.m, op.Mul(secant, total))
    return result


add(
    Composite(
        op="Softmax",
        pull=softmax_pull,
        difference=softmax_difference,
        decompose=softmax_definition,
        distribution=True,
        role=gate,
    )
)
add(
    Composite(
        op="LogSoftmax",
        pull=log_softmax_pull,
        difference=log_softmax_difference,
        decompose=log_softmax_definition,
        distribution=True,
    )
)


# -- normalisations --------------------------------------------------------------------------------


def standardized(s: Site, x: Tensor, axes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / √(variance + ε) over ``axes``, with the mean and the inverse deviation."""
    op = s.op
    mean = op.ReduceMean(x, axes, keepdims=1)
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Pow(centred, np.array(2, s.graph.dtype(x))), axes, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, s.attr("epsilon"))))
    return op.Mul(centred, inverse), mean, inverse


def per_channel(s: Site, parameter: Tensor, rank: int) -> Tensor:
    """[C] as [C, 1, …], to meet a tensor [N, C, …] of that rank."""
    if rank <= 2:
        return parameter
    result: Tensor = s.op.Unsqueeze(parameter, list(range(1, rank - 1)))
    return result


def trailing(s: Site, start: int) -> Tensor:
    """The axes from ``start`` to the last."""
    return s.graph.constant(np.arange(start, s.rank(s.x())), np.int64)


def layer_pull(s: Site, i: int) -> Tensor:
    """Forward form y = x̂ · scale + bias, x̂ = (x − mean) · inverse over the axes from ``axis``.

    Backward returns inverse · (g − mean(g) − x̂ · mean(g · x̂)) with g = m · scale; m · x̂ for the
    scale and m for the bias, before both are summed.
    """
    op, dtype = s.op, s.graph.dtype(s.x())
    if i == 2:
        return s.m
    axes = trailing(s, s.attr("axis") % s.rank(s.x()))
    centred, inverse = layer_centred(s, axes)
    m, scale = (typed(s, t, s.graph.dtype(centred)) for t in (s.m, s.x(1)))
    if i == 1:
        return typed(s, op.Mul(m, op.Mul(centred, inverse)), dtype)
    g = op.Mul(m, scale)
    g = op.Sub(g, op.ReduceMean(g, axes, keepdims=1))
    # The mean of x̂ is zero: so is what the mean of g adds to the second.
    along = op.Mul(op.ReduceMean(op.Mul(g, centred), axes, keepdims=1), op.Mul(inverse, inverse))
    return typed(s, op.Mul(op.Sub(g, op.Mul(centred, along)), inverse), dtype)


def typed(s: Site, tensor: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """The same numbers as another float type, if they are not of it."""
    return tensor if s.graph.dtype(tensor) == dtype else s.op.Cast(tensor, to=dtype)


def layer_difference(s: Site, i: int) -> Tensor | None:
    """Forward form y = c · r · scale + bias, c = x − mean, r = 1 / σ over the axes from ``axis``.

    Backward returns g · (r + r̄)/2 − (c + c̄) · mean((c + c̄) · g) · r · r̄ / (2 (σ + σ̄)), with
    g = m · scale less its mean: c at its midpoint times Δr, which is −Δ(σ²) · r · r̄ / (σ + σ̄), and
    r at its midpoint times Δc.
    """
    op, base, dtype = s.op, ref(s), s.graph.dtype(s.x())
    if s.active != (0,) or s.x(1).name != base.x(1).name:
        return None
    axes = trailing(s, s.attr("axis") % s.rank(s.x()))
    (c, r), (c_base, r_base) = layer_centred(s, axes), layer_centred(base, axes)
    m, scale = (typed(s, t, s.graph.dtype(c)) for t in (s.m, s.x(1)))
    g = op.Mul(m, scale)
    g = op.Sub(g, op.ReduceMean(g, axes, keepdims=1))
    both = op.Add(c, c_base)
    # r · r̄ / (σ + σ̄) = (r · r̄)² / (r + r̄)
    product, total = op.Mul(r, r_base), op.Add(r, r_base)
    bend = op.Mul(op.Div(product, total), op.Mul(product, -0.5))
    along = op.Mul(op.ReduceMean(op.Mul(g, both), axes, keepdims=1), bend)
    share = op.Add(op.Mul(g, op.Mul(total, 0.5)), op.Mul(both, along))
    return typed(s, share, dtype)


def layer_centred(s: Site, axes: Tensor) -> tuple[Tensor, Tensor]:
    """x − mean and the inverse deviation: in float32 for 16 bits too, as the operator has them."""
    op, node, x = s.op, s.node, s.x()
    if s.graph.dtype(x) == np.float64:
        _, mean, inverse = standardized(s, x, axes)
        return op.Sub(x, mean), inverse
    _, mean, inverse = op.LayerNormalization(
        *[t for t in s.inputs if t is not None],
        outputs=3,
        **{name: s.attr(name) for name in node.attrs},
    )
    return op.Sub(typed(s, x, s.graph.dtype(mean)), mean), inverse


def layer_definition(s: Site) -> Sequence[Tensor]:
    op = s.op
    normal, mean, inverse = standardized(s, s.x(), trailing(s, s.attr("axis") % s.rank(s.x())))
    y = op.Mul(normal, s.x(1))
    if s.optional(2) is not None:
        y = op.Add(y, s.x(2))
    return [y, mean, inverse]


def instance_definition(s: Site) -> Sequence[Tensor]:
    rank = s.rank(s.x())
    normal, *_ = standardized(s, s.x(), trailing(s, 2))
    scaled = s.op.Mul(normal, per_channel(s, s.x(1), rank))
    return [s.op.Add(scaled, per_channel(s, s.x(2), rank))]


def group_definition(s: Site) -> Sequence[Tensor]:
    """Each sample's channels in ``num_groups`` groups, standardized together."""
    op, rank = s.op, s.rank(s.x())
    grouped = op.Reshape(s.x(), [0, s.attr("num_groups"), -1])
    normal, *_ = standardized(s, grouped, s.graph.constant([2], np.int64))
    normal = s.reshape(normal, s.x())
    scaled = op.Mul(normal, per_channel(s, s.x(1), rank))
    return [op.Add(scaled, per_channel(s, s.x(2), rank))]


def mean_variance_definition(s: Site) -> Sequence[Tensor]:
    op, axes = s.op, s.graph.constant(s.attr("axes"), np.int64)
    centred = op.Sub(s.x(), op.ReduceMean(s.x(), axes, keepdims=1))
    square = op.Pow(centred, np.array(2, s.graph.dtype(s.x())))
    deviation = op.Sqrt(op.ReduceMean(square, axes, keepdims=1))
    # The operator's own definition adds 1e-9 to the deviation.
    return [op.Mul(centred, op.Reciprocal(op.Add(deviation, 1e-9)))]


add(
    Composite(
        op="LayerNormalization",
        pull=layer_pull,
        difference=layer_difference,
        decompose=layer_definition,
        broadcasts=True,
        normalizes=True,
    )
)
add(Composite(op="InstanceNormalization", decompose=instance_definition, normalizes=True))
add(Composite(op="GroupNormalization", decompose=group_definition, normalizes=True))
add(Composite(op="MeanVarianceNormalization", decompose=mean_variance_definition, normalizes=True))


def inverse_norm(s: Site) -> tuple[Tensor, Tensor]:
    """‖x‖ along the axis, and 1 / ‖x‖, which counts as one where the norm is zero."""
    op, reduce = s.op, s.op.ReduceL1 if s.attr("p") == 1 else s.op.ReduceL2
    norm = reduce(s.x(), [s.attr("axis")], keepdims=1)
    return norm, op.Reciprocal(op.Where(op.Equal(norm, 0.0), 1.0, norm))


def norm_definition(s: Site) -> Sequence[Tensor]:
    """x / ‖x‖ along an axis, and zero where the norm is."""
    return [s.op.Mul(s.x(), inverse_norm(s)[1])]


def norm_difference(s: Site, i: int) -> Tensor:
    """Forward form y = x · r, r = 1 / ‖x‖ or one. Backward returns m · y's secant in x.

    That is r and x at their midpoints, with Δr/Δ‖x‖ · Δ‖x‖/Δx for r: the last factor is
    (x + x̄) / (‖x‖ + ‖x̄‖), or (x + x̄) / (|x| + |x̄|) for p = 1.
    """
    op, x, base = s.op, s.x(), ref(s).x()
    (norm, r), (norm_base, r_base) = inverse_norm(s), inverse_norm(ref(s))
    step, both = op.Sub(norm, norm_base), op.Add(x, base)
    rise = op.Where(op.Equal(step, 0.0), op.Neg(op.Mul(r, r_base)), op.Div(op.Sub(r, r_base), step))
    size = op.Add(op.Abs(x), op.Abs(base)) if s.attr("p") == 1 else op.Add(norm, norm_base)
    growth = op.Div(both, op.Where(op.Equal(size, 0.0), 1.0, size))
    through = op.ReduceSum(op.Mul(s.m, op.Mul(both, 0.5)), [s.attr("axis")], keepdims=1)
    direct = op.Mul(s.m, s.midpoint(r, r_base))
    result: Tensor = op.Add(direct, op.Mul(op.Mul(through, rise), growth))
    return result


add(
    Composite(
        op="LpNormalization",
        difference=norm_difference,
        decompose=norm_definition,
        normalizes=True,
    )
)


def batch_factor(s: Site) -> Tensor:
    """scale / √(variance + ε), per channel; ONNX Runtime folds it at load time."""
    op = s.op
    if s.attr("training_mode"):
        raise Unsupported("training_mode=1: its output depends on the other samples of the batch")
    return op.Div(s.x(1), op.Sqrt(op.Add(s.x(4), s.attr("epsilon"))))


def batch_pull(s: Site, i: int) -> Tensor:
    """Forward form y = (x − mean) · scale / √(variance + ε) + bias. Backward scales m alike."""
    return s.op.Mul(s.m, per_channel(s, batch_factor(s), s.rank(s.x())))


def batch_definition(s: Site) -> Sequence[Tensor]:
    op, rank = s.op, s.rank(s.x())
    factor, bias, mean = (per_channel(s, t, rank) for t in (batch_factor(s), s.x(2), s.x(3)))
    return [op.Add(op.Mul(op.Sub(s.x(), mean), factor), bias)]


add(Linear(op="BatchNormalization", pull=batch_pull, covers=only(0), flow="scales"))
add(Composite(op="BatchNormalization", decompose=batch_definition))


def local_response_definition(s: Site) -> Sequence[Tensor]:
    """x · (bias + α · mean of x² over ``size`` neighbouring channels, zero-padded)^(−β)."""
    op, size, x = s.op, s.attr("size"), s.x()
    dtype = s.graph.dtype(x)
    before, after = (size - 1) // 2, size // 2
    square = op.Unsqueeze(op.Reshape(op.Pow(x, np.array(2, dtype)), [0, 0, -1]), [1])
    around = op.AveragePool(
        square, kernel_shape=[size, 1], pads=[before, 0, after, 0], count_include_pad=1
    )
    energy = s.reshape(op.Squeeze(around, [1]), x)
    scale = op.Add(op.Mul(energy, s.attr("alpha")), s.attr("bias"))
    return [op.Mul(x, op.Pow(scale, np.array(-s.attr("beta"), dtype)))]


add(Composite(op="LRN", decompose=local_response_definition))
