"""Maxima and minima over axes and over operands."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_attrib

from .numeric import check_conservation, run
from .test_indexing import Case, check, each
from .test_reduction import AXES, reducing

OVER_AXES = [
    reducing(op, label, keepdims)
    for op in ("ReduceMax", "ReduceMin")
    for label in AXES
    for keepdims in (0, 1)
]
SHAPES = {"x": (3, 4, 5), "z": (3, 1, 5), "u": (3, 4, 1)}
TWO = {"x": SHAPES["x"], "z": SHAPES["z"]}
BOUND = {"c": np.float32([[0.3], [-0.2], [0.0], [0.1]])}
OVER_OPERANDS = [
    case
    for op in ("Max", "Min")
    for case in (
        Case(f"{op} 1", f"y = {op}(x)", {"x": (3, 4)}),
        Case(f"{op} 2", f"y = {op}(x, z)", TWO),
        Case(f"{op} 3", f"y = {op}(z, x, u)", SHAPES),
        Case(f"{op} twice", f"a = Sigmoid(x) y = {op}(x, z, a, x)", TWO),
        Case(f"{op} constant", f"y = {op}(c, x)", {"x": (3, 4, 5)}, BOUND),
        Case(f"{op} two and a constant", f"y = {op}(x, c, z)", TWO, BOUND),
    )
]


@pytest.mark.parametrize(("case", "form"), each(OVER_AXES + OVER_OPERANDS))
def test_rule(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("form", ["fixed", "symbolic", "run-time"])
@pytest.mark.parametrize("label", ["inner", "last two"])
def test_first_of_equal_entries_wins(label: str, form: str) -> None:
    case = reducing("ReduceMax", label, 1)
    compiled = onnx_attrib.compile(case.model(form), method="gradient", inputs=["x"], target="seed")
    x = np.ones(case.floats["x"], np.float32)
    axes = tuple(case.parameters["axes"])
    seed = np.ones(x.max(axis=axes, keepdims=True).shape, np.float32)
    found = run(compiled, {**case.parameters, "x": x, "seed": seed})["x_attribution"]
    first = tuple(0 if k in {axis % 4 for axis in axes} else slice(None) for k in range(4))
    assert found.sum() == seed.size
    assert (found[first] == 1).all()


@pytest.mark.parametrize("label", ["inner", "last two"])
def test_ties_conserve(label: str) -> None:
    """Entries equal within a point, between points, and both."""
    model = reducing("ReduceMax", label, 0).model("symbolic")
    rng = np.random.default_rng(0)
    for spread in (1, 2, 3):
        x, reference = rng.integers(0, spread, (2, 3, 4, 2, 5)).astype(np.float32)
        check_conservation(model, ({"x": x}, {"x": reference}))


def test_max_with_zero_is_a_relu() -> None:
    """Max(x, 0) is attributed like Relu: no share at a tie, guided like one."""
    zero = {"c": np.zeros((), np.float32)}
    shape = {"x": (2, 5)}
    spelled = Case("Max", "a = Max(x, c) y = Mul(a, a)", shape, zero).model("fixed")
    plain = Case("Relu", "a = Relu(x) y = Mul(a, a)", shape).model("fixed")
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    x[0, 0] = 0
    for method in ("gradient", "deeplift"):
        feeds = {"x": x, "seed": np.ones((2, 5), np.float32)}
        left, right = (
            run(onnx_attrib.compile(m, method=method, target="seed"), feeds)["x_attribution"]
            for m in (spelled, plain)
        )
        np.testing.assert_array_equal(left, right)
