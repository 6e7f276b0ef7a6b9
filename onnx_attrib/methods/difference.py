"""Treatments by differences: each conserves Σ m · Δ from its outputs to its inputs.

The formulas are those of DeepLIFT with the Rescale rule (:mod:`onnx_attrib.methods.deeplift`).
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.methods.base import Shares, Sweeper, numeric, scale
from onnx_attrib.rules.base import Bilinear, Elementwise, MaxLike, Site


def rescale(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
    """g(z) = Δf / Δz."""
    smooth = rule.secant is None and not (rule.piecewise or rule.kinked or rule.partial(site))
    single = site.graph.dtype(site.y) == np.float32
    found = switched(sweep, site, rule) if smooth and single else secant(site, rule)
    return {rule.operand: scale(site, site.m, found)}


_SHARPEST = 0.16
"""A change of slope, relative to the slopes, beyond which there is a kink in the largest step for
which the mean slope is used; proportionally less in a smaller one."""


_NOTHING = 1.7 * 2.0**-100
"""Added to a step and, times the slope, to the change: nothing beside any step but zero, where the
slope is left (ReLU6 of 48 channels of 112²: 1.5 ms, and 1.8 ms by selecting)."""


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
    change = op.Sub(site.y, reference.y)
    there = numeric(site, rule.derivative(reference))
    if rule.piecewise:
        # Without a step both slopes are the same, and the reference's may be a constant.
        return quotient(site, change, step, there)
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
    return op.Where(far, op.Div(change, step), mean)


def quotient(site: Site, change: Tensor, step: Tensor, slope: Tensor) -> Tensor:
    """change / step, and ``slope`` where there is no step."""
    op = site.op
    if site.graph.dtype(step) in (np.float32, np.float64):
        return op.Div(op.Add(change, op.Mul(slope, _NOTHING)), op.Add(step, _NOTHING))
    return op.Where(op.Equal(step, 0.0), slope, op.Div(change, step))


def switched(sweep: Sweeper, site: Site, rule: Elementwise) -> Tensor:
    """:func:`secant` of a smooth function, with nothing selected, which ONNX Runtime is slow at.

    (Δf + v · t) / (Δz + v), with v = 1 next to z̄ and 0 elsewhere, for t = f'(z̄) + f''(z̄) · Δz / 2:
    as t is Δf / Δz to second order, adding it to Δf and 1 to Δz changes nothing but where the two
    are small, and their rounding no longer counts. f' and f'' are those at z̄, which a fixed
    baseline makes constants (GELU of 8 × 197 × 768: 12 ms → 6 ms).
    """
    op, reference = site.op, at_reference(site)
    step = op.Sub(site.x(rule.operand), reference.x(rule.operand))
    bend = op.Mul(curvature(sweep, reference, rule), 0.5)
    slope = op.Add(op.Mul(step, bend), numeric(site, rule.derivative(reference)))
    near = op.HardSigmoid(op.Abs(step), alpha=-_STEEP, beta=_STEEP * _NEAR)
    above = op.Add(op.Sub(site.y, reference.y), op.Mul(near, slope))
    result: Tensor = op.Div(above, op.Add(step, near))
    return result


_NEAR, _STEEP = 2.0**-8, 2.0**60
"""The cube root of float32's epsilon; a slope that lets no float32 be between 0 and 1."""


def curvature(sweep: Sweeper, site: Site, rule: Elementwise) -> Tensor:
    """f''(z), from the slopes a little to both sides."""
    op, z = site.op, site.x(rule.operand)
    width = site.tolerance(z)
    slopes = [
        numeric(site, rule.derivative(sweep.again(site, {rule.operand: op.Add(z, shift)})))
        for shift in (width, -width)
    ]
    result: Tensor = op.Mul(op.Sub(*slopes), 0.5 / width)
    return result


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
    step, change = rule.take(site, steps, position), op.Sub(site.y, reference.y)
    return position, quotient(site, change, step, site.graph.constant(1.0, site.graph.dtype(step)))


def at_reference(site: Site) -> Site:
    """The site at the baseline."""
    if site.reference is None:
        raise LookupError("the method has no reference")
    return site.reference
