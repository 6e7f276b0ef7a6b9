"""Find regions of elementwise operators with one variable input.

Such a region (x·σ(x), an exponential unit spelled with Where) is one nonlinearity f of its input:
its difference quotient is Δf/Δx as a whole, so the spelling of an activation does not change the
attribution. Regions are found where paths meet again: from a node with several varying inputs back
to the nearest single tensor that all of them are computed from.

Methods that take f(z)/z (relevance) ask for chains too: a nonlinearity of a nonlinearity, with at
most scalar arithmetic between them (log(1 + e^z)), is one. A constant for each channel between them
is a layer of its own and ends the chain, and so does a sum before the first nonlinearity, which may
be a layer's bias.

For methods that change ReLUs only, a region is one or is none as a whole: Where(x > 0, x, 0),
(x + |x|) / 2 and Max(x, x/10) are. What a region is, its values at a few numbers tell.

Precondition: scope. Postcondition: ``job.clusters`` maps a region's last output to the region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_attrib import rules
from onnx_attrib.ir import OPSET, Graph, Node, Tensor
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
_INVERSE = frozenset({"Div", "Reciprocal"})
_SIZES = frozenset({"Shape", "Size"})
_LARGEST = 64
_RECTIFIERS = frozenset({"Relu", "LeakyRelu", "PRelu"})
_PROBES = np.array([-64, -9, -1, -0.25, -0.01, 0, 0.01, 0.25, 1, 9, 64])
_CLOSE = 5e-3


@dataclass
class Stretch:
    """Where clusters are looked for: a sorted part of a graph.

    ``nodes``: those on a differentiable path; ``dependent``: all whose values vary; ``active``:
    tensors that carry attribution; ``varying``: tensors that vary; ``found``: clusters by output.
    """

    graph: Graph
    nodes: Sequence[Node]
    dependent: Sequence[Node]
    active: set[str]
    varying: set[str]
    found: dict[str, Cluster] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.varying = set(self.varying)
        for node in self.dependent:
            # What is made of a tensor's sizes alone (zeros like it) is as good as a constant.
            if node.op not in _SIZES and any(t.name in self.varying for t in self.graph.uses(node)):
                self.varying |= {t.name for t in node.outputs}
        self.order = {t.name: i for i, n in enumerate(self.dependent) for t in n.outputs}


def cluster(job: Job) -> None:
    """Collect clusters for methods that treat them as one nonlinearity."""
    if job.method.clusters:
        scope = job.scope
        names = set(scope.names)
        stretch = Stretch(job.graph, scope.nodes, scope.dependent, scope.active, names)
        job.clusters.update(find(stretch, job.method.clusters))


def find(stretch: Stretch, kind: str) -> dict[str, Cluster]:
    """The clusters of a stretch by their last output; ``kind`` as for ``Method.clusters``."""
    for node in stretch.nodes:
        operands = [t for t in node.inputs if t.name in stretch.varying]
        if len(operands) < 2 or not _pointwise(node):
            continue
        found = _region(stretch, node)
        if found is not None:
            stretch.found[found.output.name] = found
    if kind == "chains":
        _link(stretch)
    if kind == "rectifiers":
        regions, stretch.found = stretch.found, {}
        for name, region in regions.items():
            rectifier = _rectifier(stretch.graph, region)
            # In x + ReLU(x), the ReLU is one; in x · Clip(x + 3, 0, 6), the Clip is none.
            if rectifier or not any(node.op in _RECTIFIERS for node in region.nodes):
                stretch.found[name] = replace(region, rectifier=rectifier)
    return stretch.found


def _rectifier(graph: Graph, region: Cluster) -> float:
    """The slope for positive z of a ReLU or its kin, 0 for other regions.

    It is straight from zero on, and falls behind below: never up again, nor above zero. A ReLU may
    have any slope (x + |x|), LeakyReLU, ELU and SELU have about 1: z + ReLU(z) is none.
    """
    rank = len(graph.shape(region.root) or ())
    z = _PROBES.astype(graph.dtype(region.root)).reshape(-1, *[1] * (rank - 1))
    try:
        y = _evaluated(graph, region, z)
    except Exception:
        # The reference evaluator may lack a type, and sizes along the batch need not fit.
        return 0.0
    if rank < 1 or y.shape[0] != z.size:
        return 0.0
    z, y = (array.astype(np.float64).reshape(z.size, -1) for array in (z, y))
    below, above = z[:, 0] < 0, z[:, 0] >= 0
    slope = float(y[-1, 0] / z[-1, 0])
    straight = np.abs(y[above] - slope * z[above]) <= _CLOSE * np.abs(slope * z[above])
    rising = np.diff(y[below], axis=0) >= -_CLOSE * np.abs(y[below][1:])
    behind = y[0] > 0.99 * slope * z[0]
    plain = slope > 0 and (abs(slope - 1) < 0.1 or not y[below].any())
    checks = (plain, straight, y[below] <= 0, rising, behind)
    return slope if all(bool(np.all(check)) for check in checks) else 0.0


def _evaluated(graph: Graph, region: Cluster, z: np.ndarray) -> np.ndarray:
    """The region's output for the values ``z`` of its root."""
    inside = {t.name for node in region.nodes for t in node.outputs} | {region.root.name}
    fixed = {
        t.name: value
        for node in region.nodes
        for t in node.inputs
        if t.name not in inside and (value := graph.value(t)) is not None
    }
    kind = helper.np_dtype_to_tensor_dtype(z.dtype)
    proto = helper.make_graph(
        [graph.proto(node) for node in region.nodes],
        "region",
        [helper.make_tensor_value_info(region.root.name, kind, z.shape)],
        [helper.make_tensor_value_info(region.output.name, kind, None)],
        [numpy_helper.from_array(value, name) for name, value in fixed.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)])
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, {region.root.name: z})[0])


