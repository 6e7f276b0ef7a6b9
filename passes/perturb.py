"""Evaluate the model with parts of its input at the reference; nothing is differentiated.

An evaluation puts the entries of the attributed tensors that a mask marks at the reference, and
gives the change S(x) − S(there) of each sample. Occlusion marks a window at a time, and counts the
change for its entries. A random order marks one feature more at a time, and counts the change that
came last for it. Groups of evaluations are stacked along the batch axis, and a Loop goes over the
groups; where a batch cannot be stacked, each group is one evaluation.

Precondition: scope, seeds and baselines. Postcondition: ``job.attributions`` has one entry for each
seed. Raises OptionError for windows that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_attrib import noise
from onnx_attrib.ir import Graph, Node, Tensor, is_narrow
from onnx_attrib.job import Job
from onnx_attrib.methods.base import Occluded, Permuted
from onnx_attrib.passes.bound import fitted
from onnx_attrib.passes.postprocess import samples_axis
from onnx_attrib.passes.samples import captured
from onnx_attrib.passes.stack import Stack, Step, accumulate, downstream, stackable
from onnx_attrib.passes.tiling import (
    Axis,
    Size,
    along,
    as_tensor,
    axes_of,
    calculated,
    product,
    summed,
)

_STREAM = "orders"
_F32 = np.dtype(np.float32)


def perturb(job: Job) -> None:
    """Occlude windows, or draw orders, as the method says."""
    if job.method.perturbs is None:
        raise LookupError(f"method '{job.method.name}' does not perturb")
    how = job.method.perturbs(job.options)
    found: dict[str, list[Tensor]] = {}
    if isinstance(how, Occluded):
        for tensor in job.scope.inputs:
            found[tensor.name] = _occluded(job, tensor, how)
    else:
        for players in _games(job):
            found.update(_played(job, players, how))
    for k in range(len(job.seeds)):
        job.attribute({name: values[k] for name, values in found.items()})


# -- occlusion -------------------------------------------------------------------------------------


def _occluded(job: Job, tensor: Tensor, how: Occluded) -> list[Tensor]:
    """The mean of S(x) − S(x with a window at x̄) over the windows that cover an entry."""
    graph, op = job.graph, job.graph.op
    axes = axes_of(graph, tensor, _samples(job, tensor), how.window, how.stride)
    total = product(graph, [axis.windows for axis in axes])
    trial = _Trial.of(job, [tensor])

    def step(size: int, group: Tensor) -> list[Tensor]:
        numbers, real = _numbers(graph, group, size, total)
        mask = _windows(graph, tensor, axes, numbers, real)
        changes = trial.changes({tensor.name: mask}, size)
        return [_counted(job, tensor, mask, change) for change in changes]

    size, groups = trial.grouped(total, how.chunk, step)
    kind = _wide(graph, job.scope.output)
    start = graph.op.ConstantOfShape(op.Shape(tensor), value=np.zeros(1, kind))
    start.shape = tensor.shape
    sums = accumulate(graph, groups, [start] * len(job.seeds), partial(step, size))
    for axis in axes:
        if not axis.whole and (axis.window, axis.stride) != (1, 1):
            covering = op.Reshape(axis.covering(), along(graph, tensor, axis))
            sums = [op.Div(total, op.Cast(covering, to=kind)) for total in sums]
    return [_like(graph, total, tensor) for total in sums]


def _windows(
    graph: Graph, tensor: Tensor, axes: Sequence[Axis], numbers: Tensor, real: Tensor
) -> Tensor:
    """Masks of the windows of these numbers [size], with an axis for them before the tensor's.

    The samples' axis, and those that every window covers, have size 1. What is not ``real`` covers
    nothing.
    """
    op, rank = graph.op, len(graph.shape(tensor) or ())
    mask, left = op.Reshape(real, [-1] + [1] * rank), numbers
    for axis in reversed(axes):
        if axis.whole:
            continue
        count = as_tensor(graph, axis.windows)
        first = op.Unsqueeze(op.Mul(op.Mod(left, count), axis.stride), [1])
        left, places = op.Div(left, count), axis.places()
        inside = op.GreaterOrEqual(places, first)
        inside = op.And(inside, op.Less(places, op.Add(first, axis.window)))
        mask = op.And(mask, op.Reshape(inside, [0, *along(graph, tensor, axis)]))
    result: Tensor = mask
    return result


def _counted(job: Job, tensor: Tensor, mask: Tensor, change: Tensor) -> Tensor:
    """Σ of the changes [size, samples] where the mask is set, broadcastable to the tensor."""
    graph, op = job.graph, job.graph.op
    rank, samples = len(graph.shape(tensor) or ()), _samples(job, tensor)
    rows = _matched(job, tensor, change)
    spread = [-1 if k == samples else 1 for k in range(rank)]
    rows = op.Reshape(rows, [0, *spread])
    chosen = op.Where(mask, rows, np.zeros((), graph.dtype(rows)))
    result: Tensor = op.ReduceSum(chosen, [0], keepdims=0)
    return result


# -- random orders ---------------------------------------------------------------------------------


def _games(job: Job) -> list[list[Tensor]]:
    """Attributed tensors that play together: those that are not computed from each other."""
    games, left = [], list(job.scope.inputs)
    while left:
        inner = {
            t.name
            for source in left
            for node in downstream(job.graph, job.scope.dependent, [source])
            for t in node.outputs
        }
        games.append([t for t in left if t.name not in inner])
        left = [t for t in left if t.name in inner]
    return games


def _played(job: Job, players: Sequence[Tensor], how: Permuted) -> dict[str, list[Tensor]]:
    """Sampled Shapley values of the features of all players."""
    graph, op = job.graph, job.graph.op
    axes = {t.name: axes_of(graph, t, _samples(job, t), how.window, how.window) for t in players}
    counts = [product(graph, [axis.windows for axis in axes[t.name]]) for t in players]
    features, places = summed(graph, counts), {}
    for i, tensor in enumerate(players):
        own = _features(graph, tensor, axes[tensor.name])
        places[tensor.name] = op.Add(own, as_tensor(graph, summed(graph, counts[:i])))
    trial, total = _Trial.of(job, players), product(graph, [how.samples, features])
    table = graph.constant(noise.keys(how.seed, _STREAM, how.samples))

    def step(size: int, group: Tensor) -> list[Tensor]:
        numbers, real = _numbers(graph, group, size, total)
        count = as_tensor(graph, features)
        order = op.Min(op.Div(numbers, count), how.samples - 1)
        depth = op.Unsqueeze(op.Mod(numbers, count), [1])
        ranks = _ranks(graph, op.Gather(table, order, axis=0), count)
        gone = op.And(op.LessOrEqual(ranks, depth), op.Unsqueeze(real, [1]))
        masks = {name: op.Gather(gone, place, axis=1) for name, place in places.items()}
        last, coming = op.Equal(ranks, depth), op.Equal(ranks, op.Add(depth, 1))
        return [_credited(graph, last, coming, change) for change in trial.changes(masks, size)]

    size, groups = trial.grouped(total, how.chunk, step)
    shape = op.Concat(op.Reshape(as_tensor(graph, features), [1]), trial.samples(), axis=0)
    start = op.ConstantOfShape(shape, value=np.zeros(1, _wide(graph, job.scope.output)))
    sums = accumulate(graph, groups, [start] * len(job.seeds), partial(step, size))
    values = {t.name: [_matched(job, t, total) for total in sums] for t in players}
    return {
        t.name: [
            _shared(job, t, axes[t.name], op.Div(value, float(how.samples)), places[t.name])
            for value in values[t.name]
        ]
        for t in players
    }


def _features(graph: Graph, tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The number of the feature that each entry is part of; samples share them (size 1)."""
    op, rank = graph.op, len(graph.shape(tensor) or ())
    numbers: Tensor = graph.constant(np.zeros([1] * rank, np.int64))
    for axis in axes:
        own = op.Reshape(axis.patches(), along(graph, tensor, axis))
        numbers = op.Add(op.Mul(numbers, as_tensor(graph, axis.windows)), own)
    return numbers


