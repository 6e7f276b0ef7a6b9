"""DeepLIFT and DeepSHAP against tangermeme on freshly drawn 1-D CNNs and MLPs.

tangermeme implements the Rescale rule on torch modules. Of its results only the multipliers are
taken: what it reports by default is projected onto one-hot letters. Where it is right every pair of
input and reference sums up, which is checked beside. It is not right for products of variables and
for nonlinearities called as functions, and gives a maximum's multiplier by a rule of its own, which
is also the one here as long as one window's maximum is not at two places.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("tangermeme")

import onnx_attrib  # noqa: E402

from . import zoo  # noqa: E402
from .test_contract import close, run  # noqa: E402

nn = torch.nn
Array = np.ndarray[Any, Any]
ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}
OUTPUTS = 3


def settled(module: Any, generator: Any) -> Any:
    """Random weights and biases, and batch statistics off the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            fan = layer.weight[0].numel()
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / fan**0.5
            layer.bias.data = 0.3 * torch.randn(layer.bias.shape, generator=generator)
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean = 0.2 * torch.randn(layer.num_features, generator=generator)
            layer.running_var = 0.5 + torch.rand(layer.num_features, generator=generator)
            layer.weight.data = 0.5 + torch.rand(layer.num_features, generator=generator)
            layer.bias.data = 0.3 * torch.randn(layer.num_features, generator=generator)
    return module.eval()


def cnn(activation: Callable[[], Any], rng: np.random.Generator, length: int) -> Any:
    """Convolutions, overlapping pools, batch normalisation and a dense head."""
    one, two, kernel = int(rng.integers(4, 9)), int(rng.integers(4, 9)), int(rng.integers(3, 6))
    pools = [
        nn.MaxPool1d(3, 2),
        nn.MaxPool1d(2),
        nn.MaxPool1d(4, 3, padding=1),
        nn.AvgPool1d(3, 2),
    ]
    body = nn.Sequential(
        nn.Conv1d(4, one, kernel, padding=int(rng.integers(0, 3))),
        nn.BatchNorm1d(one),
        activation(),
        pools[int(rng.integers(0, len(pools)))],
        nn.Conv1d(one, two, 3, dilation=int(rng.integers(1, 3))),
        activation(),
        nn.AvgPool1d(2),
        nn.Flatten(),
    )
    with torch.no_grad():
        width = body.eval()(torch.zeros(1, 4, length)).shape[1]
    head = [nn.Linear(width, 10), activation(), nn.Linear(10, OUTPUTS)]
    return nn.Sequential(*body, *head)


def mlp(activation: Callable[[], Any], rng: np.random.Generator, length: int) -> Any:
    one, two = (int(k) for k in rng.integers(6, 14, 2))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4 * length, one),
        activation(),
        nn.Linear(one, two),
        activation(),
        nn.Linear(two, OUTPUTS),
    )


def tangermeme(module: Any, x: Array, background: Array, target: int) -> Array:
    """(x − x̄)·m of every input and reference, [N, K, C, L], in float64."""
    from tangermeme.deep_lift_shap import deep_lift_shap

    module, x, background = copy.deepcopy(module).double(), x.astype("d"), background.astype("d")
    pairs = torch.from_numpy(np.broadcast_to(background, (len(x), *background.shape)).copy())
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        multipliers = deep_lift_shap(
            module,
            torch.from_numpy(x),
            target=target,
            references=pairs,
            raw_outputs=True,
            only_warn=True,
            device="cpu",
        )
    m = multipliers.detach().numpy().reshape(len(x), len(background), *x.shape[1:])
    parts: Array = (x[:, None] - background) * m
    with torch.no_grad():
        own, there = (module(torch.from_numpy(v))[:, target].numpy() for v in (x, background))
    np.testing.assert_allclose(parts.sum(axis=(2, 3)), own[:, None] - there, atol=1e-7)
    return parts


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", [cnn, mlp])
def test_deeplift_and_deep_shap(make: Any, activation: str, draw: int) -> None:
    rng = np.random.default_rng([draw, list(ACTIVATIONS).index(activation)])
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    length, count = int(rng.integers(20, 41)), int(rng.integers(2, 7))
    module = settled(make(ACTIVATIONS[activation], rng, length), generator)
    letters = rng.integers(0, 4, (3 + count, length))
    x, background = np.split(np.eye(4, dtype=np.float32)[letters].swapaxes(1, 2), [3])
    if draw % 2:
        # Not one-hot: letter frequencies, and none of the entries equal.
        x = rng.standard_normal(x.shape).astype(np.float32)
        background = rng.dirichlet(np.ones(4), (count, length)).astype(np.float32)
        background = np.ascontiguousarray(background.swapaxes(1, 2))
    x, target = np.ascontiguousarray(x), int(rng.integers(OUTPUTS))
    expected = tangermeme(module, x, background, target)
    source = zoo.export(module, torch.from_numpy(x), "dynamo")
    compiled = onnx_attrib.compile(source, "deep-shap", target=target, baseline="input", chunk=3)
    result = run(compiled, {"x": x, "x_baseline": np.ascontiguousarray(background)})
    close(result["x_attribution"], expected.mean(axis=1), 1e-4)
    single = onnx_attrib.compile(source, "deeplift", target=target, baseline=background[:1])
    close(run(single, {"x": x})["x_attribution"], expected[:, 0], 1e-4)
