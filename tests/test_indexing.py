"""Operators that select, place or repeat entries: static, symbolic and run-time parameters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

import onnx_attrib
from onnx_attrib import UnsupportedOpError

from .numeric import Array, check_conservation, check_gradient, run, symbolic

HEADER = '<ir_version: 10, opset_import: ["": 21]>'
FORMS = ("fixed", "symbolic", "run-time")


@dataclass(frozen=True)
class Case:
    """Nodes as ONNX text that make ``y`` of float inputs (by shape) and parameters.

    ``apart``: samples are independent along axis 0, so that one baseline serves them all.
    ``positive``: the inputs are.
    """

    name: str
    nodes: str
    floats: dict[str, tuple[int, ...]]
    parameters: dict[str, Array] = field(default_factory=dict)
    apart: bool = True
    positive: bool = False
    forms: tuple[str, ...] = FORMS

    def model(self, form: str) -> ModelProto:
        """``fixed``: parameters are constants, sizes numbers. ``symbolic``: sizes are symbols.

        ``run-time``: parameters are inputs, and sizes symbols.
        """
        graph = parser.parse_graph(f"g () => (float y) {{ {self.nodes} }}")
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.floats.items()
        ]
        for name, value in self.parameters.items():
            tensor = numpy_helper.from_array(value, name)
            if form == "run-time":
                info = helper.make_tensor_value_info(name, tensor.data_type, value.shape)
                infos.append(info)
            else:
                graph.initializer.append(tensor)
        graph.input.extend(infos)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        output = model.graph.output[0]
        output.CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
        value = run(model, self.feeds(np.random.default_rng(0)))["y"]
        dims = [f"y{axis}" for axis in range(value.ndim)]
        output.CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, dims))
        if form == "fixed":
            return onnx.shape_inference.infer_shapes(model)
        return symbolic(
            model,
            lambda name, axis: (
                None
                if name in self.parameters
                else "N"
                if axis == 0 and self.apart
                else f"{name}{axis}"
            ),
        )

    def feeds(self, rng: np.random.Generator) -> dict[str, Array]:
        return {**self.draw(rng), **self.parameters}

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> dict[str, Array]:
        """Random float inputs, with another batch if one is given."""
        shapes = {
            name: shape if batch is None else (batch, *shape[1:])
            for name, shape in self.floats.items()
        }
        drawn = {k: np.asarray(rng.standard_normal(v), np.float32) for k, v in shapes.items()}
        return {k: np.abs(v) + 0.1 for k, v in drawn.items()} if self.positive else drawn


def check(case: Case, form: str) -> None:
    """Gradient against differences, DeepLIFT against its sum, for baselines of batch N and 1."""
    rng = np.random.default_rng(zlib.crc32(f"{case.name} {form}".encode()))
    model, point = case.model(form), case.feeds(rng)
    inputs = list(case.floats)
    residuals = check_gradient(model, point, inputs=inputs)
    assert all(residual.applies for residual in residuals)
    check_conservation(model, (point, case.draw(rng)), inputs=inputs)
    if case.apart and form != "fixed":
        shared = case.draw(rng, batch=1)
        check_conservation(model, (point, shared), inputs=inputs)


def each(cases: list[Case]) -> list[object]:
    """A parameter for every case in each of its forms."""
    return [
        pytest.param(case, form, id=f"{case.name}-{form}") for case in cases for form in case.forms
    ]


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def slicing(name: str, start: Array, end: Array, axes: Array | None, steps: Array | None) -> Case:
    """A Slice of x [3, 7, 6]."""
    given = {"start": start, "end": end, "axes": axes, "steps": steps}
    operands = ", ".join(key if value is not None else '""' for key, value in given.items())
    while operands.endswith(', ""'):
        operands = operands[:-4]
    parameters = {key: value for key, value in given.items() if value is not None}
    axes = np.arange(len(start)) if axes is None else axes % 3
    return Case(
        f"Slice {name}", f"y = Slice(x, {operands})", {"x": (3, 7, 6)}, parameters, 0 not in axes
    )


LAST, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min
X = {"x": (3, 4, 5)}
PLANES = {"x": (2, 4, 6, 4)}
HALF = np.array([True, False, True, True])

CASES = [
    Case("Concat", "y = Concat<axis=1>(x, z, x)", {"x": (2, 3, 4), "z": (2, 2, 4)}),
    Case("Concat last", "y = Concat<axis=-1>(x, z)", {"x": (2, 3, 4), "z": (2, 3, 1)}),
    Case("Concat batch", "y = Concat<axis=0>(x, z)", {"x": (2, 3), "z": (1, 3)}, apart=False),
    Case("Concat one", "y = Concat<axis=1>(x)", X),
    Case(
        "Split sizes",
        "a, b, c = Split<axis=1>(x, sizes) d = Mul(c, c) y = Concat<axis=-2>(d, a)",
        {"x": (3, 7, 2)},
        {"sizes": ints(2, 4, 1)},
    ),
    Case(
        "Split even",
        "a, b, c = Split<axis=-1, num_outputs=3>(x) e = Sigmoid(a) y = Mul(e, b)",
        {"x": (3, 2, 6)},
        forms=("fixed", "symbolic"),
    ),
    slicing("inner", ints(1), ints(-1), ints(1), None),
    slicing("default axes", ints(1, 0, 2), ints(3, 99, LAST), None, None),
    slicing("clamped", ints(-99, 2), ints(99, -1), ints(-1, 1), ints(1, 1)),
    slicing("steps", ints(1, 0), ints(LAST, 5), ints(2, 1), ints(2, 3)),
    slicing("step past the end", ints(-2), ints(LAST), ints(1), ints(4)),
    slicing("backwards", ints(-1), ints(FIRST), ints(1), ints(-1)),
    slicing("backwards by two", ints(99, 4), ints(0, -99), ints(-2, 2), ints(-2, -3)),
    slicing("mixed", ints(-1, 1), ints(FIRST, LAST), ints(2, 1), ints(-1, 2)),
    slicing("empty", ints(5), ints(2), ints(1), ints(1)),
    slicing("batch", ints(1), ints(3), ints(0), None),
    Case("Pad", "y = Pad(x, pads)", X, {"pads": ints(0, 1, 0, 0, 2, 3)}),
    Case("Pad cut", "y = Pad(x, pads)", X, {"pads": ints(0, -1, 2, 0, 1, -3)}),
    Case(
        "Pad value",
        "y = Pad(x, pads, c, axes)",
        {**X, "c": ()},
        {"pads": ints(2, 0, 1, 3), "axes": ints(-1, 1)},
        apart=False,
    ),
    *[
        Case(
            f"Pad {mode}",
            f'y = Pad<mode="{mode}">(x, pads, "", axes)',
            X,
            {"pads": ints(3, 0, 2, 1), "axes": ints(2, 1)},
        )
        for mode in ("reflect", "edge", "wrap")
    ],
    Case("Gather scalar", "y = Gather<axis=1>(x, i)", X, {"i": np.array(-1)}),
    Case("Gather one", "y = Gather<axis=-1>(x, i)", X, {"i": ints(2)}),
    Case(
        "Gather repeated",
        "y = Gather<axis=1>(x, i)",
        X,
        {"i": np.array([0, -1, 3, 0, 0], np.int32)},
    ),
    Case("Gather matrix", "y = Gather<axis=1>(x, i)", X, {"i": ints(1, 0, -4, 1).reshape(2, 2)}),
    Case("Gather table", "y = Gather(x, i)", X, {"i": ints(2, 0, 2, 2).reshape(2, 2)}, apart=False),
    Case("Gather row", "y = Gather(x, i)", X, {"i": np.array(1)}, apart=False),
    Case(
        "GatherElements",
        "y = GatherElements<axis=1>(x, i)",
        {"x": (2, 3)},
        {"i": ints(0, -1, 0, 0, 2, 2, 1, 1).reshape(2, 4)},
        apart=False,
    ),
    Case(
        "GatherND",
        "y = GatherND(x, i)",
        {"x": (3, 4, 2)},
        {"i": ints(0, 1, 2, -1, 0, 1).reshape(3, 2)},
        apart=False,
    ),
    Case(
        "GatherND batch",
        "y = GatherND<batch_dims=1>(x, i)",
        {"x": (2, 4, 3)},
        {"i": ints(3, 3, 0, -1).reshape(2, 2, 1)},
        apart=False,
    ),
    *[
        Case(
            f"ScatterElements {how}",
            f'y = ScatterElements<axis=1, reduction="{how}">(x, i, u)',
            {"x": (2, 5), "u": (2, 3)},
            {"i": ints(0, 4, -2, 1, 0, 2).reshape(2, 3)},
            apart=False,
        )
        for how in ("none", "add")
    ],
    *[
        Case(
            f"ScatterND {how}",
            f'y = ScatterND<reduction="{how}">(x, i, u)',
            {"x": (4, 3), "u": (2, 3)},
            {"i": ints(2, 0).reshape(2, 1)},
            apart=False,
        )
        for how in ("none", "add")
    ],
    Case("Expand", "y = Expand(x, s)", {"x": (3, 1, 4)}, {"s": ints(3, 5, 1)}),
    Case("Expand rank", "y = Expand(x, s)", {"x": (1, 4)}, {"s": ints(2, 5, 4)}, apart=False),
    Case(
        "Where",
        "y = Where(c, x, z)",
        {"x": (3, 4, 5), "z": (3, 1, 1)},
        {"c": np.array([[True], [False], [False], [True]])},
    ),
    Case("Tile", "y = Tile(x, r)", X, {"r": ints(1, 3, 2)}),
    Case("DepthToSpace", "y = DepthToSpace<blocksize=2>(x)", PLANES),
    Case("DepthToSpace CRD", 'y = DepthToSpace<blocksize=2, mode="CRD">(x)', PLANES),
    Case("SpaceToDepth", "y = SpaceToDepth<blocksize=2>(x)", PLANES),
    Case("Trilu", "y = Trilu(x, k)", X, {"k": np.array(1)}),
    Case("Trilu lower", "y = Trilu<upper=0>(x)", X),
    Case(
        "ReverseSequence",
        "y = ReverseSequence<batch_axis=0, time_axis=1>(x, n)",
        X,
        {"n": ints(4, 1, 3)},
        apart=False,
    ),
    Case("CumSum", "y = CumSum(x, k)", X, {"k": np.array(1)}),
    Case("CumSum turned", "y = CumSum<exclusive=1, reverse=1>(x, k)", X, {"k": np.array(-1)}),
    Case("Compress", "y = Compress<axis=1>(x, c)", X, {"c": HALF}),
    Case("Compress flat", "y = Compress(x, c)", X, {"c": HALF}, apart=False),
]

PASSED_ON = [
    Case("Reshape", "y = Reshape(x, s)", X, {"s": ints(0, -1)}),
    Case("Reshape free", "y = Reshape<allowzero=1>(x, s)", X, {"s": ints(5, 12)}, apart=False),
    Case("Flatten", "y = Flatten<axis=-2>(x)", {"x": (3, 2, 2, 5)}, apart=False),
    Case("Squeeze", "y = Squeeze(x, a)", {"x": (3, 1, 4, 1)}, {"a": ints(-1, 1)}),
    Case("Unsqueeze", "y = Unsqueeze(x, a)", X, {"a": ints(-1, 1)}),
    Case("Transpose", "y = Transpose<perm=[0, 3, 1, 2]>(x)", PLANES),
    Case("Dropout", "y = Dropout(x, r)", X, {"r": np.array(0.5, np.float32)}, forms=("fixed",)),
    Case("Cast", "a = Cast<to=11>(x) b = Mul(a, a) y = Cast<to=1>(b)", X),
    Case("CastLike", "a = CastLike(x, d) b = Mul(a, a) y = CastLike(b, x)", X, {"d": np.ones(1)}),
]


@pytest.mark.parametrize(("case", "form"), each(CASES + PASSED_ON))
def test_rule(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("seed", range(20))
def test_random_slice(seed: int) -> None:
    """Random bounds and steps, in and out of range."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(3)[: rng.integers(1, 4)]
    steps = rng.choice([-3, -2, -1, 1, 2, 3], len(axes))
    start, end = rng.integers(-9, 9, (2, len(axes)))
    # A start before the beginning means nothing to read backwards in numpy, the first entry in
    # ONNX: leave it out.
    start = np.where((steps < 0) & (start < -6), -1, start)
    check(slicing(str(seed), start, end, axes, steps), FORMS[seed % 2])


