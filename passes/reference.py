"""Place the baseline and evaluate the model there.

Precondition: scope. Postcondition, for methods with a reference: ``job.baselines`` holds x̄ of
every attributed tensor, and ``job.reference`` the values at x̄ of every tensor that depends on
what the baseline replaces; for methods with a background, ``job.background`` holds K references,
which are evaluated where they are needed. A reference that is the same for all samples keeps batch
1 and is broadcast where it meets them; ONNX Runtime folds it at load time when it is constant.
Raises OptionError for a baseline that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnx_attrib import rules
from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Dim, Graph, Node, Shape, Tensor, is_float, static
from onnx_attrib.job import Background, Baseline, Job
from onnx_attrib.passes.postprocess import batch_axis

_SHAPES = frozenset({"Shape", "Size"})
_CASTS = frozenset({"Cast", "CastLike"})


def reference(job: Job) -> None:
    """Build x̄ and replicate what depends on it."""
    if not job.method.needs_reference:
        return
    graph, baseline = job.graph, job.request.baseline
    at_run_time = isinstance(baseline, str) and baseline == "input"
    sources = _model_inputs(job) if at_run_time else outermost(job)
    region = _region(job, sources)
    batch = batch_symbol(graph, sources)
    shared = batch is not None and _can_share(graph, sources, region, batch)
    if job.method.background:
        job.background = _background(job, sources, region, shared)
        return
    dims: dict[str, Dim] = {batch: 1} if shared and batch is not None else {}
    if at_run_time:
        placed = {t.name: _input(job, t, shared) for t in sources}
    else:
        arrays = _arrays(graph, sources, baseline, background=False)
        placed = {t.name: _constant(graph, t, arrays[t.name], shared) for t in sources}
    job.reference = graph.replicate(region, placed, dims)
    job.reference_dims = dims
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


def batch_symbol(graph: Graph, sources: Sequence[Tensor]) -> str | None:
    """The symbol of the batch axis, if all sources lead with the same one."""
    leading = {(graph.shape(t) or (None,))[0] for t in sources}
    symbol = leading.pop() if len(leading) == 1 else None
    return symbol if isinstance(symbol, str) else None


def keeps_batch_apart(
    graph: Graph, sources: Sequence[Tensor], region: Sequence[Node], batch: str
) -> bool:
    """Whether every tensor of values in the region has the batch as one axis of its own.

    Then nothing mixes samples with other axes or with each other: the region can be evaluated at
    another batch. Only what depends on the sources by their shape alone may be free of the batch,
    and how many samples there are must not be a number to reckon with.
    """
    carrying, counts = {t.name for t in sources}, dict[str, Shape]()
    for node in region:
        if not _keeps_samples_apart(graph, node, batch):
            return False
        counted = _counted(graph, node, counts)
        if not is_float(node.outputs[0].dtype):
            counts.update((t.name, counted) for t in node.outputs)
        elif node.op in _CASTS and not all(_is_known(graph, d) and d != batch for d in counted):
            return False
        carries = node.op not in _SHAPES and any(t.name in carrying for t in graph.uses(node))
        for tensor in node.outputs:
            if not tensor.name:
                continue
            if carries:
                carrying.add(tensor.name)
            if is_float(tensor.dtype):
                if not _apart(graph, tensor, batch, carries):
                    return False
            elif carries and (graph.shape(tensor) or ()).count(batch) != 1:
                return False
    return True


def _keeps_samples_apart(graph: Graph, node: Node, batch: str) -> bool:
    """Whether the batch is none of the axes that a node goes along or mixes.

    Operators whose outputs show it by their shape need not be here.
    """
    shape = graph.shape(node.inputs[0]) if node.inputs else None
    rule = rules.lookup(node.op, node.domain, ())
    if isinstance(rule, rules.Structured):
        axis = rule.batch_axis(graph, node)
        if shape is None or axis is None or shape[axis] != batch:
            return False
    return shape is None or (
        all(shape[k] != batch for k in _mixed_axes(graph, node, len(shape)))
        and all(dim in (batch, free) for dim, free in _beside_batch(graph, node, shape, batch))
    )


def _beside_batch(graph: Graph, node: Node, shape: Shape, batch: str) -> Iterable[tuple[Dim, Dim]]:
    """What meets the batch in operands that the output's shape does not follow.

    Each with another dimension that it may have there: 1 where the operand is broadcast.
    """
    if batch not in shape or node.domain:
        return
    axis = shape.index(batch)
    if node.op == "ScatterND":
        depth = (graph.shape(node.inputs[1]) or (None,))[-1]
        # Samples are picked by number, unless the axes picked from come before theirs.
        yield batch if isinstance(depth, int) and axis >= depth else None, batch
    states: dict[int, tuple[int, Dim]] = {4: (0, batch), 5: (axis, batch), 6: (axis, batch)}
    meets: dict[str, dict[int, tuple[int, Dim]]] = {
        "PRelu": {1: (axis - len(shape), 1)},
        "Gemm": {2: (-2, 1)},
        "ScatterElements": {1: (axis, batch), 2: (axis, batch)},
        "ReverseSequence": {1: (0, batch)},
        "RNN": states,
        "GRU": states,
        "LSTM": states,
    }
    for i, (k, free) in meets.get(node.op, {}).items():
        operand = node.inputs[i] if i < len(node.inputs) else None
        dims = graph.shape(operand) if operand is not None and operand.name else ()
        if dims is None:
            yield None, free
        elif -len(dims) <= k < len(dims):
            yield dims[k], free


_ALONG_AXIS = frozenset(
    "Softmax LogSoftmax Hardmax LpNormalization GatherElements ScatterElements".split()
)


def _mixed_axes(graph: Graph, node: Node, rank: int) -> Iterable[int]:
    """Axes along which entries meet though the output keeps the input's shape."""
    if node.domain:
        return ()
    if node.op in _ALONG_AXIS:
        return (graph.attr(node, "axis"),)
    if node.op in ("LayerNormalization", "RMSNormalization"):
        return range(graph.attr(node, "axis") % rank, rank)
    if node.op in ("InstanceNormalization", "GroupNormalization", "LRN"):
        return range(1, rank)
    if node.op == "MeanVarianceNormalization":
        return [int(k) for k in graph.attr(node, "axes") if -rank <= k < rank]
    if node.op == "ReverseSequence":
        return (graph.attr(node, "time_axis"),)
    if node.op == "Trilu":
        return range(rank - 2, rank)
    if node.op == "CumSum":
        axis = graph.value(node.inputs[1])
        return range(rank) if axis is None else (int(axis.reshape(())),)
    return ()


