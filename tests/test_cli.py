"""The command line as people use it: its answers, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnx_attrib
from onnx_attrib.cli import main
from onnx_attrib.methods import METHODS

ROOT = Path(__file__).parent.parent
MLP = ROOT / "models" / "mnist_mlp.onnx"
CNN = ROOT / "models" / "mnist_cnn.onnx"
DIGIT = ROOT / "models" / "digits" / "3.png"

SMALL = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 3] x) => (float[N, 2] probs)
  <float[3, 2] w = {1, -2, 0.5, 1, 2, -1}>
{
  logits = MatMul (x, w)
  probs = Softmax <axis = 1> (logits)
}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fails(*arguments: str | Path, code: int = 1) -> str:
    """The one-message failure of a command: no traceback, nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def succeeds(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in a folder of its own; no temporary file may be left there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "mlp.onnx"
    succeeds("compile", MLP, "-o", path, "--delta")
    return path


def write(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(SMALL, tmp_path / "small.onnx")


# -- compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_compile_writes_beside_the_model(method: str, small: Path) -> None:
    text = succeeds("compile", small, "--method", method)
    written = small.with_name(f"small.{method}.onnx")
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


# -- run -------------------------------------------------------------------------------------------


def test_run_image(compiled: Path, tmp_path: Path) -> None:
    text = succeeds("run", compiled, "--input", DIGIT, "-o", "out.npz", "--plot", "out.png")
    assert "predicted  3" in text
    assert "minus-one-one" in text  # the model's metadata asks for it
    assert "Wrote out.npz" in text
    with np.load("out.npz") as arrays:
        assert set(arrays) == {"logits", "image_attribution", "convergence_delta", "target"}
        assert arrays["logits"].argmax() == 3
        assert arrays["image_attribution"].shape == (1, 1, 28, 28)
        assert abs(arrays["convergence_delta"][0]) < 1e-3
    with Image.open("out.png") as picture:
        assert picture.width > 800
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "out.png"]


def test_run_json(compiled: Path) -> None:
    Path("labels.txt").write_text("\n".join("zero one two three four".split()))
    arguments = ["--input", DIGIT, "--target", "2", "--labels", "labels.txt", "--json"]
    report = json.loads(succeeds("run", compiled, *arguments))
    (sample,) = report["samples"]
    assert sample["predicted"]["label"] == "three"
    assert sample["target"] == {"class": 2, "score": sample["score"], "label": "two"}
    assert report["inputs"]["image"]["shape"] == [1, 1, 28, 28]
    assert report["method"] == "deeplift"
    assert isinstance(sample["attribution_sum"]["image"], float)


def test_run_many_images(compiled: Path) -> None:
    files = [a for n in (1, 7, 4) for a in ("--input", DIGIT.with_name(f"{n}.png"))]
    report = json.loads(succeeds("run", compiled, *files, "--json"))
    assert [s["predicted"]["class"] for s in report["samples"]] == [1, 7, 4]


def test_run_arrays(compiled: Path) -> None:
    with np.load(ROOT / "models" / "mnist_digits.npz") as digits:
        pixels = digits["images"][:12]
    np.savez("pixels.npz", image=pixels)
    np.save("scaled.npy", pixels / 127.5 - 1)
    by_preset = succeeds(
        "run", compiled, "--input", "pixels.npz", "--preset", "minus-one-one", "--json"
    )
    as_is = succeeds("run", compiled, "--input", "image=scaled.npy", "--json")
    one, other = json.loads(by_preset)["samples"], json.loads(as_is)["samples"]
    assert sum(s["predicted"]["class"] == i % 10 for i, s in enumerate(one)) > 10
    np.testing.assert_allclose([s["score"] for s in one], [s["score"] for s in other], rtol=1e-4)
    assert "--preset scales" in call("run", compiled, "--input", "pixels.npz").stderr
    result = call("run", compiled, "--input", "scaled.npy", "--plot", "grid.pdf")
    assert "… and 2 more" in result.stdout
    assert "shows 8 of 12" in result.stderr
    assert Path("grid.pdf").read_bytes().startswith(b"%PDF")


def test_run_with_baseline_and_seed() -> None:
    succeeds("compile", MLP, "--baseline", "input", "--delta", "-o", "base.onnx")
    assert "takes a baseline" in fails("run", "base.onnx", "--input", DIGIT)
    sums = {}
    for baseline in ("-1", "zeros", str(DIGIT.with_name("8.png"))):
        arguments = ["--input", DIGIT, "--baseline", baseline, "--json"]
        (sample,) = json.loads(succeeds("run", "base.onnx", *arguments))["samples"]
        assert abs(sample["convergence_delta"]) < 1e-3
        sums[baseline] = sample["attribution_sum"]["image"]
    assert len(set(sums.values())) == 3

    succeeds("compile", MLP, "--method", "gradient", "--target", "seed", "-o", "seed.onnx")
    assert "takes a seed" in fails("run", "seed.onnx", "--input", DIGIT)
    np.save("seed.npy", np.eye(10, dtype=np.float32)[[3]])
    (sample,) = json.loads(
        succeeds("run", "seed.onnx", "--input", DIGIT, "--seed", "seed.npy", "--json")
    )["samples"]
    assert sample["score"] == pytest.approx(sample["predicted"]["score"])


def test_run_colour_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape, layout in (("nchw", ["N", 3, 8, 8], ""), ("nhwc", ["N", 8, 8, 3], "nhwc")):
        value = helper.make_tensor_value_info
        weights = numpy_helper.from_array(rng.normal(size=(192, 4)).astype(np.float32), "w")
        nodes = [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [value("x", TensorProto.FLOAT, shape)],
            [value("y", TensorProto.FLOAT, ["N", 4])],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, f"{name}.onnx")
        succeeds("compile", f"{name}.onnx", "--method", "gradient-x-input")
        pixels = rng.integers(0, 255, (30, 20, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save("photo.png")
        arguments = ["--input", "photo.png", "-o", f"{name}.npz", "--plot", f"{name}.png"]
        text = succeeds("run", f"{name}.gradient-x-input.onnx", *arguments)
        assert "imagenet" in text
        with np.load(f"{name}.npz") as arrays:
            assert arrays["x_attribution"].shape == (1, *shape[1:])
        text = succeeds(
            "run",
            f"{name}.gradient-x-input.onnx",
            *("--input", "photo.png", "--scale", "1/255", "--mean", "0.5", "--std", ".1,.2,.3"),
            *("--crop", "--layout", layout or "auto"),
        )
        assert "scale 1/255, mean 0.5, std 0.1,0.2,0.3" in text


TWO_INPUTS = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[N, 2] a, float[N, 2] b) => (float[N, 2] y) { y = Mul (a, b) }
"""


def test_run_several_inputs(tmp_path: Path) -> None:
    write(TWO_INPUTS, tmp_path / "two.onnx")
    succeeds("compile", "two.onnx", "--method", "gradient")
    np.savez("both.npz", a=[[1.0, 2]], b=[[3.0, 4]])
    np.savez("other.npz", c=[1.0], d=[2.0])
    np.save("a.npy", [[1.0, 2]])
    model = "two.gradient.onnx"
    for arguments in (["both.npz"], ["a=a.npy", "b=both.npz"]):
        flags = [f for a in arguments for f in ("--input", a)]
        report = json.loads(succeeds("run", model, *flags, "--plot", "two.png", "--json"))
        assert report["samples"][0]["attribution_sum"] == {"a": 4.0, "b": 2.0}
    assert "missing input: b" in fails("run", model, "--input", "a=a.npy")
    assert "say which one" in fails("run", model, "--input", "a.npy")
    assert "no input 'c'" in fails("run", model, "--input", "c=a.npy")
    assert "holds c, d" in fails("run", model, "--input", "a=other.npz")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", "nowhere.png"], "No such file"),
        (["--input", "text.png"], "not an image"),
        (["--input", "cut.png"], "cannot read the image"),
        (["--input", "bad.npy"], "cannot read 'bad.npy'"),
        (["--input", "two.npz"], "holds a, b"),
        (["--input", "pickled.npy"], "cannot read 'pickled.npy'"),
        (["--input", "words.npy"], "numbers"),
        (["--input", "words.npy", "--preset", "zero-one"], "numbers"),
        (["--input", "wide.npy"], "shape [1, 5]"),
        (["--input", "DIGIT", "--target", "10"], "10 classes"),
        (["--input", "DIGIT", "--target", "0,1,2"], "one class"),
        (["--input", "DIGIT", "--baseline", "0"], "fixed when the model was compiled"),
        (["--input", "DIGIT", "--labels", "nowhere.txt"], "No such file"),
        (["--input", "DIGIT", "--labels", "DIGIT"], "not a text file"),
        (["--input", "DIGIT", "--mean", "1,2,3"], "takes 1 channel"),
        (["--input", "DIGIT", "--plot", "x.xyz"], "cannot draw"),
        (["--input", "DIGIT", "--plot", "nowhere/x.png"], "cannot write 'nowhere/x.png'"),
        (["--input", "DIGIT", "-o", "nowhere/x.npz"], "cannot write 'nowhere/x.npz'"),
        (["--input", "imag=DIGIT"], "did you mean 'image'?"),
    ],
)
def test_run_refuses(arguments: list[str], expected: str, compiled: Path, tmp_path: Path) -> None:
    Path("text.png").write_text("hello")
    Path("cut.png").write_bytes(DIGIT.read_bytes()[:150])
    Path("bad.npy").write_text("hello")
    np.savez("two.npz", a=[1], b=[2])
    np.save("pickled.npy", np.array([{}], object), allow_pickle=True)
    np.save("wide.npy", np.zeros((1, 5)))
    np.save("words.npy", np.full((1, 1, 28, 28), "a"))
    before = sorted(tmp_path.iterdir())
    given = [a.replace("DIGIT", str(DIGIT)) for a in arguments]
    assert expected in fails("run", compiled, *given)
    assert sorted(tmp_path.iterdir()) == before


def test_run_wants_a_compiled_model() -> None:
    assert "was not compiled by onnx-attrib" in fails("run", MLP, "--input", DIGIT)


def test_run_wants_input(compiled: Path) -> None:
    assert "image float32 [N, 1, 28, 28]" in fails("run", compiled, code=2)


def test_run_tells_of_zero_attribution(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }
    """
    write(text, tmp_path / "relu.onnx")
    succeeds("compile", "relu.onnx", "--method", "gradient")
    np.save("x.npy", [[-1.0, -2.0]])
    result = call("run", "relu.gradient.onnx", "--input", "x.npy")
    assert result.exit_code == 0
    assert "zero everywhere" in result.stderr


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


# -- as a process ----------------------------------------------------------------------------------


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    code = "from onnx_attrib.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def test_process_is_silent_in_a_pipe(small: Path) -> None:
    done = process("compile", small)
    assert done.returncode == 0
    assert not done.stderr
    assert done.stdout.startswith(str(small.with_name("small.deeplift.onnx")).encode())
    done = process("run", small, "--input", "x.npy")
    assert done.returncode == 1
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_process_without_unicode() -> None:
    done = process("methods", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert not done.stderr


def test_process_with_a_closed_pipe() -> None:
    code = "from onnx_attrib.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "methods", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.wait()
    child.stderr.close()


@pytest.mark.parametrize("missing", ["onnxruntime", "matplotlib", "PIL"])
def test_process_without_an_extra(missing: str, compiled: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from onnx_attrib.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(compiled)]
    command += ["--input", str(DIGIT), "--plot", "x.png"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    extra = "[cpu] (or [gpu])" if missing == "onnxruntime" else "[plot]"
    assert done.returncode == 1
    assert f"pip install onnx-attrib{extra}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
