"""Operator classes and the rule table.

A rule is one row: an operator, its class (a subclass of :class:`Rule`) and the few functions that
class needs. Methods (``onnx_attrib.methods``) say what happens to a class, never to an operator.

All functions take a :class:`Site`: one node at the point being explained, with its input and
output values there, the incoming cotangents, and the same node at the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from onnx_attrib.ir import Emitter, Graph, Node, Shape, Tensor, operands, static


@dataclass(frozen=True)
class Pair:
    """Two multipliers of one tensor: m⁺ of the part Δ⁺ of its difference, m⁻ of Δ⁻.

    They are kept as ``mean`` ± ``half``. ``tilt()`` is (Δ⁺ − Δ⁻) / Δ, zero where Δ is.
    """

    mean: Tensor
    half: Tensor
    tilt: Callable[[], Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> Pair:
        """The pair with a linear map applied to both."""
        return replace(self, mean=change(self.mean), half=change(self.half))

    def joined(self, op: Emitter) -> Tensor:
        """The one multiplier m with m · Δ = m⁺ · Δ⁺ + m⁻ · Δ⁻; the mean where Δ is zero."""
        return op.Add(self.mean, op.Mul(self.half, self.tilt()))


Cotangent = Tensor | Pair
"""A multiplier, or two that differ."""


def each(m: Cotangent, change: Callable[[Tensor], Tensor]) -> Cotangent:
    """A multiplier, or both, with a linear map applied."""
    return m.each(change) if isinstance(m, Pair) else change(m)


def total(op: Emitter, a: Cotangent, b: Cotangent) -> Cotangent:
    """The sum of two cotangents of one tensor."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        return replace(a, mean=op.Add(a.mean, b.mean), half=op.Add(a.half, b.half))
    if isinstance(a, Pair):
        return replace(a, mean=op.Add(a.mean, b))
    return replace(b, mean=op.Add(a, b.mean)) if isinstance(b, Pair) else op.Add(a, b)


