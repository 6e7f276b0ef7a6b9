"""Numeric checks that come from outside the compiler.

Gradients are held against central differences of ``onnx.reference.ReferenceEvaluator`` run in
float64, DeepLIFT against the difference that the source model itself makes between input and
baseline. Nothing here reads the compiler's rules: a wrong rule cannot make its own check pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import (
    op_affine_grid,
    op_causal_conv_with_state,
    op_grid_sample,
    op_linear_attention,
)

import onnx_attrib

from . import recurrent_reference, reference_operators

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Element types that carry a derivative."""
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Attributes that hold an element type, by any of the names that ONNX gives them.
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"}
)

# The reference evaluator spells this one out with casts to float32, unless told otherwise.
_STASHING = frozenset({"GroupNormalization"})
# The evaluator implements these in the type of their input, and refuses another stash_type.
_NOT_STASHING = frozenset({"LayerNormalization", "RMSNormalization"})


# -- models ----------------------------------------------------------------------------------------


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and every graph inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from graphs(inner)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of a model: those of subgraphs and of local functions too."""
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    for graph in graphs(inner):
                        yield from graph.node


def element_type(info: onnx.ValueInfoProto) -> int:
    """The element type of a tensor; 0 for a sequence or an optional."""
    return int(info.type.tensor_type.elem_type)


def float_inputs(model: ModelProto) -> list[str]:
    """Names of the float graph inputs that are not initializers."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return [
        info.name
        for info in model.graph.input
        if info.name not in fixed and element_type(info) in FLOATS
    ]


def is_narrow(model: ModelProto) -> bool:
    """Whether the model computes in 16 bits anywhere."""
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = {element_type(info) for info in infos}
    types |= {tensor.data_type for tensor in model.graph.initializer}
    for node in all_nodes(model):
        types |= {a.i for a in node.attribute if a.name in ("to", "dtype")}
        types |= {a.t.data_type for a in node.attribute if a.type == AttributeProto.TENSOR}
    return bool(types.intersection(NARROW))


def joined(model: ModelProto) -> tuple[ModelProto, str]:
    """The model with one float output to explain, and that output's name.

    Several float outputs are flattened and concatenated into one more output, so that a random
    cotangent reaches all of them at once.
    """
    floats = [info for info in model.graph.output if element_type(info) in FLOATS]
    if len(floats) == 1:
        return model, floats[0].name
    result = ModelProto()
    result.CopyFrom(model)
    graph, kind = result.graph, element_type(floats[0])
    graph.initializer.append(from_array(np.array([-1], np.int64), "joined/flat"))
    parts = []
    for info in floats:
        part = f"joined/{info.name}"
        graph.node.append(helper.make_node("Reshape", [info.name, "joined/flat"], [part]))
        if element_type(info) != kind:
            graph.node.append(helper.make_node("Cast", [part], [f"{part}/cast"], to=kind))
            part = f"{part}/cast"
        parts.append(part)
    graph.node.append(helper.make_node("Concat", parts, ["joined"], axis=0))
    graph.output.append(helper.make_tensor_value_info("joined", kind, ["joined_length"]))
    return result, "joined"


def frozen(model: ModelProto, values: Feeds) -> ModelProto:
    """The model with some of its inputs turned into initializers."""
    result = ModelProto()
    result.CopyFrom(model)
    infos = [info for info in result.graph.input if info.name not in values]
    types = {info.name: element_type(info) for info in model.graph.input}
    del result.graph.input[:]
    result.graph.input.extend(infos)
    for name, value in values.items():
        tensor = from_array(np.asarray(value), name)
        assert tensor.data_type == types[name], f"{name}: {value.dtype}"
        result.graph.initializer.append(tensor)
    return result


