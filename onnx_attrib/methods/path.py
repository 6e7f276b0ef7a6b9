"""Integrated gradients: the gradient averaged over the straight line from x̄ to x.

(x − x̄) · ∫₀¹ ∂S/∂x (x̄ + α(x − x̄)) dα, Sundararajan et al. 2017 (arXiv 1703.01365). The integral
is a weighted sum over ``steps`` points on [0, 1]; ``gauss-legendre`` is exact for polynomials of
degree 2·steps − 1, ``trapezoid`` includes both ends, the others are Riemann sums. The attribution
has x's shape [N, …], and x̄ one sample or N.

Weights sum to 1. Captum's ``riemann_trapezoid`` has weights that sum to (steps − 1)/steps, so that
its attributions are smaller by that factor.
"""

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.methods.base import GRADIENT, Draws, Method, Option, Options


def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of a quadrature rule on [0, 1], both of shape [steps]."""
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid":
        if steps < 2:
            raise OptionError("the trapezoid rule includes both ends: 'steps' must be at least 2")
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps), weights
    offset = {"left": 0.0, "middle": 0.5, "right": 1.0}[rule]
    return (np.arange(steps) + offset) / steps, np.full(steps, 1 / steps)


def _draws(options: Options) -> Draws:
    points, weights = quadrature(options["quadrature"], options["steps"])
    return Draws(options["chunk"], tuple(weights), tuple(points))


integrated_gradients = Method(
    name="integrated-gradients",
    summary="(x − x̄) · mean gradient on the line from x̄ to x",
    g="f'(z), averaged over the path",
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks (arXiv 1703.01365)",
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: op.Mul(m, op.Sub(x, reference)),
    options=(
        Option("steps", 50, "number of points on the path", minimum=1),
        Option(
            "quadrature",
            "gauss-legendre",
            "how the points are placed and weighted",
            ("gauss-legendre", "trapezoid", "middle", "left", "right"),
        ),
        Option(
            "chunk",
            10,
            "points evaluated together; of larger batches fewer (not on CUDA)",
            minimum=1,
        ),
    ),
    needs_reference=True,
    complete=True,
    draws=_draws,
)
