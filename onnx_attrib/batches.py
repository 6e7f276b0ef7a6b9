"""Batches in parts: what is too large for memory, or for a limit, is run part after part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.feeds import Array

_SHORTAGE = (
    "bad_alloc",
    "failed to allocate",
    "out of memory",
    "outofmemory",
    "bfcarena",
    "cuda failure 2:",
    "cudaerrormemoryallocation",
    "alloc_failed",
    "available memory of",
)
"""What ONNX Runtime's providers say, in lower case, when memory is short."""


class ShortageError(CompileError):
    """The memory did not suffice for a run."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception of ONNX Runtime's says that memory could not be had."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _SHORTAGE)


def in_parts(
    run: Callable[[dict[str, Any]], list[Array]],
    feeds: Mapping[str, Any],
    axes: Mapping[str, int],
    joined: Sequence[tuple[str, int | None]],
    size: int,
    halve: bool,
) -> tuple[list[Array], int]:
    """The outputs for a batch in parts of at most ``size`` samples, and the size that went.

    ``axes``: the batch axis of each input that has one. ``joined``: names of the outputs, with the
    batch axis of those that have one; what has none must be the same in all parts. ``halve``: go
    on with half the size where memory does not suffice.

    Raises OptionError for an output that the parts disagree about, ShortageError where not even
    one sample fits.
    """
    count = next(feeds[name].shape[axis] for name, axis in axes.items())
    parts: list[list[Array]] = []
    start = 0
    while start < count or not parts:
        stop = min(start + size, count)
        part = {
            name: _part(value, axes[name], start, stop) if name in axes else value
            for name, value in feeds.items()
        }
        try:
            parts.append(run(part))
        except ShortageError:
            if not halve or stop - start <= 1:
                raise
            size = (stop - start + 1) // 2
        else:
            start = max(stop, 1)
    if len(parts) == 1:
        return parts[0], size
    columns = zip(*parts, strict=True)
    return [_join(*one, column) for one, column in zip(joined, columns, strict=True)], size


def _part(value: Array, axis: int, start: int, stop: int) -> Array:
    index = [slice(None)] * axis + [slice(start, stop)]
    return np.ascontiguousarray(value[tuple(index)])


def _join(name: str, axis: int | None, column: Sequence[Array]) -> Array:
    if axis is not None:
        return np.concatenate(column, axis=axis)
    first = column[0]
    if not all(_same(first, other) for other in column[1:]):
        raise OptionError(
            f"output '{name}' has no batch axis and depends on the whole batch: it cannot be "
            "computed in parts (max_batch)"
        )
    return first


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


__all__ = ["ShortageError", "in_parts", "is_shortage"]
