"""Published numbers for RevealCancel and Rescale: the examples of Shrikumar et al. 2017 (arXiv
1704.02685) and the unit tests of the authors' library (kundajelab/deeplift, ``tests/layers``).
"""

from __future__ import annotations

import numpy as np
import pytest

from .numeric import Array
from .reveal_cancel_networks import MINIMUM, RULES, block, explain, normal, text


def test_minimum_of_two() -> None:
    """§3.5.3: min(a, b) spelled a − relu(a − b): each has half of the minimum.

    Rescale gives all of it to the smaller one.
    """
    a, b = np.float32([[5], [1], [4], [2]]), np.float32([[3], [4], [4], [0]])
    feeds = {"a": a, "b": b}
    found = explain(text(MINIMUM), feeds, baseline="zeros")
    half = np.minimum(a, b) / 2
    np.testing.assert_allclose(found["a_attribution"], half, atol=1e-6)
    np.testing.assert_allclose(found["b_attribution"], half, atol=1e-6)
    rescaled = explain(text(MINIMUM), feeds, baseline="zeros", rule="rescale")
    np.testing.assert_allclose(rescaled["a_attribution"], np.where(a > b, 0, a), atol=1e-6)


def test_minimum_of_two_in_layers() -> None:
    """The same as dense layers: h = [a − b, a] → relu → y = h₂ − h₁."""
    model = text(
        """g (float[N, 2] x) => (float[N, 1] y) {
            h = MatMul(x, w)
            r = Relu(h)
            y = MatMul(r, v)
        }""",
        w=[[1, 1], [-1, 0]],
        v=[[-1], [1]],
    )
    x = np.float32([[5, 3], [1, 4], [2, 9]])
    found = explain(model, {"x": x}, baseline="zeros")
    half = x.min(1, keepdims=True) / 2
    np.testing.assert_allclose(found["x_attribution"], np.hstack([half, half]), atol=1e-6)


W1, W2 = np.float32([1, 2, 3, 4]), np.float32([-1, -2, -3, -4])


def test_published_dense() -> None:
    """``test_activation.py`` and ``test_dense.py``: multipliers of a dense layer, with a ReLU."""
    source = "g (float[N, 4] x) => (float[N, 2] y) { h = Gemm(x, w, b) y = Relu(h) }"
    model = text(source, w=np.array([W1, W2]).T, b=[-1, 1])
    ones, twos = np.ones((1, 4), np.float32), np.full((1, 4), 2, np.float32)
    x = np.vstack([ones, twos])
    for target, wanted in enumerate([[0.9 * W1, 0.95 * W1], [0.1 * W2, 0.05 * W2]]):
        for rule in RULES:
            # All weights of a unit have one sign: nothing cancels.
            found = explain(model, {"x": x}, rule=rule, baseline="zeros", target=target)
            np.testing.assert_allclose(found["x_attribution"] / x, wanted, atol=1e-5)
    for target, row in enumerate([W1, W2]):
        found = explain(model, {"x": x}, baseline="zeros", target=target, output="h")
        np.testing.assert_allclose(found["x_attribution"] / x, [row, row], atol=1e-6)


CONV_W = np.float32([[[-2, -1], [0, 1]], [[2, 1], [0, -1]]])
"""``test_conv1d.py``, [M, C, k]."""
CONV_X = np.arange(16, dtype=np.float32).reshape(2, 2, 4) - 8


