"""Integrated gradients in the graph: quadratures, chunks, loops, layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_attrib
from onnx_attrib.compiler import prepare
from onnx_attrib.methods.path import quadrature
from onnx_attrib.passes import average
from onnx_attrib.passes.opening import opening

from .test_contract import close, difference, forward, gradient, mlp, run, text, weights

RULES = ["gauss-legendre", "trapezoid", "middle", "left", "right"]


def expected(
    source: onnx.ModelProto,
    x: np.ndarray,
    base: np.ndarray,
    seed: np.ndarray,
    rule: str,
    steps: int,
) -> np.ndarray:
    """Integrated gradients of ``mlp``, point by point in float64, from the rules' definitions."""
    if rule == "gauss-legendre":
        nodes, weight = np.polynomial.legendre.leggauss(steps)
        nodes, weight = (nodes + 1) / 2, weight / 2
    elif rule == "trapezoid":
        nodes = np.linspace(0, 1, steps)
        weight = np.array([0.5, *[1.0] * (steps - 2), 0.5]) / (steps - 1)
    else:
        shift = {"left": 0, "middle": 0.5, "right": 1}[rule]
        nodes, weight = (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)
    step = x.astype(np.float64) - base
    total = sum(
        w * gradient(source, base + a * step, seed) for a, w in zip(nodes, weight, strict=True)
    )
    return step * total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("steps", "chunk"), [(7, 3), (7, 1), (7, 50), (12, 4)])
def test_quadratures_and_chunks(
    rng: np.random.Generator, rule: str, steps: int, chunk: int
) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    compiled = onnx_attrib.compile(
        source,
        "integrated-gradients",
        baseline="input",
        steps=steps,
        chunk=chunk,
        quadrature=rule,
    )
    onnx.checker.check_model(compiled, full_check=True)
    result = run(compiled, {"x": x, "x_baseline": base, "target": np.array([2, 0, 1])})
    seed = np.eye(4)[[2, 0, 1]]
    close(result["x_attribution"], expected(source, x, base, seed, rule, steps), 2e-6)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_fixed_batch_runs_point_by_point(rng: np.random.Generator, batch: str) -> None:
    source = mlp(rng, batch)
    x = rng.standard_normal((int(batch), 5)).astype(np.float32)
    compiled = onnx_attrib.compile(source, "integrated-gradients", target=1, steps=9, delta=True)
    result = run(compiled, {"x": x})
    seed = np.eye(4)[[1] * int(batch)]
    want = expected(source, x, np.zeros(5), seed, "gauss-legendre", 9)
    close(result["x_attribution"], want, 2e-6)
    assert np.abs(result["convergence_delta"]).max() < 1e-4


def test_batch_mixed_with_another_axis(rng: np.random.Generator) -> None:
    """A Reshape to [N · T, C] keeps points from being stacked; the result is the same."""
    a = rng.standard_normal((5, 4)).astype(np.float32)
    source = text(
        """g (float[N, 6, 5] x) => (float[N, 6, 4] y)
        <int64[2] flat = {-1, 5}, int64[3] back = {-1, 6, 4}>
        { r = Reshape(x, flat) h = MatMul(r, a) t = Tanh(h) y = Reshape(t, back) }""",
        a=a,
    )
    x = rng.standard_normal((2, 6, 5)).astype(np.float32)
    for method in ("integrated-gradients", "deeplift"):
        compiled = onnx_attrib.compile(source, method, target=(3, 2), baseline=0.25, delta=True)
        result = run(compiled, {"x": x})
        change = np.tanh(x @ a) - np.tanh(0.25 * a.sum(0))
        close(result["x_attribution"].sum((1, 2)), change[:, 3, 2], 1e-5)
        assert np.abs(result["convergence_delta"]).max() < 1e-5


