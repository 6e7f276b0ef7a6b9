"""Operators defined by others: softmax and the normalisations.

The definitions are numerically careful (a centred variance, a shifted exponential) and are used
for differences, where every operator in them conserves. Gradients have fused forms where that is
measurably faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, Unsupported, add, only

# -- softmax ---------------------------------------------------------------------------------------


def softmax_pull(s: Site, i: int) -> Tensor:
    """Forward form y = softmax(z) along an axis. Backward returns y · (m − Σ m · y)."""
    op, weighted = s.op, s.op.Mul(s.m, s.y)
    total = op.ReduceSum(weighted, [s.attr("axis")], keepdims=1)
    result: Tensor = op.Sub(weighted, op.Mul(s.y, total))
    return result


def log_softmax_pull(s: Site, i: int) -> Tensor:
    """Forward form y = log softmax(z). Backward returns m − e^y · Σ m."""
    op = s.op
    total = op.ReduceSum(s.m, [s.attr("axis")], keepdims=1)
    result: Tensor = op.Sub(s.m, op.Mul(op.Exp(s.y), total))
    return result


def log_softmax_definition(s: Site) -> Sequence[Tensor]:
    """z − log Σ e^z: never overflows, and never divides by a sum that underflows."""
    axes = s.graph.constant([s.attr("axis")], np.int64)
    return [s.op.Sub(s.x(), s.op.ReduceLogSumExp(s.x(), axes, keepdims=1))]


def softmax_definition(s: Site) -> Sequence[Tensor]:
    return [s.op.Exp(log_softmax_definition(s)[0])]


add(Composite(op="Softmax", pull=softmax_pull, decompose=softmax_definition, distribution=True))
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
    op, node = s.op, s.node
    if i == 2:
        return s.m
    _, mean, inverse = op.LayerNormalization(
        *[t for t in s.inputs if t is not None],
        outputs=3,
        **{name: s.attr(name) for name in node.attrs},
    )
    normal = op.Mul(op.Sub(s.x(), mean), inverse)
    if i == 1:
        return op.Mul(s.m, normal)
    axes = trailing(s, s.attr("axis") % s.rank(s.x()))
    g = op.Mul(s.m, s.x(1))
    centred = op.Sub(g, op.ReduceMean(g, axes, keepdims=1))
    along = op.Mul(normal, op.ReduceMean(op.Mul(g, normal), axes, keepdims=1))
    return op.Mul(op.Sub(centred, along), inverse)


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
    Composite(op="LayerNormalization", pull=layer_pull, decompose=layer_definition, broadcasts=True)
)
add(Composite(op="InstanceNormalization", decompose=instance_definition))
add(Composite(op="GroupNormalization", decompose=group_definition))
add(Composite(op="MeanVarianceNormalization", decompose=mean_variance_definition))


def norm_definition(s: Site) -> Sequence[Tensor]:
    """x / ‖x‖ along an axis, and zero where the norm is."""
    op, axis = s.op, [s.attr("axis")]
    norm = (op.ReduceL1 if s.attr("p") == 1 else op.ReduceL2)(s.x(), axis, keepdims=1)
    safe = op.Where(op.Equal(norm, 0.0), 1.0, norm)
    return [op.Mul(s.x(), op.Reciprocal(safe))]


add(Composite(op="LpNormalization", decompose=norm_definition))


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


add(Linear(op="BatchNormalization", pull=batch_pull, covers=only(0)))
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
