"""Find regions of elementwise operators with one variable input.

Such a region (x·σ(x), an exponential unit spelled with Where) is one nonlinearity f of its input:
its difference quotient is Δf/Δx as a whole, so the spelling of an activation does not change the
attribution. Regions are found where paths meet again: from a node with several varying inputs back
to the nearest single tensor that all of them are computed from.

Precondition: scope. Postcondition: ``job.clusters`` maps a region's last output to the region.
"""

from __future__ import annotations

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Cluster, Job
from onnx_attrib.rules.broadcast import same_shape

# Elementwise operators that are not of the Elementwise class because of their other operands.
_POINTWISE = frozenset(
    """
    Add Sub Mul Div Neg Sum Mean Max Min Pow Where Identity Cast Dropout PRelu Clip Mod
    Greater GreaterOrEqual Less LessOrEqual Equal And Or Xor Not IsNaN IsInf Sign Floor Ceil Round
    """.split()
)
_LARGEST = 64


def cluster(job: Job) -> None:
    """Collect clusters for methods that treat them as one nonlinearity."""
    if not job.method.clusters:
        return
    varying = set(job.scope.names)
    varying |= {t.name for node in job.scope.dependent for t in node.outputs}
    order = {t.name: i for i, node in enumerate(job.scope.dependent) for t in node.outputs}
    for node in job.scope.nodes:
        operands = [t for t in node.inputs if t.name in varying]
        if len(operands) < 2 or not _pointwise(node):
            continue
        found = _region(job, node, varying, order)
        if found is not None:
            job.clusters[found.output.name] = found


def _region(job: Job, last: Node, varying: set[str], order: dict[str, int]) -> Cluster | None:
    graph, output = job.graph, last.outputs[0]
    inner: dict[int, Node] = {}
    frontier: dict[str, Tensor] = {}
    node = last
    while len(inner) < _LARGEST:
        inner[order[node.outputs[0].name]] = node
        for tensor in node.inputs:
            if tensor.name in varying:
                frontier[tensor.name] = tensor
        if len(frontier) == 1:
            root = next(iter(frontier.values()))
            if not same_shape(graph, root, output) or root.name not in job.scope.active:
                return None
            nodes = [inner[i] for i in sorted(inner)]
            return Cluster(root, output, nodes, piecewise=_piecewise(nodes, varying))
        # Open the newest tensor: everything older may still turn out to be the common root.
        newest = max(frontier, key=lambda name: order.get(name, -1))
        if newest not in order:
            return None
        node = job.scope.dependent[order[newest]]
        if not _pointwise(node) or not _keeps_shape(graph, node, output):
            return None
        del frontier[newest]
    return None


def _piecewise(nodes: list[Node], varying: set[str]) -> bool:
    """Whether a region is piecewise linear: no smooth function, no product of varying tensors."""
    for node in nodes:
        indices = tuple(i for i, t in enumerate(node.inputs) if t.name in varying)
        row = rules.lookup(node.op, node.domain, indices)
        if isinstance(row, rules.Elementwise) and not row.piecewise:
            return False
        if isinstance(row, rules.Composite | rules.Bilinear) and len(indices) > 1:
            return False
    return True


def _pointwise(node: Node) -> bool:
    if node.domain:
        return False
    row = rules.lookup(node.op, node.domain, (0,))
    return node.op in _POINTWISE or isinstance(row, rules.Elementwise)


def _keeps_shape(graph: Graph, node: Node, output: Tensor) -> bool:
    return graph.shape(node.outputs[0]) == graph.shape(output)
