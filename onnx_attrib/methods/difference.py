"""Treatments by differences: each conserves Σ m · Δ from its outputs to its inputs.

The formulas are those of DeepLIFT with the Rescale rule (:mod:`onnx_attrib.methods.deeplift`).
"""

from __future__ import annotations

from onnx_attrib.ir import Tensor
from onnx_attrib.methods.base import Shares, Sweeper, numeric, scale
from onnx_attrib.rules.base import Bilinear, Elementwise, MaxLike, Site


def rescale(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
    """g(z) = Δf / Δz."""
    return {rule.operand: scale(site, site.m, secant(site, rule))}


_SHARPEST = 0.16
"""A change of slope, relative to the slopes, beyond which there is a kink in the largest step for
which the mean slope is used; proportionally less in a smaller one."""


def secant(site: Site, rule: Elementwise) -> Tensor:
    """Δf / Δz by the closed form, or the quotient with its limit where Δz vanishes.

    Near z = z̄ the quotient is all rounding error; there the mean slope of both ends is used,
    which is right to second order. The switch is at the cube root of the machine epsilon, where
    both errors are small. Piecewise linear functions have exact quotients and need it at zero only.
    """
    closed = rule.secant(site) if rule.secant is not None else None
    if closed is not None:
        return closed
    op, reference = site.op, at_reference(site)
    step = op.Sub(site.x(rule.operand), reference.x(rule.operand))
    quotient = op.Div(op.Sub(site.y, reference.y), step)
    there = numeric(site, rule.derivative(reference))
    if rule.piecewise:
        # Without a step both slopes are the same, and the reference's may be a constant.
        return op.Where(op.Equal(step, 0.0), there, quotient)
    slope = numeric(site, rule.derivative(site))
    mean = site.midpoint(slope, there)
    # "Not greater" also catches the NaN of two equal infinities (masked logits).
    size = op.Abs(step)
    far = op.Greater(size, site.tolerance(step))
    if rule.kinked:
        # A kink between the two: the slopes differ by more than they could bend on the way.
        both = op.Add(op.Add(op.Abs(slope), op.Abs(there)), 1.0)
        bend = op.Mul(op.Mul(size, _SHARPEST / site.tolerance(step)), both)
        far = op.Or(far, op.Greater(op.Abs(op.Sub(slope, there)), bend))
    return op.Where(far, quotient, mean)


def midpoint(sweep: Sweeper, site: Site, rule: Bilinear) -> Shares:
    """Each factor's gradient with the others halfway between value and reference."""
    halfway = site.at_midpoint()
    return {i: rule.pull(halfway, i) for i in site.active}


def conserve(sweep: Sweeper, site: Site, rule: MaxLike) -> Shares:
    """Δy to the winner at x if the maximum rose, to the winner at x̄ if it fell.

    The winner's own Δz is at least as large and of the same sign, so the factor is in [0, 1].
    """
    position, factor = winners(site, rule)
    return rule.put(site, site.op.Mul(site.m, factor), position)


def winners(site: Site, rule: MaxLike) -> tuple[Tensor, Tensor]:
    """The position of the entry that each output's difference is due to, and Δy over its Δz."""
    op, reference = site.op, at_reference(site)
    rose = op.GreaterOrEqual if rule.sense > 0 else op.LessOrEqual
    position = op.Where(rose(site.y, reference.y), rule.winner(site), rule.winner(reference))
    steps = [
        None if x is None or r is None or x.name == r.name else op.Sub(x, r)
        for x, r in zip(site.inputs, reference.inputs, strict=True)
    ]
    step = rule.take(site, steps, position)
    factor = op.Div(op.Sub(site.y, reference.y), step)
    return position, op.Where(op.Equal(step, 0.0), 1.0, factor)


def at_reference(site: Site) -> Site:
    """The site at the baseline."""
    if site.reference is None:
        raise LookupError("the method has no reference")
    return site.reference
