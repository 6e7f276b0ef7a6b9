"""Scatters: entries written, added, multiplied or compared at indices.

Written or added they are linear. The products and extremes of what meets at one entry are followed
through the flat positions of the updates, where ScatterElements works on vectors: ONNX Runtime's
ScatterND loses updates of one entry when it runs on several threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Linear, Site, add
from onnx_attrib.rules.broadcast import expand
from onnx_attrib.rules.elementwise import ref
from onnx_attrib.rules.indexing import SAME_INDICES, count_up


def scatter_pull(s: Site, i: int) -> Tensor:
    """Forward form: X with updates written, added, multiplied or compared at indices.

    Backward of the first two returns M with zeros where entries were overwritten, and M read at
    the indices.
    """
    reduction = s.attr("reduction")
    if reduction == "mul":
        return product_pull(s, i) if s.reference is None else product_difference(s, i)
    if reduction in ("max", "min"):
        return extreme_pull(s, i) if s.reference is None else extreme_difference(s, i)
    if i == 2:
        return read_at(s, s.m)
    return s.m if reduction == "add" else overwritten(s)


def overwritten(s: Site) -> Tensor:
    """M, with zeros at the indices."""
    where: dict[str, Any] = {} if s.node.op == "ScatterND" else {"axis": s.attr("axis")}
    zeros = s.zeros_like(s.x(2))
    return s.graph.emit(s.node.op, s.m, s.x(1), zeros, reduction="none", **where)


def read_at(s: Site, values: Tensor) -> Tensor:
    """``values``, shaped like the data, at the indices: shaped like the updates."""
    if s.node.op == "ScatterND":
        return s.op.GatherND(values, s.x(1))
    return s.op.GatherElements(values, s.x(1), axis=s.attr("axis"))


def places(s: Site) -> Tensor:
    """The flat position in the data of each update, as a vector."""
    numbers = s.op.Range(np.int64(0), s.op.Size(s.x(0)), np.int64(1))
    return s.op.Reshape(read_at(s, s.op.Reshape(numbers, s.shape_of(s.x(0)))), [-1])


def landed(s: Site, data: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """What ``updates``, added to or multiplied with ``data``, make of it."""
    op = s.op
    flat = op.ScatterElements(
        op.Reshape(data, [-1]), places(s), op.Reshape(updates, [-1]), axis=0, reduction=reduction
    )
    return s.reshape(flat, s.x(0))


# -- extremes --------------------------------------------------------------------------------------


def winners(s: Site, i: int) -> Tensor:
    """The part of each entry of the data (0) or the updates (2) in the extreme at its place.

    That is one for the only one that equals it; several share it evenly.
    """
    op, dtype = s.op, s.graph.dtype(s.y)
    data = op.Cast(op.Equal(s.x(0), s.y), to=dtype)
    updates = op.Cast(op.Equal(s.x(2), read_at(s, s.y)), to=dtype)
    count = op.Max(landed(s, data, updates, "add"), 1.0)
    return op.Div(data, count) if i == 0 else op.Div(updates, read_at(s, count))


def extreme_pull(s: Site, i: int) -> Tensor:
    """Forward form: the largest (smallest) of an entry and its updates.

    Backward returns M to those that are.
    """
    part, m = winners(s, i), s.m if i == 0 else read_at(s, s.m)
    return s.op.Where(s.op.Equal(part, 0.0), 0.0, s.op.Mul(m, part))


def extreme_difference(s: Site, i: int) -> Tensor:
    """Forward form: the largest (smallest) of an entry and its updates.

    Backward returns M · Δy / Δz to the winner z at x where y rose (for the smallest: fell), and
    to the winner at x̄ where it did not: the change of each is at least Δy, and of the same sign.
    """
    op, there, m = s.op, ref(s), s.m
    change = op.Sub(s.y, there.y)
    at_x = op.GreaterOrEqual if s.attr("reduction") == "max" else op.LessOrEqual
    here = at_x(change, 0.0)
    if i == 2:
        m, change, here = (read_at(s, t) for t in (m, change, here))
    part = op.Where(here, winners(s, i), winners(there, i))
    step = op.Sub(s.x(i), there.x(i))
    factor = op.Where(op.Equal(step, 0.0), 1.0, op.Div(change, step))
    return op.Where(op.Equal(part, 0.0), 0.0, op.Mul(m, op.Mul(part, factor)))


# -- products --------------------------------------------------------------------------------------


def product_of_updates(s: Site) -> Tensor:
    """The product of all updates at each entry of the data; one where there are none."""
    one = np.ones((), s.graph.dtype(s.y))
    return landed(s, s.op.Add(s.zeros_like(s.x(0)), one), s.x(2), "mul")


def product_pull(s: Site, i: int) -> Tensor:
    """Forward form: an entry times all its updates. Backward returns M times the other factors.

    These are the product over this factor; with a single zero among them, the product of the rest.
    """
    op, dtype = s.op, s.graph.dtype(s.y)
    if i == 0:
        return op.Mul(s.m, product_of_updates(s))
    one = np.ones((), dtype)
    zero = [op.Equal(s.x(k), 0.0) for k in (0, 2)]
    data, updates = (op.Where(z, one, s.x(k)) for z, k in zip(zero, (0, 2), strict=True))
    counts = [op.Cast(z, to=dtype) for z in zero]
    others = op.Sub(read_at(s, landed(s, counts[0], counts[1], "add")), counts[1])
    product = op.Div(read_at(s, landed(s, data, updates, "mul")), updates)
    return op.Where(op.Equal(others, 0.0), op.Mul(read_at(s, s.m), product), 0.0)


def product_difference(s: Site, i: int) -> Tensor:
    """Forward form y = x · P, for the product P of all updates at an entry.

    Backward returns M times the other factor at its midpoint, and for the updates times the weight
    of each in ΔP.
    """
    op, there = s.op, ref(s)
    if i == 0:
        return op.Mul(s.m, s.midpoint(product_of_updates(s), product_of_updates(there)))
    weight = telescoped(s, s.x(2), expand(s, there.x(2), s.x(2)), places(s))
    return op.Mul(read_at(s, op.Mul(s.m, s.midpoint(s.x(0), there.x(0)))), weight)


def telescoped(s: Site, here: Tensor, there: Tensor, place: Tensor) -> Tensor:
    """Weights w with Σ w · Δu = ΔΠu over the factors u at each place.

    In some order, w is Π of the u before times Π of the ū behind; this is the mean of that and of
    the same with x and x̄ exchanged. For two factors it is the other one at its midpoint.
    """
    op, flat = s.op, [-1]
    sorted_place, order = op.TopK(place, op.Shape(place), axis=0, largest=0, outputs=2)
    ends = [op.Gather(op.Reshape(u, flat), order, axis=0) for u in (here, there)]
    rows = op.Concat(*(op.Unsqueeze(u, [0]) for u in ends), axis=0)
    both_ways = [op.Unsqueeze(t, [0]) for t in (rows, turned(s, rows, 1))]
    groups = [op.Unsqueeze(g, [0, 1]) for g in (sorted_place, turned(s, sorted_place, 0))]
    before = products_before(s, op.Concat(*both_ways, axis=0), op.Concat(*groups, axis=0))
    left, right = op.Split(before, axis=0, num_outputs=2, outputs=2)
    behind = turned(s, right, 2)
    # Rows are x and x̄: what is before at one with what is behind at the other.
    terms = op.Mul(left, turned(s, behind, 1))
    weight = op.Mul(op.Squeeze(op.ReduceSum(terms, [1], keepdims=0), [0]), 0.5)
    placed = op.ScatterElements(weight, order, weight, axis=0)
    return s.reshape(placed, here)


def turned(s: Site, tensor: Tensor, axis: int) -> Tensor:
    """``tensor`` backwards along an axis."""
    return s.op.Slice(tensor, [-1], [np.iinfo(np.int64).min], [axis], [-1])


def products_before(s: Site, factors: Tensor, groups: Tensor) -> Tensor:
    """The product of all factors before each in its group, along the last axis of three.

    ``groups`` numbers them in sorted order. Each round multiplies twice as many factors.
    """
    graph, op = s.graph, s.op
    count = op.Gather(op.Shape(factors), np.int64(2))
    numbers = count_up(s, op.Unsqueeze(count, [0]))

    def before(tensor: Tensor, distance: Any) -> Tensor:
        index = op.Sub(numbers, distance)
        held = op.Max(index, np.int64(0))
        near = op.Equal(op.Gather(groups, held, axis=2), groups)
        near = op.And(near, op.GreaterOrEqual(index, np.int64(0)))
        return op.Where(near, op.Gather(tensor, held, axis=2), np.ones((), graph.dtype(factors)))

    product = before(factors, np.int64(1))
    state = graph.variable(graph.fresh("attrib/product"), factors.dtype, graph.shape(product))
    distance = graph.variable(graph.fresh("attrib/distance"), np.int64, ())
    go_on = graph.variable(graph.fresh("attrib/go_on"), np.bool_, ())
    number = graph.variable(graph.fresh("attrib/round"), np.int64, ())
    with graph.collect() as nodes:
        wider = op.Mul(distance, np.int64(2))
        results = [op.Less(wider, count), op.Mul(state, before(state, distance)), wider]
    body = graph.subgraph("doubling", nodes, [number, go_on, state, distance], results)
    start = op.Less(np.int64(1), count)
    done, _ = op.Loop(None, start, product, np.int64(1), body=body, outputs=2)
    done.dtype, done.shape = product.dtype, product.shape
    return done


for name in ("ScatterElements", "ScatterND"):
    add(Linear(op=name, pull=scatter_pull, blocked=frozenset({1}), caveat=SAME_INDICES))
