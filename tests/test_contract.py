"""The contract of the compiled graph: targets, baselines, outputs, metadata, layers."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, parser

import onnx_attrib
from onnx_attrib import CompileError, OptionError, UnsupportedOpError

MODELS = Path(__file__).parent.parent / "models"
HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def run(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def text(body: str, **arrays: np.ndarray) -> ModelProto:
    """A model from ONNX text, with ``arrays`` as further initializers."""
    model = parser.parse_model(f"{HEADER} {body}")
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def mlp(rng: np.random.Generator, batch: str = "N", classes: int = 4) -> ModelProto:
    """Dense → Tanh → dense, with random weights."""
    shapes = {"a": (5, 7), "b": (7,), "c": (7, classes)}
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    return text(
        f"""g (float[{batch}, 5] x) => (float[{batch}, {classes}] y)
        {{ h = MatMul(x, a) k = Add(h, b) t = Tanh(k) y = MatMul(t, c) }}""",
        **arrays,
    )


def weights(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def forward(model: ModelProto, x: np.ndarray) -> np.ndarray:
    """``mlp`` in float64."""
    w = weights(model)
    return np.tanh(x.astype(np.float64) @ w["a"] + w["b"]) @ w["c"]


def gradient(model: ModelProto, x: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The gradient of Σ seed · ``mlp`` in float64."""
    w = weights(model)
    t = np.tanh(x.astype(np.float64) @ w["a"] + w["b"])
    return ((seed @ w["c"].T) * (1 - t**2)) @ w["a"].T


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = max(float(np.abs(b).max()), 1e-12)
    assert a.shape == b.shape
    assert float(np.abs(a - b).max()) <= tolerance * scale


# -- the graph -------------------------------------------------------------------------------------


def test_interface_stays_and_attributions_follow(rng: np.random.Generator) -> None:
    source = mlp(rng)
    before = source.SerializeToString()
    compiled = onnx_attrib.compile(source, method="gradient")
    assert source.SerializeToString() == before, "the caller's model is not touched"
    onnx.checker.check_model(compiled, full_check=True)
    assert [i.name for i in compiled.graph.input] == ["x", "target"]
    assert [o.name for o in compiled.graph.output] == ["y", "x_attribution"]
    assert compiled.graph.input[0] == source.graph.input[0]
    assert compiled.graph.output[0] == source.graph.output[0]
    assert {node.domain for node in compiled.graph.node} == {""}
    assert (compiled.opset_import[0].version, compiled.ir_version) == (21, 10)


def test_metadata(rng: np.random.Generator, tmp_path: Path) -> None:
    source = mlp(rng)
    source.metadata_props.add(key="owner", value="somebody")
    path = tmp_path / "m.onnx"
    path.write_bytes(source.SerializeToString())
    compiled = onnx_attrib.compile(path, method="epsilon_lrp", target=-1, epsilon=0.01)
    entries = {prop.key: prop.value for prop in compiled.metadata_props}
    assert entries["owner"] == "somebody"
    assert entries["onnx_attrib.method"] == "epsilon-lrp"
    assert json.loads(entries["onnx_attrib.options"]) == {"epsilon": 0.01}
    assert entries["onnx_attrib.output"] == "y"
    assert json.loads(entries["onnx_attrib.inputs"]) == ["x"]
    assert json.loads(entries["onnx_attrib.target"]) == -1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert entries["onnx_attrib.source_sha256"] == digest


def test_node_metadata_is_kept(rng: np.random.Generator) -> None:
    source = mlp(rng)
    source.graph.node[2].doc_string = "the nonlinearity"
    source.graph.node[2].metadata_props.add(key="layer", value="3")
    compiled = onnx_attrib.compile(source, method="deeplift")
    (kept,) = [node for node in compiled.graph.node if list(node.output) == ["t"]]
    assert kept.doc_string == "the nonlinearity"
    assert [(p.key, p.value) for p in kept.metadata_props] == [("layer", "3")]


# -- targets ---------------------------------------------------------------------------------------


