"""Take sizes from the model's inputs.

A tensor of which the backward half only reads the size is kept until then, with all its entries;
the inputs are there anyway.

Precondition: a finished graph. Postcondition: the same values; where the sizes of a tensor of the
model are known as numbers and as sizes of the model's inputs, no emitted node reads them off it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod

import numpy as np

from onnx_attrib.ir import Dim, Graph, Node, Tensor
from onnx_attrib.job import Job

_VIEWS = frozenset("Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
Place = tuple[Tensor, int]
"""An axis of an input."""


def sizes(job: Job) -> None:
    """Emit what replaces each Shape and Size, and let their readers read that."""
    graph = job.graph
    places = _places(graph)
    spared = {t.name for t in graph.outputs} | {t.name for t in graph.inputs}
    renamed: dict[str, Tensor] = {}
    for node in _of_own(graph, graph.in_order(graph.nodes), spared):
        shape = graph.shape(node.inputs[0])
        if node.op == "Shape" and shape is not None:
            shape = shape[graph.attr(node, "start") or 0 : graph.attr(node, "end")]
        if shape is not None and all(isinstance(d, int) or d in places for d in shape):
            made = (_vector if node.op == "Shape" else _count)(graph, shape, places)
            renamed[node.outputs[0].name] = made
    for node in graph.nodes:
        graph.rewire(node, renamed)


def _places(graph: Graph) -> dict[str, Place]:
    """Where the inputs of the model have each symbol."""
    found: dict[str, Place] = {}
    for tensor in graph.inputs:
        for axis, dim in enumerate(graph.shape(tensor) or ()):
            if isinstance(dim, str) and tensor.name in graph.own:
                found.setdefault(dim, (tensor, axis))
    return found


def _of_own(graph: Graph, nodes: Iterable[Node], spared: set[str]) -> list[Node]:
    """Emitted nodes (of sorted ones) that read the sizes of the model's tensors or of their views.

    Of other tensors, what is known as batch 1 may be a batch of N at run time.
    """
    found, trusted = [], set(graph.own) - spared
    for node in nodes:
        source = node.inputs[0].name if node.inputs else ""
        if source not in trusted or node.domain or node.outputs[0].name in graph.own:
            continue
        if node.op in _VIEWS:
            trusted.add(node.outputs[0].name)
        elif node.op in ("Shape", "Size"):
            found.append(node)
    return found


def _vector(graph: Graph, shape: Sequence[Dim], places: Mapping[str, Place]) -> Tensor:
    """The sizes, int64 [rank]."""
    op = graph.op
    parts = []
    for known, dims in groupby(shape, lambda dim: isinstance(dim, int)):
        if known:
            parts.append(graph.constant(list(dims), np.int64))
            continue
        for dim in dims:
            tensor, axis = places[str(dim)]
            parts.append(op.Shape(tensor, start=axis, end=axis + 1))
    if not parts:
        return graph.constant([], np.int64)
    return op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]


def _count(graph: Graph, shape: Sequence[Dim], places: Mapping[str, Place]) -> Tensor:
    """How many entries there are, int64 []."""
    op = graph.op
    total = graph.constant(prod(dim for dim in shape if isinstance(dim, int)), np.int64)
    for dim in shape:
        if isinstance(dim, str):
            tensor, axis = places[dim]
            size = op.Squeeze(op.Shape(tensor, start=axis, end=axis + 1), [0])
            total = op.Mul(total, size)
    return total
