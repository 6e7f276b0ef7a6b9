"""What random graphs found (``test_random_graphs.py``), each in its smallest form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import OptionError

from . import numeric
from .numeric import Array


def text(body: str, opset: int = 21, ir: int = 10, **arrays: Array) -> ModelProto:
    """A model from ONNX text, with ``arrays`` as further initializers."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {body}')
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def explained(model: ModelProto, feeds: Mapping[str, Array], **request: Any) -> dict[str, Array]:
    """Compile, check and run."""
    compiled = onnx_attrib.compile(model, **request)
    numeric.check_graph(compiled, model)
    return numeric.run(compiled, feeds)


# -- convergence_delta -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "output", "nodes"),
    [
        ("float[6] x", "float[1] y", "y = Slice (x, five, six)"),
        ("float[3] x", "float[5] y", 'y = Pad <mode = "reflect"> (x, pads)'),
        ("float[3, 3] x", "float[9] y", "y = Reshape (x, flat)"),
        ("float[N, 3] x", "float[M] y", "y = Reshape (x, flat)"),
        ("float[N, 3] x", "float[M, 3] y", "y = Concat <axis = 0> (x, x)"),
    ],
)
def test_delta_where_the_output_has_other_samples(
    rng: np.random.Generator, inputs: str, output: str, nodes: str
) -> None:
    """The sums of inputs and output were subtracted sample by sample, which they do not share."""
    model = text(
        f"""g ({inputs}) => ({output}) <int64[1] five = {{5}}, int64[1] six = {{6}},
        int64[2] pads = {{2, 0}}, int64[1] flat = {{-1}}> {{ {nodes} }}"""
    )
    shape = [d.dim_value or 4 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = normal(rng, *shape)
    seed = normal(rng, *numeric.run(model, {"x": x})["y"].shape)
    found = explained(model, {"x": x, "seed": seed}, target="seed", delta=True)
    assert found["convergence_delta"].shape == (1,)
    np.testing.assert_allclose(found["convergence_delta"], 0, atol=1e-5)


def test_delta_for_each_sample_behind_a_reshape(rng: np.random.Generator) -> None:
    """That the samples are the same ones is known at run time only."""
    model = text(
        """g (float[N, 2, 3] x) => (float[M, 6] y) <int64[2] s = {-1, 6}> {
        h = Reshape (x, s) y = Sigmoid (h) }"""
    )
    x, seed = normal(rng, 4, 2, 3), normal(rng, 4, 6)
    found = explained(model, {"x": x, "seed": seed}, target="seed", delta=True)
    assert found["convergence_delta"].shape == (4,)


# -- one reference for all samples -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "nodes"),
    [
        ("N", "s = Shape (x) n = Gather <axis = 0> (s, zero) f = Cast <to = 1> (n) y = Div (x, f)"),
        ("N, 3", "n = Size (x) f = Cast <to = 1> (n) y = Div (x, f)"),
        ("N", "y = Softmax <axis = 0> (x)"),
        ("N, 3", "y = LogSoftmax <axis = -2> (x)"),
        ("N, 3", "a = Abs (x) b = Add (a, half) y = LpNormalization <axis = 0> (b)"),
        ("N, 3", "y = CumSum (x, zero)"),
        ("N, 3", "y = Trilu (x)"),
        ("N, 2, 2, 3", "y = MeanVarianceNormalization (x)"),
    ],
)
def test_samples_that_meet_need_a_reference_each(
    rng: np.random.Generator, shape: str, nodes: str
) -> None:
    """The reference was evaluated with batch 1 though the model mixes or counts its samples."""
    model = text(
        f"g (float[{shape}] x) => (float[{shape}] y) <int64 zero = {{0}}, float half = {{0.5}}> "
        f"{{ {nodes} }}"
    )
    x = normal(rng, 4, *[int(d) for d in shape.split(", ")[1:]])
    base = normal(rng, 1, *x.shape[1:])
    y, y_bar = (numeric.run(model, {"x": v})["y"] for v in (x, np.repeat(base, 4, axis=0)))
    seed = np.asarray(np.sign(y - y_bar), np.float32)
    feeds = {"x": x, "x_baseline": base, "seed": seed}
    found = explained(model, feeds, target="seed", baseline="input")
    np.testing.assert_allclose(found["x_attribution"].sum(), np.abs(y - y_bar).sum(), rtol=1e-4)


