"""What a method is: a row of Ancona et al. 2017, Table 1, plus its options.

A method says what happens to each operator class (``table``) and how the multipliers of an
attributed tensor become its attribution (``attribution``). It never names an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import Emitter, Tensor
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Cotangent,
    Elementwise,
    Linear,
    MaxLike,
    Rule,
    Site,
    Structured,
    Walker,
)

Shares = dict[int, Cotangent]
"""Cotangents by input index."""
Options = Mapping[str, Any]


class Sweeper(Walker, Protocol):
    """What a treatment may ask of the sweep that applies it."""

    def decompose(
        self, site: Site, rule: Composite, table: Table | None = None, keep: bool = False
    ) -> Shares:
        """Sweep through the operator's definition (by ``table``, or the method's own).

        ``keep``: its output has the value that the operator gave, to the last digit.
        """

    def first(self, site: Site) -> bool:
        """Whether no layer with weights precedes the site, for methods with ``merges``."""

    def scaled(self, site: Site) -> bool:
        """Whether the site reads an input, at most moved, scaled or shifted."""

    def bounds(self, site: Site, i: int, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        """Input ``i`` of a first site for attributed tensors at their lowest and highest value;
        of another one, these values themselves."""

    def enter(self, site: Site, kind: str) -> None:
        """Note that the site's operator was met and treated as one of a kind."""

    def made(self, tensor: Tensor) -> tuple[Site, Rule] | None:
        """The site that computes a tensor of the region from attributed ones, and its rule."""

    def again(self, site: Site, inputs: Mapping[int, Tensor]) -> Site:
        """The site at other values of some inputs, with what it computes from them."""

    def using(self, table: Table) -> Sweeper:
        """The sweep by another table."""

    @property
    def kept(self) -> dict[Any, Any]:
        """What treatments found out about tensors and need again."""


Treatment = Callable[[Sweeper, Site, Any], Shares]
Table = Mapping[type[Rule], Treatment]


@dataclass(frozen=True)
class Option:
    """One option of a method: its type is that of the default, unless ``choices`` are given.

    ``read``: checks and converts a value that is no plain number, or raises a ValueError that says
    what it must be.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    read: Callable[[Any], Any] | None = None
    required: bool = False

    def parse(self, value: Any) -> Any:
        """Check (and convert, if it is text from a command line) a value.

        Raises OptionError with the valid choices or type.
        """
        if self.choices:
            spelled = str(value).replace("_", "-")
            if spelled not in self.choices:
                choices = ", ".join(self.choices)
                raise OptionError(f"option '{self.name}' is '{value}'; choose from: {choices}")
            return spelled
        if self.read is not None:
            try:
                return self.read(value)
            except ValueError as error:
                raise OptionError(f"option '{self.name}' must be {error}, not '{value}'") from None
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


def switch(value: Any) -> bool:
    """Read an option that is on or off."""
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise ValueError("true or false")
    return known[str(value).lower()]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the input, of standard deviation ``size`` or, if ``relative``, of ``size``
    times the range (max − min) of each sample's entries."""

    size: float
    relative: bool
    seed: int


@dataclass(frozen=True)
class Draws:
    """Where multipliers are evaluated, draw after draw, and how the draws are averaged.

    Draw j is at x̄ + α_j (x − x̄), or at x itself without ``alphas``; with ``noise`` on x.
    ``chunk``: how many are evaluated together, at most: of a larger batch less, but on CUDA and
    under a bound on memory. ``weights``: one for each draw; without them, one draw for each row of
    the background, all alike. ``rows``: the row of the background that is x̄ in each draw, modulo
    the number of rows; without them it is row j. ``moment``: what is averaged over the draws.
    """

    chunk: int
    weights: tuple[float, ...] = ()
    alphas: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    noise: Noise | None = None
    moment: Literal["mean", "square", "variance"] = "mean"

    @property
    def path(self) -> bool:
        """Whether all draws are on one line, from the one reference to the input."""
        return bool(self.alphas) and not self.rows and self.noise is None


Sizes = int | tuple[int, ...]
"""A size for every axis but the batch's, or one for each; −1 is the whole axis."""


@dataclass(frozen=True)
class Occluded:
    """The model with one window at a time at the reference.

    ``window`` and ``stride``: how large the windows are and how far apart they start. ``chunk``:
    how many are evaluated together (their batch is the memory's bound).
    """

    window: Sizes
    stride: Sizes
    chunk: int


