"""How many evaluations fit into a bound on memory.

The group of evaluations that a Loop goes over is emitted on trial and tuned as it will be, and the
bytes that its tensors take at once are counted: each from the node that makes it to the last one
that reads it, in the order in which ONNX Runtime executes them; what the Loop reads from outside
and the sums that it hands on all the time; views of other tensors and constants not at all. To that
comes what a kernel may need beside: a copy of its largest operand in another layout, and what a
convolution unfolds. The largest size within the bound is looked for by trial; the forward pass
before the Loop, which keeps nothing, takes less than one evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, floor, prod

import numpy as np

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import Dim, Graph, Node, Tensor
from onnx_attrib.job import Job
from onnx_attrib.passes.bodies import following, tune
from onnx_attrib.passes.rewriting import constant
from onnx_attrib.passes.simplify import share
from onnx_attrib.passes.stack import Step, row_symbol, stacked_symbol

_MIB = 2**20
_PROBE = 4
_BESIDE = 3 * _MIB // 2
"""What a run takes for itself, and what small tensors leave unused between them."""
_FUSED = frozenset({"Clip", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

Trial = Callable[[int], tuple[int, Step]]
"""From the size that is asked for to the size that a group then has, and its step."""


def fitted(job: Job, chunk: int, batch: str | None, trial: Trial) -> int:
    """The chunk of the method's options; if there is a bound on memory, the largest within it.

    ``batch``: the symbol of the axis that evaluations are stacked along, if they are. The job's
    options are told. Raises OptionError where one evaluation takes more than the bound, and for
    sizes that are missing or unknown.
    """
    bound = job.request.memory
    if bound is None:
        return chunk
    room = bound * _MIB
    one, step = trial(1)
    least, taken = _measured(job, batch, one, step)
    if least > room:
        raise OptionError(
            f"{job.method.name} takes about {ceil(least / _MIB)} MiB for one evaluation of "
            f"{_told(job)}, more than the {bound:g} MiB asked for"
        )
    if taken > room:
        note = (
            f"{job.method.name} takes {least / _MIB:.0f} to {taken / _MIB:.0f} MiB, as ONNX "
            f"Runtime orders it, for one evaluation of {_told(job)}; {bound:g} were asked for"
        )
        job.notes += [] if note in job.notes else [note]
    if batch is None:
        return chunk
    found = _largest(job, batch, trial, taken, room)
    options = {**job.options, "chunk": min(found, job.fitted or found)}
    job.fitted = options["chunk"]
    job.choice = replace(job.choice, options=options)
    return found


def _largest(job: Job, batch: str, trial: Trial, taken: int, room: float) -> int:
    """The largest size of a group that is within the bound, if one evaluation is ``taken``."""
    one, _ = trial(1)
    size, step = trial(_PROBE)
    if taken > room or size == one:
        return one
    _, more = _measured(job, batch, size, step)
    each = max((more - taken) / (size - one), 1.0)
    found, step = trial(max(one, floor(one + (room - taken) / each)))
    # Memory grows in proportion, but for what is largest only in small groups, or in large ones.
    while found > one and _measured(job, batch, found, step)[1] > room:
        found, step = trial(found - ceil(found / 16))
    return found


def _told(job: Job) -> str:
    """The sizes that the memory is reckoned for."""
    given = [f"{name}={size}" for name, size in job.request.dims.items()]
    return f"a batch with {', '.join(given)}" if given else "one sample"


def _measured(job: Job, batch: str | None, size: int, step: Step) -> tuple[int, int]:
    """The bytes of a group of so many evaluations, at least and at most."""
    graph = job.graph
    number = graph.variable(graph.fresh("attrib/iteration"), np.int64, ())
    with graph.collect() as nodes:
        ends = step(number)
    order = share(graph, graph.in_order(nodes), {t.name for t in ends})
    order = graph.prune(order, ends)
    symbol = job.scope.batch if batch is None else batch
    sizes = _sizes(job, symbol if isinstance(symbol, str) else "")
    if batch is not None:
        sizes[stacked_symbol(batch)], sizes[row_symbol(batch)] = size * sizes[batch], size
    # What does not depend on the step is made before the Loop, and stays.
    varying = following(graph, order, [number])
    inner = [node for node in order if any(t.name in varying for t in node.outputs)]
    outer = [node for node in order if not any(t.name in varying for t in node.outputs)]
    with graph.standing(inner, [number], ends):
        tune(job, following(graph, [*graph.nodes, *outer], job.seeds))
    return peak(graph, outer, inner, ends, sizes)


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
    outer: Sequence[Node],
    inner: Sequence[Node],
    ends: Sequence[Tensor],
    sizes: Mapping[str, int],
) -> tuple[int, int]:
    """The most bytes that are taken at once when a Loop runs ``inner`` (sorted), which adds up
    ``ends``, after ``outer`` (sorted), which does not depend on the step: at least and at most.

    That depends on whether convolutions add what they are added to. ``sizes``: of the symbols in
    shapes. A tensor of unknown shape counts as the largest that its node reads.
    """
    folded = constant(graph, [*graph.nodes, *outer, *inner])
    readers = Counter(t.name for node in inner for t in graph.uses(node))
    convolved = (node.outputs[0].name for node in inner if node.op == "Conv")
    held = _Held(graph, sizes, folded, {name for name in convolved if readers[name] == 1})
    for node in outer:
        held.know(node)
    own = {t.name for node in inner for t in node.outputs}
    given = {t.name for t in graph.inputs}
    outside = {
        held.base(t): t
        for node in inner
        for t in graph.uses(node)
        if t.name not in own | folded and graph.value(t) is None
    }
    stays = sum(held.size(t) for name, t in outside.items() if name not in given)
    # Zeros to start with, the sums so far, and those that come next.
    stays += 3 * sum(held.size(t) for t in ends)
    for node in inner:
        held.know(node)
    found = []
    for waiting in ({}, held.waiting(inner)):
        order = [
            node
            for node in executed(graph, inner, waiting)
            if not folded.issuperset(t.name for t in node.outputs)
        ]
        found.append(stays + _most(held, order, ends) + _BESIDE)
    return min(found), max(found)


def _most(held: _Held, order: Sequence[Node], ends: Sequence[Tensor]) -> int:
    """The most bytes of what nodes make that are taken at once, with what kernels need."""
    uses = held.graph.uses
    last = {held.base(t): place for place, node in enumerate(order) for t in uses(node)}
    last.update((held.base(t), len(order)) for t in ends)
    dying: dict[int, int] = {}
    live = most = 0
    for place, node in enumerate(order):
        for t in node.outputs:
            if t.name and held.base(t) == t.name:
                live += held.size(t)
                gone = last.get(t.name, place)
                dying[gone] = dying.get(gone, 0) + held.size(t)
        most = max(most, live + held.scratch(node))
        live -= dying.get(place, 0)
    return most


def executed(
    graph: Graph, nodes: Sequence[Node], waiting: Mapping[str, Sequence[Tensor]] | None = None
) -> list[Node]:
    """``nodes`` in the order in which ONNX Runtime executes them: from the last one backwards, and
    of what a node reads first what stands last.

    ``waiting``: what must be there beside its operands before a tensor is made, by its name.
    """
    places = {t.name: i for i, node in enumerate(nodes) for t in node.outputs if t.name}
    read = {t.name for node in nodes for t in graph.uses(node)}
    pending = [
        (i, False) for i, node in enumerate(nodes) if not any(t.name in read for t in node.outputs)
    ]
    seen, order = set[int](), list[Node]()
    while pending:
        i, done = pending.pop()
        if done:
            order.append(nodes[i])
        elif i not in seen:
            seen.add(i)
            pending.append((i, True))
            more = (waiting or {}).get(nodes[i].outputs[0].name, ())
            needs = {places[t.name] for t in (*graph.uses(nodes[i]), *more) if t.name in places}
            pending += [(k, False) for k in sorted(needs - seen)]
    return order


class _Held:
    """The bytes of tensors, and which of them are views of others.

    ``folded``: names of what is constant; ``fusing``: of what only an activation may read.
    """

    def __init__(
        self, graph: Graph, sizes: Mapping[str, int], folded: set[str], fusing: set[str]
    ) -> None:
        self.graph, self.sizes = graph, sizes
        self.folded, self.fusing = folded, fusing
        self._views: dict[str, str] = {}
        self._bytes: dict[str, int] = {}

    def know(self, node: Node) -> None:
        """Enter what a node makes, after what it reads."""
        largest = max((self.size(t) for t in self.graph.uses(node)), default=0)
        into = self._into(node)
        for t in node.outputs:
            if t.name in self.folded:
                continue
            if into is not None:
                self._views[t.name] = self.base(into)
            self._bytes[t.name] = _bytes(self.graph, t, self.sizes, largest)

    def _into(self, node: Node) -> Tensor | None:
        """What a node gives a view of, or writes its output into, if it does."""
        if node.op in _VIEWS:
            return next(iter(node.inputs), None)
        return self._fused(node) if node.op in _FUSED else None

    def _fused(self, node: Node) -> Tensor | None:
        """The convolution that applies an activation itself, or adds what is in blocks like it."""
        sums = node.op == "Add" and node.outputs[0].name in self.graph.stated
        if node.op in _FUSED or sums:
            return next((t for t in node.inputs if t.name in self.fusing), None)
        return None

    def waiting(self, nodes: Sequence[Node]) -> dict[str, list[Tensor]]:
        """What convolutions add, by the names of their outputs."""
        into = ((node, self._fused(node)) for node in nodes)
        return {t.name: [o for o in node.inputs if o is not t] for node, t in into if t is not None}

    def base(self, tensor: Tensor) -> str:
        """The name of the tensor that it is a view of, or its own."""
        return self._views.get(tensor.name, tensor.name)

    def size(self, tensor: Tensor) -> int:
        known = self._bytes.get(tensor.name)
        return _bytes(self.graph, tensor, self.sizes, 0) if known is None else known

    def scratch(self, node: Node) -> int:
        """What the kernel may need beside its outputs, at most.

        A copy of an operand in another layout; of convolutions, one sample unfolded.
        """
        if node.op in _VIEWS or not node.inputs:
            return 0
        varying = (t for t in self.graph.uses(node) if t.name in self._bytes)
        copied = max(map(self.size, varying), default=0)
        if node.op not in ("Conv", "ConvTranspose") or node.domain:
            return copied
        turned = node.op == "ConvTranspose"
        data = self.graph.shape(node.inputs[0] if turned else node.outputs[0]) or ()
        places, (kernels, *taps) = _product(data[2:]), self.graph.shape(node.inputs[1]) or (0,)
        if not turned and _product([kernels]) <= places:
            return copied  # unfolded in parts
        return max(copied, places * _product(taps) * self.graph.dtype(node.inputs[0]).itemsize)


def _product(sizes: Sequence[Dim]) -> int:
    return prod(size for size in sizes if isinstance(size, int))


def _bytes(graph: Graph, tensor: Tensor, sizes: Mapping[str, int], otherwise: int) -> int:
    shape = graph.shape(tensor)
    if shape is None or tensor.dtype is None:
        return otherwise
    counts = [sizes.get(dim) if isinstance(dim, str) else dim for dim in shape]
    if any(count is None for count in counts):
        return otherwise
    return prod(count or 0 for count in counts) * graph.dtype(tensor).itemsize


__all__ = ["fitted", "peak"]