def test_a_choice_by_another_tensor_conserves() -> None:
    """Where the condition differs at x̄, the operands share the change, in proportion to theirs."""
    nodes = "c = Greater(x, t) h = Where(c, u, v) y = Add(h, x)"
    case = Case("choice", nodes, {"x": (5, 3), "u": (5, 3), "v": (3,)}, apart=False)
    case.parameters["t"] = np.array(0.1, np.float32)
    rng = np.random.default_rng(0)
    check_conservation(case.model("fixed"), (case.feeds(rng), case.feeds(rng)))
    compiled = onnx_attrib.compile(case.model("fixed"), target="seed", baseline="input")
    here = {"x": [[1, 1, -1]] * 5, "u": [[1, 2, 3]] * 5, "v": [4, 5, 6]}
    there = {"x": [[1, -1, 1]] * 5, "u": [[0, 0, 0]] * 5, "v": [4, 9, 6]}
    feeds = {**here, **{f"{name}_baseline": value for name, value in there.items()}}
    feeds["seed"] = np.ones((5, 3))
    found = run(compiled, {name: np.asarray(v, np.float32) for name, v in feeds.items()})
    # The second goes from v = 9 to u = 2, where u moves by 2 and v by 4; the third from u = 0 to
    # v = 6, where only u moves.
    np.testing.assert_allclose(found["u_attribution"][0], [1, -7 * 2 / 6, 6], rtol=1e-6)
    np.testing.assert_allclose(found["v_attribution"], [0, 5 * -7 * 4 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(found["x_attribution"][0], [0, 2, -2])


def test_a_jump_between_constants_is_the_conditions_own() -> None:
    nodes = "c = Greater(x, z) j = Where(c, a, b) y = Mul(j, x)"
    numbers = {k: np.array(v, np.float32) for k, v in (("a", 2), ("b", -1), ("z", 0))}
    case = Case("jump", nodes, {"x": (4,)}, numbers)
    compiled = onnx_attrib.compile(case.model("fixed"), target="seed", baseline="input")
    x, base = np.float32([1, 1, -1, 3]), np.float32([2, -1, 1, 3])
    feeds = {"x": x, "x_baseline": base, "seed": np.ones(4, np.float32)}
    found = run(compiled, feeds)["x_attribution"]
    np.testing.assert_allclose(found[[0, 3]], [-2, 0])
    assert np.isfinite(found).all()


def test_dropout_in_training_mode_is_refused() -> None:
    parameters = {"r": np.array(0.5, np.float32), "t": np.array(True)}
    model = Case("Dropout", "y = Dropout(x, r, t)", X, parameters).model("fixed")
    with pytest.raises(UnsupportedOpError, match="random"):
        onnx_attrib.compile(model, method="gradient", target="seed")


def test_repeated_indices_add_up_on_many_threads() -> None:
    """ONNX Runtime's ScatterND loses additions when it runs on several threads."""
    import onnxruntime as ort

    count = 20_000
    case = Case("Gather", "y = Gather(x, i)", {"x": (3, 16)}, {"i": np.arange(count) % 3})
    compiled = onnx_attrib.compile(case.model("run-time"), method="gradient", target="seed")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    session = ort.InferenceSession(
        compiled.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    feeds = {**case.feeds(rng), "seed": np.ones((count, 16), np.float32)}
    expected = np.bincount(case.parameters["i"]).astype(np.float32)
    for _ in range(5):
        (found,) = session.run(["x_attribution"], feeds)
        np.testing.assert_array_equal(found, np.tile(expected[:, None], 16))
