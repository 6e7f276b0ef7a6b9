"""PatternNet and PatternAttribution, and the estimation of patterns.

The estimator and both backward passes are restated here neuron by neuron from Kindermans et al.
2017: a₊ = (E₊[x y] − E₊[x] E[y]) / (wᵀE₊[x y] − wᵀE₊[x] E[y]), with y = wᵀx + b.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, helper
from onnx.numpy_helper import from_array

import onnx_attrib
from onnx_attrib import CompileError, OptionError
from onnx_attrib.cli import main

from .numeric import Array, run

DIGITS = Path(__file__).parents[1] / "models"


def estimated(x: Array, w: Array, y: Array) -> Array:
    """a₊ of one neuron: ``x`` [samples, inputs], ``w`` [inputs], ``y`` [samples]."""
    x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    on = y > 0
    if not on.any():
        return np.zeros_like(w)
    rise = (x[on] * y[on, None]).mean(0) - x[on].mean(0) * y.mean()
    length = w @ rise
    return rise / length if length else np.zeros_like(w)


def patches(x: Array, kernel: tuple[int, int], stride: int, pad: int, group: int) -> Array:
    """[N, C, H, W] → [N, positions, groups, C/g · kh · kw], zero-padded."""
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    n, _, h, w = x.shape
    rows = range(0, h - kernel[0] + 1, stride)
    columns = range(0, w - kernel[1] + 1, stride)
    cut = [x[:, :, i : i + kernel[0], j : j + kernel[1]] for i in rows for j in columns]
    return np.stack(cut, 1).reshape(n, len(cut), group, -1)


def model_of(nodes: list[onnx.NodeProto], weights: dict[str, Array], x: list[object]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, x)],
        [helper.make_tensor_value_info("y", 1, None)],
        [from_array(np.asarray(a, np.float32), k) for k, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def dense(rng: np.random.Generator) -> tuple[ModelProto, dict[str, Array]]:
    """Three dense layers, spelled in three ways."""
    weights = {
        "w1": rng.normal(size=(6, 8)),
        "b1": rng.normal(size=8),
        "w2": rng.normal(size=(5, 8)),
        "b2": rng.normal(size=(1, 5)),
        "w3": rng.normal(size=(5, 3)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["z1"]),
        helper.make_node("Add", ["z1", "b1"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["h1"]),
        helper.make_node("Gemm", ["h1", "w2", "b2"], ["a2"], transB=1),
        helper.make_node("Relu", ["a2"], ["h2"]),
        helper.make_node("Gemm", ["h2", "w3"], ["y"], alpha=0.5),
    ]
    return model_of(nodes, weights, ["N", 6]), weights


def forward(w: dict[str, Array], x: Array) -> list[Array]:
    a1 = x @ w["w1"] + w["b1"]
    a2 = np.maximum(a1, 0) @ w["w2"].T + w["b2"]
    return [a1, a2, 0.5 * np.maximum(a2, 0) @ w["w3"]]


def test_dense_layers(rng: np.random.Generator) -> None:
    model, w = dense(rng)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    a1, a2, y = forward(w, np.float64(x))
    h1, h2 = np.maximum(a1, 0), np.maximum(a2, 0)
    wanted = {
        "w1": np.stack([estimated(x, w["w1"][:, k], a1[:, k]) for k in range(8)], 1),
        "w2": np.stack([estimated(h1, w["w2"][k], a2[:, k]) for k in range(5)]),
        # With the factor, the layer's weight is half of what the initializer holds.
        "w3": np.stack([estimated(h2, 0.5 * w["w3"][:, k], y[:, k]) for k in range(3)], 1),
    }
    found = onnx_attrib.fit_patterns(model, x, batch=7)
    assert set(found) == set(wanted)
    for name, pattern in wanted.items():
        np.testing.assert_allclose(found[name], pattern, rtol=1e-3, atol=1e-4 * abs(pattern).max())
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("method", ["pattern-net", "pattern-attribution"])
def test_backward_through_dense_layers(method: str, rng: np.random.Generator) -> None:
    model, w = dense(rng)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    p = {k: rng.normal(size=w[k].shape).astype(np.float32) for k in ("w1", "w2", "w3")}
    target = rng.integers(3, size=4)
    a1, a2, y = forward(w, np.float64(x))
    net = method == "pattern-net"
    back = {k: p[k] * (1.0 if net else w[k] * (0.5 if k == "w3" else 1.0)) for k in p}
    value = np.eye(3)[target] * y
    value = (value @ back["w3"].T) * (a2 > 0)
    value = (value @ back["w2"]) * (a1 > 0)
    value = value @ back["w1"].T
    compiled = onnx_attrib.compile(model, method, patterns=p)
    found = run(compiled, {"x": x, "target": target})["x_attribution"]
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-4 * abs(value).max())


@pytest.mark.parametrize(("group", "stride", "pad"), [(1, 1, 1), (2, 2, 0), (4, 1, 1)])
def test_convolution_with_normalization_and_pool(
    group: int, stride: int, pad: int, rng: np.random.Generator
) -> None:
    w = rng.normal(size=(8, 4 // group, 3, 3))
    gain, shift, mean = rng.normal(size=(3, 8))
    variance = rng.uniform(0.5, 2, size=8)
    weights = {"w": w, "g": gain, "s": shift, "m": mean, "v": variance}
    conv = {"group": group, "strides": [stride] * 2, "pads": [pad] * 4}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], **conv),
        helper.make_node("BatchNormalization", ["z", "g", "s", "m", "v"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("GlobalMaxPool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    model = model_of(nodes, weights, ["N", 4, 7, 7])
    x = rng.normal(size=(20, 4, 7, 7)).astype(np.float32)
    a = run(
        model_of([*nodes[:2], helper.make_node("Identity", ["a"], ["y"])], weights, [20, 4, 7, 7]),
        {"x": x},
    )["y"]
    merged = w * (gain / np.sqrt(variance + 1e-5))[:, None, None, None]
    cut = patches(x, (3, 3), stride, pad, group)
    rows = a.reshape(20, 8, -1).transpose(0, 2, 1).reshape(-1, 8)
    wanted = np.stack(
        [
            estimated(
                cut[:, :, k // (8 // group)].reshape(len(rows), -1), merged[k].ravel(), rows[:, k]
            ).reshape(w.shape[1:])
            for k in range(8)
        ]
    )
    found = onnx_attrib.fit_patterns(model, x, batch=6)["w"]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4 * abs(wanted).max())
    # wᵀa = 1 for every neuron that is ever positive.
    alive = (rows > 0).any(0)
    np.testing.assert_allclose((merged * found).sum((1, 2, 3)), alive, atol=1e-3)

    # Back from the winner of the pool: y · pattern at the winner's patch, if the ReLU is open.
    compiled = onnx_attrib.compile(model, "pattern-net", patterns={"w": found}, target=3)
    result = run(compiled, {"x": x[:3]})
    signal = np.zeros((3, 4, 7 + 2 * pad, 7 + 2 * pad))
    size = a.shape[-1]
    for n in range(3):
        i, j = divmod(int(a[n, 3].argmax()), size)
        first = 3 // (8 // group) * (4 // group)
        if a[n, 3].max() > 0:
            place = signal[n, first : first + 4 // group, i * stride : i * stride + 3]
            place[:, :, j * stride : j * stride + 3] += a[n, 3].max() * found[3]
    signal = signal[:, :, pad : 7 + pad, pad : 7 + pad]
    np.testing.assert_allclose(result["x_attribution"], signal, atol=1e-4 * abs(signal).max())


def test_the_papers_linear_example(rng: np.random.Generator) -> None:
    """x = s·y + d·ε with s = (1, 0) and d = (1, 1): the weight is (1, −1), the pattern (1, 0)."""
    y, noise = rng.uniform(0.5, 2, size=(2, 5000))
    x = np.outer(y, [1, 0]) + np.outer(noise - noise.mean(), [1, 1])
    weights = {"w": np.array([[1.0], [-1.0]])}
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], weights, ["N", 2])
    found = onnx_attrib.fit_patterns(model, x.astype(np.float32))["w"]
    np.testing.assert_allclose(found, [[1], [0]], atol=0.05)


def test_batches_make_no_difference(rng: np.random.Generator) -> None:
    model, _ = dense(rng)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    whole, parts = (onnx_attrib.fit_patterns(model, x, batch=size) for size in (50, 3))
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-3, atol=1e-4)


def test_shared_weights_pool_their_statistics(rng: np.random.Generator) -> None:
    w = rng.normal(size=(4, 4))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    x = rng.normal(size=(40, 4)).astype(np.float32)
    a = np.float64(x) @ w
    inputs = np.concatenate([x, np.maximum(a, 0)])
    outputs = np.concatenate([a, np.maximum(a, 0) @ w])
    wanted = np.stack([estimated(inputs, w[:, k], outputs[:, k]) for k in range(4)], 1)
    found = onnx_attrib.fit_patterns(model_of(nodes, {"w": w}, ["N", 4]), x)["w"]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4 * abs(wanted).max())


def test_transposed_weights_come_back_in_the_initializers_layout(rng: np.random.Generator) -> None:
    w = rng.normal(size=(24, 60))
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    model = model_of(nodes, {"w": w}, ["N", 60])
    x = rng.normal(size=(90, 60)).astype(np.float32)
    y = np.float64(x) @ w.T
    wanted = np.stack([estimated(x, w[k], y[:, k]) for k in range(24)])
    found = onnx_attrib.fit_patterns(model, x)
    np.testing.assert_allclose(found["w"], wanted, rtol=2e-3, atol=1e-4 * abs(wanted).max())
    compiled = onnx_attrib.compile(model, "pattern-net", patterns=found, target=1)
    back = run(compiled, {"x": x[:2]})["x_attribution"]
    np.testing.assert_allclose(back, y[:2, 1:2] * wanted[1], rtol=2e-3, atol=1e-3)


def test_a_neuron_that_is_never_positive(rng: np.random.Generator) -> None:
    w = np.array([[1.0, 1.0], [2.0, -1.0]])
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    model = model_of(nodes, {"w": w, "b": np.array([0.0, -100.0])}, ["N", 2])
    x = rng.normal(size=(30, 2)).astype(np.float32)
    found = onnx_attrib.fit_patterns(model, x)["w"]
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, 1], 0)
    assert abs(found[:, 0] @ w[:, 0] - 1) < 1e-3


def test_what_is_refused(rng: np.random.Generator) -> None:
    model, w = dense(rng)
    p = {k: w[k].astype(np.float32) for k in ("w1", "w2", "w3")}
    with pytest.raises(OptionError, match="needs 'patterns'"):
        onnx_attrib.compile(model, "pattern-net")
    with pytest.raises(OptionError, match="lack those of 'w2', 'w3'"):
        onnx_attrib.compile(model, "pattern-net", patterns={"w1": p["w1"]})
    with pytest.raises(OptionError, match=r"'w2' has shape \[8, 5\]; its weight has \[5, 8\]"):
        onnx_attrib.compile(model, "pattern-net", patterns={**p, "w2": p["w2"].T})
    with pytest.raises(OptionError, match="no file of patterns"):
        onnx_attrib.compile(model, "pattern-net", patterns="nowhere.npz")
    with pytest.raises(OptionError, match="not finite"):
        onnx_attrib.compile(model, "pattern-net", patterns={**p, "w3": p["w3"] * np.nan})
    plain = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, ["N", 3])
    with pytest.raises(CompileError, match="no layer with weights"):
        onnx_attrib.fit_patterns(plain, np.ones((2, 3), np.float32))
    with pytest.raises(OptionError, match="model takes"):
        onnx_attrib.fit_patterns(model, np.ones((2, 3, 4), np.float32))
    with pytest.raises(OptionError, match="no sample"):
        onnx_attrib.fit_patterns(model, np.ones((0, 6), np.float32))


class Counting:
    """Samples that are made when they are asked for, and never all at once."""

    def __init__(self, count: int) -> None:
        self.count, self.largest = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Array:
        size = part.stop - part.start
        self.largest = max(self.largest, size)
        return np.random.default_rng(part.start).normal(size=(size, 6)).astype(np.float32)


def test_data_is_read_part_by_part(rng: np.random.Generator) -> None:
    samples = Counting(1000)
    seen: list[tuple[int, int]] = []
    onnx_attrib.fit_patterns(
        dense(rng)[0],
        {"x": samples},
        batch=64,
        progress=lambda done, whole: seen.append((done, whole)),
    )
    assert samples.largest == 64
    assert seen[-1] == (1000, 1000)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(inside: Path) -> None:
    held = np.load(DIGITS / "mnist_digits.npz")["images"]
    np.save(inside / "digits.npy", held)
    source = str(DIGITS / "mnist_mlp.onnx")
    scaled = ["--preset", "minus-one-one", "-o", "p.npz"]
    done = CliRunner().invoke(main, ["fit-patterns", source, "--data", "digits.npy", *scaled])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("p.npz: 3 layers from 100 samples")
    wanted = onnx_attrib.fit_patterns(source, (held / 127.5 - 1).astype(np.float32)[:, None])
    with np.load("p.npz") as patterns:
        assert set(patterns.files) == set(wanted)
        for name, pattern in wanted.items():
            np.testing.assert_allclose(patterns[name], pattern, rtol=1e-3, atol=1e-3)
    arguments = ["--method", "pattern_attribution", "--option", "patterns=p.npz", "-o", "c.onnx"]
    done = CliRunner().invoke(main, ["compile", source, *arguments])
    assert done.exit_code == 0, done.output
    result = onnx_attrib.Explainer("c.onnx")((held[3] / 127.5 - 1).astype(np.float32))
    assert np.isfinite(result.attributions["image"]).all()
    assert abs(result.attributions["image"]).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npy"], "No such file"),
        (["--data", "digits.npy", "-o", "p.txt"], "writes .npz files"),
        (["--data", "imag=digits.npy"], "image"),
        (["--data", "digits.npy", "--scale", "1,2"], "--scale is one number"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, inside: Path) -> None:
    np.save(inside / "digits.npy", np.zeros((2, 28, 28), np.uint8))
    done = CliRunner().invoke(main, ["fit-patterns", str(DIGITS / "mnist_mlp.onnx"), *arguments])
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output
