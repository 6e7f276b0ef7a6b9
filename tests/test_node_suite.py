"""The rules, over ONNX's own operator tests (``onnx.backend.test.case.node``).

Every case whose operators have rules is compiled in three forms:

- ``layer``: the first float input is data and everything else a weight, with a symbolic batch
  axis: the operator as it stands in a network;
- ``all``: the case as it is, every float input that is data attributed, indices and shapes known
  only at run time;
- ``symbolic``: the same with every dimension of every input a symbol.

Each is checked at the case's own point, unless that is one where the operator has no derivative,
and at random points. The coverage follows the rule table: a new rule brings its cases with it.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

pytest.importorskip("onnxruntime")

from onnx_attrib import newer, rules
from onnx_attrib.passes.lower import has_body
from onnx_attrib.rules import base as rules_base

from . import numeric
from .numeric import Array

REQUIRED = frozenset(
    "Conv ConvTranspose Gemm MatMul Add Sub Mul Div Neg Sum Mean Max Min Pow Sqrt Exp Log Abs "
    "Reciprocal Erf Relu LeakyRelu PRelu Elu Selu Celu Sigmoid Tanh Softplus Softsign HardSigmoid "
    "HardSwish Mish Gelu Clip ThresholdedRelu Softmax LogSoftmax MaxPool AveragePool "
    "GlobalAveragePool GlobalMaxPool BatchNormalization LayerNormalization InstanceNormalization "
    "GroupNormalization LRN Reshape Flatten Transpose Squeeze Unsqueeze Expand Concat Split Slice "
    "Pad Gather Identity Dropout Cast Where ReduceSum ReduceMean ReduceMax".split()
)
"""Operators that must have a rule, and a case here."""

NEWEST = 26
"""The newest opset that ONNX Runtime 1.31 loads."""

KERNELS = {"RoiAlign": 21}
"""Operators whose newest version has no kernel: their cases are read at an older opset."""

FORMS = ("layer", "all", "symbolic")

# Float inputs that are settings, not data: nothing flows to them.
SETTINGS = {
    ("Dropout", 1),
    ("Resize", 1),
    ("Resize", 2),
    ("Upsample", 1),
    ("CastLike", 1),
    ("RoiAlign", 1),
    ("OneHot", 0),
    ("OneHot", 1),
    ("Range", 0),
    ("Range", 1),
    ("Range", 2),
}

# Inputs whose shape is part of the network: kernels, and one entry for each axis.
STATIC = {
    ("Conv", 1),
    ("ConvTranspose", 1),
    ("DeformConv", 1),
    ("Det", 0),
    ("Resize", 1),
    ("Resize", 2),
    ("Resize", 3),
    ("Upsample", 1),
}

# -- cases that are left out, each with its reason -------------------------------------------------

WINDOW = "has a window (opset 27); its expansion runs, and has a case"
INFINITE = "one of its outputs is infinite"
ROUNDED = "the evaluator computes the scale in float32; its expansion has a case"
NEWER = "uses an operator or a type of opset 27 or 28; ONNX Runtime 1.31 loads up to 26"
NOT_RUN = "ONNX Runtime 1.31 does not run it on the CPU"
BINDING = "onnxruntime's Python binding neither takes nor returns one of its types"
RANDOM = "draws random numbers"
LENGTH = "its inputs are sizes and ranges, not data"
OLD_SCAN = "a Scan of opset 8 loops over a batch of sequences; later ones do not"
FLAT = "its derivative is zero or undefined wherever it is defined"
TRAINING = "training mode: statistics of the batch or a random mask"

WINDOWS = """
bidirectional_window local_window local_window_default local_window_with_past
local_window_gqa_rank4_mask local_window_rank1_boolean_mask local_window_ext_cache_rank2_mask
local_window_ext_cache_rank3_head_mask local_window_ext_cache_rank4_batch_mask
local_window_ext_cache_float16_mask 3d_local_window
""".split()

EXCLUDED = {
    "test_pow_types_float32_uint32": NOT_RUN,
    "test_pow_types_float32_uint64": NOT_RUN,
    "test_gru_batchwise": NOT_RUN,
    "test_lstm_batchwise": NOT_RUN,
    "test_simple_rnn_batchwise": NOT_RUN,
    "test_mod_float64_mixed_sign_fmod_0": NOT_RUN,
    "test_mod_float32_mixed_sign_fmod_0": NOT_RUN,
    "test_mod_float16_mixed_sign_fmod_0": NOT_RUN,
    "test_mod_float_edge_cases_fmod_0_float16": NOT_RUN,
    "test_mod_float_edge_cases_fmod_0_float32": NOT_RUN,
    "test_mod_float_edge_cases_fmod_0_float64": NOT_RUN,
    "test_scan_sum": OLD_SCAN,
    "test_swiglu_expanded": NOT_RUN,
    "test_swiglu_alpha_expanded": NOT_RUN,
    "test_swiglu_float16_expanded": NOT_RUN,
    "test_attention_4d_diff_heads_mask4d_padded_kv": NOT_RUN,
    **{f"test_attention_{name}": WINDOW for name in WINDOWS},
    **{
        f"test_attention_4d_with_past_and_present_qk_matmul_bias_{name}": INFINITE
        for name in (
            "3d_mask_causal",
            "4d_mask_causal",
            "3d_mask_causal_expanded",
            "4d_mask_causal_expanded",
        )
    },
    **{
        f"test_dynamicquantizelinear{name}": ROUNDED
        for name in ("", "_max_adjusted", "_min_adjusted")
    },
}
"""Single cases, by name."""

UNBOUND = frozenset(
    value
    for name, value in TensorProto.DataType.items()
    if name.startswith(("BFLOAT16", "FLOAT8", "FLOAT4", "INT4", "UINT4", "INT2", "UINT2"))
)
"""Element types that numpy lacks."""

FLAT_OPERATORS = frozenset("Ceil Floor Round Sign ArgMax ArgMin Hardmax".split())


@dataclass(frozen=True)
class Case:
    """One of ONNX's operator tests; ``operator`` is the one it is for."""

    name: str
    operator: str
    model: ModelProto
    values: dict[str, Array]


