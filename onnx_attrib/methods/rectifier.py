"""Deconvnet and guided backprop: the gradient with another rule at ReLUs.

At a ReLU y = max(z, 0) with the multiplier m of y, the multiplier of z is

- gradient: f'(z) · m;
- deconvnet: max(m, 0), whatever the sign of z (Zeiler and Fergus 2014), times the slope for
  positive z where it is not 1 (SELU);
- guided backprop: f'(z) · max(m, 0) (Springenberg et al. 2015).

The same holds for the ReLU's kin: LeakyRelu, PRelu, Elu, Selu, Celu, ThresholdedRelu, a Clip at
zero (ReLU6), and regions that spell one out (Where(x > 0, x, 0)). Everything else passes the plain
gradient, a maximum to the winner, and the compiler's notes name the other nonlinearities. What is
reported is the multiplier, of x's shape [N, …], as in Captum; Captum changes ``nn.ReLU`` modules
only.
"""

from onnx_attrib.ir import Tensor
from onnx_attrib.methods.base import (
    GRADIENT,
    Method,
    Shares,
    Sweeper,
    Table,
    Treatment,
    derivative,
    fused,
    scale,
    vjp,
)
from onnx_attrib.rules.base import Bilinear, Composite, Elementwise, Site


def at_rectifiers(gated: bool) -> Treatment:
    """max(m, 0) at ReLUs, times f'(z) if ``gated``; f'(z) · m elsewhere."""

    def treat(sweep: Sweeper, site: Site, rule: Elementwise) -> Shares:
        slope = rule.relu_like(site)
        if not slope:
            sweep.enter(site, "plain")
            return derivative(sweep, site, rule)
        sweep.enter(site, "rectifier")
        m: Tensor = site.op.Relu(site.m)
        if gated:
            return {rule.operand: scale(site, m, rule.derivative(site))}
        return {rule.operand: m if slope == 1 else site.op.Mul(m, slope)}

    return treat


def product(sweep: Sweeper, site: Site, rule: Bilinear) -> Shares:
    """The gradient; of several variable factors it is worth a note."""
    if len(site.active) > 1:
        sweep.enter(site, "plain")
    return vjp(sweep, site, rule)


def composite(sweep: Sweeper, site: Site, rule: Composite) -> Shares:
    """The gradient, with a note."""
    sweep.enter(site, "plain")
    return fused(sweep, site, rule)


def _table(gated: bool) -> Table:
    return {
        **GRADIENT,
        Elementwise: at_rectifiers(gated),
        Bilinear: product,
        Composite: composite,
    }


GUIDED: Table = _table(gated=True)

deconvnet = Method(
    name="deconvnet",
    summary="the gradient, at ReLUs only where it is positive, whatever the ReLU's input",
    g="[m > 0] at ReLUs, f'(z) elsewhere",
    paper="Zeiler, Fergus 2014, Visualizing and Understanding CNNs (arXiv 1311.2901)",
    table=lambda options: _table(gated=False),
    attribution=lambda op, m, x, reference: m,
    clusters="rectifiers",
)

guided_backprop = Method(
    name="guided-backprop",
    summary="the gradient, at ReLUs only where it is positive",
    g="f'(z) · [m > 0] at ReLUs, f'(z) elsewhere",
    paper="Springenberg et al. 2015, Striving for Simplicity (arXiv 1412.6806)",
    table=lambda options: GUIDED,
    attribution=lambda op, m, x, reference: m,
    clusters="rectifiers",
)
