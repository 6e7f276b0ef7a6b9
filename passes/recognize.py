"""Find softmaxes, and layer normalisations, that an exporter spelled out.

exp(z − max z) / Σ exp(z − max z), with or without the shift, is Softmax(z), and its logarithm
LogSoftmax(z). As single operators they are one map from z, whatever the shift: taken apart, the
shift would take part in a difference, and the spelling would change the attribution. What a layer
normalisation is: :mod:`onnx_attrib.passes.standardize`.

Precondition: scope. Postcondition: ``job.clusters`` maps the region's last output to a region that
stands for the operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Cluster, Job
from onnx_attrib.passes.standardize import standardizations

# Between a reduction and its use: operators that only restore or broadcast the reduced axis.
_RESTORING = frozenset({"Identity", "Unsqueeze", "Reshape", "Expand", "Squeeze"})


def recognize(job: Job) -> None:
    """Collect them for methods that treat regions as one; normalisations for relevance alone.

    To the others x · a + (β − μ · a) is what (x − μ) · a + β is, for the rules are linear in both.
    """
    graph, scope = job.graph, job.scope
    if job.method.clusters:
        job.clusters.update(spelled(graph, scope.nodes, scope.active))
    if job.method.clusters == "chains":
        found = standardizations(graph, scope.nodes, scope.dependent, scope.active)
        job.clusters.update(found)


def spelled(graph: Graph, nodes: Iterable[Node], active: set[str]) -> dict[str, Cluster]:
    """The softmaxes of an active tensor among ``nodes``, by their last output."""
    regions = (_softmax(graph, node) or _log_softmax(graph, node) for node in nodes)
    return {r.output.name: r for r in regions if r is not None and r.root.name in active}


def _softmax(graph: Graph, last: Node) -> Cluster | None:
    """exp(u) / Σ exp(u), or exp(u) times the reciprocal of the sum."""
    if last.op == "Div":
        pairs = [tuple(last.inputs)]
    elif last.op == "Mul":
        pairs = [(a, b[0]) for a, c in _both_ways(last.inputs) if (b := _made(c, "Reciprocal"))]
    else:
        return None
    for top, bottom in pairs:
        shifted = _made(top, "Exp")
        axis = _reduced(graph, bottom, "ReduceSum", top)
        if shifted and axis is not None:
            return _region(graph, "Softmax", axis, shifted[0], last.outputs[0])
    return None


def _log_softmax(graph: Graph, last: Node) -> Cluster | None:
    """u − log Σ exp(u)."""
    if last.op != "Sub":
        return None
    shifted, normalizer = last.inputs
    total = _made(_behind(normalizer), "Log")
    powers = _made(_behind(total[0]), "ReduceSum") if total else None
    logits = _made(powers[0], "Exp") if powers else None
    if not (total and powers and logits) or logits[0] != shifted:
        return None
    axis = _reduced(graph, total[0], "ReduceSum", powers[0])
    if axis is None:
        return None
    return _region(graph, "LogSoftmax", axis, shifted, last.outputs[0])


def _region(graph: Graph, op: str, axis: int, shifted: Tensor, output: Tensor) -> Cluster | None:
    """The region as ``op`` of the logits before a shift by their maximum, if there is one."""
    root = shifted
    difference = _made(shifted, "Sub")
    if difference and _reduced(graph, difference[1], "ReduceMax", difference[0]) == axis:
        root = difference[0]
    if graph.shape(root) != graph.shape(output):
        return None
    stand_in = gs.Node(op, output.name, attrs={"axis": axis})
    return Cluster(root, output, [], stand_in)


def _reduced(graph: Graph, tensor: Tensor, op: str, source: Tensor) -> int | None:
    """The axis, if ``tensor`` is ``source`` reduced over one axis and meets it by broadcasting."""
    shape = graph.shape(source)
    node = _producer(_behind(tensor))
    if node is None or node.op != op or node.inputs[0] != source or shape is None:
        return None
    axes = graph.value(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size != 1:
        return None
    axis = int(axes.reshape(())) % len(shape)
    met = graph.shape(tensor)
    wanted = (*shape[:axis], 1, *shape[axis + 1 :])
    return axis if met in (wanted, shape) else None


def _behind(tensor: Tensor) -> Tensor:
    """The tensor before operators that only restore a reduced axis."""
    node = _producer(tensor)
    while node is not None and node.op in _RESTORING:
        tensor = node.inputs[0]
        node = _producer(tensor)
    return tensor


def _made(tensor: Tensor, op: str) -> Sequence[Tensor] | None:
    """The inputs of the ``op`` that computes ``tensor``, or None if it is not one."""
    node = _producer(tensor)
    return node.inputs if node is not None and node.op == op and not node.domain else None


def _both_ways(pair: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(pair[0], pair[1]), (pair[1], pair[0])]


def _producer(tensor: Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None
