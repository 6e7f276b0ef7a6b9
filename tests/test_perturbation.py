"""Methods that only evaluate: on models without derivatives, published numbers, options, verify.

Published numbers: DeepExplain, ``deepexplain/tests/test_tensorflow.py``; Captum 0.9,
``tests/attr/test_occlusion.py``, with the models of ``captum.testing.helpers.basic_models``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import CompileError, OptionError, UnsupportedOpError
from onnx_attrib.kernels import placement
from onnx_attrib.verify import verify

from .numeric import all_nodes
from .perturbation_reference import (
    Array,
    cnn,
    compiled_and_checked,
    loops,
    occluded,
    scored,
    session,
    shapley,
    trees,
)
from .test_contract import close, mlp, run, text
from .test_published import SIMPLER_MODEL

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
        """g (float[1, 5] x) => (float[1, 2] y) <int64[2] s = {1, 2}, int64[1] a = {0},
        int64[1] b = {2}> { u = Unique(x) p = Slice(u, a, b, a) y = Reshape(p, s) }"""
    )
    x = rng.standard_normal((1, 5)).astype(np.float32)
    given = run(compiled_and_checked(source, "occlusion", target=1), {"x": x})["x_attribution"]
    want = occluded(scored(source, np.eye(2)[[1]]), x, np.zeros(1), (1,), (1,))
    assert np.abs(want).max() > 0
    close(given, want)
    with pytest.raises(UnsupportedOpError, match="The method 'occlusion' needs no derivatives"):
        onnx_attrib.compile(source, "gradient", target=1)


MODELS = {
    "branches": """(float[N, 4] x) => (float[N, 4] y) {
        s = ReduceSum<keepdims = 0>(x) c = Greater(s, zero) h = MatMul(x, a)
        y = If<then_branch = t () => (float[N, 4] p) { p = Tanh(h) },
               else_branch = e () => (float[N, 4] q) { q = Sin(h) }>(c) }""",
    "loop": """(float[N, 4] x) => (float[N, 4] y) {
        y = Loop<body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {
            d = Identity(c) u = MatMul(s, a) v = Add(u, x) t = Tanh(v) }>(three, , x) }""",
    "quantized": """(float[N, 4] x) => (float[N, 4] y) {
        q = QuantizeLinear(x, scale, point) d = DequantizeLinear(q, scale, point)
        h = MatMul(d, a) y = Relu(h) }""",
    "wider output": """(float[N, 4] x) => (double[N, 4] y)
        { h = MatMul(x, a) w = Cast<to = 11>(h) y = Tanh(w) }""",
    "narrower output": """(double[N, 4] x) => (float[N, 4] y)
        { w = Cast<to = 1>(x) h = MatMul(w, a) y = Tanh(h) }""",
    "other symbols": """(float[A, 4] x) => (float[B, 4] y) { h = MatMul(x, a) y = Tanh(h) }""",
}


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(rng: np.random.Generator, name: str, chunk: int) -> None:
    source = text(
        f"g {MODELS[name]}",
        a=rng.standard_normal((4, 4)).astype(np.float32),
        zero=np.array(0, np.float32),
        three=np.array(3),
        scale=np.array(0.05, np.float32),
        point=np.array(3, np.int8),
    )
    kind = onnx.helper.tensor_dtype_to_np_dtype(source.graph.input[0].type.tensor_type.elem_type)
    x, base = (rng.standard_normal((3, 4)).astype(kind) for _ in range(2))
    score, feeds = scored(source, np.eye(4)[[1] * 3]), {"x": x, "x_baseline": base}
    options: dict[str, Any] = {"target": 1, "baseline": "input", "chunk": chunk}
    given = run(compiled_and_checked(source, "occlusion", window=2, **options), feeds)
    close(given["x_attribution"], occluded(score, x, base, (2,), (1,)))
    assert given["x_attribution"].dtype == kind
    options |= {"samples": 3, "delta": True}
    given = run(compiled_and_checked(source, "shapley-sampling", **options), feeds)
    change = score(x).astype(np.float64) - score(base)
    close(given["x_attribution"].sum(axis=1), change)
    assert np.abs(given["convergence_delta"]).max() < 1e-5


def test_recurrent(rng: np.random.Generator) -> None:
    """Steps of a sequence [T, N, C], of any length."""
    source = text(
        """g (float[T, N, 4] x) => (float[N, 3] y) <int64[1] k = {0}>
        { all, h = LSTM<hidden_size = 3>(x, w, r) y = Squeeze(h, k) }""",
        w=rng.standard_normal((1, 12, 4)).astype(np.float32),
        r=rng.standard_normal((1, 12, 3)).astype(np.float32),
    )
    held = session(source)

    def score(values: Array) -> Array:
        (y,) = held.run(None, {"x": np.ascontiguousarray(values.swapaxes(0, 1))})
        return np.asarray(y[:, 1])

    compiled = compiled_and_checked(source, "occlusion", window="1,all", target=1)
    for length in (5, 2):
        x = rng.standard_normal((2, length, 4)).astype(np.float32)
        given = run(compiled, {"x": np.ascontiguousarray(x.swapaxes(0, 1))})["x_attribution"]
        close(given.swapaxes(0, 1), occluded(score, x, np.zeros(1), (1, 4), (1, 1)))


def test_beside_a_method_with_derivatives(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    methods = {"gradient": {}, "occlusion": {"chunk": 2}, "shapley-sampling": {"samples": 7}}
    given = run(compiled_and_checked(source, methods, target=2, delta=True), {"x": x})
    for name, options in methods.items():
        want = run(onnx_attrib.compile(source, name, target=2, **options), {"x": x})
        close(given[f"x_attribution_{name}"], want["x_attribution"])
    assert np.abs(given["convergence_delta_shapley-sampling"]).max() < 1e-5


# -- what is said of a compiled model --------------------------------------------------------------


def test_verify_evaluates_windows(rng: np.random.Generator) -> None:
    """``verify`` goes through windows one by one, and notices attributions of other windows."""
    source = cnn(rng)
    for options in ({"window": (3, 3, 2), "stride": (1, 2, 2)}, {"window": 2}, {}):
        found = verify(source, "occlusion", samples=2, **options)
        (check,) = [c for c in found.checks if c.name == "windows of 'x'"]
        assert found.ok
        assert check.status == "ok"
    compiled = onnx_attrib.compile(source, "occlusion", window=(1, 2, 2))
    (entry,) = [p for p in compiled.metadata_props if p.key == "onnx_attrib.options"]
    entry.value = entry.value.replace("[1, 2, 2]", "[1, 2, 3]")
    found = verify(compiled, source=source, samples=1)
    assert [c.name for c in found.checks if c.status == "OFF"] == ["windows of 'x'"]


def test_verify_sums_up_shapley_values(rng: np.random.Generator) -> None:
    found = verify(trees(rng, 3), "shapley-sampling", samples=1, baseline=0.5)
    assert found.ok
    assert "sum = S(x) − S(x̄)" in [c.name for c in found.checks if c.status == "ok"]


@pytest.mark.parametrize("method", ["occlusion", "shapley-sampling"])
def test_operators_have_cuda_kernels(rng: np.random.Generator, method: str) -> None:
    compiled = onnx_attrib.compile(cnn(rng, "N, 3, H, W"), method, window="all,2,2")
    assert loops(compiled) == 1
    off = {n.op_type for n in all_nodes(compiled) if placement(n.op_type, "", 21) != "cuda"}
    assert not off


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


@pytest.mark.parametrize(
    "window", ["3", 3, "3,3,3", " 3, 3 ,3", "(3, 3, 3)", np.int64(3), (3, 3, 3), [3, 3, 3]]
)
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
