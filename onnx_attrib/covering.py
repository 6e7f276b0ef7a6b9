"""The windows that cover an entry of an array, by going through all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_attrib.methods.base import Occluded, Sizes

Index = tuple[Any, ...]
"""What picks entries of an array: numbers and slices."""
_CANDIDATES = 20


def drawn(
    shape: Sequence[int], samples: int | None, how: Occluded, rng: np.random.Generator, limit: int
) -> list[tuple[Index, list[Index]]]:
    """Entries at random, of all samples, with the windows over each: about ``limit`` in all."""
    if 0 in shape:
        return []
    found: list[tuple[Index, list[Index]]] = []
    spent = 0
    candidates = [
        tuple(slice(None) if k == samples else int(rng.integers(n)) for k, n in enumerate(shape))
        for _ in range(_CANDIDATES)
    ]
    for place in sorted(candidates, key=lambda place: _count(shape, samples, how, place)):
        count = _count(shape, samples, how, place)
        if found and spent + count > limit:
            break
        found.append((place, windows(shape, samples, how, place)))
        spent += count
    return found


def windows(shape: Sequence[int], samples: int | None, how: Occluded, place: Index) -> list[Index]:
    """All windows over ``place``; its entry for the ``samples`` axis is left out of account."""
    return list(itertools.product(*_along(shape, samples, how, place)))


def _count(shape: Sequence[int], samples: int | None, how: Occluded, place: Index) -> int:
    return int(np.prod([len(some) for some in _along(shape, samples, how, place)]))


def _along(
    shape: Sequence[int], samples: int | None, how: Occluded, place: Index
) -> list[list[slice]]:
    """For each axis the slices of the windows that hold the place."""
    sizes = [n for k, n in enumerate(shape) if k != samples]
    each = iter(zip(_each(how.window, sizes), _each(how.stride, sizes), strict=True))
    found: list[list[slice]] = []
    for k, n in enumerate(shape):
        if k == samples:
            found.append([slice(None)])
            continue
        window, stride = next(each)
        window = n if window < 0 else window
        starts = [0]
        while starts[-1] + window < n:
            starts.append(starts[-1] + stride)
        found.append([slice(s, s + window) for s in starts if s <= place[k] < s + window])
    return found


def _each(sizes: Sizes, axes: Sequence[int]) -> Sequence[int]:
    return sizes if isinstance(sizes, tuple) else [sizes] * len(axes)


__all__ = ["Index", "drawn", "windows"]