def test_other_inputs_stay_at_their_values(rng: np.random.Generator) -> None:
    source = text(
        "g (float[N, 4] a, float[N, 4] b) => (float[N, 4] y) { p = Mul(a, b) y = Tanh(p) }"
    )
    feeds = {k: rng.standard_normal((3, 4)).astype(np.float32) for k in "ab"}
    compiled = onnx_attrib.compile(source, "integrated-gradients", inputs=["a"], target=2, chunk=7)
    result = run(compiled, feeds)["a_attribution"]
    close(result.sum(1), np.tanh(feeds["a"] * feeds["b"])[:, 2], 1e-5)


def test_layer(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    compiled = onnx_attrib.compile(
        source, "integrated-gradients", inputs=["k"], target=1, baseline="input", delta=True
    )
    result = run(compiled, {"x": x, "x_baseline": base[:1]})
    close(result["k_attribution"].sum(1), difference(source, x, base[:1], 1), 1e-5)
    w = weights(source)
    step = (x - base[:1]) @ w["a"]
    assert result["k_attribution"].shape == step.shape
    assert np.abs(result["convergence_delta"]).max() < 1e-5


@pytest.mark.parametrize("method", ["deeplift", "integrated-gradients", "occlusion"])
def test_layer_reshaped_by_a_shape_from_before_it(rng: np.random.Generator, method: str) -> None:
    """A shape computed before the layer holds the model's own batch: no other fits behind it."""
    arrays = {
        k: rng.standard_normal(v).astype(np.float32) for k, v in {"a": (5, 6), "c": (6, 4)}.items()
    }
    source = text(
        """g (float[N, 5] x) => (float[N, 4] y)
        <int64[1] zero = {0}, int64[1] rest = {-1}, int64[3] wide = {0, 2, 3}> {
            k = MatMul(x, a) h = Reshape(k, wide) s = Shape(x) n = Gather(s, zero)
            q = Concat<axis = 0>(n, rest) f = Reshape(h, q) y = MatMul(f, c)
        }""",
        **arrays,
    )
    x = rng.standard_normal((3, 5)).astype(np.float32)
    compiled = onnx_attrib.compile(source, method, inputs=["h"], target=1, baseline=0.5)
    want = (x @ arrays["a"] - 0.5) * arrays["c"][:, 1]
    close(run(compiled, {"x": x})["h_attribution"], want.reshape(3, 2, 3))


def test_argmax_target_is_that_of_the_input(rng: np.random.Generator) -> None:
    """The explained class is the one predicted at x, all along the path."""
    source = mlp(rng)
    x = rng.standard_normal((8, 5)).astype(np.float32)
    compiled = onnx_attrib.compile(source, "integrated-gradients", target="argmax")
    chosen = forward(source, x).argmax(1)
    want = expected(source, x, np.zeros(5), np.eye(4)[chosen], "gauss-legendre", 50)
    close(run(compiled, {"x": x})["x_attribution"], want, 2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_weights_integrate_one(rule: str) -> None:
    points, weight = quadrature(rule, 17)
    assert weight.sum() == pytest.approx(1)
    assert ((points >= 0) & (points <= 1)).all()


def test_trapezoid_needs_both_ends(rng: np.random.Generator) -> None:
    with pytest.raises(onnx_attrib.OptionError, match="both ends"):
        onnx_attrib.compile(mlp(rng), "integrated-gradients", quadrature="trapezoid", steps=1)


def test_memory_is_one_chunk(rng: np.random.Generator) -> None:
    """Points are stacked only ``chunk`` at a time: the rest is a Loop."""
    compiled = onnx_attrib.compile(
        mlp(rng), "integrated-gradients", steps=50, chunk=5, provider="cuda"
    )
    (loop,) = [node for node in compiled.graph.node if node.op_type == "Loop"]
    trips = {t.name: onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer}
    assert trips[loop.input[0]] == 10
    assert len(compiled.graph.initializer) == len({t.name for t in compiled.graph.initializer})


@pytest.mark.parametrize("method", ["integrated-gradients", "smoothgrad", "deep-shap"])
def test_groups_of_a_batch_have_fewer_points(method: str, rng: np.random.Generator) -> None:
    """Some sixteen evaluations are made together, whatever the batch."""
    draws, source, options = 23, mlp(rng), {}
    if method == "deep-shap":
        options["baseline"] = rng.standard_normal((draws, 5)).astype(np.float32)
    else:
        options["steps" if method == "integrated-gradients" else "samples"] = draws
    known = {"target": "argmax", **options}
    compiled = onnx_attrib.compile(source, method, chunk=5, **known)
    (loop,) = [node for node in compiled.graph.node if node.op_type == "Loop"]
    compiled.graph.output.append(onnx.helper.make_tensor_value_info(loop.input[0], 7, []))
    whole = onnx_attrib.compile(source, method, chunk=draws, **known)
    for batch, each in {1: 5, 3: 5, 4: 4, 6: 3, 9: 2, 20: 1}.items():
        x = rng.standard_normal((batch, 5)).astype(np.float32)
        found = run(compiled, {"x": x})
        assert found[loop.input[0]] == -(-draws // each)
        close(found["x_attribution"], run(whole, {"x": x})["x_attribution"], 2e-6)


CNN = """g (float[N, 3, 8, 8] x) => (float[N, 4] y)
    { c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(c) e = Conv(r, v) s = Sigmoid(e)
      a = GlobalAveragePool(s) f = Flatten(a) y = MatMul(f, d) }"""


def convolutions(rng: np.random.Generator) -> onnx.ModelProto:
    shapes = {"w": (16, 3, 3, 3), "v": (32, 16, 3, 3), "d": (32, 4)}
    return text(CNN, **{k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()})


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("steps", "chunk"), [(12, 4), (10, 4), (7, 1)])
def test_groups_of_convolutions(
    rng: np.random.Generator, steps: int, chunk: int, delta: bool
) -> None:
    """A Loop over groups gives what all points at once do."""
    source = convolutions(rng)
    x = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)
    found = []
    for size in (chunk, steps):
        compiled = onnx_attrib.compile(
            source,
            "integrated-gradients",
            baseline="input",
            steps=steps,
            chunk=size,
            target=1,
            delta=delta,
        )
        onnx.checker.check_model(compiled, full_check=True)
        loops = sum(node.op_type == "Loop" for node in compiled.graph.node)
        assert loops == (size < steps)
        found.append(run(compiled, {"x": x, "x_baseline": 0.5 * x[:1]}))
    close(found[0]["x_attribution"], found[1]["x_attribution"], 2e-6)
    if delta:
        np.testing.assert_allclose(*(one["convergence_delta"] for one in found), atol=1e-6)


@pytest.mark.parametrize("method", ["integrated-gradients", "smoothgrad", "occlusion"])
def test_convolutions_of_groups_are_in_blocks(
    rng: np.random.Generator, tmp_path: Path, method: str
) -> None:
    """ONNX Runtime lays out what is in the Loop as what is around it, in blocks or not."""
    options = {"window": "3,2,2"} if method == "occlusion" else {}
    compiled = onnx_attrib.compile(convolutions(rng), method, target="argmax", chunk=1, **options)
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "m.onnx")
    settings.log_severity_level = 4
    ort.InferenceSession(compiled.SerializeToString(), settings, ["CPUExecutionProvider"])
    outer = onnx.load(tmp_path / "m.onnx").graph.node
    layouts = {node.domain for node in outer if node.op_type == "Conv"}
    assert len(layouts) == 1
    (body,) = (node.attribute[0].g for node in outer if node.op_type == "Loop")
    convolved = [node for node in body.node if node.op_type == "Conv"]
    assert {node.domain for node in convolved} == layouts
    # The weights are in the file once.
    weights = [t for t in compiled.graph.initializer if len(t.dims) == 4]
    assert len(weights) == 2


