"""What a method is: a row of Ancona et al. 2017, Table 1, plus its options.

A method says what happens to each operator class (``table``) and how the multipliers of an
attributed tensor become its attribution (``attribution``). It never names an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import Emitter, Tensor
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    MaxLike,
    Rule,
    Site,
    Structured,
    Walker,
)

Shares = dict[int, Tensor]
"""Cotangents by input index."""
Options = Mapping[str, Any]


class Sweeper(Walker, Protocol):
    """What a treatment may ask of the sweep that applies it."""

    def decompose(self, site: Site, rule: Composite, table: Table | None = None) -> Shares:
        """Sweep through the operator's definition (by ``table``, or the method's own)."""


Treatment = Callable[[Sweeper, Site, Any], Shares]
Table = Mapping[type[Rule], Treatment]


@dataclass(frozen=True)
class Option:
    """One option of a method: its type is that of the default, unless ``choices`` are given."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None

    def parse(self, value: Any) -> Any:
        """Check (and convert, if it is text from a command line) a value.

        Raises OptionError with the valid choices or type.
        """
        if self.choices:
            if value not in self.choices:
                choices = ", ".join(self.choices)
                raise OptionError(f"option '{self.name}' is '{value}'; choose from: {choices}")
            return value
        kind = type(self.default)
        try:
            number = kind(value)
            if kind is int and float(value) != number:
                raise ValueError
        except (TypeError, ValueError):
            wanted = "a whole number" if kind is int else "a number"
            raise OptionError(f"option '{self.name}' must be {wanted}, not '{value}'") from None
        if self.minimum is not None and not number >= self.minimum:
            raise OptionError(
                f"option '{self.name}' must be at least {self.minimum:g}, not {number}"
            )
        return number


@dataclass(frozen=True)
class Path:
    """Points on the straight line from the reference (0) to the input (1), with weights.

    ``chunk``: how many points are evaluated together (their batch is the memory's bound).
    """

    points: tuple[float, ...]
    weights: tuple[float, ...]
    chunk: int


@dataclass(frozen=True)
class Method:
    """One attribution method.

    ``table(options)``: the treatment of each operator class. ``attribution(op, m, x, x̄)``: what
    is reported, from multiplier, value and reference (None without one). ``needs_reference``:
    the attribution uses x̄. ``compares``: rules compare the model's values at x and x̄.
    ``complete``: attributions sum to S(x) − S(x̄). ``path(options)``: evaluate multipliers at
    several points and average. ``starts``: sweeps begin at the seed, or at the seeded value of
    the output. ``differentiates``: the method needs a differentiable path. ``clusters``: what
    counts as one nonlinearity: each operator, also single-variable ``regions`` where paths meet
    again, or also ``chains`` of nonlinearities. ``merges``: a bias or a
    BatchNormalization after a layer with weights is part of it. ``signed``: attributions can be
    negative.
    """

    name: str
    summary: str
    g: str
    paper: str
    table: Callable[[Options], Table]
    attribution: Callable[[Emitter, Tensor, Tensor, Tensor | None], Tensor]
    options: tuple[Option, ...] = ()
    needs_reference: bool = False
    compares: bool = False
    complete: bool = False
    clusters: Literal["", "regions", "chains"] = ""
    merges: bool = False
    signed: bool = True
    starts: Literal["seed", "value"] = "seed"
    differentiates: bool = True
    path: Callable[[Options], Path] | None = None

    def has(self, name: str) -> bool:
        """Whether the method has an option of that name."""
        return any(option.name == name for option in self.options)

    def parse(self, given: Options) -> dict[str, Any]:
        """Fill in defaults and check values; raises OptionError on unknown names or bad values."""
        known = {option.name: option for option in self.options}
        spelled = {name.replace("-", "_"): value for name, value in given.items()}
        for name in spelled:
            if name not in known:
                raise OptionError(
                    f"method '{self.name}' has no option '{name}': {suggest(name, list(known))}"
                )
        return {
            name: option.parse(spelled[name]) if name in spelled else option.default
            for name, option in known.items()
        }


# -- treatments that several methods share -------------------------------------------------------


def vjp(sweep: Sweeper, site: Site, rule: Linear | Bilinear) -> Shares:
    """The exact vector-Jacobian product."""
    return {i: rule.pull(site, i) for i in site.active}


def derivative(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
    """g(z) = f'(z)."""
    return {rule.operand: scale(site, site.m, rule.derivative(site))}


def winner_takes_all(sweep: Sweeper, site: Site, rule: MaxLike) -> Shares:
    """Everything to the entry that was picked."""
    return rule.put(site, site.m, rule.winner(site))


def fused(sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """The operator's own gradient where it has one, else that of its definition."""
    if rule.pull is None or any(m is not None for m in site.cotangents[1:]):
        return sweep.decompose(site, rule, GRADIENT)
    return {i: rule.pull(site, i) for i in site.active}


def definition(sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """Through the operator's definition, by the method's own table."""
    return sweep.decompose(site, rule)


def conserving(sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """The operator's own conserving rule where it has one, else through its definition."""
    if rule.difference is None or any(m is not None for m in site.cotangents[1:]):
        return sweep.decompose(site, rule)
    return {i: rule.difference(site, i) for i in site.active}


def inside(sweep: Sweeper, site: Site, rule: Structured) -> Shares:
    """The same method within: in branches, steps and recurrent cells."""
    return rule.pull(sweep, site)


def scale(site: Site, m: Tensor, factor: Tensor) -> Tensor:
    """m · factor, where a Boolean factor is a mask."""
    if site.graph.dtype(factor).kind == "b":
        return site.op.Where(factor, m, 0.0)
    return site.op.Mul(m, factor)


def numeric(site: Site, slope: Tensor) -> Tensor:
    """A Boolean mask as numbers."""
    if site.graph.dtype(slope).kind == "b":
        return site.op.Cast(slope, to=site.graph.dtype(site.y))
    return slope


GRADIENT: Table = {
    Linear: vjp,
    Bilinear: vjp,
    Elementwise: derivative,
    MaxLike: winner_takes_all,
    Composite: fused,
    Structured: inside,
}
"""The chain rule itself."""