@pytest.mark.parametrize("method", ["deeplift", "integrated-gradients"])
@pytest.mark.parametrize(
    ("shape", "nodes"),
    [
        ("N, 3", "y = PRelu (x, each)"),
        ("N, 3", "y = Gemm (x, square, each)"),
        ("N, 3", "y = ScatterND (x, rows, row)"),
        ("N, 3", "y = ScatterElements <axis = 1> (x, places, each)"),
        ("N, 3", "y = ReverseSequence <time_axis = 1, batch_axis = 0> (x, lengths)"),
        (
            "N, 1, 3",
            """t = Transpose <perm = [1, 0, 2]> (x) h = RNN <hidden_size = 3> (t, w, w, , , h0)
            q = Squeeze (h, one) y = Transpose <perm = [1, 0, 2]> (q)""",
        ),
    ],
)
def test_constants_with_an_entry_for_each_sample(
    rng: np.random.Generator, shape: str, nodes: str, method: str
) -> None:
    """The output has the first operand's shape and does not show that the batch cannot change."""
    model = text(
        f"""g (float[{shape}] x) => (float[{shape}] y) <int64[1] one = {{1}},
        int64[2, 1] rows = {{1, 0}}, int64[2, 3] places = {{0, 1, 2, 2, 0, 1}},
        int64[2] lengths = {{2, 3}}> {{ {nodes} }}""",
        each=normal(rng, 2, 3),
        row=normal(rng, 2, 3),
        square=normal(rng, 3, 3),
        w=normal(rng, 1, 3, 3),
        h0=normal(rng, 1, 2, 3),
    )
    x = normal(rng, 2, *[int(d) for d in shape.split(", ")[1:]])
    base = normal(rng, 1, *x.shape[1:])
    y, y_bar = (numeric.run(model, {"x": v})["y"] for v in (x, np.repeat(base, 2, axis=0)))
    seed = np.asarray(np.sign(y - y_bar), np.float32)
    feeds = {"x": x, "x_baseline": base, "seed": seed}
    options = {} if method == "deeplift" else {"steps": 400, "quadrature": "middle"}
    found = explained(model, feeds, method=method, target="seed", baseline="input", **options)
    loose = 1e-4 if method == "deeplift" else 1e-2
    np.testing.assert_allclose(found["x_attribution"].sum(), np.abs(y - y_bar).sum(), loose, 1e-5)


def test_a_size_other_than_the_batch_may_be_shared(rng: np.random.Generator) -> None:
    """A scale by another run-time size is the same for every sample."""
    model = text(
        """g (float[N, D] x) => (float[N, D] y) <int64 one = {1}> {
        s = Shape (x) n = Gather <axis = 0> (s, one) f = Cast <to = 1> (n) y = Div (x, f) }"""
    )
    compiled = onnx_attrib.compile(model, target="seed", baseline="input")
    assert not any(node.op_type == "Expand" for node in compiled.graph.node)


# -- differences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "kink"),
    [
        ("y = Elu <alpha = 0.3> (x)", 0.0),
        ("y = Selu (x)", 0.0),
        ("y = HardSwish (x)", -3.0),
        ("p = Greater (x, zero) t = Tanh (x) h = Mul (t, half) y = Where (p, x, h)", 0.0),
    ],
)
@pytest.mark.parametrize("name", ["float", "float16"])
def test_a_kink_between_two_close_points(nodes: str, kink: float, name: str) -> None:
    """The mean of the two slopes was taken for the slope between them."""
    dtype = np.dtype(np.float16 if name == "float16" else np.float32)
    model = text(
        f"g ({name}[N] x) => ({name}[N] y) {{ {nodes} }}",
        zero=np.zeros((), dtype),
        half=np.full((), 0.5, dtype),
    )
    close = 0.02 if name == "float16" else 1e-3
    x = np.array([kink + close, kink - close / 3], dtype)
    base = np.full(2, kink - close, dtype)
    feeds = {"x": x, "x_baseline": base, "seed": np.ones(2, dtype)}
    found = explained(model, feeds, target="seed", baseline="input")["x_attribution"]
    y, y_bar = (numeric.run(model, {"x": v})["y"].astype(np.float64) for v in (x, base))
    np.testing.assert_allclose(found, y - y_bar, rtol=0, atol=close / 20)