def _counted(graph: Graph, node: Node, counts: Mapping[str, Shape]) -> Shape:
    """The dimensions that whole numbers which a node puts out are made of, as far as known."""
    if node.op in _SHAPES:
        shape = graph.shape(node.inputs[0])
        if shape is None:
            return (None,)
        return shape[graph.attr(node, "start") or 0 : graph.attr(node, "end")]
    found = tuple(dim for t in graph.uses(node) for dim in counts.get(t.name, ()))
    index = graph.value(node.inputs[1]) if node.op == "Gather" else None
    if index is not None and any(source.op == "Shape" for source in node.inputs[0].inputs):
        return tuple(found[k] for k in index.reshape(-1).tolist())
    return found


def captured(graph: Graph, sources: Sequence[Tensor], region: Sequence[Node]) -> list[Tensor]:
    """Tensors, constants aside, that the region reads but neither is nor computes."""
    inside = {t.name for t in sources} | {t.name for node in region for t in node.outputs}
    found = {t.name: t for node in region for t in graph.uses(node) if t.name not in inside}
    return [t for t in found.values() if graph.value(t) is None]


def _can_share(graph: Graph, sources: Sequence[Tensor], region: Sequence[Node], batch: str) -> bool:
    """Whether one reference serves all samples: what it meets from outside is free of the batch."""
    outside = captured(graph, sources, region)
    return (
        keeps_batch_apart(graph, sources, region, batch)
        and all(fully_known(graph, t) and batch not in (graph.shape(t) or ()) for t in outside)
        and not counts_batch(graph, outside, batch)
    )


def counts_batch(graph: Graph, outside: Sequence[Tensor], batch: str) -> bool:
    """Whether a tensor without a batch axis may hold the number of samples, as a shape does."""
    free = [t for t in outside if batch not in (graph.shape(t) or ())]
    counts = dict[str, Shape]()
    for node in graph.prune(graph.nodes, free):
        counted = _counted(graph, node, counts)
        counts.update((t.name, counted) for t in node.outputs)
    return any(
        dim == batch or (not is_float(t.dtype) and not _is_known(graph, dim))
        for t in free
        for dim in counts.get(t.name, ())
    )


def _apart(graph: Graph, tensor: Tensor, batch: str, carries: bool) -> bool:
    shape = graph.shape(tensor)
    if shape is None:
        return False
    if shape and shape[0] == batch:
        # Unknown dimensions behind a leading batch axis cannot hold the batch once more.
        return shape.count(batch) == 1
    return shape.count(batch) == int(carries) and fully_known(graph, tensor)


def fully_known(graph: Graph, tensor: Tensor) -> bool:
    """Whether every dimension is a number or a symbol of the model's inputs.

    Other symbols stand for something computed, which may hold the batch ("4*N").
    """
    shape = graph.shape(tensor)
    return shape is not None and all(_is_known(graph, dim) for dim in shape)


def _is_known(graph: Graph, dim: Dim) -> bool:
    symbols = {dim for t in graph.inputs for dim in graph.shape(t) or ()}
    return isinstance(dim, int) or (dim is not None and dim in symbols)


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
