"""The rules of layer-wise relevance propagation, and the composites that assign them, as tables.

For a layer y = W · x + b a rule takes terms z_t = ± (W_t · x_t + b_t) with parts of the weights,
the data and the bias. A share of the relevance R goes through each denominator z = Σ_t z_t:

    R_x = Σ_parts factor · Σ_t ± x_t ⊙ W_tᵀ (R / (z + ε · sign z)),   sign 0 = +1.

Lapuschkin, Montavon and others write the sums out: Bach et al. 2015 (ε, αβ), Montavon et al. 2017
(z⁺, w², z^B: arXiv 1512.02479), Montavon et al. 2019 (γ), Lapuschkin et al. 2019 (flat). γ is here
in the form for signed inputs (Andéol et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_attrib.ir import Emitter, Graph, Tensor

Modify = Callable[[Graph, Tensor, float], Tensor]


def _positive(graph: Graph, t: Tensor, gamma: float) -> Tensor:
    return graph.op.Max(t, 0.0)


def _negative(graph: Graph, t: Tensor, gamma: float) -> Tensor:
    return graph.op.Min(t, 0.0)


def _ones(graph: Graph, t: Tensor, gamma: float) -> Tensor:
    one = np.ones(1, graph.dtype(t))
    ones = graph.op.ConstantOfShape(graph.op.Shape(t), value=one)
    ones.shape = t.shape
    return ones


PARTS: Mapping[str, Modify] = {
    "": lambda graph, t, gamma: t,
    "+": _positive,
    "-": _negative,
    "1": _ones,
    "²": lambda graph, t, gamma: graph.op.Mul(t, t),
    "γ+": lambda graph, t, gamma: _raised(graph.op, t, _positive(graph, t, gamma), gamma),
    "γ-": lambda graph, t, gamma: _raised(graph.op, t, _negative(graph, t, gamma), gamma),
}
"""Parts of data, weights or biases: t itself, max(t, 0), min(t, 0), 1, t², t + γ max(t, 0),
t + γ min(t, 0)."""


def _raised(op: Emitter, t: Tensor, part: Tensor, gamma: float) -> Tensor:
    return op.Add(t, op.Mul(part, gamma))


@dataclass(frozen=True)
class Term:
    """``sign`` · (w · x + b): which part of each, see :data:`PARTS`.

    ``x`` may be the lowest or highest value that the data can have; ``b`` None: without a bias.
    """

    x: str
    w: str
    b: str | None
    sign: int = 1


@dataclass(frozen=True)
class Part:
    """The terms of one denominator; ``where``: only of outputs y with that sign."""

    terms: tuple[Term, ...]
    factor: float = 1.0
    where: Literal["", "+", "-"] = ""


_GAINS = (Term("+", "+", "+"), Term("-", "-", None))
_LOSSES = (Term("+", "-", "-"), Term("-", "+", None))

RULES: Mapping[str, tuple[Part, ...]] = {
    "epsilon": (Part((Term("", "", ""),)),),
    "zplus": (Part(_GAINS),),
    "gamma": (
        Part((Term("+", "γ+", "γ+"), Term("-", "γ-", None)), where="+"),
        Part((Term("+", "γ-", "γ-"), Term("-", "γ+", None)), where="-"),
    ),
    "alpha1beta0": (Part(_GAINS),),
    "alpha2beta1": (Part(_GAINS, 2.0), Part(_LOSSES, -1.0)),
    "wsquare": (Part((Term("1", "²", "²"),)),),
    "flat": (Part((Term("1", "1", None),)),),
    "zbox": (Part((Term("", "", None), Term("low", "+", None, -1), Term("high", "-", None, -1))),),
    "pass": (),
}
"""Every rule. ``pass`` leaves relevance as it is."""


@dataclass(frozen=True)
class Assigned:
    """A line of a composite: the rule of layers of a kind (any), of the ``first`` ones only."""

    rule: str
    kind: Literal["", "dense", "convolution"] = ""
    first: bool = False


COMPOSITES: Mapping[str, tuple[Assigned, ...]] = {
    "epsilon-plus": (Assigned("zplus", "convolution"), Assigned("epsilon")),
    "epsilon-plus-flat": (
        Assigned("flat", first=True),
        Assigned("zplus", "convolution"),
        Assigned("epsilon"),
    ),
    "epsilon-gamma-box": (
        Assigned("zbox", "convolution", first=True),
        Assigned("gamma", "convolution"),
        Assigned("epsilon"),
    ),
    "epsilon-alpha2-beta1": (Assigned("alpha2beta1", "convolution"), Assigned("epsilon")),
    "epsilon-alpha2-beta1-flat": (
        Assigned("flat", first=True),
        Assigned("alpha2beta1", "convolution"),
        Assigned("epsilon"),
    ),
    "attn-lrp": (Assigned("epsilon"),),
}
"""Which layer has which rule: the first line that fits."""


@dataclass(frozen=True)
class Setting:
    """A rule with its parameters; ``low`` and ``high``: None where the rule needs no box."""

    rule: str
    epsilon: float
    gamma: float
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    biases: bool = True


def needs_box(rule: str) -> bool:
    """Whether a rule asks for the range of the data."""
    return any(term.x == "low" for part in RULES[rule] for term in part.terms)


__all__ = [
    "COMPOSITES",
    "PARTS",
    "RULES",
    "Assigned",
    "Part",
    "Setting",
    "Term",
    "needs_box",
]
