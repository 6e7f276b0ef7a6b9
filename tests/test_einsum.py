"""Einsum: any equation, against differences of the reference evaluator and against sums."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from . import numeric
from .numeric import Array

# An equation and the shapes of its operands; a letter for a size known only at run time.
EQUATIONS: list[tuple[str, tuple[str, ...]]] = [
    ("ij,jk->ik", ("N3", "34")),
    ("bij,bjk", ("N34", "N42")),
    ("ij->ji", ("N3",)),
    ("ij->", ("N3",)),
    ("ij->j", ("N3",)),
    ("ij", ("N3",)),
    ("ba", ("N3",)),
    ("i,j->ij", ("N", "4")),
    (",ij->ij", ("", "N3")),
    ("ij,kl->il", ("N3", "24")),
    ("ij,ij->ij", ("N3", "N3")),
    ("i,i->", ("N", "N")),
    # Diagonals: of one operand, known or not, three times, and summed.
    ("ii->i", ("33",)),
    ("ii->", ("NN",)),
    ("iij->ij", ("332",)),
    ("iij->ji", ("NN2",)),
    ("iii->i", ("222",)),
    ("ii,ij->j", ("NN", "N2")),
    # The ellipsis: broadcast (ONNX Runtime wants equal ranks and known sizes for it), implicit.
    ("...ij,...jk->...ik", ("N234", "N245")),
    ("...ij,...jk->...ik", ("1234", "3142")),
    ("...ij,...jk", ("134", "542")),
    ("...i->...", ("N23",)),
    ("i...->...", ("N23",)),
    ("...,...->...", ("N3", "N3")),
    # An axis of size 1 meets a longer one.
    ("ij,ij->i", ("N1", "N3")),
    # More than two operands.
    ("bi,oij,bj->bo", ("N3", "234", "N4")),
    ("ij,j,jk->ik", ("N3", "3", "34")),
    ("a,b,c->abc", ("N", "2", "3")),
    ("i,i,i,i->", ("N", "N", "N", "N")),
    ("abc,cd,def->abef", ("N23", "34", "425")),
]


def model(equation: str, shapes: tuple[str, ...], symbol: str | None) -> ModelProto:
    """The equation as a model; sizes "N" are symbols if there is one, else 5."""
    inputs = [
        helper.make_tensor_value_info(
            f"x{k}", TensorProto.FLOAT, [(symbol or 5) if c == "N" else int(c) for c in shape]
        )
        for k, shape in enumerate(shapes)
    ]
    node = helper.make_node("Einsum", [info.name for info in inputs], ["y"], equation=equation)
    values = point(np.random.default_rng(0), shapes).values()
    rank = np.einsum(equation, *values).ndim
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph([node], "einsum", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def point(rng: np.random.Generator, shapes: tuple[str, ...]) -> dict[str, Array]:
    sizes = [[5 if c == "N" else int(c) for c in shape] for shape in shapes]
    return {
        f"x{k}": np.asarray(rng.standard_normal(size), np.float32) for k, size in enumerate(sizes)
    }


@pytest.mark.parametrize("symbol", [None, "N"], ids=["fixed", "symbolic"])
@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS, ids=lambda v: str(v))
def test_einsum(equation: str, shapes: tuple[str, ...], symbol: str | None) -> None:
    rng = np.random.default_rng(len(equation) + len(shapes))
    made = model(equation, shapes, symbol)
    numeric.check_gradient(made, point(rng, shapes))
    numeric.check_conservation(made, (point(rng, shapes), point(rng, shapes)))


def test_one_operand_twice() -> None:
    """x · xᵀ: both cotangents belong to the same tensor."""
    rng = np.random.default_rng(0)
    made = model("ij,kj->ik", ("N3", "N3"), "N")
    made.graph.node[0].input[1] = "x0"
    del made.graph.input[1]
    values = [{"x0": point(rng, ("N3",))["x0"]} for _ in range(2)]
    numeric.check_gradient(made, values[0])
    numeric.check_conservation(made, (values[0], values[1]))