@dataclass(frozen=True)
class Permuted:
    """The model as one feature after another goes to the reference, in random orders.

    ``samples``: how many orders are drawn, by ``seed``. ``window``: features are patches of this
    size. ``chunk``: how many evaluations are made together.
    """

    samples: int
    window: Sizes
    seed: int
    chunk: int


@dataclass(frozen=True)
class Map:
    """A map over the positions of a layer: Σ_k ``weigh(op, A, g, axes)`` over its channels k.

    ``layer``: a tensor's name, or "auto". ``weigh``: from the layer's value A, its gradient g and
    the axes of its positions. ``rectified``: negative sums become zero. ``upsampled``: enlarged to
    the input's positions, by ``interpolation``. ``guides``: times the input's own multipliers.
    """

    layer: str
    weigh: Callable[[Emitter, Tensor, Tensor, list[int]], Tensor]
    rectified: bool
    upsampled: bool
    interpolation: str
    guides: bool = False


@dataclass(frozen=True)
class Method:
    """One attribution method.

    ``table(options)``: the treatment of each operator class. ``attribution(op, m, x, x̄)``: what
    is reported, from multiplier, value and reference (None without one). ``needs_reference``:
    the attribution uses x̄. ``compares``: rules compare the model's values at x and x̄.
    ``complete``: attributions sum to S(x) − S(x̄). ``background``: the reference is K samples
    of which each draw has one: the first axis of a baseline is K. ``draws(options)``: evaluate
    multipliers at several points and average. ``variant(options)``: the method that its options
    make of it. ``perturbs(options)``: evaluate the model with parts of its input at
    the reference, and derive nothing. ``starts``: sweeps begin at the seed, or at the seeded value
    of the output. ``differentiates``: the method needs a differentiable path. ``clusters``: what
    counts as one nonlinearity: each operator, also single-variable ``regions`` where paths meet
    again, or also ``chains`` of nonlinearities. ``merges``: a bias or a BatchNormalization after a
    layer with weights is part of it. ``sums``: a sum counts as one, in however many nodes it is
    spelled. ``rectifiers``: a region is one or none as a whole, and the
    method changes these only. ``map(options)``: what is reported is a map over the positions of a
    layer. ``review(options, names)``: what to tell the user, given the
    names of the layers with weights. ``weights``: what stands in the weights' place, if not they
    themselves. ``signed``: attributions can be negative.
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
    clusters: Literal["", "regions", "chains", "rectifiers"] = ""
    merges: bool = False
    sums: bool = False
    review: Callable[[Options, Collection[str]], list[str]] | None = None
    weights: Literal["", "patterns", "weighted-patterns"] = ""
    signed: bool | Callable[[Options], bool] = True
    starts: Literal["seed", "value"] = "seed"
    differentiates: bool = True
    background: bool = False
    draws: Callable[[Options], Draws] | None = None
    variant: Callable[[Options], Method] | None = None
    perturbs: Callable[[Options], Occluded | Permuted] | None = None
    map: Callable[[Options], Map] | None = None

    def is_signed(self, options: Options) -> bool:
        """Whether attributions can be negative with these options."""
        return self.signed if isinstance(self.signed, bool) else self.signed(options)

    @property
    def defaults(self) -> dict[str, Any]:
        """The options' defaults."""
        return {option.name: option.default for option in self.options}

    def has(self, name: str) -> bool:
        """Whether the method has an option of that name."""
        return any(option.name == name for option in self.options)

    def chosen(self, given: Options) -> tuple[Method, dict[str, Any]]:
        """The method that the options make of this one, with all of its options."""
        if self.variant is None:
            return self, self.parse(given)
        own = {name: value for name, value in given.items() if self.has(name.replace("-", "_"))}
        method = self.variant(self.parse(own))
        return method, method.parse(given)

    def parse(self, given: Options) -> dict[str, Any]:
        """Fill in defaults and check values; raises OptionError on unknown names or bad values."""
        known = {option.name: option for option in self.options}
        spelled = {name.replace("-", "_"): value for name, value in given.items()}
        for name in spelled:
            if name not in known:
                raise OptionError(
                    f"method '{self.name}' has no option '{name}': {suggest(name, list(known))}"
                )
        for name, option in known.items():
            if option.required and name not in spelled:
                raise OptionError(f"method '{self.name}' needs '{name}': {option.help}")
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
    shares = {i: rule.difference(site, i) for i in site.active}
    given = {i: share for i, share in shares.items() if share is not None}
    return given if len(given) == len(shares) else sweep.decompose(site, rule)


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
