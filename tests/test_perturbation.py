"""Occlusion and Shapley value sampling: against loops over ONNX Runtime, and published numbers.

The loops are written from the definitions: Zeiler and Fergus 2014 with overlapping windows averaged
as in Captum, and the Shapley value as the mean marginal contribution over all orders (Castro et
al. 2009). Published numbers: DeepExplain, ``deepexplain/tests/test_tensorflow.py``; Captum 0.9,
``tests/attr/test_occlusion.py``, with the models of ``captum.testing.helpers.basic_models``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib
from onnx_attrib import CompileError, OptionError

from . import numeric
from .test_contract import close, mlp, rng, run, text
from .test_published import SIMPLER_MODEL

__all__ = ["rng"]

Array = np.ndarray
Score = Callable[[Array], Array]
"""From values of one tensor [N, …] to S of each sample [N]."""


# -- the definitions -------------------------------------------------------------------------------


def windows(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[Any]:
    """Slices of all windows: at multiples of the stride until the end is covered."""
    axes = []
    for size, w, s in zip(shape, window, stride, strict=True):
        starts = [0]
        while starts[-1] + w < size:
            starts.append(starts[-1] + s)
        axes.append([slice(start, min(start + w, size)) for start in starts])
    return list(itertools.product(*axes))


def occluded(
    score: Score, x: Array, base: Array, window: Sequence[int], stride: Sequence[int]
) -> Array:
    """The mean change over the windows that cover an entry."""
    total, count = np.zeros(x.shape), np.zeros(x.shape[1:])
    before = score(x).astype(np.float64)
    for where in windows(x.shape[1:], window, stride):
        there = x.copy()
        there[:, *where] = np.broadcast_to(base, x.shape)[:, *where]
        change = before - score(there)
        total[:, *where] += change.reshape(-1, *[1] * (x.ndim - 1))
        count[where] += 1
    return total / count


def shapley(score: Score, x: Array, base: Array, features: Sequence[Any]) -> Array:
    """The exact Shapley value of each feature (a list of slices), [N, features]."""
    base = np.broadcast_to(base, x.shape)
    total = np.zeros((len(x), len(features)))
    for order in itertools.permutations(range(len(features))):
        there = x.copy()
        before = score(there).astype(np.float64)
        for i in order:
            there[:, *features[i]] = base[:, *features[i]]
            after = score(there).astype(np.float64)
            total[:, i] += before - after
            before = after
    return total / math.factorial(len(features))


def session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def scored(
    model: ModelProto, seed: Array, name: str = "x", rest: Mapping[str, Array] | None = None
) -> Score:
    """S of each sample as a function of one input."""
    held = session(model)
    output = next(o.name for o in held.get_outputs() if "float" in o.type)

    def score(x: Array) -> Array:
        (y,) = held.run([output], {**(rest or {}), name: x})
        terms: Array = (seed * y).reshape(len(y), -1).sum(axis=1)
        return terms

    return score


# -- models ----------------------------------------------------------------------------------------


def cnn(rng: np.random.Generator, shape: str = "N, 3, 7, 6") -> ModelProto:
    """Convolution → ReLU → overlapping maximum → mean over positions → dense."""
    return text(
        f"""g (float[{shape}] x) => (float[{shape.split(",")[0]}, 4] y)
        {{
            c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            r = Relu(c)
            p = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(r)
            q = GlobalAveragePool(p)
            f = Flatten(q)
            y = Gemm(f, d)
        }}""",
        w=rng.standard_normal((5, 3, 3, 3)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
        d=rng.standard_normal((5, 4)).astype(np.float32),
    )


def trees(rng: np.random.Generator, classes: int = 1, columns: int = 4) -> ModelProto:
    """Random trees of depth 2 over [N, columns] as ai.onnx.ml writes them."""
    ids, nodes, modes, features, values, yes, no = [], [], [], [], [], [], []
    leaves: dict[str, list[Any]] = {"treeids": [], "nodeids": [], "ids": [], "weights": []}
    for tree in range(6):
        for node in range(7):
            inner = node < 3
            ids.append(tree)
            nodes.append(node)
            modes.append("BRANCH_LEQ" if inner else "LEAF")
            features.append(int(rng.integers(columns)) if inner else 0)
            values.append(float(rng.normal()) if inner else 0.0)
            yes.append(2 * node + 1 if inner else 0)
            no.append(2 * node + 2 if inner else 0)
            if not inner:
                leaves["treeids"].append(tree)
                leaves["nodeids"].append(node)
                leaves["ids"].append(int(rng.integers(classes)))
                leaves["weights"].append(float(rng.normal()))
    prefix = "class" if classes > 1 else "target"
    op = "TreeEnsembleClassifier" if classes > 1 else "TreeEnsembleRegressor"
    more: dict[str, Any] = {f"{prefix}_{key}": value for key, value in leaves.items()}
    more |= {"classlabels_int64s": [*range(classes)]} if classes > 1 else {"n_targets": 1}
    node = helper.make_node(
        op,
        ["x"],
        ["label", "y"] if classes > 1 else ["y"],
        domain="ai.onnx.ml",
        nodes_treeids=ids,
        nodes_nodeids=nodes,
        nodes_modes=modes,
        nodes_featureids=features,
        nodes_values=values,
        nodes_truenodeids=yes,
        nodes_falsenodeids=no,
        **more,
    )
    info = helper.make_tensor_value_info
    outputs = [info("y", TensorProto.FLOAT, ["N", classes])]
    outputs += [info("label", TensorProto.INT64, ["N"])] if classes > 1 else []
    graph = helper.make_graph(
        [node], "trees", [info("x", TensorProto.FLOAT, ["N", columns])], outputs
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def compiled_and_checked(source: ModelProto, method: str, **options: Any) -> ModelProto:
    compiled = onnx_attrib.compile(source, method, **options)
    onnx.checker.check_model(compiled, full_check=True)
    return compiled


def loops(model: ModelProto) -> int:
    return sum(node.op_type == "Loop" for node in model.graph.node)


# -- occlusion -------------------------------------------------------------------------------------


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


# -- models that nothing else explains -------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("method", ["occlusion", "shapley-sampling"])
def test_trees(rng: np.random.Generator, method: str, classes: int) -> None:
    source = trees(rng, classes)
    x, base = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    options: dict[str, Any] = {} if classes == 1 else {"target": 1}
    many: dict[str, Any] = {"samples": 2000, "delta": True} if method != "occlusion" else {}
    compiled = compiled_and_checked(source, method, baseline="input", **options, **many)
    given = run(compiled, {"x": x, "x_baseline": base})
    score = scored(source, np.eye(classes)[[1 % classes] * 6])
    features = [(slice(i, i + 1),) for i in range(4)]
    if method == "occlusion":
        close(given["x_attribution"], occluded(score, x, base, (1,), (1,)))
    else:
        assert np.abs(given["convergence_delta"]).max() < 1e-5
        want = shapley(score, x, base, features)
        assert np.abs(given["x_attribution"] - want).max() < 0.1 * np.abs(want).max()
    with pytest.raises(CompileError, match="occlusion"):
        onnx_attrib.compile(source, "gradient", **options)


def test_steps_and_integers(rng: np.random.Generator) -> None:
    """Comparisons, rounding and a table looked up by the largest entry."""
    source = text(
        """g (float[N, 5] x) => (float[N, 3] y)
        { h = MatMul(x, a) i = ArgMax<axis = 1, keepdims = 0>(h) y = Gather(t, i) }""",
        a=rng.standard_normal((5, 4)).astype(np.float32),
        t=rng.standard_normal((4, 3)).astype(np.float32),
    )
    x = (2 * rng.standard_normal((9, 5))).astype(np.float32)
    compiled = compiled_and_checked(source, "occlusion", target=1, inputs=["x"], chunk=2)
    want = occluded(scored(source, np.eye(3)[[1] * 9]), x, np.zeros(1), (1,), (1,))
    assert np.abs(want).max() > 0
    close(run(compiled, {"x": x})["x_attribution"], want)
    with pytest.raises(CompileError, match="'occlusion' needs none"):
        onnx_attrib.compile(source, "gradient", target=1, inputs=["x"])


def test_an_operator_without_a_rule(rng: np.random.Generator) -> None:
    """What gradients refuse is evaluated all the same, and the refusal says so."""
    source = text(
        "g (float[N, 3, 3] x) => (float[N, 1] y) <int64[2] s = {-1, 1}> { d = Det(x) y = Reshape(d, s) }"
    )
    x = rng.standard_normal((2, 3, 3)).astype(np.float32)
    given = run(compiled_and_checked(source, "occlusion"), {"x": x})["x_attribution"]
    close(given, occluded(scored(source, np.ones((2, 1))), x, np.zeros(1), (1, 1), (1, 1)))


def test_beside_a_method_with_derivatives(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    methods = {"gradient": {}, "occlusion": {"chunk": 2}, "shapley-sampling": {"samples": 7}}
    given = run(compiled_and_checked(source, methods, target=2, delta=True), {"x": x})
    for name, options in methods.items():
        want = run(onnx_attrib.compile(source, name, target=2, **options), {"x": x})
        close(given[f"x_attribution_{name}"], want["x_attribution"])
    assert np.abs(given["convergence_delta_shapley-sampling"]).max() < 1e-5


# -- Shapley value sampling ------------------------------------------------------------------------


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


# -- published numbers -----------------------------------------------------------------------------

MIN_MODEL = text(
    "g (float[N, 2] x) => (float[N] y) <int64[1] k = {1}> { y = ReduceMin<keepdims = 0>(x, k) }"
)
MIN_MODEL_2D = text(
    """g (float[N, 2, 2] x) => (float[N] y) <int64[2] k = {1, 2}>
    { y = ReduceMin<keepdims = 0>(x, k) }"""
)


def test_deepexplain_occlusion() -> None:
    """``test_occlusion`` and ``test_window_shape``; DeepExplain divides by the window's size."""
    x = np.array([[-10, -5], [3, 1]], np.float32)
    given = run(onnx_attrib.compile(SIMPLER_MODEL, "occlusion"), {"x": x})["x_attribution"]
    np.testing.assert_almost_equal(given, [[0.0, 0.0], [1.0, -1.0]], 10)
    given = run(onnx_attrib.compile(SIMPLER_MODEL, "occlusion", window=2), {"x": x})
    np.testing.assert_almost_equal(given["x_attribution"] / 2, [[0.0, 0.0], [0.5, 0.5]], 10)


