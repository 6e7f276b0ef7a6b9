"""If, Scan and Loop under every method: gradients, conservation, and what runs in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")


import onnx_attrib
from onnx_attrib.compiler import prepare
from onnx_attrib.methods import METHODS

from . import numeric
from .numeric import Array

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


@dataclass(frozen=True)
class Model:
    """A model in ONNX's text form and the shapes of its float inputs; other inputs as they are."""

    text: str
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Array] = field(default_factory=dict)
    inputs: tuple[str, ...] | None = None
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def proto(self) -> onnx.ModelProto:
        model, rng = onnx.parser.parse_model(HEAD + self.text), np.random.default_rng(0)
        for name, shape in self.weights.items():
            value = rng.uniform(-0.5, 0.5, shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
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
            scan_output_directions = [0, 1],
            body = step (float[N, 3] a, float[N, 3] e, float[3, N] f)
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
        { yes = Constant<value = bool {1}>()
          ys = Loop<body = step (int64 i, bool go) => (bool still, float[?, ?] e) {
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
        """g (float[T, 20] x) => (float[20] y)
        { tenth = Constant<value = float {0.1}>() size = Constant<value = int64[1] {20}>()
          start = Expand(tenth, size)
          y = Scan<num_scan_inputs = 1, body = outer (float[20] s, float[20] e) => (float[20] t) {
              count = Constant<value = int64 {2}>()
              p = Loop<body = inner (int64 i, bool go, float[20] a) => (bool still, float[20] b) {
                  q = MatMul(a, w) b = Tanh(q) still = Identity(go) }>(count, , s)
              t = Add(p, e)
            }>(start, x) }""",
        {"x": (4, 20)},
        weights={"w": (20, 20)},
    ),
    "loop: reads a captured sequence by the number of the step": Model(
        """g (float[T, N, 3] x) => (float[N, 3] y)
        { zero = Constant<value = int64[1] {0}>() first = Constant<value = int64 {0}>()
          size = Shape<start = 0, end = 1>(x) count = Squeeze(size, zero)
          s = Gather<axis = 0>(x, first) start = Mul(s, s)
          y = Loop<body = step (int64 i, bool go, float[?, ?] a) => (bool still, float[?, ?] b) {
              e = Gather<axis = 0>(x, i) p = Mul(a, e) b = Tanh(p) still = Identity(go)
            }>(count, , start) }""",
        {"x": (4, 2, 3)},
    ),
    "scan: softmax, normalisation, maximum": Model(
        """g (float[N, 6] h0, float[T, N, 6] x) => (float[N, 6] h, float[T, N, 6] ys)
        { h, ys = Scan<num_scan_inputs = 1, body = step (float[N, 6] a, float[N, 6] e)
            => (float[N, 6] b, float[N, 6] y) {
              s = Add(a, e) n = LayerNormalization(s, w) p = Softmax(n) q = Max(p, e)
              b = Mul(q, a) y = Softmax<axis = 1>(b)
            }>(h0, x) }""",
        {"h0": (2, 6), "x": (3, 2, 6)},
        weights={"w": (6,)},
    ),
    "if: branches of different shapes": Model(
        """g (bool which, float[2, 3] x) => (float[?, 3] y)
        { first = Constant<value = int64[1] {0}>()
          y = If<then_branch = yes () => (float[?, 3] a) { a = Gather<axis = 0>(x, first) },
                 else_branch = no () => (float[?, 3] b) { b = Mul(x, x) }>(which) }""",
        {"x": (2, 3)},
        {"which": np.array(True)},
    ),
    "nested: lstm in a loop": Model(
        """g (float[3, 2, 4] x) => (float[3, 2, 4] y)
        { count = Constant<value = int64 {2}>() one = Constant<value = int64[1] {1}>()
          y = Loop<body = step (int64 i, bool go, float[3, 2, 4] a)
            => (bool still, float[3, 2, 4] b) {
              q, qh, qc = LSTM<hidden_size = 4, direction = "reverse">(a, w, r)
              b = Squeeze(q, one) still = Identity(go)
            }>(count, , x) }""",
        {"x": (3, 2, 4)},
        weights={"w": (1, 16, 4), "r": (1, 16, 4)},
    ),
    "nested: gru in an if in a scan": Model(
        """g (bool which, float[2, 3, 2, 4] x, float[3, 2, 4] h0) => (float[3, 2, 4] y)
        { one = Constant<value = int64[1] {1}>()
          y = Scan<num_scan_inputs = 1, body = step (float[3, 2, 4] s, float[3, 2, 4] e)
            => (float[3, 2, 4] b) {
              d = Add(s, e)
              b = If<then_branch = yes () => (float[3, 2, 4] p)
                       { q, qh = GRU<hidden_size = 4, linear_before_reset = 1>(d, w, r)
                         p = Squeeze(q, one) },
                     else_branch = no () => (float[3, 2, 4] f) { f = Tanh(d) }>(which)
            }>(h0, x) }""",
        {"x": (2, 3, 2, 4), "h0": (3, 2, 4)},
        {"which": np.array(True)},
        weights={"w": (1, 12, 4), "r": (1, 12, 4)},
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


@names
def test_integrated_gradients(name: str) -> None:
    """Nested in the path's own Loop: complete, up to the quadrature."""
    model, rng = MODELS[name], np.random.default_rng(3)
    if "maximum" in name:
        pytest.skip("kinks on the path: the quadrature converges slowly")
    attributed = list(model.inputs or model.shapes)
    compiled = compiled_for(model, "integrated-gradients", inputs=attributed, steps=60, chunk=7)
    point, base = model.point(rng), model.point(rng)
    assert_complete(model, compiled, point, {k: base[k] for k in attributed}, 1e-4)


ANYWHERE = [
    name
    for name, method in METHODS.items()
    # The others want ReLUs, convolutions, layers with weights or samples on the first axis.
    if method.clusters != "rectifiers" and not (method.map or method.background or method.weights)
]


@pytest.mark.parametrize("method", ANYWHERE)
@names
def test_every_method(name: str, method: str) -> None:
    model, rng = MODELS[name], np.random.default_rng(4)
    compiled = compiled_for(model, method)
    point, base = model.point(rng), model.point(rng)
    results = explained(model, compiled, point, base)
    values = [v for k, v in results.items() if k.endswith("_attribution")]
    assert values
    assert all(np.isfinite(value).all() for value in values)


def compiled_for(model: Model, method: str, **options: Any) -> onnx.ModelProto:
    """The compiled model, with its reference at run time."""
    options.setdefault("inputs", model.inputs)
    if METHODS[method].needs_reference:
        options["baseline"] = "input"
    compiled = onnx_attrib.compile(
        model.proto(), method, target="seed", output=model.output, **options
    )
    numeric.check_graph(compiled)
    return compiled


def explained(
    model: Model, compiled: onnx.ModelProto, point: dict[str, Array], base: dict[str, Array]
) -> dict[str, Array]:
    seed = np.ones(numeric.run(model.proto(), point)[model.output].shape, np.float32)
    feeds = {f"{k}_baseline": v for k, v in base.items()}
    return numeric.run(compiled, {**point, **feeds, "seed": seed})


def assert_complete(
    model: Model,
    compiled: onnx.ModelProto,
    point: dict[str, Array],
    base: dict[str, Array],
    tolerance: float,
) -> None:
    results = explained(model, compiled, point, base)
    total = sum(float(results[f"{k}_attribution"].sum()) for k in base)
    wide = {k: np.broadcast_to(v, point[k].shape).copy() for k, v in base.items()}
    outputs = [numeric.run(model.proto(), p)[model.output] for p in (point, {**point, **wide})]
    change = float((outputs[0] - outputs[1]).sum())
    assert abs(total - change) <= tolerance * max(1.0, abs(change))


# -- where input and reference go different ways ---------------------------------------------------

DEPENDENT_IF = Model(
    """g (float[N, 3] x) => (float[N, 3] y)
    { s = ReduceSum<keepdims = 0>(x) zero = Constant<value = float {0.0}>() c = Greater(s, zero)
      y = If<then_branch = yes () => (float[?, ?] a) { a = Mul(x, x) },
             else_branch = no () => (float[?, ?] b) { b = Tanh(x) }>(c) }""",
    {"x": (2, 3)},
)
DEPENDENT_LOOP = Model(
    """g (float[3] x) => (float[3] y, float n)
    { yes = Constant<value = bool {1}>() zero = Constant<value = float {0.0}>()
      limit = Constant<value = float {6.0}>()
      y, n = Loop<body = step (int64 i, bool go, float[3] a, float m)
        => (bool still, float[3] b, float d) {
          one = Constant<value = float {1.0}>() d = Add(m, one)
          e = Abs(a) p = Add(e, x) more = Constant<value = float {1.1}>() b = Mul(p, more)
          s = ReduceSum<keepdims = 0>(b) still = Less(s, limit)
        }>(, yes, x, zero) }""",
    {"x": (3,)},
)
NO_STEPS_AT_REFERENCE = Model(
    """g (float[3] x) => (float[3] y)
    { s = ReduceSum<keepdims = 0>(x) count = Cast<to = 7>(s)
      y = Loop<body = step (int64 i, bool go, float[3] a) => (bool still, float[3] b)
        { b = Tanh(a) still = Identity(go) }>(count, , x) }""",
    {"x": (3,)},
)


@pytest.mark.parametrize(
    ("model", "x", "base", "same"),
    [
        (DEPENDENT_IF, np.full((2, 3), 0.5), np.full((2, 3), -0.7), False),
        (DEPENDENT_IF, np.full((2, 3), 0.5), np.full((2, 3), 0.7), True),
        (DEPENDENT_LOOP, [0.1, 0.2, 0.3], [1, 1, 0.5], False),
        (DEPENDENT_LOOP, [1, 1, 0.5], [0.1, 0.2, 0.3], False),
        (DEPENDENT_LOOP, [0.1, 0.2, 0.3], [0.1, 0.2, 0.31], True),
        (NO_STEPS_AT_REFERENCE, [1, 1, 1], [-1, -1, -1], False),
    ],
)
def test_different_ways(model: Model, x: object, base: object, same: bool) -> None:
    """Noted at compile time; conserving all the same wherever both take the same way."""
    job = prepare(model.proto(), "deeplift", target="seed", output=model.output, baseline="input")
    # A number of steps that the model gives out is noted as well.
    own = [note for note in job.notes if "by steps only" not in note]
    assert len(own) == 1
    assert "depends on what is attributed" in own[0]
    point, there = {"x": np.array(x, np.float32)}, {"x": np.array(base, np.float32)}
    compiled = job.graph.to_proto()
    numeric.check_graph(compiled)
    if same:
        assert_complete(model, compiled, point, there, 1e-5)
    else:
        results = explained(model, compiled, point, there)
        assert np.isfinite(results["x_attribution"]).all()


@pytest.mark.parametrize("batch", [1, 4])
def test_shared_reference(batch: int) -> None:
    """The reference may have batch 1; steps are no samples."""
    model = Model(
        """g (float[N, 3] x, float[T, 3] z) => (float[N, 3] y)
        { h0 = Sub(x, x)
          y = Scan<num_scan_inputs = 1, body = step (float[N, 3] a, float[3] e) => (float[N, 3] b)
            { u = MatMul(a, w) v = Add(u, x) t = Tanh(v) b = Mul(t, e) }>(h0, z) }""",
        {"x": (4, 3), "z": (5, 3)},
        weights={"w": (3, 3)},
    )
    rng = np.random.default_rng(5)
    base = {"x": rng.standard_normal((batch, 3)).astype(np.float32)}
    for method, tolerance in (("deeplift", 1e-5), ("integrated-gradients", 1e-4)):
        compiled = compiled_for(model, method, inputs=["x"])
        assert_complete(model, compiled, model.point(rng), base, tolerance)
    compiled = compiled_for(model, "deeplift", inputs=["z"])
    there = model.point(rng)
    assert_complete(model, compiled, model.point(rng) | {"x": there["x"]}, {"z": there["z"]}, 1e-5)


# -- what cannot be explained ----------------------------------------------------------------------

BODY = """g (float[1, 3] x) => (float[?, 3] y)
    {{ count = Constant<value = int64 {{3}}>()
      y = Loop<body = step (int64 i, bool go, float[?, 3] a) => (bool still, float[?, 3] b)
        {{ {inside} still = Identity(go) }}>(count, , {start}) }}"""


@pytest.mark.parametrize(
    ("inside", "start", "words"),
    [
        ("u = Tanh(a) b = Concat<axis = 0>(u, x)", "x", "'a' changes its shape from step to step"),
        ("u = Floor(x) b = Add(u, a)", "k", "every path is cut"),
        ("[one] u = local.A(a) [two] v = local.B(u) b = Mul(a, v)", "x", "local::A .* 'one.*'"),
    ],
)
def test_refusals(inside: str, start: str, words: str) -> None:
    head = HEAD.replace("]", ', "local" : 1]')
    model = onnx.parser.parse_model(head + BODY.format(inside=inside, start=start))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 3), np.float32), "k"))
    with pytest.raises(onnx_attrib.CompileError, match=words):
        onnx_attrib.compile(model, "gradient", target="seed")
