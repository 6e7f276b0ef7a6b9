"""Which bounds are ReLUs: Max(x, 0), Clip(x, 0), Clip(x, 0, 6), Min(Max(x, 0), 6).

A bound that keeps a root or a quotient defined (the variance of a normalisation) is none, and no
hard sigmoid: between two bounds, of a number shifted beforehand.
"""

from __future__ import annotations

from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.rules.base import Site

_SMALL = 1e-2
_ONWARD = frozenset("Identity Cast Reshape Expand Squeeze Unsqueeze Transpose Add".split())
_FAR = 12


def clip_rectifies(s: Site) -> float:
    """A Clip with the lower bound 0."""
    capped = s.optional(2) is not None
    return float(_zero(s, s.optional(1)) and not (capped and _shifted(s, s.x())) and not _guards(s))


def maximum_rectifies(s: Site, k: int) -> float:
    """A Max of operand k and zeros."""
    others = [x for j, x in enumerate(s.inputs) if j != k]
    cap = _producer(s.x(k), "Min")
    shifted = cap is not None and any(_shifted(s, t) for t in cap.inputs)
    return float(
        bool(others) and all(_zero(s, x) for x in others) and not shifted and not _guards(s)
    )


def minimum_rectifies(s: Site, k: int) -> float:
    """The cap on a ReLU: a Min of operand k and positive numbers."""
    caps = [s.value(j) for j in range(len(s.inputs)) if j != k]
    positive = bool(caps) and all(cap is not None and bool((cap > 0).all()) for cap in caps)
    relu, maximum = (_producer(s.x(k), op) for op in ("Relu", "Max"))
    below = [t for node in (relu, maximum) if node is not None for t in node.inputs]
    bounded = relu is not None or any(_zero(s, t) for t in below)
    return float(positive and bounded and not any(_shifted(s, t) for t in below))


def _zero(s: Site, tensor: Tensor | None) -> bool:
    value = s.graph.value(tensor)
    return value is not None and not value.any()


def _producer(tensor: Tensor, op: str) -> Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op == op else None


def _shifted(s: Site, tensor: Tensor) -> bool:
    """Whether one number was added to all entries just before."""
    node = _producer(tensor, "Add") or _producer(tensor, "Sub")
    values = [s.graph.value(t) for t in node.inputs] if node is not None else []
    return any(value is not None and value.size == 1 for value in values)


def _guards(s: Site) -> bool:
    """Whether what is bounded goes into a root, a logarithm or below a fraction bar."""
    pending, seen = [s.node.outputs[0]], 0
    while pending and seen < _FAR:
        tensor = pending.pop()
        for node in tensor.outputs:
            seen += 1
            below = node.op == "Div" and node.inputs[1].name == tensor.name
            if below or node.op in ("Sqrt", "Log", "Reciprocal") or _root(s.graph, node):
                return True
            if node.op in _ONWARD and (node.op != "Add" or _adds_little(s.graph, node)):
                pending.append(node.outputs[0])
    return False


def _root(graph: Graph, node: Node) -> bool:
    exponent = graph.value(node.inputs[1]) if node.op == "Pow" else None
    return exponent is not None and bool((exponent < 1).all())


def _adds_little(graph: Graph, node: Node) -> bool:
    values = [graph.value(t) for t in node.inputs]
    return any(value is not None and bool((abs(value) < _SMALL).all()) for value in values)