def test_target_input_explicit_and_predicted(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((6, 5)).astype(np.float32)
    target = np.array([0, 3, -1, 2, -1, -5])
    result = run(onnx_attrib.compile(source, method="gradient"), {"x": x, "target": target})
    y = forward(source, x)
    chosen = np.where(target < 0, y.argmax(1), target)
    close(result["x_attribution"], gradient(source, x, np.eye(4)[chosen]))


@pytest.mark.parametrize("target", [0, 3, -1])
def test_target_fixed(rng: np.random.Generator, target: int) -> None:
    source = mlp(rng)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    compiled = onnx_attrib.compile(source, method="gradient", target=target)
    assert [i.name for i in compiled.graph.input] == ["x"]
    y = forward(source, x)
    chosen = y.argmax(1) if target < 0 else np.full(3, target)
    close(run(compiled, {"x": x})["x_attribution"], gradient(source, x, np.eye(4)[chosen]))


def test_target_argmax_and_seed(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    result = run(onnx_attrib.compile(source, method="gradient", target="argmax"), {"x": x})
    seed = np.eye(4, dtype=np.float32)[forward(source, x).argmax(1)]
    close(result["x_attribution"], gradient(source, x, seed))
    seed = rng.standard_normal((3, 4)).astype(np.float32)
    compiled = onnx_attrib.compile(source, method="gradient", target="seed")
    close(run(compiled, {"x": x, "seed": seed})["x_attribution"], gradient(source, x, seed))


def test_target_out_of_range_is_loud(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    compiled = onnx_attrib.compile(source, method="gradient")
    result = run(compiled, {"x": x, "target": np.array([4, 1])})["x_attribution"]
    assert np.isnan(result[0]).all()
    assert np.isfinite(result[1]).all()
    with pytest.raises(OptionError, match="out of range"):
        onnx_attrib.compile(source, target=4)
    with pytest.raises(OptionError, match="rank 2"):
        onnx_attrib.compile(source, target=(1, 2))


@pytest.mark.parametrize("shape", ["N", "N, 1"])
def test_single_value_outputs_need_no_target(shape: str) -> None:
    tail = "y = ReduceSum <keepdims = 0> (s, a)" if shape == "N" else "y = ReduceSum (s, a)"
    source = text(
        f"g (float[N, 3] x) => (float[{shape}] y) <int64[1] a = {{1}}> {{ s = Mul(x, x) {tail} }}"
    )
    compiled = onnx_attrib.compile(source, method="gradient")
    assert [i.name for i in compiled.graph.input] == ["x"]
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    close(run(compiled, {"x": x})["x_attribution"], 2 * x)
    with pytest.raises(OptionError, match="one value"):
        onnx_attrib.compile(source, target=2)


def test_scalar_output() -> None:
    source = text(
        "g (float[N, 3] x) => (float y) { s = Mul(x, x) y = ReduceSum <keepdims = 0> (s) }"
    )
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    compiled = onnx_attrib.compile(source, method="deeplift", delta=True, baseline=1.0)
    result = run(compiled, {"x": x})
    close(result["x_attribution"], x * x - 1)


@pytest.mark.parametrize("dims", ["N, 3, 4, 5", "N, C, H, W"])
def test_target_of_higher_rank(rng: np.random.Generator, dims: str) -> None:
    source = text(f"g (float[{dims}] x) => (float[{dims}] y) {{ y = Exp(x) }}")
    x = rng.standard_normal((3, 3, 4, 5)).astype(np.float32)
    target = np.array([[0, 1, 2], [-1, 3, 4], [2, 0, 0]])
    compiled = onnx_attrib.compile(source, method="gradient")
    result = run(compiled, {"x": x, "target": target})["x_attribution"]
    expected = np.zeros_like(x)
    for n, (c, i, j) in enumerate(target):
        c = x[n, :, i, j].argmax() if c < 0 else c
        expected[n, c, i, j] = np.exp(x[n, c, i, j])
    close(result, expected)
    for fixed in [(1, 2, 3), (-1, 2, 3)]:
        compiled = onnx_attrib.compile(source, method="gradient", target=fixed)
        result = run(compiled, {"x": x})["x_attribution"]
        expected = np.zeros_like(x)
        for n in range(3):
            c = x[n, :, 2, 3].argmax() if fixed[0] < 0 else 1
            expected[n, c, 2, 3] = np.exp(x[n, c, 2, 3])
        close(result, expected)
    result = run(onnx_attrib.compile(source, method="gradient", target="argmax"), {"x": x})
    assert (np.count_nonzero(result["x_attribution"].reshape(3, -1), axis=1) == 1).all()


# -- baselines -------------------------------------------------------------------------------------


def difference(source: ModelProto, x: np.ndarray, base: np.ndarray, target: int) -> np.ndarray:
    return (forward(source, x) - forward(source, np.broadcast_to(base, x.shape)))[:, target]


@pytest.mark.parametrize("kind", ["zeros", "number", "row", "batch", "file"])
def test_fixed_baselines(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    source = mlp(rng)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    row = rng.standard_normal(5)
    np.save(tmp_path / "b.npy", row)
    given = {
        "zeros": "zeros",
        "number": 0.5,
        "row": row,
        "batch": row[None],
        "file": str(tmp_path / "b.npy"),
    }
    base = {"zeros": np.zeros(5), "number": np.full(5, 0.5)}.get(kind, row).astype(np.float32)
    compiled = onnx_attrib.compile(source, target=2, baseline=given[kind], delta=True)
    result = run(compiled, {"x": x})
    close(result["x_attribution"].sum(1), difference(source, x, base, 2), 1e-5)
    assert np.abs(result["convergence_delta"]).max() < 1e-5
    assert result["convergence_delta"].shape == (3,)


@pytest.mark.parametrize("rows", [1, 3])
def test_run_time_baseline(rng: np.random.Generator, rows: int) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((n, 5)).astype(np.float32) for n in (3, rows))
    compiled = onnx_attrib.compile(source, target=1, baseline="input")
    assert [i.name for i in compiled.graph.input] == ["x", "x_baseline"]
    result = run(compiled, {"x": x, "x_baseline": base})
    close(result["x_attribution"].sum(1), difference(source, x, base, 1), 1e-5)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (np.zeros(6), r"shape \[1, 6\]"),
        (np.zeros((2, 5)), r"shape \[2, 5\]"),
        (np.array(["a"] * 5), "real numbers"),
        (np.array([0, 0, np.nan, 0, 0]), "not finite"),
        (np.zeros(5, complex), "real numbers"),
        ({"z": np.zeros(5)}, "missing"),
        ("nothing.npy", "nor a file that exists"),
    ],
)
def test_bad_baselines(rng: np.random.Generator, baseline: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onnx_attrib.compile(mlp(rng), baseline=baseline)  # type: ignore[arg-type]


def test_several_inputs_share_the_difference(rng: np.random.Generator) -> None:
    source = text(
        "g (float[N, 4] a, float[N, 4] b) => (float[N, 4] y) { p = Mul(a, b) y = Tanh(p) }"
    )
    feeds = {k: rng.standard_normal((3, 4)).astype(np.float32) for k in "ab"}
    bases = {k: rng.standard_normal((1, 4)).astype(np.float32) for k in "ab"}
    compiled = onnx_attrib.compile(source, target=2, baseline=bases, delta=True)
    result = run(compiled, feeds)
    total = result["a_attribution"].sum(1) + result["b_attribution"].sum(1)
    change = np.tanh(feeds["a"] * feeds["b"]) - np.tanh(bases["a"] * bases["b"])
    close(total, change[:, 2], 1e-5)
    alone = onnx_attrib.compile(source, inputs="a", target=2, baseline="input")
    assert [i.name for i in alone.graph.input] == ["a", "b", "a_baseline"]
    result = run(alone, {**feeds, "a_baseline": bases["a"]})
    change = np.tanh(feeds["a"] * feeds["b"]) - np.tanh(bases["a"] * feeds["b"])
    close(result["a_attribution"].sum(1), change[:, 2], 1e-5)


@pytest.mark.parametrize("method", ["deeplift", "integrated-gradients"])
def test_outputs_that_sum_over_the_batch(rng: np.random.Generator, method: str) -> None:
    """One reference cannot stand for N samples that are added up."""
    source = text(
        "g (float[N, 4] x) => (float[1, 4] y) <int64[1] a = {0}> { s = ReduceSum(x, a) y = Exp(s) }"
    )
    x, base = (rng.standard_normal((n, 4)).astype(np.float32) for n in (3, 1))
    result = run(
        onnx_attrib.compile(source, method, baseline="input", target="seed"),
        {"x": x, "x_baseline": base, "seed": np.ones((1, 4), np.float32)},
    )
    change = np.exp(x.sum(0)) - np.exp(3 * base[0])
    close(result["x_attribution"].sum(0), change, 1e-4)


def test_batch_on_another_axis(rng: np.random.Generator) -> None:
    """A time-first input: the residual is still one number a sample."""
    source = text(
        """g (float[5, N, 3] x) => (float[N, 3] y) <int64[1] a = {0}>
        { t = Tanh(x) y = ReduceSum <keepdims = 0> (t, a) }"""
    )
    x = rng.standard_normal((5, 4, 3)).astype(np.float32)
    result = run(onnx_attrib.compile(source, target=1, delta=True, baseline=0.5), {"x": x})
    change = (np.tanh(x) - np.tanh(0.5)).sum(0)[:, 1]
    close(result["x_attribution"].sum((0, 2)), change)
    assert result["convergence_delta"].shape == (4,)
    assert np.abs(result["convergence_delta"]).max() < 1e-5


# -- layers, embeddings ----------------------------------------------------------------------------


def test_layer_attribution(rng: np.random.Generator) -> None:
    source = mlp(rng)
    x, base = (rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    w = weights(source)
    compiled = onnx_attrib.compile(source, inputs=["k", "x"], target=1, baseline="input")
    result = run(compiled, {"x": x, "x_baseline": base[:1]})
    for name in ("k", "x"):
        change = difference(source, x, base[:1], 1)
        close(result[f"{name}_attribution"].sum(1), change, 1e-5)
    zero = onnx_attrib.compile(source, inputs=["k"], target=1, delta=True)
    result = run(zero, {"x": x})
    close(result["k_attribution"].sum(1), np.tanh(x @ w["a"] + w["b"]) @ w["c"][:, 1], 1e-5)
    inner = onnx_attrib.compile(source, method="gradient", output="t", target="seed")
    seed = rng.standard_normal((3, 7)).astype(np.float32)
    expected = (seed * (1 - np.tanh(x @ w["a"] + w["b"]) ** 2)) @ w["a"].T
    close(run(inner, {"x": x, "seed": seed})["x_attribution"], expected)


@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated-gradients"])
def test_embeddings_are_the_default_for_ids(rng: np.random.Generator, method: str) -> None:
    table, head = (rng.standard_normal(s).astype(np.float32) for s in ((11, 4), (4, 3)))
    source = text(
        """g (int64[N, 6] ids) => (float[N, 3] y) <int64[1] axis = {1}>
        { e = Gather(table, ids) t = Tanh(e)
          p = ReduceSum <keepdims = 0> (t, axis) y = MatMul(p, head) }""",
        table=table,
        head=head,
    )
    ids = rng.integers(0, 11, (2, 6))
    compiled = onnx_attrib.compile(source, method=method, target=1)
    result = run(compiled, {"ids": ids})["e_attribution"]
    assert result.shape == (2, 6, 4)
    if method == "gradient":
        close(result, (1 - np.tanh(table[ids]) ** 2) * head[:, 1])
    else:
        close(result, np.tanh(table[ids]) * head[:, 1], 1e-4)
    if method == "deeplift":
        compiled = onnx_attrib.compile(source, target=1, baseline="input")
        other = rng.integers(0, 11, (1, 6))
        result = run(compiled, {"ids": ids, "ids_baseline": other})["e_attribution"]
        close(result, (np.tanh(table[ids]) - np.tanh(table[other])) * head[:, 1], 1e-4)
    with pytest.raises(OptionError, match="embedding"):
        onnx_attrib.compile(source, inputs=["ids"])


# -- requests that cannot be met -------------------------------------------------------------------


def test_unknown_names_are_suggested(rng: np.random.Generator) -> None:
    source = mlp(rng)
    with pytest.raises(OptionError, match="did you mean 'deeplift'"):
        onnx_attrib.compile(source, method="deplift")
    with pytest.raises(OptionError, match="did you mean 'maxpool'"):
        onnx_attrib.compile(source, method="deeplift", max_pool="gradient")
    with pytest.raises(OptionError, match="conserve, gradient"):
        onnx_attrib.compile(source, method="deeplift", maxpool="all")
    with pytest.raises(OptionError, match="no tensor 'z'"):
        onnx_attrib.compile(source, inputs=["z"])
    with pytest.raises(OptionError, match="no tensor 'logits'"):
        onnx_attrib.compile(source, output="logits")
    with pytest.raises(OptionError, match="constant"):
        onnx_attrib.compile(source, inputs=["a"])
    with pytest.raises(OptionError, match="sum to the output"):
        onnx_attrib.compile(source, method="gradient", delta=True)
    with pytest.raises(OptionError, match="at least 1"):
        onnx_attrib.compile(source, method="integrated-gradients", steps=0)
    with pytest.raises(OptionError, match="whole number"):
        onnx_attrib.compile(source, method="integrated-gradients", steps=2.5)


def test_all_unsupported_nodes_are_listed() -> None:
    source = text("""g (float[N, 4] x) => (float[N, 4] y) { a = Exp(x) b = Relu(a) y = Exp(b) }""")
    source.opset_import.add(domain="com.example", version=1)
    for i, name in ((0, "first"), (2, "")):
        node = source.graph.node[i]
        node.op_type, node.domain, node.name = "Swirl", "com.example", name
    with pytest.raises(UnsupportedOpError) as caught:
        onnx_attrib.compile(source)
    found = [(offence.op, offence.domain) for offence in caught.value.offences]
    assert found == [("Swirl", "com.example")] * 2
    assert "'first'" in str(caught.value)
    assert "'y'" in str(caught.value), "a node without a name is named by its output"


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_left_as_it_was(enabled: bool) -> None:
    model = text("agraph (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        onnx_attrib.compile(model, "gradient", target="seed")
        assert gc.isenabled() == enabled
        with pytest.raises(OptionError):
            onnx_attrib.compile(model, "gradient", target="seed", inputs="missing")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_cut_and_missing_paths_are_explained() -> None:
    cut = text("g (float[N, 4] x) => (float[N, 4] y) { r = Floor(x) y = Exp(r) }")
    with pytest.raises(CompileError, match="Floor"):
        onnx_attrib.compile(cut)
    apart = text(
        """g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y, float[N, 4] w)
        { y = Exp(x) w = Exp(z) }"""
    )
    with pytest.raises(CompileError, match="does not depend on 'z'"):
        onnx_attrib.compile(apart, inputs=["z"])
    integer = text("g (int64[N, 4] x) => (int64[N, 4] y) { y = Abs(x) }")
    with pytest.raises(CompileError, match="no float output"):
        onnx_attrib.compile(integer)


def test_names_never_collide(rng: np.random.Generator) -> None:
    source = text("g (float[N, 4] x) => (float[N, 4] y) { p = Exp(x) q = Tanh(p) y = Sigmoid(q) }")
    source.graph.node[0].output[0] = source.graph.node[1].input[0] = "attrib/Mul"
    source.graph.node[1].output[0] = source.graph.node[2].input[0] = "attrib/constant"
    compiled = onnx_attrib.compile(source, target=1)
    onnx.checker.check_model(compiled, full_check=True)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    y = 1 / (1 + np.exp(-np.tanh(np.exp(x))))
    zero = 1 / (1 + np.exp(-np.tanh(1)))
    close(run(compiled, {"x": x})["x_attribution"][:, 1], y[:, 1] - zero, 1e-5)
    taken = text("g (float[N, 4] target) => (float[N, 4] y) { y = Exp(target) }")
    with pytest.raises(OptionError, match="already has a tensor named 'target'"):
        onnx_attrib.compile(taken)
    assert onnx_attrib.compile(taken, target=1)
