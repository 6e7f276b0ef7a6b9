"""The rules of LRP restated from the papers, on z_ij = x_i w_ij in float64.

z_ij is what input i contributes to output j; a convolution is unrolled to its matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper, parser

import onnx_attrib

from . import numeric
from .numeric import Array

STABILIZER, EPSILON, GAMMA, LOW, HIGH = 1e-6, 0.07, 0.3, -2.5, 3.5
OPTIONS = {"epsilon": EPSILON, "gamma": GAMMA, "low": LOW, "high": HIGH}


def text(body: str, **weights: Array) -> ModelProto:
    """A model from ONNX's text form, with ``weights`` as further initializers."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {body}')
    for name, value in weights.items():
        wide = value if value.dtype.kind in "iub" else value.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(wide, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def explain(
    model: ModelProto, x: Mapping[str, Array] | Array, method: str = "lrp", **options: Any
) -> dict[str, Array]:
    """Attributions and outputs by name, the target being the seed of ones if not given."""
    feeds = dict(x) if isinstance(x, Mapping) else {"x": x}
    options.setdefault("target", "seed")
    compiled = onnx_attrib.compile(model, method=method, **options)
    numeric.check_graph(compiled)
    if options["target"] == "seed":
        y = numeric.run(model, feeds)[model.graph.output[0].name]
        feeds["seed"] = np.ones_like(y)
    return numeric.run(compiled, feeds)


def relevance(model: ModelProto, x: Array, **options: Any) -> Array:
    return explain(model, x, **options)["x_attribution"].astype(np.float64)


def close(found: Array, expected: Array, relative: float = 1e-5) -> bool:
    return bool(np.abs(found - expected).max() <= relative * np.abs(expected).max())


# -- the rules, restated ---------------------------------------------------------------------------


def stable(z: Array, epsilon: float = STABILIZER) -> Array:
    return z + np.where(z < 0, -epsilon, epsilon)


def plus(a: Array) -> Array:
    return np.where(a > 0, a, 0)


def minus(a: Array) -> Array:
    return np.where(a < 0, a, 0)


def share(z: Array, constant: Array | float, r: Array, epsilon: float = STABILIZER) -> Array:
    """R_i = Σ_j z_ij / (Σ_i z_ij + constant_j) R_j, stabilised."""
    result: Array = (z / stable(z.sum(0) + constant, epsilon) * r).sum(1)
    return result


def epsilon_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    return share(x[:, None] * w, b, r, EPSILON)


def zplus_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    return share(plus(x[:, None] * w), plus(b), r)


def gamma_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    z = x[:, None] * w
    y = z.sum(0) + b
    up = share(z + GAMMA * plus(z), b + GAMMA * plus(b), np.where(y > 0, r, 0))
    down = share(z + GAMMA * minus(z), b + GAMMA * minus(b), np.where(y < 0, r, 0))
    return up + down


def alpha2beta1_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    z = x[:, None] * w
    return 2 * share(plus(z), plus(b), r) - share(minus(z), minus(b), r)


def wsquare_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    return share(w**2, b**2, r)


def flat_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    return share(links, 0.0, r)


def zbox_rule(x: Array, w: Array, b: Array, r: Array, links: Array) -> Array:
    return share(x[:, None] * w - LOW * plus(w) - HIGH * minus(w), 0.0, r)


RULES: dict[str, Callable[[Array, Array, Array, Array, Array], Array]] = {
    "epsilon": epsilon_rule,
    "zplus": zplus_rule,
    "gamma": gamma_rule,
    "alpha1beta0": zplus_rule,
    "alpha2beta1": alpha2beta1_rule,
    "wsquare": wsquare_rule,
    "flat": flat_rule,
    "zbox": zbox_rule,
}


def simple(first: float) -> ModelProto:
    """Captum's ``SimpleLRPModel``: dense layers of twos and threes with a ReLU between them.

    ``first``: the first weight of the first layer, which its tests change to −2.
    """
    a = np.full((3, 3), 2.0)
    a[0, 0] = first
    return text(
        "g (float[N, 3] x) => (float[N, 1] y) { h = MatMul(x, a) z = Relu(h) y = MatMul(z, c) }",
        a=a,
        c=np.full((3, 1), 3.0),
    )
