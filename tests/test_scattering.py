"""Scatters that multiply or compare what meets at an entry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnx_attrib

from .numeric import Array, check_conservation, check_gradient, run
from .test_indexing import Case, check, each, ints

HOW = ("mul", "max", "min")


def scattering(op: str, how: str, label: str) -> Case:
    """Some entries get no update, some one, some several."""
    name = f"{op} {how} {label}"
    if op == "ScatterND":
        index = {"rows": ints(2, 0, 2, -2, 0), "entries": ints(1, 2, 3, 0, 1, 2, -3, 2)}[label]
        depth = 1 if label == "rows" else 2
        index = index.reshape(-1, depth)
        floats = {"x": (4, 3, 2)[: 3 if depth == 1 else 2]}
        floats["u"] = (len(index), *floats["x"][depth:])
        nodes = f'y = ScatterND<reduction="{how}">(x, i, u)'
        return Case(name, nodes, floats, {"i": index}, apart=False)
    axis, shape = (1, (2, 5)) if label == "last" else (0, (3, 4))
    index = ints(0, 4, -2, 1, 0, 0, 2, 2) if label == "last" else ints(0, 2, 2, 1, 0, 2, 1, 0)
    index = index.reshape(2, 4)
    nodes = f'y = ScatterElements<axis={axis}, reduction="{how}">(x, i, u)'
    return Case(name, nodes, {"x": shape, "u": index.shape}, {"i": index}, apart=False)


CASES = [
    scattering(op, how, label)
    for op, labels in (("ScatterND", ("rows", "entries")), ("ScatterElements", ("last", "first")))
    for how in HOW
    for label in labels
]


@pytest.mark.parametrize(("case", "form"), each(CASES))
def test_rule(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zeros_and_ties(case: Case) -> None:
    """Small whole numbers: factors that vanish, at one point or both, and extremes that tie."""
    rng = np.random.default_rng(0)

    def point() -> dict[str, Array]:
        return {k: rng.integers(-1, 2, d).astype(np.float32) for k, d in case.floats.items()}

    check_conservation(case.model("symbolic"), *[(point(), point()) for _ in range(4)])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["float16", "double"])
def test_types(how: str, name: str) -> None:
    dtype = {"float16": np.float16, "double": np.float64}[name]
    case = scattering("ScatterElements", how, "last")
    model = case.model("fixed")
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    del model.graph.value_info[:]
    rng = np.random.default_rng(0)
    pair: list[dict[str, Array]] = [
        {k: rng.standard_normal(d).astype(dtype) for k, d in case.floats.items()} for _ in "xb"
    ]
    if name == "float16" and how == "mul":
        # ONNX Runtime's CPU provider has no kernel for the model itself.
        assert onnx_attrib.compile(model, target="seed")
        return
    check_gradient(model, pair[0])
    check_conservation(model, (pair[0], pair[1]))


def attribution(case: Case, m: Array, here: dict[str, Array], there: dict[str, Array]) -> Any:
    compiled = onnx_attrib.compile(case.model("symbolic"), target="seed", baseline="input")
    feeds = {**here, "seed": m, **{f"{k}_baseline": v for k, v in there.items()}}
    found = run(compiled, feeds)
    return {k: found[f"{k}_attribution"] for k in here}


def test_extremes_go_to_the_winner_of_the_larger_point() -> None:
    """As for a maximum over a window: Δy to the winner at x where y rose, else to that at x̄."""
    nodes = 'y = ScatterElements<axis=0, reduction="max">(x, i, u)'
    case = Case("max", nodes, {"x": (2,), "u": (3,)}, {"i": ints(0, 0, 1)}, apart=False)
    here = {"x": np.float32([1, 2]), "u": np.float32([5, 3, 0])}
    there = {"x": np.float32([2, 4]), "u": np.float32([0, 4, 1])}
    found = attribution(case, np.ones(2, np.float32), here, there)
    # y is [5, 2], ȳ [4, 4]: the first rose, by the first update; the second fell, at the data.
    np.testing.assert_allclose(found["u"], [1, 0, 0])
    np.testing.assert_allclose(found["x"], [0, -2])


def test_products_telescope() -> None:
    """The weight of a factor: those before at x times those behind at x̄, and the other way."""
    nodes = 'y = ScatterElements<axis=0, reduction="mul">(x, i, u)'
    index = ints(1, 0, 1, 1, 0, 1, 2)
    case = Case("mul", nodes, {"x": (4,), "u": (7,)}, {"i": index}, apart=False)
    rng = np.random.default_rng(0)
    here, there = (
        {k: rng.standard_normal(d).astype(np.float32) for k, d in case.floats.items()} for _ in "xb"
    )
    m = rng.standard_normal(4).astype(np.float32)
    expected = np.zeros(7)
    for place in range(3):
        (members,) = np.nonzero(index == place)
        scale = m[place] * (here["x"][place] + there["x"][place]) / 2
        for k, member in enumerate(members):
            weights = []
            for a, b in itertools.permutations((here["u"], there["u"])):
                weights.append(a[members[:k]].prod() * b[members[k + 1 :]].prod())
            step = here["u"][member] - there["u"][member]
            expected[member] = scale * np.mean(weights) * step
    found = attribution(case, m, here, there)
    np.testing.assert_allclose(found["u"], expected, rtol=1e-4, atol=1e-6)


def test_one_reference_for_all_samples() -> None:
    """Indices that are computed for each sample, and a reference of batch 1."""
    nodes = """s = Shape(x) e = Expand(i, s) u = Tanh(x)
        y = ScatterElements<axis=1, reduction="mul">(x, e, u)"""
    case = Case("shared", nodes, {"x": (3, 4)}, {"i": ints(0, 2, 2, 0).reshape(1, 4)})
    model = case.model("symbolic")
    rng = np.random.default_rng(0)
    x, base = (rng.standard_normal(d).astype(np.float32) for d in ((3, 4), (1, 4)))
    for how in HOW:
        model.graph.node[-1].attribute[1].s = how.encode()
        check_conservation(model, ({"x": x}, {"x": np.repeat(base, 3, axis=0)}))
        compiled = onnx_attrib.compile(model, target="seed", baseline="input")
        y, y_bar = (run(model, {"x": v})["y"] for v in (x, np.repeat(base, 3, axis=0)))
        seed = np.asarray(np.sign(y - y_bar), np.float32)
        found = run(compiled, {"x": x, "x_baseline": base, "seed": seed})["x_attribution"]
        np.testing.assert_allclose(found.sum(), np.abs(y - y_bar).sum(), rtol=1e-4)


def test_many_factors_at_one_entry() -> None:
    """The number of rounds follows the number of factors; at run time, too."""
    count = 1000
    nodes = 'y = ScatterElements<axis=0, reduction="mul">(x, i, u)'
    floats = {"x": (2,), "u": (count,)}
    case = Case("many", nodes, floats, {"i": np.arange(count) % 2}, apart=False)
    model = case.model("symbolic")
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    rng = np.random.default_rng(0)
    here, there = (
        {k: np.exp(0.05 * rng.standard_normal(d)).astype(np.float32) for k, d in floats.items()}
        for _ in "xb"
    )
    check_gradient(model, here)
    check_conservation(model, (here, there))
