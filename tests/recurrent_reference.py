"""RNN, GRU and LSTM as the ONNX reference describes them, one sample and one step at a time.

ONNX's own reference evaluator lacks sequence lengths, peepholes, clips and most activations; with
these it has them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[[Array], Array]

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_WAYS = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}
_PARAMETERS: dict[str, tuple[float, float | None]] = {
    "Affine": (1.0, 0.0),
    "LeakyRelu": (0.01, None),
    "ThresholdedRelu": (1.0, None),
    "ScaledTanh": (1.0, 1.0),
    "HardSigmoid": (0.2, 0.5),
    "Elu": (1.0, None),
}


def activation(name: str, alphas: list[float], betas: list[float]) -> Function:
    """The function of that name; it takes its parameters from the front of the lists."""
    a, b = _PARAMETERS.get(name, (None, None))
    if a is not None:
        a = alphas.pop(0) if alphas else a
    if b is not None:
        b = betas.pop(0) if betas else b
    functions: dict[str, Callable[[Any], Any]] = {
        "Relu": lambda z: np.maximum(z, 0),
        "Tanh": np.tanh,
        "Sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "Softsign": lambda z: z / (1 + np.abs(z)),
        "Softplus": lambda z: np.log1p(np.exp(z)),
        "Affine": lambda z: a * z + b,
        "LeakyRelu": lambda z: np.where(z >= 0, z, a * z),
        "ThresholdedRelu": lambda z: np.where(z > a, z, 0),
        "ScaledTanh": lambda z: a * np.tanh(b * z),
        "HardSigmoid": lambda z: np.clip(a * z + b, 0, 1),
        "Elu": lambda z: np.where(z >= 0, z, a * (np.exp(z) - 1)),
    }
    return functions[name]


def restated(op: str, attrs: Mapping[str, Any], inputs: Sequence[Array | None]) -> list[Array]:
    """Y, Y_h and Y_c of the operator, in the type of its inputs."""
    given = [*inputs, *[None] * (8 - len(inputs))]
    initial = [5, 7] if op == "RNN" else [5, 6]
    x, w, r, b, lengths = given[:5]
    assert x is not None
    assert w is not None
    assert r is not None
    starts, peepholes = [given[i] for i in initial], given[7] if op == "LSTM" else None
    if attrs.get("layout"):
        x = x.transpose(1, 0, 2)
        starts = [None if s is None else s.transpose(1, 0, 2) for s in starts]
    ways, size = _WAYS[_text(attrs.get("direction", "forward"))], r.shape[-1]
    names = [_text(name) for name in attrs.get("activations", _USUAL[op] * len(ways))]
    alphas, betas = (list(attrs.get(f"activation_{k}", [])) for k in ("alpha", "beta"))
    functions = [activation(name, alphas, betas) for name in names]
    per = len(_USUAL[op])
    steps, batch, _ = x.shape
    y = np.zeros((steps, len(ways), batch, size), x.dtype)
    ends = np.zeros((2, len(ways), batch, size), x.dtype)
    zeros = np.zeros((len(ways), 2 * GATES[op] * size), x.dtype)
    for d, way in enumerate(ways):
        weights = {
            "w": w[d],
            "r": r[d],
            "b": (zeros if b is None else b)[d],
            "p": (zeros if peepholes is None else peepholes)[d],
        }
        f = functions[d * per : (d + 1) * per]
        for n in range(batch):
            length = steps if lengths is None else int(lengths[n])
            h, c = (np.zeros(size, x.dtype) if s is None else s[d, n] for s in starts)
            for t in range(length)[::way]:
                h, c = _step(op, attrs, weights, f, x[t, n], h, c)
                y[t, d, n] = h
            ends[:, d, n] = h, c
    outputs = [y, ends[0], ends[1]][: 3 if op == "LSTM" else 2]
    if attrs.get("layout"):
        outputs = [y.transpose(2, 0, 1, 3), *(end.transpose(1, 0, 2) for end in outputs[1:])]
    return outputs


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _step(
    op: str,
    attrs: Mapping[str, Any],
    q: Mapping[str, Array],
    f: Sequence[Function],
    x: Array,
    h: Array,
    c: Array,
) -> tuple[Array, Array]:
    clip, size = attrs.get("clip", np.inf), len(h)
    wb, rb = np.split(q["b"], 2)

    def part(values: Array, k: int) -> Array:
        return values[k * size : (k + 1) * size]

    def total(k: int, more: Array | float = 0.0) -> Array:
        z = part(q["w"], k) @ x + part(q["r"], k) @ h + part(wb, k) + part(rb, k) + more
        return np.clip(z, -clip, clip)

    if op == "RNN":
        return f[0](total(0)), c
    if op == "GRU":
        z, r = f[0](total(0)), f[0](total(1))
        if attrs.get("linear_before_reset"):
            new = part(q["w"], 2) @ x + part(wb, 2) + r * (part(q["r"], 2) @ h + part(rb, 2))
        else:
            new = part(q["w"], 2) @ x + part(wb, 2) + part(q["r"], 2) @ (r * h) + part(rb, 2)
        return (1 - z) * f[1](np.clip(new, -clip, clip)) + z * h, c
    i = f[0](total(0, part(q["p"], 0) * c))
    forget = 1 - i if attrs.get("input_forget") else f[0](total(2, part(q["p"], 2) * c))
    after = forget * c + i * f[1](total(3))
    o = f[0](total(1, part(q["p"], 1) * after))
    return o * f[2](after), after


class _Recurrent(OpRun):
    op_domain = ""

    def _run(self, *inputs: Array | None, **_: Any) -> tuple[Array, ...]:
        node = self.onnx_node
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return tuple(restated(node.op_type, attrs, inputs)[: len(node.output)])


class RNN(_Recurrent):
    """For the reference evaluator."""


class GRU(_Recurrent):
    """For the reference evaluator."""


class LSTM(_Recurrent):
    """For the reference evaluator."""


OPERATORS = [RNN, GRU, LSTM]
