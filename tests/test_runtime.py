"""Explainer: what it accepts, what it returns, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import Explainer, ModelError, OptionError
from onnx_attrib.feeds import Port, fit
from onnx_attrib.model_io import save

MODELS = Path(__file__).parent.parent / "models"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'

CLASSES = f"""{HEAD}
g (float[N, 3] x) => (float[N, 2] y)
<float[3, 2] w = {{1, -2, 0.5, 1, 2, -1}}> {{ y = MatMul (x, w) }}
"""
W = np.array([[1, -2], [0.5, 1], [2, -1]], np.float32)
X = np.array([[1, 2, 3], [0, -1, 0.5], [4, 0, 1]], np.float32)


def compiled(text: str = CLASSES, **options: Any) -> ModelProto:
    options.setdefault("method", "gradient")
    return onnx_attrib.compile(onnx.parser.parse_model(text), **options)


# -- what goes in and comes out --------------------------------------------------------------------


def test_result() -> None:
    explain = Explainer(compiled(method="deeplift", delta=True))
    result = explain(X, target=[0, 1, -1])
    np.testing.assert_allclose(result.outputs["y"], X @ W, rtol=1e-6)
    assert result.prediction is not None
    assert result.target is not None
    assert result.score is not None
    assert result.prediction.tolist() == (X @ W).argmax(axis=1).tolist()
    assert result.target.tolist() == [0, 1, result.prediction[2]]
    np.testing.assert_allclose(result.score, (X @ W)[range(3), result.target], rtol=1e-6)
    np.testing.assert_allclose(result.attributions["x"], X * W.T[result.target], rtol=1e-5)
    assert result.delta is not None
    np.testing.assert_allclose(result.delta, 0, atol=1e-5)
    assert list(result.inputs) == ["x"]
    assert result.by_method == {"deeplift": result.attributions}
    assert result.delta_by_method == {"deeplift": result.delta}


def test_recipe() -> None:
    explain = Explainer(compiled(method="integrated-gradients", baseline=0.5, target=1, steps=3))
    assert explain.method == "integrated-gradients"
    assert explain.methods == ("integrated-gradients",)
    assert explain.targets is None
    assert explain.options["steps"] == 3
    assert explain.attributed == ("x",)
    assert explain.output == "y"
    assert explain.target == 1
    assert explain.baseline == 0.5
    assert [port.name for port in explain.inputs] == ["x"]
    assert [port.name for port in explain.outputs] == ["y"]
    assert not explain.takes_target
    assert explain.metadata["onnx_attrib.method"] == "integrated-gradients"
    assert "CPUExecutionProvider" in explain.providers
    assert "integrated-gradients" in repr(explain)


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "proto"])
def test_sources(kind: str, tmp_path: Path) -> None:
    model = compiled()
    save(model, tmp_path / "m.onnx")
    source: Any = {
        "path": tmp_path / "m.onnx",
        "str": str(tmp_path / "m.onnx"),
        "bytes": model.SerializeToString(),
        "proto": model,
    }[kind]
    np.testing.assert_allclose(Explainer(source)(X, target=0).attributions["x"][0], W[:, 0])


def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx_attrib.compile(MODELS / "mnist_mlp.onnx", method="gradient")
    x = np.zeros((1, 1, 28, 28))
    expected = Explainer(model)(x).attributions["image"]
    # As if the model were past protobuf's limit.
    monkeypatch.setattr("onnx_attrib.model_io.PROTOBUF_LIMIT", 10)
    path = tmp_path / "m.onnx"
    assert [p.name for p in save(model, path)] == ["m.onnx.data", "m.onnx"]
    onnx.checker.check_model(path, full_check=True)
    for source in (path, model):
        np.testing.assert_array_equal(Explainer(source)(x).attributions["image"], expected)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        Explainer(path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64", "bool"])
def test_dtypes(dtype: str) -> None:
    x = np.abs(X).astype(dtype)
    result = Explainer(compiled())(x)
    assert result.attributions["x"].dtype == np.float32
    np.testing.assert_allclose(result.outputs["y"], x.astype(np.float32) @ W, rtol=1e-6)


def test_lists_and_names() -> None:
    explain = Explainer(compiled())
    expected = explain(X).outputs["y"]
    for result in (explain(X.tolist()), explain({"x": X}), explain(x=X)):
        np.testing.assert_array_equal(result.outputs["y"], expected)
    assert explain([1.0, 2.0, 3.0]).outputs["y"].shape == (1, 2)


@pytest.mark.parametrize(
    ("shape", "wanted", "result"),
    [
        ((28, 28), ("N", 1, 28, 28), (1, 1, 28, 28)),
        ((7, 28, 28), ("N", 1, 28, 28), (7, 1, 28, 28)),
        ((1, 28, 28), ("N", 1, 28, 28), (1, 1, 28, 28)),
        ((3, 5, 6), ("N", 3, None, None), (1, 3, 5, 6)),
        ((3, 5, 6), (1, 3, 5, 6), (1, 3, 5, 6)),
        ((), (1,), (1,)),
        ((4,), ("N",), (4,)),
        ((28, 27), ("N", 1, 28, 28), None),
        ((3, 3), (3,), None),
        ((2, 3, 5, 6), (1, 3, 5, 6), None),
        ((), ("N", 2), None),
    ],
)
def test_missing_axes(shape: tuple[int, ...], wanted: Any, result: Any) -> None:
    port = Port("x", np.dtype(np.float32), wanted)
    if result is None:
        with pytest.raises(OptionError, match="x has shape"):
            fit(port, np.zeros(shape))
    else:
        assert fit(port, np.zeros(shape)).shape == result


def test_empty_batch_is_no_crash() -> None:
    result = Explainer(compiled(target="argmax"))(X)
    assert result.target is not None
    assert result.target.tolist() == (X @ W).argmax(axis=1).tolist()


def test_threads() -> None:
    explain = Explainer(compiled())
    batches = [np.full((2, 3), i) for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(explain, batches))
    for x, result in zip(batches, results, strict=True):
        np.testing.assert_allclose(result.outputs["y"], x @ W, rtol=1e-5)


# -- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, np.int32(1), [1, 1, 1], np.ones(3, np.int64), (1,)])
def test_targets_broadcast(target: Any) -> None:
    result = Explainer(compiled())(X, target=target)
    assert result.target is not None
    assert result.target.tolist() == [1, 1, 1]


def test_default_target_is_the_prediction() -> None:
    result = Explainer(compiled())(X)
    assert result.target is not None
    assert result.prediction is not None
    np.testing.assert_array_equal(result.target, result.prediction)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (2, "has 2 classes"),
        ([0, 1, 5], "target 5 is out of range"),
        ([0, 1], "one for each of the 3 samples"),
        ([[0], [1], [0]], "one for each of the 3 samples"),
        (0.5, "whole numbers"),
        ("cat", "whole numbers"),
        (True, "whole numbers"),
    ],
)
def test_bad_targets(target: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Explainer(compiled())(X, target=target)


def test_fixed_targets() -> None:
    explain = Explainer(compiled(target=1))
    explain(X)
    explain(X, target=1)
    with pytest.raises(OptionError, match="compiled for target 1"):
        explain(X, target=0)
    with pytest.raises(OptionError, match="for its largest output"):
        Explainer(compiled(target="argmax"))(X, target=0)


DENSE = f"""{HEAD}
g (float[N, 2, 4] x) => (float[N, 2, 4] y) {{ y = Mul (x, x) }}
"""


def test_targets_of_higher_rank() -> None:
    explain = Explainer(compiled(DENSE))
    x = np.arange(24).reshape(3, 2, 4)
    result = explain(x, target=(1, 2))
    expected = np.zeros((3, 2, 4))
    expected[:, 1, 2] = 2 * x[:, 1, 2]
    np.testing.assert_allclose(result.attributions["x"], expected)
    assert result.score is not None
    assert result.target is not None
    np.testing.assert_allclose(result.score, x[:, 1, 2] ** 2)
    result = explain(x, target=[(0, 0), (-1, 1), (1, 3)])
    assert result.target is not None
    assert result.target.tolist() == [[0, 0], [1, 1], [1, 3]]
    for target, message in (
        (None, "tuple of 2 indices"),
        (1, "2 indices"),
        ((0, 4), "4 entries along axis 2"),
        ((0, -1), "out of range"),
        ((2, 0), "2 classes"),
    ):
        with pytest.raises(OptionError, match=message):
            explain(x, target=target)


def test_target_checked_where_classes_are_counted_at_run_time() -> None:
    text = f"{HEAD} g (float[N, C] x) => (float[N, C] y) {{ y = Mul (x, x) }}"
    explain = Explainer(compiled(text))
    explain(X, target=2)
    with pytest.raises(OptionError, match="3 classes"):
        explain(X, target=3)


def test_target_checked_for_inner_outputs() -> None:
    text = f"""{HEAD}
    g (float[N, C] x) => (float[N] y) {{ h = Mul (x, x)  y = ReduceSum <keepdims = 0> (h, axes) }}
    """.replace("(float[N] y)", "(float[N] y) <int64[1] axes = {1}>")
    explain = Explainer(compiled(text, output="h"))
    result = explain(X, target=1)
    assert result.score is None
    assert result.target is not None
    with pytest.raises(OptionError, match="out of the range"):
        explain(X, target=9)


ONE_VALUE = f"""{HEAD}
g (float[N, 3] x) => (float[N, 1] y) <int64[1] axes = {{1}}>
{{ y = ReduceSum <keepdims = 1> (x, axes) }}
"""


def test_one_value_a_sample() -> None:
    explain = Explainer(compiled(ONE_VALUE))
    for target in (None, 0, -1):
        result = explain(X, target=target)
        assert result.prediction is None
        assert result.target is None
        np.testing.assert_allclose(result.score, X.sum(axis=1))
    with pytest.raises(OptionError, match="one value a sample"):
        explain(X, target=1)


def test_an_input_called_target() -> None:
    text = ONE_VALUE.replace("float[N, 3] x", "float[N, 3] target").replace("(x,", "(target,")
    explain = Explainer(compiled(text))
    assert not explain.takes_target
    np.testing.assert_allclose(explain({"target": X}).attributions["target"], 1)


def test_fixed_target_out_of_the_range_counted_at_run_time() -> None:
    text = f"{HEAD} g (float[N, C] x) => (float[N, C] y) {{ y = Mul (x, x) }}"
    with pytest.raises(OptionError, match="3 classes"):
        Explainer(compiled(text, target=5))(X)


# -- seeds and baselines ---------------------------------------------------------------------------


def test_seed() -> None:
    explain = Explainer(compiled(target="seed"))
    assert explain.takes_seed
    result = explain(X, seed=[[1, 2]])
    np.testing.assert_allclose(result.attributions["x"], np.tile(W @ [1, 2], (3, 1)))
    np.testing.assert_allclose(result.score, X @ W @ [1, 2], rtol=1e-6)
    for seed, message in ((None, "takes a seed"), ([[1, 2, 3]], "shape"), (X[:2, :2], "2 samples")):
        with pytest.raises(OptionError, match=message):
            explain(X, seed=seed)
    with pytest.raises(OptionError, match="takes no seed"):
        Explainer(compiled())(X, seed=[[1, 2]])


def test_baseline() -> None:
    explain = Explainer(compiled(method="deeplift", baseline="input", delta=True))
    assert explain.baselines == ("x",)
    one = np.array([1.0, 2, 3])
    for baseline in (one, one[None], {"x": one}, {"x_baseline": one}, np.tile(one, (3, 1))):
        result = explain(X, target=0, baseline=baseline)
        np.testing.assert_allclose(result.attributions["x"], (X - one) * W[:, 0], rtol=1e-5)
    np.testing.assert_allclose(
        explain(X, target=0, baseline=1).attributions["x"], (X - 1) * W[:, 0], rtol=1e-5
    )
    for bad, message in (
        (None, "takes a baseline"),
        ([1, 2], "baseline of 'x' has shape"),
        (X[:2], "must hold 1 or 3"),
        (np.nan, "not finite"),
        ({"y": one}, "no baseline for 'y'"),
        ("a", "numbers"),
    ):
        with pytest.raises(OptionError, match=message):
            explain(X, baseline=bad)


def test_baseline_refused() -> None:
    with pytest.raises(OptionError, match="has no baseline"):
        Explainer(compiled())(X, baseline=0)
    with pytest.raises(OptionError, match="fixed when the model was compiled"):
        Explainer(compiled(method="deeplift"))(X, baseline=0)


TWO = f"""{HEAD}
g (float[N, 2] a, int64[N, 2] i) => (float[N, 2] y)
{{ c = Cast <to = 1> (i)  y = Mul (a, c) }}
"""


def test_several_inputs() -> None:
    explain = Explainer(compiled(TWO))
    result = explain({"a": [[1, 2]]}, i=[[3, 4]])
    assert result.outputs["y"].tolist() == [[3, 8]]
    for arguments, message in (
        (([[1, 2]],), "give arrays by name"),
        (({"a": [[1, 2]]},), "missing input: i int64"),
        (({"a": [[1, 2]], "i": [[1.5, 2]]},), "must be int64, not float64"),
        (({"a": [[1, 2]], "j": [[1, 2]]},), "no input 'j'"),
        (({"a": [["x", "y"]], "i": [[1, 2]]},), "numbers"),
        (({"a": [[1, 2], [1]], "i": [[1, 2]]},), "not an array"),
    ):
        with pytest.raises(OptionError, match=message):
            explain(*arguments)


def test_an_input_twice() -> None:
    with pytest.raises(OptionError, match="given twice"):
        Explainer(compiled())({"x": X}, x=X)


# -- models and runtimes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "garbage", "folder"])
def test_no_model(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if kind == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ModelError, match=r"m\.onnx"):
        Explainer(path)


@pytest.mark.parametrize("as_path", [True, False])
def test_not_compiled(as_path: bool) -> None:
    path = MODELS / "mnist_mlp.onnx"
    with pytest.raises(ModelError, match="was not compiled by onnx-attrib"):
        Explainer(path if as_path else onnx.load(path))


def test_not_compiled_and_not_runnable(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(CLASSES)
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="was not compiled by onnx-attrib"):
        Explainer(tmp_path / "m.onnx")


def test_damaged_metadata() -> None:
    model = compiled()
    for prop in model.metadata_props:
        if prop.key == "onnx_attrib.inputs":
            prop.value = "["
    with pytest.raises(ModelError, match="metadata is damaged"):
        Explainer(model)


def test_unknown_provider() -> None:
    with pytest.raises(OptionError, match="did you mean 'CPUExecutionProvider'"):
        Explainer(compiled(), providers=["CPUExecutionProvidr"])


def test_without_onnxruntime() -> None:
    code = """if True:
        import sys
        sys.modules["onnxruntime"] = None
        import onnx, onnx_attrib
        model = onnx_attrib.compile(sys.argv[1])
        try:
            onnx_attrib.Explainer(model)
        except onnx_attrib.RuntimeMissingError as error:
            print(error)
    """
    command = [sys.executable, "-c", code, str(MODELS / "mnist_mlp.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install onnx-attrib[cpu] (or [gpu])" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_methods() -> None:
    listed = {method.name: method for method in onnx_attrib.methods()}
    deeplift = listed["deeplift"]
    assert deeplift.complete
    assert deeplift.needs_reference
    assert {option.name for option in deeplift.options} >= {"maxpool", "product"}
    assert all(m.summary and m.formula and m.paper for m in listed.values())
    assert not listed["saliency"].signed
    assert listed["gradient"].to_dict()["name"] == "gradient"
