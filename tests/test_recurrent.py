"""RNN, GRU and LSTM: the definition against ONNX Runtime, gradients, conservation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

pytest.importorskip("onnxruntime")

import onnx_attrib  # noqa: E402
from onnx_attrib.ir import Graph  # noqa: E402
from onnx_attrib.passes.differentiate import Sweep  # noqa: E402
from onnx_attrib.passes.normalize import normalize  # noqa: E402
from onnx_attrib.rules import Site  # noqa: E402
from onnx_attrib.rules.recurrent import definition  # noqa: E402

from . import numeric  # noqa: E402
from .numeric import Array  # noqa: E402

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Config:
    """A model of one recurrent node."""

    op: str
    attrs: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    initial: bool = True
    lengths: tuple[int, ...] | None = None
    peepholes: bool = False
    outputs: tuple[int, ...] = (0, 1, 2)
    steps: int = 4
    batch: int = 2
    features: int = 3
    hidden: int = 5
    symbolic: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float inputs, in the order of the operator's."""
        d = 2 if self.attrs.get("direction") == "bidirectional" else 1
        t, n, i, h, g = self.steps, self.batch, self.features, self.hidden, GATES[self.op]
        shapes = {"X": (t, n, i), "W": (d, g * h, i), "R": (d, g * h, h)}
        if self.bias:
            shapes["B"] = (d, 2 * g * h)
        if self.initial:
            shapes["H0"] = (d, n, h)
        if self.op == "LSTM" and self.initial:
            shapes["C0"] = (d, n, h)
        if self.peepholes:
            shapes["P"] = (d, 3 * h)
        return shapes

    def model(self) -> ModelProto:
        order = ["X", "W", "R", "B", "lengths", "H0", "C0", "P"]
        present = {*self.shapes, *(["lengths"] if self.lengths else [])}
        names = [name if name in present else "" for name in order]
        while not names[-1]:
            names.pop()
        outputs = ["Y", "Y_h", "Y_c"][: 3 if self.op == "LSTM" else 2]
        outputs = [name if k in self.outputs else "" for k, name in enumerate(outputs)]
        while not outputs[-1]:
            outputs.pop()
        node = helper.make_node(
            self.op, names, outputs, "cell", hidden_size=self.hidden, **self.attrs
        )
        d = self.shapes["W"][0]
        t, n = ("T", "N") if self.symbolic else (self.steps, self.batch)
        symbols = {"X": [t, n, self.features], "H0": [d, n, self.hidden]}
        symbols["C0"] = symbols["H0"]
        inputs = [
            helper.make_tensor_value_info(k, TensorProto.FLOAT, symbols.get(k, list(shape)))
            for k, shape in self.shapes.items()
        ]
        if self.lengths:
            inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [n]))
        ends = [
            helper.make_tensor_value_info(
                k,
                TensorProto.FLOAT,
                [t, d, n, self.hidden] if k == "Y" else [d, n, self.hidden],
            )
            for k in outputs
            if k
        ]
        model = helper.make_model(
            helper.make_graph([node], "g", inputs, ends),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def point(self, rng: np.random.Generator) -> dict[str, Array]:
        drawn = {k: rng.uniform(-1, 1, v).astype(np.float32) for k, v in self.shapes.items()}
        if self.lengths:
            drawn["lengths"] = np.array(self.lengths, np.int32)
        return drawn


def both(name: str, config: Config) -> dict[str, Config]:
    """The configuration in each direction."""
    result = {}
    for direction in ("forward", "reverse", "bidirectional"):
        attrs = {"direction": direction, **config.attrs}
        if "activations" in attrs and direction == "bidirectional":
            attrs["activations"] = attrs["activations"] * 2
        result[f"{name}, {direction}"] = replace(config, attrs=attrs)
    return result


CONFIGS = {
    **both("rnn", Config("RNN")),
    **both("rnn, lengths", Config("RNN", lengths=(2, 4))),
    "rnn, clip": Config("RNN", {"clip": 0.4}),
    "rnn, relu": Config("RNN", {"activations": ["Relu"]}, initial=False),
    **{
        f"rnn, {name.lower()}": Config(
            "RNN", {"activations": [name], "activation_alpha": [0.3], "activation_beta": [0.6]}
        )
        for name in ("Affine", "ScaledTanh", "HardSigmoid")
    },
    **{
        f"rnn, {name.lower()}": Config("RNN", {"activations": [name], "activation_alpha": [0.3]})
        for name in ("LeakyRelu", "ThresholdedRelu", "Elu")
    },
    "rnn, softsign": Config("RNN", {"activations": ["Softsign"]}),
    "rnn, softplus": Config("RNN", {"activations": ["Softplus"]}),
    **both("gru", Config("GRU")),
    **both("gru, linear before reset", Config("GRU", {"linear_before_reset": 1})),
    **both("gru, lengths", Config("GRU", lengths=(3, 1))),
    "gru, last state only": Config("GRU", outputs=(1,), bias=False, initial=False),
    "gru, no bias, linear before reset": Config("GRU", {"linear_before_reset": 1}, bias=False),
    "gru, clip": Config("GRU", {"clip": 0.5}),
    **both("lstm", Config("LSTM")),
    **both("lstm, peepholes", Config("LSTM", peepholes=True)),
    **both("lstm, lengths", Config("LSTM", lengths=(4, 2), steps=5)),
    "lstm, lengths and peepholes": Config("LSTM", lengths=(1, 3), peepholes=True),
    "lstm, last states only": Config("LSTM", outputs=(1, 2), initial=False),
    "lstm, last cell state only": Config("LSTM", {"direction": "bidirectional"}, outputs=(2,)),
    "lstm, sequence only": Config("LSTM", {"direction": "bidirectional"}, outputs=(0,)),
    "lstm, fixed sizes": Config("LSTM", symbolic=False, initial=False, bias=False),
    "lstm, clip": Config("LSTM", {"clip": 0.3}),
    "lstm, input forget": Config("LSTM", {"input_forget": 1}),
    "lstm, input forget, peepholes": Config("LSTM", {"input_forget": 1}, peepholes=True),
    "lstm, activations": Config(
        "LSTM",
        {
            "activations": ["HardSigmoid", "Affine", "LeakyRelu"],
            "activation_alpha": [0.25, 0.8, 0.1],
            "activation_beta": [0.4, 0.1],
        },
    ),
    "lstm, one step": Config("LSTM", steps=1),
    "lstm, one sample": Config("LSTM", batch=1),
}

names = pytest.mark.parametrize("name", CONFIGS)


def defined(config: Config) -> ModelProto:
    """The model with the node's definition in its place."""
    graph = normalize(config.model())
    (node,) = graph.nodes
    inputs = tuple(t if t.name else None for t in node.inputs)
    site = Site(graph, node, inputs, tuple(node.outputs), (), ())
    outputs, _ = definition(Sweep(graph, {}), site)
    graph.outputs[:] = [
        graph.emit("Identity", t, stem=f"defined_{k}") for k, t in enumerate(outputs)
    ]
    return graph.to_proto()


@names
def test_definition(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(3)
    config = replace(config, outputs=(0, 1, 2))
    point = config.point(rng)
    expected = numeric.run(config.model(), point)
    found = numeric.run(defined(config), point)
    for value, want in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(value, want, 1e-5, 1e-5)


# -- the operators once more, step by step in float64, as the ONNX reference describes them --------


def activation(name: str, alphas: list[float], betas: list[float]) -> Any:
    defaults = {
        "Affine": (1.0, 0.0),
        "LeakyRelu": (0.01, None),
        "ThresholdedRelu": (1.0, None),
        "ScaledTanh": (1.0, 1.0),
        "HardSigmoid": (0.2, 0.5),
        "Elu": (1.0, None),
    }
    a, b = defaults.get(name, (None, None))
    if a is not None:
        a = alphas.pop(0) if alphas else a
    if b is not None:
        b = betas.pop(0) if betas else b
    return {
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
    }[name]


def restated(config: Config, point: dict[str, Array]) -> list[Array]:
    """Y, Y_h and Y_c in float64, one sample and one step at a time."""
    p = {k: v.astype(np.float64) for k, v in point.items()}
    size, attrs = config.hidden, config.attrs
    ways = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}
    ways_here = ways[attrs.get("direction", "forward")]
    usual = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
    listed = attrs.get("activations", usual[config.op] * len(ways_here))
    alphas = list(attrs.get("activation_alpha", []))
    betas = list(attrs.get("activation_beta", []))
    functions = [activation(name, alphas, betas) for name in listed]
    per = len(functions) // len(ways_here)
    y = np.zeros((config.steps, len(ways_here), config.batch, size))
    ends = np.zeros((2, len(ways_here), config.batch, size))
    for d, way in enumerate(ways_here):
        gates = 2 * GATES[config.op] * size
        weights = {
            "w": p["W"][d],
            "r": p["R"][d],
            "b": p["B"][d] if config.bias else np.zeros(gates),
            "p": p["P"][d] if config.peepholes else np.zeros(3 * size),
        }
        for n in range(config.batch):
            length = config.lengths[n] if config.lengths else config.steps
            h, c = (p[k][d, n] if k in p else np.zeros(size) for k in ("H0", "C0"))
            for t in range(length)[::way]:
                f = functions[d * per : (d + 1) * per]
                h, c = one_step(config, weights, f, p["X"][t, n], h, c)
                y[t, d, n] = h
            ends[:, d, n] = h, c
    outputs = [y, ends[0], ends[1]]
    return [outputs[k] for k in config.outputs if k < (3 if config.op == "LSTM" else 2)]


def one_step(
    config: Config, q: dict[str, Array], f: list[Any], x: Array, h: Array, c: Array
) -> tuple[Array, Array]:
    clip = config.attrs.get("clip", np.inf)
    wb, rb = np.split(q["b"], 2)

    def part(values: Array, k: int) -> Array:
        return values[k * config.hidden : (k + 1) * config.hidden]

    def total(k: int, more: Array | float = 0.0) -> Array:
        z = part(q["w"], k) @ x + part(q["r"], k) @ h + part(wb, k) + part(rb, k) + more
        return np.clip(z, -clip, clip)

    if config.op == "RNN":
        return f[0](total(0)), c
    if config.op == "GRU":
        z, r = f[0](total(0)), f[0](total(1))
        if config.attrs.get("linear_before_reset"):
            new = part(q["w"], 2) @ x + part(wb, 2) + r * (part(q["r"], 2) @ h + part(rb, 2))
        else:
            new = part(q["w"], 2) @ x + part(wb, 2) + part(q["r"], 2) @ (r * h) + part(rb, 2)
        return (1 - z) * f[1](np.clip(new, -clip, clip)) + z * h, c
    i = f[0](total(0, part(q["p"], 0) * c))
    forget = 1 - i if config.attrs.get("input_forget") else f[0](total(2, part(q["p"], 2) * c))
    after = forget * c + i * f[1](total(3))
    o = f[0](total(1, part(q["p"], 1) * after))
    return o * f[2](after), after


@names
def test_restatement(name: str) -> None:
    """The float64 restatement computes what ONNX Runtime computes."""
    config = CONFIGS[name]
    point = config.point(np.random.default_rng(4))
    expected = numeric.run(config.model(), point)
    for value, want in zip(restated(config, point), expected.values(), strict=True):
        np.testing.assert_allclose(value, want, 1e-4, 1e-5)


@names
def test_gradient(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(5)
    model, output = numeric.joined(config.model())
    inputs = list(config.shapes)
    compiled = onnx_attrib.compile(
        model, "gradient", target="seed", inputs=inputs, output=output
    )
    numeric.check_graph(compiled)
    point = config.point(rng)
    value = np.concatenate([part.ravel() for part in restated(config, point)])
    shape = numeric.run(model, point)[output].shape
    seed = rng.standard_normal(shape).astype(np.float32)
    results = numeric.run(compiled, {**point, "seed": seed})
    for k in inputs:
        step = rng.standard_normal(point[k].shape)

        def score(size: float, k: str = k, step: Array = step) -> float:
            moved = {**point, k: point[k].astype(np.float64) + size * step}
            parts = [part.ravel() for part in restated(config, moved)]
            return float(np.concatenate(parts) @ seed.ravel().astype(np.float64))

        h = 1e-5
        want = (score(h) - score(-h)) / (2 * h)
        terms = results[f"{k}_attribution"] * step
        assert abs(terms.sum() - want) <= 1e-4 * max(abs(want), float(np.sqrt((terms**2).sum())))
    assert value.size == seed.size


@names
def test_conservation(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(6)
    model, output = numeric.joined(config.model())
    pairs = []
    for _ in range(2):
        base = config.point(rng)
        pairs.append((config.point(rng), {k: base[k] for k in config.shapes}))
    numeric.check_conservation(model, *pairs, inputs=list(config.shapes), output=output)
