"""Linear operators that only move entries around without losing any, and pass-throughs."""

from __future__ import annotations

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Linear, Site, Unsupported, add

DATA_ONLY = frozenset(range(1, 8))


def back_to_input(s: Site, i: int) -> Tensor:
    """Same entries, the input's shape."""
    return s.reshape(s.m, s.x())


def inverse_transpose(s: Site, i: int) -> Tensor:
    order = s.attr("perm")
    if order is None:
        return s.op.Transpose(s.m)
    return s.op.Transpose(s.m, perm=[int(k) for k in np.argsort(order)])


def inference_dropout(s: Site, i: int) -> Tensor:
    """Forward form: the identity, unless told to train. Backward returns M."""
    training = s.value(2)
    if s.optional(2) is not None and (training is None or training.any()):
        raise Unsupported(
            "Dropout in training mode is random"
            if training is not None
            else "the training mode is chosen at run time"
        )
    return s.m


def cast_back(s: Site, i: int) -> Tensor:
    """Forward form: the same numbers in another float type. Backward returns M in X's type.

    A cotangent that was widened from that type is given back as it was: ONNX Runtime 1.31 drops
    such pairs of Casts, even where a Loop reads what it dropped.
    """
    dtype, source = s.graph.dtype(s.x()), s.m.inputs[0] if s.m.inputs else None
    if source is not None and source.op == "Cast":
        before = source.inputs[0]
        if s.graph.dtype(before) == dtype and dtype.itemsize <= s.graph.dtype(s.m).itemsize:
            return before
    return s.op.Cast(s.m, to=dtype)


for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
    add(Linear(op=name, pull=back_to_input, blocked=DATA_ONLY, flow="moves"))
add(Linear(op="Transpose", pull=inverse_transpose, flow="moves"))
add(Linear(op="Identity", pull=lambda s, i: s.m, lazy=True, flow="moves"))
# Dropout's second output is a mask.
add(Linear(op="Dropout", pull=inference_dropout, lazy=True, blocked=DATA_ONLY, flow="moves"))
for name in ("Cast", "CastLike"):
    add(Linear(op=name, pull=cast_back, lazy=True, blocked=DATA_ONLY, flow="moves"))
