"""The paper's findings: on small networks made here, and as models/paper keeps them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import onnx_attrib
from onnx_attrib import Explainer

PAPER = Path(__file__).parents[1] / "models" / "paper"
sys.path.insert(0, str(PAPER))

import findings  # noqa: E402
from panels import PANELS, affine  # noqa: E402

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
Array = np.ndarray[Any, Any]


# -- networks made here ----------------------------------------------------------------------------


def network(rng: np.random.Generator, activation: str) -> ModelProto:
    """Conv, Conv, MaxPool, dense, dense with random weights: the paper's CNN in small."""
    channels, hidden = (int(size) for size in rng.integers(4, 9, 2))
    made = onnx.parser.parse_model(
        f"""{HEAD} g (float[N, 1, 12, 12] x) => (float[N, 4] y) {{
            a = Conv (x, w1, b1)
            b = {activation} (a)
            c = Conv (b, w2, b2)
            d = {activation} (c)
            e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
            f = Flatten (e)
            g = Gemm (f, w3, b3)
            h = {activation} (g)
            y = Gemm (h, w4, b4)
        }}"""
    )
    shapes = [(channels, 1, 3, 3), (6, channels, 3, 3), (96, hidden), (hidden, 4)]
    for i, shape in enumerate(shapes, 1):
        conv = len(shape) == 4
        inner, out = (int(np.prod(shape[1:])), shape[0]) if conv else shape
        weight, bias = rng.normal(size=shape) / np.sqrt(inner), rng.normal(size=out) / 4
        for name, value in ((f"w{i}", weight), (f"b{i}", bias)):
            made.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(made, full_check=True)
    return made


def explained(model: ModelProto, x: Array, method: str, **options: Any) -> Array:
    explain = Explainer(onnx_attrib.compile(model, method, target=1, **options), threads=1)
    return explain(x).attributions[explain.attributed[0]]


def off(one: Array, other: Array) -> float:
    """The largest difference over the largest entry."""
    return float(abs(one - other).max() / abs(other).max())


def test_epsilon_lrp_is_gradient_x_input_on_relu_networks_only(rng: np.random.Generator) -> None:
    """Finding (a). Where f(0) ≠ 0, f(z)/z has a pole at zero, and ε-LRP is another thing."""
    x = rng.normal(size=(5, 1, 12, 12)).astype(np.float32)
    distance = {}
    for activation in ("Relu", "Sigmoid", "Softplus"):
        model = network(rng, activation)
        relevance = explained(model, x, "epsilon-lrp", epsilon=0.0)
        distance[activation] = off(relevance, explained(model, x, "gradient-x-input"))
    assert distance["Relu"] < 1e-5
    assert distance["Sigmoid"] > 0.5
    assert distance["Softplus"] > 0.5


@pytest.mark.parametrize(
    "method", ["epsilon-lrp", "deeplift", "integrated-gradients", "occlusion", "shapley-sampling"]
)
def test_the_signed_methods_coincide_on_a_linear_model(
    rng: np.random.Generator, method: str
) -> None:
    """Finding (d): with a zero baseline all are wᵢ·xᵢ, the bias left out."""
    weight, bias = rng.normal(size=(784, 3)), rng.normal(size=3)
    x = rng.normal(size=(2, 1, 28, 28)).astype(np.float32)
    options = {"samples": 1} if method == "shapley-sampling" else {}
    expected = x * weight[:, 1].reshape(1, 1, 28, 28)
    assert off(explained(affine(weight, bias), x, method, **options), expected) < 1e-4


def test_signs_matter_least_relevant_first(rng: np.random.Generator) -> None:
    """Finding (e), in full on a linear model: only signs find what speaks against the output."""
    weight, bias = rng.normal(size=(784, 3)), rng.normal(size=3)
    x = rng.normal(size=(4, 1, 28, 28)).astype(np.float32)
    results = onnx_attrib.evaluate(
        affine(weight, bias),
        x,
        {"signed": "gradient-x-input", "saliency": "saliency"},
        features="pixels",
        step=98,
        subsets=5,
        gallery=0,
        threads=1,
    ).results
    lerf = {m: entry["curves"]["lerf"]["area"]["mean"] for m, entry in results["methods"].items()}
    logits = x.reshape(4, -1) @ weight + bias
    terms = x.reshape(4, -1) * weight.T[logits.argmax(1)]
    ascending = np.sort(terms, axis=1).cumsum(1)[:, 97::98]
    curve = -np.concatenate([np.zeros((4, 1)), ascending], axis=1)
    expected = (curve[:, 1:] + curve[:, :-1]).mean() / 2
    assert lerf["signed"] == pytest.approx(expected, rel=1e-3)
    assert abs(lerf["saliency"]) < expected / 2


# -- the kept results ------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    return findings.read(PAPER / "results", PANELS)


def test_every_panel_has_results() -> None:
    assert set(results()) == set(PANELS)


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_complete(name: str) -> None:
    result = results()[name]
    panel = PANELS[name]
    assert result["title"] == panel.title
    assert set(result["curves"]) | set(result["not_finite"]) == {*panel.methods, "random"}
    for label, orders in result["curves"].items():
        for order, curve in orders.items():
            lengths = {len(curve[part]) for part in ("removed", "mean", "low", "high")}
            assert len(lengths) == 1, (label, order)
            assert curve["mean"][0] == 0
            _between(curve["low"], curve["mean"], curve["high"])


def _between(low: Sequence[float], mean: Sequence[float], high: Sequence[float]) -> None:
    slack = 1e-4 * max(1.0, *map(abs, mean))
    assert all(a - slack <= b <= c + slack for a, b, c in zip(low, mean, high, strict=True))


def test_the_findings_are_those_of_the_results() -> None:
    kept = json.loads((PAPER / "results" / "findings.json").read_text("utf8"))
    found = findings.of(results())
    assert len(found) == len(findings.NEEDS)
    assert kept == json.loads(json.dumps(found))
    assert findings.table(found) in (PAPER / "README.md").read_text("utf8")


# -- a panel again ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_panel_again_gives_the_kept_numbers(tmp_path: Path) -> None:
    """The MNIST perceptron, of which all is shipped."""
    import rerun

    name = "mnist_mlp_relu"
    again, kept = rerun.evaluated(PANELS[name], tmp_path), results()[name]
    assert again["network"] == kept["network"]
    for label, orders in kept["curves"].items():
        for order, curve in orders.items():
            other = again["curves"][label][order]["mean"]
            scale = max(map(abs, curve["mean"]))
            np.testing.assert_allclose(other, curve["mean"], atol=0.01 * scale, err_msg=label)
    for finding in (findings.a_equal, findings.c, findings.e):
        assert finding({name: again})["holds"] == finding({name: kept})["holds"]
