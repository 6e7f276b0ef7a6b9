"""Methods against a background: DeepSHAP and expected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import OptionError
from onnx_attrib.verify import verify

from .test_contract import close, forward, gradient, mlp, run, text
from .test_noise import PRIME, restated_normal

Array = np.ndarray
METHODS = ("deep-shap", "expected-gradients")


def conv(rng: np.random.Generator, batch: str = "N") -> ModelProto:
    """A 1-D CNN with overlapping pools, a gate and a dense head."""
    shapes = {"w": (6, 3, 4), "v": (6, 3, 4), "b": (6,), "d": (6, 5)}
    arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return text(
        f"""g (float[{batch}, 3, 20] x) => (float[{batch}, 5] y)
        {{ c = Conv(x, w, b) r = Relu(c) p = MaxPool <kernel_shape = [3], strides = [2]> (r)
           e = Conv(x, v, b) s = Sigmoid(e) q = AveragePool <kernel_shape = [3], strides = [2]> (s)
           m = Mul(p, q) a = GlobalAveragePool(m) f = Flatten(a) y = MatMul(f, d) }}""",
        **arrays,
    )


def lstm(rng: np.random.Generator, batch: str = "N") -> ModelProto:
    """Sequences first, through an LSTM: its rule asks for more than the model's own outputs."""
    shapes = {"w": (1, 16, 3), "r": (1, 16, 4), "b": (1, 32), "d": (4, 5)}
    arrays = {k: 0.5 * rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return text(
        f"""g (float[{batch}, 6, 3] x) => (float[{batch}, 5] y) <int64[1] zero = {{0}}>
        {{ t = Transpose <perm = [1, 0, 2]> (x)
           o, h = LSTM <hidden_size = 4> (t, w, r, b) l = Squeeze(h, zero) y = MatMul(l, d) }}""",
        **arrays,
    )


def mixed(rng: np.random.Generator, batch: str = "N") -> ModelProto:
    """A Reshape to [N · T, C] keeps the batch from being stacked."""
    a = rng.standard_normal((5, 4)).astype(np.float32)
    d = rng.standard_normal((4, 5)).astype(np.float32)
    return text(
        f"""g (float[{batch}, 6, 5] x) => (float[{batch}, 5] y)
        <int64[2] flat = {{-1, 5}}, int64[3] back = {{-1, 6, 4}}, int64[1] axis = {{1}}>
        {{ r = Reshape(x, flat) h = MatMul(r, a) t = Tanh(h) u = Reshape(t, back)
           s = ReduceSum <keepdims = 0> (u, axis) e = Softplus(s) y = MatMul(e, d) }}""",
        a=a,
        d=d,
    )


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (conv, (3, 20)),
    "lstm": (lstm, (6, 3)),
    "mixed": (mixed, (6, 5)),
}


