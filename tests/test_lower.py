"""Models of all opsets, and what is rewritten before the rules see it.

Converted models are held against onnxruntime's own reading of the source, the rewritten ones also
by their gradients and their conservation.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

import onnx_attrib
from onnx_attrib.errors import CompileError
from onnx_attrib.passes.convert import convert

from . import numeric
from .numeric import Array


def parsed(version: int, body: str, ir: int = 7) -> ModelProto:
    return parse_model(f'<ir_version: {ir}, opset_import: ["": {version}]> g {body}')


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def drawn(model: ModelProto, seed: int = 0) -> dict[str, Array]:
    """Random values for the float inputs; a symbol stands for 3."""
    rng = np.random.default_rng(seed)
    return {
        info.name: rng.standard_normal(
            [d.dim_value or 3 for d in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in model.graph.input
    }


# -- older opsets ----------------------------------------------------------------------------------

SCALES = ["1,1,2,3", "1,1,1.5,2.3", "1,1,1.3,1"]
SMALLER = ["1,1,0.6,0.5", "1,1,0.75,0.4"]
IMAGE = "(float[N,2,5,6] x) => (float[N,2,h,w] y)"
OLDER: list[tuple[int, str]] = [
    *(
        (version, f"{IMAGE} <float[4] s = {{{scales}}}> {{ y = {op}<mode=\"{mode}\">(x, s) }}")
        for version, op, choices in ((9, "Upsample", SCALES), (10, "Resize", SCALES + SMALLER))
        for scales in choices
        for mode in ("nearest", "linear")
    ),
    *(
        (version, f"{IMAGE} {{ y = Upsample<mode=\"{mode}\", scales=[1.0,1.0,2.0,1.5]>(x) }}")
        for version in (7, 8)
        for mode in ("nearest", "linear")
    ),
    (10, f"{IMAGE} <float[4] s = {{1,1,0.6,1.7}}> {{ y = Resize<mode=\"linear\">(x, s) }}"),
    *(
        (version, f"(float[N,4,5] x) => (float[N,4,5] y) {{ y = {op}<axis={axis}>(x) }}")
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for version, axis in ((7, 0), (8, 1), (9, 2), (11, -1), (11, -2), (12, 0), (12, 1))
    ),
    (9, "(float[N,5] x) => (float[N,2] y, int64[N,2] i) { y, i = TopK<k=2, axis=1>(x) }"),
    (9, "(float[N,5] x) => (float[N,2] y) { y = Slice<axes=[1], starts=[1], ends=[3]>(x) }"),
    (10, '(float[N,5] x) => (float[N,8] y) { y = Pad<pads=[0,1,0,2], mode="edge">(x) }'),
    (10, "(float[N,5] x) => (float[N,5] y) { y = Clip<min=-0.5, max=0.4>(x) }"),
    (9, "(float[N,5] x) => (float[N,5] y) { y = Dropout<ratio=0.3>(x) }"),
    (12, "(float[N,1,5] x) => (float[N,5] y) { y = Squeeze<axes=[1]>(x) }"),
    (12, "(float[N,5] x) => (float[N] y) { y = ReduceSum<axes=[1], keepdims=0>(x) }"),
    (17, "(float[N,5] x) => (float[N] y) { y = ReduceMax<axes=[1], keepdims=0>(x) }"),
    (12, "(float[N,5] x) => (float[N,2] y, float[N,3] z) { y, z = Split<axis=1,split=[2,3]>(x) }"),
    (9, "(float[N,5] x, float[N,1] u) => (float[N,5] y) { i = ArgMax<axis=1>(x) "
        "y = Scatter<axis=1>(x, i, u) }"),
    (11, "(float[N,2,4,4] x) => (float[N,2,8,8] y) <int64[4] s = {3,2,8,8}, float[0] e = {}> "
         "{ y = Resize(x, e, e, s) }"),
    (18, "(float[N,4,3] x) => (float[N,4,3] y) <float[2] s = {2,3}, float[2] b = {1,-1}> "
         "{ y = GroupNormalization<num_groups=2>(x, s, b) }"),
    (7, "(float[N,3] x, float[3] s, float[3] b, float[3] m) => (float[N,3] y) "
        "{ v = Exp(m) y = BatchNormalization<spatial=0>(x, s, b, m, v) }"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "body"), OLDER)
def test_older_opsets(version: int, body: str) -> None:
    model = parsed(version, body, ir=8)
    feeds = drawn(model)
    converted = convert(copied(model), version)
    assert [o.version for o in converted.opset_import] == [21]
    try:
        expected = numeric.run(model, feeds)
    except Exception:
        # ONNX Runtime has no kernel for it, in its own version or any.
        names = [info.name for info in model.graph.output]
        evaluator = ReferenceEvaluator(copied(model))
        expected = dict(zip(names, evaluator.run(None, feeds), strict=True))
    for name, value in numeric.run(converted, feeds).items():
        np.testing.assert_allclose(value, expected[name], 1e-5, 1e-6, err_msg=name)


# -- newer ones ------------------------------------------------------------------------------------

NEWER: list[tuple[int, str]] = [
    (24, "(float[N,5] x) => (float[N,5] y) { y = Swish<alpha=1.5>(x) }"),
    (23, "(float[N,4,5] x, float[5] s) => (float[N,4,5] y) { y = RMSNormalization(x, s) }"),
    (23, "(float[N,4,5] x, float[4,5] s) => (float[N,4,5] y) "
         "{ y = RMSNormalization<axis=1, epsilon=0.1>(x, s) }"),
    (26, "(float[N,4] x) => (float[N,4] y) <int64 a = {1}> { y = CumProd(x, a) }"),
    (26, "(float[N,4] x) => (float[N,4] y) <int64 a = {-2}> "
         "{ y = CumProd<exclusive=1, reverse=1>(x, a) }"),
    (24, "(float[3,2,4,5] x, float[3,2,2,5] u) => (float[3,2,4,5] y) <int64[3] i = {0,3,2}> "
         '{ y = TensorScatter<mode="circular">(x, u, i) }'),
    (23, "(float[N,2,3,8] x, float[N,3,2] c, float[N,3,2] s) => (float[N,2,3,8] y) "
         "{ y = RotaryEmbedding<rotary_embedding_dim=4, interleaved=1>(x, c, s) }"),
    (23, "(float[3,4,16] x, float[10,4] c, float[10,4] s) => (float[3,4,16] y) "
         "<int64[3,4] p = {1,2,3,4,5,6,7,8,9,0,1,2}> "
         "{ y = RotaryEmbedding<num_heads=2>(x, c, s, p) }"),
    # Unchanged but for the types they take; the version is only declared anew.
    (22, "(float[N,2,4,4] x) => (float[N,2,1,1] y) { y = GlobalMaxPool(x) }"),
    (25, "(float[N,2,4,4] x) => (float[N,2,4,4] y) { z = Tan(x) y = HardSwish(z) }"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "body"), NEWER)
def test_newer_opsets(version: int, body: str) -> None:
    model = parsed(version, body, ir=10)
    numeric.check_gradient(model, drawn(model), drawn(model, 1))
    numeric.check_conservation(model, (drawn(model), drawn(model, 1)))


@pytest.mark.parametrize(
    ("version", "body", "name"),
    [
        (26, "(float[N] x) => (int32[N] y) { z = BitCast<to=6>(x) y = Add(z, z) }", "BitCast 'z'"),
        (
            8,
            "(float[2,3,4] x) => (float[2,3,4] y) { y = Scan<num_scan_inputs=1, body = b "
            "(float[4] i) => (float[4] o) { o = Relu(i) }>(, x) }",
            "Scan 'y'",
        ),
        (
            10,
            f'{IMAGE} <float[4] s = {{1,1,0.6,1.7}}> {{ y = Resize<mode="nearest">(x, s) }}',
            "Resize 'y'",
        ),
    ],
)
def test_what_opset_21_cannot_say_is_refused(version: int, body: str, name: str) -> None:
    model = parsed(version, body, ir=10)
    with pytest.raises(CompileError, match=name):
        convert(model, version)


# -- definitions by ONNX itself --------------------------------------------------------------------

LABELS = "int64[4] t = {0,2,1,2}"
BODIES = [
    f"(float[4,3] x) => (float y) <{LABELS}> {{ y = SoftmaxCrossEntropyLoss(x, t) }}",
    f"(float[4,3] x, float[3] w) => (float y, float[4,3] p) <{LABELS}> "
    "{ v = Exp(w) y, p = SoftmaxCrossEntropyLoss<ignore_index=1>(x, t, v) }",
    f"(float[4,3] x) => (float y) <{LABELS}> "
    '{ y = NegativeLogLikelihoodLoss<reduction="sum">(x, t) }',
    f"(float[4,3] x) => (float[4] y) <{LABELS}> "
    '{ y = NegativeLogLikelihoodLoss<reduction="none", ignore_index=2>(x, t) }',
    "(float[N,3] x) => (float[N,3] y) { h = Shrink<lambd=0.4, bias=0.1>(x) y = CastLike(h, x) }",
]


@pytest.mark.parametrize("body", BODIES)
def test_definitions(body: str) -> None:
    model, output = numeric.joined(parsed(21, body, ir=10))
    numeric.check_gradient(model, drawn(model), drawn(model, 1), output=output)
    numeric.check_conservation(model, (drawn(model), drawn(model, 1)), output=output)


# -- sequences and optionals -----------------------------------------------------------------------

SEQUENCES = [
    "(float[N,4] x, float[N,4] z) => (float[N,4] y) <int64 a = {1}, int64 b = {-2}> "
    "{ q = SequenceConstruct(x, z) u = SequenceAt(q, a) v = SequenceAt(q, b) y = Mul(u, v) }",
    "(float[N,4] x, float[N,4] z) => (float[N,12] y) <int64 a = {0}> "
    "{ e = SequenceEmpty() q = SequenceInsert(e, x) r = SequenceInsert(q, z, a) "
    "s = SequenceInsert(r, z) y = ConcatFromSequence<axis=1>(s) }",
    "(float[N,4] x) => (float[4,N] y) <int64 a = {1}, int64[1] k = {1}> "
    "{ q = SplitToSequence<axis=1, keepdims=0>(x) r = SequenceErase(q, a) "
    "w = ReduceMax<keepdims=0>(x, k) u = SequenceInsert(r, w) "
    "y = ConcatFromSequence<axis=0, new_axis=1>(u) }",
    "(float[N,5] x) => (float[N,2] y) <int64[2] p = {3,2}, int64 a = {1}> "
    "{ q = SplitToSequence<axis=1>(x, p) y = SequenceAt(q, a) }",
    "(float[N,4] x) => (float[N,4] y) { o = Optional(x) p = Identity(o) "
    "y = OptionalGetElement(p) }",
]


@pytest.mark.parametrize("body", SEQUENCES)
def test_sequences(body: str) -> None:
    model = parsed(18, body, ir=10)
    numeric.check_gradient(model, drawn(model), drawn(model, 1))
    numeric.check_conservation(model, (drawn(model), drawn(model, 1)))


# -- quantized models ------------------------------------------------------------------------------


def quantized(body: str, **weights: Array) -> ModelProto:
    model = parsed(21, body, ir=10)
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return model


def gradient_of(model: ModelProto, feeds: dict[str, Array], seed: Array) -> Array:
    """The gradient; the outputs must stay, and standard operators alone remain."""
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    numeric.check_graph(compiled)
    results, expected = numeric.run(compiled, {**feeds, "seed": seed}), numeric.run(model, feeds)
    np.testing.assert_array_equal(results["y"], expected["y"])
    numeric.check_conservation(model, (feeds, {"x": drawn(model, 1)["x"]}))
    path = onnx_attrib.compile(model, method="integrated_gradients", target="seed")
    assert np.isfinite(numeric.run(path, {**feeds, "seed": seed})["x_attribution"]).all()
    return results["x_attribution"]


STAIRS = {
    "int8": ("<float s = {0.01}, int8 z = {10}>", 0),
    "uint8": ("<float s = {0.01}, uint8 z = {128}>", 0),
    "int16": ("<float s = {0.00002}, int16 z = {0}>", 0),
    "axis": ("<float[4] s = {0.01,0.001,0.02,0.005}, uint8[4] z = {128,100,0,255}>", 1),
}


@pytest.mark.parametrize("moves", ["v = Identity(q)", "t = Flatten(q) v = Reshape(t, n)"])
@pytest.mark.parametrize("name", STAIRS)
def test_straight_through(name: str, moves: str) -> None:
    """One where nothing is cut off, zero beyond."""
    constants, axis = STAIRS[name]
    moves = "v = Identity(q)" if axis else moves
    model = quantized(
        f"(float[N,4] x) => (float[N,4] y) {constants} {{ q = QuantizeLinear<axis=1>(x, s, z) "
        f"{moves} y = DequantizeLinear<axis=1>({'q' if axis else 'v'}, s, z) }}",
        n=np.array([-1, 4]),
    )
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    feeds, seed = drawn(model), drawn(model, 5)["x"]
    info, zero, scale = np.iinfo(values["z"].dtype), values["z"].astype(float), values["s"]
    low, high = ((limit - zero) * scale for limit in (info.min, info.max))
    within = (feeds["x"] >= low - scale / 2) & (feeds["x"] <= high + scale / 2)
    assert within.any()
    assert not within.all()
    found = gradient_of(model, feeds, seed)
    np.testing.assert_allclose(found, np.where(within, seed, 0), 1e-6)


def test_dynamic_quantization_is_the_identity() -> None:
    model = quantized(
        "(float[N,4] x) => (float[N,4] y) "
        "{ q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }"
    )
    seed = drawn(model, 5)["x"]
    np.testing.assert_allclose(gradient_of(model, drawn(model), seed), seed, 1e-6)


def test_blocks() -> None:
    model = quantized(
        "(float[2,4] x) => (float[2,4] y) { q = QuantizeLinear<axis=1, block_size=2>(x, s, z) "
        "y = DequantizeLinear<axis=1, block_size=2>(q, s, z) }",
        s=np.array([[0.1, 0.2], [0.3, 0.1]], np.float32),
        z=np.zeros((2, 2), np.int16),
    )
    seed = drawn(model, 5)["x"]
    np.testing.assert_allclose(gradient_of(model, drawn(model), seed), seed, 1e-6)


PRODUCTS = {
    "QLinearMatMul": "{ q = QuantizeLinear(x, s, z) i = QLinearMatMul(q, s, z, w, k, o, t, u) "
    "y = DequantizeLinear(i, t, u) }",
    "MatMulInteger": "{ q, d, v = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, v) "
    "f = Cast<to=1>(i) c = Mul(d, k) y = Mul(f, c) }",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_quantized_products(name: str) -> None:
    """The gradient of the product of the numbers that the integers stand for."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-20, 20, (4, 3)).astype(np.int8)
    used = {
        "w": weights,
        "k": np.array(0.05, np.float32),
        "o": np.array(0, np.int8),
        "s": np.array(0.05, np.float32),
        "z": np.array(100, np.uint8),
        "t": np.array(0.2, np.float32),
        "u": np.array(128, np.uint8),
    }
    body = PRODUCTS[name]
    present = {n: v for n, v in used.items() if f"{n}," in body or f"{n})" in body}
    model = quantized(f"(float[N,4] x) => (float[N,3] y) {body}", **present)
    seed = rng.standard_normal((3, 3)).astype(np.float32)
    expected = seed @ (0.05 * weights.astype(np.float32)).T
    np.testing.assert_allclose(gradient_of(model, drawn(model), seed), expected, 1e-5, 1e-6)


