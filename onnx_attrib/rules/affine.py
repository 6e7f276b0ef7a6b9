"""Layers with weights: y = W · x + b, of which rules replace W and b.

Relevance rules (z⁺, γ, αβ, w², flat, the box), RevealCancel and pattern methods evaluate a layer,
or its transpose, with other weights: the positive ones, their squares, ones, patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import GraphProto

from onnx_attrib.ir import Node, Tensor, bodies, subgraphs
from onnx_attrib.rules.base import Bilinear, Rule, Site, Structured, lookup


@dataclass(frozen=True)
class Layer:
    """A node that is affine in one operand ``data``: y = W · x + b.

    ``weight`` and ``bias`` are tensors as the node has them (their signs, squares and so on are
    those of W and b, if ``scale`` is positive, see :func:`layer_of`); ``bias`` is None where
    there is none.
    """

    site: Site
    rule: Bilinear
    data: int
    bias_index: int

    @property
    def x(self) -> Tensor:
        """The layer's input."""
        return self.site.x(self.data)

    @property
    def y(self) -> Tensor:
        """The layer's output, with all that has been merged into it."""
        y = self.site.y
        for op, operand in getattr(self.site.node, "late", ()):
            # As the model does it: near zero, the last digits count.
            y = self.site.graph.emit(op, y, operand)
        return y

    @property
    def weight(self) -> Tensor:
        return self.site.x(1 - self.data)

    @property
    def magnitude(self) -> Tensor:
        """|W|, which a negative factor of the operator's own makes negative to undo it."""
        size = self.site.op.Abs(self.weight)
        return self.site.op.Neg(size) if self.site.node.attrs.get("alpha", 1) < 0 else size

    @property
    def bias(self) -> Tensor | None:
        return self.site.optional(self.bias_index)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W' · x' + b', of y's shape for x' of x's shape, W' of W's."""
        site, node, op = self.site, self.site.node, self.site.op
        pair = (x, weight) if self.data == 0 else (weight, x)
        y: Tensor
        if self.rule.bias is not None and bias is not None:
            y = site.graph.emit(node.op, *pair, bias, **node.attrs)
        else:
            y = site.graph.emit(node.op, *pair, **node.attrs)
            if bias is not None:
                y = op.Add(y, bias)
        return site.shaped(y, site.y)

    def back(self, m: Tensor, weight: Tensor) -> Tensor:
        """W'ᵀ · m, of x's shape (not yet summed over broadcast batch axes), for m of y's shape."""
        inputs = list(self.site.inputs)
        inputs[1 - self.data] = weight
        here = Site(
            self.site.graph, self.site.node, tuple(inputs), self.site.outputs, (m,), (self.data,)
        )
        return self.rule.pull(here, self.data)


def layer_of(site: Site, rule: Bilinear) -> Layer | None:
    """The site as a layer, or None if it is a product of two variables or entry by entry.

    A factor that Gemm applies to its products or to its bias counts as part of the layer: the
    passes that merge layers fold it in (:mod:`onnx_attrib.passes.merge`).
    """
    if not rule.layer or len(site.active) != 1 or site.active[0] > 1:
        return None
    if len(site.inputs) > 3 or site.node.attrs.get("equation", ",").count(",") != 1:
        return None
    return Layer(site, rule, site.active[0], 2)


def has_layer(node: Node, active: tuple[int, ...]) -> bool:
    """Whether a node is a layer with weights, or runs some, given its varying operands."""
    if any(_body_has_layer(body) for body in bodies(node)):
        return True
    return is_layer(lookup(node.op, node.domain, active), active)


def _body_has_layer(body: GraphProto) -> bool:
    for node in body.node:
        if is_layer(lookup(node.op_type, node.domain, (0,)), (0,)):
            return True
        if any(_body_has_layer(inner) for inner in subgraphs(node)):
            return True
    return False


def is_layer(rule: Rule | None, active: tuple[int, ...]) -> bool:
    """Whether an operator with these varying operands has weights."""
    if isinstance(rule, Structured):
        # A recurrent operator; control flow is what its bodies are.
        return not rule.transparent
    return isinstance(rule, Bilinear) and bool(rule.layer) and len({0, 1} & set(active)) == 1


__all__ = ["Layer", "has_layer", "is_layer", "layer_of"]
