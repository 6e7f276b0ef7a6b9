"""Models of many nodes: blocks of the architectures in use, as narrow as they can be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray


class Builder:
    """Adds nodes and weights one by one."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[bytes, TensorProto] = {}
        self.rng = np.random.default_rng(0)

    def op(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], f"n{name}", **attributes))
        return name

    def fixed(self, value: Array) -> str:
        key = value.tobytes() + str(value.dtype).encode()
        name = f"w{len(self.weights)}"
        held = self.weights.setdefault(key, numpy_helper.from_array(value, name))
        return str(held.name)

    def drawn(self, *shape: int) -> str:
        return self.fixed((self.rng.standard_normal(shape) / 4).astype(np.float32))

    def conv(self, x: str, outputs: int, inputs: int, size: int) -> str:
        weight = self.drawn(outputs, inputs, size, size)
        return self.op("Conv", x, weight, pads=[size // 2] * 4)

    def norm(self, x: str, channels: int) -> str:
        scale, shift, mean = (self.drawn(channels) for _ in range(3))
        variance = self.fixed(self.rng.random(channels).astype(np.float32) + 1)
        return self.op("BatchNormalization", x, scale, shift, mean, variance)

    def pooled(self, x: str) -> str:
        return self.op("Flatten", self.op("GlobalAveragePool", x))

    def model(self, shape: list[str | int], classes: int) -> ModelProto:
        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            "long",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
            list(self.weights.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def residual(count: int) -> ModelProto:
    """x + BN(Conv(relu(BN(Conv x)))), over and over."""
    b = Builder()
    x = b.conv("x", 8, 3, 3)
    while len(b.nodes) < count - 8:
        y = b.op("Relu", b.norm(b.conv(x, 8, 8, 3), 8))
        x = b.op("Relu", b.op("Add", x, b.norm(b.conv(y, 8, 8, 3), 8)))
    b.pooled(x)
    return b.model(["N", 3, 8, 8], 8)


def wide(count: int) -> ModelProto:
    """Forty branches that are joined, over and over."""
    b, x, channels = Builder(), "x", 3
    while len(b.nodes) < count - 100:
        branches = []
        for _ in range(40):
            y = b.op("Relu", b.conv(x, 2, channels, 1))
            branches.append(b.op("Relu", b.conv(y, 2, 2, 3)))
        x, channels = b.op("Relu", b.conv(b.op("Concat", *branches, axis=1), 8, 80, 1)), 8
    b.pooled(x)
    return b.model(["N", 3, 6, 6], 8)


def dense(count: int) -> ModelProto:
    """Every layer reads all layers of its block of 32."""
    b = Builder()
    layers = [b.conv("x", 4, 3, 1)]
    while len(b.nodes) < count - 5:
        joined = b.op("Concat", *layers, axis=1)
        layers.append(b.op("Relu", b.conv(joined, 4, 4 * len(layers), 1)))
        if len(layers) > 32:
            layers = [b.conv(b.op("Concat", *layers, axis=1), 4, 4 * len(layers), 1)]
    b.pooled(layers[-1])
    return b.model(["N", 3, 4, 4], 4)


def transformer(count: int) -> ModelProto:
    """Attention, LayerNorm and GELU in primitives, as exporters spell them."""
    b, x, width = Builder(), "x", 8

    def number(value: float) -> str:
        return b.fixed(np.array(value, np.float32))

    def mapped(z: str, inputs: int, outputs: int) -> str:
        return b.op("Add", b.op("MatMul", z, b.drawn(inputs, outputs)), b.drawn(outputs))

    def normalized(z: str) -> str:
        d = b.op("Sub", z, b.op("ReduceMean", z, axes=[-1]))
        variance = b.op("ReduceMean", b.op("Pow", d, number(2)), axes=[-1])
        scaled = b.op("Div", d, b.op("Sqrt", b.op("Add", variance, number(1e-5))))
        return b.op("Add", b.op("Mul", scaled, b.drawn(width)), b.drawn(width))

    def heads(z: str) -> str:
        split = b.op("Reshape", mapped(z, width, width), b.fixed(np.array([0, 0, 2, 4])))
        return b.op("Transpose", split, perm=[0, 2, 1, 3])

    while len(b.nodes) < count - 60:
        z = normalized(x)
        q, k, v = (heads(z) for _ in range(3))
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = b.op("Softmax", b.op("Mul", scores, number(0.5)), axis=-1)
        mixed = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        joined = b.op("Reshape", mixed, b.fixed(np.array([0, 0, 8])))
        x = b.op("Add", x, mapped(joined, width, width))
        h = mapped(normalized(x), width, 16)
        phi = b.op("Add", b.op("Erf", b.op("Div", h, number(2**0.5))), number(1))
        x = b.op("Add", x, mapped(b.op("Mul", b.op("Mul", h, phi), number(0.5)), 16, width))
    b.op("ReduceMean", x, axes=[1], keepdims=0)
    return b.model(["N", 5, width], width)


LONG: dict[str, Callable[[int], ModelProto]] = {
    "residual": residual,
    "wide": wide,
    "dense": dense,
    "transformer": transformer,
}
