"""How alike two attributions are: Pearson's correlation, and Spearman's of their ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from onnx_attrib.feeds import Array


def pearson(a: Array, b: Array) -> Array:
    """Pearson's correlation along the last axis; NaN where either is constant."""
    # Scaled to one first: squares of very small (or large) numbers would vanish.
    a, b = _centred(a), _centred(b)
    length = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (a * b).sum(axis=-1) / length
    return np.clip(found, -1, 1)


def _centred(a: Array) -> Array:
    """a minus its mean, scaled; zeros where it is constant up to rounding."""
    a = np.asarray(a, np.float64)
    size = np.abs(a).max(axis=-1, keepdims=True)
    a = a / np.where(size == 0, 1, size)
    a = a - a.mean(axis=-1, keepdims=True)
    noise = 4 * np.finfo(np.float64).eps
    return np.where(np.abs(a).max(axis=-1, keepdims=True) <= noise, 0, a)


def ranks(a: Array) -> Array:
    """The ranks of the entries along the last axis, from 1; equal entries share their mean."""
    rows = np.asarray(a).reshape(-1, np.shape(a)[-1])
    return np.stack([_ranks(row) for row in rows]).reshape(np.shape(a))


def _ranks(row: Array) -> Array:
    _, group, counts = np.unique(row, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def spearman(a: Array, b: Array) -> Array:
    """Spearman's rank correlation along the last axis; NaN where either is constant."""
    return pearson(ranks(a), ranks(b))


def agreement(attributions: Sequence[Array]) -> dict[str, list[list[float]]]:
    """Correlations of methods' attributions, each [N, F], for each sample, averaged over samples.

    Samples for which one of the two is constant are left out; NaN if all are.
    """
    ranked = [ranks(a) for a in attributions]
    return {
        "pearson": [[average(pearson(a, b)) for b in attributions] for a in attributions],
        "rank": [[average(pearson(a, b)) for b in ranked] for a in ranked],
    }


def average(values: Array) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))


__all__ = ["agreement", "average", "pearson", "ranks", "spearman"]