def test_published_convolution_parts() -> None:
    """``test_fprop_pos_and_neg_contribs``: what pushes each output up, and what down.

    A ReLU behind it makes the parts visible: entries that push up have Δy⁺ together.
    """
    source = "g (float[N, 2, 4] x) => (float[N, 2, 3] y) { h = Conv(x, w, b) y = Relu(h) }"
    model = text(source, w=CONV_W, b=[-1, 1])
    ups = np.float32([[[26, 23, 20], [4, 3, 2]], [[6, 5, 6], [0, 1, 4]]])
    downs = np.float32([[[-4, -3, -2], [-26, -23, -20]], [[0, -1, -4], [-6, -5, -6]]])
    base = np.ones((1, 2, 4), np.float32)
    start = np.float32([[-3, -3, -3], [3, 3, 3]])  # the layer's output there
    for channel, place in np.ndindex(2, 3):
        found = explain(model, {"x": CONV_X, "x_baseline": base}, target=(channel, place))
        terms = np.zeros((2, 2, 4))
        terms[:, :, place : place + 2] = CONV_W[channel]
        terms = terms * (CONV_X - base)
        z = start[channel, place]
        up, down = ups[:, channel, place], downs[:, channel, place]

        def relu(t: Array) -> Array:
            return np.maximum(t, 0)

        wanted = [
            (relu(z + up) - relu(z) + relu(z + up + down) - relu(z + down)) / 2,
            (relu(z + down) - relu(z) + relu(z + up + down) - relu(z + up)) / 2,
        ]
        for sign, part in zip((1, -1), wanted, strict=True):
            sums = np.where(sign * terms > 0, found["x_attribution"], 0).sum((1, 2))
            np.testing.assert_allclose(sums, part, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "wanted"),
    [(1, [[-4, -6, -6, -2], [0, 2, 2, 2]]), (2, [[-4, -2, -4, -2], [0, 2, 0, 2]])],
)
def test_published_convolution_multipliers(stride: int, wanted: list[list[int]]) -> None:
    """``test_dense_backprop`` and ``test_dense_backprop_stride``."""
    size = 3 if stride == 1 else 2
    source = f"""g (float[N, 2, 4] x) => (float[N, 1] y) {{
        h = Conv<strides=[{stride}]>(x, w, b)
        t = Transpose<perm=[0, 2, 1]>(h)
        f = Flatten(t)
        y = Gemm(f, v, c)
    }}"""
    model = text(source, w=CONV_W, b=[-1, 1], v=[[1], [-1]] * size, c=[1])
    found = explain(model, {"x": CONV_X}, baseline=0.25)
    np.testing.assert_allclose(found["x_attribution"] / (CONV_X - 0.25), [wanted] * 2, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_published_pools(rule: str) -> None:
    """``test_pool1d.py``: windows of two one apart, then weights 2 and 3 for the two channels."""
    x = np.float32([[[0, 1, 4, 3], [3, 2, 1, 0]], [[0, -1, -2, -3], [-3, -2, -1, 0]]])
    weights = np.repeat(np.float32([[2], [3]]), 3, axis=0)
    wanted = {
        "MaxPool": [
            [[0, 2, 4, 0], [3, 3, 3, 0]],
            [[2, 2, 2, 0], [0, 3, 3, 3]],
        ],
        "AveragePool": [[[1, 2, 2, 1], [1.5, 3, 3, 1.5]]] * 2,
    }
    for pool, multipliers in wanted.items():
        source = f"""g (float[N, 2, 4] x) => (float[N, 1] y) {{
            p = {pool}<kernel_shape=[2]>(x)
            f = Flatten(p)
            y = Gemm(f, v, c)
        }}"""
        model = text(source, v=weights, c=[1])
        found = explain(model, {"x": x}, rule=rule, baseline="zeros", maxpool="gradient")
        np.testing.assert_allclose(found["x_attribution"], x * np.float32(multipliers), atol=1e-5)


NORM = {"s": [1, -1], "o": [-0.5, 0.5], "u": [-0.5, 0.5], "t": [1, 1]}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_published_choice_of_the_rule(kind: str, norm: bool) -> None:
    """``test_deeplift_genomics_default_mode.py``: the layer before the nonlinearity decides."""
    rng = np.random.default_rng(3)
    dense = kind == "dense"
    weight = normal(rng, 4, 2) if dense else normal(rng, 2, 2, 2)
    layer = "h = MatMul(x, w)" if dense else "h = Conv(x, w)"
    between = "n = BatchNormalization(h, s, o, u, t) i = Identity(n) r = Relu(i)"
    after = between if norm else "r = Relu(h)"
    end = "f = Flatten(r) y = MatMul(f, v)"
    constants = {"w": weight, "v": normal(rng, 2 if dense else 4, 1), **(NORM if norm else {})}
    shape = "4" if dense else "2, 3"
    model = block(layer, after, end, shape=shape, outputs=1, **constants)
    x = normal(rng, 5, *([4] if dense else [2, 3]))
    found = {rule: explain(model, {"x": x}, rule=rule, baseline="zeros") for rule in RULES}
    plain, revealed = (found[rule]["x_attribution"] for rule in ("rescale", "reveal-cancel"))
    assert np.abs(plain - revealed).max() > 1e-3
    standard, converse = (revealed, plain) if dense else (plain, revealed)
    np.testing.assert_array_equal(found["genomics"]["x_attribution"], standard)
    np.testing.assert_array_equal(found["genomics-converse"]["x_attribution"], converse)