@pytest.mark.parametrize("node", ["y = Log (x)", "y = Pow (x, half)", "y = Pow (x, minus)"])
def test_close_to_zero_where_the_slope_changes_fast(node: str) -> None:
    """The mean of the slopes was taken for steps that are small, but not next to the argument."""
    model = text(
        f"""g (float[N] x) => (float[N] y) <float half = {{0.5}}, float minus = {{-0.7}}> {{
        {node} }}"""
    )
    x = np.array([1e-3, 4e-3, 1e-4, 2e-3], np.float32)
    base = np.array([4e-3, 1e-3, 3e-4, 1.9e-3], np.float32)
    feeds = {"x": x, "x_baseline": base, "seed": np.ones(4, np.float32)}
    found = explained(model, feeds, target="seed", baseline="input")["x_attribution"]
    y, y_bar = (numeric.run(model, {"x": v})["y"] for v in (x, base))
    np.testing.assert_allclose(found, y - y_bar, rtol=1e-3)


# -- types and shapes ------------------------------------------------------------------------------


DTYPES: dict[str, Any] = {"float16": np.float16, "float": np.float32, "double": np.float64}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_in_every_type(rng: np.random.Generator, name: str, axis: int) -> None:
    """Its statistics are float32, whatever the input is."""
    dtype = DTYPES[name]
    dims = (3, 4) if axis == 1 else (4,)
    model = text(
        f"""g ({name}[N, 3, 4] x) => ({name}[N, 3, 4] y) {{
        y = LayerNormalization <axis = {axis}, epsilon = 0.05> (x, scale, bias) }}""",
        scale=normal(rng, *dims, dtype=dtype),
        bias=normal(rng, *dims, dtype=dtype),
    )
    x, base = normal(rng, 2, 3, 4, dtype=dtype), normal(rng, 2, 3, 4, dtype=dtype)
    numeric.check_gradient(model, {"x": x})
    numeric.check_conservation(model, ({"x": x}, {"x": base}))


def test_group_normalization_inside_a_network(rng: np.random.Generator) -> None:
    """ONNX infers nothing for it, nor for what follows."""
    model = text(
        """g (float[N, 4, 3] x) => (float[N, 4, 3] y) {
        h = GroupNormalization <num_groups = 2, epsilon = 0.05> (x, scale, bias) y = Tanh (h) }""",
        scale=normal(rng, 4),
        bias=normal(rng, 4),
    )
    x, base = normal(rng, 2, 4, 3), normal(rng, 2, 4, 3)
    numeric.check_gradient(model, {"x": x})
    numeric.check_conservation(model, ({"x": x}, {"x": base}))


@pytest.mark.parametrize(
    ("node", "size", "name"),
    [
        ("Pad <pads = [1, 1], value = 0.3>", 4, "float16"),
        ("Pad <pads = [1, 1], value = 0.3>", 4, "float"),
        ("Pad <pads = [1, 1], value = 0.3>", 4, "double"),
        ("Pad <pads = [1, 1]>", 4, "double"),
        ("Clip <min = -0.5, max = 0.5>", 2, "float16"),
        ("Clip <min = -0.5, max = 0.5>", 2, "float"),
    ],
)
def test_attributes_that_became_inputs_have_the_type_of_the_data(
    rng: np.random.Generator, node: str, size: int, name: str
) -> None:
    """ONNX's converter makes them float32."""
    model = text(f"g ({name}[2] x) => ({name}[{size}] y) {{ y = {node} (x) }}", opset=9, ir=4)
    dtype = DTYPES[name]
    numeric.check_gradient(model, {"x": normal(rng, 2, dtype=dtype)})