# -- what is linear in x, at the model's beginning -------------------------------------------------

OPENINGS = {
    "stem": CNN,
    "several inputs": """g (float[N, 5] a, float[N, 3] b) => (float[N, 4] y)
        { p = MatMul(a, v) q = MatMul(b, w) s = Add(p, q) t = Tanh(s)
          u = MatMul(t, d) r = Sigmoid(p) y = Mul(u, r) }""",
    "a way around": """g (float[N, 5] a) => (float[N, 5] y)
        { p = MatMul(a, v) s = Sin(a) t = Mul(p, s) y = Tanh(t) }""",
    "a mask of x": """g (float[N, 5] a) => (float[N, 4] y) <float zero = {0.0}>
        { g = Greater(a, zero) m = Cast<to = 1>(g) k = Mul(a, m) p = MatMul(k, v) y = Tanh(p) }""",
    "moved": """g (float[N, 2, 6] a) => (float[N, 4] y) <int64[2] flat = {0, -1}>
        { t = Transpose<perm = [0, 2, 1]>(a) p = MatMul(t, v) r = Reshape(p, flat)
          e = Exp(r) y = MatMul(e, d) }""",
    "all of it": """g (float[N, 5] a) => (float[N, 4] y) { p = MatMul(a, v) y = Neg(p) }""",
}
SHAPES = {
    "stem": {"w": (16, 3, 3, 3), "v": (32, 16, 3, 3), "d": (32, 4)},
    "several inputs": {"v": (5, 4), "w": (3, 4), "d": (4, 4)},
    "a way around": {"v": (5, 5)},
    "a mask of x": {"v": (5, 4)},
    "moved": {"v": (2, 3), "d": (18, 4)},
    "all of it": {"v": (5, 4)},
}


