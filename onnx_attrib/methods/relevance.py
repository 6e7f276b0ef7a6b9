"""Layer-wise relevance propagation, and deep Taylor decomposition.

Relevance starts at R = S(x) and goes back layer by layer; where paths meet it adds up. What
arrives at T, of T's shape, is the attribution. Bach et al. 2015 (doi 10.1371/journal.pone.0130140);
the rules are those of :mod:`onnx_attrib.methods.lrp_rules`.

- layers with weights (dense, convolutions; a bias or a BatchNormalization after one belongs to
  it): the rule that a name, the composite or ``rule`` gives them. Denominators include the bias, as
  the rule has it; the share of the bias is absorbed.
- activations, BatchNormalizations that no layer precedes, products with constants: R passes.
- a maximum: all to the winner (the first on ties). Entries that only move take R along.
- sums and averages: in proportion to the contributions, stabilised with 1e-6. A sum counts once,
  in however many nodes it is spelled, and a sum that is divided by a number as an average. The part
  of a constant is absorbed, unless no layer precedes (preprocessing); where one of the terms is a
  layer, the constant is that layer's bias. In deep Taylor decomposition that layer's data, or else
  the terms by their size, get the part.
- products of variables: evenly between the factors (``product=uniform``), or all to the signal
  and none to the gate (``signal``, Arras et al. 2017), if there is one: what comes out of a
  sigmoid, a hard sigmoid or a softmax. ``auto`` is signal, and uniform under attn-lrp, as its
  paper has it.
- inverses are scales and are held: of x / y all goes to x, so normalisations pass R on to their
  numerators (Achtibat et al. 2024, arXiv 2402.05602). The part of their shift is absorbed. One
  that no layer precedes passes R, where first layers have a rule of their own.
- softmax: R_i = x_i (R_i − s_i Σ_j R_j), from the same paper, x being the logits.
- everything else through its definition.

``epsilon`` is that of the ε rule; every other denominator has 1e-6, but for sums within
normalisations and sums of one term and constants, which R is in proportion to. In 16 bits it is at
least the type's own rounding. First layers are those that no layer with weights precedes in the
model, whatever is attributed; the input's part of a recurrent operator counts as one, and so does
that of a loop's body. Inside recurrent operators and bodies biases are constants of a sum. Patterns
match the names of layers with weights.

zennit has the same rules and composites. It differs in what is a module there and in what is not: a
functional activation, sum or product has the plain gradient; of several first layers only the one
that runs first has the special rule. There a composite's first convolution may come behind a dense
layer and still have the box.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import Graph, Tensor, is_float, is_narrow, operands
from onnx_attrib.methods.base import (
    Method,
    Option,
    Options,
    Shares,
    Sweeper,
    Table,
    inside,
    vjp,
    winner_takes_all,
)
from onnx_attrib.methods.lrp_rules import (
    COMPOSITES,
    PARTS,
    RULES,
    Assigned,
    Part,
    Setting,
    Term,
    needs_box,
)
from onnx_attrib.rules import lookup
from onnx_attrib.rules.affine import Layer, layer_of
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    MaxLike,
    Role,
    Site,
    Structured,
    Unsupported,
)
from onnx_attrib.rules.broadcast import same_shape

STABILIZER = 1e-6


@dataclass(frozen=True)
class Plan:
    """Which layer has which rule, and how products are split.

    ``named``: rules by patterns of node names, the first that matches; ``lines``: the others.
    ``constants``: whether those of sums take their part. ``exact``: sums have no stabiliser.
    """

    lines: tuple[Assigned, ...]
    default: Setting
    named: Mapping[str, Setting]
    signal: bool = False
    constants: bool = True
    exact: bool = False

    def setting(self, sweep: Sweeper, site: Site, rule: Bilinear) -> Setting:
        """The rule of a layer."""
        name = site.node.name or site.node.outputs[0].name
        for pattern, setting in self.named.items():
            if fnmatchcase(name, pattern):
                return setting
        for line in self.lines:
            if line.kind in ("", rule.layer) and (not line.first or sweep.first(site)):
                return replace(self.default, rule=line.rule)
        raise LookupError(f"no line of the composite is for {rule.op}")


# -- treatments ------------------------------------------------------------------------------------


def stabilized(site: Site, relevance: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """R / (z + ε · sign z), sign 0 = +1; without an ε, zero where z is."""
    op, dtype = site.op, site.graph.dtype(total)
    if is_narrow(dtype):
        epsilon = max(epsilon, 2.0**-7 if dtype.name == "bfloat16" else 2.0**-10)
    if epsilon == 0:
        return op.Where(op.Equal(total, 0.0), 0.0, op.Div(relevance, total))
    shift = op.Where(op.Less(total, 0.0), np.array(-epsilon, dtype), np.array(epsilon, dtype))
    return op.Div(relevance, op.Add(total, shift))


def layers(plan: Plan, sweep: Sweeper, site: Site, rule: Bilinear) -> Shares:
    """Layers with weights by their rule; products of variables split relevance."""
    layer = layer_of(site, rule)
    if layer is None:
        return products(plan, site, rule)
    setting = plan.setting(sweep, site, rule)
    if RULES[setting.rule]:
        return {layer.data: _by_rule(sweep, site, layer, setting)}
    if not same_shape(site.graph, layer.x, site.y):
        raise Unsupported("the rule 'pass' is for layers whose output has the shape of their input")
    return {layer.data: site.m}


def _by_rule(sweep: Sweeper, site: Site, layer: Layer, setting: Setting) -> Tensor:
    """R_x = Σ factor · Σ ± x_t ⊙ W_tᵀ (R / z) over the parts of the rule."""
    op, parts = site.op, _Parts(sweep, site, layer, setting)
    epsilon = setting.epsilon if setting.rule == "epsilon" else STABILIZER
    total: Tensor | None = None
    for part in RULES[setting.rule]:
        relevance = site.m
        if part.where:
            beyond = op.Greater if part.where == "+" else op.Less
            relevance = op.Where(beyond(layer.y, 0.0), relevance, 0.0)
        ratio = stabilized(site, relevance, parts.denominator(part), epsilon)
        if part.factor != 1:
            ratio = op.Mul(ratio, part.factor)
        for term in part.terms:
            share = layer.back(ratio, parts.weight(term))
            if term.x != "1":
                share = op.Mul(parts.data(term), share)
            total = _plus(site, total, share, term.sign)
    assert total is not None
    return total


def _plus(site: Site, total: Tensor | None, term: Tensor, sign: int) -> Tensor:
    if total is None:
        return term if sign > 0 else site.op.Neg(term)
    return site.op.Add(total, term) if sign > 0 else site.op.Sub(total, term)


class _Parts:
    """The parts of a layer's data, weights and bias that its rule asks for, each made once."""

    def __init__(self, sweep: Sweeper, site: Site, layer: Layer, setting: Setting) -> None:
        self.sweep, self.site, self.layer, self.setting = sweep, site, layer, setting
        self.bias = layer.bias if setting.biases else None
        self.made: dict[tuple[str, str], Tensor] = {}

    def data(self, term: Term) -> Tensor:
        if term.x in ("low", "high"):
            if ("x", term.x) not in self.made:
                data, setting = self.layer.data, self.setting
                ends = self.sweep.bounds(self.site, data, setting.low, setting.high)
                self.made["x", "low"], self.made["x", "high"] = ends
            return self.made["x", term.x]
        return self._part("x", self.layer.x, term.x)

    def weight(self, term: Term) -> Tensor:
        return self._part("w", self.layer.weight, term.w)

    def denominator(self, part: Part) -> Tensor:
        """Σ ± (W_t · x_t + b_t)."""
        total: Tensor | None = None
        for term in part.terms:
            bias = None
            if self.bias is not None and term.b is not None:
                bias = self._part("b", self.bias, term.b)
            if not (term.x or term.w) and bias is self.layer.bias:
                value = self.layer.y
            else:
                value = self.layer.forward(self.data(term), self.weight(term), bias)
            total = _plus(self.site, total, value, term.sign)
        assert total is not None
        return total

    def _part(self, what: str, tensor: Tensor, which: str) -> Tensor:
        if (what, which) not in self.made:
            self.made[what, which] = PARTS[which](self.site.graph, tensor, self.setting.gamma)
        return self.made[what, which]


