"""Sums, means and norms over axes.

The cotangent of a sum has one entry for all that were added. It stays that way (a kept axis of
size 1) until a rule needs it in full: see :mod:`onnx_attrib.rules.broadcast`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Composite, Linear, Site, add
from onnx_attrib.rules.broadcast import refine
from onnx_attrib.rules.indexing import sizes
from onnx_attrib.rules.shape import DATA_ONLY


def reduced_axes(s: Site) -> tuple[int, ...] | None:
    """The axes reduced, counted from the front; None if only known at run time."""
    axes = s.value(1)
    if axes is None and s.optional(1) is not None:
        return None
    rank = s.rank(s.x())
    if axes is not None and axes.size:
        return tuple(sorted({int(k) % rank for k in axes}))
    return () if s.attr("noop_with_empty_axes") else tuple(range(rank))


def kept(s: Site, tensor: Tensor) -> Tensor:
    """``tensor``, shaped like the output, with the reduced axes in place at size 1."""
    axes = None if s.shape(s.x()) is None else reduced_axes(s)
    if axes is None:
        if not s.attr("keepdims"):
            attributes = {**s.node.attrs, "keepdims": 1}
            like = s.graph.emit(s.node.op, s.x(), s.optional(1), **attributes)
            tensor = s.op.Reshape(tensor, s.op.Shape(like))
        # Nothing shows which axes are lazy.
        return s.op.Expand(tensor, s.shape_of(s.x()))
    if axes and not s.attr("keepdims"):
        tensor = s.op.Unsqueeze(tensor, list(axes))
    dims = s.shape(s.x()) or ()
    return refine(s.graph, tensor, tuple(1 if k in axes else dim for k, dim in enumerate(dims)))


def mean_pull(s: Site, i: int) -> Tensor:
    """Forward form y = Σ x / n over some axes. Backward returns m / n, for each entry."""
    op, m = s.op, kept(s, s.m)
    axes = None if s.shape(s.x()) is None else reduced_axes(s)
    if axes is not None:
        count = sizes(s, s.x(), np.array(axes, np.int64))
        if isinstance(count, np.ndarray):
            return op.Mul(m, 1.0 / float(np.prod(count)))
    total = op.Div(op.Size(s.x()), op.Max(op.Size(s.y), np.int64(1)))
    return op.Div(m, op.Cast(total, to=s.graph.dtype(m)))


add(Linear(op="ReduceSum", pull=lambda s, i: kept(s, s.m), blocked=DATA_ONLY))
add(Linear(op="ReduceMean", pull=mean_pull, blocked=DATA_ONLY))
