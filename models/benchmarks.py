"""What every method costs, on the networks of tests/zoo.py and the shipped CNN: BENCHMARKS.md.

    pip install -e '.[cpu]' torch onnxscript captum
    python models/benchmarks.py

exports the networks (``--models DIR`` keeps them), measures with ``onnx_attrib.bench`` on one
thread, and writes the tables beside this file. On one core it takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import onnx_attrib
from onnx_attrib.bench import Row, bench
from onnx_attrib.cli.common import progress

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests import zoo  # noqa: E402

CNN = "mnist_cnn"
METHOD_MODELS = ("resnet18", CNN, "vit")
ZOO = ("resnet18", "resnet50", "vgg11", "mobilenet", "inception", "genomics", "encoder", "vit")
BATCHES = (1, 8)
WINDOWS = {"resnet18": "3,8,8", CNN: "1,4,4", "vit": "3,8,8"}
HEAVY_ROUNDS = 3


# -- networks --------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """A network of the zoo with a ReLU of its own at every place, as Captum's DeepLIFT wants it."""
    module = zoo.build(name)
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            for key, child in part.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(part, key, nn.ReLU())
    return module


def exported(name: str, folder: Path) -> Path:
    """The network as torch's dynamo exporter writes it, with an open batch."""
    if name == CNN:
        return HERE / f"{CNN}.onnx"
    path = folder / f"{name}.dynamo.onnx"
    if not path.exists():
        onnx.save(zoo.export(zoo.build(name), zoo.sample(name, 2, 0), "dynamo"), path)
    return path


def shape(name: str) -> tuple[int, ...]:
    return (1, 28, 28) if name == CNN else zoo.ZOO[name].shape


# -- every method ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the table. ``background``: how many samples the baseline has."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    background: int = 0
    heavy: bool = False

    def __str__(self) -> str:
        said = [f"{key}={value}" for key, value in self.options.items() if key != "patterns"]
        said += [f"background of {self.background}"] * bool(self.background)
        return f"`{self.method}`" + f" {', '.join(said)}" * bool(said)


def entries(name: str, folder: Path) -> list[Entry]:
    """What is measured on one network; the windows differ, and are not shown."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, *shape(name))).astype(np.float32)
    patterns = {"patterns": str(folder / f"{name}.patterns.npz")}
    np.savez(patterns["patterns"], **onnx_attrib.fit_patterns(str(exported(name, folder)), data))
    window = WINDOWS[name]
    plain = "gradient saliency gradient-x-input deconvnet guided-backprop grad-cam grad-cam++ "
    plain += "layer-cam guided-grad-cam epsilon-lrp lrp"
    return [
        *(Entry(method) for method in plain.split()),
        Entry("lrp", {"composite": "epsilon-plus"}),
        Entry("deep-taylor"),
        Entry("pattern-net", patterns),
        Entry("pattern-attribution", patterns),
        Entry("deeplift"),
        Entry("deeplift", {"rule": "reveal-cancel"}),
        Entry("deep-shap", background=10, heavy=True),
        Entry("integrated-gradients", {"steps": 50}, heavy=True),
        Entry("expected-gradients", {"samples": 50}, background=10, heavy=True),
        Entry("smoothgrad", {"samples": 25}, heavy=True),
        Entry("occlusion", {"window": window, "stride": window}, heavy=True),
        Entry("shapley-sampling", {"samples": 2, "window": window}, heavy=True),
    ]


def costs(name: str, folder: Path, rounds: int) -> Iterator[tuple[Row | str, Row]]:
    """The row of each entry (or why there is none), and the forward pass beside it."""
    path = exported(name, folder)
    for entry in entries(name, folder):
        baseline: Any = "zeros"
        if entry.background:
            rows = np.random.default_rng(1).normal(size=(entry.background, *shape(name)))
            baseline = rows.astype(np.float32)
        try:
            (case,) = bench(
                path,
                {entry.method: entry.options},
                baseline=baseline,
                rounds=HEAVY_ROUNDS if entry.heavy else rounds,
                warmup=1 if entry.heavy else 3,
                watch=progress,
            )
        except onnx_attrib.CompileError as error:
            yield str(error), Row("", {}, 0, 0, None, None, 0.0)  # type: ignore[arg-type]
            continue
        forward, row = case.rows
        yield row, forward


def method_tables(folder: Path, rounds: int) -> list[str]:
    found = {name: list(costs(name, folder, rounds)) for name in METHOD_MODELS}
    lines = ["time", "", *_head(["method", *METHOD_MODELS])]
    memory = ["", "memory of a run", "", *_head(["method", *METHOD_MODELS])]
    labels = [_label(entry) for entry in entries(METHOD_MODELS[0], folder)]
    reasons: dict[str, None] = {}
    for i, label in enumerate(labels):
        rows = [found[name][i][0] for name in METHOD_MODELS]
        reasons.update({f"{label} on {n}: {r}": None for n, r in zip(METHOD_MODELS, rows, strict=True) if isinstance(r, str)})
        lines.append(_row([label, *(r if isinstance(r, str) and False else _time(r) for r in rows)]))
        memory.append(_row([label, *(_memory(r) for r in rows)]))
    return [*lines, *memory, "", *(f"- — {reason}" for reason in reasons)]
