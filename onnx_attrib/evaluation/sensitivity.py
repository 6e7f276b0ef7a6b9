"""Sensitivity-n: whether summed attributions tell how the output changes.

Ancona, Ceolini, Öztireli, Gross 2018, Towards better understanding of gradient-based attribution
methods (ICLR), Section 4.1. For random subsets of n features, the Pearson correlation of

    Σ_{j in the subset} attribution_j   with   S(x) − S(x with the subset at x̄),

for each sample, then averaged over samples. 1 at every n is a perfect account of a linear model.
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.evaluation.agreement import pearson
from onnx_attrib.evaluation.features import ENTRIES, Features, Score
from onnx_attrib.feeds import Array

SIZES = 10
LARGEST = 0.8
"""The largest subset, as a share of all features."""


def subset_sizes(count: int, several: int = SIZES) -> Array:
    """Subset sizes n, evenly on a logarithmic scale from 1 to 80 % of the features."""
    if not count:
        return np.zeros(0, np.int64)
    last = max(1, int(LARGEST * count))
    return np.unique(np.rint(np.geomspace(1, last, several)).astype(np.int64))


def subsets(rng: np.random.Generator, count: int, sizes: Array, each: int) -> Array:
    """Random subsets as masks, ``each`` for every size: [sizes · each, count]."""
    masks = np.zeros((len(sizes), each, count), bool)
    for masked, n in zip(masks, sizes, strict=True):
        keys = rng.random((each, count))
        chosen = np.argpartition(keys, int(n) - 1, axis=1)[:, : int(n)]
        np.put_along_axis(masked, chosen, True, axis=1)
    return masks.reshape(-1, count)


def changes(
    score: Score, whole: float, x: Array, reference: Array, masks: Array, features: Features
) -> Array:
    """S(x) − S(x with each subset at x̄), [M]; ``whole``: S(x).

    Subsets that differ only in what is at the baseline already are evaluated once.
    """
    effective = masks & features.differ(x, reference)
    packed = np.packbits(effective, axis=1)
    _, first, back = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    values = np.full(len(first), whole, np.float64)
    todo = effective[first].any(axis=1)
    if todo.any():
        values[todo] = features.scores(score, x, reference, effective[first[todo]])
    return whole - values[back.reshape(-1)]


def subset_sums(attribution: Array, masks: Array) -> Array:
    """The attributions [F] summed over each subset [M, F]: [M]."""
    size = max(1, ENTRIES // max(attribution.size, 1))
    parts = [masks[start : start + size] for start in range(0, len(masks), size)]
    return np.concatenate([part.astype(np.float64) @ attribution for part in parts])


def correlations(sums: Array, changed: Array, several: int) -> Array:
    """The correlation of sums and changes [M] for each of the ``several`` subset sizes, [sizes].

    NaN where all sums, or all changes, are the same: there is nothing to correlate.
    """
    return pearson(sums.reshape(several, -1), changed.reshape(several, -1))


__all__ = ["changes", "correlations", "subset_sizes", "subset_sums", "subsets"]
