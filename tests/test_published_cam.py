"""Published numbers of deconvnet, guided backprop, Grad-CAM and guided Grad-CAM.

Captum's unit tests: ``tests/attr/test_deconvolution.py``, ``test_guided_backprop.py``,
``layer/test_grad_cam.py`` and ``test_guided_grad_cam.py``, with the networks
``BasicModel_ConvNet_One_Conv`` and ``BasicModel_MultiLayer`` of its basic_models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .test_published import explain, text

CONV = text(
    """
    one_conv (float[N, 1, 4, 4] x) => (float[N, 4] y)
    <float[2] conv_bias = {-50, -75}, float[4] zeros = {0, 0, 0, 0}, int64[2] flat = {-1, 8}>
    {
        conv1 = Conv(x, ones, conv_bias)
        relu1 = Relu(conv1)
        v = Reshape(relu1, flat)
        fc1 = Gemm <transB = 1> (v, dense, zeros)
        y = Relu(fc1)
    }""",
    {
        "ones": np.ones((2, 1, 3, 3)),
        "dense": np.concatenate([np.ones((4, 5)), -np.ones((4, 3))], 1),
    },
)
CONV_2 = text(
    """
    one_conv_2 (float[N, 1, 4, 4] x, float[N, 1, 4, 4] x2) => (float[N, 4] y)
    <float[2] conv_bias = {-50, -75}, float[4] zeros = {0, 0, 0, 0}, int64[2] flat = {-1, 8}>
    {
        s = Add(x, x2)
        conv1 = Conv(s, ones, conv_bias)
        relu1 = Relu(conv1)
        v = Reshape(relu1, flat)
        fc1 = Gemm <transB = 1> (v, dense, zeros)
        y = Relu(fc1)
    }""",
    {
        "ones": np.ones((2, 1, 3, 3)),
        "dense": np.concatenate([np.ones((4, 5)), -np.ones((4, 3))], 1),
    },
)
LAYERS = text(
    """
    multi_layer (float[N, 3] x) => (float[N, 2] y)
    <float[3, 3] eye = {1, 0, 0, 0, 1, 0, 0, 0, 1}, float[4] b1 = {-10, 1, 1, 1},
     float[2] b2 = {-1, 1}>
    {
        linear0 = MatMul(x, eye)
        m1 = MatMul(linear0, w1)
        linear1 = Add(m1, b1)
        relu = Relu(linear1)
        m2 = MatMul(relu, w2)
        y = Add(m2, b2)
    }""",
    {"w1": np.ones((3, 4)), "w2": np.ones((4, 2))},
)
LAYERS_2 = text(
    """
    multi_relu (float[N, 3] x) => (float[N, 2] y)
    <float[3, 3] eye = {1, 0, 0, 0, 1, 0, 0, 0, 1}, float[4] b1 = {-10, 1, 1, 1},
     float[2] b2 = {-1, 1}>
    {
        linear0 = MatMul(x, eye)
        m1 = MatMul(linear0, w1)
        linear1 = Add(m1, b1)
        m1_alt = MatMul(x, w1)
        linear1_alt = Add(m1_alt, b1)
        relu1 = Relu(linear1)
        relu2 = Relu(linear1_alt)
        s = Add(relu1, relu2)
        m2 = MatMul(s, w2)
        y = Add(m2, b2)
    }""",
    {"w1": np.ones((3, 4)), "w2": np.ones((4, 2))},
)

X = np.arange(16.0).reshape(1, 1, 4, 4)
DENTED = X.copy()
DENTED[0, 0, 1, 1] = -4
PAIR = {"x": X, "x2": np.ones((1, 1, 4, 4))}
DECONV = [[2, 3, 3, 1], [3, 5, 5, 2], [3, 5, 5, 2], [1, 2, 2, 1]]
GUIDED = [[0, 1, 1, 1], [1, 3, 3, 2], [1, 3, 3, 2], [1, 2, 2, 1]]
GUIDED_PAIR = [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]


def check(found: dict[str, Any], expected: Any) -> None:
    """Every attribution is what is ``expected``, to Captum's own 0.01."""
    for value in found.values():
        np.testing.assert_allclose(value.reshape(np.shape(expected)), expected, atol=0.01)


@pytest.mark.parametrize(
    ("method", "one", "two"),
    [("deconvnet", DECONV, DECONV), ("guided-backprop", GUIDED, GUIDED_PAIR)],
)
@pytest.mark.parametrize("output", [None, "fc1"])
def test_rectifiers(method: str, one: Any, two: Any, output: str | None) -> None:
    """``test_simple_input_conv_…``, ``test_simple_multi_input_conv_…`` and their neuron forms."""
    check(explain(CONV, method, {"x": X}, target=0, output=output), one)
    check(explain(CONV_2, method, PAIR, target=0, output=output), two)


@pytest.mark.parametrize(
    ("layer", "image", "relu", "expected"),
    [
        # test_simple_input_conv and …_relu.
        ("conv1", X, False, [[11.25, 13.5], [20.25, 22.5]]),
        ("relu1", X, False, [[0, 4], [28, 32.5]]),
        # test_simple_input_conv_without_final_relu and …_fc_with_final_relu: the layer's input.
        ("x", DENTED, False, 0.5625 * DENTED[0, 0]),
        ("x", DENTED, True, 0.5625 * DENTED[0, 0].clip(0)),
    ],
)
def test_grad_cam(layer: str, image: Any, relu: bool, expected: Any) -> None:
    options = {"layer": layer, "relu": relu, "upsample": False, "target": 0}
    check(explain(CONV, "grad-cam", {"x": image}, **options), expected)


def test_grad_cam_of_two_inputs() -> None:
    """``test_simple_multi_input_conv``."""
    options = {"layer": "conv1", "relu": False, "upsample": False, "target": 0}
    check(explain(CONV_2, "grad-cam", PAIR, **options), [[14.5, 19], [32.5, 37]])


def test_grad_cam_of_dense_layers() -> None:
    """``test_simple_input_non_conv`` and ``test_simple_multi_input_non_conv``."""
    options = {"relu": False, "upsample": False, "target": 0}
    x = [[0, 100, 0]]
    check(explain(LAYERS, "grad-cam", {"x": x}, layer="linear0", **options), [[400]])
    for layer in ("relu1", "relu2"):
        found = explain(LAYERS_2, "grad-cam", {"x": [[0, 6, 0]]}, layer=layer, **options)
        check(found, [[21]])


def test_guided_grad_cam() -> None:
    """``test_simple_input_conv`` and ``test_simple_multi_input_conv…``."""
    options = {"interpolation": "nearest", "target": 0}
    check(
        explain(CONV, "guided-grad-cam", {"x": X}, layer="relu1", **options),
        [[0, 0, 4, 4], [0, 0, 12, 8], [28, 84, 97.5, 65], [28, 56, 65, 32.5]],
    )
    check(
        explain(CONV_2, "guided-grad-cam", PAIR, layer="conv1", **options),
        [[14.5, 29, 38, 19], [29, 58, 76, 38], [65, 130, 148, 74], [32.5, 65, 74, 37]],
    )
