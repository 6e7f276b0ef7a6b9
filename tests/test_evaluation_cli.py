"""``onnx-attrib evaluate``: what it reads and writes, how it ends, how it goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from .command import MLP, ROOT, fails, succeeds
from .evaluation_models import dense, tokens

DIGITS = ROOT / "models" / "mnist_digits.npz"
QUICK = ("--subsets", "3", "--neighbours", "0", "--threads", "1")


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture
def model(elsewhere: Path, rng: np.random.Generator) -> Path:
    onnx.save(dense(rng, 5), "net.onnx")
    np.save("x.npy", rng.normal(size=(6, 5)).astype(np.float32))
    return Path("net.onnx")


def test_writes_results_tables_and_page(model: Path) -> None:
    out = succeeds("evaluate", model, "--data", "x.npy", "--methods", "deeplift,random,saliency",
                   "--threads", "1")  # fmt: skip
    folder = Path("net.evaluation")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "results.json", "curves.csv", "sensitivity.csv", "methods.csv", "report.html", "state",
    }  # fmt: skip
    found = results(folder)
    assert found["schema"] == 1
    assert list(found["methods"]) == ["deeplift", "saliency"]
    assert all(name in out for name in ("deeplift", "saliency", "(random)", "report.html"))
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    told = [
        float(row["mean"]) for row in rows if (row["method"], row["order"]) == ("saliency", "lerf")
    ]
    assert told == found["methods"]["saliency"]["curves"]["lerf"]["mean"]
    assert {row["method"] for row in rows} == {"deeplift", "saliency", "random"}
    rows = list(csv.DictReader((folder / "sensitivity.csv").open()))
    told = [float(row["correlation"]) for row in rows if row["method"] == "deeplift"]
    assert told == found["methods"]["deeplift"]["sensitivity"]["correlation"]
    rows = list(csv.DictReader((folder / "methods.csv").open()))
    assert [row["label"] for row in rows] == [row["label"] for row in found["ranking"]]
    assert float(rows[0]["gap_mean"]) == found["ranking"][0]["gap"]["mean"]
    assert "<svg" in (folder / "report.html").read_text()


def test_json_is_what_is_written(model: Path) -> None:
    out = succeeds("evaluate", model, "--data", "x.npy", "--methods", "few=integrated-gradients",
                   "--option", "few.steps=3", "-o", "here", "--json", *QUICK)  # fmt: skip
    found = json.loads(out)
    assert found == results(Path("here"))
    assert found["methods"]["few"]["options"]["steps"] == 3


def test_archives_with_labels_and_bytes_as_pixels(elsewhere: Path) -> None:
    succeeds("evaluate", MLP, "--data", DIGITS, "--methods", "gradient", "-o", "out", "--baseline",
             "-1", "--samples", "12", "--step", "200", "--target", "label", *QUICK)  # fmt: skip
    found = results(Path("out"))
    assert found["data"]["samples"] == 12
    assert found["data"]["accuracy"] > 0.8  # pixels are scaled as the model's metadata says
    assert [one["target"] for one in found["gallery"]] == [one["label"] for one in found["gallery"]]
    assert found["methods"]["gradient"]["curves"]["morf"]["removed"] == [0, 200, 400, 600, 784]


def test_folders_of_pictures(elsewhere: Path) -> None:
    digits = np.load(DIGITS)
    for name in ("three", "seven"):
        Path("photos", name).mkdir(parents=True)
    kinds = {3: "three", 7: "seven"}
    for k, (image, label) in enumerate(zip(digits["images"], digits["labels"], strict=True)):
        if int(label) in kinds and k < 40:
            Image.fromarray(image).save(Path("photos", kinds[int(label)], f"{k:02}.png"))
    Path("names.txt").write_text("\n".join("zero one two three four five six seven".split()))
    arguments = ("--methods", "gradient", "--baseline", "-1", "--step", "300", *QUICK)
    succeeds("evaluate", MLP, "--data", "photos", "--classes", "names.txt", "-o", "out", *arguments)
    found = results(Path("out"))
    assert found["data"]["accuracy"] > 0.8
    assert found["data"]["classes"][7] == "seven"
    assert {one["label"] for one in found["gallery"]} == {3, 7}
    assert all(one["name"].endswith(".png") for one in found["gallery"])
    told = fails("evaluate", MLP, "--data", "photos", "-o", "other", *arguments)
    assert "2 folders and the model has 10 classes" in told
    one = next(Path("photos").rglob("*.png"))
    assert "two or more" in fails("evaluate", MLP, "--data", one, "-o", "one", *arguments)
    Path("empty").mkdir()
    assert "no pictures" in fails("evaluate", MLP, "--data", "empty", "-o", "none", *arguments)


def test_tables(model: Path, rng: np.random.Generator) -> None:
    values = np.load("x.npy")
    labels = rng.integers(4, size=6)
    rows = [["a", "b", "c", "kind", "d", "e"]]
    for row, label in zip(values.tolist(), labels.tolist(), strict=True):
        rows.append([*row[:3], label, *row[3:]])
    with Path("table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    arguments = ("--methods", "gradient", "--target", "label", *QUICK)
    succeeds("evaluate", model, "--data", "table.csv", "--labels", "kind", "-o", "a", *arguments)
    np.save("labels.npy", labels)
    succeeds("evaluate", model, "--data", "x.npy", "--labels", "labels.npy", "-o", "b", *arguments)
    Path("labels.txt").write_text("\n".join(map(str, labels)))
    succeeds("evaluate", model, "--data", "x.npy", "--labels", "labels.txt", "-o", "c", *arguments)
    first, *others = (results(Path(name)) for name in "abc")
    for other in others:
        assert other["methods"]["gradient"]["curves"] == first["methods"]["gradient"]["curves"]
    Path("bad.csv").write_text("1,2,3,4,5\n1,2,x,4,5\n")
    # A first row without a name is no header.
    assert "'x' in row 2" in fails("evaluate", model, "--data", "bad.csv", *arguments[:2])
    Path("short.csv").write_text("1,2,3,4,5\n1,2\n")
    assert "row 2" in fails("evaluate", model, "--data", "short.csv", *arguments[:2])
    Path("gap.csv").write_text("1,2,3,4,5\n1,2,,4,5\n")
    told = fails("evaluate", model, "--data", "gap.csv", *arguments[:2])
    assert "not finite" in told
    assert "sample 1" in told


def test_several_inputs(elsewhere: Path, rng: np.random.Generator) -> None:
    onnx.save(tokens(rng, 6), "text.onnx")
    ids, mask = rng.integers(11, size=(4, 6)), np.ones((4, 6), np.float32)
    np.savez("batch.npz", ids=ids, mask=mask)
    succeeds("evaluate", "text.onnx", "--data", "batch.npz", "--input", "embedded", "--methods",
             "deeplift", "-o", "out", *QUICK)  # fmt: skip
    np.save("ids.npy", ids)
    np.save("mask.npy", mask)
    succeeds("evaluate", "text.onnx", "--data", "ids=ids.npy", "--data", "mask=mask.npy", "--input",
             "embedded", "--methods", "deeplift", "-o", "two", *QUICK)  # fmt: skip
    one, two = (results(Path(name))["methods"]["deeplift"]["curves"] for name in ("out", "two"))
    assert one == two
    assert results(Path("out"))["settings"]["features"] == "positions"
    Path("words.txt").write_text("\n".join(f"word{k}" for k in range(11)))
    succeeds("evaluate", "text.onnx", "--data", "batch.npz", "--input", "embedded", "--methods",
             "deeplift", "--words", "words.txt", "-o", "out", *QUICK)  # fmt: skip
    assert all(f"word{token}" in Path("out", "report.html").read_text() for token in ids[0])
    told = fails("evaluate", "text.onnx", "--data", "ids.npy", "--methods", "deeplift")
    assert "say which one" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--data", "nowhere.npy"), "No such file"),
        (("--data", "wide.npy"), "has shape [6, 9]; the model takes [N, 5]"),
        (
            ("--data", "nan.npy"),
            "1 entry that is not finite (NaN or infinite), the first in sample 4",
        ),
        (("--data", "x.npy", "--labels", "labels.txt"), "label 12 of sample 1 is out of range"),
        (("--data", "x.npy", "--labels", "nowhere.txt"), "No such file"),
        (("--data", "x.npy", "--labels", "few.txt"), "there are 6 samples"),
        (("--data", "x.npy", "--labels", "words.txt"), "label 'cat' in 'words.txt' is not a class"),
        (("--data", "x.npy", "--target", "label"), "needs labels"),
        (("--data", "x.npy", "--target", "4"), "target 4 is out of range"),
        (("--data", "x.npy", "--baseline", "none.npy"), "nor a file that exists"),
        (("--data", "x.npy", "--gallery", "2,9"), "no sample 9"),
        (("--data", "x.npy", "--input", "q"), "no tensor 'q'"),
        (("--data", "x.npy", "-o", "x.npy"), "not a folder"),
        (("--data", "x.npy", "--methods", "grad-cam"), "method 'grad-cam' is refused"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[str, ...], told: str, model: Path) -> None:
    np.save("wide.npy", np.zeros((6, 9), np.float32))
    bad = np.load("x.npy")
    bad[4, 2] = np.nan
    np.save("nan.npy", bad)
    Path("labels.txt").write_text("0\n12\n1\n2\n3\n1\n")
    Path("few.txt").write_text("0\n1\n")
    Path("words.txt").write_text("0\n1\ncat\n1\n1\n1\n")
    methods = () if "--methods" in arguments else ("--methods", "deeplift")
    message = fails("evaluate", model, *arguments, *methods)
    assert told in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "deeplif"), "did you mean 'deeplift'"),
        (("--methods", "random"), "name a method"),
        (("--methods", "deeplift", "--option", "lrp.rule=x"), "not asked for"),
        (("--methods", "deeplift", "--gallery", "some"), "--gallery is a count"),
        ((), "--methods"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], told: str, model: Path) -> None:
    assert told in fails("evaluate", model, "--data", "x.npy", *arguments, code=2)


# -- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(
    number: signal.Signals, elsewhere: Path, tmp_path: Path
) -> None:
    command = [
        *("evaluate", str(MLP), "--data", str(DIGITS), "--methods", "deeplift,gradient-x-input"),
        *("--baseline", "-1", "--samples", "60", "--step", "28", "--threads", "1"),
    ]
    script = [sys.executable, "-c", "from onnx_attrib.cli import main; main()", *command]
    running = subprocess.Popen(
        [*script, "-o", "part"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    state = Path("part", "state")
    end = time.monotonic() + 120
    while len(list(state.glob("*.npz"))) < 4 and running.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(running.pid, number)
    out, told = running.communicate(timeout=120)
    assert running.returncode == 128 + number, told
    assert not out
    assert told.strip() == (
        "Interrupted: what is done is kept in 'part'; the same command goes on there."
    )
    kept = {path.name: path.stat().st_mtime_ns for path in state.glob("*.npz")}
    assert 4 <= len(kept) < 24
    succeeds(*command, "-o", "part")
    assert {n: (state / n).stat().st_mtime_ns for n in kept} == kept
    succeeds(*command, "-o", "whole")
    for name in ("curves.csv", "sensitivity.csv"):
        assert Path("part", name).read_text() == Path("whole", name).read_text()
    told = fails(*command, "-o", "part", "--seed", "3")
    assert "--fresh" in told
    succeeds(*command, "-o", "part", "--seed", "3", "--fresh")
