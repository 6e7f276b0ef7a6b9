"""Find layer normalisations that an exporter spelled out.

There are many spellings: (x − μ) / σ · γ + β, x · a + (β − μ · a) with a = γ / σ, a variance from
Σ x² / n − μ², means by sums or by pooling, factors in any order. What a region of such operators
computes, its values at a few random points tell: γ, β and ε follow from some, and others confirm
them. As one operator it is followed through one definition, whoever exported it.

Precondition: scope. Postcondition (of the caller): the region's last output maps to a region that
stands for a LayerNormalization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_attrib.ir import OPSET, Graph, Node, Shape, Tensor, is_float
from onnx_attrib.job import Cluster

Array = np.ndarray[Any, np.dtype[Any]]

_ENDS = frozenset("Add Sub Mul Div".split())
_ROOTS = frozenset("Sqrt Pow ReduceL2".split())
_AVERAGES = frozenset(
    "ReduceMean ReduceSum ReduceSumSquare ReduceL2 GlobalAveragePool AveragePool".split()
)
_INSIDE = frozenset(
    """
    Add Sub Mul Div Neg Reciprocal Abs Max Min Relu Clip Identity Cast Dropout
    Where Greater GreaterOrEqual Less LessOrEqual Equal Not And Or ConstantOfShape
    Reshape Squeeze Unsqueeze Expand Transpose Flatten Shape Size Gather Slice Concat
    """.split()
)
_ALLOWED = _INSIDE | _ROOTS | _AVERAGES
_LARGEST = 64
_CLOSE, _NOTHING = 1e-7, 1e-10


@dataclass(frozen=True)
class _Found:
    """γ and β over the last axes from ``axis`` (negative), and ε."""

    axis: int
    scale: Array
    shift: Array
    epsilon: float


def standardizations(
    graph: Graph, nodes: Sequence[Node], dependent: Sequence[Node], active: set[str]
) -> dict[str, Cluster]:
    """The layer normalisations of an active tensor, by their last output.

    ``nodes``: sorted, on differentiable paths; ``dependent``: sorted, all whose values vary.
    """
    order = {t.name: i for i, node in enumerate(dependent) for t in node.outputs if t.name}
    if not any(node.op in _ROOTS for node in nodes):
        return {}
    result: dict[str, Cluster] = {}
    taken = set[int]()
    for node in reversed(nodes):
        # The last node that still makes a normalisation has its γ and its β.
        if node.op not in _ENDS or node.domain or id(node) in taken:
            continue
        for source, region in _regions(graph, node, dependent, order, active):
            for root in _layouts(graph, source, node.outputs[0], region):
                known = _normalization(graph, source, root, node.outputs[0], region)
                if known is not None:
                    taken |= {id(inner) for inner in region}
                    result[node.outputs[0].name] = _cluster(graph, root, node, region, known)
    return result


def _cluster(graph: Graph, root: Tensor, last: Node, region: list[Node], known: _Found) -> Cluster:
    attributes = {"axis": known.axis, "epsilon": known.epsilon}
    stand_in = gs.Node("LayerNormalization", last.name, attributes)
    kind = graph.dtype(root)
    operands = [graph.constant(part.astype(kind)) for part in (known.scale, known.shift)]
    return Cluster(root, last.outputs[0], region, stand_in, operands)


def _layouts(graph: Graph, source: Tensor, output: Tensor, region: list[Node]) -> Iterator[Tensor]:
    """The tensor that a region is computed from, or what a Transpose makes of it, as the output."""
    found = [source]
    found += [n.outputs[0] for n in region if n.op == "Transpose" and n.inputs[0] is source]
    yield from (tensor for tensor in found if _alike(graph.shape(tensor), graph.shape(output)))


def _alike(a: Shape | None, b: Shape | None) -> bool:
    """Whether two shapes may be equal: inference may have two names for one size."""
    if a is None or b is None or len(a) != len(b):
        return False
    pairs = zip(a, b, strict=True)
    return all(m == n for m, n in pairs if isinstance(m, int) and isinstance(n, int))


def _regions(
    graph: Graph, last: Node, dependent: Sequence[Node], order: Mapping[str, int], active: set[str]
) -> Iterator[tuple[Tensor, list[Node]]]:
    """What lies between ``last`` and each one tensor that all of it is computed from."""
    node = last
    inner: dict[int, Node] = {}
    frontier: dict[str, Tensor] = {}
    while len(inner) < _LARGEST:
        inner[order[node.outputs[0].name]] = node
        for tensor in graph.uses(node):
            if tensor.name in order or tensor.name in active:
                frontier[tensor.name] = tensor
        if len(frontier) == 1:
            (root,) = frontier.values()
            ops = [found.op for found in inner.values()]
            whole = sum(op in _AVERAGES for op in ops) > 1 and any(op in _ROOTS for op in ops)
            if whole and root.name in active:
                yield root, [inner[i] for i in sorted(inner)]
        newest = max(frontier, key=lambda name: order.get(name, -1), default="")
        if newest not in order:
            return
        node = dependent[order[newest]]
        if node.op not in _ALLOWED or node.domain:
            return
        for tensor in node.outputs:
            frontier.pop(tensor.name, None)


# -- what a region computes ------------------------------------------------------------------------


def _normalization(
    graph: Graph, source: Tensor, root: Tensor, output: Tensor, region: list[Node]
) -> _Found | None:
    """The normalisation of ``root`` that a region is, which computes it from ``source``."""
    shape = graph.shape(root)
    if shape is None or len(shape) < 2:
        return None
    sizes: dict[Any, int] = {}
    # Sizes that are known at run time only may be any, but for the same name the same.
    probed = [d if isinstance(d, int) else sizes.setdefault(d, 2 + len(sizes)) for d in shape]
    try:
        evaluate = _Evaluation(graph, source, output, region)
        turned = list(range(len(shape)))
        if root is not source:
            turned = list(np.argsort(graph.attr(root.inputs[0], "perm") or turned[::-1]))
        rng = np.random.default_rng(0)
        points = [rng.standard_normal(probed) * size for size in (1e4, 1e4, 1e-2, 1)]
        points[3] += 1
        values = [evaluate(point.transpose(turned)) for point in points]
    except Exception:
        # The reference evaluator may lack an operator or a type, and the sizes need not fit.
        return None
    if not all(value.shape == tuple(probed) and np.isfinite(value).all() for value in values):
        return None
    for axis in range(-1, -len(shape), -1):
        if not all(isinstance(size, int) for size in shape[axis:]):
            return None
        found = _fitted(points, values, axis)
        if found is not None:
            return found
    return None


def _fitted(points: list[Array], values: list[Array], axis: int) -> _Found | None:
    """γ and β from two points of large variance, ε from one of small, confirmed at a fourth."""
    axes = tuple(range(axis, 0))
    normal = [_standardized(point, axes, 0.0) for point in points]
    leading = tuple(range(points[0].ndim + axis))
    with np.errstate(all="ignore"):
        scale = (values[0] - values[1]) / (normal[0] - normal[1])
    scale = np.median(scale, axis=leading)
    shift = np.median(values[0] - scale * normal[0], axis=leading)
    if not (np.isfinite(scale).all() and scale.any()):
        return None
    shift[np.abs(shift) < _NOTHING * np.abs(scale).max()] = 0
    # In y − β = γ · c / √(v + ε), of the entry that is furthest from zero.
    raw = scale * (points[2] - points[2].mean(axes, keepdims=True))
    place = np.unravel_index(np.abs(raw).argmax(), raw.shape)
    variance = np.broadcast_to(points[2].var(axes, keepdims=True), raw.shape)[place]
    left = (values[2] - shift)[place]
    epsilon = (raw[place] / left) ** 2 - variance if left else -1.0
    epsilon = float(np.float32(max(epsilon, 0.0)))
    for point, value in zip(points, values, strict=True):
        expected = scale * _standardized(point, axes, epsilon) + shift
        if np.abs(expected - value).max() > _CLOSE * np.abs(value).max():
            return None
    return _Found(axis, scale, shift, epsilon)


def _standardized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt(centred.var(axes, keepdims=True) + epsilon)
    return result


class _Evaluation:
    """A region in float64, as a function of its root."""

    def __init__(self, graph: Graph, root: Tensor, output: Tensor, region: list[Node]) -> None:
        nodes, fixed = _with_constants(graph, root, region)
        ends = [(root.name, TensorProto.DOUBLE), (output.name, TensorProto.DOUBLE)]
        first, last = (helper.make_tensor_value_info(*end, None) for end in ends)
        proto = helper.make_graph(
            [_widened(graph.proto(node)) for node in nodes],
            "region",
            [first],
            [last],
            [numpy_helper.from_array(_wide(value), name) for name, value in fixed.items()],
        )
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)])
        self.evaluator, self.root = ReferenceEvaluator(model), root.name

    def __call__(self, x: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(self.evaluator.run(None, {self.root: x})[0])


def _with_constants(
    graph: Graph, root: Tensor, region: list[Node]
) -> tuple[list[Node], dict[str, Array]]:
    """A region together with what computes its constants, sorted, and the constants of these."""
    nodes, fixed, made = list[Node](), dict[str, Array](), {root.name}

    def add(node: Node) -> None:
        for tensor in graph.uses(node):
            value = graph.value(tensor)
            if value is not None:
                fixed[tensor.name] = value
            elif tensor.name not in made:
                if not tensor.inputs or len(nodes) > 2 * _LARGEST:
                    raise ValueError("what else goes in varies")
                add(tensor.inputs[0])
        made.update(t.name for t in node.outputs)
        nodes.append(node)

    for node in region:
        add(node)
    return nodes, fixed


def _wide(value: Array) -> Array:
    return value.astype(np.float64) if is_float(value.dtype) else value


def _widened(node: NodeProto) -> NodeProto:
    """A node whose attributes ask for float64 where they ask for a float type."""
    result = NodeProto()
    result.CopyFrom(node)
    for attribute in result.attribute:
        if attribute.name == "to" and is_float(helper.tensor_dtype_to_np_dtype(attribute.i)):
            attribute.i = TensorProto.DOUBLE
        if attribute.type == AttributeProto.TENSOR:
            value = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(_wide(value)))
    return result


__all__ = ["standardizations"]
