"""Add attributions to the model's outputs.

Precondition: one entry of ``job.attributions`` and of ``job.shown`` for each seed. Postcondition:
one output ``<T>_attribution`` for each attributed tensor T, of T's shape (1 for a reduced axis), or
with an axis for the targets after the batch's if several were asked for; ``convergence_delta`` [N]
(or [N, targets]) if asked for, of what is not reduced yet. Where there are several methods, the
names end in ``_<method>``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Graph, Tensor, is_narrow
from onnx_attrib.job import Job
from onnx_attrib.passes.postprocess import batch_axis


def finalize(job: Job) -> None:
    """Emit the outputs of one method."""
    several = job.request.targets is not None
    suffix = f"_{job.method.name}" if len(job.request.choices) > 1 else ""
    for tensor in job.scope.inputs:
        values = [one[tensor.name] for one in job.shown]
        if any(value.shape is None for value in values):
            raise OptionError(f"the rank of '{tensor.name}' is unknown: it cannot be an output")
        value = _stacked(job.graph, values) if several else values[0]
        _output(job.graph, value, f"{tensor.name}_attribution{suffix}")
    if job.request.delta and job.method.complete:
        residuals = [
            _residual(job, seed, one) for seed, one in zip(job.seeds, job.attributions, strict=True)
        ]
        value = _stacked(job.graph, residuals) if several else residuals[0]
        _output(job.graph, value, f"convergence_delta{suffix}")


def _stacked(graph: Graph, values: list[Tensor]) -> Tensor:
    """[N, …] for each target → [N, targets, …]."""
    shape = graph.shape(values[0]) or ()
    stacked = graph.op.Concat(*(graph.op.Unsqueeze(v, [1]) for v in values), axis=1)
    stacked.shape = [*shape[:1], len(values), *shape[1:]]
    return stacked


def _output(graph: Graph, value: Tensor, name: str) -> None:
    if graph.find(name) is not None:
        raise OptionError(f"the model already has a tensor named '{name}'")
    named = graph.emit("Identity", value, stem=name)
    named.shape = value.shape
    graph.outputs.append(named)


def _residual(job: Job, seed: Tensor, attributions: Mapping[str, Tensor]) -> Tensor:
    """Σ attribution − (S(x) − S(x̄)) for each sample, shape [N].

    Where inputs and output do not lead with the same samples, one sum for all, shape [1].
    """
    graph, op, output = job.graph, job.graph.op, job.scope.output
    expected = job.expected
    if expected is None and job.reference is not None:
        expected = job.reference(output)
    if expected is None:
        raise LookupError("delta without a reference")
    inner = {t.name for node in job.scope.dependent for t in node.outputs}
    difference = op.Sub(output, expected)
    # What an attributed tensor is computed from is counted through that tensor.
    counted = [attributions[name] for name in job.scope.names if name not in inner]
    change, *parts = _aligned(
        graph,
        [_per_sample(job, t) for t in (op.Mul(seed, difference), *counted)],
    )
    # Inputs and output may be floats of different types.
    kind = graph.dtype(change)
    parts = [part if graph.dtype(part) == kind else op.Cast(part, to=kind) for part in parts]
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
    axis = batch_axis(shape, job.scope.batch)
    if axis:
        order = [axis, *(k for k in range(len(shape)) if k != axis)]
        tensor = graph.op.Transpose(tensor, perm=order)
    return graph.op.ReduceSum(graph.op.Flatten(tensor, axis=1), [1], keepdims=0)
