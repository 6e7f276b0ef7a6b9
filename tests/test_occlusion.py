"""Occlusion in the graph: windows, targets, stacked batches, layers, tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

import onnx_attrib

from .perturbation_reference import (
    Array,
    cnn,
    compiled_and_checked,
    loops,
    occluded,
    scored,
    session,
    shapley,
)
from .test_contract import close, mlp, run, text


@pytest.mark.parametrize(
    ("window", "stride"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((3, 2, 2), (1, 2, 2)),
        ((2, 3, 4), (1, 2, 3)),
        ((3, 7, 6), (2, 1, 1)),
        ((1, 5, 4), (1, 5, 4)),
        ((1, 4, 5), (1, 3, 1)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_windows(
    rng: np.random.Generator, window: tuple[int, ...], stride: tuple[int, ...], chunk: int
) -> None:
    source = cnn(rng)
    x, base = (rng.standard_normal((3, 3, 7, 6)).astype(np.float32) for _ in range(2))
    compiled = compiled_and_checked(
        source, "occlusion", baseline="input", window=window, stride=stride, chunk=chunk
    )
    given = run(compiled, {"x": x, "x_baseline": base, "target": np.array([2, 0, -1])})
    chosen = [2, 0, given["y"][2].argmax()]
    want = occluded(scored(source, np.eye(4)[chosen]), x, base, window, stride)
    close(given["x_attribution"], want)


@pytest.mark.parametrize("shape", ["N, 3, H, W", "N, 3, H, 6", "2, 3, H, W", "N, C, H, W"])
@pytest.mark.parametrize(("window", "stride"), [((2, 3, 4), (1, 2, 3)), (2, 1), ((1, -1, 3), 1)])
def test_sizes_known_at_run_time_only(
    rng: np.random.Generator, shape: str, window: Any, stride: Any
) -> None:
    source = cnn(rng, shape)
    compiled = compiled_and_checked(
        source, "occlusion", window=window, stride=stride, target=1, baseline=0.5
    )
    for size in ((7, 6), (9, 6)):
        x = rng.standard_normal((2, 3, *size)).astype(np.float32)
        own = (window,) * 3 if isinstance(window, int) else window
        sizes = [n if w < 0 else w for n, w in zip(x.shape[1:], own, strict=True)]
        step = (stride,) * 3 if isinstance(stride, int) else stride
        want = occluded(scored(source, np.eye(4)[[1, 1]]), x, np.array(0.5), sizes, step)
        close(run(compiled, {"x": x})["x_attribution"], want)


def test_a_window_may_be_larger_than_an_open_axis(rng: np.random.Generator) -> None:
    source = cnn(rng, "N, 3, H, W")
    compiled = onnx_attrib.compile(source, "occlusion", window=(3, 20, 2), stride=2, target=1)
    x = rng.standard_normal((2, 3, 7, 6)).astype(np.float32)
    want = occluded(scored(source, np.eye(4)[[1, 1]]), x, np.zeros(1), (3, 7, 2), (2, 2, 2))
    close(run(compiled, {"x": x})["x_attribution"], want)


@pytest.mark.parametrize("spelling", ["1,all,all", (1, -1, -1), "1, -1, all", [1, "all", -1]])
def test_whole_axes(rng: np.random.Generator, spelling: Any) -> None:
    source = cnn(rng)
    x = rng.standard_normal((2, 3, 7, 6)).astype(np.float32)
    given = run(onnx_attrib.compile(source, "occlusion", target=0, window=spelling), {"x": x})
    want = occluded(scored(source, np.eye(4)[[0, 0]]), x, np.zeros(1), (1, 7, 6), (1, 1, 1))
    close(given["x_attribution"], want)


def test_the_target_is_that_of_the_input(rng: np.random.Generator) -> None:
    """The class predicted at x is explained, though windows change the prediction."""
    source = mlp(rng)
    x = (2 * rng.standard_normal((12, 5))).astype(np.float32)
    given = run(compiled_and_checked(source, "occlusion", target="argmax"), {"x": x})
    score = scored(source, np.eye(4)[given["y"].argmax(1)])
    close(given["x_attribution"], occluded(score, x, np.zeros(1), (1,), (1,)))
    held = session(source)
    moved = [held.run(None, {"x": x * (np.arange(5) != i)})[0].argmax(1) for i in range(5)]
    assert (np.stack(moved) != given["y"].argmax(1)).any(), "no prediction changed"


def test_several_targets_share_the_evaluations(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    for method in ("occlusion", "shapley-sampling"):
        compiled = compiled_and_checked(source, method, targets="top3", chunk=2)
        assert loops(compiled) == 1
        given = run(compiled, {"x": x})
        ranked = np.argsort(-given["y"], axis=1)
        for k in range(3):
            one = onnx_attrib.compile(source, method, chunk=2)
            want = run(one, {"x": x, "target": ranked[:, k]})["x_attribution"]
            close(given["x_attribution"][:, k], want)


def test_seed_weighs_outputs_of_any_rank(rng: np.random.Generator) -> None:
    source = text(
        "g (float[N, 2, 4] x) => (float[N, 3, 4] y) { h = MatMul(a, x) y = Tanh(h) }",
        a=rng.standard_normal((3, 2)).astype(np.float32),
    )
    x, seed = (rng.standard_normal((3, k, 4)).astype(np.float32) for k in (2, 3))
    compiled = compiled_and_checked(source, "occlusion", target="seed", window="2,1", chunk=3)
    want = occluded(scored(source, seed), x, np.zeros(1), (2, 1), (1, 1))
    close(run(compiled, {"x": x, "seed": seed})["x_attribution"], want)


def test_unexplained_infinities_do_not_spoil(rng: np.random.Generator) -> None:
    """Log-probabilities of −∞ beside the explained one, and a window that gives an infinity."""
    source = text("g (float[N, 3] x) => (float[N, 3] y) { y = Log(x) }")
    x = np.array([[2.0, 0.0, 3.0]], np.float32)
    given = run(onnx_attrib.compile(source, "occlusion", target=0, baseline=1.0), {"x": x})
    np.testing.assert_allclose(given["x_attribution"], [[np.log(2), 0, 0]], rtol=1e-6)
    given = run(onnx_attrib.compile(source, "occlusion", target=2), {"x": x})
    np.testing.assert_array_equal(given["x_attribution"], [[0, 0, np.inf]])


def test_a_target_out_of_range_is_not_a_number(rng: np.random.Generator) -> None:
    compiled = onnx_attrib.compile(mlp(rng), "occlusion")
    x = rng.standard_normal((2, 5)).astype(np.float32)
    given = run(compiled, {"x": x, "target": np.array([9, 1])})["x_attribution"]
    assert np.isnan(given[0]).all()
    assert np.isfinite(given[1]).all()


@pytest.mark.parametrize("method", ["occlusion", "shapley-sampling"])
@pytest.mark.parametrize("batch", ["N", "1", "3"])
def test_samples_are_independent(rng: np.random.Generator, method: str, batch: str) -> None:
    """A batch gives what its samples give one by one; a fixed batch is evaluated unstacked."""
    source, single = (cnn(np.random.default_rng(5), f"{b}, 3, 7, 6") for b in (batch, "1"))
    x = rng.standard_normal((7 if batch == "N" else int(batch), 3, 7, 6)).astype(np.float32)
    options = {"target": "argmax", "window": (3, 3, 3)} | (
        {"stride": (3, 2, 2)} if method == "occlusion" else {"samples": 5}
    )
    given = run(compiled_and_checked(source, method, **options), {"x": x})
    alone = onnx_attrib.compile(single, method, **options)
    want = np.concatenate([run(alone, {"x": x[i : i + 1]})["x_attribution"] for i in range(len(x))])
    close(given["x_attribution"], want, 2e-5)


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ("(float[N, 5] x) => (float[N, 4] y) { h = MatMul(x, a) y = Tanh(h) }", True),
        # The batch as one axis with others, a fixed batch, and samples that meet each other.
        (
            """(float[N, 2, 5] x) => (float[N, 2, 4] y) <int64[2] s = {-1, 5}, int64[3] t =
            {-1, 2, 4}> { f = Reshape(x, s) h = MatMul(f, a) g = Tanh(h) y = Reshape(g, t) }""",
            False,
        ),
        ("(float[3, 5] x) => (float[3, 4] y) { h = MatMul(x, a) y = Tanh(h) }", False),
        (
            """(float[N, 5] x) => (float[N, 4] y) <int64[1] k = {0}>
            { h = MatMul(x, a) m = ReduceMax<keepdims = 1>(h, k) y = Div(h, m) }""",
            False,
        ),
        (
            """(float[N, 5] x) => (float[N, 4] y) { h = MatMul(x, a) i = Cast<to = 7>(h)
            b = ArgMax<axis = 0, keepdims = 1>(i) l = Less(i, b) f = Cast<to = 1>(l)
            y = Add(h, f) }""",
            False,
        ),
    ],
)
def test_what_is_stacked(rng: np.random.Generator, body: str, fits: bool) -> None:
    """Evaluations stand behind each other in a batch only where samples are apart."""
    source = text(f"g {body}", a=rng.standard_normal((5, 4)).astype(np.float32))
    dims = [d.dim_value or 3 for d in source.graph.input[0].type.tensor_type.shape.dim]
    x = rng.standard_normal(dims).astype(np.float32)
    compiled = compiled_and_checked(source, "occlusion", target="seed", chunk=1000)
    assert loops(compiled) == (0 if fits else 1)
    seed = rng.standard_normal((*dims[:-1], 4)).astype(np.float32)
    sizes = [1] * (len(dims) - 1)
    want = occluded(scored(source, seed), x, np.zeros(1), sizes, sizes)
    close(run(compiled, {"x": x, "seed": seed})["x_attribution"], want)


def test_memory_is_one_chunk(rng: np.random.Generator) -> None:
    """A Loop goes over the windows, ``chunk`` at a time, and draws nothing that is as large."""
    source = cnn(rng, "N, 3, 32, 32")
    compiled = onnx_attrib.compile(source, "occlusion", window=(3, 2, 2), chunk=8)
    (loop,) = [node for node in compiled.graph.node if node.op_type == "Loop"]
    trips = {t.name: onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer}
    assert trips[loop.input[0]] == -(-31 * 31 // 8)
    assert sum(t.ByteSize() for t in compiled.graph.initializer) < 8192
    convolutions = [node for node in compiled.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1, "the forward at the baseline is not evaluated"


def test_float16(rng: np.random.Generator) -> None:
    """Changes are added up in float32."""
    source = mlp(rng)
    half = onnx.ModelProto()
    half.CopyFrom(source)
    for tensor in half.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    for info in (*half.graph.input, *half.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    x = rng.standard_normal((2, 5)).astype(np.float16)
    for method in ("occlusion", "shapley-sampling"):
        given = run(onnx_attrib.compile(half, method, target=1), {"x": x})["x_attribution"]
        wide = run(onnx_attrib.compile(source, method, target=1), {"x": x.astype(np.float32)})
        assert given.dtype == np.float16
        close(given, wide["x_attribution"], 5e-3)


def test_other_inputs_stay(rng: np.random.Generator) -> None:
    """Each of several tensors is occluded by itself."""
    source = text(
        """g (float[N, 4] a, float[N, 2, 4] b) => (float[N, 4] y)
        <int64[1] k = {1}> { s = ReduceSum<keepdims = 0>(b, k) p = Mul(a, s) y = Tanh(p) }"""
    )
    feeds = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal((3, 2, 4)).astype(np.float32),
    }
    given = run(compiled_and_checked(source, "occlusion", target=2, chunk=3), feeds)
    seed = np.eye(4)[[2, 2, 2]]
    for name, sizes in (("a", (1,)), ("b", (1, 1))):
        score = scored(source, seed, name, {k: v for k, v in feeds.items() if k != name})
        want = occluded(score, feeds[name], np.zeros(1), sizes, sizes)
        close(given[f"{name}_attribution"], want)


def test_inner_tensors(rng: np.random.Generator) -> None:
    """A layer stands for itself: what follows it is evaluated anew."""
    source = mlp(rng)
    w = {t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer}
    tail = text("g (float[N, 7] k) => (float[N, 4] y) { t = Tanh(k) y = MatMul(t, c) }", c=w["c"])
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    compiled = compiled_and_checked(
        source, "occlusion", inputs=["x", "k"], target=1, baseline="input", window=2
    )
    given = run(compiled, {"x": x, "x_baseline": base})
    seed = np.eye(4)[[1, 1, 1]]
    layer, layer_base = (v @ w["a"] + w["b"] for v in (x, base))
    want = occluded(scored(tail, seed, "k"), layer, layer_base, (2,), (1,))
    close(given["k_attribution"], want)
    close(given["x_attribution"], occluded(scored(source, seed), x, base, (2,), (1,)))


def embedded(rng: np.random.Generator) -> tuple[ModelProto, ModelProto]:
    """Token ids → embeddings → a gate over them → dense; and the part behind the embeddings."""
    arrays = {
        "w": rng.standard_normal((6, 4)).astype(np.float32),
        "v": rng.standard_normal((6, 1)).astype(np.float32),
    }
    body = """s = MatMul(e, v) p = Softmax<axis = 1>(s) g = Mul(p, e)
        m = ReduceSum<keepdims = 0>(g, k) h = Tanh(m) y = MatMul(h, w)"""
    table = rng.standard_normal((9, 6)).astype(np.float32)
    whole = text(
        f"""g (int64[N, T] ids) => (float[N, 4] y) <int64[1] k = {{1}}>
        {{ e = Gather(table, ids) {body} }}""",
        table=table,
        **arrays,
    )
    part = text(
        f"g (float[N, T, 6] e) => (float[N, 4] y) <int64[1] k = {{1}}> {{ {body} }}", **arrays
    )
    return whole, part


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_tokens(rng: np.random.Generator, chunk: int) -> None:
    """Whole tokens of embeddings, of any length."""
    source, part = embedded(rng)
    compiled = compiled_and_checked(source, "occlusion", window="1,all", target=3, chunk=chunk)
    for length in (5, 1, 8):
        ids = rng.integers(0, 9, (2, length))
        table = onnx.numpy_helper.to_array(
            next(t for t in source.graph.initializer if t.name == "table")
        )
        score = scored(part, np.eye(4)[[3, 3]], "e")
        want = occluded(score, table[ids], np.zeros(1), (1, 6), (1, 1))
        close(run(compiled, {"ids": ids})["e_attribution"], want)


def test_without_a_batch_every_entry_counts(rng: np.random.Generator) -> None:
    """Where the first axis is not the output's samples, windows go over it too."""
    source = text(
        "g (float[T, 5] x) => (float[4] y) <int64[1] k = {0}> "
        "{ h = MatMul(x, a) t = Tanh(h) y = ReduceMean<keepdims = 0>(t, k) }",
        a=rng.standard_normal((5, 4)).astype(np.float32),
    )
    x = rng.standard_normal((3, 5)).astype(np.float32)
    seed = rng.standard_normal(4).astype(np.float32)
    held = session(source)

    def score(values: Array) -> Array:
        return np.array([seed @ held.run(None, {"x": values[0]})[0]])

    compiled = compiled_and_checked(source, "occlusion", target="seed", window=(2, 1))
    want = occluded(score, x[None], np.zeros(1), (2, 1), (1, 1))[0]
    close(run(compiled, {"x": x, "seed": seed})["x_attribution"], want)


