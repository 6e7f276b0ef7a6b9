"""SmoothGrad in the graph: against the restated mean over the same noise, and Captum."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import OptionError
from onnx_attrib.methods import METHODS

from .test_contract import close, forward, gradient, mlp, run, text
from .test_noise import restated_normal

Array = np.ndarray


def copies(x: Array, samples: int, noise: float = 0.15, seed: int = 0, place: int = 0) -> Array:
    """x + σε in float64, [samples, N, …]; ε is the same for all samples of the batch."""
    wide = x.astype(np.float64)
    axes = tuple(range(1, x.ndim))
    spread = wide.max(axes, keepdims=True) - wide.min(axes, keepdims=True)
    epsilon = restated_normal(seed, f"noise/{place}", samples, x[0].size)
    return wide + noise * spread * epsilon.reshape(samples, 1, *x.shape[1:])


def moment(power: Any, terms: Array) -> Array:
    if str(power) == "variance":
        return terms.var(axis=0)
    return (terms ** int(power)).mean(axis=0)


OF = {
    "gradient": lambda m, x: m,
    "saliency": lambda m, x: np.abs(m),
    "gradient-x-input": lambda m, x: m * x,
}


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("power", [1, "2", "variance"])
@pytest.mark.parametrize(("batch", "chunk"), [("N", 3), ("N", 1), ("N", 50), ("3", 3)])
def test_restated(rng: np.random.Generator, of: str, power: Any, batch: str, chunk: int) -> None:
    """The mean, mean of squares and variance over the copies, in float64."""
    source, x = mlp(rng, batch), rng.standard_normal((3, 5)).astype(np.float32)
    compiled = onnx_attrib.compile(
        source,
        "smoothgrad",
        of=of,
        power=power,
        samples=7,
        noise=0.3,
        seed=5,
        chunk=chunk,
    )
    onnx.checker.check_model(compiled, full_check=True)
    # The class predicted at x itself, in every copy.
    result = run(compiled, {"x": x, "target": np.array([2, -1, 1])})["x_attribution"]
    seed = np.eye(4)[[2, forward(source, x)[1].argmax(), 1]]
    terms = [OF[of](gradient(source, noisy, seed), noisy) for noisy in copies(x, 7, 0.3, 5)]
    close(result, moment(power, np.array(terms)), 1e-5)


def test_defaults(rng: np.random.Generator) -> None:
    source, x = mlp(rng), rng.standard_normal((2, 5)).astype(np.float32)
    seed = np.eye(4)[[3, 3]]
    expected = np.mean([gradient(source, noisy, seed) for noisy in copies(x, 25)], axis=0)
    compiled = onnx_attrib.compile(source, "smoothgrad", target=3)
    close(run(compiled, {"x": x})["x_attribution"], expected, 1e-5)
    again = run(onnx_attrib.compile(source, "smoothgrad", target=3, seed=1), {"x": x})
    assert np.abs(again["x_attribution"] - expected).max() > 1e-3


def test_without_noise_it_is_the_method(rng: np.random.Generator) -> None:
    source, x = mlp(rng), rng.standard_normal((2, 5)).astype(np.float32)
    smooth = onnx_attrib.compile(source, "smoothgrad", target=1, noise=0)
    plain = onnx_attrib.compile(source, "gradient", target=1)
    found = [run(m, {"x": x})["x_attribution"] for m in (smooth, plain)]
    close(found[0], found[1], 1e-6)
    none = onnx_attrib.compile(source, "smoothgrad", target=1, noise=0, power="variance")
    still = run(none, {"x": x})["x_attribution"]
    assert still.min() >= 0
    assert still.max() <= 1e-5 * np.abs(found[1]).max() ** 2


def test_a_constant_sample_has_no_noise(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = np.stack([np.full(5, 0.7), np.arange(5)]).astype(np.float32)
    seed = np.eye(4)[[0, 0]]
    result = run(onnx_attrib.compile(source, "smoothgrad", target=0), {"x": x})["x_attribution"]
    close(result[:1], gradient(source, x, seed)[:1], 1e-5)
    assert np.abs(result - gradient(source, x, seed))[1].max() > 1e-3


SWEEPS = next(o.choices for o in METHODS["smoothgrad"].options if o.name == "of")


def test_any_single_sweep() -> None:
    """Every method that differentiates once at x, and no other."""
    assert {"gradient", "saliency", "gradient-x-input", "guided-backprop", "epsilon-lrp"} <= set(
        SWEEPS
    )
    assert not set(SWEEPS) & {"deeplift", "deep-shap", "integrated-gradients", "smoothgrad"}
    own = {option.name for option in METHODS["smoothgrad"].options}
    for name in SWEEPS:
        assert not own & {option.name for option in METHODS[name].options}, name


@pytest.mark.parametrize("of", [n for n in SWEEPS if not n.startswith("pattern")])
def test_it_averages_the_method(rng: np.random.Generator, of: str) -> None:
    """One method at each noisy copy by itself, as it is compiled for one point."""
    shapes = {"w": (4, 2, 3, 3), "b": (4,), "d": (4, 3)}
    arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    source = text(
        """g (float[N, 2, 8, 8] x) => (float[N, 3] y)
        { c = Conv(x, w, b) r = Relu(c) p = MaxPool <kernel_shape = [2, 2]> (r)
          a = GlobalAveragePool(p) f = Flatten(a) y = MatMul(f, d) }""",
        **arrays,
    )
    x = rng.standard_normal((3, 2, 8, 8)).astype(np.float32)
    one = onnx_attrib.compile(source, of, target=2)
    expected = np.mean(
        [run(one, {"x": n.astype(np.float32)})["x_attribution"] for n in copies(x, 6)], axis=0
    )
    for chunk in (1, 4):
        smooth = onnx_attrib.compile(
            source, "smoothgrad", of=of.replace("-", "_"), target=2, samples=6, chunk=chunk
        )
        close(run(smooth, {"x": x})["x_attribution"], expected, 1e-5)


def test_options_of_the_averaged_method(rng: np.random.Generator) -> None:
    source, x = mlp(rng), rng.standard_normal((2, 5)).astype(np.float32)
    one = onnx_attrib.compile(source, "epsilon-lrp", target=2, epsilon=0.5)
    expected = np.mean(
        [run(one, {"x": n.astype(np.float32)})["x_attribution"] for n in copies(x, 5)], axis=0
    )
    compiled = onnx_attrib.compile(
        source, "smoothgrad", of="epsilon-lrp", epsilon=0.5, samples=5, target=2
    )
    close(run(compiled, {"x": x})["x_attribution"], expected, 1e-5)
    assert onnx_attrib.Explainer(compiled).options["epsilon"] == 0.5
    with pytest.raises(OptionError, match="no option 'epsilon'"):
        onnx_attrib.compile(source, "smoothgrad", epsilon=0.5)


def test_samples_do_not_depend_on_their_batch(rng: np.random.Generator) -> None:
    compiled = onnx_attrib.compile(mlp(rng), "smoothgrad", target=1, chunk=4, power="2")
    x = rng.standard_normal((7, 5)).astype(np.float32)
    together = run(compiled, {"x": x})["x_attribution"]
    for n in range(7):
        close(run(compiled, {"x": x[n : n + 1]})["x_attribution"], together[n : n + 1], 1e-6)


def test_several_inputs_and_an_inner_tensor(rng: np.random.Generator) -> None:
    """Each input has noise of its own; an inner tensor that follows from one has none."""
    source = text(
        """g (float[N, 4] a, float[N, 2, 3] b) => (float[N, 4] y) <int64[1] axes = {-1}>
        { s = ReduceSum <keepdims = 0> (b, axes) q = ReduceMean <keepdims = 1> (s, axes)
          h = Tanh(a) p = Mul(h, q) y = Softplus(p) }"""
    )
    a = rng.standard_normal((2, 4)).astype(np.float32)
    b = rng.standard_normal((2, 2, 3)).astype(np.float32)
    compiled = onnx_attrib.compile(
        source, "smoothgrad", inputs=["a", "b", "h"], target=1, samples=6, chunk=4
    )
    result = run(compiled, {"a": a, "b": b})
    sums = {"a": 0.0, "b": 0.0, "h": 0.0}
    for x, v in zip(copies(a, 6), copies(b, 6, place=1), strict=True):
        h, q = np.tanh(x)[:, 1], v.sum(2).mean(1)
        slope = 1 / (1 + np.exp(-h * q)) / 6
        picked = np.eye(4)[1]
        sums["h"] += (slope * q)[:, None] * picked
        sums["a"] += (slope * q * (1 - h**2))[:, None] * picked
        sums["b"] += np.broadcast_to((slope * h / 2)[:, None, None], b.shape)
    for name, total in sums.items():
        close(result[f"{name}_attribution"], np.asarray(total), 1e-5)


def test_where_the_batch_is_not_the_first_axis(rng: np.random.Generator) -> None:
    """The range of a sample is over its own entries, and samples have the same noise."""
    source = text("g (float[4, N] x) => (float[N, 4] y) { s = Tanh(x) y = Transpose(s) }")
    x = rng.standard_normal((4, 3)).astype(np.float32)
    compiled = onnx_attrib.compile(source, "smoothgrad", target=2, samples=5)
    expected = np.zeros((3, 4))
    expected[:, 2] = np.mean([1 - np.tanh(n[:, 2]) ** 2 for n in copies(x.T, 5)], axis=0)
    close(run(compiled, {"x": x})["x_attribution"], expected.T, 1e-5)


def test_without_a_batch_axis(rng: np.random.Generator) -> None:
    """Entries of one sample have noise of their own each."""
    source = text(
        "g (float[5] x) => (float[1, 5] y) <int64[1] a = {0}> { s = Tanh(x) y = Unsqueeze(s, a) }"
    )
    x = rng.standard_normal(5).astype(np.float32)
    compiled = onnx_attrib.compile(source, "smoothgrad", target="seed", samples=5)
    result = run(compiled, {"x": x, "seed": np.ones((1, 5), np.float32)})["x_attribution"]
    close(result, np.mean([1 - np.tanh(n[0]) ** 2 for n in copies(x[None], 5)], axis=0), 1e-5)


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_types(rng: np.random.Generator, kind: str) -> None:
    """Squares in 16 bits are summed in 32."""
    dtype = np.dtype({"float16": "f2", "double": "f8"}[kind])
    a = rng.standard_normal((5, 4)).astype(dtype)
    source = text(f"g ({kind}[N, 5] x) => ({kind}[N, 4] y) {{ h = MatMul(x, a) y = Tanh(h) }}", a=a)
    x = rng.standard_normal((2, 5)).astype(dtype)
    for power in (1, 2, "variance"):
        compiled = onnx_attrib.compile(source, "smoothgrad", target=1, power=power, samples=8)
        result = run(compiled, {"x": x})["x_attribution"]
        assert result.dtype == dtype
        wide = a.astype(np.float64)
        terms = [np.outer(1 - np.tanh(n @ wide[:, 1]) ** 2, wide[:, 1]) for n in copies(x, 8)]
        close(result, moment(power, np.array(terms)), 2e-2 if kind == "float16" else 1e-6)


def test_sizes_known_at_run_time(rng: np.random.Generator) -> None:
    w = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    body = """{ c = Conv(x, w) s = Sigmoid(c) a = GlobalAveragePool(s) y = Flatten(a) }"""
    x = rng.standard_normal((2, 3, 9, 7)).astype(np.float32)
    found = []
    for sizes in ("N, 3, H, W", "N, 3, 9, 7", "2, 3, 9, 7"):
        n = sizes.split(",")[0]
        source = text(f"g (float[{sizes}] x) => (float[{n}, 2] y) {body}", w=w)
        compiled = onnx_attrib.compile(source, "smoothgrad", target=1, samples=5, chunk=2)
        found.append(run(compiled, {"x": x})["x_attribution"])
    close(found[0], found[1])
    close(found[2], found[1])


def test_options(rng: np.random.Generator) -> None:
    source = mlp(rng)
    for options, message in (
        ({"of": "deeplift"}, "choose from: gradient"),
        ({"power": 3}, "choose from: 1, 2, variance"),
        ({"samples": 0}, "at least 1"),
        ({"noise": -1}, "at least 0"),
        ({"steps": 3}, "no option 'steps'"),
    ):
        with pytest.raises(OptionError, match=message):
            onnx_attrib.compile(source, "smoothgrad", **options)
    assert not METHODS["smoothgrad"].is_signed({"of": "gradient", "power": "2"})
    assert not METHODS["smoothgrad"].is_signed({"of": "saliency", "power": "1"})
    assert METHODS["smoothgrad"].is_signed({"of": "gradient", "power": "1"})


# -- Captum ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("of", ["gradient", "saliency", "gradient-x-input", "guided-backprop"])
def test_captum(monkeypatch: pytest.MonkeyPatch, draw: int, kind: str, of: str) -> None:
    """Captum's NoiseTunnel, which is handed the same noise."""
    torch = pytest.importorskip("torch")
    attr = pytest.importorskip("captum.attr")
    pytest.importorskip("onnxscript")
    from . import zoo

    torch.manual_seed(draw)
    rng = np.random.default_rng(draw)
    hidden, size = int(rng.integers(4, 9)), int(rng.integers(8, 13))
    nn = torch.nn
    module = nn.Sequential(
        nn.Conv2d(3, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(hidden, hidden, 3),
        nn.Softplus() if of != "guided-backprop" else nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(hidden, 5),
    ).eval()
    x = rng.standard_normal((2, 3, size, size)).astype(np.float32)
    source = zoo.export(module, torch.from_numpy(x), "dynamo")
    power = {"smoothgrad": 1, "smoothgrad_sq": 2, "vargrad": "variance"}[kind]
    compiled = onnx_attrib.compile(
        source, "smoothgrad", of=of, power=power, target=3, samples=6, noise=0.2, chunk=4
    )
    result = run(compiled, {"x": x})["x_attribution"]
    tunnel = {
        "gradient": attr.Saliency,
        "saliency": attr.Saliency,
        "gradient-x-input": attr.InputXGradient,
        "guided-backprop": attr.GuidedBackprop,
    }[of](module)
    more = {"abs": of == "saliency"} if of in ("gradient", "saliency") else {}
    # All copies of a sample one after the other.
    drawn = np.swapaxes(copies(x, 6, 0.2) - x, 0, 1).reshape(-1, *x.shape[1:])
    monkeypatch.setattr(torch, "normal", lambda mean, std: torch.from_numpy(drawn.astype("f")))
    expected = attr.NoiseTunnel(tunnel).attribute(
        torch.from_numpy(x), nt_type=kind, nt_samples=6, target=3, **more
    )
    close(result, expected.detach().numpy(), 1e-4)