def symbolic(model: ModelProto, axes: Callable[[str, int], str | None]) -> ModelProto:
    """The model with dimensions of its inputs renamed: ``axes(input, axis)`` is the symbol.

    Declared shapes of the outputs are forgotten, and inferred again where ONNX can.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for info in result.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            symbol = axes(info.name, axis)
            if symbol is not None:
                dim.dim_param = symbol
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in result.graph.output}
    for node in result.graph.node:
        if node.op_type == "STFT" and not any(a.name == "onesided" for a in node.attribute):
            # The default; shape inference takes another.
            node.attribute.append(helper.make_attribute("onesided", 1))
    del result.graph.value_info[:]
    for info in result.graph.output:
        info.type.tensor_type.ClearField("shape")
    result = onnx.shape_inference.infer_shapes(result)
    for info in result.graph.output:
        shape = info.type.tensor_type.shape
        if not info.type.tensor_type.HasField("shape"):
            shape.SetInParent()
            for _ in range(ranks[info.name]):
                shape.dim.add()
        for axis, dim in enumerate(shape.dim):
            # ONNX 1.23 infers a size of zero for Attention with a symbolic number of features.
            if not dim.dim_value and not dim.dim_param:
                dim.dim_param = f"{info.name}_{axis}"
    return result


# -- onnxruntime -----------------------------------------------------------------------------------


def session(model: ModelProto, optimize: bool = True) -> ort.InferenceSession:
    """The model in onnxruntime, on the CPU, with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    steps = {"RNN", "GRU", "LSTM"}.intersection(node.op_type for node in all_nodes(model))
    # onnxruntime 1.31 crashes while it optimises some recurrent models in 16 bits.
    left_out = ["NchwcTransformer"] if steps and is_narrow(model) else []
    return ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=left_out,
    )


def run(model: ModelProto | ort.InferenceSession, feeds: Feeds) -> dict[str, Array]:
    """Every output by name; feeds that the model has no input for are left out."""
    held = session(model) if isinstance(model, ModelProto) else model
    wanted = {info.name for info in held.get_inputs()}
    names = [info.name for info in held.get_outputs()]
    values = held.run(names, {k: v for k, v in feeds.items() if k in wanted})
    return dict(zip(names, values, strict=True))


# -- float64 ---------------------------------------------------------------------------------------


def widened(model: ModelProto) -> ModelProto:
    """The same computation in float64: weights, constants, casts and declared types.

    Casts to a narrower float become casts to float64, which is the function whose derivative a
    network in mixed precision stands for. Other types stay.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for graph in graphs(result.graph):
        _widen_graph(graph)
    for node in all_nodes(result):
        _widen_node(node)
    return result


def _widen_graph(graph: GraphProto) -> None:
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if element_type(info) in FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen_tensor(tensor)


def _widen_node(node: NodeProto) -> None:
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", from_array(np.zeros(1))))
    if node.op_type in _STASHING and not any(a.name == "stash_type" for a in node.attribute):
        node.attribute.append(helper.make_attribute("stash_type", TensorProto.FLOAT))
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif node.op_type in _NOT_STASHING and attribute.name == "stash_type":
            continue
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in FLOATS:
            attribute.i = TensorProto.DOUBLE
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            data = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            wide = helper.make_attribute("value", from_array(np.array(data, np.float64)))
            attribute.CopyFrom(wide)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in FLOATS:
        tensor.CopyFrom(from_array(to_array(tensor).astype(np.float64), tensor.name))


def weighted(seed: Array, output: Array) -> float:
    """Σ seed · output, where a seed of zero silences an infinity too."""
    wide = seed.astype(np.float64)
    return float(np.sum(np.where(wide == 0, 0.0, output.astype(np.float64)) * wide))


class Erf(OpRun):  # type: ignore[misc]
    """The reference evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x), x.dtype),)


class LpNormalization(OpRun):  # type: ignore[misc]
    """The reference evaluator's own forgets the absolute value of the definition."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array]:
        norm = np.sum(np.abs(x) ** p, axis=axis, keepdims=True) ** (1 / p)
        return (np.where(norm == 0, 0, x / norm),)


class Softsign(OpRun):  # type: ignore[misc]
    """The reference evaluator's own fails for scalars."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(x / (1 + np.abs(x)), x.dtype),)


