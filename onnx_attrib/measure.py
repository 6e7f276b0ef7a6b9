"""Numbers of :mod:`onnx_attrib.verify`: central differences, and what is known of their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_attrib.feeds import Array

RATIO = 4
STEPS = tuple(0.1 / RATIO**k for k in range(8))
"""Of central differences, relative to the direction."""
Score = Callable[[Mapping[str, Array]], float]
Predict = Callable[[Array, float], tuple[float, float]]
"""From the entries moved, and the derivative along them: what was given, and what was found."""


@dataclass(frozen=True)
class Measured:
    """A ``residual`` beside the ``size`` of what it is a residual of, both absolute."""

    residual: float
    size: float
    uncertainty: float


def central(
    score: Score, name: str, x: Array, direction: Array, predict: Predict, noise: float
) -> list[Measured]:
    """The derivative along a direction, at ever smaller steps.

    What a step changes against the last, larger one tells how far the truth may be; so does a kink
    at x itself (a tie of maxima), where differences to either side do not approach each other.
    """
    wide, found, middle = x.astype(np.float64), [], score({name: x})
    before, gap_before = np.inf, np.inf
    for h in STEPS:
        ends = [(wide + side * h * direction).astype(x.dtype) for side in (1, -1)]
        # What rounding left of the step.
        moved = (ends[0].astype(np.float64) - ends[1].astype(np.float64)) / (2 * h)
        up, down = (score({name: end}) for end in ends)
        given, derived = predict(moved, (up - down) / (2 * h)) if moved.any() else (0.0, 0.0)
        error, gap = given - derived, (up - 2 * middle + down) / h
        # Of a smooth function the gap shrinks with the step.
        kink = abs(gap + (gap - gap_before) / (RATIO - 1)) / 2
        uncertainty = max(abs(error - before), kink) + noise / h
        found.append(Measured(error, derived, uncertainty))
        before, gap_before = error, gap
    return found[1:]


def best_known(series: Sequence[Sequence[Measured]]) -> Sequence[Measured]:
    """All directions at the step where they are known best together.

    Chosen for each by itself, it would often be a step at which two errors happen to agree.
    """

    def doubt(step: Sequence[Measured]) -> float:
        total = sum(m.uncertainty**2 for m in step)
        return total if np.isfinite(total) else np.inf

    return min(zip(*series, strict=True), key=doubt, default=())


def norms(measured: Sequence[Measured]) -> tuple[float, float]:
    """Residual and uncertainty, relative to all differences together."""
    parts = np.array([(m.residual, m.size, m.uncertainty) for m in measured]).reshape(-1, 3)
    residual, size, uncertainty = (float(v) for v in np.sqrt((parts**2).sum(axis=0)))
    if not size > 0:
        return (0.0 if residual <= uncertainty else residual), 0.0
    return residual / size, uncertainty / size


def weighted(weights: Array, y: Array) -> Array:
    """weights · y, without what a weight of zero would make of an infinity."""
    wide = y.astype(np.float64)
    return np.where(weights == 0, 0.0, weights.astype(np.float64) * wide)


def epsilon(a: Array) -> float:
    return 2.0**-7 if a.dtype.name == "bfloat16" else float(np.finfo(a.dtype).eps)


def typical(a: Array) -> float:
    """The size of typical entries; one where all are zero."""
    return float(np.sqrt(np.mean(a.astype(np.float64) ** 2))) or 1.0 if a.size else 1.0


def columns(target: Any, count: int) -> Array:
    """Indices as [N or 1, count]."""
    index = np.asarray(target, np.int64)
    return index.reshape(-1, 1) if count == 1 else np.atleast_2d(index)


def one_hot(y: Array, index: Array) -> Array:
    """One at each sample's index; a negative class is the predicted one at that position."""
    weights = np.zeros(y.shape)
    for n, (column, *place) in enumerate(index.tolist()):
        here: Any = (n, slice(None), *place)
        weights[here][column if column >= 0 else int(np.argmax(y[here]))] = 1.0
    return weights


__all__ = [
    "Measured",
    "Predict",
    "Score",
    "best_known",
    "central",
    "columns",
    "epsilon",
    "norms",
    "one_hot",
    "typical",
    "weighted",
]
