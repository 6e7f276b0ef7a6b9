"""Tensors: their types, their shapes, and the values they have at one point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

Tensor: TypeAlias = gs.Tensor
Dim = int | str | None
Shape = tuple[Dim, ...]

BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def is_float(dtype: Any) -> bool:
    """Whether ``dtype`` is one that can carry a derivative (float16/32/64, bfloat16)."""
    return dtype is not None and (np.dtype(dtype).kind == "f" or np.dtype(dtype).name == "bfloat16")


def is_bfloat16(tensor: Tensor) -> bool:
    """Whether ``tensor`` is in bfloat16."""
    return tensor.dtype is not None and np.dtype(tensor.dtype) == BFLOAT16


def is_integer(dtype: Any) -> bool:
    """Whether ``dtype`` holds whole numbers or truth values."""
    return dtype is not None and (
        np.dtype(dtype).kind in "iub" or np.dtype(dtype).name.startswith(("int", "uint"))
    )


def is_narrow(dtype: Any) -> bool:
    """Whether ``dtype`` is a 16-bit float."""
    return is_float(dtype) and np.dtype(dtype).itemsize == 2


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of the graph (not a number or an array)."""
    return isinstance(value, gs.Tensor)


def static(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape as integers, or None if a dimension (or the rank) is unknown."""
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))


class Values:
    """The model's tensors evaluated at one point.

    Tensors that do not depend on the point stand for themselves.
    """

    def __init__(self, mapping: Mapping[str, Tensor] | None = None) -> None:
        self.mapping = dict(mapping or {})

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.mapping.get(tensor.name, tensor)
