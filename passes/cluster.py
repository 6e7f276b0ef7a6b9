"""Find regions of elementwise operators with one variable input.

Such a region (x·σ(x), an exponential unit spelled with Where) is one nonlinearity f of its input:
its difference quotient is Δf/Δx as a whole, so the spelling of an activation does not change the
attribution. Regions are found where paths meet again: from a node with several varying inputs back
to the nearest single tensor that all of them are computed from.

Methods that take f(z)/z (relevance) ask for chains too: a nonlinearity of a nonlinearity, with at
most scalar arithmetic between them (log(1 + e^z)), is one. A constant for each channel between them
is a layer of its own and ends the chain, and so does a sum before the first nonlinearity, which may
be a layer's bias.

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
_ARITHMETIC = frozenset("Add Sub Mul Div Neg Identity".split())
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


    if job.method.clusters == "chains":
        _link(job, varying)


def _link(job: Job, varying: set[str]) -> None:
    """Extend every nonlinearity back over the nonlinearities that feed it."""
    units: dict[str, Cluster] = {}
    for node in job.scope.nodes:
        output = node.outputs[0]
        unit = job.clusters.get(output.name) or _single(node, varying)
        if unit is None:
            continue
        start, between = _before_scalars(job, unit.root, varying)
        earlier = units.get(start.name)
        if earlier is None:
            # Arithmetic before the first nonlinearity: only factors, for a sum may be a bias.
            factors = _last_factors(between)
            between = between[len(between) - factors :]
            start = next((t for n in between[:1] for t in n.inputs if t.name in varying), unit.root)
            earlier = Cluster(start, start, [])
        if same_shape(job.graph, start, output) and (earlier.nodes or between):
            nodes = [*earlier.nodes, *between, *unit.nodes]
            unit = Cluster(earlier.root, output, nodes)
            job.clusters[output.name] = unit
        units[output.name] = unit


def _last_factors(nodes: list[Node]) -> int:
    """How many nodes at the end only multiply."""
    count = 0
    while count < len(nodes) and nodes[-1 - count].op not in ("Add", "Sub"):
        count += 1
    return count


def _single(node: Node, varying: set[str]) -> Cluster | None:
    indices = tuple(i for i, t in enumerate(node.inputs) if t.name in varying)
    row = rules.lookup(node.op, node.domain, indices)
    if isinstance(row, rules.Elementwise) and len(indices) == 1:
        return Cluster(node.inputs[indices[0]], node.outputs[0], [node])
    return None


def _before_scalars(job: Job, tensor: Tensor, varying: set[str]) -> tuple[Tensor, list[Node]]:
    """The tensor before arithmetic with single numbers, and that arithmetic."""
    passed: list[Node] = []
    while tensor.inputs:
        node = tensor.inputs[0]
        others = [t for t in node.inputs if t.name not in varying]
        values = [job.graph.value(t) for t in others]
        scalar = all(value is not None and value.size == 1 for value in values)
        if node.op not in _ARITHMETIC or not scalar or len(node.inputs) - len(others) != 1:
            break
        if node.op == "Div" and node.inputs[0].name not in varying:
            break
        passed.insert(0, node)
        tensor = next(t for t in node.inputs if t.name in varying)
    return tensor, passed


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