def convolved(model: onnx.ModelProto) -> int:
    """How many convolutions the Loop over groups has."""
    bodies = [node.attribute[0].g for node in model.graph.node if node.op_type == "Loop"]
    return sum(node.op_type in ("Conv", "ConvTranspose") for b in bodies for node in b.node)


@pytest.mark.parametrize("method", ["integrated-gradients", "smoothgrad", "saliency"])
@pytest.mark.parametrize("name", OPENINGS)
def test_an_opening_is_passed_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """The transposed map of what is linear takes the mean, once: with the same result."""
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in SHAPES[name].items()}
    source = text(OPENINGS[name], **arrays)
    options: dict[str, Any] = {"steps": 6, "baseline": 0.25}
    if method != "integrated-gradients":
        options = {"samples": 6, "of": "gradient" if method == "smoothgrad" else method}
    feeds = {
        info.name: rng.standard_normal(
            [dim.dim_value or 3 for dim in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in source.graph.input
    }
    found, counts = [], []
    for find in (opening, lambda job: None):
        monkeypatch.setattr(average, "opening", find)
        compiled = onnx_attrib.compile(
            source,
            method if method == "integrated-gradients" else "smoothgrad",
            target=1,
            chunk=2,
            **options,
        )
        counts.append(convolved(compiled))
        found.append(run(compiled, feeds))
    for tensor in feeds:
        close(*(one[f"{tensor}_attribution"] for one in found), 2e-6)
    # The absolute values of saliency are averaged, not multipliers.
    assert counts[1] - counts[0] == (name == "stem" and method != "saliency")


@pytest.mark.parametrize("name", OPENINGS)
def test_openings(rng: np.random.Generator, name: str) -> None:
    """Up to where a nonlinearity, or a product of two, reads what is linear."""
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in SHAPES[name].items()}
    job = prepare(text(OPENINGS[name], **arrays), "integrated-gradients", steps=2)
    found = opening(job.parts[0])
    if name == "a mask of x":  # which changes on the path
        assert found is None
        return
    assert found is not None
    ends = {"stem": "c", "several inputs": "sp", "a way around": "pa", "moved": "r"}
    assert {t.name for t in found.ends} == set(ends.get(name, "y"))


def test_a_large_opening_stays(rng: np.random.Generator) -> None:
    """Averaging many times the input's entries would cost more than the layer."""
    arrays = {"w": (60, 3, 3, 3), "v": (8, 60, 3, 3), "d": (8, 4)}
    source = text(CNN, **{k: rng.standard_normal(v).astype(np.float32) for k, v in arrays.items()})
    job = prepare(source, "integrated-gradients", steps=2)
    assert opening(job.parts[0]) is None
