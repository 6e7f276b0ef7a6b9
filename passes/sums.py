"""Find sums that are spelled in several nodes, and factors behind sums and averages.

Relevance methods divide what arrives at a sum by the sum, stabilised. (h + W x) + b and
h + (W x + b) are one sum of h, W x and b, and shall be divided once; a sum that is divided by the
number of its terms is an average, and has the stabiliser of one. A BatchNormalization in several
nodes is none: relevance passes it.

Precondition: scope, clusters and merged layers. Postcondition: ``job.clusters`` maps the last
output of a sum in several nodes to a region that stands for one Sum, the output of a sum that
a factor follows to a region that knows the factor (``late``), and that of a BatchNormalization to
one that stands for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Tensor, operands
from onnx_attrib.job import Cluster, Job
from onnx_attrib.rules import Composite, Linear, active_inputs

Constants = list[tuple[Tensor, bool]]
"""Terms that do not vary, and whether they are subtracted."""


@dataclass
class Sum:
    """A sum in one node or several.

    ``terms``: what varies; ``within``: the constant that has been added to each before.
    """

    nodes: list[Node]
    terms: list[Tensor]
    within: list[Tensor | None]
    constants: Constants


@dataclass
class Path:
    """Sorted nodes on differentiable paths, and who reads what of these.

    ``kept``: names of tensors that are wanted themselves.
    """

    graph: Graph
    nodes: Sequence[Node]
    active: set[str]
    kept: Collection[str]
    readers: dict[str, list[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            for i in active_inputs(node, self.active):
                self.readers.setdefault(operands(node)[i].name, []).append(node)

    def follower(self, tensor: Tensor) -> Node | None:
        """The one node that reads a tensor, if nothing else wants it."""
        following = self.readers.get(tensor.name, [])
        return following[0] if len(following) == 1 and tensor.name not in self.kept else None


def sums(job: Job) -> None:
    """Collect sums for methods that divide by them."""
    if job.method.sums:
        job.clusters.update(found(path_of(job), job.clusters, job.bearers))


def path_of(job: Job) -> Path:
    """The paths of the model itself."""
    scope = job.scope
    return Path(job.graph, scope.nodes, scope.active, {scope.output.name, *scope.names})


def found(
    path: Path, clusters: Mapping[str, Cluster], bearers: Mapping[str, int] | None = None
) -> dict[str, Cluster]:
    """The regions by their last output, apart from what is in other ``clusters``.

    ``bearers``: which term takes the constants, by the sum's output.
    """
    lines = standing(path, clusters)
    clusters = {**clusters, **lines}
    regions = [_region(path.graph, one, bearers or {}) for one in spelled(path, clusters)]
    averages = [_average(path, node) for node in path.nodes if node.outputs[0].name not in clusters]
    made = {region.output.name: region for region in (*regions, *averages) if region is not None}
    return {**lines, **made}


def standing(path: Path, clusters: Mapping[str, Cluster]) -> dict[str, Cluster]:
    """BatchNormalizations that are spelled out, and that no layer has merged: relevance passes.

    x · s + t or (x − m) · s + t with a factor for each channel, but for what a normalisation by the
    data's own statistics gives: there these are its scale and its shift.
    """
    taken = {id(node) for cluster in clusters.values() for node in cluster.nodes}
    result: dict[str, Cluster] = {}
    for first in path.nodes:
        nodes, node = list[Node](), first
        while id(node) not in taken and node.outputs[0].name not in clusters:
            if not _fixed(path, node) or (node.op == "Add" and not nodes):
                break
            scaled = any(n.op in ("Mul", "Div") for n in nodes)
            if node.op in ("Add", "Sub") and nodes and not scaled:
                break
            nodes.append(node)
            following = path.follower(node.outputs[0])
            if (node.op in ("Add", "Sub") and scaled) or following is None:
                break
            node = following
        if not nodes or nodes[-1].op not in ("Add", "Sub") or len(nodes) < 2:
            continue
        i = active_inputs(first, path.active)[0]
        root, end = first.inputs[i], nodes[-1].outputs[0]
        if _own_statistics(path, root, clusters):
            continue
        taken |= {id(n) for n in nodes}
        result[end.name] = Cluster(root, end, nodes, gs.Node("Identity", first.name))
    return result


def _fixed(path: Path, node: Node) -> bool:
    """Whether a node scales or shifts one tensor by constants, the scale being one a channel."""
    indices, graph = active_inputs(node, path.active), path.graph
    if node.domain or node.op not in ("Add", "Sub", "Mul", "Div") or len(indices) != 1:
        return False
    value = graph.value(node.inputs[1 - indices[0]])
    if value is None or (node.op in ("Sub", "Div") and indices[0]):
        return False
    alike = graph.shape(node.inputs[indices[0]]) == graph.shape(node.outputs[0])
    return alike and (value.size > 1 or node.op in ("Add", "Sub"))


def _own_statistics(path: Path, tensor: Tensor, clusters: Mapping[str, Cluster]) -> bool:
    """Whether a tensor, its entries maybe moved, comes out of a normalisation."""
    while tensor.inputs and tensor.name not in path.kept:
        node = tensor.inputs[0]
        region = clusters.get(tensor.name)
        op = node.op if region is None or region.stand_in is None else region.stand_in.op
        indices = active_inputs(node, path.active)
        rule = rules.lookup(op, node.domain, indices[:1])
        if isinstance(rule, Composite):
            return True
        if op in ("Mul", "Div") and len(indices) == 2:
            return True
        if not isinstance(rule, Linear) or rule.flow != "moves":
            return False
        tensor = node.inputs[0]
    return False


def spelled(path: Path, clusters: Mapping[str, Cluster]) -> list[Sum]:
    """Sums of several varying terms that are in several nodes or have constants."""
    taken = {id(node) for cluster in clusters.values() for node in cluster.nodes}
    open_sums: dict[str, Sum] = {}
    for node in path.nodes:
        if id(node) in taken or node.outputs[0].name in clusters or not _adds(node, path.active):
            continue
        whole = Sum([], [], [], [])
        for i, tensor in enumerate(node.inputs):
            inner = None
            if path.follower(tensor) is node:
                inner = open_sums.pop(tensor.name, None)
            if inner is not None:
                whole.nodes += inner.nodes
                whole.terms += inner.terms
                whole.within += inner.within
                whole.constants += inner.constants
            elif tensor.name in path.active:
                whole.terms.append(tensor)
                whole.within.append(_constant_part(path, tensor, open_sums))
            else:
                whole.constants.append((tensor, node.op == "Sub" and i == 1))
        whole.nodes.append(node)
        open_sums[node.outputs[0].name] = whole
    several = [one for one in open_sums.values() if len(one.terms) > 1]
    return [one for one in several if len(one.nodes) > 1 or one.constants or any(one.within)]


def _constant_part(path: Path, part: Tensor, sums: Mapping[str, Sum]) -> Tensor | None:
    """The constant in a part of a sum with one term, as when biases of all gates are added once."""
    graph, node = path.graph, part.inputs[0] if part.inputs else None
    one = sums.get(node.inputs[0].name) if node is not None and node.inputs else None
    if node is None or one is None or len(one.terms) != 1 or not one.constants:
        return None
    shape, axes = graph.shape(node.inputs[0]), _cut(graph, node)
    if shape is None or not axes:
        return None
    total = [graph.op.Neg(t) if negative else t for t, negative in one.constants]
    constant = graph.op.Sum(*total)
    given = graph.shape(constant)
    if given is None or len(given) > len(shape):
        return None
    missing = len(shape) - len(given)
    if any(k < missing or given[k - missing] != shape[k] for k in (a % len(shape) for a in axes)):
        return None
    if missing:
        constant = graph.op.Unsqueeze(constant, list(range(missing)))
    count = len(node.outputs)
    made = graph.emit(node.op, constant, *node.inputs[1:], outputs=count, **node.attrs)
    found: Tensor = made if count == 1 else made[list(node.outputs).index(part)]
    return found


def _cut(graph: Graph, node: Node) -> list[int]:
    """The axes along which a node takes parts, if that is what it does."""
    if node.op == "Split":
        return [int(graph.attr(node, "axis"))]
    values = [graph.value(tensor) for tensor in node.inputs[1:4]]
    if node.op != "Slice" or len(values) < 3 or any(value is None for value in values):
        return []
    # An axis that is kept whole is none.
    whole = np.iinfo(np.int32).max
    ranges = zip(*(np.ravel(value).tolist() for value in values if value is not None), strict=True)
    return [axis for start, end, axis in ranges if start != 0 or end < whole]


def _adds(node: Node, active: set[str]) -> bool:
    """Whether a node adds varying terms, and adds or subtracts others."""
    if node.domain or node.op not in ("Add", "Sub", "Sum"):
        return False
    return node.op != "Sub" or active_inputs(node, active) == (0,)


def _region(graph: Graph, one: Sum, bearers: Mapping[str, int]) -> Cluster:
    op, end = graph.op, one.nodes[-1].outputs[0]
    fixed = [op.Neg(t) if negative else t for t, negative in one.constants]
    stand_in = gs.Node("Sum", one.nodes[-1].name)
    terms = [*one.terms[1:], *fixed]
    bearer = bearers.get(end.name)
    within = tuple(one.within)
    return Cluster(one.terms[0], end, one.nodes, stand_in, terms, bearer=bearer, within=within)


def _average(path: Path, node: Node) -> Cluster | None:
    """A sum or an average over axes or windows that numbers follow, as it knows them."""
    graph, end, factor = path.graph, node.outputs[0], 1.0
    rule = _linear(node, path.active)
    if rule is None or rule.flow != "mixes" or rule.broadcasts:
        return None
    while (following := path.follower(end)) is not None:
        number = _number(graph, following, path.active)
        moved = _linear(following, path.active)
        if number:
            factor *= number
        elif moved is None or moved.flow != "moves" or len(following.outputs) > 1:
            break
        end = following.outputs[0]
    if factor == 1 or not np.isfinite(factor):
        return None
    stand_in = gs.Node(node.op, node.name, dict(node.attrs))
    late = graph.constant(factor, graph.dtype(node.outputs[0]))
    root, others = node.inputs[0], list(node.inputs[1:])
    return Cluster(root, node.outputs[0], [node], stand_in, others, (("Mul", late),))


def _linear(node: Node, active: set[str]) -> Linear | None:
    indices = active_inputs(node, active)
    rule = rules.lookup(node.op, node.domain, indices) if indices == (0,) else None
    return rule if isinstance(rule, Linear) else None


def _number(graph: Graph, node: Node, active: set[str]) -> float:
    """The number that a node multiplies by; 0 if it does not."""
    if node.op not in ("Mul", "Div") or len(node.inputs) != 2:
        return 0.0
    (i, *more) = active_inputs(node, active)
    value = graph.value(node.inputs[1 - i])
    if more or value is None or value.size != 1 or (node.op == "Div" and i):
        return 0.0
    number = float(value.reshape(()))
    if node.op == "Mul":
        return number
    return 1 / number if number else 0.0


__all__ = ["Path", "Sum", "found", "path_of", "spelled", "standing", "sums"]
