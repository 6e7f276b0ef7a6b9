"""The one place where broadcasting is undone.

A cotangent may still have to be broadcast to its tensor's shape (it is "lazy": a size-1 axis
stands for equal entries), and a broadcast operand's cotangent must be summed back to the
operand's shape. Both are done statically where shapes are known and at run time where not.
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.ir import Dim, Graph, Shape, Tensor
from onnx_attrib.rules.base import Site


def is_full(graph: Graph, m: Tensor, like: Tensor) -> bool:
    """Whether a cotangent needs no broadcasting to reach the shape of ``like``.

    Lazy cotangents always show it: their rank is smaller or a known 1 stands where the tensor
    has something else.
    """
    have, want = graph.shape(m), graph.shape(like)
    if have is None or want is None:
        return have is None
    if len(have) != len(want):
        return False
    return not any(h == 1 and w != 1 for h, w in zip(have, want, strict=True))


def expand(site: Site, m: Tensor, like: Tensor) -> Tensor:
    """The cotangent in the full shape of ``like``."""
    if is_full(site.graph, m, like):
        return m
    return site.shaped(site.op.Expand(m, site.shape_of(like)), like)


def same_shape(graph: Graph, a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal (unknown dimensions are not)."""
    left, right = graph.shape(a), graph.shape(b)
    return left is not None and left == right and None not in left


def unbroadcast(site: Site, m: Tensor, operand: Tensor, output: Tensor) -> Tensor:
    """Sum ``m``, shaped like ``output``, over the axes along which ``operand`` was broadcast."""
    graph, op = site.graph, site.op
    target, source = graph.shape(operand), _join(graph.shape(m), graph.shape(output))
    if target is None or source is None:
        return site.shaped(_sum_at_run_time(site, m, operand), operand)
    extra = len(source) - len(target)
    if extra < 0:
        # A lazy cotangent of smaller rank; nothing was broadcast.
        return m
    reduce, unsure = list(range(extra)), False
    for axis, dim in enumerate(target, start=extra):
        if dim == 1 and source[axis] != 1:
            reduce.append(axis)
        elif not isinstance(dim, int) and dim != source[axis] and source[axis] != 1:
            unsure = True
    if unsure:
        return site.shaped(_sum_at_run_time(site, m, operand), operand)
    if len(reduce) > extra:
        m = op.ReduceSum(m, reduce, keepdims=1)
        if extra:
            m = op.Squeeze(m, list(range(extra)))
    elif extra:
        m = op.ReduceSum(m, reduce, keepdims=0)
    return refine(graph, m, target)


def refine(graph: Graph, m: Tensor, shape: Shape | None) -> Tensor:
    """Fill in dimensions that inference could not tell from the shape ``m`` stands for."""
    have = graph.shape(m)
    if graph.value(m) is not None:
        # The seed of a region may come back as it went in; it is shared.
        return m
    if shape is not None and have is not None and len(have) == len(shape):
        m.shape = [w if h is None else h for h, w in zip(have, shape, strict=True)]
    elif shape is not None and have is None:
        m.shape = list(shape)
    return m


def _join(m: Shape | None, output: Shape | None) -> Shape | None:
    """The shape of a cotangent, preferring what is known of the tensor it belongs to."""
    if m is None or output is None or len(m) != len(output):
        return m if m is not None else output
    return tuple(_pick(h, w) for h, w in zip(m, output, strict=True))


def _pick(have: Dim, want: Dim) -> Dim:
    return have if have == 1 or want is None else want


def _sum_at_run_time(site: Site, m: Tensor, operand: Tensor) -> Tensor:
    """Compare both shapes in the graph, sum where they differ, drop leading axes."""
    graph, op = site.graph, site.op
    have, want = op.Shape(m), op.Shape(operand)
    shapes = graph.shape(m), graph.shape(operand)
    if shapes[0] is None or shapes[1] is None:
        ones = op.Expand(graph.constant([1], np.int64), op.Sub(op.Shape(have), op.Shape(want)))
        aligned = op.Concat(ones, want, axis=0)
    else:
        # (Arithmetic with sizes alone: nothing of it has to come to the device.)
        extra = len(shapes[0]) - len(shapes[1])
        aligned = op.Concat([1] * extra, want, axis=0) if extra > 0 else want
    differs = op.Not(op.Equal(have, aligned))
    axes = op.Squeeze(op.NonZero(differs), [0])
    summed = op.ReduceSum(m, axes, keepdims=1, noop_with_empty_axes=1)
    return op.Reshape(summed, want)