class GlobalMaxPool(OpRun):  # type: ignore[misc]
    """The reference evaluator's own reduces one axis at a time and loses count."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class _Evaluator(ReferenceEvaluator):  # type: ignore[misc]
    """The reference evaluator with the operators above, in function bodies too."""

    def __init__(self, proto: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["new_ops"] = [
            Erf,
            GlobalMaxPool,
            LpNormalization,
            Softsign,
            *recurrent_reference.OPERATORS,
            *reference_operators.OPERATORS,
        ]
        super().__init__(proto, *args, **kwargs)


class _WideNumpy:
    """numpy for the operators of the evaluator that compute in float32 whatever they are given."""

    float32 = np.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_ROUNDING = (op_affine_grid, op_causal_conv_with_state, op_grid_sample, op_linear_attention)


@contextmanager
def _wide_evaluator() -> Iterator[None]:
    with ExitStack() as stack:
        for module in _ROUNDING:
            stack.enter_context(mock.patch.object(module, "np", _WideNumpy()))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(np.errstate(all="ignore"))
        warnings.simplefilter("ignore")
        yield


class Oracle:
    """The source model as a function S(x) = Σ seed · output, in the best precision there is.

    float64 through ONNX's reference evaluator; where the evaluator lacks an operator, or computes
    something else than onnxruntime does, float32 through onnxruntime with larger steps.
    ``precision`` says which, ``why`` why not float64.
    """

    def __init__(self, model: ModelProto, output: str, feeds: Feeds) -> None:
        self.output = output
        self.names = [info.name for info in model.graph.input]
        self.why = ""
        self._session = session(model)
        expected = run(self._session, feeds)[output]
        loose = 2e-2 if is_narrow(model) else 1e-4
        try:
            self._reference = _Evaluator(widened(model))
            value = self._wide(feeds)
            if value.dtype != np.float64:
                raise TypeError(f"the reference evaluator returns {value.dtype}")
            close = np.isclose(value, expected.astype(np.float64), loose, loose, equal_nan=True)
            if value.shape != expected.shape or not close.all():
                raise ArithmeticError("the reference evaluator and onnxruntime differ")
        except Exception as error:  # the evaluator fails in many ways
            self.why = " ".join(f"{type(error).__name__}: {error}".split())[:200]

    @property
    def precision(self) -> str:
        return "float32" if self.why else "float64"

    @property
    def step(self) -> float:
        return 2e-2 if self.why else 1e-4

    @property
    def noise(self) -> float:
        """Relative error of a value of S, with a margin."""
        return 2e-7 if self.why else 1e-14

    def _wide(self, feeds: Feeds) -> Array:
        wide = {
            name: value.astype(np.float64) if _is_float(value) else value
            for name, value in feeds.items()
            if name in self.names
        }
        with _wide_evaluator():
            return np.asarray(self._reference.run([self.output], wide)[0])

    def value(self, feeds: Feeds) -> Array:
        """The explained output, in float64."""
        if not self.why:
            return self._wide(feeds)
        return run(self._session, feeds)[self.output].astype(np.float64)

    def score(self, feeds: Feeds, seed: Array) -> float:
        return weighted(seed, self.value(feeds))


@dataclass(frozen=True)
class Difference:
    """A directional derivative by central differences.

    ``smooth``: two step sizes and both sides agree, so the derivative exists here. ``bounded``:
    both one-sided differences stay finite as the step shrinks, so some subgradient exists.
    ``error``: an estimate of the value's own error.
    """

    value: float
    error: float
    smooth: bool
    bounded: bool


def difference(oracle: Oracle, feeds: Feeds, steps: Feeds, seed: Array) -> Difference:
    """d/dh S(x + h · steps) at h = 0; extrapolated from two step sizes."""
    result = difference_at(oracle, feeds, steps, seed, oracle.step)
    if not result.smooth and not oracle.why:
        # A kink near by, not at the point: closer steps do not see it.
        closer = difference_at(oracle, feeds, steps, seed, oracle.step / 100)
        return closer if closer.smooth else result
    return result


def difference_at(oracle: Oracle, feeds: Feeds, steps: Feeds, seed: Array, h: float) -> Difference:
    def at(t: float) -> float:
        moved = {
            name: np.asarray(feeds[name].astype(np.float64) + t * step).astype(
                np.float64 if not oracle.why else feeds[name].dtype
            )
            for name, step in steps.items()
        }
        return oracle.score({**feeds, **moved}, seed)

    with np.errstate(all="ignore"):
        center = at(0.0)
        near, far = (at(-h / 2), at(h / 2)), (at(-h), at(h))
        slopes = [(far[1] - far[0]) / (2 * h), (near[1] - near[0]) / h]
        sides = [(far[1] - center) / h, (center - far[0]) / h]
        closer = [(near[1] - center) * 2 / h, (center - near[0]) * 2 / h]
        gap, closer_gap = abs(sides[0] - sides[1]), abs(closer[0] - closer[1])
    if not np.isfinite([*slopes, *sides, *closer]).all():
        return Difference(slopes[1], np.inf, False, False)
    noise = oracle.noise * (abs(center) + float(np.sum(np.abs(seed)))) / h
    scale = max(map(abs, (*sides, *closer)))
    agree = abs(slopes[0] - slopes[1]) <= (0.05 if oracle.why else 1e-4) * scale + 10 * noise
    one_sided = closer_gap <= 0.75 * gap + 1e-6 * scale + 20 * noise
    bounded = all(abs(c) <= 1.2 * abs(s) + 1e-3 * scale for c, s in zip(closer, sides, strict=True))
    value = (4 * slopes[1] - slopes[0]) / 3
    return Difference(value, abs(value - slopes[1]) + 4 * noise, agree and one_sided, bounded)


def directional_difference(
    model: ModelProto,
    feeds: Feeds,
    wrt: str,
    seed: Array,
    direction: Array,
    h: float | None = None,
    output: str | None = None,
) -> Difference:
    """⟨∂S/∂wrt, direction⟩ of the source model by central differences; see :class:`Oracle`."""
    oracle = Oracle(model, output or joined(model)[1], feeds)
    step = oracle.step if h is None else h
    return difference_at(oracle, feeds, {wrt: direction}, seed, step)


# -- the checks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """How far one check was off, and whether it could be made at all."""

    subject: str
    error: float
    tolerance: float
    applies: bool = True
    precision: str = "float64"

    @property
    def holds(self) -> bool:
        return not self.applies or bool(self.error <= self.tolerance)

    def __str__(self) -> str:
        return f"{self.subject}: off by {self.error:.3g}, tolerance {self.tolerance:.3g}"


def check_gradient(
    model: ModelProto,
    *points: Feeds,
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    seed: int = 0,
) -> list[Residual]:
    """Compile with ``gradient`` and hold the result against differences at each point.

    ``inputs`` are all attributed and each is checked along a direction of its own; with
    ``inputs=None`` the compiler chooses, and an input that it leaves out counts as zero.
    Asserts that the compiled graph is valid, keeps the model's outputs, has finite attributions
    wherever a one-sided derivative is finite, and that they equal the differences wherever the
    model is differentiable. A residual that does not apply marks a point where it is not.
    """
    rng = np.random.default_rng(seed)
    output = output or joined(model)[1]
    compiled = onnx_attrib.compile(
        model, method="gradient", target="seed", inputs=inputs, output=output
    )
    check_graph(compiled, model)
    held, source = session(compiled), session(model)
    narrow, residuals = is_narrow(model), list[Residual]()
    all_expected = [run(source, point) for point in points]
    masked = _masked([expected[output] for expected in all_expected])
    for point, expected in zip(points, all_expected, strict=True):
        cotangent = _cotangent(rng, expected[output]) * ~masked
        cotangent = np.asarray(cotangent, expected[output].dtype)
        results = run(held, {**point, "seed": cotangent})
        _same_outputs(expected, results, narrow)
        if not (finite(expected[output]) | masked).all():
            continue
        oracle = Oracle(model, output, point)
        for name in inputs or float_inputs(model):
            step = rng.standard_normal(point[name].shape) * np.isfinite(point[name])
            exact = difference(oracle, point, {name: step}, cotangent)
            value = results.get(f"{name}_attribution", np.zeros(point[name].shape))
            assert value.shape == point[name].shape, f"{name}: attribution of {value.shape}"
            value = value.astype(np.float64)
            terms = np.where(step == 0, 0.0, value * step)
            if exact.bounded or exact.smooth:
                assert np.isfinite(terms).all(), f"attribution of {name} is not finite: {value}"
            # The size that a sum of terms of random sign has: it does not hide a wrong entry.
            scale = max(abs(exact.value), float(np.sqrt(np.sum(np.square(terms)))))
            relative = 2e-2 if narrow else 2e-2 if oracle.why else 2e-4
            floor = (1e-3 if narrow else 2e-5) * float(np.sqrt(np.mean(np.square(step)) or 1))
            residuals.append(
                Residual(
                    f"gradient of {name}: {np.sum(terms):.6g}, by differences {exact.value:.6g}",
                    abs(float(np.sum(terms)) - exact.value),
                    relative * scale + floor + 5 * exact.error,
                    exact.smooth,
                    oracle.precision,
                )
            )
    _assert_all(residuals)
    return residuals


def check_conservation(
    model: ModelProto,
    *pairs: tuple[Feeds, Feeds],
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    seed: int = 0,
    relative: float = 1e-3,
) -> list[Residual]:
    """Compile with ``deeplift`` and hold Σ attribution against S(x) − S(x̄) of the source.

    ``pairs``: a point and the baselines of its attributed inputs. The seed has the sign of each
    output's change, so that S(x) − S(x̄) is a sum without cancellation and ``relative`` means what
    it says. Two more terms allow for rounding in float32: 5·10⁻⁶ of Σ|attribution| and of the
    outputs themselves; both vanish against a change of ordinary size.
    """
    rng = np.random.default_rng(seed)
    output = output or joined(model)[1]
    names = list(inputs or float_inputs(model))
    compiled = onnx_attrib.compile(
        model,
        method="deeplift",
        baseline="input",
        target="seed",
        inputs=inputs,
        output=output,
    )
    check_graph(compiled, model)
    held, source = session(compiled), session(model)
    narrow, residuals = is_narrow(model), list[Residual]()
    rounding = 2e-3 if narrow else 5e-6
    values = [
        (run(source, point), run(source, {**point, **baselines})) for point, baselines in pairs
    ]
    masked = _masked([outputs[output] for pair in values for outputs in pair])
    for (point, baselines), (expected, at_baseline) in zip(pairs, values, strict=True):
        y = np.where(masked, 0, expected[output])
        y_bar = np.where(masked, 0, at_baseline[output])
        change = y.astype(np.float64) - y_bar.astype(np.float64)
        if not np.isfinite(change).all():
            residuals.append(Residual("not finite", 0.0, 0.0, applies=False))
            continue
        size = rng.uniform(0.5, 1.5, change.shape)
        sign = np.where(change == 0, rng.choice([-1.0, 1.0], change.shape), np.sign(change))
        cotangent = np.asarray(size * sign * ~masked).astype(y.dtype)
        feeds = {f"{name}_baseline": value for name, value in baselines.items()}
        results = run(held, {**point, **feeds, "seed": cotangent})
        _same_outputs(expected, results, narrow)
        total, mass = 0.0, 0.0
        for name in names:
            value = results.get(f"{name}_attribution", np.zeros(1)).astype(np.float64)
            assert np.isfinite(value).all(), f"attribution of {name} is not finite: {value}"
            total, mass = total + float(value.sum()), mass + float(np.abs(value).sum())
        wide = cotangent.astype(np.float64)
        exact = float(np.sum(wide * change))
        outputs = float(np.sum(np.abs(wide) * (np.abs(y) + np.abs(y_bar)).astype(np.float64)))
        residuals.append(
            Residual(
                f"attributions sum to {total:.6g}, the output changes by {exact:.6g}",
                abs(total - exact),
                (2e-2 if narrow else relative) * abs(exact) + rounding * (mass + outputs),
            )
        )
    _assert_all(residuals)
    return residuals


def check_graph(compiled: ModelProto, source: ModelProto | None = None) -> None:
    """A valid model of standard operators only; as valid as ``source``, if that is given."""
    onnx.checker.check_model(compiled, full_check=source is None or _infers(source))
    domains = {node.domain for node in all_nodes(compiled)}
    assert domains <= {"", "ai.onnx", "ai.onnx.ml"}, domains
    assert not compiled.functions


def _infers(model: ModelProto) -> bool:
    """Whether ONNX's strict shape inference accepts a model (it rejects some operators)."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def _masked(outputs: Sequence[Array]) -> Array:
    """Entries that are finite at no point (logits behind a mask): these are not explained."""
    if len({value.shape for value in outputs}) > 1:
        return np.zeros((), bool)
    return np.asarray(np.logical_and.reduce([~finite(value) for value in outputs]))


