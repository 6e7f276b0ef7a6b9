"""How far a model compiled for float16 is from itself in the model's own precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from onnx_attrib.feeds import Array
from onnx_attrib.trial import Trial

_BATCHES = 3


@dataclass(frozen=True)
class Deviation:
    """The largest difference, relative to the largest entry, over random batches.

    ``outputs``: of the model's own outputs; ``attributions``: of the attributions, by name of the
    output. What is finite in one of them only is infinitely far.
    """

    outputs: float
    attributions: Mapping[str, float]
    batches: int

    def __str__(self) -> str:
        worst = max(self.attributions.values())
        return (
            f"attributions within {worst:.1e} and outputs within {self.outputs:.1e} of the largest "
            f"entry, against the model's own precision on {self.batches} random batches"
        )


def deviation(full: ModelProto, half: ModelProto, known: Any, dims: Mapping[str, int]) -> Deviation:
    """Run both on the same random batches, on the CPU.

    ``known``: the baseline that they were compiled with; ``dims``: sizes of open dimensions.
    Raises CompileError where the model does not run, RuntimeMissingError without ONNX Runtime.
    """
    first, second = (Trial(model, known, None, None) for model in (full, half))
    drawer = first.drawer({}, dict(dims))
    outputs, attributions = 0.0, dict[str, float]()
    for seed in range(_BATCHES):
        drawn = first.feeds({}, drawer, np.random.default_rng(seed))
        a, b = (
            trial.point(drawn, drawer, np.random.default_rng(seed)).result
            for trial in (first, second)
        )
        for name, value in a.outputs.items():
            outputs = max(outputs, _distance(b.outputs[name], value))
        for method, values in a.by_method.items():
            for tensor, value in values.items():
                name = first.explain.recipe.attribution(tensor, method)
                distance = _distance(b.by_method[method][tensor], value)
                attributions[name] = max(attributions.get(name, 0.0), distance)
    return Deviation(outputs, attributions, _BATCHES)


def _distance(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if not ((a == b) | (np.isnan(a) & np.isnan(b)) | both).all():
        return float("inf")
    size = float(np.abs(b[both]).max(initial=0.0))
    return float(np.abs(a - b)[both].max(initial=0.0)) / (size or 1.0)


__all__ = ["Deviation", "deviation"]
