"""Merge what follows a layer with weights, number by number, into the layer.

Relevance rules, RevealCancel and pattern methods look at a layer's weights and bias. A bias that
an exporter adds afterwards, a BatchNormalization or a factor for each channel are part of the
layer before them: conv → norm is one convolution, MatMul → Add one dense layer. They may also
follow a Transpose or a Reshape of the layer's output, as in layouts with the channels last. The
model's own nodes stay as they are; the merged weights are operators on constants, which ONNX
Runtime folds.

Precondition: scope and clusters. Postcondition: ``job.clusters`` maps a merged layer's output to a
region that stands for the layer with its merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, operands
from onnx_attrib.job import Cluster, Job
from onnx_attrib.passes.differentiate import active_inputs
from onnx_attrib.rules import Bilinear, Site
from onnx_attrib.rules.composite import batch_factor

_PASSED = frozenset({"Identity", "Dropout"})
_SLOTLESS = frozenset({"MatMul", "Einsum"})
"""Layers whose operator takes no bias: any constant that is added is one."""
_MOVES = frozenset({"Identity", "Dropout", "Transpose", "Reshape"})


@dataclass(frozen=True)
class Affine:
    """A layer so far: y = weight · x + bias, by the operator and the attributes of ``node``.

    ``bias`` is [channels] or [1], or anything that fits y where the operator takes no bias.
    ``channel``: the axis of y that belongs to the weight's outputs; ``output``: the weight's axis
    that does (among those of one group, for ConvTranspose); Einsum may have several.
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
        late = _late(job, readers, layer.channel, end, inside)
        if layer.weight is not node.inputs[1] or len(nodes) > 1 or late.nodes:
            job.clusters[end.name] = _region(graph, layer, end, nodes, late)
            job.clusters.update(late.passed())


def layer_at(graph: Graph, node: Node, active: tuple[int, ...]) -> Affine | None:
    """A node with weights of which the first input is attributed, and no other."""
    rule = rules.lookup(node.op, node.domain, active)
    if active != (0,) or not isinstance(rule, Bilinear) or not rule.layer:
        return None
    if node.op == "Einsum":
        return Affine(node, node.inputs[1], None, -1, -1) if len(node.inputs) == 2 else None
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
    other = node.inputs[1 if first else 0]
    if node.op in ("Add", "Sub") and layer.node.op in _SLOTLESS:
        if not _fits(graph, other, y):
            return None
        return _plus(graph, layer, other if node.op == "Add" else op.Neg(other))
    vector = None
    if layer.node.op != "Einsum":
        vector = _per_channel(graph, layer.channel, y, node, other)
    if vector is None:
        return None
    if node.op in ("Add", "Sub"):
        return _plus(graph, layer, vector if node.op == "Add" else op.Neg(vector))
    return _times(graph, layer, vector if node.op == "Mul" else op.Reciprocal(vector))


def _fits(graph: Graph, other: Tensor, y: Tensor) -> bool:
    """Whether a constant can be added to ``y`` without making it larger."""
    value, shape = graph.value(other), graph.shape(y)
    if value is None or shape is None or value.ndim > len(shape):
        return False
    pairs = zip(value.shape[::-1], shape[::-1], strict=False)
    return all(size in (1, dim) for size, dim in pairs)


@dataclass
class _Late:
    """What belongs to a layer but comes after nodes that move its entries.

    y · ``scale`` + ``shift``, both [channels] or [1] (None: 1 and 0), by ``nodes``, each with its
    input that varies.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    nodes: list[tuple[Node, int]] = field(default_factory=list)

    def add(self, graph: Graph, node: Node, varying: int, vector: Tensor) -> None:
        """Take a sum or a product with one number for each channel in."""
        op = graph.op
        if node.op in ("Add", "Sub"):
            vector = vector if node.op == "Add" else op.Neg(vector)
            self.shift = vector if self.shift is None else op.Add(self.shift, vector)
        else:
            vector = vector if node.op == "Mul" else op.Reciprocal(vector)
            self.scale = vector if self.scale is None else op.Mul(self.scale, vector)
            self.shift = None if self.shift is None else op.Mul(self.shift, vector)
        self.nodes.append((node, varying))

    def passed(self) -> dict[str, Cluster]:
        """What is left of the nodes: nothing."""
        return {
            node.outputs[0].name: Cluster(
                node.inputs[i], node.outputs[0], [node], gs.Node("Identity", node.name)
            )
            for node, i in self.nodes
        }


def _late(
    job: Job, readers: Mapping[str, list[Node]], channel: int, y: Tensor, inside: set[int]
) -> _Late:
    """Sums and products by channel behind nodes that move the entries of ``y``."""
    graph, found = job.graph, _Late()
    while len(following := readers.get(y.name, [])) == 1 and y.name != job.scope.output.name:
        node, shape = following[0], graph.shape(y) or ()
        if channel < 0 or id(node) in inside:
            break
        if node.op in _MOVES:
            after = graph.shape(node.outputs[0]) or ()
            if node.op == "Transpose":
                perm = list(graph.attr(node, "perm") or range(len(shape))[::-1])
                channel = perm.index(channel)
            elif node.op == "Reshape":
                # Rows of channels stay whole.
                if channel != len(shape) - 1 or after[-1:] != shape[-1:] or shape[-1] is None:
                    break
                channel = len(after) - 1
        elif node.op in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
            varying = 0 if node.inputs[0].name == y.name else 1
            vector = _per_channel(graph, channel, y, node, node.inputs[1 - varying])
            if vector is None or (node.op in ("Sub", "Div") and varying):
                break
            found.add(graph, node, varying, vector)
        else:
            break
        y = node.outputs[0]
    return found


def _per_channel(graph: Graph, channel: int, y: Tensor, node: Node, other: Tensor) -> Tensor | None:
    """A constant operand as one number for each channel, [channels] or [1]; None if it is not."""
    value, shape = graph.value(other), graph.shape(y)
    if value is None or shape is None or graph.shape(node.outputs[0]) != shape:
        return None
    place = channel - (len(shape) - value.ndim)
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


def _region(graph: Graph, layer: Affine, end: Tensor, nodes: list[Node], late: _Late) -> Cluster:
    rank = len(graph.shape(end) or ())
    spread = [-1 if k == layer.channel else 1 for k in range(rank)]
    scale, shift = (v and graph.op.Reshape(v, spread) for v in (late.scale, late.shift))
    if late.scale is not None:
        layer = _times(graph, layer, late.scale)
    if late.shift is not None:
        layer = _plus(graph, layer, late.shift)
    attrs = {k: v for k, v in layer.node.attrs.items() if k not in ("alpha", "beta")}
    name = layer.node.name or layer.node.outputs[0].name
    stand_in = gs.Node(layer.node.op, name, attrs)
    root, more = nodes[0].inputs[0], [] if layer.bias is None else [layer.bias]
    return Cluster(root, end, nodes, stand_in, [layer.weight, *more], (scale, shift))


__all__ = ["Affine", "layer_at", "merge"]