@dataclass(frozen=True)
class Site:
    """One node under differentiation.

    ``inputs`` and ``outputs`` hold the tensors' values at the point (None where optional and
    absent), ``cotangents`` one multiplier per output (None where nothing flows back; a pair only
    for treatments that make pairs),
    ``active`` the indices of the inputs that carry attribution. ``reference`` is the same site
    at the baseline, for methods that have one. The reference's batch axis may be 1.
    ``discarded``: a Where that follows may discard entries of the output, which may be infinite.
    """

    graph: Graph
    node: Node
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor | None]
    active: tuple[int, ...]
    reference: Site | None = None
    discarded: bool = False
    made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a rule emits once for all inputs, by what it was made of."""

    @property
    def op(self) -> Emitter:
        return self.graph.op

    @property
    def m(self) -> Tensor:
        """The cotangent of the first output."""
        if self.cotangents[0] is None:
            raise LookupError(f"{self.node.op} '{self.node.name}': no cotangent at output 0")
        return self.cotangents[0]

    @property
    def y(self) -> Tensor:
        return self.outputs[0]

    def x(self, i: int = 0) -> Tensor:
        """The value of input ``i``, which must be present."""
        tensor = self.inputs[i] if i < len(self.inputs) else None
        if tensor is None:
            raise LookupError(f"{self.node.op} '{self.node.name}' has no input {i}")
        return tensor

    def optional(self, i: int) -> Tensor | None:
        return self.inputs[i] if i < len(self.inputs) else None

    def attr(self, name: str) -> Any:
        return self.graph.attr(self.node, name)

    def shape(self, tensor: Tensor) -> Shape | None:
        return self.graph.shape(tensor)

    def rank(self, tensor: Tensor) -> int:
        shape = self.graph.shape(tensor)
        if shape is None:
            raise Unsupported(f"the rank of '{tensor.name}' is unknown")
        return len(shape)

    def value(self, i: int) -> np.ndarray | None:
        """The value of input ``i`` if it is a constant."""
        return self.graph.value(self.optional(i))

    def at(self, inputs: Sequence[Tensor | None]) -> Site:
        """The same node with other input values."""
        return replace(self, inputs=tuple(inputs))

    def at_midpoint(self) -> Site:
        """The same node with every input halfway between its value and its reference."""
        if self.reference is None:
            raise LookupError("the method has no reference")
        return self.at(
            [
                x if x is None or r is None or x.name == r.name else self.midpoint(x, r)
                for x, r in zip(self.inputs, self.reference.inputs, strict=True)
            ]
        )

    def midpoint(self, a: Tensor, b: Tensor) -> Tensor:
        return self.op.Mul(self.op.Add(a, b), 0.5)

    def tolerance(self, tensor: Tensor) -> float:
        """The step below which a difference quotient is all rounding: the cube root of epsilon."""
        dtype = self.graph.dtype(tensor)
        return float(np.cbrt(2.0**-7 if dtype.name == "bfloat16" else np.finfo(dtype).eps))

    def silenced(self, share: Tensor) -> Tensor:
        """``share`` of an entry-by-entry operator, zero (not NaN) where its multiplier is zero."""
        m = self.cotangents[0]
        if isinstance(m, Pair):
            m = self.op.Add(self.op.Abs(m.mean), self.op.Abs(m.half))
        return self.op.Where(self.op.Equal(m, 0.0), 0.0, share)

    # -- shapes: constants where known, run-time arithmetic where not ------------------------

    def shape_of(self, tensor: Tensor) -> Tensor:
        """The shape of ``tensor`` as an int64 tensor."""
        known = static(self.graph.shape(tensor))
        return self.op.Shape(tensor) if known is None else self.graph.constant(known, np.int64)

    def reshape(self, tensor: Tensor, like: Tensor) -> Tensor:
        """``tensor`` in the shape of ``like`` (same number of elements)."""
        known = static(self.graph.shape(like))
        # A size of zero is meant as such, not as "keep this axis".
        zero = None if known is not None and 0 not in known else 1
        return self.shaped(self.op.Reshape(tensor, self.shape_of(like), allowzero=zero), like)

    def shaped(self, tensor: Tensor, like: Tensor) -> Tensor:
        """State that ``tensor`` has the shape of ``like``, where inference cannot tell."""
        shape = self.graph.shape(like)
        if shape is not None and not isinstance(static(self.graph.shape(tensor)), tuple):
            tensor.shape = list(shape)
        return tensor

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the shape and dtype of ``tensor``."""
        zero = np.zeros(1, self.graph.dtype(tensor))
        return self.shaped(self.op.ConstantOfShape(self.shape_of(tensor), value=zero), tensor)


class Unsupported(Exception):
    """Raised by a rule for a configuration it cannot handle; the message says which."""


Pull = Callable[[Site, int], Tensor]
"""``pull(site, i)``: the cotangent of input ``i``, given those of the outputs."""


def _any(active: tuple[int, ...]) -> bool:
    return True


Role = Literal["", "gate", "scale"]
"""What an operator's output is to what it is multiplied with: a gate between 0 and 1, or the
inverse of a size."""


def no_role(graph: Graph, node: Node) -> Role:
    return ""


def gate(graph: Graph, node: Node) -> Role:
    return "gate"