def products(plan: Plan, site: Site, rule: Bilinear) -> Shares:
    """Evenly between the variable factors, or all to the signals; in sums, by proportion."""
    read = operands(site.node)
    factors = {i: _role(site.graph, read[i]) for i in site.active if i != rule.bias}
    for role in ("scale", "gate") if plan.signal else ("scale",):
        factors = {i: r for i, r in factors.items() if r != role} or factors
    if rule.flow == "scales":
        m = site.m if len(factors) == 1 else site.op.Mul(site.m, 1 / len(factors))
        return dict.fromkeys(factors, m)
    ratio = stabilized(site, site.m, site.y, STABILIZER)
    here = replace(site, cotangents=(ratio, *site.cotangents[1:]))
    shares = {i: site.op.Mul(site.x(i), rule.pull(here, i)) for i in site.active}
    count = len(factors)
    return {
        i: share if i == rule.bias or count == 1 else site.op.Mul(share, 1 / count)
        for i, share in shares.items()
        if i in factors or i == rule.bias
    }


def _role(graph: Graph, tensor: Tensor) -> Role:
    """Whether a factor is a gate or a scale, maybe with its entries moved or scaled on the way.

    One minus a gate is a gate too.
    """
    summed = False
    while tensor.inputs:
        node = tensor.inputs[0]
        varying = tuple(
            i
            for i, t in enumerate(node.inputs)
            if t.name and t.dtype is not None and is_float(t.dtype) and graph.value(t) is None
        )
        rule = lookup(node.op, node.domain, varying) if len(varying) == 1 else None
        if rule is None:
            return ""
        role = rule.role(graph, node)
        if role:
            return "" if summed and role == "scale" else role
        if isinstance(rule, Linear) and rule.broadcasts and rule.flow == "mixes":
            summed = True
        elif not isinstance(rule, Linear | Bilinear) or rule.flow == "mixes":
            return ""
        tensor = node.inputs[varying[0]]
    return ""


