"""``onnx-attrib verify``: what is right passes, and whatever is broken is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib.cli import main
from onnx_attrib.errors import OptionError
from onnx_attrib.methods import METHODS
from onnx_attrib.verify import Verification, verify

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "mnist_cnn.onnx"

SMOOTH = """
<ir_version: 8, opset_import: ["" : 17]>
smooth (float[N, 4] x) => (float[N, 3] y)
  <float[4, 5] v = {1, -2, 0.5, 1, 2, -1, 0.3, 0.2, -0.7, 1,
                    2, -1, -0.4, 0.9, 1, 0.1, 0.6, -1, 1, 1},
   float[5, 3] w = {1, -2, 0.5, 1, 2, -1, 0.3, 0.2, -0.7, 1, 2, -1, -0.4, 0.9, 1}>
{
  h = MatMul (x, v)
  a = Tanh (h)
  y = MatMul (a, w)
}
"""


def smooth() -> ModelProto:
    return onnx.parser.parse_model(SMOOTH)


def statuses(found: Verification) -> dict[str, str]:
    return {check.name.split(" ")[0]: check.status for check in found.checks}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


# -- what is right ---------------------------------------------------------------------------------


QUICK = {"window": 14, "stride": 14, "samples": 2}
"""Options of methods that evaluate a model often."""


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if not any(o.required for o in m.options)]
)
def test_every_method(method: str) -> None:
    options = {name: value for name, value in QUICK.items() if METHODS[method].has(name)}
    found = verify(CNN, {method: options}, samples=1)
    assert found.ok, found
    assert "unclear" not in statuses(found).values()
    assert statuses(found)["own"] == "ok"


@pytest.mark.parametrize("method", ["gradient", "saliency", "gradient-x-input", "deeplift"])
def test_smooth_models_are_known_exactly(method: str) -> None:
    check = verify(smooth(), method).checks[-1]
    assert check.status == "ok"
    assert check.residual is not None
    assert check.residual < 2e-4
    assert check.uncertainty is not None
    assert check.uncertainty < 1e-3


@pytest.mark.parametrize("target", ["input", "seed", "argmax", 1])
@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_targets(method: str, target: Any) -> None:
    compiled = onnx_attrib.compile(smooth(), method, target=target)
    found = verify(compiled, source=smooth())
    assert found.ok
    assert "skipped" not in statuses(found).values()


@pytest.mark.parametrize("method", ["deeplift", "integrated-gradients"])
def test_baselines(method: str) -> None:
    array = np.array([[0.3, -0.2, 1, 0.5]], np.float32)
    for baseline in ("zeros", "input", 0.5, array):
        compiled = onnx_attrib.compile(smooth(), method, baseline=baseline, delta=True)
        known = array if isinstance(baseline, np.ndarray) else None
        found = verify(compiled, baseline=known)
        assert found.ok, found
        assert statuses(found)["sum"] in ("ok", "info")
        assert statuses(found)["convergence_delta"] == "ok"
    # The array is in the graph, but not to be recognized there.
    assert statuses(verify(compiled))["sum"] == "skipped"
    assert not verify(compiled, baseline=2 * array).ok


TWO = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[N, T, 4] a, float[N, 4, 6] b) => (float[N, T, 6] y)
{
  s = Sigmoid (a)
  y = MatMul (s, b)
}
"""


@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated-gradients"])
def test_several_inputs_and_inner_tensors(method: str) -> None:
    model = onnx.parser.parse_model(TWO)
    assert verify(model, method, dims={"T": 3}).ok
    assert verify(model, method, target=(2, 1), inputs={"a": np.ones((1, 4, 4))}).ok
    for inputs in (["s"], ["a", "s"], ["b"]):
        found = verify(onnx_attrib.compile(model, method, inputs=inputs), source=model)
        assert found.ok, found


