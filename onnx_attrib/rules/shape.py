"""Linear operators that only move entries around without losing any, and pass-throughs."""

from __future__ import annotations

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Linear, Site, add

DATA_ONLY = frozenset(range(1, 8))


def back_to_input(s: Site, i: int) -> Tensor:
    """Same entries, the input's shape."""
    return s.reshape(s.m, s.x())


def inverse_transpose(s: Site, i: int) -> Tensor:
    order = s.attr("perm")
    if order is None:
        return s.op.Transpose(s.m)
    return s.op.Transpose(s.m, perm=[int(k) for k in np.argsort(order)])


for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
    add(Linear(op=name, pull=back_to_input, blocked=DATA_ONLY))
add(Linear(op="Transpose", pull=inverse_transpose))
add(Linear(op="Identity", pull=lambda s, i: s.m, lazy=True))
# At inference Dropout is the identity; its second output is a mask.
add(Linear(op="Dropout", pull=lambda s, i: s.m, lazy=True, blocked=DATA_ONLY))
add(Linear(op="Cast", pull=lambda s, i: s.op.Cast(s.m, to=s.graph.dtype(s.x())), lazy=True))
