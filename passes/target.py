"""Say what is explained: the seed cotangent of the output.

Precondition: scope. Postcondition: ``job.seeds`` holds one seed of the output's shape for each
target; S = Σ seed · output.
Raises OptionError for a target that the output cannot have.
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Graph, Tensor, static
from onnx_attrib.job import Job, Targets


def target(job: Job) -> None:
    """Add the input ``target`` or ``seed``, or fix the choice at compile time."""
    if job.request.targets is None:
        job.seeds.append(_seed(job))
    else:
        job.seeds.extend(_several(job, job.request.targets))


def _several(job: Job, wanted: Targets) -> list[Tensor]:
    """A seed for each of the k largest classes, in falling order, or of the given ones."""
    graph, op, output = job.graph, job.graph.op, job.scope.output
    shape = graph.shape(output)
    if shape is None or len(shape) != 2:
        raise OptionError(
            f"several targets are for an output [N, classes]; '{output.name}' is not one"
        )
    if not isinstance(wanted, int):
        return [
            _one_hot(graph, output, graph.constant(_fixed(job, k, shape)[:, None], np.int64))
            for k in wanted
        ]
    if isinstance(shape[1], int) and wanted > shape[1]:
        raise OptionError(f"top{wanted} of the {shape[1]} classes of output '{output.name}'")
    _, ranked = op.TopK(output, [wanted], axis=1, outputs=2)
    ranked.shape = [shape[0], wanted]
    return [_one_hot(graph, output, op.Slice(ranked, [k], [k + 1], [1])) for k in range(wanted)]


def _seed(job: Job) -> Tensor:
    graph, output, wanted = job.graph, job.scope.output, job.request.target
    shape = graph.shape(output)
    if wanted == "seed":
        _free(graph, "seed")
        seed = graph.variable("seed", output.dtype, shape)
        graph.inputs.append(seed)
        return seed
    if shape is None:
        raise OptionError(
            f"the rank of output '{output.name}' is unknown; only target='seed' can explain it"
        )
    rank = len(shape)
    if rank < 2 or (rank == 2 and shape[1] == 1):
        if wanted not in ("input", "argmax", 0, (0,)):
            raise OptionError(
                f"output '{output.name}' holds one value a sample: it has no target {wanted}"
            )
        return _ones(graph, output)
    if wanted == "argmax":
        return _largest(graph, output)
    if wanted == "input":
        _free(graph, "target")
        batch = shape[0]
        declared = (batch,) if rank == 2 else (batch, rank - 1)
        index = graph.variable("target", np.int64, declared)
        graph.inputs.append(index)
    else:
        index = graph.constant(_fixed(job, wanted, shape), np.int64)
    return _one_hot(graph, output, index if rank > 2 else graph.op.Unsqueeze(index, [-1]))


def _free(graph: Graph, name: str) -> None:
    if graph.find(name) is not None:
        raise OptionError(
            f"the model already has a tensor named '{name}'; fix the target at compile time "
            "(an integer or 'argmax')"
        )


def _fixed(job: Job, wanted: object, shape: tuple[object, ...]) -> np.ndarray:
    """A compile-time target as an index array [1] or [1, r-1], checked against the shape."""
    index = (wanted,) if isinstance(wanted, int) else wanted
    name = job.scope.output.name
    if not isinstance(index, tuple) or len(index) != len(shape) - 1:
        raise OptionError(
            f"target {wanted} does not fit output '{name}' of rank {len(shape)}: give "
            f"{len(shape) - 1} indices, one for each axis after the batch"
        )
    for axis, (i, size) in enumerate(zip(index, shape[1:], strict=True), start=1):
        lowest = -1 if axis == 1 else 0
        if i < lowest or (isinstance(size, int) and i >= size):
            raise OptionError(
                f"target {i} is out of range: axis {axis} of output '{name}' has size {size}"
                + (" (−1 is the predicted class)" if axis == 1 else "")
            )
    return np.array(index if len(shape) == 2 else [index], np.int64)


def _ones(graph: Graph, output: Tensor) -> Tensor:
    op, known = graph.op, static(graph.shape(output))
    size = op.Shape(output) if known is None else graph.constant(known, np.int64)
    seed = op.ConstantOfShape(size, value=np.ones(1, graph.dtype(output)))
    seed.shape = list(output.shape)
    return seed


def _largest(graph: Graph, output: Tensor) -> Tensor:
    """One at the largest entry of each sample (the first on ties)."""
    op = graph.op
    flat = op.Flatten(output, axis=1)
    best = op.ArgMax(flat, axis=1, keepdims=1)
    places = op.Range(
        _scalar(graph, 0), op.Squeeze(op.Shape(flat, start=1), [0]), _scalar(graph, 1)
    )
    seed = op.Cast(op.Equal(places, best), to=graph.dtype(output))
    seed = op.Reshape(seed, op.Shape(output))
    seed.shape = list(output.shape)
    return seed


def _one_hot(graph: Graph, output: Tensor, index: Tensor) -> Tensor:
    """One at ``index`` [N, r-1]; a negative class is the predicted one at that position.

    An index out of range makes the sample's seed NaN: loud on every execution provider.
    """
    op, rank = graph.op, len(graph.shape(output) or ())
    dtype, shape = graph.dtype(output), graph.shape(output) or ()
    columns = (
        [index]
        if rank == 2
        else list(op.Split(index, axis=1, num_outputs=rank - 1, outputs=rank - 1))
    )
    predicted = op.ArgMax(output, axis=1, keepdims=0)
    for axis in range(2, rank):
        # The position's own class: pick along each further axis in turn.
        where = _spread(graph, columns[axis - 1], rank - axis)
        predicted = op.Squeeze(
            op.GatherElements(predicted, _rows(graph, where, predicted), axis=1), [1]
        )
    predicted = op.Unsqueeze(predicted, [1])
    columns[0] = op.Where(op.Less(columns[0], 0), predicted, columns[0])
    mask, valid = None, None
    for axis, column in enumerate(columns, start=1):
        size = shape[axis]
        count = op.Squeeze(op.Shape(output, start=axis, end=axis + 1), [0])
        if isinstance(size, int):
            places = graph.constant(np.arange(size, dtype=np.int64))
            count = graph.constant(size, np.int64)
        else:
            places = op.Range(_scalar(graph, 0), count, _scalar(graph, 1))
        places = op.Reshape(places, [1] * axis + [-1] + [1] * (rank - 1 - axis))
        hit = op.Equal(_spread(graph, column, rank - 1), places)
        inside = op.And(op.Less(column, count), op.GreaterOrEqual(column, 0))
        mask = hit if mask is None else op.And(mask, hit)
        valid = inside if valid is None else op.And(valid, inside)
    one = op.Where(_spread(graph, valid, rank - 1), np.ones((), dtype), np.array(np.nan, dtype))
    seed = op.Where(mask, one, op.Sub(one, one))
    seed.shape = list(shape)
    return seed


def _spread(graph: Graph, column: Tensor, trailing: int) -> Tensor:
    """[N, 1] with singleton axes appended until ``trailing`` axes follow the batch."""
    return column if trailing <= 1 else graph.op.Unsqueeze(column, list(range(2, 1 + trailing)))


def _rows(graph: Graph, where: Tensor, values: Tensor) -> Tensor:
    """Indices for GatherElements along axis 1 that pick one entry for each remaining place."""
    op = graph.op
    size = op.Concat(op.Shape(values, end=1), [1], op.Shape(values, start=2), axis=0)
    return op.Expand(where, size)


def _scalar(graph: Graph, value: int) -> Tensor:
    return graph.constant(value, np.int64)