@pytest.mark.parametrize("method", ["gradient", "deeplift", "epsilon-lrp"])
def test_a_scalar_is_its_own_slope(method: str) -> None:
    """The seed of a region came back unchanged, and a constant's shape cannot be set."""
    model = text("g (float x) => (float y) { y = PRelu (x, x) }", opset=16, ir=8)
    feeds = {"x": np.float32(-0.5), "seed": np.float32(1)}
    found = explained(
        model, {k: np.asarray(v) for k, v in feeds.items()}, method=method, target="seed"
    )
    assert found["x_attribution"].shape == ()


@pytest.mark.parametrize("first", ["Div (c, x)", "Max (x, c)"])
def test_a_chain_starts_behind_what_broadcasts_its_argument(
    rng: np.random.Generator, first: str
) -> None:
    """Relevance came back in the broadcast shape."""
    model = text(
        f"g (float[3] x) => (float[2, 3] y) {{ h = {first} y = Abs (h) }}", c=normal(rng, 2, 3)
    )
    feeds = {"x": normal(rng, 3), "seed": normal(rng, 2, 3)}
    found = explained(model, feeds, method="epsilon-lrp", target="seed")
    assert found["x_attribution"].shape == (3,)


def test_an_output_declared_with_a_symbol_of_its_own(rng: np.random.Generator) -> None:
    """Its shape is that of the input all the same: the choice is one nonlinearity of it."""
    model = text(
        """g (float[N] x) => (float[M] y) <float zero = {0}> {
        p = Greater (x, zero) s = Softsign (x) y = Where (p, x, s) }"""
    )
    x, base = normal(rng, 5), normal(rng, 5)
    numeric.check_conservation(model, ({"x": x}, {"x": base}))
    compiled = onnx_attrib.compile(model, target="seed")
    assert compiled.graph.output[0] == model.graph.output[0]


def test_an_output_that_is_read_again_declared_with_symbols_of_its_own(
    rng: np.random.Generator,
) -> None:
    """Converted from an old opset, what is computed from it had these symbols and it had others."""
    model = text(
        """g (float[N, 3] x) => (float[K, 4] h, float[M, 4] y) <float zero = {0},
        int64[4] pads = {1, 1, 0, 0}> {
        h = Pad (x, pads) p = Greater (h, zero) t = Tanh (h) y = Where (p, h, t) }""",
        opset=15,
        ir=8,
    )
    x, base = normal(rng, 3, 3), normal(rng, 3, 3)
    numeric.check_conservation(model, ({"x": x}, {"x": base}), output="y")


def test_a_tensor_of_unknown_rank_is_refused_as_an_output() -> None:
    """An output has to declare a shape; the graph was invalid."""
    model = text(
        """g (float[A, B] x) => (float y) <int64[1] flat = {-1}> {
        h = Squeeze (x) k = Abs (h) y = ReduceSum <keepdims = 0> (k) }"""
    )
    with pytest.raises(OptionError, match="rank of 'h'"):
        onnx_attrib.compile(model, method="gradient", inputs=["h"])


@pytest.mark.parametrize("stated", [True, False])
def test_the_state_of_a_loop_has_a_rank(rng: np.random.Generator, stated: bool) -> None:
    """ONNX infers none, as it might change with the steps; the body says that it does not."""
    model = text(
        """g (float[N, 4] x) => (float[N, 4] y) <int64 count = {2}> {
        h = Loop <body = step (int64 i, bool go, float[A, B] s) => (bool on, float[A, B] t) {
            on = Identity (go) t = Tanh (s) }> (count, , x)
        y = RMSNormalization (h, scale) }""",
        opset=23,
        scale=normal(rng, 4),
    )
    if not stated:
        body = model.graph.node[0].attribute[0].g
        for info in (body.input[2], body.output[1]):
            info.type.tensor_type.ClearField("shape")
    x, base = normal(rng, 3, 4), normal(rng, 3, 4)
    numeric.check_gradient(model, {"x": x})
    numeric.check_conservation(model, ({"x": x}, {"x": base}))


