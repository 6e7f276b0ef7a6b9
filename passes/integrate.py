"""Average multipliers along a path from the reference to the input, inside the graph.

Groups of points are evaluated together, stacked along the batch axis; a Loop goes over the
groups, so memory is bounded by one group. A model whose batch cannot be stacked (a fixed batch,
or one mixed with other axes) is evaluated one point at a time.

Precondition: scope, seed and baselines. Postcondition: ``job.attributions`` has one entry more,
made of the averages.
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.ir import Dim, Graph, Tensor, static
from onnx_attrib.job import Job
from onnx_attrib.methods.base import Path
from onnx_attrib.passes.differentiate import Sweep, full
from onnx_attrib.passes.reference import (
    batch_symbol,
    captured,
    fully_known,
    keeps_batch_apart,
    outermost,
)
from onnx_attrib.passes.simplify import share


def integrate(job: Job) -> None:
    """Emit the path integral: a Loop over groups of points, or the one group there is."""
    if job.method.path is None:
        raise LookupError(f"method '{job.method.name}' has no path")
    graph, op = job.graph, job.graph.op
    path = job.method.path(job.options)
    batch = _stackable(job)
    groups = len(path.points) if batch is None else -(-len(path.points) // path.chunk)
    table = _grouped(path, groups, graph.dtype(job.scope.inputs[0]))
    if groups == 1:
        points, weights = (graph.constant(row) for row in table[0])
        job.attribute(_weighted(job, points, weights, batch))
        return
    start = [_zeros(graph, t) for t in job.scope.inputs]
    number = graph.variable(graph.fresh("attrib/iteration"), np.int64, ())
    go_on = graph.variable(graph.fresh("attrib/go_on"), np.bool_, ())
    carried = [
        graph.variable(graph.fresh("attrib/carried"), t.dtype, graph.shape(t))
        for t in job.scope.inputs
    ]
    rows = graph.constant(table)
    with graph.collect() as nodes:
        row = op.Gather(rows, number, axis=0)
        points, weights = (op.Gather(row, graph.constant(i, np.int64), axis=0) for i in (0, 1))
        parts = _weighted(job, points, weights, batch)
        sums = [
            op.Add(total, parts[name]) for total, name in zip(carried, job.scope.names, strict=True)
        ]
        still = op.Identity(go_on)
    results = [still, *sums]
    nodes = share(graph, graph.in_order(nodes), {t.name for t in results})
    body = graph.subgraph("path", nodes, [number, go_on, *carried], results)
    totals = op.Loop(graph.constant(groups, np.int64), None, *start, body=body, outputs=len(start))
    multipliers = {}
    for tensor, total in zip(
        job.scope.inputs, totals if isinstance(totals, tuple) else (totals,), strict=True
    ):
        total.dtype, total.shape = tensor.dtype, tensor.shape
        multipliers[tensor.name] = total
    job.attribute(multipliers)


def _grouped(path: Path, groups: int, dtype: np.dtype) -> np.ndarray:
    """Points and weights as [groups, 2, size]; the last group is filled up with weight zero."""
    size = -(-len(path.points) // groups)
    fill = groups * size - len(path.points)
    points = np.array([*path.points, *[path.points[-1]] * fill])
    weights = np.array([*path.weights, *[0.0] * fill])
    return np.stack([a.reshape(groups, size) for a in (points, weights)], axis=1).astype(dtype)


def _stackable(job: Job) -> str | None:
    """The batch symbol, if several copies of the batch can go through the region stacked."""
    graph, sources = job.graph, outermost(job)
    batch = batch_symbol(graph, sources)
    if batch is None or job.scope.batch != batch:
        return None
    if not keeps_batch_apart(graph, sources, job.scope.dependent, batch):
        return None
    outside = captured(graph, sources, job.scope.dependent)
    return batch if all(fully_known(graph, tensor) for tensor in outside) else None


def _weighted(job: Job, points: Tensor, weights: Tensor, batch: str | None) -> dict[str, Tensor]:
    """Σ weight · multiplier over one group of points; ``points`` and ``weights`` are [size]."""
    graph, op, scope = job.graph, job.graph.op, job.scope
    sources = outermost(job)
    (size,) = static(graph.shape(points)) or (1,)
    placed = {}
    for tensor in sources:
        placed[tensor.name] = _on_path(job, tensor, points, stacked=batch is not None)
    dims: dict[str, Dim] = {}
    seed = job.seed
    if batch is not None:
        dims = {batch: f"{batch}_stacked"}
        seed = _tiled(graph, seed, batch, size)
        for tensor in captured(graph, sources, scope.dependent):
            if batch in (graph.shape(tensor) or ()):
                placed[tensor.name] = _tiled(graph, tensor, batch, size)
    values = graph.replicate(scope.dependent, placed, dims)
    seeds = {scope.output.name: seed}
    multipliers = Sweep(graph, job.table, values).run(scope.nodes, scope.active, seeds, scope.names)
    result = {}
    for tensor in scope.inputs:
        m, here = multipliers[tensor.name], values(tensor)
        rows = op.Reshape(full(graph, m, here), [size, -1])
        total = op.MatMul(op.Unsqueeze(weights, [0]), rows)
        total = op.Reshape(total, op.Shape(tensor))
        total.shape = tensor.shape
        result[tensor.name] = total
    return result


def _on_path(job: Job, tensor: Tensor, points: Tensor, stacked: bool) -> Tensor:
    """x̄ + α(x − x̄) for each point α, stacked along the batch axis."""
    graph, op = job.graph, job.graph.op
    baseline, shape = job.baselines[tensor.name], graph.shape(tensor) or ()
    step = op.Sub(tensor, baseline)
    if not stacked:
        here = op.Add(baseline, op.Mul(step, op.Squeeze(points, [0])))
        here.shape = tensor.shape
        return here
    alphas = op.Reshape(points, [-1] + [1] * len(shape))
    here = op.Add(op.Unsqueeze(baseline, [0]), op.Mul(alphas, op.Unsqueeze(step, [0])))
    rest = op.Shape(tensor, start=1)
    here = op.Reshape(here, op.Concat(graph.constant([-1], np.int64), rest, axis=0))
    here.shape = [f"{shape[0]}_stacked", *shape[1:]]
    return here


def _tiled(graph: Graph, tensor: Tensor, batch: str, size: int) -> Tensor:
    """``size`` copies along the batch axis."""
    shape = graph.shape(tensor) or ()
    axis = shape.index(batch)
    copies = [size if i == axis else 1 for i in range(len(shape))]
    tiled = graph.op.Tile(tensor, copies)
    tiled.shape = [f"{batch}_stacked" if i == axis else dim for i, dim in enumerate(shape)]
    return tiled


def _zeros(graph: Graph, tensor: Tensor) -> Tensor:
    return graph.op.ConstantOfShape(graph.op.Shape(tensor), value=np.zeros(1, graph.dtype(tensor)))
