"""Place the baseline and evaluate the model there.

Precondition: scope. Postcondition, for methods with a reference: ``job.baselines`` holds x̄ of
every attributed tensor, and ``job.reference`` the values at x̄ of every tensor that depends on
what the baseline replaces; for methods with a background, ``job.background`` holds K references,
which are evaluated where they are needed. A reference that is the same for all samples keeps batch
1 and is broadcast where it meets them; ONNX Runtime folds it at load time when it is constant.
Raises OptionError for a baseline that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Graph, Node, Shape, Tensor, Values, is_float, static
from onnx_attrib.job import Background, Baseline, Job
from onnx_attrib.passes.postprocess import batch_axis
from onnx_attrib.passes.samples import (
    Samples,
    batch_symbol,
    captured,
    counts_batch,
    fully_known,
    kept_apart,
)


def reference(job: Job) -> None:
    """Build x̄ and replicate what depends on it."""
    if not job.method.needs_reference:
        return
    graph, baseline = job.graph, job.request.baseline
    at_run_time = isinstance(baseline, str) and baseline == "input"
    sources = _model_inputs(job) if at_run_time else outermost(job)
    region = _region(job, sources)
    samples = _shared(graph, sources, region)
    if job.method.background:
        stacked = samples is not None and not samples.merged
        job.background = _background(job, sources, region, stacked)
        return
    shared = samples is not None
    if at_run_time:
        placed = {t.name: _input(job, t, shared) for t in sources}
    else:
        arrays = _arrays(graph, sources, baseline, background=False)
        placed = {t.name: _constant(graph, t, arrays[t.name], shared) for t in sources}
    job.reference = graph.replicate(region, placed, samples.dims(1) if samples else {})
    if samples is not None:
        job.reference = _broadcast(graph, job.reference, samples)
        job.reference_dims = {samples.batch: 1}
    job.baselines = {t.name: job.reference(t) for t in job.scope.inputs}


# -- what the baseline replaces --------------------------------------------------------------------


def outermost(job: Job) -> list[Tensor]:
    """Attributed tensors that are not computed from other attributed tensors."""
    names = set(job.scope.names)
    inner = {t.name for node in job.scope.dependent for t in node.outputs} & names
    return [t for t in job.scope.inputs if t.name not in inner]


def _model_inputs(job: Job) -> list[Tensor]:
    """The model inputs that the attributed tensors are, or are computed from."""
    graph = job.graph
    needed = {
        t.name for node in graph.prune(graph.nodes, job.scope.inputs) for t in graph.uses(node)
    }
    needed |= set(job.scope.names)
    return [t for t in graph.inputs if t.name in needed]


def _region(job: Job, sources: Sequence[Tensor]) -> list[Node]:
    """Sorted nodes that depend on ``sources`` and that output or attributed tensors need."""
    graph, nodes = job.graph, []
    changing = {t.name for t in sources}
    for node in graph.prune(graph.nodes, [job.scope.output, *job.scope.inputs]):
        if any(t.name in changing for t in graph.uses(node)):
            nodes.append(node)
            changing.update(t.name for t in node.outputs if t.name)
    return nodes


# -- one reference for all samples -----------------------------------------------------------------


def _shared(graph: Graph, sources: Sequence[Tensor], region: Sequence[Node]) -> Samples | None:
    """Where the samples lie, if one reference serves all: what it meets is free of the batch."""
    batch = batch_symbol(graph, sources)
    if batch is None:
        return None
    outside = captured(graph, sources, region)
    free = all(fully_known(graph, t) and batch not in (graph.shape(t) or ()) for t in outside)
    if not free or counts_batch(graph, outside, batch):
        return None
    return kept_apart(graph, sources, region, batch)


def _broadcast(graph: Graph, there: Values, samples: Samples) -> Values:
    """Values at a shared reference, repeated where samples lie along an axis with others."""
    op, found = graph.op, dict(there.mapping)
    for name, place in samples.merged.items():
        tensor, value = graph.tensors()[name], there.mapping[name]
        if not is_float(tensor.dtype):
            continue
        axis, rank = place.axis, len(graph.shape(tensor) or ())
        whole = op.Shape(tensor)
        times = op.Div(*(op.Shape(t, start=axis, end=axis + 1) for t in (tensor, value)))
        size = op.Shape(value)
        ends = [op.Slice(size, [a], [b]) for a, b in ((0, axis), (axis + 1, rank))]
        split = graph.constant([place.outer, -1, place.inner], np.int64)
        split = op.Reshape(value, op.Concat(ends[0], split, ends[1], axis=0))
        ones = [graph.constant([1] * n, np.int64) for n in (axis + 1, rank - axis)]
        repeated = op.Tile(split, op.Concat(ones[0], times, ones[1], axis=0))
        found[name] = op.Reshape(repeated, whole)
        found[name].shape = list(tensor.shape)
    return Values(found)


# -- placing it ------------------------------------------------------------------------------------


def _arrays(
    graph: Graph, sources: Sequence[Tensor], baseline: Baseline, background: bool
) -> dict[str, np.ndarray]:
    """The baseline of each source as an array, checked against its dtype and shape."""
    names = [t.name for t in sources]
    if isinstance(baseline, Mapping):
        missing = [name for name in names if name not in baseline]
        unknown = [name for name in baseline if name not in names]
        if missing or unknown:
            raise OptionError(
                f"the baseline must hold one array for each of {names}"
                + (f"; missing: {missing}" if missing else "")
                + (f"; unknown: {unknown}" if unknown else "")
            )
        return {
            t.name: _fitted(graph, t, np.asarray(baseline[t.name]), background) for t in sources
        }
    array = np.asarray(0.0 if isinstance(baseline, str) else baseline)
    if array.ndim and len(sources) > 1:
        raise OptionError(
            f"{len(sources)} tensors are attributed ({', '.join(names)}): give the baseline as a "
            "number, or as a mapping (.npz) with an array for each"
        )
    return {t.name: _fitted(graph, t, array, background) for t in sources}


def _fitted(graph: Graph, tensor: Tensor, array: np.ndarray, background: bool) -> np.ndarray:
    """``array`` in the tensor's dtype and rank; OptionError if it does not fit."""
    name, shape = tensor.name, graph.shape(tensor)
    if array.dtype.kind not in "fiub":
        raise OptionError(f"the baseline of '{name}' must be real numbers, not {array.dtype}")
    if not np.isfinite(array).all():
        raise OptionError(f"the baseline of '{name}' has entries that are not finite")
    array = array.astype(graph.dtype(tensor))
    if array.ndim == 0 or shape is None:
        return array
    if array.ndim == len(shape) - 1:
        array = array[None]
    if array.ndim != len(shape) or not all(
        have in (1, want)
        or (axis > 0 and not isinstance(want, int))
        or (axis == 0 and background and have > 0)
        for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True))
    ):
        wanted = ", ".join("?" if dim is None else str(dim) for dim in shape)
        raise OptionError(
            f"the baseline of '{name}' has shape {list(array.shape)}; it must be a number, or "
            f"fit [{wanted}] with "
            + ("the background's samples as its batch" if background else "batch 1")
        )
    return array


