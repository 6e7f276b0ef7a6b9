"""What is removed as one: the entries of an input, parted into features.

- ``pixels``: the channels of one position together ([N, C, …], or [N, …, C] if so told);
- ``positions``: the entries of the last axis together: the components of an embedding, one token;
- ``columns``: every entry by itself.

Features are numbered in the order of the positions that remain (rows first).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.feeds import Array, show_shape

Kind = Literal["pixels", "positions", "columns"]
Score = Callable[[Array], Array]
"""S of one sample's perturbed versions: [M, …] → [M], float64."""
ENTRIES = 2_000_000
"""How many numbers are perturbed at once."""
KINDS: tuple[Kind, ...] = ("pixels", "positions", "columns")


@dataclass(frozen=True)
class Features:
    """A partition of the entries of one sample.

    ``shape``: of a sample; ``grouped``: the axes of it along which entries belong together.
    """

    kind: Kind
    shape: tuple[int, ...]
    grouped: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes that remain: [H, W] of pixels, [T] of positions, the shape of columns."""
        return tuple(size for k, size in enumerate(self.shape) if k not in self.grouped)

    @property
    def count(self) -> int:
        """How many features there are."""
        return math.prod(self.grid)

    @property
    def window(self) -> tuple[int, ...]:
        """One feature as a window: a size for every axis of a sample."""
        return tuple(size if k in self.grouped else 1 for k, size in enumerate(self.shape))

    def total(self, attributions: Array) -> Array:
        """Attributions [N, …] summed over each feature: [N, F], float64.

        A map with one channel stands for all of them. Raises OptionError for another shape.
        """
        kept = tuple(1 if k in self.grouped else size for k, size in enumerate(self.shape))
        if attributions.shape[1:] not in (self.shape, kept):
            if attributions.ndim != len(self.shape) + 1 or any(
                have not in (1, want)
                for have, want in zip(attributions.shape[1:], self.shape, strict=True)
            ):
                raise OptionError(
                    f"an attribution has shape {list(attributions.shape)}, the attributed tensor "
                    f"{show_shape(('N', *self.shape))}"
                )
            attributions = np.broadcast_to(attributions, (len(attributions), *self.shape))
        axes = tuple(k + 1 for k in self.grouped)
        return attributions.sum(axis=axes, dtype=np.float64).reshape(len(attributions), -1)

    def spread(self, masks: Array) -> Array:
        """Masks [M, F] as [M, …], with size 1 where entries belong together."""
        kept = tuple(1 if k in self.grouped else size for k, size in enumerate(self.shape))
        return masks.reshape(len(masks), *kept)

    def differ(self, x: Array, reference: Array) -> Array:
        """Which features of a sample differ from the reference at all: [F]."""
        return (x != reference).any(axis=self.grouped).reshape(-1)

    def without(self, x: Array, reference: Array, masks: Array) -> Array:
        """The sample with the features in each mask [M, F] at the reference: [M, …]."""
        return np.where(self.spread(masks), reference, x)

    def scores(self, score: Score, x: Array, reference: Array, masks: Array) -> Array:
        """S of the sample without the features in each mask [M, F]: [M]."""
        size = max(1, ENTRIES // max(x.size, 1))
        return np.concatenate(
            [
                score(self.without(x, reference, masks[start : start + size]))
                for start in range(0, len(masks), size)
            ]
        )


def features_of(wanted: str, shape: tuple[int, ...], channels_last: bool = False) -> Features:
    """The partition of samples of this shape.

    ``auto``: pixels of three axes (a picture), positions of two (an embedding), else columns.
    Raises OptionError for a kind that does not exist or that the shape does not have.
    """
    if wanted == "auto":
        automatic: dict[int, Kind] = {3: "pixels", 2: "positions"}
        kind = automatic.get(len(shape), "columns")
    elif wanted in KINDS:
        kind = wanted
    else:
        raise OptionError(f"unknown features '{wanted}': {suggest(wanted, ['auto', *KINDS])}")
    if kind != "columns" and len(shape) < 2:
        raise OptionError(
            f"a sample of shape {list(shape)} has no {kind} (two axes or more): use columns"
        )
    last = (len(shape) - 1,)
    grouped = {"pixels": last if channels_last else (0,), "positions": last, "columns": ()}
    return Features(kind, shape, grouped[kind])


__all__ = ["ENTRIES", "KINDS", "Features", "Kind", "Score", "features_of"]