def kinds(case: Case) -> set[str]:
    return {str(info.type.WhichOneof("value")) for info in case.model.graph.input}


def element_types(case: Case) -> set[int]:
    infos = (*case.model.graph.input, *case.model.graph.output)
    return {numeric.element_type(info) for info in infos}


def trains(case: Case) -> bool:
    for node in case.model.graph.node:
        modes = {a.name: a.i for a in node.attribute}
        if node.op_type == "BatchNormalization" and modes.get("training_mode"):
            return True
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            return bool(case.values[node.input[2]].any())
    return False


# Kinds of cases, by what they have; the first that holds is the reason.
REASONS: list[tuple[str, Callable[[Case], bool]]] = [
    ("takes a sequence or an optional", lambda c: not tensors_only(c)),
    ("no tensor of floats goes in, or none comes out", lambda c: not comes_and_goes(c)),
    (FLAT, lambda c: c.operator in FLAT_OPERATORS),
    (TRAINING, trains),
    (RANDOM, lambda c: c.operator == "Bernoulli"),
    (LENGTH, lambda c: c.operator in ("MelWeightMatrix", "Range")),
    (BINDING, lambda c: bool(element_types(c) & UNBOUND)),
    (NEWER, lambda c: lowered(c.model) is None),
]


def comes_and_goes(case: Case) -> bool:
    floats = [info for info in case.model.graph.output if numeric.element_type(info) in FLOATS]
    return bool(floats) and bool(data_inputs(case))


def tensors_only(case: Case) -> bool:
    return kinds(case) <= {"tensor_type"} and all(
        isinstance(value, np.ndarray) for value in case.values.values()
    )


FLOATS = numeric.FLOATS


def reason(case: Case) -> str | None:
    """Why a case is left out, or None."""
    if case.name in EXCLUDED:
        return EXCLUDED[case.name]
    return next((text for text, holds in REASONS if holds(case)), None)


# -- collecting ------------------------------------------------------------------------------------


def load_cases(folder: Path | None) -> list[Case]:
    """All cases with tensors, from pytest's cache: making them takes seconds."""
    path = folder / f"cases-{onnx.__version__}-{np.__version__}.pickle" if folder else None
    if path is not None and path.exists():
        raw = pickle.loads(path.read_bytes())
    else:
        raw = _made_by_onnx()
        if path is not None:
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(pickle.dumps(raw))
            os.replace(temporary, path)
    operators = {}
    parsed = []
    for name, data, values in raw:
        model = onnx.load_model_from_string(data)
        if len(model.graph.node) == 1:
            operators[name] = model.graph.node[0].op_type
        parsed.append((name, model, values))
    cases = []
    for name, model, values in parsed:
        stem = re.sub(r"_expanded.*$", "", name)
        operator = operators.get(name) or operators.get(stem)
        if operator is None:
            operator = model.graph.node[-1].op_type
        names = [info.name for info in model.graph.input]
        arrays = {k: _array(v) for k, v in zip(names, values, strict=False)}
        cases.append(cropped(Case(name, operator, model, arrays)))
    return cases


