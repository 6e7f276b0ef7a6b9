"""The command line as people use it: its answers, and how it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_attrib
from onnx_attrib.methods import METHODS

from .command import DIGIT, MLP, call, fails, succeeds, write

pytestmark = pytest.mark.usefixtures("elsewhere")

CONVOLUTION = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[N, 1, 3, 3] x) => (float[N, 2] y)
  <float[2, 1, 2, 2] w = {1, -2, 0.5, 1, 2, -1, 1, 1}>
{
  c = Conv (x, w)
  r = Relu (c)
  p = GlobalAveragePool (r)
  y = Flatten (p)
}
"""


# -- compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if not any(o.required for o in m.options)]
)
def test_compile_writes_beside_the_model(method: str, tmp_path: Path) -> None:
    write(CONVOLUTION, tmp_path / "tiny.onnx")
    text = succeeds("compile", "tiny.onnx", "--method", method)
    written = Path(f"tiny.{method}.onnx")
    assert str(written) in text
    onnx.checker.check_model(onnx.load(written), full_check=True)


def test_compile_tells_of_probabilities(small: Path) -> None:
    text = succeeds("compile", small)
    assert "behind a Softmax" in text
    assert "--output logits" in text
    assert "Note" not in succeeds("compile", small, "--output", "logits")


def test_compile_json(small: Path) -> None:
    arguments = ["--method", "integrated-gradients", "--option", "steps=7", "--delta", "--json"]
    report = json.loads(succeeds("compile", small, *arguments))
    assert report["methods"]["integrated-gradients"]["steps"] == 7
    assert report["attributed"] == ["x"]
    assert [o["name"] for o in report["outputs"]] == [
        "probs",
        "x_attribution",
        "convergence_delta",
    ]
    assert report["inputs"][1] == {"name": "target", "dtype": "int64", "shape": ["N"]}
    assert report["bytes"] == Path(report["file"]).stat().st_size
    assert "Softmax" in report["notes"][0]


@pytest.mark.parametrize(
    ("target", "stored"),
    [("argmax", "argmax"), ("seed", "seed"), ("1", 1), ("-1", -1), ("input", "input")],
)
def test_compile_target(target: str, stored: Any, small: Path) -> None:
    succeeds("compile", small, "--target", target)
    assert onnx_attrib.Explainer("small.deeplift.onnx").target == stored


