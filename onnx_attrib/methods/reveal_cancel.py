"""DeepLIFT's RevealCancel rule: the two parts of a difference have multipliers of their own.

A layer's output differs from its reference by what pushed it up and what pushed it down, and the
Rescale rule sees only what is left of both. RevealCancel (Shrikumar et al. 2017, §3.5.3) carries
Δ = Δ⁺ + Δ⁻ and multipliers m⁺ and m⁻:

- layers with weights (§3.5.1): Δy⁺ = Σ 1{wΔx > 0} wΔx, Δy⁻ alike, by the sign of the whole wΔx.
  x has one multiplier, Σ w m⁺ 1{wΔx > 0} + w m⁻ 1{wΔx < 0}, and Σ ½w (m⁺ + m⁻) where Δx = 0. With
  mean and half-difference of the two, m̂ ± δ, that is Wᵀm̂ + sign(Δx) |W|ᵀδ;
- sums and averages, alike;
- nonlinearities, over both orders of the two parts:
  Δy⁺ = ½[f(x̄ + Δx⁺) − f(x̄)] + ½[f(x) − f(x̄ + Δx⁻)], m_x⁺ = m_y⁺ · Δy⁺/Δx⁺, and Δy⁻ and m_x⁻
  alike; where a part vanishes, its limit, f' averaged over x̄ and x;
- what works entry by entry (a factor, a bias, a normalisation's constants, moving entries about)
  and maxima take both parts along, swapped by a negative factor;
- everything else (products of variables, softmax, normalisation, recurrence, and what is inside
  Loop, Scan and If) follows the Rescale rule and its kin, with m⁺ where Δy > 0, m⁻ where Δy < 0
  and their mean where Δy = 0: the parts of its outputs, as of the attributed tensors, are all or
  nothing of Δ by its sign;
- so do functions that are not defined everywhere (roots, logarithms, 1/x), because a part alone
  might lead outside, and entries where f is not finite at x̄ + Δx⁺ or x̄ + Δx⁻, or steeper on the
  way than floats can add up (some 200 times, in float32), but these take both parts along.

Every operator conserves m⁺Δ⁺ + m⁻Δ⁻, so the sum to S(x) − S(x̄) is exact. Parts live from a
nonlinearity back to the next layer only, because a layer asks for the sign of wΔx alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnx_attrib.ir import Tensor, operands
from onnx_attrib.methods.base import Shares, Sweeper, Table, Treatment
from onnx_attrib.methods.difference import at_reference, secant, winners
from onnx_attrib.rules.affine import layer_of
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Cotangent,
    Elementwise,
    Linear,
    MaxLike,
    Pair,
    Rule,
    Site,
    Structured,
)

Ends = tuple[Tensor, Tensor]
"""A tensor's values x̄ + Δ⁺ and x̄ + Δ⁻."""
Where = Callable[[Sweeper, Site], bool]
"""At which nonlinearities the two parts are told apart."""


def everywhere(sweep: Sweeper, site: Site) -> bool:
    return True


def after_convolutions(sweep: Sweeper, site: Site) -> bool:
    """Whether a convolution is among the layers that feed the site, with no layer between."""
    read = operands(site.node)
    pending, seen = [read[i] for i in site.active], set[str]()
    while pending:
        tensor = pending.pop()
        made = None if tensor.name in seen else sweep.made(tensor)
        seen.add(tensor.name)
        if made is None:
            continue
        source, rule = made
        layer = rule.layer if isinstance(rule, Bilinear) else ""
        if layer == "convolution":
            return True
        if not layer:
            read = operands(source.node)
            pending += [read[i] for i in source.active]
    return False


def after_others(sweep: Sweeper, site: Site) -> bool:
    """Whether no convolution is."""
    return not after_convolutions(sweep, site)


