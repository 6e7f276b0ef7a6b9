"""The k largest entries along an axis: sizes known and not, k large and small."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_attrib
from onnx_attrib import UnsupportedOpError

from .numeric import Array, check_conservation, check_gradient, run
from .test_indexing import Case, check, each, ints


def top(name: str, k: int, attributes: str, shape: tuple[int, ...] = (3, 7, 4)) -> Case:
    nodes = f"a, i = TopK<{attributes}>(x, k) w = Exp(a) y = Mul(w, a)"
    return Case(f"TopK {name}", nodes, {"x": shape}, {"k": ints(k)})


CASES = [
    top("first", 1, "axis=1"),
    top("last", 1, "axis=-1, largest=0"),
    top("three", 3, "axis=1"),
    top("smallest", 2, "axis=2, largest=0"),
    top("all", 4, "axis=-1"),
    top("one of one", 1, "axis=1", (3, 1, 2)),
    top("many", 35, "axis=1", (2, 40)),
]


@pytest.mark.parametrize(("case", "form"), each(CASES))
def test_rule(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("form", ["fixed", "symbolic", "run-time"])
@pytest.mark.parametrize("spread", [1, 2, 3])
def test_ties(spread: int, form: str) -> None:
    """Entries equal within a point, between points, and both."""
    case = top("three", 3, "axis=1")
    rng = np.random.default_rng(spread)
    given = case.parameters if form == "run-time" else {}
    x, base = rng.integers(0, spread, (2, 3, 7, 4)).astype(np.float32)
    check_conservation(case.model(form), ({**given, "x": x}, {"x": base}), inputs=["x"])


def mean_at_ranks(x: Array, base: Array, m: Array, largest: bool) -> Array:
    """For each entry of a vector, the mean of m at its rank over many points from base to x."""
    total, points = np.zeros(len(x)), 4000
    for alpha in (np.arange(points) + 0.5) / points:
        z = base + alpha * (x - base)
        for rank, entry in enumerate(np.argsort(-z if largest else z)[: len(m)]):
            total[entry] += m[rank] / points
    return total


@pytest.mark.parametrize("largest", [0, 1])
def test_by_ranks_it_is_the_gradient_averaged_on_the_line(largest: int) -> None:
    case = Case("TopK", f"y, i = TopK<axis=0, largest={largest}>(x, k)", {"x": (6,)}, apart=False)
    case.parameters["k"] = ints(4)
    compiled = onnx_attrib.compile(
        case.model("run-time"), target="seed", baseline="input", inputs=["x"]
    )
    rng = np.random.default_rng(largest)
    for _ in range(5):
        x, base = rng.standard_normal((2, 6)).astype(np.float32)
        m = rng.standard_normal(4).astype(np.float32)
        feeds = {"x": x, "x_baseline": base, "seed": m, "k": ints(4)}
        expected = mean_at_ranks(x, base, m, bool(largest)) * (x - base)
        np.testing.assert_allclose(run(compiled, feeds)["x_attribution"], expected, atol=3e-3)


def test_masked_entries() -> None:
    """Entries that are -inf at both points take no part."""
    case = top("three", 3, "axis=0", (7,))
    compiled = onnx_attrib.compile(
        case.model("run-time"), target="seed", baseline="input", inputs=["x"]
    )
    rng = np.random.default_rng(0)
    x, base = rng.standard_normal((2, 7)).astype(np.float32)
    x[2] = base[2] = -np.inf
    feeds = {"x": x, "x_baseline": base, "seed": np.ones(3, np.float32), "k": ints(3)}
    found = np.delete(run(compiled, feeds)["x_attribution"], 2)
    y, y_bar = (run(case.model("run-time"), {"x": v, "k": ints(3)})["y"] for v in (x, base))
    np.testing.assert_allclose(found.sum(), (y - y_bar).sum(), rtol=1e-5)


def test_unsorted_entries_are_refused() -> None:
    """Which entry comes where is up to the runtime, so that y and ȳ cannot be compared."""
    model = top("unsorted", 3, "axis=1, sorted=0").model("fixed")
    check_gradient(model, {"x": np.random.default_rng(0).standard_normal((3, 7, 4), np.float32)})
    with pytest.raises(UnsupportedOpError, match="unsorted"):
        onnx_attrib.compile(model, method="deeplift", target="seed")
