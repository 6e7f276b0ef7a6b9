"""How many evaluations fit into a bound on memory.

The group of evaluations that a Loop goes over is emitted on trial, at two sizes, and the bytes that
its tensors take at once are counted: each from the node that makes it to the last one that reads
it, what does not depend on the step all the time, and views of other tensors not at all. That grows
linearly with the size, which gives the largest one within the bound. What kernels need beside their
outputs is not counted, nor is the forward pass, which a group does not repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Job
from onnx_attrib.passes.simplify import share
from onnx_attrib.passes.stack import Step, row_symbol, stacked_symbol

_MIB = 2**20
_PROBES = (2, 4)
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

Trial = Callable[[int], tuple[int, Step]]
"""From the size that is asked for to the size that a group then has, and its step."""


def fitted(job: Job, chunk: int, batch: str | None, trial: Trial) -> int:
    """The chunk of the method's options; if there is a bound on memory, the largest within it.

    ``batch``: the symbol of the axis that evaluations are stacked along, if they are. The job's
    options and notes are told. Raises OptionError for sizes that are missing or unknown.
    """
    bound = job.request.memory
    if bound is None or batch is None:
        return chunk
    (small, less), (large, more) = (_measured(job, batch, *trial(size)) for size in _PROBES)
    if small == large:
        return large
    each = (more - less) / (large - small)
    fixed = less - small * each
    room = (bound * _MIB - fixed) / max(each, 1.0)
    if room < 1:
        job.notes.append(
            f"{job.method.name}: one evaluation takes about {(fixed + each) / _MIB:.1f} MiB, more "
            f"than the {bound:g} MiB asked for"
        )
    found, _ = trial(max(1, math.floor(room)))
    options = {**job.options, "chunk": min(found, job.fitted or found)}
    job.fitted = options["chunk"]
    job.choice = replace(job.choice, options=options)
    return found


def _measured(job: Job, batch: str, size: int, step: Step) -> tuple[int, int]:
    """The size, and the bytes of a group of so many evaluations."""
    graph = job.graph
    number = graph.variable(graph.fresh("attrib/iteration"), np.int64, ())
    with graph.collect() as nodes:
        ends = step(number)
    order = share(graph, graph.in_order(nodes), {t.name for t in ends})
    order = graph.prune(order, ends)
    sizes = _sizes(job, batch)
    sizes[stacked_symbol(batch)], sizes[row_symbol(batch)] = size * sizes[batch], size
    return size, peak(graph, order, ends, number, sizes)


def _sizes(job: Job, batch: str) -> dict[str, int]:
    """The sizes of the model's open dimensions, the batch 1 unless it is given."""
    given = job.request.dims
    known = {d for t in job.graph.inputs for d in job.graph.shape(t) or () if isinstance(d, str)}
    for name in given:
        if name not in known:
            raise OptionError(
                f"the model has no open dimension '{name}': {suggest(name, sorted(known))}"
            )
    missing = sorted(known - given.keys() - {batch})
    if missing:
        raise OptionError(
            f"the memory depends on the size of '{missing[0]}': give it (--dim {missing[0]}=SIZE)"
        )
    return {batch: 1, **given}


def peak(
    graph: Graph,
    nodes: Sequence[Node],
    ends: Sequence[Tensor],
    number: Tensor,
    sizes: Mapping[str, int],
) -> int:
    """The most bytes that tensors made by ``nodes`` (sorted) take at once.

    ``number``: what changes from step to step; ``sizes``: of the symbols in shapes. A tensor of
    unknown shape counts as the largest that its node reads.
    """
    inner, varying = [], {number.name}
    for node in nodes:
        if any(t.name in varying for t in graph.uses(node)):
            varying.update(t.name for t in node.outputs)
            inner.append(node)
    # What does not depend on the step is made before the Loop, and stays.
    outer = [node for node in nodes if not any(t.name in varying for t in node.outputs)]
    order = [*outer, *inner]
    source: dict[str, str] = {}
    last: dict[str, int] = {}
    for place, node in enumerate(order):
        for t in node.outputs:
            view = node.op in _VIEWS and bool(node.inputs)
            first = node.inputs[0].name if view else t.name
            source[t.name] = source.get(first, first)
        for t in graph.uses(node):
            base = source.get(t.name, t.name)
            stays = place >= len(outer) and base not in varying
            last[base] = len(order) if stays else max(last.get(base, 0), place)
    for t in ends:
        last[source.get(t.name, t.name)] = len(order)
    dying: dict[int, int] = {}
    live = most = 0
    known: dict[str, int] = {}
    for place, node in enumerate(order):
        largest = max((known.get(t.name, 0) for t in graph.uses(node)), default=0)
        for t in node.outputs:
            if not t.name:
                continue
            known[t.name] = _bytes(graph, t, sizes, largest)
            if source[t.name] == t.name:
                live += known[t.name]
                gone = last.get(t.name, place)
                dying[gone] = dying.get(gone, 0) + known[t.name]
        most = max(most, live)
        live -= dying.get(place, 0)
    return most


def _bytes(graph: Graph, tensor: Tensor, sizes: Mapping[str, int], otherwise: int) -> int:
    shape = graph.shape(tensor)
    if shape is None or tensor.dtype is None:
        return otherwise
    counts = [sizes.get(dim) if isinstance(dim, str) else dim for dim in shape]
    if any(count is None for count in counts):
        return otherwise
    return math.prod(count or 0 for count in counts) * graph.dtype(tensor).itemsize


__all__ = ["fitted", "peak"]