def tokens() -> ModelProto:
    """A table of seven rows, a table of two, and a mask."""
    rng = np.random.default_rng(0)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["a"]),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.INT64),
        helper.make_node("Gather", ["kinds", "types"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["seen", "last"], ["mask"]),
        helper.make_node("Mul", ["embedded", "mask"], ["shown"]),
        helper.make_node("ReduceSum", ["shown", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("Tanh", ["mean"], ["y"]),
    ]
    weights = {
        "words": rng.normal(size=(7, 5)).astype(np.float32),
        "kinds": rng.normal(size=(2, 5)).astype(np.float32),
        "last": np.array([-1]),
        "middle": np.array([1]),
    }
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["N", "length"]) for n in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_token_ids_stay_in_their_table(method: str) -> None:
    assert verify(tokens(), method, samples=5).ok
    found = verify(tokens(), method, baseline="input" if method == "deeplift" else None)
    assert found.ok


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_half_precision(method: str) -> None:
    model = smooth()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype("f2"), tensor.name)
        )
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    found = verify(model, method)
    assert found.ok
    assert found.checks[-1].tolerance == pytest.approx(0.05)


def test_samples_along_another_axis() -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    states (float[2, N, 4] x) => (float[N, 4] y) <int64[1] first = {0}>
    { s = Sigmoid (x)  y = ReduceSum <keepdims = 0> (s, first) }
    """)
    found = verify(model, "deeplift")
    assert found.ok
    assert found.checks[-1].detail == "3 samples"


def test_a_tie_is_no_gradient_to_check() -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    tied (float[N, 4] x) => (float[N, 1] y) { y = ReduceMax <axes = [1]> (x) }
    """)
    found = verify(model, "gradient", inputs={"x": np.ones((1, 4), np.float32)})
    assert statuses(found)["differences"] == "unclear"
    assert verify(model, "gradient").checks[-1].status == "ok"


