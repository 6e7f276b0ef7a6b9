"""Functions of single entries, and arithmetic between tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from .builder import Builder, Refused, element, recipe

PLAIN = {
    7: "Relu Sigmoid Tanh Softplus Softsign Abs Neg Sin Cos Atan Identity LeakyRelu Elu Selu "
    "HardSigmoid",
    9: "Erf Sinh Cosh Asinh",
    14: "HardSwish",
    18: "Mish",
    24: "Swish",
}


@recipe()
def activation(b: Builder) -> str:
    names = " ".join(ops for since, ops in PLAIN.items() if b.opset >= since).split()
    op = b.pick(names)
    attributes: dict[str, Any] = {}
    if op in ("LeakyRelu", "Elu") and b.chance(50):
        attributes = {"alpha": 0.3}
    if op == "HardSigmoid" and b.chance(50):
        attributes = {"alpha": 0.4, "beta": 0.3}
    return str(b.emit(op, b.tensor(), **attributes))


@recipe()
def limited(b: Builder) -> str:
    """Functions of a bounded argument."""
    names = ["Tan", "Asin", "Acos", "Exp"] + (["Atanh"] if b.opset >= 9 else [])
    return str(b.emit(b.pick(names), b.bounded(b.tensor())))


@recipe()
def of_positive(b: Builder) -> str:
    x = b.positive(b.tensor())
    op = b.pick(["Log", "Sqrt", "Reciprocal", "Pow", "Acosh"])
    if op == "Acosh":
        if b.opset < 9:
            raise Refused
        return str(b.emit("Acosh", b.emit("Add", x, b.number(1.2))))
    if op == "Pow":
        return str(b.emit("Pow", x, b.number(b.pick([0.5, -1.0, 1.5, -0.5, 1.0, 0.0]))))
    return str(b.emit(op, x))


@recipe()
def power(b: Builder) -> str:
    x = b.tensor()
    if b.chance(50):
        return str(b.emit("Pow", b.positive(x), b.operand(x, constant=30)))
    exponent = b.pick([2.0, 3.0, 1.0, 4.0])
    if b.opset >= 12 and b.chance(30):
        return str(b.emit("Pow", x, b.constant(exponent, np.int64)))
    return str(b.emit("Pow", x, b.number(exponent)))


@recipe()
def clip(b: Builder) -> str:
    x = b.tensor()
    if b.opset < 11:
        return str(b.emit("Clip", x, min=-0.7, max=0.8))
    low, high = b.constant(-0.7), b.constant(0.8)
    low, high = b.pick([(low, high), ("", high), (low, "")])
    return str(b.emit("Clip", x, low, high))


@recipe(9)
def shrink(b: Builder) -> str:
    return str(b.emit("Shrink", b.tensor(), lambd=0.3, bias=b.pick([0.0, 0.1])))


@recipe(10)
def thresholded(b: Builder) -> str:
    return str(b.emit("ThresholdedRelu", b.tensor(), alpha=0.2))


@recipe(12)
def celu(b: Builder) -> str:
    return str(b.emit("Celu", b.tensor(), alpha=b.pick([1.0, 0.6])))


@recipe(20)
def gelu(b: Builder) -> str:
    return str(b.emit("Gelu", b.tensor(), approximate=b.pick(["none", "tanh"])))


@recipe()
def prelu(b: Builder) -> str:
    x = b.tensor()
    slopes = [n for n in b.pool if b.shape(n) == b.shape(x)]
    if slopes and b.chance(30):
        return str(b.emit("PRelu", x, b.pick(slopes)))
    dims = [d if b.chance(50) else 1 for d in b.shape(x)[int(b.batch) :]]
    return str(b.emit("PRelu", x, b.constant(np.abs(b.array(*dims)))))


@recipe()
def gate(b: Builder) -> str:
    """x · f(x): an activation spelled out."""
    x = b.tensor()
    y = b.emit(b.pick(["Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softplus"]), x)
    return str(b.emit("Mul", *([x, y] if b.chance(50) else [y, x])))


@recipe(9)
def piecewise(b: Builder) -> str:
    """A choice by the sign of the argument: one nonlinearity of it."""
    x = b.tensor()
    positive = b.emit("Greater", x, b.constant(0.0))
    other = b.emit(b.pick(["Tanh", "Neg", "Softsign"]), x)
    return str(b.emit("Where", positive, x, other))


@recipe()
def cast(b: Builder) -> str:
    """There and back, by way of a wider type."""
    x = b.tensor()
    if b.dtype == "float64":
        raise Refused
    via = TensorProto.DOUBLE if b.dtype == "float32" else TensorProto.FLOAT
    home = element(b.values[x])
    return str(b.emit("Cast", b.emit("Cast", x, to=via), to=home))


@recipe()
def dropout(b: Builder) -> str:
    x = b.tensor()
    if b.opset < 12:
        return str(b.emit("Dropout", x, ratio=0.3))
    return str(b.emit("Dropout", x, b.constant(0.3, np.float32)))


@recipe(10)
def remainder(b: Builder) -> str:
    if b.dtype == "float16":
        # In few digits it is rounding that decides how often the divisor fits.
        raise Refused
    return str(b.emit("Mod", b.tensor(), b.number(0.7), fmod=1))


@recipe()
def binary(b: Builder) -> str:
    x = b.tensor()
    pair = [x, b.operand(x)]
    op = b.pick(["Add", "Mul", "Sub", "Div"])
    if op == "Div":
        # The divisor is away from zero.
        pair[1] = b.positive(pair[1])
    elif b.chance(30):
        pair.reverse()
    return str(b.emit(op, *pair))


@recipe()
def quotient(b: Builder) -> str:
    """A constant over a positive map."""
    x = b.tensor()
    top = b.number(0.8)
    return str(b.emit("Div", top, b.positive(x)))


@recipe(8)
def variadic(b: Builder) -> str:
    x = b.tensor()
    count = b.choose(1, 4)
    names = [x, *[b.operand(x, constant=25) for _ in range(count - 1)]]
    return str(b.emit(b.pick(["Max", "Min", "Sum", "Mean"]), *names))


@recipe()
def difference(b: Builder) -> str:
    """A tensor against a constant of its own, by Max or Min."""
    x = b.tensor()
    bound = b.number(0.1) if b.opset >= 8 else b.constant(np.full(b.shape(x), 0.1))
    if b.opset < 8 and b.batch:
        raise Refused
    pair = [x, bound] if b.chance(60) else [bound, x]
    return str(b.emit(b.pick(["Max", "Min"]), *pair))


@recipe(9)
def where(b: Builder) -> str:
    x = b.tensor()
    y = b.operand(x)
    dims = [1, *b.shape(x)[1:]] if b.batch else list(b.shape(x))
    dims = dims[b.choose(0, len(dims)) :]
    mask = b.constant(b.rng.random(dims) < 0.5, np.bool_)
    return str(b.emit("Where", mask, *([x, y] if b.chance(70) else [y, x])))
