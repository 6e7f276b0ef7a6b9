"""What is folded into weights, or put together from padded parts, stays the same function."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_attrib.passes.folded import folded
from onnx_attrib.passes.normalize import normalize

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def check(text: str, rng: np.random.Generator) -> Counter[str]:
    """The operators of the rewritten model, which computes the same."""
    source = onnx.parser.parse_model(f"{HEADER} {text}")
    onnx.checker.check_model(source, full_check=True)
    graph = normalize(source)
    job: Any = SimpleNamespace(graph=graph)
    folded(job)
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    feeds = {
        info.name: rng.normal(
            size=[dim.dim_value or 3 for dim in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in source.graph.input
    }
    wanted, got = (ReferenceEvaluator(model).run(None, feeds) for model in (source, result))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in result.graph.node)


LAYER = """
    g (float[N, 4] x) => (float[N, 3] y)
    <float[4, 3] w = {1, 2, 3, -4, 5, 6, 7, -8, 9, 1, 1, 2}, float[3] c = {2, 0.5, -1},
     int64[1] last = {1}, float two = {2}>
"""


def test_a_factor_by_columns_goes_into_the_weights(rng: np.random.Generator) -> None:
    found = check(LAYER + "{ h = MatMul(x, w) y = Mul(c, h) }", rng)
    assert found == {"MatMul": 1, "Mul": 1}
    found = check(LAYER + "{ h = MatMul(x, w) t = Mul(h, two) y = Mul(t, c) }", rng)
    assert found == {"MatMul": 1, "Mul": 2}


def test_a_centred_product_is_one_by_centred_weights(rng: np.random.Generator) -> None:
    text = "{ h = MatMul(x, w) m = ReduceMean(h, last) y = Sub(h, m) }"
    assert check(LAYER + text, rng) == {"MatMul": 1, "ReduceMean": 1, "Sub": 1}


@pytest.mark.parametrize(
    "body",
    [
        "{ h = MatMul(x, w) t = Mul(h, c) y = Add(h, t) }",
        "{ h = MatMul(x, w) m = ReduceMean(h, last) t = Sub(h, m) y = Mul(t, h) }",
        "{ h = MatMul(x, w) m = ReduceMean(h, last) y = Sub(m, h) }",
        "{ h = MatMul(x, w) m = ReduceMean(x, last) y = Sub(h, m) }",
        "{ v = MatMul(w, c) h = MatMul(x, w) t = Relu(h) y = Mul(t, c) }",
    ],
)
def test_what_others_read_stays(body: str, rng: np.random.Generator) -> None:
    source = onnx.parser.parse_model(f"{HEADER} {LAYER}{body}")
    found = check(LAYER + body, rng)
    live = [node for node in source.graph.node if node.output[0] != "v"]
    assert found == Counter(node.op_type for node in live)


def padded(parts: str, *pads: list[int]) -> str:
    values = ", ".join(
        f"int64[4] p{k} = {{{', '.join(map(str, pad))}}}" for k, pad in enumerate(pads)
    )
    return f"g (float[2, 3] a, float[2, 1] b, float[2, 2] c) => (float[2, d] y) <{values}> {parts}"


SUM = """{
    A = Pad(a, p0) B = Pad(b, p1) C = Pad(c, p2) s = Add(C, A) y = Add(s, B)
}"""


def test_parts_side_by_side_are_put_together(rng: np.random.Generator) -> None:
    found = check(padded(SUM, [0, 0, 0, 3], [0, 3, 0, 2], [0, 4, 0, 0]), rng)
    assert found == {"Concat": 1}


@pytest.mark.parametrize(
    "pads",
    [
        ([0, 1, 0, 3], [0, 4, 0, 2], [0, 5, 0, 0]),  # zeros before
        ([0, 0, 0, 3], [0, 2, 0, 3], [0, 4, 0, 0]),  # overlapping
        ([0, 0, 0, 4], [0, 3, 0, 3], [0, 5, 0, 0]),  # a gap
        ([1, 0, 0, 3], [1, 3, 0, 2], [1, 4, 0, 0]),  # along two axes
    ],
)
def test_parts_that_are_not_side_by_side_stay(
    pads: tuple[list[int], ...], rng: np.random.Generator
) -> None:
    text = padded(SUM, *pads)
    if pads[0][0]:
        text = text.replace("[2, d]", "[3, d]")
    assert check(text, rng) == {"Pad": 3, "Add": 2}
