"""Find the values that a Where may discard.

Where(z = 0, 0, a / z) and exponential units spelled with Where compute infinities, or numbers that
are none, only to discard them. The multiplier of a discarded entry is zero, but zero times an
infinite derivative would be NaN: with these operators, what no multiplier reaches gets none.

Precondition: nodes in order. No pass of its own: the sweep asks for each part of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_attrib import rules
from onnx_attrib.ir import Node
from onnx_attrib.rules import Bilinear, Elementwise, Linear, Rule, Site

_KEEP_APART = frozenset("Add Sub Mul Div Neg Sum Mean Pow PRelu Identity Cast Mod".split())
"""Operators that work entry by entry, besides those of the Elementwise class."""
_MULTIPLY = frozenset("Mul Div".split())


def discarded(nodes: Sequence[Node], outside: set[str]) -> set[str]:
    """Tensors that a Where of ``nodes`` reads, directly or through operators entry by entry.

    ``outside``: those that are read by one elsewhere.
    """
    found = set(outside)
    for node in reversed(nodes):
        if node.domain or not node.outputs:
            continue
        if node.op == "Where":
            found.update(t.name for t in node.inputs[1:])
        elif node.outputs[0].name in found and _keeps_apart(node):
            found.update(t.name for t in node.inputs)
    return found


def may_be_infinite(site: Site, rule: Rule) -> bool:
    """Whether a node multiplies by something that may be infinite or NaN."""
    if isinstance(rule, Elementwise):
        return not rule.piecewise
    if not isinstance(rule, Linear | Bilinear) or site.node.op not in _MULTIPLY:
        return False
    return any(site.value(i) is None for i in range(len(site.inputs)) if i not in site.active[:1])


def _keeps_apart(node: Node) -> bool:
    return node.op in _KEEP_APART or isinstance(rules.lookup(node.op, "", (0,)), Elementwise)


__all__ = ["discarded", "may_be_infinite"]
