"""Operators defined by others: softmax and the normalisations.

The definitions are numerically careful (a centred variance, a shifted exponential) and are used
for differences, where every operator in them conserves. Gradients have fused forms where that is
measurably faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, Unsupported, add, gate, only
from onnx_attrib.rules.elementwise import ref

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


add(
    Composite(
        op="Softmax",
        pull=softmax_pull,
        decompose=softmax_definition,
        distribution=True,
        role=gate,
    )
)
add(
    Composite(
        op="LogSoftmax",
        pull=log_softmax_pull,
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
    normal, inverse = layer_statistics(s, axes)
    m, scale = (typed(s, t, s.graph.dtype(normal)) for t in (s.m, s.x(1)))
    if i == 1:
        return typed(s, op.Mul(m, normal), dtype)
    g = op.Mul(m, scale)
    centred = op.Sub(g, op.ReduceMean(g, axes, keepdims=1))
    # The mean of x̂ is zero: so is what the mean of g adds to the second.
    along = op.Mul(normal, op.ReduceMean(op.Mul(centred, normal), axes, keepdims=1))
    return typed(s, op.Mul(op.Sub(centred, along), inverse), dtype)


def typed(s: Site, tensor: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """The same numbers as another float type, if they are not of it."""
    return tensor if s.graph.dtype(tensor) == dtype else s.op.Cast(tensor, to=dtype)


def layer_statistics(s: Site, axes: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ and the inverse deviation: in float32 for 16 bits too, which the operator gives them in."""
    op, node, x = s.op, s.node, s.x()
    if s.graph.dtype(x) == np.float64:
        normal, _, inverse = standardized(s, x, axes)
        return normal, inverse
    _, mean, inverse = op.LayerNormalization(
        *[t for t in s.inputs if t is not None],
        outputs=3,
        **{name: s.attr(name) for name in node.attrs},
    )
    return op.Mul(op.Sub(typed(s, x, s.graph.dtype(mean)), mean), inverse), inverse


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
