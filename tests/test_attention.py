"""Attention of opsets 23 and 24, written at 21: the same outputs, right gradients, conservation.

The source runs on ONNX Runtime's own kernel, so equal outputs are a check of the definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib

from . import numeric
from .numeric import Array

QUERIES, KEYS, PAST, SIZE, VALUE_SIZE, BATCH = 3, 4, 2, 4, 5, 2


def model(version: int, feeds: dict[str, Array], outputs: int = 1, **attributes: Any) -> ModelProto:
    """Attention of the inputs that are there, in their order, with a symbolic batch."""
    order = ["q", "k", "v", "mask", "past_key", "past_value", "filled"]
    names = [name if name in feeds else "" for name in order]
    while not names[-1]:
        names.pop()
    inputs = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(value.dtype),
            [*(["N"] if name != "mask" and value.ndim else []), *value.shape[name != "mask" :]],
        )
        for name, value in feeds.items()
    ]
    results = ["y", "present_key", "present_value", "scores"][:outputs]
    node = helper.make_node("Attention", names, results, **attributes)
    rank = feeds["q"].ndim
    graph = helper.make_graph(
        [node],
        "attention",
        inputs,
        [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [None] * (rank if name == "y" else 4)
            )
            for name in results
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)


def tensors(
    rng: np.random.Generator,
    heads: tuple[int, int] = (2, 2),
    flat: bool = False,
    past: bool = False,
) -> dict[str, Array]:
    """Queries, keys and values, with or without past ones."""
    queries, keys = heads
    shapes = {
        "q": (BATCH, queries, QUERIES, SIZE),
        "k": (BATCH, keys, KEYS, SIZE),
        "v": (BATCH, keys, KEYS, VALUE_SIZE),
    }
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if flat:
        values = {
            name: value.transpose(0, 2, 1, 3).reshape(BATCH, value.shape[2], -1)
            for name, value in values.items()
        }
    if past:
        values["past_key"] = rng.standard_normal((BATCH, keys, PAST, SIZE)).astype(np.float32)
        values["past_value"] = rng.standard_normal((BATCH, keys, PAST, VALUE_SIZE)).astype(
            np.float32
        )
    return values


def mask(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A mask; with one row that has no key at all, unless float32 forgets the logits there."""
    allowed = rng.random(shape) < 0.6
    allowed[..., 0] = True
    allowed[..., 1, :] = kind == "1e9"
    if kind == "bool":
        return allowed
    blocked = {"inf": -np.inf, "1e9": -1e9, "lowest": np.finfo(np.float32).min}[kind]
    return np.where(allowed, 0, blocked).astype(np.float32)


def check(made: ModelProto, rng: np.random.Generator, feeds: dict[str, Array]) -> None:
    """Gradient and conservation of what is data: queries, keys, values."""
    inputs = [n for n in feeds if n not in ("mask", "filled")]

    def moved() -> dict[str, Array]:
        drawn = {n: rng.standard_normal(feeds[n].shape).astype(np.float32) for n in inputs}
        return {**feeds, **drawn}

    seed = int(rng.integers(1000))
    residuals = numeric.check_gradient(made, feeds, moved(), inputs=inputs, output="y", seed=seed)
    assert any(r.applies for r in residuals)
    baseline = {name: moved()[name] for name in inputs}
    numeric.check_conservation(made, (feeds, baseline), inputs=inputs, output="y", seed=seed)


@pytest.mark.parametrize("past", [False, True], ids=["", "past"])
@pytest.mark.parametrize("flat", [False, True], ids=["4d", "3d"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
def test_heads(heads: tuple[int, int], flat: bool, past: bool) -> None:
    rng = np.random.default_rng(sum(heads) + flat + past)
    feeds = tensors(rng, heads, flat, past)
    attributes = {"q_num_heads": heads[0], "kv_num_heads": heads[1]} if flat else {}
    made = model(23, feeds, 3 if past else 1, is_causal=1, **attributes)
    check(made, rng, feeds)


@pytest.mark.parametrize("shape", [(), (2,), (BATCH, 1)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("kind", ["bool", "inf", "1e9", "lowest"])
def test_masks(kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(kind) + len(shape))
    feeds = tensors(rng)
    feeds["mask"] = mask(kind, rng, (*shape, QUERIES, KEYS))
    check(model(24, feeds), rng, feeds)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_softcap_and_stages(mode: int, causal: int) -> None:
    rng = np.random.default_rng(mode)
    feeds = tensors(rng)
    made = model(24, feeds, 4, softcap=1.5, scale=0.7, qk_matmul_output_mode=mode, is_causal=causal)
    check(made, rng, feeds)


@pytest.mark.parametrize("precision", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_softmax_precision(precision: int) -> None:
    rng = np.random.default_rng(0)
    feeds = tensors(rng)
    check(model(24, feeds, softmax_precision=precision), rng, feeds)


@pytest.mark.parametrize("causal", [0, 1])
def test_partly_filled_cache(causal: int) -> None:
    """One sample has fewer keys than queries: its first queries see none under a causal mask."""
    rng = np.random.default_rng(causal)
    feeds = tensors(rng)
    feeds["filled"] = np.array([4, 2])
    check(model(24, feeds, is_causal=causal), rng, feeds)


@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated_gradients"])
def test_logits_200_apart(method: str) -> None:
    rng = np.random.default_rng(0)
    feeds = tensors(rng)
    feeds["k"] *= 100
    feeds["mask"] = mask("1e9", rng, (QUERIES, KEYS))
    compiled = onnx_attrib.compile(
        model(24, feeds), method=method, target="seed", inputs=["q", "k", "v"], output="y"
    )
    seed = rng.standard_normal((BATCH, 2, QUERIES, VALUE_SIZE)).astype(np.float32)
    results = numeric.run(compiled, {**feeds, "seed": seed})
    for name in ("q", "k", "v"):
        assert np.isfinite(results[f"{name}_attribution"]).all(), name
    if method == "deeplift":
        zeros = {name: np.zeros_like(feeds[name]) for name in ("q", "k", "v")}
        source = model(24, feeds)
        change = numeric.run(source, feeds)["y"] - numeric.run(source, {**feeds, **zeros})["y"]
        total = sum(float(results[f"{name}_attribution"].sum()) for name in zeros)
        assert abs(total - float((seed * change).sum())) < 1e-2


def test_masked_rows_spelled_out() -> None:
    """softmax(−∞ …) is NaN and replaced after it, as torch exports attention."""
    from onnx.parser import parse_model

    made = parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,4] x, float[3,4] mask) => (float[N,3,4] y) <float zero = {0}> {
          z = Add(x, mask)
          p = Softmax<axis=-1>(z)
          bad = IsNaN(p)
          y = Where(bad, zero, p)
        }"""
    )
    rng = np.random.default_rng(0)
    hidden = np.zeros((3, 4), np.float32)
    hidden[1], hidden[2, 0] = -np.inf, -np.inf
    points = [
        {"x": rng.standard_normal((2, 3, 4)).astype(np.float32), "mask": hidden} for _ in range(2)
    ]
    numeric.check_gradient(made, *points, inputs=["x"])
    numeric.check_conservation(made, (points[0], {"x": points[1]["x"]}), inputs=["x"])
