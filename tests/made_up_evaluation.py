"""Results of an evaluation that never was, as ``results.json`` holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "deeplift": ("deeplift", {"rule": "rescale"}),
    "integrated-gradients": ("integrated-gradients", {"steps": 50}),
    "saliency": ("saliency", {}),
    "<b>plain</b> & co": ("deeplift", {"product": "gradient"}),
}
REMOVED = [0, 8, 16, 32, 64, 128, 256, 512, 784]
SIZES = [1, 4, 16, 64, 256]


def banded(values: Sequence[float] | float, width: float) -> dict[str, Any]:
    mean = np.asarray(values, np.float64)
    found = {"mean": mean, "low": mean - width, "high": mean + width}
    return {key: value.tolist() for key, value in found.items()}


def curve(depth: float, width: float) -> dict[str, Any]:
    """Falls to ``depth``."""
    values = [depth * (k / REMOVED[-1]) ** 0.5 for k in REMOVED]
    parts = {"area": banded(float(np.mean(values)), width), "slope": banded(depth / 20, width / 20)}
    return {"removed": REMOVED, **banded(values, width), **parts}


def judged(good: float) -> dict[str, Any]:
    """Curves and sensitivity-n of a method, from 0 to 1 ``good``."""
    told = banded([good - 0.05 * k for k in range(len(SIZES))], 0.03)
    return {
        "curves": {"morf": curve(-4 - 8 * good, 0.4), "lerf": curve(-4 + 8 * good, 0.4)},
        "sensitivity": {"n": SIZES, "correlation": told.pop("mean"), **told},
    }


def made_up(methods: Mapping[str, tuple[str, dict[str, Any]]] = METHODS) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, (label, (method, options)) in enumerate(methods.items()):
        found[label] = {
            "method": method,
            "options": options,
            "signed": method != "saliency",
            **judged(0.9 - 0.2 * k),
            "completeness": None
            if method == "saliency"
            else {"mean": 2e-6, "median": 1e-6, "max": 3.21e-5, "promised": True},
            "infidelity": banded(0.25 + k, 0.02),
            "max_sensitivity": banded(0.125 + k, 0.01),
            "sanity": {"layers": ["dense", "conv <2>"], "rank": [0.5, 0.1], "pearson": [0.6, 0.2]},
            "seconds_per_sample": 0.00234 * (k + 1),
        }
    ranking = []
    for label, part in found.items():
        above, below = (part["curves"][order]["area"] for order in ("lerf", "morf"))
        gap = banded(above["mean"] - below["mean"], 0.6)
        slope = part["curves"]["morf"]["slope"]
        mean = float(np.mean(part["sensitivity"]["correlation"]))
        row = {"gap": gap, "morf": below, "lerf": above, "slope": slope, "sensitivity": mean}
        ranking.append({"label": label, **row})
    count = len(methods)
    alike = [[1.0 if i == j else 0.61 - 0.3 * (i + j) for j in range(count)] for i in range(count)]
    return {
        "schema": 1,
        "version": "1.2.3",
        "onnxruntime": "9.8.7",
        "model": {
            "file": "somewhere/mo<d>el.onnx",
            "sha256": "ab" * 32,
            "input": "image",
            "output": 'log"its',
            "shape": ["N", 1, 28, 28],
        },
        "data": {
            "files": ["somewhere/<data>.npz"],
            "samples": 100,
            "labels": True,
            "accuracy": 0.975,
            "classes": ["", "", "", "", "", "<five>"],
        },
        "settings": {
            "features": "pixels",
            "count": 784,
            "step": 8,
            "baseline": -1.0,
            "target": "predicted",
            "seed": 0,
        },
        "methods": found,
        "control": {"random": judged(0.0)},
        "agreement": {"labels": list(methods), "pearson": alike, "rank": alike},
        "ranked_by": {"measure": "gap", "why": "it is <simple>"},
        "ranking": ranking,
        "gallery": [
            {"index": 7, "name": "<7>.png", "target": 3, "label": 5, "score": 12.25},
            {"index": 8, "name": None, "target": None, "label": None, "score": None},
        ],
    }
