"""Single layers under every rule of LRP, against the rules restated, and published numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

pytest.importorskip("onnxruntime")


from . import numeric
from .lrp_reference import OPTIONS, RULES, close, relevance, simple, text
from .numeric import Array

LAYERS = {
    "MatMul": "h = MatMul(x, w) y = Add(h, b)",
    "MatMul, bias first": "h = MatMul(x, w) y = Add(b, h)",
    "Gemm": "y = Gemm(x, w, b)",
    "Gemm, turned": "u = Transpose(w) y = Gemm<transB=1>(x, u, b)",
    "Gemm, scaled": "y = Gemm<alpha=0.5, beta=2.0>(x, v, c)",
    "Einsum": 'h = Einsum<equation="ni,io->no">(x, w) y = Add(h, b)',
    "MatMul from the left": """t = Transpose(x) u = Transpose(w) h = MatMul(u, t)
        k = Transpose(h) y = Add(k, b)""",
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_dense_layers(layer: str, rule: str) -> None:
    """A dense layer in every spelling; where its bias is not part of it, it is a constant."""
    rng = np.random.default_rng(len(layer) + len(rule))
    w, b, x = (rng.standard_normal(shape) for shape in ((6, 4), 4, (3, 6)))
    body = LAYERS[layer]
    model = text(f"g (float[N, 6] x) => (float[N, 4] y) {{ {body} }}", w=w, b=b, v=2 * w, c=b / 2)
    found = relevance(model, x.astype(np.float32), rule=rule, **OPTIONS)
    y = x @ w + b
    if layer == "MatMul from the left":
        # The layer's own output takes its part of the sum's relevance; the constant the rest.
        r, bias = y - b, np.zeros(4)
    else:
        r, bias = y, b
    expected = np.stack([RULES[rule](x[n], w, bias, r[n], np.ones_like(w)) for n in range(len(x))])
    assert close(found, expected)


CONVOLUTIONS = {
    "strided": ("Conv<strides=[2, 1], pads=[1, 0, 1, 1]>", (4, 3, 3, 2), (3, 7, 6)),
    "grouped": ("Conv<group=2, dilations=[2, 1]>", (4, 2, 2, 3), (4, 6, 5)),
    "transposed": ("ConvTranspose<strides=[2, 2], pads=[1, 0, 0, 1]>", (3, 4, 3, 2), (3, 4, 3)),
}


def unrolled(model: ModelProto, shape: tuple[int, ...]) -> Array:
    """The matrix [inputs, outputs] of a linear model, from unit vectors."""
    size = int(np.prod(shape))
    units = np.eye(size, dtype=np.float32).reshape(size, *shape)
    return numeric.run(model, {"x": units})["y"].reshape(size, -1).astype(np.float64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, rule: str) -> None:
    """A convolution is the dense layer of its unrolled matrix, padding not counted."""
    op, weight, shape = CONVOLUTIONS[kind]
    rng = np.random.default_rng(len(kind) + len(rule))
    name, attributes = op.split("<")
    w, b = rng.standard_normal(weight).astype(np.float32), rng.standard_normal(4)
    x = rng.standard_normal((2, *shape)).astype(np.float32)
    sizes = ", ".join(str(n) for n in shape)

    def made(inputs: str, **weights: Array) -> ModelProto:
        body = f"y = {name}<{attributes}({inputs})"
        return text(f"g (float[N, {sizes}] x) => (float[N, C, H, W] y) {{ {body} }}", **weights)

    matrix = unrolled(made("x, w", w=w), shape)
    links = unrolled(made("x, w", w=np.ones_like(w)), shape)
    model = made("x, w, b", w=w, b=b)
    y = numeric.run(model, {"x": x})["y"]
    bias = np.broadcast_to(b[:, None, None], y.shape[1:]).ravel()
    rows = [
        RULES[rule](
            x[n].ravel().astype(np.float64), matrix, bias, y[n].ravel().astype(np.float64), links
        )
        for n in range(2)
    ]
    found = relevance(model, x, rule=rule, **OPTIONS)
    assert close(found, np.stack(rows).reshape(found.shape), 2e-5)


# -- published numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "options", "expected"),
    [
        (2, {}, [18, 36, 54]),
        (-2, {"rules": {"h": {"rule": "gamma", "gamma": 1}, "y": "gamma"}}, [28 / 3, 104 / 3, 52]),
        (-2, {"rule": "alpha1beta0"}, [12, 33.6, 50.4]),
        (-2, {"rules": {"h": "pass"}}, [24, 36, 36]),
    ],
)
def test_captum_numbers(first: float, options: dict[str, Any], expected: list[float]) -> None:
    """``tests/attr/test_lrp.py`` in Captum, its epsilon, gamma, alpha-beta and identity rules."""
    found = relevance(simple(first), np.array([[1, 2, 3]], np.float32), **options)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_captum_tanh_and_skip() -> None:
    """The same file: a Tanh passes relevance; a sum splits it by its terms."""
    tenth = {"a": np.full((3, 3), 0.1), "c": np.full((3, 1), 0.1)}
    model = text(
        "g (float[N, 3] x) => (float[N, 1] y) { h = MatMul(x, a) z = Tanh(h) y = MatMul(z, c) }",
        **tenth,
    )
    found = relevance(model, np.array([[1, 2, 3]], np.float32))
    np.testing.assert_allclose(found, [[0.0269, 0.0537, 0.0806]], atol=1e-4)
    skip = text(
        "g (float[N, 2] x) => (float[N, 2] y) { h = MatMul(x, a) y = Add(h, x) }",
        a=np.full((2, 2), 5.0),
    )
    found = relevance(skip, np.array([[2, 3]], np.float32), target=1)
    np.testing.assert_allclose(found, [[10, 18]], rtol=1e-5)
