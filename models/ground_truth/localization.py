"""How well attributions find a known set of positions, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RESAMPLES = 2000


def auroc(scores: Array, truth: Array) -> float:
    """The chance that a position of ``truth`` outscores another; ties count half. Both [L]."""
    inside, outside = scores[truth], scores[~truth]
    order = np.sort(outside)
    below = np.searchsorted(order, inside, "left")
    equal = np.searchsorted(order, inside, "right") - below
    return float((below + equal / 2).mean() / len(outside))


def precision(scores: Array, truth: Array, k: int, rng: np.random.Generator) -> float:
    """The part of the k largest scores that lies in ``truth``; ties are broken at random."""
    order = np.lexsort((rng.random(len(scores)), -scores))
    return float(truth[order[:k]].mean())


def interval(values: Sequence[float] | Array) -> dict[str, float]:
    """The mean of independent values with its 95 % interval (percentiles of bootstrap means)."""
    sample = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(sample[rows].mean(1), [2.5, 97.5])
    return {
        "mean": round(float(sample.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
