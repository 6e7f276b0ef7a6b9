"""What the report shows of a sample: its picture or numbers, and each method's map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_attrib.evaluation.data import Samples
from onnx_attrib.evaluation.exhibits import Exhibit
from onnx_attrib.evaluation.features import Features
from onnx_attrib.evaluation.scoring import Scoring
from onnx_attrib.feeds import Array
from onnx_attrib.images import Geometry


def exhibits(
    shown: Sequence[int],
    samples: Samples,
    scoring: Scoring,
    features: Features,
    maps: Mapping[str, Array],
    form: Geometry | None,
) -> list[Exhibit]:
    """The exhibits of the samples of these numbers."""
    return [
        Exhibit(
            {label: found[i].reshape(features.grid) for label, found in maps.items()},
            pixels=_pixels(i, samples, scoring, form),
            values=_values(scoring.values[i], features),
            names=_names(i, samples, features),
        )
        for i in shown
    ]


def _names(i: int, samples: Samples, features: Features) -> Sequence[str]:
    """What columns are called; at each position the token, a word or an id."""
    if len(samples.columns) == features.count:
        return samples.columns
    if features.kind == "positions":
        for array in samples.inputs.values():
            if array.dtype.kind in "iu" and array.shape[1:] == features.grid:
                words = samples.words or {}
                return [words.get(int(token), str(token)) for token in array[i]]
    return ()


def _pixels(i: int, samples: Samples, scoring: Scoring, form: Geometry | None) -> Array | None:
    """The picture that a sample came from, or its numbers scaled to those of all samples."""
    if samples.pictures:
        return samples.pictures[i]
    if form is None or form.channels not in (1, 3):
        return None
    low, high = float(scoring.values.min()), float(scoring.values.max())
    picture = form.pictures(scoring.values[i : i + 1])[0].astype(np.float64)
    return np.rint((picture - low) / ((high - low) or 1) * 255).astype(np.uint8)


def _values(x: Array, features: Features) -> Array | None:
    """The number at each column; None where a feature has several."""
    return None if features.grouped else x.reshape(-1)


__all__ = ["exhibits"]