def test_domains_of_logarithms() -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    logs (float[N, 4] x) => (float[N, 4] y) { l = Log (x)  r = Sqrt (x)  y = Add (l, r) }
    """)
    found = verify(model, "gradient")
    assert found.ok
    assert statuses(found)["differences"] == "ok"


# -- what is broken --------------------------------------------------------------------------------


def scaled(model: ModelProto, name: str, factor: float) -> None:
    """Multiply an output."""
    for node in model.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    model.graph.node.append(helper.make_node("Mul", ["before", "factor"], [name]))


def foreign(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node.append(helper.make_node("Gelu", ["x"], ["unused"], domain="com.microsoft"))


def renamed(model: ModelProto) -> None:
    for info in model.graph.output:
        if info.name == "y":
            info.CopyFrom(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 5]))


BROKEN: list[tuple[str, str, Callable[[ModelProto], None]]] = [
    ("gradient", "differences", lambda m: scaled(m, "x_attribution", 1.02)),
    ("saliency", "differences", lambda m: scaled(m, "x_attribution", 1.02)),
    ("gradient-x-input", "differences", lambda m: scaled(m, "x_attribution", 0.98)),
    ("deeplift", "sum", lambda m: scaled(m, "x_attribution", 1.02)),
    ("integrated-gradients", "path", lambda m: scaled(m, "x_attribution", 1.02)),
    ("epsilon-lrp", "finite", lambda m: scaled(m, "x_attribution", np.nan)),
    ("deeplift", "convergence_delta", lambda m: scaled(m, "convergence_delta", 1e5)),
    ("gradient", "own", lambda m: scaled(m, "y", 1.001)),
    ("gradient", "valid", foreign),
    ("gradient", "interface", renamed),
]


@pytest.mark.parametrize(("method", "what", "damage"), BROKEN)
def test_damage_is_found(
    method: str, what: str, damage: Callable[[ModelProto], None], tmp_path: Path
) -> None:
    delta = what == "convergence_delta"
    compiled = onnx_attrib.compile(smooth(), method, delta=delta)
    damage(compiled)
    found = verify(compiled, source=smooth())
    assert statuses(found)[what] == "OFF"
    assert not found.ok
    if what != "finite":
        # The rest is as it was.
        assert list(statuses(found).values()).count("OFF") <= 1 + (what in ("own", "interface"))
    onnx.save(compiled, tmp_path / "m.onnx")
    onnx.save(smooth(), tmp_path / "s.onnx")
    result = call(tmp_path / "m.onnx", "--source", tmp_path / "s.onnx")
    assert result.exit_code == 1
    assert "OFF" in result.stdout
    assert not result.stderr


BRANCHED = """
<ir_version: 8, opset_import: ["" : 17]>
branched (float[N, 3] x, float[N, 3] z) => (float[N, 3] y)
{
  i = ArgMax <axis = 1, keepdims = 1> (x)
  w = GatherElements <axis = 1> (z, i)
  y = Mul (x, w)
}
"""


def test_a_note_tells_why_a_sum_is_off() -> None:
    found = verify(onnx.parser.parse_model(BRANCHED), "deeplift", baseline="input")
    assert not found.ok
    assert statuses(found)["sum"] == "OFF"
    assert "GatherElements 'w'" in found.notes[0]
    assert verify(onnx.parser.parse_model(BRANCHED), "gradient").ok


def test_options_that_promise_no_sum() -> None:
    found = verify(onnx.parser.parse_model(TWO), "deeplift", product="gradient", baseline=0.5)
    assert found.ok
    assert statuses(found)["sum"] == "info"
    assert "not promised: product=gradient" in found.checks[-1].detail
    assert found.checks[-1].residual is not None
    assert found.checks[-1].residual > 1e-3


# -- the command -----------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    onnx.save(smooth(), tmp_path / "s.onnx")
    result = call(tmp_path / "s.onnx", "--method", "gradient", "--samples", "2")
    assert result.exit_code == 0, result.output
    assert "gradient, 2 batches" in result.stdout
    assert "Nothing is off" in result.stdout
    result = call(tmp_path / "s.onnx", "--json", "--dim", "N=5", "--option", "product=gradient")
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["method"] == "deeplift"
    assert {check["status"] for check in found["checks"]} == {"ok", "info"}


def test_files(tmp_path: Path) -> None:
    compiled = onnx_attrib.compile(CNN, "deeplift", baseline="input")
    onnx.save(compiled, tmp_path / "c.onnx")
    digit = ROOT / "models" / "digits" / "3.png"
    arguments = ["--source", CNN, "--input", digit, "--target", "3"]
    result = call(tmp_path / "c.onnx", *arguments)
    assert result.exit_code == 0, result.output
    assert "1 batch\n" in result.stdout
    np.save(tmp_path / "base.npy", np.zeros((1, 1, 28, 28), np.float32))
    for baseline in ("0.2", tmp_path / "base.npy", "zeros"):
        result = call(tmp_path / "c.onnx", *arguments, "--baseline", baseline)
        assert result.exit_code == 0, result.output


def test_failures(tmp_path: Path) -> None:
    onnx.save(smooth(), tmp_path / "s.onnx")
    result = call(tmp_path / "s.onnx", "--dim", "M=3")
    assert result.exit_code == 1
    assert "no open dimension 'M'" in result.stderr
    assert call(tmp_path / "s.onnx", "--dim", "N=x").exit_code == 2
    assert call(tmp_path / "s.onnx", "--method", "nonsense").exit_code == 2
    assert call(tmp_path / "missing.onnx").exit_code == 1
    compiled = onnx_attrib.compile(smooth(), "gradient")
    with pytest.raises(OptionError, match="compiled for 'gradient'"):
        verify(compiled, "deeplift")
    with pytest.raises(OptionError, match="no input 'z'"):
        verify(compiled, inputs={"z": np.zeros(3)})
    with pytest.raises(OptionError, match="--dim"):
        verify(compiled, inputs={"x": np.full((2, 4), np.nan)})