def inverse(graph: Graph, node: Node) -> Role:
    return "scale"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every class has.

    ``covers`` decides from the active inputs whether the row applies: the first that does wins.
    ``broadcasts``: operands are broadcast, so the driver sums cotangents back to the operand's
    shape. ``lazy``: accepts a cotangent that still has to be broadcast to the output's shape.
    ``blocked``: inputs through which no derivative flows (indices, conditions, shapes).
    ``caveat``: what DeepLIFT's conservation asks of this operator, where a blocked input may
    depend on what is attributed ("exact where the indices are the same at x and x̄"), or of the
    values, if none is blocked. ``refused``: why no node of this operator can be handled, where the
    row is only there to say so. ``role(graph, node)``: what the output is as a factor.
    """

    op: str
    domain: str = ""
    covers: Callable[[tuple[int, ...]], bool] = _any
    broadcasts: bool = False
    lazy: bool = False
    blocked: frozenset[int] = frozenset()
    caveat: str = ""
    refused: str = ""
    role: Callable[[Graph, Node], Role] = no_role


@dataclass(frozen=True, kw_only=True)
class Linear(Rule):
    """Affine in its active inputs together: ``pull`` is the transposed map.

    ``flow``: an output entry ``"mixes"`` several input entries, ``"moves"`` one (or is none:
    padding), or ``"scales"`` one (and may add a number to it). ``positive``: it mixes them with
    coefficients none of which is negative.
    """

    pull: Pull
    flow: Literal["mixes", "moves", "scales"] = "mixes"
    positive: bool = False


@dataclass(frozen=True, kw_only=True)
class Bilinear(Rule):
    """Linear in each active input while the others are held: products and their like.

    ``pull(site, i)`` reads the other operands from ``site.inputs``; with these at the midpoint
    of value and reference, a product of two conserves differences exactly. ``layer``: it sums
    products, so that with one active input it is a layer with weights
    (:mod:`onnx_attrib.rules.affine`), dense or a convolution. ``bias``: the input that is added,
    if there is one. ``flow``: it sums products, or an output entry ``"scales"`` one input entry.
    """

    pull: Pull
    flow: Literal["mixes", "scales"] = "mixes"
    layer: Literal["", "dense", "convolution"] = ""
    bias: int | None = None


@dataclass(frozen=True, kw_only=True)
class Elementwise(Rule):
    """y = f(z), element by element, in one active input ``z`` (``operand``).

    ``derivative(site)`` is f'(z), or a Boolean mask of where it is one (zero elsewhere), which
    costs one operator less and keeps NaN and infinities out. ``secant(site)`` is
    (f(z) − f(z̄)) / (z − z̄) where a closed form is better than the quotient, or None where this
    node has none. ``piecewise``: f is piecewise linear, so the quotient needs no smoothing near
    z = z̄; ``kinked``: it is not, but its slope may jump. ``partial(site)``: f is not defined on
    the whole line, or has poles. ``relu_like(site)``: the slope for positive z of a ReLU or its
    kin, which guided backprop and deconvnet change; 0 for others.
    """

    derivative: Callable[[Site], Tensor]
    secant: Callable[[Site], Tensor | None] | None = None
    operand: int = 0
    piecewise: bool = False
    kinked: bool = False
    partial: Callable[[Site], bool] = lambda site: False
    relu_like: Callable[[Site], float] = lambda site: 0.0
    lazy: bool = True


@dataclass(frozen=True, kw_only=True)
class MaxLike(Rule):
    """Picks one of several entries: a maximum (``sense`` 1) or a minimum (−1).

    ``winner(site)`` is the position of the picked entry for each output entry (the first on
    ties), ``take(site, values, position)`` reads at positions from tensors shaped like the
    inputs (None: zero), and ``put(site, values, position)`` is its transpose: a cotangent for
    each active input. Positions count within a sample, so those of a reference of batch 1 serve
    every sample.
    """

    winner: Callable[[Site], Tensor]
    take: Callable[[Site, Sequence[Tensor | None], Tensor], Tensor]
    put: Callable[[Site, Tensor, Tensor], dict[int, Tensor]]
    sense: int = 1


@dataclass(frozen=True, kw_only=True)
class Composite(Rule):
    """Defined by other operators: ``decompose(site)`` emits the definition at ``site.inputs``.

    It returns one tensor per output (None for one that nothing can flow back from). ``pull`` is
    a fused gradient and ``difference`` a fused conserving rule, both of the first output, where
    there is one (``difference`` returns None for a node whose definition serves).
    ``distribution``: a softmax or its kin, which relevance methods do not take
    apart (the quotient f(z)/z of an exponential means nothing: the logits may be shifted).
    ``moves``: an output entry is one of the input's, which ``pull`` finds again. ``normalizes``: it
    is one, by statistics of the first input's own.
    """

    decompose: Callable[[Site], Sequence[Tensor | None]]
    pull: Pull | None = None
    difference: Callable[[Site, int], Tensor | None] | None = None
    distribution: bool = False
    moves: bool = False
    normalizes: bool = False


class Sharer(Protocol):
    """What a definition asks of whoever goes through it."""

    def share(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> list[Node]:
        """``nodes``, sorted, without those that compute what an earlier one does."""


class Walker(Sharer, Protocol):
    """What a structured rule may ask of the sweep: to go on inside, by the same method."""

    def through(
        self,
        site: Site,
        nodes: Sequence[Node],
        outputs: Sequence[Tensor | None],
        known: Mapping[str, Tensor] | None = None,
        known_reference: Mapping[str, Tensor] | None = None,
        ahead: set[str] | None = None,
    ) -> dict[int, Tensor]:
        """Cotangents of the active inputs of ``site``, through ``nodes``.

        These compute ``outputs``, one for each cotangent of the site, from the site's inputs.
        ``known``: tensors among them whose values are at hand elsewhere, by name (and the same
        at the reference): what depends on them is computed from these. ``ahead``: names among the
        site's inputs that no layer with weights precedes, if the site is not the node itself.
        """

    def early(self, site: Site) -> set[int]:
        """The active inputs of a node that no layer with weights precedes."""

    def behind(self, nodes: Sequence[Node], names: set[str], active: set[str]) -> set[str]:
        """``names``, and those of what is computed from them or by layers with weights."""

    def flow(self, nodes: Sequence[Node], roots: set[str]) -> set[str]:
        """Names of the tensors that ``roots`` reach through differentiable operators."""

    def note(self, message: str) -> None:
        """Tell the user something about the result."""


@dataclass(frozen=True, kw_only=True)
class Structured(Rule):
    """Runs other operators step by step or by choice: control flow and recurrence.

    ``pull(sweep, site)`` emits the cotangents of the active inputs, and has the sweep go through
    what is inside, so one row serves every method. The inputs of a node that holds subgraphs are
    followed by what these capture (:func:`onnx_attrib.ir.operands`). ``transparent``: the
    operators inside are the model's own, and messages name them. ``batch_axis(graph, node)``: the
    axis of the first input along which samples stay apart, or None where that is not known.
    ``reach(node, active)``: the outputs that active tensors reach inside, by name; None: all.
    """

    pull: Callable[[Walker, Site], dict[int, Tensor]]
    transparent: bool = True
    batch_axis: Callable[[Graph, Node], int | None] = lambda graph, node: None
    reach: Callable[[Node, set[str]], set[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Barrier(Rule):
    """No derivative flows: integers, comparisons, shapes, rounding."""


_TABLE: dict[tuple[str, str], list[Rule]] = {}


def add(rule: Rule) -> None:
    """Enter a row. Two unconditional rows for one operator are a mistake."""
    rows = _TABLE.setdefault((rule.domain, rule.op), [])
    if any(row.covers is _any for row in rows):
        raise ValueError(f"operator {rule.op}: a row after one that covers everything")
    rows.append(rule)


def lookup(op: str, domain: str | None, active: tuple[int, ...]) -> Rule | None:
    """The row for an operator with these active inputs, or None."""
    for row in _TABLE.get((_domain(domain), op), ()):
        if row.covers(active):
            return row
    return None


def known(op: str, domain: str | None) -> bool:
    """Whether the table has any row for the operator."""
    return (_domain(domain), op) in _TABLE


def blocked(op: str, domain: str | None) -> frozenset[int]:
    """Inputs through which no derivative flows, whatever is active."""
    rows = _TABLE.get((_domain(domain), op), ())
    return next((row.blocked for row in rows), frozenset())


def is_barrier(op: str, domain: str | None) -> bool:
    """Whether no derivative flows through the operator at all."""
    rows = _TABLE.get((_domain(domain), op), ())
    return any(isinstance(row, Barrier) for row in rows)


def active_inputs(node: Node, active: Collection[str]) -> tuple[int, ...]:
    """Indices of the inputs through which attribution flows back, given the active names."""
    if is_barrier(node.op, node.domain):
        return ()
    held = blocked(node.op, node.domain)
    return tuple(i for i, t in enumerate(operands(node)) if t.name in active and i not in held)


def reach(op: str, domain: str | None) -> Callable[[Node, set[str]], set[str]] | None:
    """How active tensors go through a node that holds subgraphs, or None for the others."""
    rows = _TABLE.get((_domain(domain), op), ())
    return next((row.reach for row in rows if isinstance(row, Structured)), None)


def table() -> Iterator[Rule]:
    """Every row, operator by operator."""
    for rows in _TABLE.values():
        yield from rows


def only(*operands: int) -> Callable[[tuple[int, ...]], bool]:
    """A ``covers`` for rows that apply when all active inputs are among ``operands``."""
    allowed = set(operands)
    return lambda active: set(active) <= allowed


def _domain(domain: str | None) -> str:
    return "" if domain in (None, "ai.onnx") else str(domain)
