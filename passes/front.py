"""Find where the model begins: the tensors that no layer with weights precedes.

Relevance rules treat the first layers in a way of their own: their input has a range that is
known, and need not be positive. First are the layers whose data no other layer precedes, whatever
is attributed; in a network with branches there may be several.

Precondition: scope and merged layers. Postcondition: ``job.front``, and what the method has to say
about the layers (a rule for one that is not there) in ``job.notes``.
"""

from __future__ import annotations

from onnx import GraphProto

from onnx_attrib import rules
from onnx_attrib.ir import Node, bodies, operands, subgraphs
from onnx_attrib.job import Front, Job
from onnx_attrib.passes.differentiate import active_inputs
from onnx_attrib.passes.reference import outermost
from onnx_attrib.rules import Bilinear, Linear, Rule, Structured


def front(job: Job) -> None:
    """Collect what no layer precedes, for methods that look at weights."""
    if not job.method.merges:
        return
    graph = job.graph
    ahead, behind = {t.name for t in graph.inputs}, set[str]()
    scaled = set(ahead)
    nodes = []
    for node in graph.prune(graph.in_order(graph.nodes), [job.scope.output, *job.scope.inputs]):
        read = {t.name for t in graph.uses(node)}
        outputs = {t.name for t in node.outputs if t.name}
        if read & behind or (read & ahead and _has_layer(node, ahead)):
            behind |= outputs
        elif read & ahead:
            ahead |= outputs
            nodes.append(node)
            if _scales(node, ahead, scaled):
                scaled |= outputs
    job.front = Front(outermost(job), nodes, ahead, scaled)
    if job.method.review is not None:
        job.notes += job.method.review(job.options, layer_names(job))


def layer_names(job: Job) -> list[str]:
    """The names of the layers with weights on the way."""
    scope, names = job.scope, []
    for node in scope.nodes:
        active = active_inputs(node, scope.active)
        if _is_layer(rules.lookup(node.op, node.domain, active), active):
            names.append(node.name or node.outputs[0].name)
    return names


def _scales(node: Node, varying: set[str], scaled: set[str]) -> bool:
    """Whether a node moves, scales or shifts the entries of one tensor that is an input still."""
    active = tuple(i for i, t in enumerate(operands(node)) if t.name in varying)
    rule = rules.lookup(node.op, node.domain, active)
    plain = isinstance(rule, Linear | Bilinear) and (rule.flow != "mixes" or rule.broadcasts)
    if isinstance(rule, Bilinear) and rule.layer:
        return False
    return plain and len(active) == 1 and operands(node)[active[0]].name in scaled


def _has_layer(node: Node, varying: set[str]) -> bool:
    """Whether a node is a layer with weights, or runs some."""
    if any(_body_has_layer(body) for body in bodies(node)):
        return True
    active = tuple(i for i, t in enumerate(operands(node)) if t.name in varying)
    return _is_layer(rules.lookup(node.op, node.domain, active), active)


def _body_has_layer(body: GraphProto) -> bool:
    for node in body.node:
        if _is_layer(rules.lookup(node.op_type, node.domain, (0,)), (0,)):
            return True
        if any(_body_has_layer(inner) for inner in subgraphs(node)):
            return True
    return False


def _is_layer(rule: Rule | None, active: tuple[int, ...]) -> bool:
    if isinstance(rule, Structured):
        # A recurrent operator; control flow is what its bodies are.
        return not rule.transparent
    return isinstance(rule, Bilinear) and bool(rule.layer) and len({0, 1} & set(active)) == 1


__all__ = ["front", "layer_names"]
