"""Tune the bodies of the Loops over groups like the graph around them.

ONNX Runtime's CPU provider lays out convolutions in blocks of channels only if their weights are
constants of the same graph, which those of a Loop's body are not; but what it folds there is:

- Conv(x, W) in a body, W constant → Conv(x, Concat(W))
  (integrated gradients of ResNet-18, 50 steps of batch 8: 163 → 121 times the forward pass).

Precondition: a finished, sorted graph. Postcondition: the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnx_attrib.ir import Graph, Node, Tensor, bodies
from onnx_attrib.job import Job
from onnx_attrib.passes.blocked import blocked
from onnx_attrib.passes.folded import folded
from onnx_attrib.passes.late import last
from onnx_attrib.passes.phases import phases
from onnx_attrib.passes.picked import picked
from onnx_attrib.passes.pooled import pooled
from onnx_attrib.passes.rewriting import constant, for_cpu, is_constant
from onnx_attrib.passes.simplify import simplify
from onnx_attrib.passes.winners import winners

GROUPS = "groups"
"""What the body of a Loop over groups is called."""
TUNING: tuple[Callable[[Job], None], ...] = (
    *(simplify, folded, pooled, picked),
    *(winners, phases, blocked),
)
"""What is applied to the whole graph and to each body."""
_LARGEST = 20_000
"""Nodes of a body up to which that is worth its time: about a second for 4,000."""


def within_loops(job: Job) -> None:
    """Tune each body, and take the weights of its convolutions in."""
    graph = job.graph
    constants, behind = constant(graph, graph.nodes), following(graph, graph.nodes, job.seeds)
    for node in graph.nodes[:]:
        if _is_ours(graph, node):
            with graph.within(node):
                tune(job, behind)
                if for_cpu(job):
                    _take_in(graph, constants)


def tune(job: Job, behind: Iterable[str]) -> None:
    """Rewrite what stands for the graph, if it is not too large, and put what depends on ``behind``
    last."""
    for apply in TUNING if len(job.graph.nodes) <= _LARGEST else ():
        apply(job)
    last(job.graph, set(behind))


def following(graph: Graph, nodes: Iterable[Node], sources: Iterable[Tensor]) -> set[str]:
    """The names of ``sources`` and of what ``nodes`` (sorted) make from them."""
    found = {t.name for t in sources}
    for node in nodes:
        if any(t.name in found for t in graph.uses(node)):
            found.update(t.name for t in node.outputs if t.name)
    return found


def _is_ours(graph: Graph, node: Node) -> bool:
    emitted = node.op == "Loop" and node.outputs[0].name not in graph.own
    return emitted and bodies(node)[0].name == GROUPS


def _take_in(graph: Graph, constants: set[str]) -> None:
    """Let convolutions read their weights from a node that ONNX Runtime folds where they are."""
    nodes, taken = graph.nodes[:], dict[str, Tensor]()
    graph.nodes.clear()
    for node in nodes:
        if node.op == "Conv" and not node.domain:
            for tensor in node.inputs[1:]:
                if tensor.name not in taken and is_constant(graph, tensor, constants):
                    taken[tensor.name] = graph.op.Concat(tensor, axis=0)
            graph.rewire(node, {t.name: taken[t.name] for t in node.inputs if t.name in taken})
        graph.place(node)


__all__ = ["GROUPS", "TUNING", "following", "tune", "within_loops"]