@pytest.mark.parametrize(
    "nodes",
    [
        """h = LpPool <kernel_shape = [3], strides = [2], auto_pad = "SAME_UPPER"> (x)
        y = ReduceMean (h, last)""",
        """s = Shape <start = -1> (x) h, i = TopK (x, s) y = ReduceMax (h, last)""",
        "h = ReduceProd (x, last) y = Tanh (h)",
    ],
)
def test_relevance_of_what_has_a_size_at_run_time(rng: np.random.Generator, nodes: str) -> None:
    """These were refused by methods that follow definitions."""
    model = text(
        f"g (float[N, 2, M] x) => (float[N, 2, 1] y) <int64[1] last = {{-1}}> {{ {nodes} }}"
    )
    feeds = {"x": normal(rng, 3, 2, 5), "seed": normal(rng, 3, 2, 1)}
    found = explained(model, feeds, method="epsilon-lrp", target="seed")["x_attribution"]
    assert found.shape == (3, 2, 5)
    assert np.isfinite(found).all()
    assert found.any()


# -- around onnxruntime ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_a_rectifier_that_is_off_at_both_points(name: str) -> None:
    """onnxruntime left out a sum with a number too small for float32, and divided 0 by 0."""
    model = text(f"g ({name}[N] x) => ({name}[N] y) {{ r = Relu (x) y = Relu (r) }}")
    dtype = DTYPES[name]
    x, base = np.array([1, -1, -2, 0], dtype), np.array([-1, -3, 4, 0], dtype)
    feeds = {"x": x, "x_baseline": base, "seed": np.ones(4, dtype)}
    found = explained(model, feeds, target="seed", baseline="input")["x_attribution"]
    np.testing.assert_allclose(found, np.array([1, 0, -4, 0]), rtol=2e-3)


def test_casts_there_and_back_outside_a_loop(rng: np.random.Generator) -> None:
    """onnxruntime 1.31 drops the pair of Casts of the seed, but the Loop reads the second."""
    model = text(
        """g (float[3, 4] x) => (float[2, 6] y) <int64[2] s = {2, 6}> {
        r = Reshape (x, s) d = Cast <to = 11> (r) y = Cast <to = 1> (d) }"""
    )
    x, seed = normal(rng, 3, 4), normal(rng, 2, 6)
    feeds = {"x": x, "seed": seed}
    found = explained(model, feeds, method="integrated-gradients", target="seed", steps=3)
    np.testing.assert_allclose(found["x_attribution"], x * seed.reshape(3, 4), rtol=1e-5)


def test_operands_of_a_minimum_in_16_bits(rng: np.random.Generator) -> None:
    """onnxruntime rounded the minimum but not its operands: none of them was equal to it."""
    model = text(
        """g (float16 x, float16[6, 4] y) => (float16[6, 1] z) <int64[1] a = {1}> {
        h = Min (y, x) z = ReduceMean (h, a) }"""
    )
    half = np.float16
    x, base = (np.asarray(v, half) for v in (-1.43, 0.3))
    y, y_base = normal(rng, 6, 4, dtype=half), normal(rng, 6, 4, dtype=half)
    seed = normal(rng, 6, 1, dtype=half)
    feeds = {"x": x, "y": y, "x_baseline": base, "y_baseline": y_base, "seed": seed}
    request = {"target": "seed", "steps": 3, "quadrature": "middle"}
    found = explained(model, feeds, method="integrated-gradients", baseline="input", **request)
    total = 0.0
    for alpha in (1 / 6, 1 / 2, 5 / 6):
        a, b = (v + alpha * (u.astype(float) - v) for u, v in ((x, base), (y, y_base)))
        total += float(np.sum(seed * (a < b).sum(1, keepdims=True) / 4)) / 3
    np.testing.assert_allclose(found["x_attribution"], total * float(x - base), rtol=2e-2)


# -- what a Where discards -------------------------------------------------------------------------

