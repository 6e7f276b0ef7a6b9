"""Merge what follows a layer with weights, number by number, into the layer.

Relevance rules, RevealCancel and pattern methods look at a layer's weights and bias. A bias that
an exporter adds afterwards, a BatchNormalization or a factor for each channel are part of the
layer before them: conv → norm is one convolution, MatMul → Add one dense layer. They may also
follow a Transpose or a Reshape of the layer's output, as in layouts with the channels last, or be
added behind the sum that the layer is a term of: (h + W x) + b is h + (W x + b). The
model's own nodes stay as they are; the merged weights are operators on constants, which ONNX
Runtime folds.

Precondition: scope and clusters. Postcondition: ``job.clusters`` maps a merged layer's output to a
region that stands for the layer with its merged weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, operands, static
from onnx_attrib.job import Cluster, Job
from onnx_attrib.passes.sums import Sum, path_of, spelled, standing
from onnx_attrib.rules import Bilinear, Site, active_inputs
from onnx_attrib.rules.composite import batch_factor

_PASSED = frozenset({"Identity", "Dropout"})
_SLOTLESS = frozenset({"MatMul", "Einsum"})
"""Layers whose operator takes no bias: any constant that is added is one."""
_MOVES = frozenset("Identity Dropout Transpose Reshape Flatten Squeeze Unsqueeze".split())


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


Merged = tuple[Affine, Tensor, list[Node], "_Late"]
"""A layer, its output, its nodes, and what is behind."""


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
    merged: dict[str, Merged] = {}
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
        merged[late.end.name] = (layer, end, nodes, late)
    if job.method.sums:
        job.clusters.update(standing(path_of(job), job.clusters))
        for one in spelled(path_of(job), job.clusters):
            _take_constants(job, one, merged)


def _take_constants(job: Job, one: Sum, merged: Mapping[str, Merged]) -> None:
    """Give a sum's constants to the layer among its terms, if there is one and it has room.

    An exporter may add a layer's bias behind the sum that the layer is a term of.
    """
    graph, places = job.graph, [i for i, t in enumerate(one.terms) if t.name in merged]
    if len(places) != 1 or not one.constants:
        return
    y = one.terms[places[0]]
    layer, end, nodes, late = merged[y.name]
    late = replace(late, steps=[*late.steps])
    for constant, negative in one.constants:
        if not _fits(graph, constant, y):
            return
        if layer.node.op in _SLOTLESS and end is y:
            term = graph.op.Neg(constant) if negative else constant
            late.term = _total(graph, late.term, term)
        elif (vector := _vector(graph, late.channels, y, constant)) is not None:
            vector = graph.op.Neg(vector) if negative else vector
            late.shift = _total(graph, late.shift, vector)
            late.steps.append(("Add", vector))
        else:
            return
    job.clusters[end.name] = _region(graph, layer, end, nodes, late)
    job.bearers[one.nodes[-1].outputs[0].name] = places[0]


def _total(graph: Graph, a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else graph.op.Add(a, b)


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
        vector = _per_channel(graph, (layer.channel,), y, node, other)
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
    input that varies. ``term``: of any shape, added last. ``end``: what the last of them gives,
    with ``channels`` as its axes of channels (several if heads were made of them; none: unknown).
    """

    end: Tensor
    channels: tuple[int, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    term: Tensor | None = None
    nodes: list[tuple[Node, int]] = field(default_factory=list)
    steps: list[tuple[str, Tensor]] = field(default_factory=list)

    def add(self, graph: Graph, node: Node, varying: int, vector: Tensor) -> None:
        """Take a sum or a product with one number for each channel in."""
        op, step = graph.op, vector
        if node.op in ("Add", "Sub"):
            self.shift = _total(graph, self.shift, vector if node.op == "Add" else op.Neg(vector))
        else:
            vector = vector if node.op == "Mul" else op.Reciprocal(vector)
            self.scale = vector if self.scale is None else op.Mul(self.scale, vector)
            self.shift = None if self.shift is None else op.Mul(self.shift, vector)
        self.nodes.append((node, varying))
        self.steps.append((node.op, step))

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
    graph = job.graph
    channels: tuple[int, ...] = () if channel < 0 else (channel,)
    found = _Late(y, channels)
    while len(following := readers.get(y.name, [])) == 1 and y.name != job.scope.output.name:
        node = following[0]
        if not channels or id(node) in inside:
            break
        if node.op in _MOVES:
            channels = _moved(graph, node, channels)
        elif node.op in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
            varying = 0 if node.inputs[0].name == y.name else 1
            vector = _per_channel(graph, channels, y, node, node.inputs[1 - varying])
            if vector is None or (node.op in ("Sub", "Div") and varying):
                break
            found.add(graph, node, varying, vector)
        else:
            break
        y = node.outputs[0]
        found.end, found.channels = y, channels
    return found


def _moved(graph: Graph, node: Node, channels: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of channels behind a node that moves entries; none if they are not to be told."""
    before, after = (graph.shape(t) or () for t in (node.inputs[0], node.outputs[0]))
    if node.op in ("Identity", "Dropout"):
        return channels
    if node.op == "Transpose":
        perm = list(graph.attr(node, "perm") or range(len(before))[::-1])
        return tuple(perm.index(axis) for axis in channels)
    # Rows of channels stay whole: they are the last axes, before and after.
    sizes = static(tuple(before[axis] for axis in channels))
    if sizes is None or channels != tuple(range(len(before) - len(channels), len(before))):
        return ()
    for count in range(1, len(after) + 1):
        last = static(after[-count:])
        if last is not None and math.prod(last) == math.prod(sizes):
            return tuple(range(len(after) - count, len(after)))
    return ()


def _per_channel(
    graph: Graph, channels: tuple[int, ...], y: Tensor, node: Node, other: Tensor
) -> Tensor | None:
    """A constant operand as one number for each channel, [channels] or [1]; None if it is not."""
    if graph.shape(node.outputs[0]) != graph.shape(y):
        return None
    return _vector(graph, channels, y, other)


def _vector(graph: Graph, channels: tuple[int, ...], y: Tensor, other: Tensor) -> Tensor | None:
    """A constant that fits ``y`` as [channels] or [1]; None if it is not of the channels alone."""
    value, shape = graph.value(other), graph.shape(y)
    if value is None or shape is None or value.ndim > len(shape):
        return None
    value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if any(size != 1 for axis, size in enumerate(value.shape) if axis not in channels):
        return None
    if len(channels) == 1 or value.size == 1:
        return graph.op.Reshape(other, [-1])
    sizes = static(tuple(shape[axis] for axis in channels))
    if sizes is None:
        return None
    alone = value.transpose(*channels, *(k for k in range(value.ndim) if k not in channels))
    heads = alone.reshape(alone.shape[: len(channels)])
    return graph.constant(np.broadcast_to(heads, sizes).reshape(-1))


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
    steps = [(op, graph.op.Reshape(vector, spread)) for op, vector in late.steps]
    if late.scale is not None:
        layer = _times(graph, layer, late.scale)
    if late.shift is not None:
        layer = _plus(graph, layer, late.shift)
    if late.term is not None:
        layer = _plus(graph, layer, late.term)
        steps.append(("Add", late.term))
    attrs = {k: v for k, v in layer.node.attrs.items() if k not in ("alpha", "beta")}
    name = layer.node.name or layer.node.outputs[0].name
    stand_in = gs.Node(layer.node.op, name, attrs)
    root, more = nodes[0].inputs[0], [] if layer.bias is None else [layer.bias]
    return Cluster(root, end, nodes, stand_in, [layer.weight, *more], tuple(steps))


__all__ = ["Affine", "layer_at", "merge"]
