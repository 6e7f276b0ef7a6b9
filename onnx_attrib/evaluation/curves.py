"""Perturbation curves: what removing features in the order of their attribution does to the score.

Ancona et al. 2017 (arXiv 1711.06104), Section 4; Samek et al. 2015 (arXiv 1509.06321). With the
features sorted by signed attribution, the first k are replaced by the baseline:

    variation(k) = S(x with k features at x̄) − S(x),

most relevant first (MoRF: falling attribution) or least relevant first (LeRF: rising). Features of
equal attribution come in the order of their numbers. Units: variation is in units of S.
"""

from __future__ import annotations

import math

import numpy as np

from onnx_attrib.evaluation.features import Features, Score
from onnx_attrib.feeds import Array

POINTS = 100
"""About how many points a curve has where the step is not given."""
START = 0.01
"""The share of the features that the initial slope is taken over."""


def automatic_step(count: int) -> int:
    """1 up to 100 features, else what gives at most 100 points after the first."""
    return max(1, math.ceil(count / POINTS))


def removed_counts(last: int, step: int) -> Array:
    """How many features are removed at each point of a curve: 0, step, 2·step, … ``last``."""
    counts = np.arange(0, last + 1, step)
    return counts if counts[-1] == last else np.append(counts, last)


def falling(attribution: Array) -> Array:
    """The features from the most to the least relevant."""
    return np.argsort(-attribution, kind="stable")


def rising(attribution: Array) -> Array:
    """The features from the least to the most relevant."""
    return np.argsort(attribution, kind="stable")


def variations(
    score: Score,
    whole: float,
    x: Array,
    reference: Array,
    order: Array,
    removed: Array,
    features: Features,
) -> Array:
    """The curve of one sample: S with the first k of ``order`` removed, minus S(x), for each k.

    ``whole``: S(x); ``removed``: k at each point, from 0. Removing what is at the baseline already
    changes nothing and is not evaluated.
    """
    place = np.empty(features.count, np.int64)
    place[order] = np.arange(features.count)
    changing = np.cumsum(features.differ(x, reference)[order])
    effective = np.concatenate([[0], changing])[removed]
    _, first, back = np.unique(effective, return_index=True, return_inverse=True)
    values = np.full(len(first), whole, np.float64)
    if len(first) > 1:
        masks = place[None, :] < removed[first[1:]][:, None]
        values[1:] = features.scores(score, x, reference, masks)
    return values[back.reshape(-1)] - whole


def areas(curves: Array, removed: Array) -> Array:
    """The mean height of curves [N, P] over what was removed (trapezoids), in units of S: [N]."""
    width = np.diff(removed).astype(np.float64)
    heights = (curves[:, 1:] + curves[:, :-1]) / 2
    return heights @ width / max(width.sum(), 1)


def slopes(curves: Array, removed: Array, count: int) -> Array:
    """The initial slope, in units of S a feature: [N].

    The variation at the first point where at least 1 % of all ``count`` features (and one) are
    removed, divided by how many are.
    """
    if len(removed) < 2:
        return np.zeros(len(curves))
    enough = np.flatnonzero(removed >= max(1, START * count))
    k = int(enough[0]) if len(enough) else len(removed) - 1
    return curves[:, k] / removed[k]


__all__ = [
    "areas",
    "automatic_step",
    "falling",
    "removed_counts",
    "rising",
    "slopes",
    "variations",
]
