"""Average multipliers, or attributions, over draws inside the graph.

A draw is one evaluation of the sweep: at a point on the line from the reference to the input, at
the input with noise, or at the input against one row of a background. Where all draws have the
same input and reference, their multipliers are averaged; otherwise their attributions are. Groups
of draws are evaluated together, stacked along the batch axis; a Loop goes over the groups, so
memory is bounded by one group (:mod:`onnx_attrib.passes.stack`).

Precondition: scope, seed, and baselines or a background if the method has a reference.
Postcondition: ``job.attributions`` has one entry more; with a background, ``job.expected`` is the
output averaged over the draws' references, if the delta is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_attrib import noise
from onnx_attrib.ir import Dim, Graph, Shape, Tensor, Values, is_narrow, static
from onnx_attrib.job import Background, Job
from onnx_attrib.methods.base import Draws, Noise
from onnx_attrib.passes.bound import fitted
from onnx_attrib.passes.differentiate import filled, full, multipliers, starts, sweep_of
from onnx_attrib.passes.opening import Opening, opening
from onnx_attrib.passes.reference import outermost
from onnx_attrib.passes.rewriting import for_cpu
from onnx_attrib.passes.samples import captured
from onnx_attrib.passes.stack import (
    Stack,
    Step,
    accumulate,
    copyable,
    row_symbol,
    stackable,
    zeros,
)


def average(job: Job) -> None:
    """Emit the mean over all draws, group by group."""
    if job.method.draws is None:
        raise LookupError(f"method '{job.method.name}' has no draws")
    draws, batch = job.method.draws(job.options), stackable(job)
    first = opening(job) if _averages_multipliers(job, draws) else None

    def trial(size: int) -> tuple[int, Step]:
        groups = _Groups.of(job, replace(draws, chunk=size), batch)
        return groups.size, lambda number: _Group(job, draws, groups, first, number).sums()

    chunk = fitted(job, draws.chunk, batch, trial)
    groups = _Groups.of(job, replace(draws, chunk=chunk), batch)
    ends = job.scope.inputs if first is None else first.ends
    start = [_wide(job.graph, draws, zeros(job.graph, t)) for t in ends]
    start *= 1 if draws.moment == "mean" else 2
    expects = job.request.delta and job.method.complete and job.background is not None
    if expects and job.background is not None:
        start.append(_no_output(job, job.background))
    totals = accumulate(
        job.graph,
        groups.count,
        start,
        lambda number: _Group(job, draws, groups, first, number).sums(),
    )
    if expects:
        job.expected = totals.pop()
    if draws.moment != "mean":
        totals = _moments(job, draws, totals)
    found = dict(zip((t.name for t in ends), totals, strict=True))
    if first is not None:
        found = multipliers(sweep_of(job), replace(job.scope, nodes=first.nodes), found)
        found = {t.name: full(job.graph, found[t.name], t) for t in job.scope.inputs}
    if _ends_vary(draws, job):
        job.attributions.append(found)
    else:
        job.attribute(found)


def _averages_multipliers(job: Job, draws: Draws) -> bool:
    """Whether it is multipliers that are averaged, and that as they are."""
    if job.background is not None or draws.moment != "mean":
        return False
    if draws.noise is None:
        return True
    tensor = job.scope.inputs[0]
    with job.graph.collect():
        return job.method.attribution(job.graph.op, tensor, tensor, None) is tensor


def _ends_vary(draws: Draws, job: Job) -> bool:
    """Whether draws differ in the input or in the reference."""
    return draws.noise is not None or job.background is not None


def _no_output(job: Job, background: Background) -> Tensor:
    """Zeros for the output at one reference: of batch 1, or N where references are not shared."""
    graph, op, output = job.graph, job.graph.op, job.scope.output
    if not background.shared:
        return zeros(graph, output)
    size = op.Concat([1], op.Shape(output, start=1), axis=0)
    none = op.ConstantOfShape(size, value=np.zeros(1, graph.dtype(output)))
    none.shape = [1, *output.shape[1:]]
    return none


def _wide(graph: Graph, draws: Draws, tensor: Tensor) -> Tensor:
    """16-bit floats whose squares are summed, in 32 bits."""
    if draws.moment == "mean" or not is_narrow(tensor.dtype):
        return tensor
    return graph.op.Cast(tensor, to=np.dtype(np.float32))


def _moments(job: Job, draws: Draws, totals: list[Tensor]) -> list[Tensor]:
    """From means and means of squares to what is asked for."""
    op, half = job.graph.op, len(totals) // 2
    results = []
    for mean, square, tensor in zip(totals[:half], totals[half:], job.scope.inputs, strict=True):
        if draws.moment == "variance":
            # What rounding leaves of a variance of zero may be negative.
            square = op.Relu(op.Sub(square, op.Mul(mean, mean)))
        if square.dtype != tensor.dtype:
            square = op.Cast(square, to=job.graph.dtype(tensor))
        square.shape = tensor.shape
        results.append(square)
    return results


# -- groups ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    """``count`` groups of ``each`` draws, at most ``size``.

    The last one is filled up, with weight zero; if ``total`` is a tensor, it may have less.
    """

    batch: str | None
    count: int | Tensor
    size: int
    total: int | Tensor
    each: int | Tensor

    @staticmethod
    def of(job: Job, draws: Draws, batch: str | None) -> _Groups:
        op, limit = job.graph.op, 1 if batch is None else draws.chunk
        total: int | Tensor = len(draws.weights)
        if not draws.weights:
            if job.background is None:
                raise LookupError("draws without weights need a background")
            total = job.background.count
        if isinstance(total, int):
            count = -(-total // limit)
            size = -(-total // count)
            # One draw needs no copies: it meets a reference of batch 1 by broadcasting.
            alone = size == 1 and job.method.compares
            if size == 1 or count == 1 or not for_cpu(job) or job.request.memory is not None:
                return _Groups(None if alone else batch, count, size, total, size)
            each = _of_a_batch(job, str(batch), size)
            return _Groups(batch, op.Div(op.Add(each, total - 1), each), size, total, each)
        some = op.Squeeze(op.Div(op.Add(total, limit - 1), limit), [0])
        alone = limit == 1 and job.method.compares
        return _Groups(None if alone else batch, some, limit, total, limit)

    def numbers(self, graph: Graph, number: Tensor) -> Tensor:
        """The draws of a group, int64 [size]; the last group goes on past the total."""
        op, places = graph.op, np.arange(self.size, dtype=np.int64)
        known = graph.value(number)
        if known is not None:
            return graph.constant(known * self.size + places)
        if not isinstance(self.each, int):
            first = op.Mul(number, self.each)
            return op.Range(first, op.Add(first, self.each), 1)
        some = op.Add(op.Mul(number, self.each), places)
        if isinstance(self.total, int) or self.size == 1:
            return some
        # (A Range would wait for its ends to come to the host.)
        return op.Compress(some, op.Less(some, self.total), axis=0)

    def table(self, graph: Graph, number: Tensor, values: Any, dtype: Any, fill: Any) -> Tensor:
        """The part of a table, one row for each draw, that belongs to a group."""
        rows = np.asarray(values, dtype)
        if not isinstance(self.each, int):
            rows = np.concatenate([rows, np.full((self.size, *rows.shape[1:]), fill, dtype)])
            return graph.op.Gather(graph.constant(rows), self.numbers(graph, number), axis=0)
        assert isinstance(self.count, int)
        more = np.full((self.count * self.size - len(rows), *rows.shape[1:]), fill, dtype)
        rows = np.concatenate([rows, more]).reshape(self.count, self.size, *rows.shape[1:])
        known = graph.value(number)
        if known is not None:
            return graph.constant(rows[int(known)])
        return graph.op.Gather(graph.constant(rows), number, axis=0)


_TOGETHER = 16
"""Evaluations that are made together at least, if there are as many."""


def _of_a_batch(job: Job, batch: str, size: int) -> Tensor:
    """int64 []: how many draws of all samples are as many evaluations as ``size`` of one, at most.

    More leave the processor's caches (integrated gradients of 8 samples, 50 steps: a MobileNet 172
    → 141 times the forward pass, a small Inception 204 → 175, VGG-11 123 → 119).
    """
    op, source = job.graph.op, outermost(job)[0]
    axis = (job.graph.shape(source) or ()).index(batch)
    samples = op.Max(op.Squeeze(op.Shape(source, start=axis, end=axis + 1), [0]), 1)
    share = op.Div(op.Add(samples, max(size, _TOGETHER) - 1), samples)
    each: Tensor = op.Min(share, size)
    return each


@dataclass
class _Group:
    """One group of draws; ``number`` int64 [] tells which. ``first``: what follows the mean."""

    job: Job
    draws: Draws
    groups: _Groups
    first: Opening | None
    number: Tensor

    def __post_init__(self) -> None:
        graph, groups = self.job.graph, self.groups
        self.graph, self.op = graph, graph.op
        self.numbers = groups.numbers(graph, self.number)
        size: int | Tensor = groups.size
        if not isinstance(groups.each, int):
            size = self.op.Reshape(groups.each, [1])
        elif not isinstance(groups.total, int) and groups.size > 1:
            size = self.op.Shape(self.numbers)
        self.stack = Stack(graph, groups.batch, size)
        self.sources = outermost(self.job)
        self.outside = captured(graph, self.sources, self.job.scope.dependent)

    def sums(self) -> list[Tensor]:
        """Σ weight · multiplier (or attribution), then of the squares if they are needed."""
        job, scope = self.job, self.job.scope
        here = self._here()
        there, dims = self._there()
        point = here if not self.draws.alphas else self._on_path(here, there)
        sweep = sweep_of(job, point, there, dims)
        seeds = starts(job, point, self.stack.tiled(job.seed))
        if self.first is None:
            ends, found = scope.inputs, multipliers(sweep, scope, seeds)
        else:
            ends, behind = self.first.ends, self.first.behind
            found = sweep.run(behind, scope.active, seeds, [t.name for t in ends])
            if not found:
                found = multipliers(sweep, scope, seeds)  # none, which is said
            for tensor in ends:
                if tensor.name not in found:
                    zero = np.zeros((), self.graph.dtype(tensor))
                    found[tensor.name] = filled(self.graph, point(tensor), zero)
        terms = []
        for tensor in ends:
            at = point(tensor)
            value = full(self.graph, found[tensor.name], at)
            if _ends_vary(self.draws, job) and self.first is None:
                value.shape = at.shape
                reference = None if there is None else there(tensor)
                value = job.method.attribution(self.op, value, here(tensor), reference)
            value.shape = at.shape
            terms.append(_wide(self.graph, self.draws, value))
        weights = self._weights()
        sums = [self._sum(v, weights, t) for v, t in zip(terms, ends, strict=True)]
        if self.draws.moment != "mean":
            squares = [self.op.Mul(value, value) for value in terms]
            for square, value in zip(squares, terms, strict=True):
                square.shape = value.shape
            sums += [self._sum(v, weights, t) for v, t in zip(squares, ends, strict=True)]
        if job.request.delta and job.method.complete and job.background is not None:
            sums.append(self._expected(weights))
        return sums

    # -- weights ---------------------------------------------------------------------------------

    def _weights(self) -> Tensor:
        """The weights of the draws in float32 or wider, [size]."""
        groups, graph = self.groups, self.graph
        dtype = graph.dtype(self.job.scope.inputs[0])
        if isinstance(groups.total, int):
            weights = self.draws.weights or (1 / groups.total,) * groups.total
            return groups.table(graph, self.number, weights, dtype, 0)
        each = self.op.Reciprocal(graph.number(groups.total, dtype))
        return self.op.Expand(each, self.op.Shape(self.numbers))

    def _sum(self, values: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """Σ over the draws of weight · value, in the shape of ``like``."""
        op, dtype = self.op, self.graph.dtype(values)
        if self.graph.dtype(weights) != dtype:
            weights = op.Cast(weights, to=dtype)
        total = op.MatMul(op.Unsqueeze(weights, [0]), self.stack.split(values))
        return self.stack.joined(total, like)

    # -- the input's end -------------------------------------------------------------------------

    def _here(self) -> Values:
        """The model at the inputs of the draws."""
        scope, stack = self.job.scope, self.stack
        if self.draws.noise is None:
            return stack.everywhere(scope.dependent, [*self.sources, *self.outside], Values())
        placed = self._held()
        for i, tensor in enumerate(self.sources):
            placed[tensor.name] = self._noisy(tensor, self.draws.noise, f"noise/{i}")
        return self.graph.replicate(scope.dependent, placed, stack.dims)

    def _held(self) -> dict[str, Tensor]:
        """What the region reads from outside, in every copy."""
        stack = self.stack
        return {t.name: stack.tiled(t) for t in self.outside if stack.axis(t) is not None}

    def _noisy(self, tensor: Tensor, wanted: Noise, stream: str) -> Tensor:
        """The tensor with noise on it, other noise in each draw, the same for all samples."""
        graph, op, shape = self.graph, self.op, self.graph.shape(tensor) or ()
        axis = _sample_axis(shape, self.job.scope.batch)
        known = static(tuple(1 if i == axis else dim for i, dim in enumerate(shape)))
        if known is not None:
            one = graph.constant(known, np.int64)
            count = graph.constant(np.prod(known, dtype=np.int64))
        else:
            one = op.Shape(tensor)
            if axis is not None:
                mask = np.arange(len(shape)) == axis
                one = op.Where(mask, np.ones(1, np.int64), one)
            count = op.ReduceProd(one, keepdims=0)
        table = noise.keys(wanted.seed, stream, len(self.draws.weights))
        keys = self.groups.table(graph, self.number, table, np.int64, 0)
        drawn = op.Reshape(noise.normal(graph, keys, count), op.Concat([-1], one, axis=0))
        if graph.dtype(tensor) != np.float32:
            drawn = op.Cast(drawn, to=graph.dtype(tensor))
        deviation: Tensor | float = wanted.size
        if wanted.relative:
            axes = [i for i in range(len(shape)) if i != axis]
            highest, lowest = op.ReduceMax(tensor, axes), op.ReduceMin(tensor, axes)
            deviation = op.Mul(op.Sub(highest, lowest), wanted.size)
        noisy = op.Add(op.Unsqueeze(tensor, [0]), op.Mul(drawn, deviation))
        return self.stack.merged(noisy, tensor)

    # -- the reference's end ---------------------------------------------------------------------

    def _there(self) -> tuple[Values | None, dict[str, Dim]]:
        """The model at the references of the draws, and how dimensions are renamed there."""
        background = self.job.background
        if background is None:
            job = self.job
            return (Values(job.baselines) if job.method.needs_reference else None), {}
        at, dims = self._rows(background)
        if self.stack.batch is None or not background.shared:
            return at, dims
        n = self._samples()
        again = {
            t.name: self._repeated(at(t), n)
            for t in (*background.sources, *copyable(background.region))
            if self._row_axis(at(t)) is not None
        }
        return self.graph.replicate(background.region, again, self.stack.dims), {}

    def _rows(self, background: Background) -> tuple[Values, dict[str, Dim]]:
        """The model at this group's rows: [size, …] if they are shared, else [size · N, …]."""
        graph, op, stack = self.graph, self.op, self.stack
        place = self._places(background)
        dims: dict[str, Dim] = stack.dims
        placed = {}
        for tensor in background.sources:
            row, shape = background.rows[tensor.name], graph.shape(tensor) or ()
            if place is not None:
                row = op.Gather(row, place, axis=0)
            if background.shared:
                symbol: Dim = 1 if stack.batch is None else self._row_symbol
                row = op.Identity(row)
                row.shape = [symbol, *shape[1:]]
                dims = {str(shape[0]): symbol}
            elif stack.batch is None:
                row = op.Expand(row, op.Shape(tensor))
                row.shape = list(shape)
            else:
                row = self._repeated(row, self._samples(), 0)
                row.shape = [*stack.dims.values(), *shape[1:]]
            placed[tensor.name] = row
        if not background.shared:
            for tensor in captured(graph, background.sources, background.region):
                if stack.axis(tensor) is not None:
                    placed[tensor.name] = stack.tiled(tensor)
        return graph.replicate(background.region, placed, dims), dims

    def _places(self, background: Background) -> Tensor | None:
        """Which rows this group has; None for all there are, in their order."""
        if self.draws.rows:
            chosen = self.groups.table(self.graph, self.number, self.draws.rows, np.int64, 0)
            known = self.graph.value(chosen)
            if known is not None and isinstance(background.count, int):
                return self.graph.constant(known % background.count)
            return self.op.Mod(chosen, background.count)
        if isinstance(self.groups.count, int) and self.groups.count == 1:
            return None
        if isinstance(background.count, int) and self.groups.size > 1:
            # The last group is filled up, with weight zero.
            return self.op.Mod(self.numbers, background.count)
        return self.numbers

    @property
    def _row_symbol(self) -> str:
        return row_symbol(str(self.stack.batch))

    def _row_axis(self, tensor: Tensor) -> int | None:
        shape = self.graph.shape(tensor) or ()
        return shape.index(self._row_symbol) if self._row_symbol in shape else None

    def _samples(self) -> Tensor:
        """N as int64 [1]."""
        return self.op.Shape(self.sources[0], start=0, end=1)

    def _repeated(self, tensor: Tensor, samples: Tensor, axis: int | None = None) -> Tensor:
        """Every row N times, one after the other: [size, …] → [size · N, …]."""
        op, place = self.op, self._row_axis(tensor) if axis is None else axis
        assert place is not None
        shape = list(tensor.shape)
        before, after = op.Shape(tensor, end=place + 1), op.Shape(tensor, start=place + 1)
        size = op.Concat(before, samples, after, axis=0)
        spread = op.Expand(op.Unsqueeze(tensor, [place + 1]), size)
        flat = op.Concat(op.Shape(tensor, end=place), [-1], after, axis=0)
        result: Tensor = op.Reshape(spread, flat)
        shape[place] = next(iter(self.stack.dims.values()))
        result.shape = shape
        return result

    def _expected(self, weights: Tensor) -> Tensor:
        """Σ weight · output at the references."""
        background, output = self.job.background, self.job.scope.output
        assert background is not None
        at, _ = self._rows(background)
        value = at(output)
        if not background.shared:
            return self._sum(value, weights, output)
        op = self.op
        if self.graph.dtype(weights) != self.graph.dtype(value):
            weights = op.Cast(weights, to=self.graph.dtype(value))
        flat = op.Reshape(value, op.Concat(op.Shape(weights), [-1], axis=0))
        total = op.MatMul(op.Unsqueeze(weights, [0]), flat)
        total = op.Reshape(total, op.Concat([1], op.Shape(output, start=1), axis=0))
        total.shape = [1, *output.shape[1:]]
        return total

    # -- between them ----------------------------------------------------------------------------

    def _on_path(self, here: Values, there: Values | None) -> Values:
        """The model at x̄ + α(x − x̄)."""
        if there is None:
            raise LookupError("a path without a reference")
        groups, graph, op, stack = self.groups, self.graph, self.op, self.stack
        dtype = graph.dtype(self.job.scope.inputs[0])
        last = self.draws.alphas[-1]
        alphas = groups.table(graph, self.number, self.draws.alphas, dtype, last)
        placed = self._held()
        for tensor in self.sources:
            x = tensor if self.draws.noise is None else here(tensor)
            base = self.job.baselines[tensor.name] if self.job.background is None else there(tensor)
            x, base = self._apart(x, self.draws.noise), self._apart(base, self.job.background)
            rank = len(graph.shape(tensor) or ())
            factor = op.Reshape(alphas, [-1] + [1] * rank)
            if graph.dtype(tensor) != dtype:
                factor = op.Cast(factor, to=graph.dtype(tensor))
            line = op.Add(base, op.Mul(factor, op.Sub(x, base)))
            placed[tensor.name] = stack.merged(line, tensor)
        return graph.replicate(self.job.scope.dependent, placed, stack.dims)

    def _apart(self, value: Tensor, varying: object | None) -> Tensor:
        """[size, N, …], or [1, N, …] of what is the same in all draws."""
        if varying is None or self.stack.batch is None:
            return self.op.Unsqueeze(value, [0])
        return self.stack.apart(value)


def _sample_axis(shape: Shape, batch: Dim) -> int | None:
    """The axis of the samples; None where the entries are all of one sample."""
    if isinstance(batch, str) and shape.count(batch) == 1:
        return shape.index(batch)
    if shape and (shape[0] in (batch, 1) or not isinstance(shape[0], int)):
        return 0
    return None
