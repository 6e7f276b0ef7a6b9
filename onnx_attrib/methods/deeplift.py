"""DeepLIFT with the Rescale rule, conserving on every architecture.

Multipliers m with Σ m·(x − x̄) = S(x) − S(x̄), exactly: every operator class conserves.

- elementwise: (f(z) − f(z̄)) / (z − z̄), and f' where the denominator vanishes;
- products: each factor's gradient with the other at its midpoint, or at x (``product=gradient``);
- maxima: with c = max(y, ȳ), (c − ȳ) to the winner at x and (y − c) to the winner at x̄, each
  over its own Δz; or everything to the winner at x (``maxpool=gradient``, the paper's);
- everything else through its definition.

Shrikumar et al. 2017 (arXiv 1704.02685) define the Rescale rule (§3.5.1) and leave products and
pooling open. Captum, SHAP and the original library pass plain gradients there, and so do not sum
to the difference on gated, normalised or pooled networks.
"""

from onnx_attrib.ir import Tensor
from onnx_attrib.methods.base import (
    Method,
    Option,
    Options,
    Shares,
    Sweeper,
    Table,
    conserving,
    inside,
    numeric,
    scale,
    vjp,
    winner_takes_all,
)
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    MaxLike,
    Site,
    Structured,
)


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
    slope = numeric(site, rule.derivative(site))
    if rule.piecewise:
        return op.Where(op.Equal(step, 0.0), slope, quotient)
    there = numeric(site, rule.derivative(reference))
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
    op, reference = site.op, at_reference(site)
    rose = op.GreaterOrEqual if rule.sense > 0 else op.LessOrEqual
    position = op.Where(rose(site.y, reference.y), rule.winner(site), rule.winner(reference))
    steps = [
        None if x is None or r is None or x.name == r.name else op.Sub(x, r)
        for x, r in zip(site.inputs, reference.inputs, strict=True)
    ]
    step = rule.take(site, steps, position)
    factor = op.Div(op.Sub(site.y, reference.y), step)
    factor = op.Where(op.Equal(step, 0.0), 1.0, factor)
    return rule.put(site, op.Mul(site.m, factor), position)


def at_reference(site: Site) -> Site:
    """The site at the baseline."""
    if site.reference is None:
        raise LookupError("the method has no reference")
    return site.reference


def _table(options: Options) -> Table:
    return {
        Linear: vjp,
        Bilinear: midpoint if options["product"] == "midpoint" else vjp,
        Elementwise: rescale,
        MaxLike: conserve if options["maxpool"] == "conserve" else winner_takes_all,
        Composite: conserving,
        Structured: inside,
    }


deeplift = Method(
    name="deeplift",
    summary="(x − x̄) · multiplier, summing exactly to S(x) − S(x̄): DeepLIFT, Rescale rule",
    g="(f(z) − f(z̄)) / (z − z̄)",
    paper="Shrikumar et al. 2017, Learning Important Features (arXiv 1704.02685)",
    table=_table,
    attribution=lambda op, m, x, reference: op.Mul(m, op.Sub(x, reference)),
    options=(
        Option(
            "maxpool",
            "conserve",
            "maxima: split between the winners at x and x̄, or all to the winner at x",
            ("conserve", "gradient"),
        ),
        Option(
            "product",
            "midpoint",
            "products of variables: the other factor at its midpoint, or at x",
            ("midpoint", "gradient"),
        ),
    ),
    needs_reference=True,
    compares=True,
    complete=True,
    clusters="regions",
)
