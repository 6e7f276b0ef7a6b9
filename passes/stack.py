"""Many copies of the batch evaluated together, and loops over groups of them.

Methods that evaluate the model at many points stack some of them along the batch axis
(:class:`Stack`) and go over such groups one by one, adding up (:func:`accumulate`), so that
memory is bounded by one group. Copies are the slow axis: [copies · N, …]. A model whose batch
cannot be stacked (a fixed batch, or one mixed with other axes) is evaluated one copy at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_attrib import rules
from onnx_attrib.ir import Dim, Graph, Node, Tensor, Values, is_float
from onnx_attrib.job import Job
from onnx_attrib.passes.bodies import GROUPS
from onnx_attrib.passes.reference import outermost
from onnx_attrib.passes.samples import (
    batch_symbol,
    captured,
    counts_batch,
    fully_known,
    kept_apart,
)
from onnx_attrib.passes.simplify import share
from onnx_attrib.rules import Structured

Step = Callable[[Tensor], list[Tensor]]
"""From the number of the group, int64 [], to what it adds."""


def downstream(graph: Graph, nodes: Sequence[Node], sources: Sequence[Tensor]) -> list[Node]:
    """Those of ``nodes`` (sorted) that depend on ``sources``."""
    found, changing = [], {t.name for t in sources}
    for node in nodes:
        if any(t.name in changing for t in graph.uses(node)):
            found.append(node)
            changing.update(t.name for t in node.outputs if t.name)
    return found


def stackable(job: Job, sources: Sequence[Tensor] | None = None) -> str | None:
    """The batch symbol, if several copies of the batch can go through the region stacked.

    ``sources``: where the region starts; by default the outermost attributed tensors.
    """
    graph, sources = job.graph, outermost(job) if sources is None else sources
    region = downstream(graph, job.scope.dependent, sources)
    batch = batch_symbol(graph, sources)
    if batch is None or job.scope.batch != batch:
        return None
    samples = kept_apart(graph, sources, region, batch)
    if samples is None or samples.merged:
        return None
    outside = captured(graph, sources, region)
    known = all(fully_known(graph, tensor) for tensor in outside)
    return batch if known and not counts_batch(graph, outside, batch) else None


def stacked_symbol(batch: str) -> str:
    """What the batch axis of a stack is called."""
    return f"{batch}_stacked"


def row_symbol(batch: str) -> str:
    """What the axis of the rows of a background is called."""
    return f"{batch}_rows"


@dataclass(frozen=True)
class Stack:
    """``size`` copies of the batch; a single one where ``batch`` is None.

    ``batch``: the symbol of the batch axis, as :func:`stackable` finds it.
    ``size``: a number, or int64 [1] if it is known at run time only.
    """

    graph: Graph
    batch: str | None
    size: int | Tensor

    @property
    def dims(self) -> dict[str, Dim]:
        """How dimensions are renamed in the stack."""
        return {} if self.batch is None else {self.batch: self._symbol}

    @property
    def _symbol(self) -> str:
        return stacked_symbol(str(self.batch))

    @property
    def count(self) -> Tensor:
        """The size as int64 [1]."""
        if isinstance(self.size, int):
            return self.graph.constant([self.size], np.int64)
        return self.size

    def axis(self, tensor: Tensor) -> int | None:
        """The axis of the batch, before or after stacking; None where there is none."""
        shape = self.graph.shape(tensor) or ()
        places = [i for i, dim in enumerate(shape) if dim in (self.batch, self._symbol)]
        return places[0] if self.batch is not None and places else None

    def tiled(self, tensor: Tensor) -> Tensor:
        """Copies of a tensor along its batch axis; itself if it has none."""
        axis, shape = self.axis(tensor), self.graph.shape(tensor) or ()
        if axis is None:
            return tensor
        if isinstance(self.size, int):
            repeats: list[int] | Tensor = [self.size if i == axis else 1 for i in range(len(shape))]
        else:
            ones = [self.graph.constant([1], np.int64)] * len(shape)
            ones[axis] = self.size
            repeats = self.graph.op.Concat(*ones, axis=0)
        result = self.graph.op.Tile(tensor, repeats)
        result.shape = [self._symbol if i == axis else dim for i, dim in enumerate(shape)]
        return result

    def merged(self, tensor: Tensor, like: Tensor) -> Tensor:
        """[size, N, …] → [size · N, …], for a tensor ``like`` that leads with the batch."""
        op, shape = self.graph.op, self.graph.shape(like) or ()
        if self.batch is None:
            result = op.Reshape(tensor, op.Shape(like))
            result.shape = list(shape)
            return result
        result = op.Reshape(tensor, op.Concat([-1], op.Shape(like, start=1), axis=0))
        result.shape = [self._symbol, *shape[1:]]
        return result

    def split(self, tensor: Tensor) -> Tensor:
        """[…, size · N, …] → [size, the entries of one copy], the batch in front of each."""
        op, axis = self.graph.op, self.axis(tensor)
        if axis:
            order = [axis, *(k for k in range(len(tensor.shape)) if k != axis)]
            tensor = op.Transpose(tensor, perm=order)
        return op.Reshape(tensor, op.Concat(self.count, [-1], axis=0))

    def joined(self, flat: Tensor, like: Tensor) -> Tensor:
        """Entries of one copy, as :meth:`split` orders them, in the shape of ``like``."""
        op, axis, shape = self.graph.op, self.axis(like), list(like.shape)
        if not axis:
            result = op.Reshape(flat, op.Shape(like))
        else:
            order = [axis, *(k for k in range(len(shape)) if k != axis)]
            back = [order.index(k) for k in range(len(shape))]
            size = op.Gather(op.Shape(like), order, axis=0)
            result = op.Transpose(op.Reshape(flat, size), perm=back)
        result.shape = shape
        return result

    def apart(self, tensor: Tensor) -> Tensor:
        """[size · N, …] → [size, N, …]."""
        op = self.graph.op
        return op.Reshape(tensor, op.Concat(self.count, [-1], op.Shape(tensor, start=1), axis=0))

    def everywhere(self, nodes: Sequence[Node], tensors: Iterable[Tensor], at: Values) -> Values:
        """The values ``at`` one copy, in every copy: copied, not computed again.

        ``tensors``: what ``nodes`` (sorted) start from or read from outside. Only what counts or
        picks (shapes, indices) is evaluated for the stack, and what is not :func:`copyable`.
        """
        if self.batch is None:
            return at
        placed = {
            t.name: self.tiled(at(t))
            for t in (*tensors, *copyable(nodes))
            if self.axis(at(t)) is not None
        }
        return self.graph.replicate(nodes, placed, self.dims)


def copyable(nodes: Sequence[Node]) -> list[Tensor]:
    """Outputs of ``nodes`` that need not be computed again where their values are known.

    Those of a structured operator do: its rule asks for more than the outputs that it has.
    """
    plain = (n for n in nodes if not isinstance(rules.lookup(n.op, n.domain, ()), Structured))
    return [t for node in plain for t in node.outputs if t.name and is_float(t.dtype)]


def accumulate(
    graph: Graph, groups: int | Tensor, start: Sequence[Tensor], step: Step
) -> list[Tensor]:
    """Σ step(g) over the groups g = 0, 1, …, in a Loop; just step(0) if there is one group.

    ``start``: zeros of the types and shapes that ``step`` returns. ``groups``: a number, or int64
    []. What a step computes that does not depend on g is computed once.
    """
    if isinstance(groups, int) and groups == 1:
        return step(graph.constant(0, np.int64))

    def adding(number: Tensor, carried: list[Tensor]) -> list[Tensor]:
        return [graph.op.Add(a, b) for a, b in zip(carried, step(number), strict=True)]

    return loop(graph, groups, start, adding)


def loop(
    graph: Graph,
    count: int | Tensor,
    start: Sequence[Tensor],
    step: Callable[[Tensor, list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """The states after ``count`` steps, each from the step's number and the states before."""
    op = graph.op
    number = graph.variable(graph.fresh("attrib/iteration"), np.int64, ())
    go_on = graph.variable(graph.fresh("attrib/go_on"), np.bool_, ())
    carried = [
        graph.variable(graph.fresh("attrib/carried"), t.dtype, graph.shape(t)) for t in start
    ]
    with graph.collect() as nodes:
        results = [op.Identity(go_on), *step(number, carried)]
    nodes = share(graph, graph.in_order(nodes), {t.name for t in results})
    body = graph.subgraph(GROUPS, nodes, [number, go_on, *carried], results)
    trips = graph.constant(count, np.int64) if isinstance(count, int) else count
    ends = op.Loop(trips, None, *start, body=body, outputs=len(start))
    ends = list(ends) if isinstance(ends, tuple) else [ends]
    for end, tensor in zip(ends, start, strict=True):
        end.dtype, end.shape = tensor.dtype, tensor.shape
    return ends


def zeros(graph: Graph, tensor: Tensor) -> Tensor:
    """Zeros of a tensor's type and shape."""
    like = graph.op.ConstantOfShape(graph.op.Shape(tensor), value=np.zeros(1, graph.dtype(tensor)))
    like.shape = tensor.shape
    return like


__all__ = [
    "Stack",
    "Step",
    "accumulate",
    "copyable",
    "downstream",
    "loop",
    "row_symbol",
    "stackable",
    "stacked_symbol",
    "zeros",
]
