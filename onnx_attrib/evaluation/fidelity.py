"""How faithful and how stable attributions are: infidelity, max-sensitivity, completeness.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, On the (in)fidelity and sensitivity of explanations
(arXiv 1901.09392).

**Infidelity** is E_I[(Σ_{j in I} a_j − (S(x) − S(x with I at x̄)))²] over random subsets I of the
features (the subsets of sensitivity-n): the paper's definition for the perturbation (x − x̄) · 1_I
and attributions that are products with x − x̄. Methods have scales of their own, so attributions
are first multiplied by the β that makes the infidelity least, as the paper's experiments do and as
Captum's ``normalize=True`` does. In units of S².

**Max-sensitivity** is max ‖a(x') − a(x)‖ / ‖a(x)‖ over x' drawn around x, with every entry uniform
within ± the radius (Captum's ``sensitivity_max``). The target stays that of x. Without a unit.

**Completeness**: |Σ a − (S(x) − S(x̄))|, and the same relative to |S(x) − S(x̄)|.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_attrib.feeds import Array


def infidelity(sums: Array, changed: Array, scaled: bool = True) -> float:
    """The infidelity of one sample's attribution, from its sums over subsets and S's changes [M].

    ``scaled``: times the β of the least infidelity.
    """
    if scaled:
        length = float(sums @ sums)
        sums = sums * (float(sums @ changed) / length if length else 1.0)
    return float(np.mean((sums - changed) ** 2))


def neighbours(rng: np.random.Generator, x: Array, radius: float, several: int) -> Array:
    """``several`` points around x, every entry moved by up to ``radius``: [several, …]."""
    moved = x + rng.uniform(-radius, radius, (several, *x.shape))
    return moved.astype(x.dtype)


def max_sensitivity(explain: Callable[[Array], Array], attribution: Array, around: Array) -> float:
    """max ‖a(x') − a(x)‖ / ‖a(x)‖ over the points ``around`` [K, …] (1 in the place of ‖a(x)‖ = 0).

    ``explain``: attributions of points [K, …]; ``attribution``: that of x.
    """
    found = explain(around).astype(np.float64) - attribution
    size = float(np.linalg.norm(attribution)) or 1.0
    return float(np.linalg.norm(found.reshape(len(found), -1), axis=1).max() / size)


def residuals(sums: Array, differences: Array) -> tuple[Array, Array]:
    """|Σ a − (S(x) − S(x̄))| of each sample, absolute and relative to |S(x) − S(x̄)|: [N] each.

    Relative it is NaN where S(x) = S(x̄).
    """
    off, size = np.abs(sums - differences), np.abs(differences)
    with np.errstate(invalid="ignore", divide="ignore"):
        return off, np.where(size > 0, off / size, np.nan)


__all__ = ["infidelity", "max_sensitivity", "neighbours", "residuals"]
