"""Integrated gradients in the graph: quadratures, chunks, loops, layers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_attrib
from onnx_attrib.methods.path import quadrature
from onnx_attrib.passes import stack

from .test_contract import close, difference, forward, gradient, mlp, rng, run, text, weights

__all__ = ["rng"]

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
    compiled = onnx_attrib.compile(mlp(rng), "integrated-gradients", steps=50, chunk=5)
    (loop,) = [node for node in compiled.graph.node if node.op_type == "Loop"]
    trips = {t.name: onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer}
    assert trips[loop.input[0]] == 10
    assert len(compiled.graph.initializer) == len({t.name for t in compiled.graph.initializer})


CNN = """g (float[N, 3, 8, 8] x) => (float[N, 4] y)
    { c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(c) e = Conv(r, v) s = Sigmoid(e)
      a = GlobalAveragePool(s) f = Flatten(a) y = MatMul(f, d) }"""


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("steps", "chunk"), [(12, 4), (10, 4), (7, 1)])
def test_groups_of_convolutions_are_spelled_out(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    chunk: int,
    delta: bool,
) -> None:
    """A few groups, one after the other, give what a Loop over them does."""
    shapes = {"w": (5, 3, 3, 3), "v": (6, 5, 3, 3), "d": (6, 4)}
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    source = text(CNN, **arrays)
    x = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)
    found, loops = [], []
    for most in (stack._SPELLED, 0):
        monkeypatch.setattr(stack, "_SPELLED", most)
        compiled = onnx_attrib.compile(
            source,
            "integrated-gradients",
            baseline="input",
            steps=steps,
            chunk=chunk,
            target=1,
            delta=delta,
        )
        loops.append(sum(node.op_type == "Loop" for node in compiled.graph.node))
        found.append(run(compiled, {"x": x, "x_baseline": 0.5 * x[:1]}))
        # Many groups are a Loop again.
        more = onnx_attrib.compile(source, "integrated-gradients", steps=300, chunk=1)
        assert any(node.op_type == "Loop" for node in more.graph.node)
    assert loops == [0, 1]
    close(found[0]["x_attribution"], found[1]["x_attribution"], 2e-6)
    if delta:
        np.testing.assert_allclose(*(one["convergence_delta"] for one in found), atol=1e-6)
