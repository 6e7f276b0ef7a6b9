"""One network, one attribution, whichever exporter wrote it.

A convolutional network, an LSTM and a transformer with the same weights, written by torch's two
exporters, by Keras through tf2onnx and by JAX through jax2onnx, get the same attributions from
every method. (Relevance divides by sums, stabilised with 1e-6. Of twenty pairs of random samples
one had a sum within 3e-5 of zero in its transformer, and was off by 5e-5 with ``lrp`` and by 5e-4
with ``deep-taylor``: rounding of the weights shows there too, in float64 as well.) Then
scikit-learn's perceptrons behind a scaler, through skl2onnx.

The files come from ``python tests/fetch_models.py FOLDER`` (run once for each framework's
environment); ONNX_ATTRIB_MODELS=FOLDER has the tests find them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_attrib

from . import numeric
from .fetch_exports import SAMPLES

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]
CHAINS = ("torch", "legacy", "keras", "jax")
METHODS = tuple(
    method.name
    for method in onnx_attrib.methods()
    if not any(option.required for option in method.options)
)
FOR_CONVOLUTIONS = {
    *("deconvnet", "guided-backprop"),
    *("grad-cam", "grad-cam++", "layer-cam", "guided-grad-cam"),
}
PIPELINES = ("iris", "cancer", "wide", "diabetes", "robust")


def load(name: str) -> ModelProto:
    folder = os.environ.get("ONNX_ATTRIB_MODELS")
    path = Path(folder or ".") / f"export_{name}.onnx"
    if folder is None or not path.exists():
        pytest.skip(
            f"needs {path.name}: run 'python tests/fetch_models.py FOLDER' with the exporter's "
            "framework installed, and set ONNX_ATTRIB_MODELS=FOLDER"
        )
    return onnx.load(path)


def sample(network: str) -> tuple[Array, Array]:
    """Two samples, and their baselines."""
    rng = np.random.default_rng(1)
    shape = (2, *SAMPLES[network])
    x, baseline = rng.standard_normal(shape), 0.3 * rng.standard_normal(shape)
    return x.astype(np.float32), baseline.astype(np.float32)


def attribution(model: ModelProto, method: str, network: str) -> tuple[Array, Array]:
    """The logits, and the attributions of class 1 for the first sample and 2 for the second."""
    info = next(i for i in onnx_attrib.methods() if i.name == method)
    options: dict[str, Any] = {"baseline": "input"} if info.needs_reference else {}
    compiled = onnx_attrib.compile(model, method=method, target="input", **options)
    numeric.check_graph(compiled)
    x, baseline = sample(network)
    name = model.graph.input[0].name
    feeds = {name: x, f"{name}_baseline": baseline, "target": np.array([1, 2])}
    result = numeric.run(compiled, feeds)
    output = model.graph.output[0].name
    expected = numeric.run(model, {name: x})[output]
    np.testing.assert_allclose(result[output], expected, 1e-5, 1e-5)
    return result[output], result[f"{name}_attribution"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chain", CHAINS[1:])
@pytest.mark.parametrize("network", SAMPLES)
def test_exporters_agree(network: str, chain: str, method: str) -> None:
    if method in FOR_CONVOLUTIONS and network != "cnn":
        # There is no ReLU or no convolution, whichever chain wrote it.
        for one in (CHAINS[0], chain):
            with pytest.raises(onnx_attrib.CompileError):
                onnx_attrib.compile(load(f"{network}_{one}"), method=method)
        return
    logits, expected = attribution(load(f"{network}_{CHAINS[0]}"), method, network)
    others, found = attribution(load(f"{network}_{chain}"), method, network)
    np.testing.assert_allclose(others, logits, 1e-4, 1e-5)
    largest = np.abs(expected).max()
    assert largest > 0
    error = float(np.abs(found - expected).max() / largest)
    assert error <= 1e-5, f"off by {error:.3g} of the largest entry"


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_scikit_learn(name: str) -> None:
    model = load(f"sklearn_{name}")
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    rng = np.random.default_rng(2)
    x, baseline = (np.abs(rng.standard_normal((4, width))).astype(np.float32) for _ in range(2))
    feeds, other = {model.graph.input[0].name: x}, {model.graph.input[0].name: baseline}
    output = next(i.name for i in model.graph.output if numeric.element_type(i) in numeric.FLOATS)
    numeric.check_gradient(model, feeds, output=output)
    numeric.check_conservation(model, (feeds, other), output=output)
