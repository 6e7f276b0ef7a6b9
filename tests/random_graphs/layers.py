"""Layers: products, windows, normalisations, recurrence and attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .builder import Builder, Refused, recipe

# -- products --------------------------------------------------------------------------------------


@recipe()
def matmul_weight(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    width = b.shape(x)[-1]
    if b.chance(15):
        return str(b.emit("MatMul", x, b.constant(b.array(width))))
    if b.chance(20) and b.rank(x) >= 2 + int(b.batch):
        rows = b.constant(b.array(b.choose(1, 4), b.shape(x)[-2], scale=0.6))
        return str(b.emit("MatMul", rows, x))
    dims = [width, b.choose(1, 5)]
    if b.chance(15) and b.rank(x) > 2:
        dims = [b.pick([1, b.shape(x)[-3]]) if not b.batch or b.rank(x) > 3 else 1, *dims]
    weight = b.constant(b.array(*dims, scale=1 / math.sqrt(width)))
    return str(b.emit("MatMul", x, weight))


@recipe()
def matmul_pair(b: Builder) -> str:
    """Two variables; the second turned where that makes them fit."""
    x = b.tensor(fits=lambda v: v.ndim >= 1 + 2 * int(b.batch))
    width = b.shape(x)[-1]
    lead = b.shape(x)[:1] if b.batch else ()
    for y in b.pool[::-1]:
        shape = b.shape(y)
        if b.batch and (len(shape) != b.rank(x) or shape[:1] != lead):
            continue
        if not shape or (b.chance(30) and y != x):
            continue
        if shape[-1] == width and len(shape) >= 2:
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            try:
                turned = b.emit("Transpose", y, perm=order)
                return str(b.emit("MatMul", x, turned))
            except Refused:
                continue
        if (len(shape) == 1 or shape[-2] == width) and not b.leads:
            try:
                return str(b.emit("MatMul", x, y))
            except Refused:
                continue
    raise Refused


@recipe()
def gemm(b: Builder) -> str:
    x = b.tensor(2)
    turned = b.chance(30) and not b.batch
    width, rows = b.shape(x)[::-1] if not turned else b.shape(x)
    out = b.choose(1, 5)
    flip = b.chance(40)
    others = [n for n in b.pool if b.rank(n) == 2 and b.shape(n)[int(flip)] == width]
    if others and not b.leads and b.chance(40):
        weight = b.pick(others)
        out = b.shape(weight)[int(not flip)]
    else:
        weight = b.constant(b.array(*((out, width) if flip else (width, out)), scale=0.6))
    attributes: dict[str, Any] = {"transA": int(turned), "transB": int(flip)}
    if b.chance(30):
        attributes |= {"alpha": 0.7, "beta": 1.3}
    if b.opset >= 11 and b.chance(30):
        return str(b.emit("Gemm", x, weight, **attributes))
    shapes = [(out,), (1, out), (1,), (1, 1)] + ([] if b.leads else [(rows, 1), (rows, out), ()])
    wanted = b.pick(shapes)
    biases = [n for n in b.pool if b.shape(n) == wanted] if not b.batch else []
    bias = b.pick(biases) if biases and b.chance(40) else b.constant(b.array(*wanted))
    return str(b.emit("Gemm", x, weight, bias, **attributes))


@recipe(12)
def einsum(b: Builder) -> str:
    if b.batch:
        x = b.tensor(3)
        equation = b.pick(["bij,bkj->bik", "bij,bij->bi", "bij,bij->bji", "bij,bkj->bkij"])
        return str(b.emit("Einsum", x, x, equation=equation))
    x = b.tensor(2)
    equation = b.pick(["ij,ij->i", "ij,kj->ik", "ij,ij->", "ij,kj->", "ij,kl->jl", "ij,ij->ji"])
    return str(b.emit("Einsum", x, x, equation=equation))


# -- windows ---------------------------------------------------------------------------------------


def windows(b: Builder, x: str) -> tuple[list[int], dict[str, Any]]:
    """A kernel and how it slides."""
    sizes = b.shape(x)[2:]
    kernel = [b.choose(1, min(3, size)) for size in sizes]
    attributes: dict[str, Any] = {}
    if b.chance(40):
        attributes["strides"] = [b.choose(1, 3) for _ in sizes]
    mode = b.pick(["", "", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if mode == "pads":
        attributes["pads"] = [b.choose(0, k - 1) for k in kernel * 2]
    elif mode:
        attributes["auto_pad"] = mode
    return kernel, attributes


def dilated(b: Builder, x: str, kernel: list[int], attributes: dict[str, Any]) -> None:
    if b.chance(25) and not attributes.get("auto_pad", "").startswith("SAME"):
        attributes["dilations"] = [
            b.choose(1, 2) if 2 * (k - 1) < size else 1
            for k, size in zip(kernel, b.shape(x)[2:], strict=True)
        ]


@recipe()
def convolution(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    dilated(b, x, kernel, attributes)
    channels = b.shape(x)[1]
    groups = b.pick([1, 1, *[g for g in range(2, channels + 1) if channels % g == 0]])
    out = groups * b.choose(1, 2)
    weight = b.constant(b.array(out, channels // groups, *kernel, scale=0.5))
    bias = b.constant(b.array(out)) if b.chance(60) else ""
    if groups > 1 or b.chance(50):
        attributes["group"] = groups
    if b.chance(50):
        attributes["kernel_shape"] = kernel
    return str(b.emit("Conv", x, weight, bias, **attributes))


@recipe()
def transposed_convolution(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    if attributes.get("auto_pad", "").startswith("SAME"):
        # Where a stride is beyond the kernel, runtimes disagree.
        attributes.pop("strides", None)
    channels = b.shape(x)[1]
    groups = b.pick([1, 1, *[g for g in range(2, channels + 1) if channels % g == 0]])
    weight = b.constant(b.array(channels, b.choose(1, 2), *kernel, scale=0.5))
    bias = b.constant(b.array(b.values[weight].shape[1] * groups)) if b.chance(50) else ""
    strides = attributes.get("strides")
    if strides and "auto_pad" not in attributes and b.chance(40):
        attributes["output_padding"] = [b.choose(0, s - 1) for s in strides]
    elif b.chance(20):
        steps = strides or [1] * len(kernel)
        attributes["output_shape"] = [
            n * stride + b.choose(0, 2) for n, stride in zip(b.shape(x)[2:], steps, strict=True)
        ]
    return str(b.emit("ConvTranspose", x, weight, bias, group=groups, **attributes))


@recipe()
def pool(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    op = b.pick(["MaxPool", "AveragePool"])
    if op == "AveragePool" and attributes.get("auto_pad", "").startswith("SAME"):
        attributes.pop("strides", None)
    if b.opset >= 10 and attributes.get("auto_pad") is None and b.chance(30):
        attributes["ceil_mode"] = 1
    if op == "AveragePool" and b.chance(40):
        attributes["count_include_pad"] = 1
    if (op == "MaxPool" and b.opset >= 10) or b.opset >= 19:
        dilated(b, x, kernel, attributes)
    return str(b.emit(op, x, kernel_shape=kernel, **attributes))


@recipe()
def global_pool(b: Builder) -> str:
    return str(b.emit(b.pick(["GlobalAveragePool", "GlobalMaxPool"]), b.tensor(3, 4)))


@recipe()
def lp_pool(b: Builder) -> str:
    x = b.positive(b.tensor(3, 4))
    if b.chance(50):
        return str(b.emit("GlobalLpPool", x, p=b.pick([2, 1, 3])))
    kernel, attributes = windows(b, x)
    if b.opset >= 18:
        dilated(b, x, kernel, attributes)
        if attributes.get("auto_pad") is None and b.chance(30):
            attributes["ceil_mode"] = 1
    return str(b.emit("LpPool", x, kernel_shape=kernel, p=b.pick([2, 1, 3]), **attributes))


@recipe(18)
def crop_and_pad(b: Builder) -> str:
    # Of all axes: given only some, onnxruntime 1.31 fails where a Transpose is moved past it.
    if b.leads:
        raise Refused
    x = b.tensor(fits=lambda v: v.ndim > 0)
    return str(b.emit("CenterCropPad", x, b.ints(*[b.choose(1, d + 2) for d in b.shape(x)])))


@recipe(11)
def resize(b: Builder) -> str:
    x = b.tensor(3, 4)
    mode = b.pick(["nearest", "linear", "nearest"])
    attributes: dict[str, Any] = {"mode": mode}
    if b.chance(60):
        attributes["coordinate_transformation_mode"] = b.pick(
            ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
        )
    if mode == "nearest" and b.chance(40):
        attributes["nearest_mode"] = b.pick(["floor", "ceil", "round_prefer_floor"])
    scales = [1.0, 1.0, *[b.pick([2.0, 1.0, 1.5, 0.5]) for _ in b.shape(x)[2:]]]
    roi = b.constant([], np.float32) if b.opset < 13 else ""
    return str(b.emit("Resize", x, roi, b.constant(scales, np.float32), **attributes))


# -- normalisations --------------------------------------------------------------------------------


@recipe()
def softmax(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    op = b.pick(["Softmax", "LogSoftmax"])
    return str(b.emit(op, x, axis=b.signed(b.axis(x), b.rank(x))))


@recipe()
def spelled_softmax(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axes = [b.axis(x)]
    shifted = x
    if b.chance(60):
        top = b.setting(18, "ReduceMax", x, axes=axes, keepdims=1)
        shifted = b.emit("Sub", x, top)
    power_ = b.emit("Exp", shifted)
    total = b.setting(13, "ReduceSum", power_, axes=axes, keepdims=1)
    return str(b.emit("Div", power_, total))


@recipe()
def batch_normalization(b: Builder) -> str:
    x = b.tensor(2, 3, 4)
    channels = b.shape(x)[1]
    scale, bias, mean = (b.constant(b.array(channels)) for _ in range(3))
    variance = b.constant(np.abs(b.array(channels)) + 0.5)
    return str(b.emit("BatchNormalization", x, scale, bias, mean, variance, epsilon=1e-3))


@recipe()
def instance_normalization(b: Builder) -> str:
    x = b.tensor(3, 4, fits=lambda v: math.prod(v.shape[2:]) > 2)
    channels = b.shape(x)[1]
    scale, bias = b.constant(b.array(channels)), b.constant(b.array(channels))
    return str(b.emit("InstanceNormalization", x, scale, bias, epsilon=0.05))


@recipe(17)
def layer_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axis = b.pick(b.free(x)[::-1])
    dims = b.shape(x)[axis:]
    scale = b.constant(b.array(*dims))
    bias = b.constant(b.array(*dims)) if b.chance(60) else ""
    return str(
        b.emit("LayerNormalization", x, scale, bias, axis=b.signed(axis, b.rank(x)), epsilon=0.05)
    )


@recipe(23)
def rms_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axis = b.pick(b.free(x)[::-1])
    scale = b.constant(b.array(*b.shape(x)[axis:]))
    return str(b.emit("RMSNormalization", x, scale, axis=axis, epsilon=0.05))


@recipe(21)
def group_normalization(b: Builder) -> str:
    x = b.tensor(3, 4, fits=lambda v: math.prod(v.shape[2:]) > 2)
    channels = b.shape(x)[1]
    groups = b.pick([g for g in range(1, channels + 1) if channels % g == 0])
    scale, bias = b.constant(b.array(channels)), b.constant(b.array(channels))
    return str(b.emit("GroupNormalization", x, scale, bias, num_groups=groups, epsilon=0.05))


@recipe()
def lp_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    shifted = b.positive(x)
    return str(b.emit("LpNormalization", shifted, axis=b.axis(shifted, 2), p=b.pick([2, 1])))


@recipe()
def local_response(b: Builder) -> str:
    x = b.tensor(3, 4)
    return str(b.emit("LRN", x, size=b.pick([1, 3, 2]), alpha=0.3, beta=0.6, bias=1.2))


@recipe()
def spelled_layer_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axes = [b.rank(x) - 1]
    centred = b.emit("Sub", x, b.setting(18, "ReduceMean", x, axes=axes))
    squared = ("Mul", centred) if b.chance(50) else ("Pow", b.number(2.0))
    square = b.emit(squared[0], centred, squared[1])
    variance = b.setting(18, "ReduceMean", square, axes=axes)
    root = b.emit("Sqrt", b.emit("Add", variance, b.number(0.05)))
    return str(b.emit("Div", centred, root))


@recipe(9)
def mean_variance_normalization(b: Builder) -> str:
    # Its definition adds a float32.
    x = b.tensor(4, fits=lambda v: math.prod(v.shape[2:]) > 2 and v.dtype == np.float32)
    axes = [2, 3] if b.batch or b.chance(50) else [0, 2, 3]
    return str(b.emit("MeanVarianceNormalization", x, axes=axes))


# -- recurrence and attention ----------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@recipe()
def recurrence(b: Builder) -> str:
    x = b.tensor(3)
    if b.batch:
        x = b.emit("Transpose", x, perm=[1, 0, 2])
    op, hidden = b.pick(list(GATES)), b.choose(1, 3)
    directions = b.choose(1, 2)
    rows = GATES[op] * hidden
    weight = b.constant(b.array(directions, rows, b.shape(x)[2], scale=0.6))
    again = b.constant(b.array(directions, rows, hidden, scale=0.6))
    bias = b.constant(b.array(directions, 2 * rows, scale=0.3)) if b.chance(50) else ""
    attributes: dict[str, Any] = {"hidden_size": hidden}
    attributes["direction"] = b.pick(["forward", "reverse"]) if directions == 1 else "bidirectional"
    if op == "GRU" and b.chance(50):
        attributes["linear_before_reset"] = 1
    steps, last = b.emit(op, x, weight, again, bias, outputs=2, **attributes)[:2]
    if not b.batch:
        return str(b.pick([steps, last]))
    return str(b.emit("Transpose", steps, perm=[2, 0, 1, 3]))


@recipe(23)
def attention(b: Builder) -> str:
    x = b.tensor(4, fits=lambda v: v.shape[3] > 1)
    others = [n for n in b.pool if b.shape(n) == b.shape(x)]
    keys, values = b.pick(others), b.pick(others)
    more = {"is_causal": 1} if b.chance(30) else {}
    return str(b.emit("Attention", x, keys, values, **more))