def _ranks(graph: Graph, keys: Tensor, count: Tensor) -> Tensor:
    """Random orders: when each of ``count`` features goes, int64 [orders, count]."""
    op, size = graph.op, graph.op.Reshape(count, [1])
    drawn = noise.numbers(graph, keys, count)
    # Where in the sorted sequence each entry stands: the inverse of the permutation that sorts.
    _, order = op.TopK(drawn, size, axis=1, largest=0, outputs=2)
    _, ranks = op.TopK(order, size, axis=1, largest=0, outputs=2)
    found: Tensor = ranks
    return found


def _credited(graph: Graph, last: Tensor, coming: Tensor, change: Tensor) -> Tensor:
    """What evaluations add to the features [features, samples].

    The change belongs to the feature that went last; from there the next one's is counted.
    """
    op, nothing = graph.op, np.zeros((), graph.dtype(change))
    rows = op.Unsqueeze(change, [1])
    gained = op.Where(op.Unsqueeze(last, [2]), rows, nothing)
    start = op.Where(op.Unsqueeze(coming, [2]), rows, nothing)
    result: Tensor = op.ReduceSum(op.Sub(gained, start), [0], keepdims=0)
    return result


def _shared(
    job: Job, tensor: Tensor, axes: Sequence[Axis], values: Tensor, places: Tensor
) -> Tensor:
    """Values of features [features, samples], split evenly among the entries of each."""
    graph, op = job.graph, job.graph.op
    rank, samples = len(graph.shape(tensor) or ()), _samples(job, tensor)
    entries = op.Gather(values, places, axis=0)
    if samples is not None:
        order = list(range(rank + 1))
        order[samples], order[rank] = rank, samples
        entries = op.Transpose(entries, perm=order)
    entries = op.Squeeze(entries, [rank])
    for axis in axes:
        if axis.windows != axis.size:
            length = op.Reshape(axis.lengths(), along(graph, tensor, axis))
            entries = op.Div(entries, op.Cast(length, to=graph.dtype(entries)))
    return _like(graph, entries, tensor)