def test_compile_into_a_folder(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    succeeds("compile", small, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "small.deeplift.onnx").exists()


def test_compile_baselines(small: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mean.npy", np.ones((1, 3)))
    for baseline in ("mean.npy", "1", "input"):
        succeeds("compile", small, "--baseline", baseline, "-o", f"{baseline}.onnx")
    x = np.array([[2, 0, 1]])
    by_file = onnx_attrib.Explainer("mean.npy.onnx")(x)
    by_number = onnx_attrib.Explainer("1.onnx")(x)
    at_run_time = onnx_attrib.Explainer("input.onnx")(x, baseline=1)
    np.testing.assert_array_equal(by_file.attributions["x"], by_number.attributions["x"])
    np.testing.assert_allclose(by_file.attributions["x"], at_run_time.attributions["x"], rtol=1e-5)


# -- bad models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compile", "inspect", "run"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "png", "truncated", "folder"])
def test_no_model(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "png":
        path.write_bytes(DIGIT.read_bytes())
    elif kind == "truncated":
        path.write_bytes(MLP.read_bytes()[:100_000])
    elif kind == "folder":
        path.mkdir()
    arguments = ["--input", DIGIT] if command == "run" else []
    message = fails(command, path, *arguments)
    assert "bad.onnx" in message
    assert len(message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == ([] if kind == "missing" else [path])


def test_checker_rejects(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x", "x"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "invalid.onnx")
    for command in ("compile", "inspect"):
        assert "checker rejects" in fails(command, "invalid.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["invalid.onnx"]


def test_lost_external_data(tmp_path: Path) -> None:
    model = onnx.load(MLP)
    onnx.save_model(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin")
    (tmp_path / "big.bin").unlink()
    assert "external data" in fails("compile", "big.onnx")


def test_output_independent_of_input(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 2] a, float[N, 2] b) => (float[N, 2] y, float[N, 2] z)
    { y = Relu (a)  z = Relu (b) }
    """
    write(text, tmp_path / "two.onnx")
    assert "does not depend on 'b'" in fails("compile", "two.onnx", "--input", "b")


def test_cut_path(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 2] x) => (float[N, 2] y) { y = Floor (x) }
    """
    write(text, tmp_path / "floor.onnx")
    assert "no derivative" in fails("compile", "floor.onnx")
    assert "Floor" in fails("compile", "floor.onnx")


UNSUPPORTED = """
<ir_version: 8, opset_import: ["" : 17, "my.ops" : 1]>
g (float[N, 2] x) => (float[N, 2] y)
{
  a = Relu (x)
  [first] b = my.ops.Strange (a)
  [second] c = my.ops.Odd (b)
  y = Relu (c)
}
"""


def unsupported(tmp_path: Path) -> Path:
    path = tmp_path / "odd.onnx"
    model = onnx.parser.parse_model(UNSUPPORTED)
    for name in ("b", "c"):
        model.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2])
        )
    onnx.save(model, path)
    return path


def test_unsupported_operators_are_all_listed(tmp_path: Path) -> None:
    message = fails("compile", unsupported(tmp_path))
    for part in ("2 nodes", "my.ops::Strange", "'first'", "my.ops::Odd", "'second'"):
        assert part in message
    assert not (tmp_path / "odd.deeplift.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", "logitz"], "did you mean 'logits'?"),
        (["--output", "prob"], "did you mean 'probs'?"),
        (["--output", "probs", "--input", "probs"], "explained output itself"),
        (["--target", "7"], "target 7 is out of range"),
        (["--target", "1,2"], "target (1, 2) does not fit"),
        (["--baseline", "nowhere.npy"], "nor a file that exists"),
        (["--baseline", "wide.npy"], "shape [1, 4]"),
        (["--baseline", "text.npy"], "real numbers"),
        (["--baseline", "nan"], "not finite"),
        (["--baseline", "small.onnx"], "cannot read the baseline"),
        (["--method", "gradient", "--delta"], "delta is for"),
        (["-o", "nowhere/out.onnx"], "cannot write 'nowhere/out.onnx'"),
        (["-o", "small.onnx"], "is the source model"),
    ],
)
def test_compile_refuses(arguments: list[str], expected: str, small: Path) -> None:
    np.save("wide.npy", np.zeros((1, 4)))
    np.save("text.npy", np.array(["a", "b", "c"]))
    before = small.read_bytes()
    assert expected in fails("compile", small, *arguments)
    assert small.read_bytes() == before
    assert not Path("small.deeplift.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compile", "m.onnx", "--method", "deep-lift"], "did you mean 'deeplift'?"),
        (["compile", "m.onnx", "--metod", "deeplift"], "--method"),
        (["compile", "m.onnx", "--option", "maxpol=gradient"], "did you mean 'maxpool'?"),
        (["compile", "m.onnx", "--option", "maxpool=sum"], "choose from: conserve, gradient"),
        (["compile", "m.onnx", "--option", "maxpool"], "KEY=VALUE"),
        (["compile", "m.onnx", "--target", "agmax"], "did you mean 'argmax'?"),
        (["compile"], "Missing argument 'MODEL'"),
        (["compil", "m.onnx"], "did you mean 'compile'?"),
        (["methods", "saliencey"], "did you mean 'saliency'?"),
        (["run", "m.onnx", "--preset", "imagnet"], "imagenet"),
        (["run", "m.onnx", "-o", "out.png"], ".npz"),
        (["run", "m.onnx", "--mean", "a,b"], "not a number"),
        (["inspect", "m.onnx", "--method", "gradiant"], "did you mean 'gradient'?"),
    ],
)
def test_usage_errors(arguments: list[str], expected: str) -> None:
    message = fails(*arguments, code=2)
    assert expected in message
    assert "Usage: " in message


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder closed to writing")
def test_closed_folder(small: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in fails("compile", small, "-o", closed / "out.onnx")


# -- inspect, methods, the rest --------------------------------------------------------------------


def test_inspect(small: Path) -> None:
    text = succeeds("inspect", small)
    for part in (
        "ai.onnx 17",
        "probs float32 [N, 2]",
        "--output logits",
        "Compilable for deeplift",
    ):
        assert part in text
    report = json.loads(succeeds("inspect", small, "--json"))
    assert report["compilable"] is True
    assert report["squashed"]["before"] == "logits"


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_inspect_unknown_tensor(flag: str, small: Path) -> None:
    assert "did you mean 'logits'?" in fails("inspect", small, flag, "logitz")


def test_inspect_unsupported(tmp_path: Path) -> None:
    path = unsupported(tmp_path)
    text = succeeds("inspect", path)
    assert "Not compilable for deeplift: 2 nodes cannot be handled" in text
    assert "my.ops::Odd" in text
    report = json.loads(succeeds("inspect", path, "--json"))
    assert report["compilable"] is False
    assert [o["node"] for o in report["unsupported"]] == ["first", "second"]


def test_inspect_compiled(compiled: Path) -> None:
    assert "Compiled by onnx-attrib" in succeeds("inspect", compiled)
    report = json.loads(succeeds("inspect", compiled, "--json"))
    assert report["compiled"]["method"] == "deeplift"
    assert report["compiled"]["inputs"] == ["image"]


def test_methods() -> None:
    text = succeeds("methods")
    assert all(name in text for name in METHODS)
    listed = json.loads(succeeds("methods", "--json"))
    assert [m["name"] for m in listed] == list(METHODS)
    one = json.loads(succeeds("methods", "integrated-gradients", "--json"))
    assert {"name": "steps", "default": 50}.items() <= one["options"][0].items()
    assert "steps=50" in succeeds("methods", "integrated-gradients")


def test_version_and_help() -> None:
    assert succeeds("--version").strip() == f"onnx-attrib {onnx_attrib.__version__}"
    for command in ([], ["compile"], ["run"], ["inspect"], ["methods"]):
        for flag in ("-h", "--help"):
            assert "Examples:" in succeeds(*command, flag)


def test_no_traceback_for_a_bug(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr("onnx_attrib.cli.compile.prepare", broken)
    assert "internal error: KeyError" in fails("compile", small)
    monkeypatch.setenv("ONNX_ATTRIB_DEBUG", "1")
    assert isinstance(call("compile", small).exception, KeyError)


def test_interrupt(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_attrib.model_io.os.replace", interrupted)
    result = call("compile", small)
    assert result.exit_code == 1
    assert "Aborted" in result.stderr
    assert list(tmp_path.iterdir()) == [small]