@dataclass(frozen=True)
class RevealCancel:
    """The table ``plain`` with RevealCancel at the nonlinearities that ``where`` says."""

    plain: Table
    where: Where

    def table(self) -> Table:
        """The treatment of each operator class."""
        return {
            Linear: self._linear,
            Bilinear: self._linear,
            Elementwise: self._nonlinear,
            MaxLike: self._side_by_side,
            Composite: self._plainly,
            Structured: self._plainly,
        }

    # -- backwards: multipliers ------------------------------------------------------------------

    def _plainly(self, sweep: Sweeper, site: Site, rule: Composite | Structured) -> Shares:
        """By the plain table, for the operator and for what is inside."""
        return self._treatment(rule)(sweep.using(self.plain), settled(site), rule)

    def _side_by_side(self, sweep: Sweeper, site: Site, rule: Rule) -> Shares:
        """By the plain table, which is linear in the multipliers, for both parts alike."""
        plain = self._treatment(rule)
        if not paired(site):
            return plain(sweep, site, rule)
        means, halves = (plain(sweep, lane, rule) for lane in lanes(site))
        return {i: self._pair(sweep, site, i, means[i], halves[i]) for i in means}

    def _linear(self, sweep: Sweeper, site: Site, rule: Linear | Bilinear) -> Shares:
        """Layers, sums and what goes entry by entry; else by the sign of the whole."""
        if not paired(site):
            return self._treatment(rule)(sweep, site, rule)
        layer = layer_of(site, rule) if isinstance(rule, Bilinear) else None
        if layer is not None:
            mean, half = (lane.m for lane in lanes(site))
            turned = site.op.Sign(step_of(site, layer.data))
            rest = site.op.Mul(turned, layer.back(half, layer.magnitude))
            return {layer.data: site.op.Add(layer.back(mean, layer.weight), rest)}
        if by_entry(site, rule):
            return self._entries(sweep, site, rule)
        if isinstance(rule, Linear) and summed(site, rule):
            return self._terms(sweep, site, rule)
        return self._treatment(rule)(sweep, settled(site), rule)

    def _entries(self, sweep: Sweeper, site: Site, rule: Linear | Bilinear) -> Shares:
        """m̂ times each factor, δ times its size: a negative one swaps m⁺ and m⁻."""
        shares = self._side_by_side(sweep, site, rule)
        for i, both in shares.items():
            factor = factor_of(site, rule, i)
            if isinstance(both, Pair) and factor is not None:
                half = site.op.Mul(lanes(site)[1].m, site.op.Abs(factor))
                shares[i] = replace(both, half=half)
        return shares

    def _terms(self, sweep: Sweeper, site: Site, rule: Linear) -> Shares:
        """m⁺ for terms wΔx > 0, m⁻ for terms < 0: w (m̂ + sign(wΔx) δ)."""
        op, (means, halves) = site.op, lanes(site)
        shares: Shares = {}
        for i in site.active:
            step = step_of(site, i)
            if rule.broadcasts:
                turned = op.Mul(op.Sign(rule.pull(with_m(site, step), i)), halves.m)
                shares[i] = rule.pull(with_m(site, op.Add(means.m, turned)), i)
            else:
                turned = op.Mul(op.Sign(step), rule.pull(halves, i))
                shares[i] = op.Add(rule.pull(means, i), turned)
        return shares

    def _nonlinear(self, sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
        """m⁺ · Δy⁺/Δx⁺ and m⁻ · Δy⁻/Δx⁻."""
        found = self._slopes(sweep, site, rule)
        if found is None:
            return self._side_by_side(sweep, site, rule)
        op, (same, apart), m = site.op, found, site.cotangents[0]
        if isinstance(m, Pair):
            mean = op.Add(op.Mul(same, m.mean), op.Mul(apart, m.half))
            half = op.Add(op.Mul(apart, m.mean), op.Mul(same, m.half))
        else:
            mean, half = op.Mul(same, m), op.Mul(apart, m)
        return {rule.operand: self._pair(sweep, site, rule.operand, mean, half)}

    def _treatment(self, rule: Rule) -> Treatment:
        return self.plain[type(rule)]

    def _pair(self, sweep: Sweeper, site: Site, i: int, mean: Tensor, half: Tensor) -> Pair:
        """The multipliers of input ``i`` of a site."""

        def tilt() -> Tensor:
            op, step, found = site.op, step_of(site, i), self.ends(sweep, site, i)
            if found is None:
                return op.Sign(step)
            return op.Where(op.Equal(step, 0.0), 0.0, op.Div(op.Sub(*found), step))

        return Pair(mean, half, tilt)

    # -- forwards: parts -------------------------------------------------------------------------

    def ends(self, sweep: Sweeper, site: Site, i: int) -> Ends | None:
        """x̄ + Δ⁺ and x̄ + Δ⁻ of input ``i``; None where Δ⁺ or Δ⁻ is all of Δ."""
        tensor = operands(site.node)[i]
        key = ("ends", tensor.name)
        if key not in sweep.kept:
            made = sweep.made(tensor)
            sweep.kept[key] = None if made is None else self._made(sweep, *made, tensor)
        found: Ends | None = sweep.kept[key]
        return found

    def _both_ends(self, sweep: Sweeper, site: Site, i: int) -> Ends:
        """The same, where one of them may be x and the other x̄."""
        found = self.ends(sweep, site, i)
        if found is not None:
            return found
        x, base = site.x(i), at_reference(site).x(i)
        return site.op.Max(x, base), site.op.Min(x, base)

    def _made(self, sweep: Sweeper, site: Site, rule: Rule, tensor: Tensor) -> Ends | None:
        """The ends of the output ``tensor`` of a site, from its inputs or from their ends."""
        layer = layer_of(site, rule) if isinstance(rule, Bilinear) else None
        if layer is not None:
            size = site.op.Abs(step_of(site, layer.data))
            return around(site, layer.forward(size, layer.magnitude))
        if isinstance(rule, Linear) and not by_entry(site, rule):
            return sum_ends(sweep, site, rule) if summed(site, rule) else None
        if all(self.ends(sweep, site, i) is None for i in site.active):
            return None
        sides = {i: self._both_ends(sweep, site, i) for i in site.active}
        if isinstance(rule, Linear | Bilinear):
            if not by_entry(site, rule):
                return None
            output = [t.name for t in site.node.outputs].index(tensor.name)
            return moved_ends(sweep, site, rule, sides, output)
        if isinstance(rule, MaxLike):
            return picked_ends(site, rule, sides)
        if isinstance(rule, Elementwise):
            same, apart = self._slopes(sweep, site, rule) or (secant(site, rule), None)
            return mapped_ends(site, rule, sides[rule.operand], same, apart)
        return None

    def _slopes(
        self, sweep: Sweeper, site: Site, rule: Elementwise
    ) -> tuple[Tensor, Tensor] | None:
        """Mean and half-difference of Δy⁺/Δx⁺ and Δy⁻/Δx⁻; None where both are Δy/Δx."""
        key = ("slopes", site.y.name)
        if key not in sweep.kept:
            found = None if rule.partial(site) else self.ends(sweep, site, rule.operand)
            if found is not None and not self.where(sweep, site):
                found = None
            sweep.kept[key] = None if found is None else slopes(sweep, site, rule, found)
        both: tuple[Tensor, Tensor] | None = sweep.kept[key]
        return both


# -- pairs -----------------------------------------------------------------------------------------


def paired(site: Site) -> bool:
    """Whether the two parts of an output have multipliers of their own."""
    return any(isinstance(m, Pair) for m in site.cotangents)


def settled(site: Site) -> Site:
    """The site with m⁺ where Δy > 0, m⁻ where Δy < 0 and their mean where Δy = 0."""

    def settle(m: Cotangent | None, y: Tensor, base: Tensor) -> Tensor | None:
        if not isinstance(m, Pair):
            return m
        return replace(m, tilt=lambda: site.op.Sign(site.op.Sub(y, base))).joined(site.op)

    found = map(settle, site.cotangents, site.outputs, at_reference(site).outputs)
    return replace(site, cotangents=tuple(found))


def lanes(site: Site) -> tuple[Site, Site]:
    """The site with the means of its pairs, and with their halves."""
    means = tuple(m.mean if isinstance(m, Pair) else m for m in site.cotangents)
    halves = tuple(m.half if isinstance(m, Pair) else None for m in site.cotangents)
    return replace(site, cotangents=means), replace(site, cotangents=halves)


def with_m(site: Site, m: Tensor) -> Site:
    return replace(site, cotangents=(m,))


def step_of(site: Site, i: int) -> Tensor:
    """Δx of input ``i``."""
    return site.op.Sub(site.x(i), at_reference(site).x(i))


# -- linear operators ------------------------------------------------------------------------------


def by_entry(site: Site, rule: Linear | Bilinear) -> bool:
    """Whether each output entry is one input entry times a number (or none), plus a number."""
    if (rule.caveat or isinstance(rule, Bilinear)) and not steady(site):
        return False
    alone = rule.broadcasts and len(site.active) == 1
    if isinstance(rule, Bilinear):
        return rule.flow == "scales" and alone
    return rule.flow != "mixes" or alone


def summed(site: Site, rule: Linear) -> bool:
    """Whether it is a sum of its active operands, or of entries with positive coefficients."""
    return (rule.broadcasts or rule.positive) and (not rule.caveat or steady(site))


def steady(site: Site) -> bool:
    """Whether what is not attributed is the same at the reference."""
    pairs = zip(site.inputs, at_reference(site).inputs, strict=True)
    return all(
        x is None or r is None or x.name == r.name
        for i, (x, r) in enumerate(pairs)
        if i not in site.active
    )


def factor_of(site: Site, rule: Linear | Bilinear, i: int) -> Tensor | None:
    """What an operator multiplies the entries of input ``i`` by; None if it is one."""
    if rule.flow == "moves":
        return None
    factor = rule.pull(with_m(site, site.graph.constant(1.0, site.graph.dtype(site.y))), i)
    value = site.graph.value(factor)
    return None if value is not None and np.all(value == 1) else factor


def around(site: Site, spread: Tensor) -> Ends:
    """The ends of y, from Δ⁺ − Δ⁻: beyond y and ȳ by what cancels, ½(Δ⁺ − Δ⁻ − |Δ|)."""
    op, y, base = site.op, site.y, at_reference(site).y
    rest = op.Mul(op.Sub(spread, op.Abs(op.Sub(y, base))), 0.5)
    # Where nothing cancels, rounding must not leave less than nothing.
    rest = op.Max(rest, 0.0)
    return op.Add(op.Max(y, base), rest), op.Sub(op.Min(y, base), rest)


def sum_ends(sweep: Sweeper, site: Site, rule: Linear) -> Ends:
    """Of a sum of terms: with all that are positive, and with all that are negative."""
    op, base = site.op, at_reference(site)
    if rule.broadcasts:
        sizes = [op.Abs(rule.pull(with_m(site, step_of(site, i)), i)) for i in site.active]
        return around(site, op.Sum(*sizes))
    pairs = {i: (site.x(i), base.x(i)) for i in site.active}
    high = sweep.again(site, {i: op.Max(*both) for i, both in pairs.items()})
    low = sweep.again(site, {i: op.Min(*both) for i, both in pairs.items()})
    return high.y, low.y


def moved_ends(
    sweep: Sweeper, site: Site, rule: Linear | Bilinear, sides: dict[int, Ends], output: int
) -> Ends:
    """Of what goes entry by entry: the operator at both ends, which a negative factor swaps."""
    high, low = (
        sweep.again(site, {i: side[k] for i, side in sides.items()}).outputs[output]
        for k in range(2)
    )
    factor = None if len(sides) > 1 else factor_of(site, rule, site.active[0])
    if factor is None:
        return high, low
    turned = site.op.Less(factor, 0.0)
    return site.op.Where(turned, low, high), site.op.Where(turned, high, low)


def picked_ends(site: Site, rule: MaxLike, sides: dict[int, Ends]) -> Ends:
    """Of a maximum: ȳ plus the parts of the winner, as much of each as of its whole difference."""
    op, base = site.op, at_reference(site)
    position, factor = winners(site, rule)

    def end(k: int) -> Tensor:
        parts = [
            op.Sub(sides[i][k], base.x(i)) if i in sides else None for i in range(len(site.inputs))
        ]
        return op.Add(base.y, op.Mul(factor, rule.take(site, parts, position)))

    return end(0), end(1)


def mapped_ends(
    site: Site, rule: Elementwise, side: Ends, same: Tensor, apart: Tensor | None
) -> Ends:
    """Of a nonlinearity: ȳ plus each part of x times its slope, ``same`` ± ``apart``."""
    op, base = site.op, at_reference(site)
    parts = [op.Sub(end, base.x(rule.operand)) for end in side]
    each = [same, same] if apart is None else [op.Add(same, apart), op.Sub(same, apart)]
    high, low = (op.Add(base.y, op.Mul(g, part)) for g, part in zip(each, parts, strict=True))
    return high, low


def slopes(sweep: Sweeper, site: Site, rule: Elementwise, side: Ends) -> tuple[Tensor, Tensor]:
    """Mean and half-difference of Δy⁺/Δx⁺ and Δy⁻/Δx⁻, each the mean of two secants."""
    op, base = site.op, at_reference(site)
    high, low = (sweep.again(site, {rule.operand: end}) for end in side)

    def between(a: Site, b: Site) -> Tensor:
        return secant(replace(a, reference=b), rule)

    up = site.midpoint(between(high, base), between(site, low))
    down = site.midpoint(between(low, base), between(site, high))
    same, apart = site.midpoint(up, down), op.Mul(op.Sub(up, down), 0.5)
    if rule.piecewise:
        return same, apart
    # Beside something so steep (or infinite, or no number), rounding hides the whole difference.
    plain = secant(site, rule)
    steepest = op.Mul(op.Add(op.Abs(plain), 1.0), 1 / site.tolerance(plain))
    sane = op.Less(op.Add(op.Abs(up), op.Abs(down)), steepest)
    return op.Where(sane, same, plain), op.Where(sane, apart, 0.0)