# -- evaluations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """The model with some entries of ``sources`` at the reference.

    ``region``: sorted nodes that depend on them; ``batch``: the symbol of the axis to stack along.
    """

    job: Job
    sources: Sequence[Tensor]
    region: Sequence[Node]
    batch: str | None

    @staticmethod
    def of(job: Job, sources: Sequence[Tensor]) -> _Trial:
        region = downstream(job.graph, job.scope.dependent, sources)
        return _Trial(job, sources, region, stackable(job, sources))

    def grouped(
        self, total: Size, chunk: int, step: Callable[[int, Tensor], list[Tensor]]
    ) -> tuple[int, Size]:
        """How many evaluations a group has, and how many groups there are.

        ``chunk``: the most that the options allow. ``step``: what a group of a size emits.
        """
        graph = self.job.graph

        def probe(size: int) -> tuple[int, Step]:
            actual, _ = _grouped(graph, total, size)
            return actual, partial(step, actual)

        found = fitted(self.job, chunk, self.batch, probe)
        return _grouped(graph, total, found if self.batch else 1)

    def changes(self, masks: Mapping[str, Tensor], size: int) -> list[Tensor]:
        """S(x) − S(x where the masks are set: x̄) for each seed, [size, samples]."""
        graph, op, output = self.job.graph, self.job.graph.op, self.job.scope.output
        stack = Stack(graph, self.batch, size)
        placed = {}
        for tensor in self.sources:
            base = self.job.baselines[tensor.name]
            sides = (op.Unsqueeze(t, [0]) for t in (base, tensor))
            placed[tensor.name] = stack.merged(op.Where(masks[tensor.name], *sides), tensor)
        for tensor in captured(graph, self.sources, self.region):
            if stack.axis(tensor) is not None:
                placed[tensor.name] = stack.tiled(tensor)
        there = graph.replicate(self.region, placed, stack.dims)(output)
        kind = _wide(graph, output)
        here, there = (_cast(graph, t, kind) for t in (output, stack.apart(there)))
        difference = op.Sub(here, there)
        found = []
        for seed in self.job.seeds:
            weights = _cast(graph, seed, kind)
            # What is not explained does not count, though it may be infinite.
            terms = op.Where(op.Equal(weights, 0.0), 0.0, op.Mul(weights, difference))
            found.append(op.ReduceSum(op.Reshape(terms, [0, 0, -1]), [2], keepdims=0))
        return found

    def samples(self) -> Tensor:
        """How many samples the output has, int64 [1]."""
        graph, output = self.job.graph, self.job.scope.output
        if not graph.shape(output):
            return graph.constant([1], np.int64)
        result: Tensor = graph.op.Shape(output, end=1)
        return result


def _grouped(graph: Graph, total: Size, chunk: int) -> tuple[int, Size]:
    """How many evaluations a group has, at most ``chunk``, and how many groups there are."""
    if isinstance(total, int):
        groups = -(-total // chunk)
        return -(-total // groups), groups
    return chunk, calculated(graph, "Div", summed(graph, [total, chunk - 1]), chunk)


def _numbers(graph: Graph, group: Tensor, size: int, total: Size) -> tuple[Tensor, Tensor]:
    """The numbers of a group's evaluations, and which of them are needed, both [size]."""
    numbers = graph.op.Add(graph.op.Mul(group, size), np.arange(size))
    return numbers, graph.op.Less(numbers, as_tensor(graph, total))


# -- samples ---------------------------------------------------------------------------------------


def _samples(job: Job, tensor: Tensor) -> int | None:
    return samples_axis(job.graph.shape(tensor), job.graph.shape(job.scope.output))


def _matched(job: Job, tensor: Tensor, values: Tensor) -> Tensor:
    """Values of the output's samples [k, samples] as those of the tensor's: one sum for all [k, 1]
    where the two have not as many."""
    op, axis = job.graph.op, _samples(job, tensor)
    have = None if axis is None else (job.graph.shape(tensor) or ())[axis]
    if have is not None and have == job.scope.batch:
        return values
    rows: Tensor | list[int] = [0, 1, -1]
    if axis is not None and have != 1:
        here, there = op.Shape(tensor, start=axis, end=axis + 1), op.Shape(values, start=1)
        same = op.Where(op.Equal(here, there), here, np.ones(1, np.int64))
        rows = op.Concat([0], same, [-1], axis=0)
    result: Tensor = op.ReduceSum(op.Reshape(values, rows), [2], keepdims=0)
    return result


def _like(graph: Graph, values: Tensor, tensor: Tensor) -> Tensor:
    """In the tensor's shape and type."""
    result = graph.op.Expand(values, graph.op.Shape(tensor))
    result = _cast(graph, result, graph.dtype(tensor))
    result.shape = tensor.shape
    return result


def _cast(graph: Graph, tensor: Tensor, kind: np.dtype) -> Tensor:
    return tensor if graph.dtype(tensor) == kind else graph.op.Cast(tensor, to=kind)


def _wide(graph: Graph, tensor: Tensor) -> np.dtype:
    """The type to add up in: float32 for 16 bits."""
    return _F32 if is_narrow(tensor.dtype) else graph.dtype(tensor)


__all__ = ["perturb"]