def test_quantized_convolution() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(-20, 20, (3, 2, 3, 3)).astype(np.int8)
    scales = np.array([0.05, 0.02, 0.03], np.float32)
    constants = (
        "<float s = {0.05}, uint8 z = {100}, float t = {0.3}, uint8 u = {128}, "
        "int8[3] o = {0,0,0}, int32[3] b = {10,-20,5}>"
    )
    model = quantized(
        f"(float[N,2,5,5] x) => (float[N,3,3,3] y) {constants} {{ q = QuantizeLinear(x, s, z) "
        "i = QLinearConv(q, s, z, w, k, o, t, u, b) p = MaxPool<kernel_shape=[1,1]>(i) "
        "y = DequantizeLinear(p, t, u) }",
        w=weights,
        k=scales,
    )
    plain = quantized(
        "(float[N,2,5,5] x) => (float[N,3,3,3] y) { y = Conv(x, f) }",
        f=weights * scales[:, None, None, None],
    )
    feeds, seed = drawn(model), rng.standard_normal((3, 3, 3, 3)).astype(np.float32)
    compiled = onnx_attrib.compile(plain, method="gradient", target="seed")
    expected = numeric.run(compiled, {**feeds, "seed": seed})["x_attribution"]
    np.testing.assert_allclose(gradient_of(model, feeds, seed), expected, 1e-4, 1e-5)


def test_a_scale_that_is_an_input() -> None:
    model = parsed(
        21,
        "(float[3] s) => (float[2,3] y) <int8[2,3] q = {1,-2,3,4,5,-6}> "
        "{ y = DequantizeLinear<axis=1>(q, s) }",
        ir=10,
    )
    numeric.check_gradient(model, drawn(model))
    numeric.check_conservation(model, (drawn(model), drawn(model, 1)))


@pytest.mark.parametrize(
    "body",
    [
        "{ q = QuantizeLinear(x, s, z) c = Cast<to=1>(q) y = Add(x, c) }",
        "{ q = QuantizeLinear(x, s, z) c = DequantizeLinear(q, t, z) y = Add(x, c) }",
    ],
)
def test_integers_that_lead_elsewhere_are_refused(body: str) -> None:
    """Never a silent zero on part of the way."""
    model = parsed(
        21,
        "(float[N,4] x) => (float[N,4] y) <float s={0.01}, float t={0.1}, int8 z={0}>" + body,
        ir=10,
    )
    with pytest.raises(CompileError, match="quantized integers"):
        onnx_attrib.compile(model, method="gradient", target="seed")