DISCARDING = {
    "exponential unit": "c = Greater (x, zero) e = Exp (x) s = Sub (e, one) y = Where (c, x, s)",
    "logarithm": "c = Greater (x, zero) l = Log (x) y = Where (c, l, zero)",
    "behind arithmetic": """c = Greater (x, zero) l = Log (x) t = Mul (l, two) s = Add (t, one)
        y = Where (c, s, zero)""",
    "root": "c = Greater (x, zero) r = Sqrt (x) y = Where (c, r, zero)",
    "power": "c = Greater (x, zero) r = Pow (x, half) y = Where (c, r, zero)",
    "reciprocal": "c = Equal (x, zero) r = Reciprocal (x) y = Where (c, zero, r)",
    "product": "c = Equal (x, zero) r = Div (one, x) p = Mul (r, r) y = Where (c, zero, p)",
    "behind a bounded one": "c = Equal (x, zero) r = Div (two, x) t = Tanh (r) y = Where (c, x, t)",
}


@pytest.mark.parametrize("body", DISCARDING.values(), ids=DISCARDING)
@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_discarded_values_do_no_harm(body: str, method: str) -> None:
    """Zero multipliers times infinite derivatives were NaN."""
    model = text(
        f"""g (float[N, 5] x) => (float[N, 5] y)
        <float zero = {{0}}, float one = {{1}}, float two = {{2}}, float half = {{0.5}}>
        {{ {body} }}"""
    )
    x = np.array([[200, -1, 0, 2, -200], [1, 0, 3, -0.5, 100]], np.float32)
    seed = np.array([[1, -2, 3, -1, 2], [2, 1, -1, 1, 1]], np.float32)
    found = explained(model, {"x": x, "seed": seed}, method=method, target="seed")["x_attribution"]
    at_zero = numeric.run(model, {"x": np.zeros_like(x)})["y"]
    if method == "deeplift":
        expected = seed * (numeric.run(model, {"x": x})["y"] - at_zero)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        return
    wide = numeric.Oracle(model, "y", {"x": x})
    for i, j in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i, j] = 1
        exact = numeric.difference(wide, {"x": x}, {"x": step}, seed)
        assert np.isfinite(found[i, j])
        if exact.smooth:
            np.testing.assert_allclose(found[i, j], exact.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("choice", ["y = Where (c, zero, q)", "d = Not (c) y = Where (d, q, zero)"])
@pytest.mark.parametrize("shape", ["float[N, 3]", "float[N, 1]"])
def test_quotients_that_count_as_zero(rng: np.random.Generator, shape: str, choice: str) -> None:
    """a / b where b is not zero, else 0: conserves where b is zero at one of the points."""
    model = text(
        f"""g (float[N, 3] a, {shape} b) => (float[N, 3] y) <float zero = {{0}}> {{
        c = Equal (b, zero) q = Div (a, b) {choice} }}"""
    )
    a, a_bar = normal(rng, 4, 3), normal(rng, 4, 3)
    sides = (4, 3 if "3" in shape else 1)
    b, b_bar = (rng.uniform(1, 2, sides).astype(np.float32) for _ in range(2))
    b[0], b_bar[1], b[2], b_bar[2] = 0, 0, 0, 0
    feeds, other = {"a": a, "b": b}, {"a": a_bar, "b": b_bar}
    seed = normal(rng, 4, 3)
    placed = {f"{name}_baseline": value for name, value in other.items()}
    found = explained(model, {**feeds, **placed, "seed": seed}, target="seed", baseline="input")
    change = seed * (numeric.run(model, feeds)["y"] - numeric.run(model, other)["y"])
    total = found["a_attribution"].sum(1) + found["b_attribution"].sum(1)
    np.testing.assert_allclose(total, change.sum(1), rtol=1e-4, atol=1e-5)
    numeric.check_gradient(model, {"a": a, "b": b})


@pytest.mark.parametrize(
    "zeros", ["z = Mul (x, zero)", "s = Shape (x) z = ConstantOfShape (s)"], ids=["of x", "like x"]
)
def test_zeros_of_the_same_size_are_constants(rng: np.random.Generator, zeros: str) -> None:
    """A root where x is positive: the reference's NaN reached the sum."""
    model = text(
        f"""g (float[N, 4] x) => (float[N, 4] y) <float zero = {{0}}> {{
        {zeros} c = Greater (x, z) r = Sqrt (x) y = Where (c, r, z) }}"""
    )
    x, base = normal(rng, 3, 4), -np.abs(normal(rng, 3, 4))
    feeds = {"x": x, "x_baseline": base, "seed": np.ones((3, 4), np.float32)}
    found = explained(model, feeds, target="seed", baseline="input")["x_attribution"]
    np.testing.assert_allclose(found, np.sqrt(np.maximum(x, 0)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("root", ["y = Sqrt (q)", "y = Pow (q, half)", "y = Pow (q, powers)"])
def test_lengths_of_nothing(rng: np.random.Generator, root: str) -> None:
    """The root's slope is infinite where a vector is zero at both points."""
    model = text(
        f"""g (float[N, 4] x) => (float[N, 1] y) <int64[1] a = {{1}}, float half = {{0.5}},
        float[1, 1] powers = {{0.25}}> {{ p = Mul (x, x) q = ReduceSum (p, a) {root} }}"""
    )
    x = normal(rng, 3, 4) * np.array([[1], [0], [1]], np.float32)
    base = normal(rng, 3, 4) * np.array([[1], [0], [0]], np.float32)
    feeds = {"x": x, "x_baseline": base, "seed": np.ones((3, 1), np.float32)}
    found = explained(model, feeds, target="seed", baseline="input")
    change = found["y"] - numeric.run(model, {"x": base})["y"]
    np.testing.assert_allclose(
        found["x_attribution"].sum(1, keepdims=True), change, rtol=1e-4, atol=1e-5
    )


# -- what files say --------------------------------------------------------------------------------


def test_spectra_of_signals_of_unknown_length(rng: np.random.Generator) -> None:
    """ONNX infers nothing for these; and onnxruntime takes signals without a last axis of 1."""
    window = np.hanning(9)[:8].astype(np.float32)
    model = text(
        """g (float[B, T] x) => (float[B, F, 3] y) <int64 four = {4}, int64[1] last = {3}> {
        s = STFT <onesided = 1> (x, four, window) p = ReduceSumSquare <keepdims = 0> (s, last)
        m = MatMul (p, mels) c = Add (m, one) y = Log (c) }""",
        opset=18,
        ir=8,
        window=window,
        mels=np.abs(normal(rng, 5, 3)),
        one=np.float32(1),
    )
    feeds = {"x": normal(rng, 2, 30)}
    numeric.check_gradient(model, feeds)
    numeric.check_conservation(model, (feeds, {"x": normal(rng, 2, 30)}))


def test_a_declared_rank_that_is_wrong(rng: np.random.Generator) -> None:
    """What the file says of an output gives way to what the graph computes."""
    model = text(
        """g (float[N, 6] x) => (float[N, M] y) <int64[3] s = {0, 2, 3}> {
        r = Reshape (x, s) y = Tanh (r) }"""
    )
    x = normal(rng, 2, 6)
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    onnx.checker.check_model(compiled, full_check=True)
    found = numeric.run(compiled, {"x": x, "seed": np.ones((2, 2, 3), np.float32)})
    assert found["y"].shape == (2, 2, 3)
    np.testing.assert_allclose(found["x_attribution"], 1 - np.tanh(x) ** 2, rtol=1e-5, atol=1e-6)


def test_a_file_of_one_domain(rng: np.random.Generator) -> None:
    """Nothing of the default domain is imported where nothing of it is used."""
    model = text("g (float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }")
    del model.opset_import[:], model.graph.node[:]
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    scaler = {"offset": [1.0, 2.0], "scale": [3.0, 4.0], "domain": "ai.onnx.ml"}
    model.graph.node.append(onnx.helper.make_node("Scaler", ["x"], ["y"], **scaler))
    x, seed = normal(rng, 3, 2), normal(rng, 3, 2)
    found = explained(model, {"x": x, "seed": seed}, method="gradient", target="seed")
    np.testing.assert_allclose(found["x_attribution"], seed * [3, 4], rtol=1e-6)