def proportional(plan: Plan, sweep: Sweeper, site: Site, rule: Linear) -> Shares:
    """Sums and averages in proportion to the contributions; what moves or is scaled passes."""
    if rule.flow == "moves":
        return vjp(sweep, site, rule)
    ignored = not plan.constants or sweep.scaled(site)
    alone = rule.broadcasts and len(site.active) == 1
    if rule.flow == "scales" or (alone and ignored):
        return dict.fromkeys(site.active, site.m)
    op, epsilon = site.op, 0.0 if alone or plan.exact else _stabilizer(site)
    ratios = [
        None if m is None else stabilized(site, m, y, epsilon)
        for m, y in zip(site.cotangents, site.outputs, strict=True)
    ]
    here = replace(site, cotangents=tuple(ratios))
    shares = {i: op.Mul(site.x(i), rule.pull(here, i)) for i in site.active}
    bearer, within = (getattr(site.node, name, None) for name in ("bearer", "within"))
    if rule.broadcasts and (len(site.active) < len(site.inputs) or any(within or ())):
        if bearer is not None:
            shares[bearer] = op.Add(shares[bearer], op.Mul(_constants(site), here.m))
        elif not plan.constants:
            shares = _shared(site, rule, here, within or ())
    return shares


def _shared(
    site: Site, rule: Linear, here: Site, within: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """(t + c · |t| / Σ |t|) R / y for the terms t of a sum y, whose constants are c in all.

    ``within``: what of each term is a constant. c is shared evenly where all t are zero.
    """
    op, tiny = site.op, 6e-5 if is_narrow(site.graph.dtype(site.y)) else 1e-37
    terms, constants = {i: site.x(i) for i in site.active}, [_constants(site)]
    for i, part in zip(site.active, within, strict=False):
        if part is not None:
            terms[i] = op.Sub(terms[i], part)
            constants.append(part)
    sizes = {i: op.Add(op.Abs(t), tiny) for i, t in terms.items()}
    common, total = op.Mul(op.Sum(*constants), here.m), op.Sum(*sizes.values())
    shares = {}
    for i, t in terms.items():
        part = op.Mul(common, op.Div(sizes[i], total))
        shares[i] = op.Add(op.Mul(t, rule.pull(here, i)), part)
    return shares


def _stabilizer(site: Site) -> float:
    """That of an average, if a sum has a factor that makes it one."""
    factors = [site.graph.value(factor) for _, factor in getattr(site.node, "late", ())]
    return STABILIZER / math.prod(float(abs(f)) for f in factors if f is not None)


def _constants(site: Site) -> Tensor:
    """What a sum's constants add to it."""
    zero = np.zeros((), site.graph.dtype(site.y))
    fixed = [zero if i in site.active else x for i, x in enumerate(site.inputs)]
    return site.graph.emit(site.node.op, *fixed, **site.node.attrs)


def unchanged(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
    """A nonlinearity passes relevance on."""
    return {rule.operand: site.m}


def taken_apart(plan: Plan, sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """Through the operator's definition; a distribution as x ⊙ the gradient of Σ R · log s.

    In a definition constants take their part and sums are divided by as they are: what arrives at
    a normalisation's centred entries is in proportion to them, but for the part of the shift.
    (Of the output to the last digit, which a sum near zero shows.)
    """
    if rule.moves and rule.pull is not None:
        return {i: rule.pull(site, i) for i in site.active}
    own_rule = any(line.first for line in plan.lines) and sweep.first(site)
    if rule.normalizes and own_rule and site.active == (0,):
        return {0: site.m}
    if not rule.distribution or rule.pull is None:
        within = _table(replace(plan, constants=True, exact=True))
        return sweep.using(within).decompose(site, rule, keep=True)
    op = site.op
    # No comparison holds for the NaN of rows that are masked altogether.
    something = op.Greater(op.Abs(site.y), 0.0)
    here = replace(site, cotangents=(op.Where(something, op.Div(site.m, site.y), 0.0),))
    shares = {}
    for i in site.active:
        slope = rule.pull(here, i)
        # A logit may be −∞.
        shares[i] = op.Where(op.Equal(slope, 0.0), 0.0, op.Mul(site.x(i), slope))
    return shares


def _table(plan: Plan) -> Table:
    return {
        Linear: partial(proportional, plan),
        Bilinear: partial(layers, plan),
        Elementwise: unchanged,
        MaxLike: winner_takes_all,
        Composite: partial(taken_apart, plan),
        Structured: inside,
    }


# -- options ---------------------------------------------------------------------------------------


def read_bound(value: Any) -> float | np.ndarray | None:
    """An end of the input's range: a number, an array or an .npy file."""
    if value is None or isinstance(value, np.ndarray | list | tuple):
        return None if value is None else np.asarray(value, np.float64)
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return np.asarray(np.load(value, allow_pickle=False), np.float64)
    except (OSError, ValueError, TypeError, EOFError):
        raise ValueError("a number, an array or an .npy file that exists") from None


def read_rules(value: Any) -> dict[str, dict[str, Any]] | None:
    """Rules by patterns of node names: a mapping, or a JSON or TOML file of one.

    An entry is the name of a rule, or a table of ``rule`` with ``epsilon``, ``gamma``, ``low`` or
    ``high``.
    """
    if value is None:
        return None
    given = value if isinstance(value, Mapping) else _loaded(value)
    return {str(pattern): _entry(str(pattern), entry) for pattern, entry in given.items()}


def _loaded(path: Any) -> Mapping[str, Any]:
    if not isinstance(path, str | os.PathLike):
        raise ValueError("a mapping from name patterns to rules, or a .json or .toml file of one")
    try:
        with open(path, "rb") as file:
            content = file.read()
        toml = os.fspath(path).endswith(".toml")
        loaded = tomllib.loads(content.decode()) if toml else json.loads(content)
    except OSError as error:
        raise OptionError(f"cannot read the rules '{path}': {error.strerror}") from None
    except ValueError as error:
        kind = "TOML" if toml else "JSON"
        raise OptionError(f"the rules '{path}' are not {kind}: {error}") from None
    if not isinstance(loaded, Mapping):
        raise OptionError(f"the rules '{path}' are no mapping from name patterns to rules")
    return loaded


def _entry(pattern: str, entry: Any) -> dict[str, Any]:
    given = dict(entry) if isinstance(entry, Mapping) else {"rule": entry}
    known = {option.name: option for option in (_RULE, _EPSILON, _GAMMA, _LOW, _HIGH)}
    for name in given:
        if name not in known:
            raise OptionError(f"the rule of '{pattern}' has no '{name}': {suggest(name, [*known])}")
    if "rule" not in given:
        raise OptionError(f"the rule of '{pattern}' is not named: add 'rule'")
    try:
        return {name: known[name].parse(value) for name, value in given.items()}
    except OptionError as error:
        raise OptionError(f"rules, '{pattern}': {error}") from None


_RULE = Option("rule", "epsilon", "the rule of layers with weights", tuple(RULES))
_EPSILON = Option("epsilon", 1e-6, "stabiliser of the rule 'epsilon'", minimum=0.0)
_GAMMA = Option("gamma", 0.25, "how much the rule 'gamma' favours what agrees", minimum=0.0)
_LOW = Option("low", None, "lowest value of the input: a number, an array or .npy", read=read_bound)
_HIGH = Option("high", None, "highest value of the input, alike", read=read_bound)


def _setting(rule: str, options: Options, biases: bool = True) -> Setting:
    low, high = (None if options[k] is None else np.asarray(options[k]) for k in ("low", "high"))
    if (low is None) != (high is None):
        raise OptionError("the input's range has two ends: give both low and high")
    if low is not None and high is not None:
        try:
            upside_down = bool(np.any(low > high))
        except ValueError:
            raise OptionError(
                f"low {list(low.shape)} and high {list(high.shape)} do not fit together"
            ) from None
        if upside_down:
            raise OptionError("low is above high")
    if needs_box(rule) and low is None:
        raise OptionError(f"the rule '{rule}' needs the input's range: give low and high")
    return Setting(rule, options["epsilon"], options["gamma"], low, high, biases)


def _lrp_table(options: Options) -> Table:
    lines = COMPOSITES.get(options["composite"], (Assigned(options["rule"]),))
    settings = [_setting(line.rule, options) for line in lines]
    named = {
        pattern: _setting(entry["rule"], {**options, **entry})
        for pattern, entry in (options["rules"] or {}).items()
    }
    usual = "uniform" if options["composite"] == "attn-lrp" else "signal"
    product = usual if options["product"] == "auto" else options["product"]
    return _table(Plan(lines, settings[0], named, product == "signal"))


def _unmatched(options: Options, names: Collection[str]) -> list[str]:
    """What to say of patterns that no layer's name matches."""
    lost = [p for p in options["rules"] or () if not any(fnmatchcase(name, p) for name in names)]
    some = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
    return [f"rules: no layer's name matches '{p}'; layers are: {some or 'none'}" for p in lost]


lrp = Method(
    name="lrp",
    summary="relevance of the input, passed back layer by layer from R = S(x)",
    g="1; layers with weights by their rule",
    paper="Bach et al. 2015, On Pixel-Wise Explanations; Montavon et al. 2019, LRP: An Overview",
    table=_lrp_table,
    attribution=lambda op, m, x, reference: m,
    options=(
        _RULE,
        Option(
            "composite",
            "none",
            "rules by kind of layer, instead of one for all",
            ("none", *COMPOSITES),
        ),
        _EPSILON,
        _GAMMA,
        _LOW,
        _HIGH,
        Option(
            "rules",
            None,
            "rules by name patterns (fnmatch) of nodes, the first that matches; the others keep "
            "theirs: a .json or .toml file",
            read=read_rules,
        ),
        Option(
            "product",
            "auto",
            "products of variables: evenly to the factors (uniform), or none to a gate (signal: "
            "sigmoid, softmax); auto: uniform under attn-lrp, else signal",
            ("auto", "uniform", "signal"),
        ),
    ),
    starts="value",
    clusters="chains",
    merges=True,
    sums=True,
    review=_unmatched,
)


def _deep_taylor_table(options: Options) -> Table:
    first = "wsquare" if options["low"] is None and options["high"] is None else "zbox"
    full = {"epsilon": STABILIZER, "gamma": 0.0, **options}
    lines = (Assigned(first, first=True), Assigned("zplus"))
    return _table(Plan(lines, _setting(first, full, biases=False), {}, constants=False))


deep_taylor = Method(
    name="deep-taylor",
    summary="relevance by z⁺, by the box z^B or w² at the input, without biases",
    g="1; layers with weights by z⁺, first ones by z^B or w²",
    paper="Montavon et al. 2017, Explaining NonLinear Classification Decisions (arXiv 1512.02479)",
    table=_deep_taylor_table,
    attribution=lambda op, m, x, reference: m,
    options=(_LOW, _HIGH),
    starts="value",
    clusters="chains",
    merges=True,
    sums=True,
)
