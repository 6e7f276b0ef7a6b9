"""Find where a model is linear in what is attributed: its opening, which a mean over draws commutes
with.

A multiplier m of the opening's end gives Wᵀm at the input, and the mean of Wᵀm over draws is Wᵀ of
the mean: the first layer's transposed map runs once, not for every draw (of ResNet-18's gradient at
64², batch 8, it is 3 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, operands
from onnx_attrib.job import Job
from onnx_attrib.methods.base import vjp
from onnx_attrib.passes.differentiate import active_inputs
from onnx_attrib.rules import Bilinear, Linear

_MOST = 8
"""How many times the entries of the inputs the ends may have: these are averaged instead."""


@dataclass(frozen=True)
class Opening:
    """``nodes``: sorted, linear in the attributed tensors, by what no draw changes; ``ends``: the
    tensors that the others, ``behind``, read of them."""

    nodes: list[Node]
    ends: list[Tensor]
    behind: list[Node]


def opening(job: Job) -> Opening | None:
    """The opening, if the method takes it as it is and it has a layer that mixes entries."""
    graph, scope, table = job.graph, job.scope, job.table
    if table.get(Linear) is not vjp or table.get(Bilinear) is not vjp:
        return None
    varying = _varying(job)
    regions = {t.name for c in job.clusters.values() for node in c.nodes for t in node.outputs}
    regions |= set(job.clusters)
    reached = {t.name: t for t in scope.inputs}
    nodes, behind, mixes = [], [], False
    for node in scope.nodes:
        active = active_inputs(node, scope.active)
        rule = rules.lookup(node.op, node.domain, active)
        fits = isinstance(rule, Linear) or (isinstance(rule, Bilinear) and len(active) == 1)
        read = operands(node)
        held = all(t.name not in varying for i, t in enumerate(read) if i not in active)
        taken = all(read[i].name in reached for i in active)
        if fits and held and taken and not any(t.name in regions for t in node.outputs):
            nodes.append(node)
            reached.update((t.name, t) for t in node.outputs if t.name)
            mixes |= getattr(rule, "flow", "") == "mixes"
        else:
            behind.append(node)
    wanted = {operands(n)[i].name for n in behind for i in active_inputs(n, scope.active)}
    ends = [t for name, t in reached.items() if name in wanted | {scope.output.name}]
    made = {t.name for node in behind for t in node.outputs}
    if not mixes or made & set(scope.names) or not _is_small(graph, ends, scope.inputs):
        return None
    return Opening(nodes, ends, behind)


def _varying(job: Job) -> set[str]:
    """Names of the tensors whose entries, not only sizes, depend on the attributed ones."""
    found = set(job.scope.names)
    for node in job.scope.dependent:
        sizes = node.op in ("Shape", "Size") and not node.domain
        if not sizes and any(t.name in found for t in job.graph.uses(node)):
            found.update(t.name for t in node.outputs if t.name)
    return found


def _is_small(graph: Graph, ends: list[Tensor], inputs: list[Tensor]) -> bool:
    sizes = [[_entries(graph, t) for t in some] for some in (ends, inputs)]
    return all(map(all, sizes)) and sum(sizes[0]) <= _MOST * sum(sizes[1])


def _entries(graph: Graph, tensor: Tensor) -> int:
    """Entries of a tensor for each of the samples; 0 where that is not known."""
    shape = graph.shape(tensor) or (None,)
    if None in shape or sum(isinstance(d, str) for d in shape) > 1:
        return 0
    return prod(d for d in shape if isinstance(d, int))


__all__ = ["Opening", "opening"]
