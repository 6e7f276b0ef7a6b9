"""Merge what follows a layer with weights, number by number, into the layer.

Relevance rules, RevealCancel and pattern methods look at a layer's weights and bias. A bias that
an exporter adds afterwards, a BatchNormalization or a factor for each channel are part of the
layer before them: conv → norm is one convolution, MatMul → Add one dense layer. The model's own
nodes stay as they are; the merged weights are operators on constants, which ONNX Runtime folds.

Precondition: scope and clusters. Postcondition: ``job.clusters`` maps a merged layer's output to a
region that stands for the layer with its merged weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, operands
from onnx_attrib.job import Cluster, Job
from onnx_attrib.passes.differentiate import active_inputs
from onnx_attrib.rules import Bilinear, Site
from onnx_attrib.rules.composite import batch_factor

_PASSED = frozenset({"Identity", "Dropout"})


@dataclass(frozen=True)
class Affine:
    """A layer so far: y = weight · x + bias, by the operator and the attributes of ``node``.

    ``bias`` is [channels] or [1]. ``channel``: the axis of y that belongs to the weight's outputs;
    ``output``: the weight's axis that does (among those of one group, for ConvTranspose).
    """

    node: Node
    weight: Tensor
    bias: Tensor | None
    channel: int
    output: int
    groups: int = 1


def merge(job: Job) -> None:
    """Collect layers with what follows them, for methods that look at weights."""
    if not job.method.merges:
        return
    graph, scope = job.graph, job.scope
    inside = {id(node) for cluster in job.clusters.values() for node in cluster.nodes}
    readers: dict[str, list[Node]] = {}
    for node in scope.nodes:
        for i in active_inputs(node, scope.active):
            readers.setdefault(operands(node)[i].name, []).append(node)
    for node in scope.nodes:
        layer = layer_at(graph, node, active_inputs(node, scope.active))
        if layer is None:
            continue
        nodes, end = [node], node.outputs[0]
        while len(following := readers.get(end.name, [])) == 1 and end.name != scope.output.name:
            longer = None
            if id(following[0]) not in inside:
                longer = _extended(graph, layer, end, following[0])
            if longer is None:
                break
            layer, end = longer, following[0].outputs[0]
            nodes.append(following[0])
        if layer.weight is not node.inputs[1] or len(nodes) > 1:
            job.clusters[end.name] = _region(layer, end, nodes)


def layer_at(graph: Graph, node: Node, active: tuple[int, ...]) -> Affine | None:
    """A node with weights of which the first input is attributed, and no other."""
    rule = rules.lookup(node.op, node.domain, active)
    if active != (0,) or not isinstance(rule, Bilinear) or not rule.layer or node.op == "Einsum":
        return None
    weight, shape = node.inputs[1], graph.shape(node.inputs[1])
    rank = len(graph.shape(node.outputs[0]) or ())
    if shape is None or len(shape) < 2 or rank < 2:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if node.op == "Gemm":
        return _gemm(graph, node, weight, bias)
    if node.op == "MatMul":
        return Affine(node, weight, None, rank - 1, len(shape) - 1)
    if node.op == "ConvTranspose":
        return Affine(node, weight, bias, 1, 1, int(graph.attr(node, "group")))
    return Affine(node, weight, bias, 1, 0)


def _gemm(graph: Graph, node: Node, weight: Tensor, bias: Tensor | None) -> Affine | None:
    """α · A · B + β · C with the factors folded into B and C."""
    op, alpha, beta = graph.op, graph.attr(node, "alpha"), graph.attr(node, "beta")
    if bias is not None:
        shape = graph.shape(bias)
        if shape is None or any(size != 1 for size in shape[:-1]):
            return None
        bias = op.Reshape(bias if beta == 1 else op.Mul(bias, beta), [-1])
    weight = weight if alpha == 1 else op.Mul(weight, alpha)
    return Affine(node, weight, bias, 1, 0 if graph.attr(node, "transB") else 1)


def _extended(graph: Graph, layer: Affine, y: Tensor, node: Node) -> Affine | None:
    """The layer together with the node after it, or None if that is not part of it."""
    op = graph.op
    if node.op in _PASSED:
        return layer
    first = node.inputs[0].name == y.name
    if node.op == "BatchNormalization" and first and layer.channel == 1:
        site = Site(graph, node, tuple(node.inputs), tuple(node.outputs), (), (0,))
        factor = batch_factor(site)
        shift = op.Sub(site.x(2), op.Mul(site.x(3), factor))
        return _plus(graph, _times(graph, layer, factor), shift)
    if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    if node.op in ("Sub", "Div") and not first:
        return None
    vector = _per_channel(graph, layer, y, node, node.inputs[1 if first else 0])
    if vector is None:
        return None
    if node.op in ("Add", "Sub"):
        return _plus(graph, layer, vector if node.op == "Add" else op.Neg(vector))
    return _times(graph, layer, vector if node.op == "Mul" else op.Reciprocal(vector))


def _per_channel(
    graph: Graph, layer: Affine, y: Tensor, node: Node, other: Tensor
) -> Tensor | None:
    """A constant operand as one number for each channel, [channels] or [1]; None if it is not."""
    value, shape = graph.value(other), graph.shape(y)
    if value is None or shape is None or graph.shape(node.outputs[0]) != shape:
        return None
    place = layer.channel - (len(shape) - value.ndim)
    if any(size != 1 for axis, size in enumerate(value.shape) if axis != place):
        return None
    return graph.op.Reshape(other, [-1])


def _times(graph: Graph, layer: Affine, factor: Tensor) -> Affine:
    """The layer's outputs times ``factor``, [channels] or [1]."""
    op, weight, groups = graph.op, layer.weight, layer.groups
    shape = list(weight.shape)
    if groups > 1:
        # [C, M/g, …]: the rows of a group share its channels.
        apart = op.Reshape(weight, [groups, shape[0] // groups, *shape[1:]])
        channels = [groups, 1, shape[1]] if graph.shape(factor) != (1,) else [1, 1, 1]
        spread = op.Reshape(factor, [*channels, *[1] * (len(shape) - 2)])
        scaled = op.Reshape(op.Mul(apart, spread), shape)
    else:
        spread = op.Reshape(factor, [-1 if k == layer.output else 1 for k in range(len(shape))])
        scaled = op.Mul(weight, spread)
    bias = None if layer.bias is None else op.Mul(layer.bias, factor)
    return replace(layer, weight=scaled, bias=bias)


def _plus(graph: Graph, layer: Affine, shift: Tensor) -> Affine:
    """The layer's outputs plus ``shift``, [channels] or [1]."""
    op, bias = graph.op, layer.bias
    if bias is None and layer.node.op in ("Conv", "ConvTranspose"):
        # Their bias is one number for each channel, no less.
        channels = layer.weight.shape[layer.output] * layer.groups
        return replace(layer, bias=op.Expand(shift, [channels]))
    return replace(layer, bias=shift if bias is None else op.Add(bias, shift))


def _region(layer: Affine, end: Tensor, nodes: list[Node]) -> Cluster:
    attrs = {k: v for k, v in layer.node.attrs.items() if k not in ("alpha", "beta")}
    name = layer.node.name or layer.node.outputs[0].name
    stand_in = gs.Node(layer.node.op, name, attrs)
    root, more = nodes[0].inputs[0], [] if layer.bias is None else [layer.bias]
    return Cluster(root, end, nodes, stand_in, operands=[layer.weight, *more])


__all__ = ["Affine", "layer_at", "merge"]