def test_batch_behind_another_axis(rng: np.random.Generator) -> None:
    """[T, N, C]: samples are where the output's are."""
    source = text(
        "g (float[T, N, 5] x) => (float[N, 4] y) <int64[1] k = {0}> "
        "{ h = MatMul(x, a) t = Tanh(h) y = ReduceMean<keepdims = 0>(t, k) }",
        a=rng.standard_normal((5, 4)).astype(np.float32),
    )
    x = rng.standard_normal((3, 2, 5)).astype(np.float32)
    held, seed = session(source), np.eye(4)[[2, 2]]

    def score(values: Array) -> Array:
        (y,) = held.run(None, {"x": np.ascontiguousarray(values.swapaxes(0, 1))})
        total: Array = (seed * y).sum(axis=1)
        return total

    batch_first = np.ascontiguousarray(x.swapaxes(0, 1))
    want = occluded(score, batch_first, np.zeros(1), (1, 5), (1, 1)).swapaxes(0, 1)
    compiled = compiled_and_checked(source, "occlusion", target=2, window="1,all")
    close(run(compiled, {"x": x})["x_attribution"], want)
    compiled = compiled_and_checked(
        source, "shapley-sampling", target=2, window="1,all", delta=True
    )
    given = run(compiled, {"x": x})
    assert np.abs(given["convergence_delta"]).max() < 1e-5
    parts = [(slice(t, t + 1), slice(None)) for t in range(3)]
    values = shapley(score, batch_first, np.zeros(1), parts)
    spread = np.repeat(values.T[:, :, None] / 5, 5, axis=2)
    assert np.abs(given["x_attribution"] - spread).max() < 0.3 * np.abs(spread).max()
