"""``onnx-attrib compare``: several methods of a model in one picture; the graphs behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnx_attrib
from onnx_attrib import OptionError
from onnx_attrib.cli.common import labelled_methods
from onnx_attrib.lineup import Lineup

from .command import CNN, DIGIT, MLP, call, fails, succeeds

pytestmark = pytest.mark.usefixtures("elsewhere")


def text_model(path: Path, length: int = 30) -> Path:
    """Token ids [N, T] → embeddings [N, T, 4] → [N, 3]."""
    rng = np.random.default_rng(0)
    value = helper.make_tensor_value_info
    table = numpy_helper.from_array(rng.normal(size=(12, 4)).astype(np.float32), "table")
    weights = rng.normal(size=(4 * length, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Flatten", ["embedded"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("ids", TensorProto.INT64, ["N", length])],
        [value("y", TensorProto.FLOAT, ["N", 3])],
        [table, numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    figures: list[Any] = []
    save = onnx_attrib.plot.save

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr("onnx_attrib.plot.save", keep)
    return figures


# -- the command -----------------------------------------------------------------------------------


def test_compare_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    files = [a for k in (3, 8) for a in ("--input", DIGIT.with_name(f"{k}.png"))]
    text = succeeds(
        *("compare", CNN, *files, "--baseline", "-1", "--methods", "deeplift,saliency"),
        *("--methods", "o3=occlusion", "--option", "o3.window=1,3,3", "--plot", "out.png"),
    )
    assert "o3: occlusion window=(1, 3, 3)" in text
    assert "predicted" in text
    assert "Σ image (o3)" in text
    assert text.endswith("Wrote out.png\n")
    with Image.open("out.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100
    (figure,) = figures
    titles = [ax.get_title() for ax in figure.axes if ax.images and ax.axison]
    assert [t.split("\n")[0] for t in titles] == [
        *("3.png", "deeplift", "saliency", "o3"),
        *("8.png", "deeplift", "saliency", "o3"),
    ]
    assert "class 3, score" in titles[0]
    lows = [ax.images[-1].get_clim()[0] for ax in figure.axes if ax.get_title() in titles[1:4]]
    assert [low < 0 for low in lows] == [True, False, True] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_compare_agrees_with_compile_and_run() -> None:
    arguments = ["--input", DIGIT, "--target", "5"]
    told = json.loads(
        succeeds(
            *("compare", MLP, *arguments, "--methods", "deeplift,ig=integrated-gradients,saliency"),
            *("--option", "ig.steps=7", "--json"),
        )
    )
    (sample,) = told["samples"]
    assert told["files"] == []
    assert told["methods"]["ig"]["method"] == "integrated-gradients"
    assert told["methods"]["ig"]["options"]["steps"] == 7
    assert sample["target"]["class"] == 5
    for label, method, options in (
        ("deeplift", "deeplift", []),
        ("ig", "integrated-gradients", ["--option", "steps=7"]),
        ("saliency", "saliency", []),
    ):
        succeeds("compile", MLP, "--method", method, *options, "-o", "one.onnx")
        run = json.loads(succeeds("run", "one.onnx", *arguments, "--json"))
        expected = run["samples"][0]["attribution_sum"]["image"]
        assert sample["attribution_sum"][label]["image"] == pytest.approx(expected, rel=1e-4)
        assert sample["score"] == pytest.approx(run["samples"][0]["score"])


def test_compare_words(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    model = text_model(Path("text.onnx"))
    ids = np.zeros((2, 30), np.int64)
    ids[0, 24:] = 3, 1, 4, 1, 5, 9
    ids[1] = np.arange(30) % 12
    np.save("ids.npy", ids)
    words = ["(padding)", *(f"word{k}" for k in range(1, 12))]
    Path("words.txt").write_text("\n".join(words))
    succeeds(
        *("compare", model, "--input", "ids.npy", "--words", "words.txt", "--plot", "words.svg"),
        *("--methods", "deeplift,saliency"),
    )
    (figure,) = figures
    first, second = figure.subfigs
    titles = [part.axes[0].get_title(loc="left") for part in (first, second)]
    assert "(24 × (padding) left out)" in titles[0]
    assert "left out" not in titles[1]
    for ax in first.axes:
        shown = [text.get_text() for text in ax.texts]
        assert shown == "word3 word1 word4 word1 word5 word9".split()
    assert [len(ax.texts) for ax in second.axes] == [30, 30]
    colours = {text.get_bbox_patch().get_facecolor() for text in second.axes[0].texts}
    assert len(colours) > 5
    assert Path("words.svg").read_text().startswith("<?xml")


def test_compare_columns(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    np.save("x.npy", [[1.0, -2, 3], [4, 5, -6]])
    succeeds(
        *("compare", small, "--input", "x.npy", "--output", "logits", "--targets", "top2"),
        *("--methods", "deeplift,gradient-x-input", "--plot", "columns.pdf"),
    )
    (figure,) = figures
    assert len(figure.subfigs) == 4
    for part in figure.subfigs:
        assert [ax.get_title() for ax in part.axes] == ["deeplift", "gradient-x-input"]
        a, b = ([bar.get_width() for bar in ax.patches] for ax in part.axes)
        np.testing.assert_allclose(a, b, rtol=1e-5)  # a linear model
    assert Path("columns.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        ([], "Missing option '--methods'", 2),
        (["--methods", "deeplift"], "give the samples with --input", 2),
        (["--methods", "deeplft", "--input", "DIGIT"], "did you mean 'deeplift'?", 2),
        (["--methods", "", "--input", "DIGIT"], "unknown method", 2),
        (["--methods", "saliency,saliency", "--input", "DIGIT"], "named twice", 2),
        (["--methods", "saliency", "--input", "nowhere.png"], "No such file", 1),
        (["--methods", "saliency", "--input", "DIGIT", "--target", "10"], "10 classes", 1),
        (
            ["--methods", "saliency", "--input", "DIGIT", "--option", "steps=3"],
            "has no option 'steps'",
            2,
        ),
        (
            ["--methods", "a=deeplift", "--input", "DIGIT", "--option", "b.rule=rescale"],
            "not asked for",
            2,
        ),
        (
            ["--methods", "lrp", "--input", "DIGIT", "--target", "1", "--targets", "top2"],
            "not both",
            2,
        ),
        (
            ["--methods", "deeplift", "--input", "DIGIT", "--baseline", "input"],
            "zeros, a number",
            2,
        ),
        (["--methods", "deeplift", "--input", "DIGIT", "--baseline", "no.npy"], "file that", 1),
        (["--methods", "saliency", "--input", "DIGIT", "--plot", "x.xyz"], "cannot draw", 1),
        (["--methods", "saliency", "--input", "DIGIT", "--plot", "no/x.png"], "cannot write", 1),
        (["--methods", "saliency", "--input", "DIGIT", "--words", "no.txt"], "No such file", 1),
        (["--methods", "saliency", "--input", "DIGIT", "--attribute", "imag"], "'image'", 1),
    ],
)
def test_compare_refuses(arguments: list[str], expected: str, code: int, tmp_path: Path) -> None:
    given = [a.replace("DIGIT", str(DIGIT)) for a in arguments]
    assert expected in fails("compare", MLP, *given, code=code)
    assert not list(tmp_path.iterdir())


def test_compare_without_a_model() -> None:
    assert "No such file" in fails(
        "compare", "nowhere.onnx", "--input", DIGIT, "--methods", "deeplift"
    )


def test_compare_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from onnx_attrib.cli import main; main()"
    command = [sys.executable, "-c", code, "compare", str(MLP), "--input", str(DIGIT)]
    command += ["--methods", "deeplift", "--plot", "x.png"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "pip install onnx-attrib[plot]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- labels and graphs -----------------------------------------------------------------------------


def test_labels_and_options() -> None:
    found = labelled_methods(
        ["deeplift, ig=integrated_gradients", "again=deeplift"],
        ["again.rule=reveal-cancel", "ig.steps=3", "maxpool=gradient"],
    )
    assert list(found) == ["deeplift", "ig", "again"]
    assert [one.method.name for one in found.values()] == [
        "deeplift",
        "integrated-gradients",
        "deeplift",
    ]
    assert [one.options.get("rule") for one in found.values()] == ["rescale", None, "reveal-cancel"]
    assert found["ig"].options["steps"] == 3
    assert {found[k].options["maxpool"] for k in ("deeplift", "again")} == {"gradient"}


def test_few_graphs(rng: np.random.Generator) -> None:
    choices = labelled_methods(
        ["a=gradient-x-input,b=deeplift,c=deeplift,d=gradient,e=deeplift"],
        ["c.rule=reveal-cancel", "e.maxpool=gradient"],
    )
    lineup = Lineup.of(str(CNN), choices, baseline=-1.0, threads=1)
    assert [list(labels.values()) for labels in lineup.labels] == [["a", "b", "d"], ["c"], ["e"]]
    x = rng.uniform(-1, 1, (2, 1, 28, 28)).astype(np.float32)
    result = lineup(x, target=4)
    assert list(result.by_method) == list("abcde")
    for label, choice in choices.items():
        model = onnx_attrib.compile(
            str(CNN), choice.method.name, baseline=-1.0, **dict(choice.options)
        )
        alone = onnx_attrib.Explainer(model, threads=1)(x, target=4)
        np.testing.assert_allclose(
            result.by_method[label]["image"], alone.attributions["image"], rtol=1e-4, atol=1e-5
        )
    b, c = result.by_method["b"]["image"], result.by_method["c"]["image"]
    assert abs(b - c).max() > 1e-3


def test_refused_by_the_lineup() -> None:
    with pytest.raises(OptionError, match="no input"):
        Lineup.of(str(CNN), labelled_methods(["saliency"]))({"other": np.zeros(3)})


def test_warns_of_zero_attributions() -> None:
    np.save("black.npy", np.zeros((1, 1, 28, 28), np.float32))
    result = call("compare", MLP, "--input", "black.npy", "--methods", "gradient-x-input")
    assert result.exit_code == 0
    assert "zero everywhere" in result.stderr
