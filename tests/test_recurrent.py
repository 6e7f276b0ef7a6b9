"""RNN, GRU and LSTM: the definition against ONNX Runtime, gradients, conservation."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib.passes.differentiate import Sweep
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.rules import Site
from onnx_attrib.rules.recurrent import definition

from . import numeric
from .numeric import Array
from .recurrent_reference import GATES, restated


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


@names
def test_restatement(name: str) -> None:
    """What the next tests hold gradients against computes what ONNX Runtime computes."""
    config = CONFIGS[name]
    point = config.point(np.random.default_rng(4))
    node = config.model().graph.node[0]
    found = restated(node.op_type, config.attrs, [point.get(k) for k in node.input])
    expected = numeric.run(config.model(), point)
    for key, value in zip(node.output, found, strict=False):
        if key:
            np.testing.assert_allclose(value, expected[key], 1e-4, 1e-5)


@names
def test_gradient(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(5)
    model, output = numeric.joined(config.model())
    residuals = numeric.check_gradient(
        model, config.point(rng), inputs=list(config.shapes), output=output
    )
    assert all(r.precision == "float64" for r in residuals)
    assert sum(r.applies for r in residuals) >= len(config.shapes) - 1


@names
def test_conservation(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(6)
    model, output = numeric.joined(config.model())
    pairs = []
    for _ in range(2):
        base = config.point(rng)
        pairs.append((config.point(rng), {k: base[k] for k in config.shapes}))
    numeric.check_conservation(model, *pairs, inputs=list(config.shapes), output=output)


# -- against torch ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_torch(kind: str, bidirectional: bool, dynamo: bool) -> None:
    """The gradient of an exported two-layer network is that of torch's autograd."""
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            cell = getattr(torch.nn, kind)
            self.cells = cell(4, 6, 2, batch_first=True, bidirectional=bidirectional)
            self.head = torch.nn.Linear(6 * (1 + bidirectional), 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.cells(x)[0].mean(1))

    net, x = Net().eval(), torch.randn(5, 7, 4)
    file = io.BytesIO()
    axes = {"dynamic_axes": {"x": {0: "N"}}} if not dynamo else {}
    example = x if dynamo else x[:2]
    torch.onnx.export(net, (example,), file, input_names=["x"], dynamo=dynamo, **axes)
    model = onnx.load_model_from_string(file.getvalue())
    seed = torch.randn(5, 3)
    x.requires_grad_()
    (net(x) * seed).sum().backward()
    compiled = onnx_attrib.compile(model, "gradient", target="seed")
    found = numeric.run(compiled, {"x": x.detach().numpy(), "seed": seed.numpy()})
    np.testing.assert_allclose(found["x_attribution"], x.grad.numpy(), 1e-4, 1e-6)
    compiled = onnx_attrib.compile(model, "deeplift", target="seed", baseline=0.5)
    found = numeric.run(compiled, {"x": x.detach().numpy(), "seed": seed.numpy()})
    change = ((net(x) - net(torch.full_like(x, 0.5))) * seed).sum(1).detach().numpy()
    np.testing.assert_allclose(found["x_attribution"].sum((1, 2)), change, 1e-4, 1e-5)
