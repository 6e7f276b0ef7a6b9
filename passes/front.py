"""Find where the model begins: the tensors that no layer with weights precedes.

Relevance rules treat the first layers in a way of their own: their input has a range that is
known, and need not be positive. First are the layers whose data no other layer precedes, whatever
is attributed; in a network with branches there may be several.

Precondition: scope and merged layers. Postcondition: ``job.front``, and what the method has to say
about the layers (a rule for one that is not there) in ``job.notes``.
"""

from __future__ import annotations

from onnx_attrib import rules
from onnx_attrib.ir import Node, operands
from onnx_attrib.job import Front, Job
from onnx_attrib.passes.differentiate import active_inputs
from onnx_attrib.passes.reference import outermost
from onnx_attrib.rules import Bilinear, Linear
from onnx_attrib.rules.affine import has_layer, is_layer


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
        varying = tuple(i for i, t in enumerate(operands(node)) if t.name in ahead)
        if read & behind or (varying and has_layer(node, varying)):
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
        if is_layer(rules.lookup(node.op, node.domain, active), active):
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


__all__ = ["front", "layer_names"]