@pytest.mark.parametrize("repeats", [1, 20])
def test_deepexplain_shapley(repeats: int) -> None:
    """``test_shapley_sampling`` and its batches."""
    x = np.array([[2, -2], [4, 2]], np.float32).repeat(repeats, 0)
    compiled = onnx_attrib.compile(MIN_MODEL, "shapley-sampling", samples=300)
    want = np.repeat([[0.0, -2.0], [1.0, 1.0]], repeats, 0)
    np.testing.assert_almost_equal(run(compiled, {"x": x})["x_attribution"], want, 1)


def test_deepexplain_shapley_dims() -> None:
    """``test_shapley_sampling_dims``: rows as features; ours are split among a row's entries."""
    x = np.array([[[-1, 4], [-2, 1]]], np.float32)
    compiled = onnx_attrib.compile(MIN_MODEL_2D, "shapley-sampling", samples=300, window=(1, 2))
    given = run(compiled, {"x": x})["x_attribution"]
    np.testing.assert_almost_equal(given.sum(axis=2), [[-0.5, -1.5]], 1)


MULTI_LAYER = """
    l0 = MatMul(x, w0) l1 = MatMul(l0, w1) z = Add(l1, b1) r = Relu(z) l2 = MatMul(r, w2)
    y = Add(l2, b2)
"""
MULTI_WEIGHTS = {
    "w0": np.eye(3),
    "w1": np.ones((3, 4)),
    "b1": np.array([-10.0, 1, 1, 1]),
    "w2": np.ones((4, 2)),
    "b2": np.array([0.0, 1]),
}


