"""A model's inputs, and arrays in the dtype and shape that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_attrib.errors import OptionError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Port:
    """One input or output of the model: ``shape`` holds a name or None where it is dynamic."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        kind = "non-numeric" if self.dtype is None else str(self.dtype)
        return f"{self.name} {kind} {show_shape(self.shape)}"


def fit(port: Port, value: Any) -> Array:
    """``value`` as an array of the port's dtype and rank.

    Numbers are cast (fractions never to integers). A batch axis or axes of size 1 that are
    missing are added: [28, 28] and [7, 28, 28] both fit [N, 1, 28, 28]. Raises OptionError
    otherwise.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{port.name} is not an array: {line(error)}") from None
    if port.dtype is not None:
        array = _cast(port, array)
    shape = _completed(array.shape, port.shape)
    if shape is None:
        raise OptionError(
            f"{port.name} has shape {list(array.shape)}; the model takes {show_shape(port.shape)}"
        )
    return np.ascontiguousarray(array).reshape(shape)


def _completed(
    shape: tuple[int, ...], wanted: Sequence[int | str | None]
) -> tuple[int, ...] | None:
    """``shape`` with the axes of size 1 that ``wanted`` has more, or None if it does not fit."""
    if shape_fits(shape, wanted):
        return shape
    long = [axis for axis, dim in enumerate(wanted) if dim != 1]
    for axes in (list(range(1, len(wanted))), long, [axis for axis in long if axis > 0]):
        if len(axes) < len(wanted) and shape_fits(shape, [wanted[axis] for axis in axes]):
            sizes = dict(zip(axes, shape, strict=True))
            complete = tuple(sizes.get(axis, 1) for axis in range(len(wanted)))
            if shape_fits(complete, wanted):
                return complete
    return None


def shape_fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether an array of ``shape`` can be fed where ``wanted`` is declared."""
    return len(shape) == len(wanted) and all(
        have == want or not isinstance(want, int) for have, want in zip(shape, wanted, strict=True)
    )


def _cast(port: Port, array: Array) -> Array:
    wanted = port.dtype
    assert wanted is not None
    if array.dtype == wanted:
        return array
    whole = np.dtype(wanted).kind in "iub"
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise OptionError(f"{port.name} must be {wanted} numbers, not {array.dtype}")
    if whole and array.dtype.kind == "f":
        raise OptionError(f"{port.name} must be {wanted}, not {array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if whole and array.dtype.kind in "iu" and not np.array_equal(result, array):
        raise OptionError(f"{port.name} holds numbers that {wanted} cannot")
    return result


def integers(value: npt.ArrayLike, name: str) -> Array:
    """``value`` as int64; OptionError, which calls it ``name``, if it is anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} is not an array: {line(error)}") from None
    if array.dtype.kind not in "iu":
        raise OptionError(f"{name} must be whole numbers, not {value!r}")
    return array.astype(np.int64)


def check_range(target: Array, shape: Sequence[int | str | None], output: str) -> None:
    """Check indices [N] or [N, r-1] against an output's shape; a negative class is predicted."""
    columns = target[:, None] if target.ndim == 1 else target
    for axis, column in enumerate(columns.T, start=1):
        size = shape[axis] if axis < len(shape) else None
        bad = column[(column < 0) & (axis > 1)]
        if isinstance(size, int):
            bad = np.concatenate([bad, column[column >= size]])
        if bad.size:
            what = "classes" if axis == 1 else f"entries along axis {axis}"
            raise OptionError(
                f"target {bad[0]} is out of range: output '{output}' has {size} {what} "
                f"(0 to {size - 1 if isinstance(size, int) else '…'}"
                + (", or −1 for the predicted one)" if axis == 1 else ")")
            )


def show_shape(shape: Sequence[int | str | None]) -> str:
    """A shape as text: ``[N, 3, 224, 224]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def line(error: BaseException) -> str:
    """An error's message on one line of bounded length."""
    return " ".join(str(error).split())[:300]