def _constant(
    graph: Graph, tensor: Tensor, value: np.ndarray, shared: bool, rows: int = 1
) -> Tensor:
    """The baseline in the attributed tensor's shape (batch 1, or ``rows``, if shared)."""
    op, shape = graph.op, graph.shape(tensor)
    wanted: Shape | None = (rows, *shape[1:]) if shared and shape is not None else shape
    fixed = static(wanted)
    if fixed is not None and value.shape == fixed:
        return graph.constant(value)
    size = op.Shape(tensor) if fixed is None else graph.constant(fixed, np.int64)
    if shared and fixed is None:
        size = op.Concat(graph.constant([rows], np.int64), op.Shape(tensor, start=1), axis=0)
    placed = op.Expand(value, size)
    placed.shape = None if wanted is None else list(wanted)
    return placed


def _input(job: Job, tensor: Tensor, shared: bool) -> Tensor:
    """A graph input for the baseline: batch 1 or that of ``tensor``; one for all methods."""
    graph, shape = job.graph, job.graph.shape(tensor)
    if tensor.name in job.placed:
        return job.placed[tensor.name]
    declared = shape
    if shape and not isinstance(shape[0], int):
        declared = (f"{tensor.name}_baseline_batch", *shape[1:])
    given = _declared(graph, tensor, declared)
    if shared and shape is not None:
        # Known as batch 1 from here on. At run time it may be N as well: both broadcast alike.
        placed = graph.op.Identity(given)
        placed.shape = [1, *shape[1:]]
    else:
        placed = graph.op.Expand(given, graph.op.Shape(tensor))
        placed.shape = None if shape is None else list(shape)
    job.placed[tensor.name] = placed
    return placed


def _declared(graph: Graph, tensor: Tensor, shape: Shape | None) -> Tensor:
    """A new graph input ``<name>_baseline``."""
    name = f"{tensor.name}_baseline"
    if graph.find(name) is not None:
        raise OptionError(f"the model already has a tensor named '{name}'; use a fixed baseline")
    given = graph.variable(name, tensor.dtype, shape)
    graph.inputs.append(given)
    return given


# -- a background ----------------------------------------------------------------------------------


def _background(job: Job, sources: list[Tensor], region: list[Node], shared: bool) -> Background:
    """K references for each source, [K, …], given now or at run time."""
    graph, baseline = job.graph, job.request.baseline
    for tensor in sources:
        shape = graph.shape(tensor)
        if not shape or batch_axis(shape, job.scope.batch):
            raise OptionError(
                f"a background needs the samples on the first axis, and '{tensor.name}' has them "
                f"elsewhere; use a method with one reference, like deeplift"
            )
    if isinstance(baseline, str) and baseline == "input":
        return _background_input(job, sources, region, shared)
    arrays = _arrays(graph, sources, baseline, background=True)
    counts = {name: len(a) if a.ndim else 1 for name, a in arrays.items()}
    count = max(counts.values())
    if not set(counts.values()) <= {1, count}:
        raise OptionError(f"the backgrounds must have as many samples each; they have {counts}")
    rows = {t.name: _constant(graph, t, arrays[t.name], True, count) for t in sources}
    return Background(sources, region, rows, shared, count)


def _background_input(
    job: Job, sources: list[Tensor], region: list[Node], shared: bool
) -> Background:
    graph = job.graph
    methods = [choice.method for choice in job.request.choices]
    single = [m.name for m in methods if m.needs_reference and not m.background]
    if single:
        raise OptionError(
            f"with baseline 'input' {single[0]} takes one reference and {job.method.name} a "
            "background of several: compile them apart, or fix the baseline"
        )
    for tensor in sources:
        if tensor.name not in job.placed:
            shape = graph.shape(tensor) or ()
            declared = ("background", *shape[1:])
            job.placed[tensor.name] = _declared(graph, tensor, declared)
    rows = {t.name: job.placed[t.name] for t in sources}
    count = graph.op.Shape(rows[sources[0].name], start=0, end=1)
    return Background(sources, region, rows, shared, count)