def _link(stretch: Stretch) -> None:
    """Extend every nonlinearity back over the nonlinearities that feed it."""
    varying = stretch.varying
    units: dict[str, Cluster] = {}
    for node in stretch.nodes:
        output = node.outputs[0]
        unit = stretch.found.get(output.name) or _single(node, varying)
        if unit is None:
            continue
        start, between = _before_scalars(stretch, unit.root)
        earlier = units.get(start.name)
        if earlier is not None and earlier.nodes[-1].op == "Sqrt" and unit.nodes[0].op in _INVERSE:
            # x · (1/√z) and x / √z, as normalisations are spelled, shall be the same.
            earlier = None
        if earlier is None:
            # Arithmetic before the first nonlinearity: only factors, for a sum may be a bias.
            factors = _last_factors(between)
            between = between[len(between) - factors :]
            start = next((t for n in between[:1] for t in n.inputs if t.name in varying), unit.root)
            earlier = Cluster(start, start, [])
        # An operand that is broadcast on the way is not the nonlinearity's own argument.
        alike = all(same_shape(stretch.graph, t, output) for t in (start, earlier.root))
        if alike and (earlier.nodes or between):
            nodes = [*earlier.nodes, *between, *unit.nodes]
            unit = Cluster(earlier.root, output, nodes)
            stretch.found[output.name] = unit
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


def _before_scalars(stretch: Stretch, tensor: Tensor) -> tuple[Tensor, list[Node]]:
    """The tensor before arithmetic with single numbers, and that arithmetic."""
    varying = stretch.varying
    passed: list[Node] = []
    while tensor.name in stretch.order:
        node = tensor.inputs[0]
        others = [t for t in node.inputs if t.name not in varying]
        values = [stretch.graph.value(t) for t in others]
        scalar = all(value is not None and value.size == 1 for value in values)
        if node.op not in _ARITHMETIC or not scalar or len(node.inputs) - len(others) != 1:
            break
        if node.op == "Div" and node.inputs[0].name not in varying:
            break
        passed.insert(0, node)
        tensor = next(t for t in node.inputs if t.name in varying)
    return tensor, passed


def _region(stretch: Stretch, last: Node) -> Cluster | None:
    """From ``last`` back to the one tensor that all of its operands are computed from.

    Transposes may lie on the way (tf2onnx leaves some inside an activation), as long as every path
    brings the entries back to where they were.
    """
    graph, order, output = stretch.graph, stretch.order, last.outputs[0]
    straight = tuple(range(len(graph.shape(output) or ())))
    inner: dict[int, Node] = {}
    frontier: dict[str, Tensor] = {}
    # Axis k of the tensor is axis ``places[name][k]`` of the output.
    places: dict[str, tuple[int, ...]] = {output.name: straight}
    node = last
    while len(inner) < _LARGEST:
        inner[order[node.outputs[0].name]] = node
        place = places[node.outputs[0].name]
        if node.op == "Transpose":
            place = _before_transpose(graph, node, place)
        for tensor in node.inputs:
            if tensor.name not in stretch.varying:
                continue
            if places.setdefault(tensor.name, place) != place:
                return None
            frontier[tensor.name] = tensor
        if len(frontier) == 1:
            root = next(iter(frontier.values()))
            if places[root.name] == straight or node.op != "Transpose":
                if not same_shape(graph, root, output) or root.name not in stretch.active:
                    return None
                if places[root.name] != straight:
                    return None
                nodes = [inner[i] for i in sorted(inner)]
                piecewise = _piecewise(nodes, stretch.varying)
                return Cluster(root, output, nodes, piecewise=piecewise)
        # Open the newest tensor: everything older may still turn out to be the common root.
        newest = max(frontier, key=lambda name: order.get(name, -1))
        if newest not in order:
            return None
        node = stretch.dependent[order[newest]]
        if node.op != "Transpose" and not _pointwise(node):
            return None
        shape, whole = graph.shape(node.outputs[0]), graph.shape(output)
        if whole is None or shape != tuple(whole[k] for k in places[newest]):
            return None
        del frontier[newest]
    return None


def _before_transpose(graph: Graph, node: Node, place: tuple[int, ...]) -> tuple[int, ...]:
    """Where a Transpose's input has its axes, from where its output has them."""
    perm = graph.attr(node, "perm") or range(len(place))[::-1]
    result = [0] * len(place)
    for axis, source in enumerate(perm):
        result[source] = place[axis]
    return tuple(result)


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
