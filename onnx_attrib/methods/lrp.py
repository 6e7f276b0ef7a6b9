"""ε-LRP as a modified gradient (Ancona et al. 2017, Proposition 1).

x · ∂ᵍS/∂x with g(z) = f(z) / (z + ε·sign z), sign 0 = +1, and f'(0) at z = 0. On networks of
ReLUs without it this is gradient × input. A product of two variables halves the multiplier to
each, so relevance is split evenly; a maximum takes all; normalisations are followed through their
definitions; Softmax passes its gradient, as in the paper's implementation. The attribution has x's
shape [N, …].

Layer by layer, as in zennit and :mod:`onnx_attrib.methods.relevance`, every layer and sum has a
stabiliser, also where no nonlinearity follows. On layers and nonlinearities in turn that is the
same, up to ε.
"""

from onnx_attrib.methods.base import (
    GRADIENT,
    Method,
    Option,
    Options,
    Shares,
    Sweeper,
    Table,
    Treatment,
    definition,
    fused,
    numeric,
    scale,
)
from onnx_attrib.rules.base import Bilinear, Composite, Elementwise, Site


def ratio(epsilon: float) -> Treatment:
    """g(z) = f(z) / (z + ε·sign z); f'(0) where z is exactly zero."""

    def treat(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
        op, z = site.op, site.x(rule.operand)
        stabilizer = op.Where(op.Less(z, 0.0), op.Sub(z, epsilon), op.Add(z, epsilon))
        quotient = op.Div(site.y, stabilizer)
        slope = numeric(site, rule.derivative(site))
        return {rule.operand: scale(site, site.m, op.Where(op.Equal(z, 0.0), slope, quotient))}

    return treat


def split_evenly(sweep: Sweeper, site: Site, rule: Bilinear) -> Shares:
    """Each of k variable factors receives 1/k of its gradient: relevance is conserved."""
    shares = {i: rule.pull(site, i) for i in site.active}
    if len(shares) < 2:
        return shares
    return {i: site.op.Mul(share, 1 / len(shares)) for i, share in shares.items()}


def apart(sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """Through the operator's definition; a distribution passes its gradient."""
    return fused(sweep, site, rule) if rule.distribution else definition(sweep, site, rule)


def _table(options: Options) -> Table:
    return {
        **GRADIENT,
        Elementwise: ratio(options["epsilon"]),
        Bilinear: split_evenly,
        Composite: apart,
    }


epsilon_lrp = Method(
    name="epsilon-lrp",
    summary="x · ∂ᵍS/∂x: layer-wise relevance propagation with the ε rule, as a gradient",
    g="f(z) / (z + ε·sign z)",
    paper="Bach et al. 2015, On Pixel-Wise Explanations; Ancona et al. 2017 (arXiv 1711.06104)",
    table=_table,
    attribution=lambda op, m, x, reference: op.Mul(m, x),
    options=(Option("epsilon", 1e-4, "stabiliser of the denominator", minimum=0.0),),
    clusters="chains",
)
