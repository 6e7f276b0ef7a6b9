"""Turn multipliers into attributions and add them to the model's outputs.

Precondition: multipliers for the attributed tensors. Postcondition: one output
``<T>_attribution`` for each, of T's shape; ``convergence_delta`` [N] if asked for; metadata that
says how the model was made.
"""

from __future__ import annotations

import json

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Graph, Tensor, is_narrow
from onnx_attrib.job import Job
from onnx_attrib.rules.broadcast import is_full
from onnx_attrib.version import VERSION


def finalize(job: Job) -> None:
    """Emit attributions, the completeness residual and metadata."""
    graph, method = job.graph, job.method
    attributions = []
    for tensor in job.scope.inputs:
        m = _full(graph, job.multipliers[tensor.name], tensor)
        value = method.attribution(graph.op, m, tensor, job.baselines.get(tensor.name))
        attributions.append(_output(graph, value, f"{tensor.name}_attribution", tensor))
    if job.request.delta:
        _output(graph, _residual(job, attributions), "convergence_delta", None)
    graph.set_metadata(_metadata(job))


def _full(graph: Graph, m: Tensor, like: Tensor) -> Tensor:
    return m if is_full(graph, m, like) else graph.op.Expand(m, graph.op.Shape(like))


def _output(graph: Graph, value: Tensor, name: str, like: Tensor | None) -> Tensor:
    if graph.find(name) is not None:
        raise OptionError(f"the model already has a tensor named '{name}'")
    named = graph.emit("Identity", value, stem=name)
    if like is not None:
        if like.shape is None:
            raise OptionError(f"the rank of '{like.name}' is unknown: it cannot be an output")
        named.shape = list(like.shape)
    graph.outputs.append(named)
    return named


def _residual(job: Job, attributions: list[Tensor]) -> Tensor:
    """Σ attribution − (S(x) − S(x̄)) for each sample, shape [N].

    Where inputs and output do not lead with the same samples, one sum for all, shape [1].
    """
    graph, op, output = job.graph, job.graph.op, job.scope.output
    if job.reference is None:
        raise LookupError("delta without a reference")
    inner = {t.name for node in job.scope.dependent for t in node.outputs}
    difference = op.Sub(output, job.reference(output))
    # What an attributed tensor is computed from is counted through that tensor.
    counted = [
        attribution
        for tensor, attribution in zip(job.scope.inputs, attributions, strict=True)
        if tensor.name not in inner
    ]
    change, *parts = _aligned(
        graph,
        [_per_sample(job, t) for t in (op.Mul(job.seed, difference), *counted)],
    )
    total = parts[0]
    for part in parts[1:]:
        total = op.Add(total, part)
    return op.Sub(total, change)


def _aligned(graph: Graph, sums: list[Tensor]) -> list[Tensor]:
    """The sums of each sample as they are if all have as many samples, else one sum of each."""
    op, sizes = graph.op, {(graph.shape(t) or (None,))[0] for t in sums}
    if len(sizes) == 1 and None not in sizes:
        return sums
    if len({size for size in sizes if isinstance(size, int)}) > 1:
        return [op.ReduceSum(t, keepdims=1) for t in sums]
    first, *others = [op.Shape(t) for t in sums]
    rows = first
    for other in others:
        rows = op.Where(op.Equal(first, other), rows, np.ones(1, np.int64))
    shape = op.Concat(rows, [-1], axis=0)
    return [op.ReduceSum(op.Reshape(t, shape), [1], keepdims=0) for t in sums]


def _per_sample(job: Job, tensor: Tensor) -> Tensor:
    """The sum over all axes but the batch's; of 16-bit floats in float32."""
    graph = job.graph
    if is_narrow(tensor.dtype):
        tensor = graph.op.Cast(tensor, to=np.dtype(np.float32))
    shape = graph.shape(tensor) or ()
    if not shape:
        return graph.op.Reshape(tensor, [1])
    if (
        isinstance(job.scope.batch, str)
        and shape[0] != job.scope.batch
        and (shape.count(job.scope.batch) == 1)
    ):
        axis = shape.index(job.scope.batch)
        order = [axis, *(k for k in range(len(shape)) if k != axis)]
        tensor = graph.op.Transpose(tensor, perm=order)
    return graph.op.ReduceSum(graph.op.Flatten(tensor, axis=1), [1], keepdims=0)


def _metadata(job: Job) -> dict[str, str]:
    request = job.request
    baseline: object = None
    if request.method.needs_reference:
        given = request.baseline
        if isinstance(given, np.ndarray) and given.ndim == 0:
            given = float(given)
        baseline = given if isinstance(given, str | int | float) else "array"
    values = {
        "version": VERSION,
        "method": request.method.name,
        "options": json.dumps(request.options),
        "output": job.scope.output.name,
        "output_shape": json.dumps(job.graph.shape(job.scope.output)),
        "inputs": json.dumps(job.scope.names),
        "target": json.dumps(request.target),
        "baseline": json.dumps(baseline),
        "source_sha256": request.source,
    }
    return {f"onnx_attrib.{key}": value for key, value in values.items()}