def multi_layer(inputs: str = "float[N, 3] x", before: str = "") -> ModelProto:
    """``BasicModel_MultiLayer``, and with ``before`` its variant of several inputs."""
    arrays = {k: v.astype(np.float32) for k, v in MULTI_WEIGHTS.items()}
    return text(f"g ({inputs}) => (float[N, 2] y) {{ {before} {MULTI_LAYER} }}", **arrays)


@pytest.mark.parametrize(
    ("x", "window", "stride", "baseline", "want"),
    [
        ([[20, 50, 30]], 1, 1, 0.0, [[80, 200, 120]]),
        ([[20, 50, 30]], 2, 1, 10.0, [[200, 220, 240]]),
        ([[20, 50, 30]], 2, 2, 0.0, [[280, 280, 120]]),
        ([[2, 10, 3], [20, 50, 30]], 1, 1, 0.0, [[8, 35, 12], [80, 200, 120]]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_captum_multi_layer(
    x: Any, window: int, stride: int, baseline: float, want: Any, chunk: int
) -> None:
    """``test_simple_input`` … ``test_multi_sample_ablation``."""
    compiled = onnx_attrib.compile(
        multi_layer(),
        "occlusion",
        target=0,
        window=window,
        stride=stride,
        baseline=baseline,
        chunk=chunk,
    )
    given = run(compiled, {"x": np.array(x, np.float32)})["x_attribution"]
    np.testing.assert_allclose(given, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "window", "stride", "baseline", "want"),
    [
        ("a", 3, 1, 0.0, [[492] * 3, [400] * 3]),
        ("b", 1, 1, 0.0, [[80, 200, 120], [0, 400, 0]]),
        ("c", 2, 1, 0.0, [[400, 420, 440], [48, 50, 52]]),
        ("a", 3, 2, [[1, 4, 7], [3, 6, 9]], [[444] * 3, [328] * 3]),
        ("b", 1, 1, [[3.0] * 3] * 2, [[68, 188, 108], [-12, 388, -12]]),
        ("c", 2, 2, [[4.0] * 3, [6.0] * 3], [[368, 368, 24], [0, 0, -12]]),
    ],
)
def test_captum_multi_input(name: str, window: int, stride: int, baseline: Any, want: Any) -> None:
    """``test_multi_input_ablation_with_mask`` and ``…_with_baselines``, an input at a time."""
    source = multi_layer(
        "float[N, 3] a, float[N, 3] b, float[N, 3] c", "ab = Add(a, b) x = Add(ab, c)"
    )
    feeds = {
        "a": [[23, 100, 0], [20, 50, 30]],
        "b": [[20, 50, 30], [0, 100, 0]],
        "c": [[0, 100, 10], [2, 10, 3]],
    }
    arrays = {k: np.array(v, np.float32) for k, v in feeds.items()}
    at_run_time = not isinstance(baseline, float)
    compiled = onnx_attrib.compile(
        source,
        "occlusion",
        inputs=[name],
        target=0,
        window=window,
        stride=stride,
        baseline="input" if at_run_time else baseline,
    )
    if at_run_time:
        arrays[f"{name}_baseline"] = np.array(baseline, np.float32)
    given = run(compiled, arrays)[f"{name}_attribution"]
    np.testing.assert_allclose(given, want, atol=1e-3)


def one_conv(width: int = 4) -> ModelProto:
    """``BasicModel_ConvNet_One_Conv`` of two images, the second broadcast where it is narrow."""
    return text(
        f"""g (float[N, 1, 4, 4] a, float[N, 1, 4, {width}] b) => (float[N, 4] y)
        <int64[2] s = {{-1, 8}}> {{
            x = Add(a, b) c = Conv(x, w1, b1) r = Relu(c) f = Reshape(r, s) d = MatMul(f, w2)
            y = Relu(d)
        }}""",
        w1=np.ones((2, 1, 3, 3), np.float32),
        b1=np.array([-50, -75], np.float32),
        w2=np.repeat([[1.0]] * 5 + [[-1.0]] * 3, 4, axis=1).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("name", "width", "window", "stride", "want"),
    [
        ("a", 4, (1, 4, 4), 1, np.full((4, 4), 67)),
        ("b", 4, (1, 4, 4), 1, np.full((4, 4), 13)),
        ("a", 4, (1, 2, 3), (1, 2, 1), [[17] * 4] * 2 + [[64, 65.5, 65.5, 67]] * 2),
        ("b", 4, (1, 1, 2), (1, 1, 2), [[3] * 4] * 3 + [[0] * 4]),
        ("a", 1, (1, 2, 4), (1, 2, 1), [[17] * 4] * 2 + [[67] * 4] * 2),
        ("b", 1, (1, 2, 1), 1, [[10], [10], [8], [6]]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_captum_conv(
    name: str, width: int, window: Any, stride: Any, want: Any, chunk: int
) -> None:
    """``test_simple_multi_input_conv`` and ``…_diff_shapes``."""
    compiled = onnx_attrib.compile(
        one_conv(width),
        "occlusion",
        inputs=[name],
        target=0,
        window=window,
        stride=stride,
        chunk=chunk,
    )
    feeds = {
        "a": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4),
        "b": np.ones((1, 1, 4, width), np.float32),
    }
    given = run(compiled, feeds)[f"{name}_attribution"]
    np.testing.assert_allclose(given[0, 0], want, atol=1e-4)


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("occlusion", {"window": (1, 3)}, "window 1, 3 does not fit 'x'.*3: one for each"),
        ("occlusion", {"window": 2, "stride": (1, 2)}, "stride 1, 2 does not fit"),
        ("occlusion", {"window": (4, 2, 2)}, "axis 1 has size 3"),
        ("occlusion", {"window": (3, 2, 2), "stride": 3}, "stride 3 is larger than window 2"),
        ("occlusion", {"window": 0}, "'window' must be a size"),
        ("occlusion", {"window": "2,x,1"}, "'window' must be a size"),
        ("occlusion", {"window": ()}, "'window' must be a size"),
        ("occlusion", {"window": 1.5}, "'window' must be a size"),
        ("occlusion", {"stride": "all"}, "'stride' must be a step"),
        ("occlusion", {"chunk": 0}, "at least 1"),
        ("occlusion", {"samples": 3}, "no option 'samples'"),
        ("occlusion", {"delta": True}, "does not promise to sum"),
        ("shapley-sampling", {"window": (1, 1)}, "window 1, 1 does not fit"),
        ("shapley-sampling", {"samples": 0}, "at least 1"),
        ("shapley-sampling", {"seed": -1}, "at least 0"),
    ],
)
def test_refusals(
    rng: np.random.Generator, method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        onnx_attrib.compile(cnn(rng), method, **options)


@pytest.mark.parametrize("window", ["3", 3, "3,3,3", " 3, 3 ,3", np.int64(3), (3, 3, 3), [3, 3, 3]])
def test_spellings(rng: np.random.Generator, window: Any) -> None:
    x = rng.standard_normal((1, 3, 7, 6)).astype(np.float32)
    source = cnn(np.random.default_rng(3))
    given = run(onnx_attrib.compile(source, "occlusion", target=0, window=window), {"x": x})
    want = occluded(scored(source, np.eye(4)[[0]]), x, np.zeros(1), (3, 3, 3), (1, 1, 1))
    close(given["x_attribution"], want)


def test_one_size_for_axes_that_are_shorter(rng: np.random.Generator) -> None:
    """One number for all axes may be more than an axis has, as for channels."""
    x = rng.standard_normal((1, 3, 7, 6)).astype(np.float32)
    source = cnn(rng)
    given = run(onnx_attrib.compile(source, "occlusion", target=0, window=4, stride=3), {"x": x})
    want = occluded(scored(source, np.eye(4)[[0]]), x, np.zeros(1), (3, 4, 4), (3, 3, 3))
    close(given["x_attribution"], want)
