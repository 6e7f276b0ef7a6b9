"""Shapley value sampling in the graph: against all orders of few features."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest

import onnx_attrib

from .perturbation_reference import (
    compiled_and_checked,
    scored,
    session,
    shapley,
    windows,
)
from .test_contract import close, mlp, run, text


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_shapley_values(rng: np.random.Generator, chunk: int) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    compiled = compiled_and_checked(
        source, "shapley-sampling", target=1, baseline="input", samples=300, chunk=chunk, delta=True
    )
    given = run(compiled, {"x": x, "x_baseline": base})
    score = scored(source, np.eye(4)[[1] * 3])
    want = shapley(score, x, base, [(slice(i, i + 1),) for i in range(5)])
    assert np.abs(given["convergence_delta"]).max() < 1e-5
    assert np.abs(given["x_attribution"] - want).max() < 0.1 * np.abs(want).max()


def test_one_order_is_marginal_contributions(rng: np.random.Generator) -> None:
    """With one sample the attributions are the changes along one of the orders, exactly."""
    source = mlp(rng)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    held = session(source)
    found = set()
    for seed in range(4):
        compiled = onnx_attrib.compile(source, "shapley-sampling", target=0, samples=1, seed=seed)
        given = run(compiled, {"x": x})["x_attribution"]
        fitting = []
        for order in itertools.permutations(range(5)):
            there, want = x.copy(), np.zeros(x.shape)
            before = held.run(None, {"x": there})[0][:, 0]
            for i in order:
                there[:, i] = 0
                after = held.run(None, {"x": there})[0][:, 0]
                want[:, i] = before - after
                before = after
            fitting += [order] if np.abs(given - want).max() < 1e-5 else []
        assert len(fitting) == 1
        found.add(fitting[0])
    assert len(found) > 1, "the seed makes no difference"


def test_orders_are_uniform(rng: np.random.Generator) -> None:
    """The first and last of three features, told by a model that sees who is left."""
    source = text(
        """g (float[N, 3] x) => (float[N, 1] y) <int64[1] k = {1}>
        { y = ReduceProd<keepdims = 1>(x, k) }"""
    )
    compiled = onnx_attrib.compile(source, "shapley-sampling", samples=6000, chunk=500)
    given = run(compiled, {"x": np.ones((1, 3), np.float32)})["x_attribution"]
    # The product changes with whatever goes first: a third of the orders each, ± 4 σ.
    np.testing.assert_allclose(given, 1 / 3, atol=4 * math.sqrt(2 / 9 / 6000))


def test_runs_repeat_and_seeds_differ(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    values = [
        run(onnx_attrib.compile(source, "shapley-sampling", target=0, samples=9, **o), {"x": x})
        for o in ({}, {"chunk": 3}, {"seed": 1})
    ]
    first, again, other = (v["x_attribution"] for v in values)
    close(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("shape", ["N, 2, 3, 5", "N, 2, H, W"])
def test_patches(rng: np.random.Generator, shape: str) -> None:
    """A patch is one feature; its value is split evenly among its entries."""
    source = text(
        f"""g (float[{shape}] x) => (float[N, 1] y) <int64[3] k = {{1, 2, 3}}>
        {{ s = Sin(x) p = ReduceSum<keepdims = 0>(s, k) t = Tanh(p) u = Unsqueeze(t, z)
        y = Identity(u) }}""",
        z=np.array([1]),
    )
    x = (0.5 * rng.standard_normal((2, 2, 3, 5))).astype(np.float32)
    compiled = compiled_and_checked(
        source, "shapley-sampling", window="all,2,4", samples=400, delta=True
    )
    given = run(compiled, {"x": x})
    assert np.abs(given["convergence_delta"]).max() < 1e-5
    patches = windows((2, 3, 5), (2, 2, 4), (2, 2, 4))
    values = shapley(scored(source, np.ones((2, 1))), x, np.zeros(1), patches)
    for value, patch in zip(values.T, patches, strict=True):
        entries = given["x_attribution"][:, *patch].reshape(2, -1)
        close(entries, np.repeat(entries[:, :1], entries.shape[1], axis=1))
        np.testing.assert_allclose(entries.sum(axis=1), value, atol=0.1 * np.abs(values).max())


def test_several_inputs_play_together(rng: np.random.Generator) -> None:
    source = text(
        """g (float[N, 2] a, float[N, 2] b) => (float[N, 2] y) { p = Mul(a, b) y = Tanh(p) }"""
    )
    feeds = {k: rng.standard_normal((3, 2)).astype(np.float32) for k in "ab"}
    compiled = compiled_and_checked(
        source, "shapley-sampling", target=1, samples=2000, delta=True, chunk=200
    )
    given = run(compiled, feeds)
    assert np.abs(given["convergence_delta"]).max() < 1e-5
    # Either of the two that takes part makes the product zero: they share it evenly.
    want = np.tanh(feeds["a"] * feeds["b"])[:, 1] / 2
    for name in "ab":
        np.testing.assert_array_equal(given[f"{name}_attribution"][:, 0], 0)
        np.testing.assert_allclose(
            given[f"{name}_attribution"][:, 1], want, atol=0.1 * np.abs(want).max()
        )


def test_a_layer_plays_its_own_game(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    compiled = compiled_and_checked(
        source, "shapley-sampling", inputs=["x", "k"], target=1, baseline="input", delta=True
    )
    given = run(compiled, {"x": x, "x_baseline": base})
    assert np.abs(given["convergence_delta"]).max() < 1e-5
    change = run(source, {"x": x})["y"] - run(source, {"x": base})["y"]
    close(given["k_attribution"].sum(axis=1), change[:, 1])
    # Behind the layer the class is a sum over its units: each has its own part, in every order.
    w = {t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer}
    layer, layer_base = (np.tanh(v @ w["a"] + w["b"]) for v in (x, base))
    close(given["k_attribution"], (layer - layer_base) * w["c"][:, 1])