def cropped(case: Case) -> Case:
    """A pool over fewer entries: the reference evaluator loops over them in Python."""
    if case.operator not in ("AveragePool", "LpPool", "MaxPool"):
        return case
    name = case.model.graph.input[0].name
    value = case.values[name]
    size = {4: 12, 5: 11}.get(value.ndim, 64)
    smaller = value[(slice(None), slice(None), *[slice(size)] * (value.ndim - 2))]
    if smaller.shape == value.shape:
        return case
    model = ModelProto()
    model.CopyFrom(case.model)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, length in zip(dims, smaller.shape, strict=True):
        dim.dim_value = length
    return Case(case.name, case.operator, numeric.symbolic(model, lambda *_: None), {name: smaller})


def _array(value: Any) -> Any:
    """An input as an array; sequences and optionals stay what they are."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _made_by_onnx() -> list[tuple[str, bytes, list[Any]]]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = collect_testcases(None)
    return [
        (case.name, case.model.SerializeToString(), list(case.data_sets[0][0]))
        for case in made
        if case.data_sets
    ]


@cache
def _cases(folder: Path | None) -> dict[str, Case]:
    return {case.name: case for case in load_cases(folder)}


def ruled(case: Case) -> bool:
    """Whether every operator of a case has a rule or a definition (or must have one)."""
    return all(
        node.op_type in REQUIRED
        or node.op_type == "Constant"
        or node.op_type in newer.DEFINITIONS
        or rules.known(node.op_type, node.domain)
        or has_body(node.op_type)
        for node in case.model.graph.node
    )


def is_extra(case: Case) -> bool:
    """Cases whose symbolic form runs with ``-m slow`` only, which keeps the suite to minutes."""
    return "_expanded" in case.name or case.operator not in REQUIRED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    cases = [c for c in _cases(_folder(metafunc.config)).values() if ruled(c) and not reason(c)]
    params = [
        pytest.param(
            case,
            form,
            id=f"{case.name.removeprefix('test_')}-{form}",
            marks=[pytest.mark.slow] if form == "symbolic" and is_extra(case) else [],
        )
        for case in cases
        for form in FORMS
    ]
    metafunc.parametrize(("case", "form"), params)


def _folder(config: pytest.Config) -> Path | None:
    cache_ = getattr(config, "cache", None)
    return Path(cache_.mkdir("onnx-node-cases")) if cache_ is not None else None


# -- preparing -------------------------------------------------------------------------------------


def lowered(model: ModelProto) -> ModelProto | None:
    """The model at an opset that ONNX Runtime loads; None if its operators are newer."""
    result = ModelProto()
    result.CopyFrom(model)
    result.ir_version = min(result.ir_version, 10)
    default = next((o for o in result.opset_import if o.domain in ("", "ai.onnx")), None)
    if default is None:
        return None
    newest = min(KERNELS.get(node.op_type, NEWEST) for node in result.graph.node)
    if default.version <= newest:
        return result
    default.version = newest
    try:
        onnx.checker.check_model(result)
        onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return result


def data_inputs(case: Case) -> list[str]:
    """Float inputs that are data: not settings, and without infinities (masks)."""
    uses: dict[str, set[bool]] = {}
    for node in case.model.graph.node:
        for i, name in enumerate(node.input):
            uses.setdefault(name, set()).add((node.op_type, i) in SETTINGS)
    names = [
        name
        for name in numeric.float_inputs(case.model)
        if uses.get(name) != {True} and case.values[name].size
    ]
    finite = [name for name in names if numeric.finite(case.values[name]).all()]
    return finite or names


def formed(case: Case, form: str) -> tuple[ModelProto, list[str], str]:
    """The case's model in one of the forms, the inputs to attribute and the output."""
    model = lowered(case.model)
    assert model is not None
    inputs = data_inputs(case)
    if form == "layer":
        weights = {name: v for name, v in case.values.items() if name != inputs[0]}
        inputs = inputs[:1]
        model = numeric.frozen(model, weights)
        if not any(follows(case.values[inputs[0]], weight) for weight in weights.values()):
            model = numeric.symbolic(model, lambda name, axis: "N" if axis == 0 else None)
    elif form == "symbolic":
        kernels = {
            name
            for node in model.graph.node
            for i, name in enumerate(node.input)
            if (node.op_type, i) in STATIC
        }
        model = numeric.symbolic(
            model,
            lambda name, axis: None if name in kernels else f"{name}_{axis}",
        )
    model, output = numeric.joined(model)
    return model, inputs, output