def _cotangent(rng: np.random.Generator, like: Array) -> Array:
    return np.asarray(rng.standard_normal(like.shape)).astype(like.dtype)


def _same_outputs(expected: Mapping[str, Array], results: Mapping[str, Array], loose: bool) -> None:
    """The compiled graph computes what the model computes, under the same names."""
    tolerance = 1e-2 if loose else 1e-5
    for name, value in expected.items():
        found = results[name]
        assert found.dtype == value.dtype, f"output {name}: {found.dtype}, was {value.dtype}"
        if value.dtype.kind == "f" or value.dtype.name == "bfloat16":
            wide, source = found.astype(np.float64), value.astype(np.float64)
            np.testing.assert_allclose(wide, source, tolerance, tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(found, value, err_msg=name)


def _assert_all(residuals: Iterable[Residual]) -> None:
    wrong = [str(residual) for residual in residuals if not residual.holds]
    assert not wrong, "; ".join(wrong)


def _is_float(value: Array) -> bool:
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


# -- points ----------------------------------------------------------------------------------------


def finite(values: Array) -> Array:
    """Where a tensor of any type holds a number."""
    if not _is_float(values):
        return np.ones(values.shape, bool)
    return np.asarray(np.isfinite(values.astype(np.float64)))


def near(rng: np.random.Generator, values: Array) -> Array:
    """Random values in the range of the given ones: what was positive stays positive.

    A single value is moved by up to 30 %.
    """
    held = values.astype(np.float64)[finite(values)]
    low, high = (float(held.min()), float(held.max())) if held.size else (-1.0, 1.0)
    if low == high:
        spread = 0.3 * abs(low) or 0.5
        low, high = low - spread, high + spread
    return np.asarray(rng.uniform(low, high, values.shape)).astype(values.dtype)