def drawn(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal((count, *shape)).astype(np.float32)


def one_by_one(
    source: ModelProto, feeds: Mapping[str, Array], backgrounds: Mapping[str, Array], **request: Any
) -> dict[str, Array]:
    """The mean of DeepLIFT over the references, each given at run time."""
    compiled = onnx_attrib.compile(source, "deeplift", baseline="input", delta=True, **request)
    count = max(map(len, backgrounds.values()))
    found = []
    for k in range(count):
        one = {f"{name}_baseline": b[k : k + 1] for name, b in backgrounds.items()}
        for info in compiled.graph.input:
            if info.name in one and info.type.tensor_type.shape.dim[0].dim_value > 1:
                size = info.type.tensor_type.shape.dim[0].dim_value
                one[info.name] = np.repeat(one[info.name], size, axis=0)
        found.append(run(compiled, {**feeds, **one}))
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", ["array", "input"])
@pytest.mark.parametrize(("count", "chunk"), [(1, 10), (7, 1), (7, 3), (7, 7), (8, 50), (3, 2)])
def test_deep_shap_is_the_mean_of_deeplift(
    rng: np.random.Generator, name: str, given: str, count: int, chunk: int
) -> None:
    make, shape = MODELS[name]
    source, x, base = make(rng), drawn(rng, 4, shape), drawn(rng, count, shape)
    feeds = {"x": x, "target": np.array([4, 0, -1, 2])}
    compiled = onnx_attrib.compile(
        source, "deep-shap", baseline=base if given == "array" else "input", delta=True, chunk=chunk
    )
    onnx.checker.check_model(compiled, full_check=True)
    more = {"x_baseline": base} if given == "input" else {}
    result = run(compiled, {**feeds, **more})
    expected = one_by_one(source, feeds, {"x": base})
    close(result["x_attribution"], expected["x_attribution"], 1e-5)
    scale = np.abs(result["x_attribution"]).sum(axis=(1, 2))
    assert result["convergence_delta"].shape == (4,)
    assert (np.abs(result["convergence_delta"]) < 1e-5 * scale).all()
    # Sums to the difference that the source makes, exactly.
    own, there = (run(source, {"x": v})["y"].astype(np.float64) for v in (x, base))
    target = np.where(feeds["target"] < 0, own.argmax(1), feeds["target"])
    change = (own - there.mean(0))[np.arange(4), target]
    np.testing.assert_allclose(
        result["x_attribution"].sum(axis=(1, 2), dtype=np.float64), change, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", ["1", "3"])
def test_deep_shap_with_a_fixed_batch(rng: np.random.Generator, name: str, batch: str) -> None:
    make, shape = MODELS[name]
    source = make(rng, batch)
    x, base = drawn(rng, int(batch), shape), drawn(rng, 5, shape)
    for given in ("array", "input"):
        baseline = base if given == "array" else "input"
        compiled = onnx_attrib.compile(source, "deep-shap", target=1, baseline=baseline, delta=True)
        more = {"x_baseline": base} if given == "input" else {}
        result = run(compiled, {"x": x, **more})
        expected = one_by_one(source, {"x": x}, {"x": base}, target=1)
        close(result["x_attribution"], expected["x_attribution"], 1e-5)
        assert np.abs(result["convergence_delta"]).max() < 1e-4


def test_deep_shap_with_one_reference_is_deeplift(rng: np.random.Generator) -> None:
    """A number is a background of one: the same graph, without a Loop."""
    source, x = conv(rng), drawn(rng, 3, (3, 20))
    feeds = {"x": x, "target": np.array([1, 2, 3])}
    for baseline in ("zeros", 0.5, drawn(rng, 1, (3, 20))):
        found = []
        for method in ("deeplift", "deep-shap"):
            compiled = onnx_attrib.compile(source, method, baseline=baseline, delta=True)
            assert "Loop" not in {node.op_type for node in compiled.graph.node}
            found.append(run(compiled, feeds))
        for name in ("x_attribution", "convergence_delta"):
            np.testing.assert_array_equal(found[0][name], found[1][name])


def test_deep_shap_has_the_options_of_deeplift(rng: np.random.Generator) -> None:
    source, x, base = conv(rng), drawn(rng, 2, (3, 20)), drawn(rng, 4, (3, 20))
    options = {"maxpool": "gradient", "product": "gradient"}
    compiled = onnx_attrib.compile(
        source, "deep_shap", target=0, baseline=base, delta=True, **options
    )
    result = run(compiled, {"x": x})
    expected = one_by_one(source, {"x": x}, {"x": base}, target=0, **options)
    close(result["x_attribution"], expected["x_attribution"], 1e-5)
    close(result["convergence_delta"], expected["convergence_delta"], 1e-4)
    assert np.abs(result["convergence_delta"]).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_samples_do_not_depend_on_their_batch(
    rng: np.random.Generator, method: str, name: str
) -> None:
    make, shape = MODELS[name]
    x, base = drawn(rng, 7, shape), drawn(rng, 5, shape)
    more = {"noise": 0.2} if method == "expected-gradients" else {}
    compiled = onnx_attrib.compile(make(rng), method, target=2, baseline=base, chunk=3, **more)
    together = run(compiled, {"x": x})["x_attribution"]
    for n in range(7):
        alone = run(compiled, {"x": x[n : n + 1]})["x_attribution"]
        close(alone, together[n : n + 1], 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 10])
@pytest.mark.parametrize("given", ["array", "input"])
def test_several_inputs(rng: np.random.Generator, chunk: int, given: str) -> None:
    source = text(
        """g (float[N, 4] a, float[N, 4] b, float[N, 4] c) => (float[N, 4] y)
        { p = Mul(a, b) q = Add(p, c) y = Tanh(q) }"""
    )
    feeds = {k: drawn(rng, 3, (4,)) for k in "abc"}
    base = {"a": drawn(rng, 5, (4,)), "b": drawn(rng, 5, (4,))}
    more = {f"{k}_baseline": v for k, v in base.items()} if given == "input" else {}
    compiled = onnx_attrib.compile(
        source,
        "deep-shap",
        inputs=["a", "b"],
        target=1,
        baseline="input" if given == "input" else base,
        delta=True,
        chunk=chunk,
    )
    result = run(compiled, {**feeds, **more})
    expected = one_by_one(source, feeds, base, inputs=["a", "b"], target=1)
    # The third input stays at its value, so references are not the same for all samples.
    assert np.abs(result["convergence_delta"]).max() < 1e-5
    for k in "ab":
        close(result[f"{k}_attribution"], expected[f"{k}_attribution"], 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_layer_and_input(rng: np.random.Generator, chunk: int) -> None:
    """A layer beside the input that it is computed from, the layer with its batch behind."""
    source = text(
        """g (float[N, 6, 3] x) => (float[N, 3] y) <int64[1] axis = {0}>
        { t = Transpose <perm = [1, 0, 2]> (x) s = Sigmoid(t) z = Mul(s, t)
          y = ReduceMax <keepdims = 0> (z, axis) }"""
    )
    x, base = drawn(rng, 4, (6, 3)), drawn(rng, 5, (6, 3))
    request: dict[str, Any] = {"inputs": ["x", "s"], "target": 2}
    compiled = onnx_attrib.compile(
        source, "deep-shap", baseline="input", delta=True, chunk=chunk, **request
    )
    result = run(compiled, {"x": x, "x_baseline": base})
    expected = one_by_one(source, {"x": x}, {"x": base}, **request)
    for name in ("x", "s"):
        close(result[f"{name}_attribution"], expected[f"{name}_attribution"], 1e-5)
    assert np.abs(result["convergence_delta"]).max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_token_ids(rng: np.random.Generator, method: str) -> None:
    """A background of token ids, attributed at their embeddings."""
    table, head = (rng.standard_normal(s).astype(np.float32) for s in ((11, 4), (4, 3)))
    source = text(
        """g (int64[N, T] ids) => (float[N, 3] y) <int64[1] axis = {1}>
        { e = Gather(table, ids) t = Tanh(e)
          p = ReduceSum <keepdims = 0> (t, axis) y = MatMul(p, head) }""",
        table=table,
        head=head,
    )
    ids, base = rng.integers(0, 11, (2, 6)), rng.integers(0, 11, (5, 6))
    more = {"samples": 4000} if method == "expected-gradients" else {}
    for chunk in (2, 10):
        compiled = onnx_attrib.compile(
            source, method, target=1, baseline="input", chunk=chunk, **more
        )
        result = run(compiled, {"ids": ids, "ids_baseline": base})["e_attribution"]
        change = (np.tanh(table[ids])[:, None] - np.tanh(table[base])) * head[:, 1]
        close(result, change.mean(1), 1e-5 if method == "deep-shap" else 0.1)
        more = {}
        if method == "expected-gradients":
            return


def test_several_targets_and_methods(rng: np.random.Generator) -> None:
    source, x, base = conv(rng), drawn(rng, 3, (3, 20)), drawn(rng, 6, (3, 20))
    methods = ["deep-shap", "expected-gradients", "smoothgrad"]
    compiled = onnx_attrib.compile(source, methods, targets="top3", baseline=base, delta=True)
    result = run(compiled, {"x": x})
    order = np.argsort(-run(source, {"x": x})["y"], axis=1)
    for method in methods:
        alone = onnx_attrib.compile(source, method, baseline=base, delta=method == "deep-shap")
        name = f"x_attribution_{method}"
        assert result[name].shape == (3, 3, 3, 20)
        for rank in range(3):
            expected = run(alone, {"x": x, "target": order[:, rank]})
            close(result[name][:, rank], expected["x_attribution"], 1e-5)
    assert result["convergence_delta_deep-shap"].shape == (3, 3)
    assert np.abs(result["convergence_delta_deep-shap"]).max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_sizes_known_at_run_time(rng: np.random.Generator, method: str) -> None:
    w = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    source = text(
        """g (float[N, 3, H, W] x) => (float[N, 2] y)
        { c = Conv(x, w) r = Relu(c) a = GlobalMaxPool(r) y = Flatten(a) }""",
        w=w,
    )
    x, base = drawn(rng, 2, (3, 9, 7)), drawn(rng, 5, (3, 9, 7))
    found = []
    for baseline in (base, "input"):
        compiled = onnx_attrib.compile(source, method, target=1, baseline=baseline, chunk=2)
        more = {"x_baseline": base} if isinstance(baseline, str) else {}
        found.append(run(compiled, {"x": x, **more})["x_attribution"])
    close(found[0], found[1])
    if method == "deep-shap":
        expected = one_by_one(source, {"x": x}, {"x": base}, target=1)
        close(found[0], expected["x_attribution"])


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_loop_reads_what_was_cast_back(rng: np.random.Generator, chunk: int) -> None:
    """ONNX Runtime 1.31 drops the pair of Casts and then misses f in the Loop."""
    source = text(
        """g (float[N, 4] x) => (float[N, 4] y)
        { d = Cast <to = 11> (x) f = Cast <to = 1> (d) t = Tanh(f) y = Mul(t, f) }"""
    )
    x, base = drawn(rng, 3, (4,)), drawn(rng, 5, (4,))
    compiled = onnx_attrib.compile(source, "deep-shap", target=1, baseline=base, chunk=chunk)
    expected = one_by_one(source, {"x": x}, {"x": base}, target=1)
    close(run(compiled, {"x": x})["x_attribution"], expected["x_attribution"])


def test_memory_is_one_chunk(rng: np.random.Generator) -> None:
    source, base = conv(rng), drawn(rng, 50, (3, 20))
    for method in METHODS:
        compiled = onnx_attrib.compile(source, method, baseline=base, chunk=5, provider="cuda")
        (loop,) = [node for node in compiled.graph.node if node.op_type == "Loop"]
        trips = {t.name: onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer}
        assert trips[loop.input[0]] == 10


# -- expected gradients ----------------------------------------------------------------------------


def draws(seed: int, samples: int, count: int) -> tuple[Array, Array]:
    """α and the background's row of each draw, from the description of the numbers."""
    from hashlib import sha256

    words = [sha256(f"{seed}/path/{j}".encode()).digest() for j in range(samples)]
    keys = [[int.from_bytes(w[i : i + 8], "big") % PRIME for i in (0, 8)] for w in words]
    alphas, rows = np.array(keys).T
    return (alphas + 0.5) / PRIME, rows % count


@pytest.mark.parametrize("batch", ["N", "3"])
@pytest.mark.parametrize("given", ["array", "input"])
@pytest.mark.parametrize(("seed", "chunk"), [(0, 4), (5, 1), (5, 13)])
@pytest.mark.parametrize("stdev", [0.0, 0.3])
def test_expected_gradients(
    rng: np.random.Generator, batch: str, given: str, seed: int, chunk: int, stdev: float
) -> None:
    """The paper's mean over the draws in float64, for GradientSHAP with noise on x."""
    source = mlp(rng, batch)
    x, base = drawn(rng, 3, (5,)), drawn(rng, 7, (5,))
    compiled = onnx_attrib.compile(
        source,
        "expected-gradients",
        target=(2),
        baseline=base if given == "array" else "input",
        samples=13,
        seed=seed,
        chunk=chunk,
        noise=stdev,
    )
    more = {"x_baseline": base} if given == "input" else {}
    result = run(compiled, {"x": x, **more})["x_attribution"]
    alphas, rows = draws(seed, 13, 7)
    epsilon = restated_normal(seed, "noise/0", 13, 5)
    terms = []
    for alpha, row, e in zip(alphas, rows, epsilon, strict=True):
        noisy = x.astype(np.float64) + stdev * e
        point = base[row] + alpha * (noisy - base[row])
        terms.append((noisy - base[row]) * gradient(source, point, np.eye(4)[[2] * 3]))
    close(result, np.mean(terms, axis=0), 2e-6)


def test_draws_are_uniform() -> None:
    alphas, rows = draws(0, 4000, 10)
    assert abs(alphas.mean() - 0.5) < 0.02
    assert abs(alphas.var() - 1 / 12) < 0.005
    assert np.bincount(rows, minlength=10).min() > 300
    assert abs(np.corrcoef(alphas, rows)[0, 1]) < 0.06


def test_expected_gradients_converge(rng: np.random.Generator) -> None:
    """The sum approaches S(x) − mean S(x̄) like 1/√samples."""
    source = mlp(rng)
    x, base = drawn(rng, 6, (5,)), drawn(rng, 9, (5,))
    change = forward(source, x)[:, 1] - forward(source, base)[:, 1].mean()
    errors = []
    for samples in (40, 4000):
        squares = []
        for seed in range(6):
            compiled = onnx_attrib.compile(
                source,
                "expected-gradients",
                target=1,
                baseline=base,
                samples=samples,
                seed=seed,
                chunk=500,
            )
            total = run(compiled, {"x": x})["x_attribution"].sum(1, dtype=np.float64)
            squares.append(np.mean((total - change) ** 2))
        errors.append(np.sqrt(np.mean(squares)))
    # A hundred times the draws, a tenth of the error.
    assert 5 < errors[0] / errors[1] < 20
    assert errors[1] < 0.1 * np.abs(change).max()


# -- refusals --------------------------------------------------------------------------------------


def test_refusals(rng: np.random.Generator) -> None:
    source, base = mlp(rng), drawn(rng, 7, (5,))
    with pytest.raises(OptionError, match=r"\[7, 3\].*background"):
        onnx_attrib.compile(source, "deep-shap", baseline=base[:, :3])
    with pytest.raises(OptionError, match="batch 1"):
        onnx_attrib.compile(source, ["deep-shap", "deeplift"], baseline=base)
    with pytest.raises(OptionError, match="compile them apart"):
        onnx_attrib.compile(source, ["deep-shap", "deeplift"], baseline="input")
    with pytest.raises(OptionError, match=r"delta is for: .*deep-shap"):
        onnx_attrib.compile(source, "expected-gradients", delta=True)
    with pytest.raises(OptionError, match="background"):
        onnx_attrib.compile(source, "deep-shap", baseline=base[:0])
    last = text("g (float[4, N] x) => (float[N, 4] y) { y = Transpose <perm = [1, 0]> (x) }")
    with pytest.raises(OptionError, match="first axis"):
        onnx_attrib.compile(last, "deep-shap", target=0)
    two = text("g (float[N, 4] a, float[N, 4] b) => (float[N, 4] y) { y = Mul(a, b) }")
    unequal = {"a": drawn(rng, 3, (4,)), "b": drawn(rng, 2, (4,))}
    with pytest.raises(OptionError, match="as many samples"):
        onnx_attrib.compile(two, "deep-shap", baseline=unequal)


def test_explainer_and_verify(rng: np.random.Generator) -> None:
    source, x, base = conv(rng), drawn(rng, 2, (3, 20)), drawn(rng, 5, (3, 20))
    compiled = onnx_attrib.compile(source, "deep-shap", baseline="input", delta=True)
    explain = onnx_attrib.Explainer(compiled)
    result = explain(x, target=1, baseline=base)
    expected = one_by_one(source, {"x": x}, {"x": base}, target=1)
    close(result.attributions["x"], expected["x_attribution"])
    assert explain(x, target=1, baseline=0.5).attributions["x"].shape == x.shape
    with pytest.raises(OptionError, match="as many samples"):
        explain(x, target=1, baseline=base[:0])
    for given in (None, base):
        found = verify(compiled, source=source, baseline=given)
        assert found.ok
        assert sum(check.status == "ok" for check in found.checks) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("stdev", [0.0, 0.3])
def test_captum(monkeypatch: pytest.MonkeyPatch, draw: int, stdev: float) -> None:
    """Captum's GradientShap, which is handed the same draws."""
    torch = pytest.importorskip("torch")
    attr = pytest.importorskip("captum.attr")
    pytest.importorskip("onnxscript")
    from . import zoo

    torch.manual_seed(draw)
    rng = np.random.default_rng(draw)
    width, count, samples = (int(k) for k in rng.integers(5, 12, 3))
    nn = torch.nn
    module = nn.Sequential(
        nn.Linear(6, width), nn.Softplus(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
    )
    x, base = drawn(rng, 3, (6,)), drawn(rng, count, (6,))
    source = zoo.export(module, torch.from_numpy(x), "dynamo")
    compiled = onnx_attrib.compile(
        source,
        "expected-gradients",
        target=2,
        baseline=base,
        samples=samples,
        noise=stdev,
        seed=draw,
        chunk=4,
    )
    alphas, rows = draws(draw, samples, count)
    epsilon = restated_normal(draw, "noise/0", samples, 6)
    # All draws of a sample one after the other.
    monkeypatch.setattr(np.random, "choice", lambda n, size: np.tile(rows, 3))
    monkeypatch.setattr(np.random, "uniform", lambda low, high, size: np.tile(alphas, 3))
    noise = torch.from_numpy(np.tile(epsilon, (3, 1)).astype(np.float32))
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise * std)
    expected = attr.GradientShap(module).attribute(
        torch.from_numpy(x), torch.from_numpy(base), n_samples=samples, stdevs=stdev, target=2
    )
    close(run(compiled, {"x": x})["x_attribution"], expected.detach().numpy(), 1e-4)
