"""If, Scan and Loop under every method: gradients, conservation, and what runs in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

import onnx_attrib  # noqa: E402

from . import numeric  # noqa: E402
from .numeric import Array  # noqa: E402

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


@dataclass(frozen=True)
class Model:
    """A model in ONNX's text form and the shapes of its float inputs; other inputs as they are."""

    text: str
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Array] = field(default_factory=dict)
    inputs: tuple[str, ...] | None = None

    def proto(self) -> onnx.ModelProto:
        model = onnx.parser.parse_model(HEAD + self.text)
        onnx.checker.check_model(model, full_check=True)
        return numeric.joined(model)[0]

    @property
    def output(self) -> str:
        return numeric.joined(onnx.parser.parse_model(HEAD + self.text))[1]

    def point(self, rng: np.random.Generator) -> dict[str, Array]:
        drawn = {k: rng.standard_normal(v).astype(np.float32) for k, v in self.shapes.items()}
        return {**drawn, **self.fixed}


MODELS = {
    "scan: a recurrent cell, weights attributed too": Model(
        """g (float[N, 3] h0, float[T, N, 4] x, float[4, 3] w, float[3, 3] r)
        => (float[N, 3] h, float[T, N, 3] ys)
        { h, ys = Scan<num_scan_inputs = 1, body = step (float[?, ?] a, float[?, ?] e)
            => (float[?, ?] b, float[?, ?] y) {
              u = MatMul(a, r) v = MatMul(e, w) s = Add(u, v) b = Tanh(s)
              two = Constant<value = float {2.0}>() y = Mul(b, two)
            }>(h0, x) }""",
        {"h0": (2, 3), "x": (5, 2, 4), "w": (4, 3), "r": (3, 3)},
    ),
    "scan: axes and directions": Model(
        """g (float[N, 3] h0, float[N, T, 3] x, float[3, N, T] z)
        => (float[N, 3] h, float[N, T, 3] ys, float[T, N, 3] zs)
        { h, ys, zs = Scan<num_scan_inputs = 2, scan_input_axes = [1, -1],
            scan_input_directions = [1, 0], scan_output_axes = [-2, 0],
            scan_output_directions = [0, 1], body = step (float[N, 3] a, float[N, 3] e, float[3, N] f)
            => (float[N, 3] b, float[N, 3] y, float[N, 3] c) {
              ft = Transpose<perm = [1, 0]>(f) p = Mul(a, e) q = Add(p, ft) b = Sigmoid(q)
              y = Mul(b, ft) c = Sub(a, e)
            }>(h0, x, z) }""",
        {"h0": (2, 3), "x": (2, 4, 3), "z": (3, 2, 4)},
    ),
    "scan: two states, one a counter, scan output is the state": Model(
        """g (float[3] a0, int64 n0, float[T, 3] x) => (float[3] a, float[T, 3] ys)
        { a, n, ys = Scan<num_scan_inputs = 1, body = step (float[3] s, int64 n, float[3] e)
            => (float[3] t, int64 m, float[3] y) {
              one = Constant<value = int64 {1}>() m = Add(n, one)
              k = Cast<to = 1>(m) p = Mul(e, s) q = Div(p, k) t = Add(q, e) y = Identity(t)
            }>(a0, n0, x) }""",
        {"a0": (3,), "x": (4, 3)},
        {"n0": np.array(0)},
    ),
    "loop: run-time trip count, captured value": Model(
        """g (int64 count, float[N, 3] x, float[3] c) => (float[N, 3] y, float[T, N, 3] ys)
        { y, ys = Loop<body = step (int64 i, bool go, float[?, ?] a)
            => (bool still, float[?, ?] b, float[?, ?] e) {
              p = Mul(a, c) f = Cast<to = 1>(i) q = Add(p, f) b = Tanh(q) e = Mul(b, x)
              still = Identity(go)
            }>(count, , x) }""",
        {"x": (2, 3), "c": (3,)},
        {"count": np.array(4)},
    ),
    "loop: no trips": Model(
        """g (int64 count, float[2, 3] x) => (float[2, 3] y, float[T, 2, 3] ys)
        { y, ys = Loop<body = step (int64 i, bool go, float[?, ?] a)
            => (bool still, float[?, ?] b, float[?, ?] e) {
              b = Tanh(a) e = Mul(b, x) still = Identity(go)
            }>(count, , x) }""",
        {"x": (2, 3)},
        {"count": np.array(0)},
    ),
    "loop: no states": Model(
        """g (int64 count, float[N, 3] x) => (float[T, N, 3] ys)
        { yes = Constant<value = bool {1}>() ys = Loop<body = step (int64 i, bool go) => (bool still, float[?, ?] e) {
              f = Cast<to = 1>(i) p = Mul(x, f) e = Sin(p) still = Identity(go)
            }>(count, yes) }""",
        {"x": (2, 3)},
        {"count": np.array(3)},
    ),
    "loop: a while": Model(
        """g (bool go0, float[3] x, float limit) => (float[3] y)
        { start = Constant<value = float {0.0}>()
          n, y = Loop<body = step (int64 i, bool go, float n, float[3] a)
            => (bool still, float m, float[3] b) {
              one = Constant<value = float {1.0}>() m = Add(n, one) still = Less(m, limit)
              s = Sin(a) b = Add(s, a)
            }>(, go0, start, x) }""",
        {"x": (3,)},
        {"go0": np.array(True), "limit": np.array(3.0, np.float32)},
        ("x",),
    ),
    "if: both branches": Model(
        """g (bool which, float[N, 3] x, float[3] c) => (float[N, 3] y)
        { t = Tanh(x)
          y = If<then_branch = yes () => (float[?, ?] a) { p = Mul(t, x) a = Mul(p, c) },
                 else_branch = no () => (float[?, ?] b) { b = Sigmoid(t) }>(which) }""",
        {"x": (2, 3), "c": (3,)},
        {"which": np.array(True)},
    ),
    "if: the other branch": Model(
        """g (bool which, float[N, 3] x, float[3] c) => (float[N, 3] y, float[N, 3] z)
        { y, z = If<then_branch = yes () => (float[?, ?] a, float[?, ?] d)
                   { p = Mul(x, x) a = Mul(p, c) d = Identity(x) },
                 else_branch = no () => (float[?, ?] b, float[?, ?] e)
                   { k = Constant<value = float[3] {1.0, 2.0, 3.0}>() b = Sigmoid(x) e = Mul(b, k) }
          >(which) }""",
        {"x": (2, 3), "c": (3,)},
        {"which": np.array(False)},
    ),
    "nested: scan in a loop, if in the scan": Model(
        """g (int64 count, float[3] x, float[T, 3] z) => (float[3] y)
        { y = Loop<body = outer (int64 i, bool go, float[3] a) => (bool still, float[3] b) {
              two = Constant<value = int64 {2}>() r = Mod(i, two)
              odd = Cast<to = 9>(r)
              b, us = Scan<num_scan_inputs = 1, body = inner (float[3] s, float[3] e)
                => (float[3] t, float[3] u) {
                  p = Mul(s, e) q = Add(p, a) v = Tanh(q)
                  t = If<then_branch = yes () => (float[3] f) { f = Mul(v, x) },
                         else_branch = no () => (float[3] h) { h = Sub(v, e) }>(odd)
                  u = Identity(s)
                }>(a, z)
              still = Identity(go)
            }>(count, , x) }""",
        {"x": (3,), "z": (4, 3)},
        {"count": np.array(3)},
    ),
    "nested: a weight that only subgraphs use": Model(
        """g (float[T, 3] x) => (float[3] y) <float[3, 3] w = {1.0, 0.5, 0.0, 2.0, -1.0, 0.3, 0.2, 0.1, -0.4}>
        { zero = Constant<value = float[3] {0.1, 0.2, 0.3}>()
          y = Scan<num_scan_inputs = 1, body = outer (float[3] s, float[3] e) => (float[3] t) {
              count = Constant<value = int64 {2}>()
              p = Loop<body = inner (int64 i, bool go, float[3] a) => (bool still, float[3] b) {
                  q = MatMul(a, w) b = Tanh(q) still = Identity(go) }>(count, , s)
              t = Add(p, e)
            }>(zero, x) }""",
        {"x": (4, 3)},
    ),
}

names = pytest.mark.parametrize("name", MODELS)


@names
def test_gradient(name: str) -> None:
    model, rng = MODELS[name], np.random.default_rng(1)
    residuals = numeric.check_gradient(
        model.proto(), model.point(rng), model.point(rng), inputs=model.inputs, output=model.output
    )
    assert all(r.applies for r in residuals)
    assert len(residuals) == 2 * len(model.inputs or model.shapes)


@names
def test_conservation(name: str) -> None:
    model, rng = MODELS[name], np.random.default_rng(2)
    pairs = []
    for _ in range(2):
        point, base = model.point(rng), model.point(rng)
        pairs.append((point, {k: base[k] for k in model.inputs or model.shapes}))
    numeric.check_conservation(model.proto(), *pairs, inputs=model.inputs, output=model.output)
