"""``onnx-attrib run``: files in, text, JSON, arrays and pictures out; and the tool as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from .command import DIGIT, MLP, ROOT, call, fails, process, succeeds, write

pytestmark = pytest.mark.usefixtures("elsewhere")


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


# -- as a process ----------------------------------------------------------------------------------


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
