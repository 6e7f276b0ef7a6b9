"""Sums, means, norms and products over any axes, kept or not, known or not."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_attrib

from .numeric import Array, check_conservation, check_gradient, run
from .test_indexing import Case, check, each, ints

X = {"x": (3, 4, 2, 5)}
AXES: dict[str, Array | None] = {
    "inner": ints(1),
    "last two": ints(-1, 2),
    "first": ints(0, 2),
    "every": ints(0, 1, 2, 3),
    "default": None,
}
SUMS = ["ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum"]


def reducing(op: str, label: str, keepdims: int, **options: object) -> Case:
    """A reduction of x over the axes of that label."""
    axes = AXES[label]
    parameters = {} if axes is None else {"axes": axes}
    return Case(
        f"{op} {label} {'kept' if keepdims else 'dropped'}",
        f"y = {op}<keepdims={keepdims}>({', '.join(['x', *parameters])})",
        X,
        parameters,
        apart=axes is not None and 0 not in axes,
        positive=op == "ReduceLogSum",
        **options,  # type: ignore[arg-type]
    )


CASES = [reducing(op, label, keepdims) for op in SUMS for label in AXES for keepdims in (0, 1)]
PRODUCTS = [
    reducing("ReduceProd", label, keepdims)
    for label in ("inner", "last two", "default")
    for keepdims in (0, 1)
]
LEFT_ALONE = [
    Case(op, f"y = {op}<noop_with_empty_axes=1>(x)", X)
    for op in ("ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax")
]


@pytest.mark.parametrize(("case", "form"), each(CASES + PRODUCTS + LEFT_ALONE))
def test_rule(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("form", ["fixed", "symbolic", "run-time"])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_product_with_zeros(zeros: int, form: str) -> None:
    """The gradient is the product of the others, also where one or two entries vanish."""
    case = reducing("ReduceProd", "inner", 1)
    model = case.model(form)
    rng = np.random.default_rng(zeros)
    x, reference = rng.standard_normal((2, 3, 4, 2, 5)).astype(np.float32)
    x[:, :zeros] = 0
    given = case.parameters if form == "run-time" else {}
    pairs = [({**given, "x": a}, {"x": b}) for a, b in ((x, reference), (reference, x))]
    check_gradient(model, {**given, "x": x}, inputs=["x"])
    check_conservation(model, *pairs, inputs=["x"])


def test_norm_at_zero_is_finite() -> None:
    """Where both points vanish (padding) nothing is attributed, and nothing is NaN."""
    model = reducing("ReduceL2", "inner", 1).model("fixed")
    rng = np.random.default_rng(0)
    x, reference = rng.standard_normal((2, 3, 4, 2, 5)).astype(np.float32)
    x[0] = 0
    reference[0, :, 0] = 0
    check_conservation(model, ({"x": x}, {"x": reference}))
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    seed = np.ones((3, 1, 2, 5), np.float32)
    found = run(compiled, {"x": x, "seed": seed})["x_attribution"]
    assert np.isfinite(found).all()
    assert not found[0].any()


def test_sum_stays_lazy() -> None:
    """The cotangent of a mean is not written out before the product that needs it."""
    model = Case("mean", "a = Sigmoid(x) y = ReduceMean(a, axes)", X, {"axes": ints(2, 3)})
    compiled = onnx_attrib.compile(model.model("symbolic"), method="gradient", target="seed")
    assert "Expand" not in [node.op_type for node in compiled.graph.node]