def follows(data: Array, weight: Array) -> bool:
    """Whether a float input has the data's batch, so that as a weight it would fix the batch."""
    floats = weight.dtype.kind == "f" and weight.ndim == data.ndim > 0
    return floats and weight.shape[0] == data.shape[0] > 1


def seed_of(case: Case, form: str) -> int:
    return zlib.crc32(f"{case.name}-{form}".encode())


def own(rng: np.random.Generator, case: Case, inputs: list[str]) -> dict[str, Array]:
    """The case's own values, with numbers where a datum is infinite or NaN."""
    drawn = moved(rng, case, inputs)
    kept = {n: np.where(numeric.finite(v), v, drawn[n]) for n, v in case.values.items()}
    return {name: kept[name].astype(v.dtype) for name, v in case.values.items()}


def moved(rng: np.random.Generator, case: Case, inputs: list[str]) -> dict[str, Array]:
    """Random values for the inputs, of the kind that the case has."""
    return {**case.values, **{name: numeric.near(rng, case.values[name]) for name in inputs}}


# -- tests -----------------------------------------------------------------------------------------


def test_gradient(case: Case, form: str, record_property: Callable[[str, object], None]) -> None:
    record_property("operator", case.operator)
    model, inputs, output = formed(case, form)
    rng = np.random.default_rng(seed_of(case, form))
    points = [own(rng, case, inputs), moved(rng, case, inputs), moved(rng, case, inputs)]
    residuals = numeric.check_gradient(
        model, *points, inputs=inputs, output=output, seed=seed_of(case, form)
    )
    reached = {r.subject.split(":")[0] for r in residuals if r.applies}
    assert len(reached) == len(inputs), f"no differentiable point found: {residuals}"


def test_conservation(
    case: Case, form: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("operator", case.operator)
    model, inputs, output = formed(case, form)
    rng = np.random.default_rng(seed_of(case, form))
    pairs = []
    for point in (own(rng, case, inputs), moved(rng, case, inputs)):
        baseline = moved(rng, case, inputs)
        pairs.append((point, {name: baseline[name] for name in inputs}))
    residuals = numeric.check_conservation(
        model, *pairs, inputs=inputs, output=output, seed=seed_of(case, form)
    )
    assert any(r.applies for r in residuals), "the output is finite at no pair of points"


@pytest.mark.parametrize("error", [2e-3, 1.0])
def test_a_wrong_rule_is_noticed(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: here the slope of Tanh is off by 0.2 %, or is doubled."""
    (right,) = [rule for rule in rules.table() if rule.op == "Tanh"]
    assert isinstance(right, rules.Elementwise)
    slope = right.derivative

    def off(site: rules.Site) -> Any:
        return site.op.Mul(slope(site), 1 + error)

    def secant(site: rules.Site) -> Any:
        reference = site.reference
        assert reference is not None
        change = site.op.Sub(site.y, reference.y)
        quotient = site.op.Div(change, site.op.Sub(site.x(), reference.x()))
        return site.op.Mul(quotient, 1 + error)

    wrong = dataclasses.replace(right, derivative=off, secant=secant)
    monkeypatch.setattr(rules_base, "_TABLE", {**rules_base._TABLE, ("", "Tanh"): [wrong]})
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> wrong (float[3] x) => (float[3] y) {y = Tanh(x)}'
    )
    x = np.array([0.3, -0.8, 1.1], np.float32)
    with pytest.raises(AssertionError, match="gradient of x"):
        numeric.check_gradient(model, {"x": x})
    with pytest.raises(AssertionError, match="the output changes by"):
        numeric.check_conservation(model, ({"x": x}, {"x": -x}))


def test_required_operators_have_rules_and_cases(request: pytest.FixtureRequest) -> None:
    missing = {op for op in REQUIRED if not rules.known(op, "")}
    assert not missing, f"no rule: {sorted(missing)}"
    tested = {c.operator for c in _cases(_folder(request.config)).values() if not reason(c)}
    assert not REQUIRED - tested, f"no case: {sorted(REQUIRED - tested)}"


@pytest.mark.parametrize("name", [name for name, text in EXCLUDED.items() if text == NOT_RUN])
def test_excluded_cases_do_not_run(name: str, request: pytest.FixtureRequest) -> None:
    """The reason given is still true."""
    case = _cases(_folder(request.config))[name]
    model = lowered(case.model)
    assert model is not None
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        numeric.run(model, case.values)
