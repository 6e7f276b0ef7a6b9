"""Random graphs: whatever the architecture, gradients are right and DeepLIFT conserves.

Each example (``random_graphs.build``) is compiled by several methods and held against the source
model: its gradient against float64 central differences of ONNX's reference evaluator, DeepLIFT
against S(x) − S(x̄), integrated gradients against the mean of gradients on the path, and its own
outputs against onnxruntime. A fixed set of examples runs with every test run; the slow test draws
new ones for as many seconds as ``ONNX_ATTRIB_FUZZ_SECONDS`` says.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import pytest
from onnx import ModelProto, helper

pytest.importorskip("onnxruntime")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import onnx_attrib  # noqa: E402
from onnx_attrib import CompileError  # noqa: E402

from . import numeric  # noqa: E402
from .numeric import Array  # noqa: E402
from .random_graphs import Example, Refused, build  # noqa: E402

Tally = Counter[str]
"""What became of the examples: checks made, checks that could not be made, and why."""

REFUSALS = {
    "rank known at run time": "the rank of (its input )?'.*' is unknown",
    "windows where runtimes disagree": "ceil_mode with a window all in the padding",
    "auto_pad where runtimes disagree": "auto_pad SAME with strides beyond the kernel",
}
"""Refusals that are documented, by what their message says."""


@st.composite
def examples(draw: Callable[..., Any], longest: int = 40) -> Example:
    try:
        return build(lambda low, high: draw(st.integers(low, high)), longest=longest)
    except Refused:
        hypothesis.reject()
        raise


# -- points ----------------------------------------------------------------------------------------


def another(
    rng: np.random.Generator, feeds: Mapping[str, Array], samples: int = 0
) -> numeric.Feeds:
    """Random values, with another number of samples if one is given."""
    result = {}
    for name, value in feeds.items():
        shape = (samples, *value.shape[1:]) if samples else value.shape
        result[name] = np.asarray(rng.normal(0, 1, shape)).astype(value.dtype)
    return result


def points(example: Example, rng: np.random.Generator) -> list[numeric.Feeds]:
    """The example's own point and another one, of another batch if that may be."""
    size = next(iter(example.feeds.values())).shape[0] if example.batch else 0
    return [example.feeds, another(rng, example.feeds, size and 1 + size % 3)]


def tolerance(example: Example) -> tuple[float, float]:
    """Relative to the sum, and for rounding, relative to the terms."""
    return {"float16": (3e-2, 1e-2), "float32": (1e-3, 2e-5), "float64": (1e-5, 1e-7)}[
        example.dtype
    ]


# -- checks ----------------------------------------------------------------------------------------


def compiled(tally: Tally, model: ModelProto, **request: Any) -> ModelProto | None:
    """Compile and check the graph; None for a refusal that is documented."""
    try:
        result = onnx_attrib.compile(model, target="seed", **request)
    except CompileError as error:
        for reason, pattern in REFUSALS.items():
            if re.search(pattern, str(error)):
                tally[f"refused: {reason}"] += 1
                return None
        raise
    numeric.check_graph(result, model)
    return result


def same_outputs(example: Example, expected: numeric.Feeds, found: numeric.Feeds) -> None:
    # A scale that onnxruntime fuses into a product is rounded to float32.
    loose = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-6}[example.dtype]
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        wide, source = found[name].astype(np.float64), value.astype(np.float64)
        size = loose * max(1.0, float(np.abs(source).max(initial=0)))
        np.testing.assert_allclose(wide, source, loose, size, err_msg=name)


def check_gradient(example: Example, tally: Tally) -> None:
    """The compiled gradient against differences of the source along random directions."""
    rng = np.random.default_rng(example.seed)
    result = compiled(tally, example.model, method="gradient", output=example.output)
    if result is None:
        return
    held, source = numeric.session(result), numeric.session(example.model)
    for point in points(example, rng):
        expected = numeric.run(source, point)
        cotangent = normal_like(rng, expected[example.output])
        found = numeric.run(held, {**point, "seed": cotangent})
        same_outputs(example, expected, found)
        oracle = oracle_of(example.model, example.output, point)
        for name in point:
            value = found.get(f"{name}_attribution", np.zeros_like(point[name]))
            hold_slope(example, tally, oracle, point, name, cotangent, value, rng)


def oracle_of(model: ModelProto, output: str, point: numeric.Feeds) -> numeric.Oracle:
    """The source model in float64.

    The reference evaluator gives some old operators their newer meaning. ONNX's converter spells
    them out; what comes of it counts if onnxruntime computes the same from the model as it is.
    """
    oracle = numeric.Oracle(model, output, point)
    if model.opset_import[0].version >= 14:
        return oracle
    narrow = numeric.is_narrow(model)
    if narrow:
        # In 16 bits a wrong meaning may look right.
        oracle.why = oracle.why or "an old opset in 16 bits"
    try:
        newer = onnx.version_converter.convert_version(model, 21)
        second = numeric.Oracle(newer, output, point)
        expected, found = (numeric.run(m, point)[output] for m in (model, newer))
        loose = 2e-2 if narrow else 1e-4
        return second if not second.why and np.allclose(found, expected, loose, loose) else oracle
    except Exception:  # the converter raises bare RuntimeErrors
        return oracle


def hold_slope(
    example: Example,
    tally: Tally,
    oracle: numeric.Oracle,
    point: numeric.Feeds,
    name: str,
    cotangent: Array,
    value: Array,
    rng: np.random.Generator,
) -> None:
    """⟨attribution, direction⟩ is the directional derivative, where there is one."""
    assert value.shape == point[name].shape, f"{name}: attribution of {value.shape}"
    step = np.asarray(rng.standard_normal(value.shape))
    exact = numeric.difference(oracle, point, {name: step}, cotangent)
    terms = value.astype(np.float64) * step
    if exact.bounded or exact.smooth:
        assert np.isfinite(terms).all(), f"attribution of {name} is not finite: {value}"
    tally[f"oracle {oracle.precision}"] += 1
    if oracle.why:
        tally[f"no oracle: {oracle.why[:80]}"] += 1
    if not exact.smooth or (oracle.why and example.dtype == "float16"):
        tally["directions left out"] += 1
        return
    tally["directions"] += 1
    scale = max(abs(exact.value), float(np.sqrt(np.sum(np.square(terms)))))
    relative = {"float16": 4e-2, "float32": 5e-4, "float64": 1e-5}[example.dtype]
    relative = max(relative, 2e-2 if oracle.why else 0.0)
    error = abs(float(np.sum(terms)) - exact.value)
    if oracle.why:
        # In float32 the steps are so large that they cross kinks; smaller ones have fewer digits.
        closer = numeric.difference_at(oracle, point, {name: step}, cotangent, oracle.step / 10)
        error = min(error, abs(float(np.sum(terms)) - closer.value))
    floor = (1e-3 if example.dtype == "float16" else 1e-6) * (1 + float(np.abs(cotangent).sum()))
    assert error <= relative * scale + floor + 5 * exact.error, (
        f"gradient of {name}: {np.sum(terms):.6g}, by differences {exact.value:.6g} "
        f"(± {exact.error:.2g}, {oracle.precision})"
    )


def check_conservation(example: Example, tally: Tally) -> None:
    """Σ attribution = S(x) − S(x̄), for baselines given in each of the ways there are.

    The seed has the sign of each output's change. Allowed are ``tolerance`` of the difference, and
    for rounding in float32 a smaller share of Σ|attribution| and of the outputs themselves.
    """
    rng = np.random.default_rng(example.seed + 1)
    point, reference = example.feeds, another(rng, example.feeds)
    kind = rng.choice(["input", "single", "array", "zeros", "number"])
    if kind in ("single", "array"):
        reference = {n: v[:1] if leads(example.model, n) else v for n, v in reference.items()}
    if kind in ("zeros", "number"):
        fill = 0.3 if kind == "number" else 0.0
        reference = {name: np.full_like(value, fill) for name, value in point.items()}
    baseline: Any = "input" if kind in ("input", "single") else dict(reference)
    if kind in ("zeros", "number"):
        baseline = "zeros" if kind == "zeros" else 0.3
    delta = bool(rng.random() < 0.5)
    if kind == "array":
        fed = [n for n in point if reaches(example.model, n, example.output)]
        baseline = {name: reference[name] for name in fed}
    result = compiled(
        tally,
        example.model,
        method="deeplift",
        output=example.output,
        baseline=baseline,
        delta=delta,
    )
    if result is None:
        return
    placed = {n: np.broadcast_to(v, point[n].shape).copy() for n, v in reference.items()}
    source = numeric.session(example.model)
    expected, base = numeric.run(source, point), numeric.run(source, placed)
    y, y_bar = (values[example.output].astype(np.float64) for values in (expected, base))
    change = y - y_bar
    # A baseline may leave the domain of what is inside (a normalisation of equal numbers).
    if not finite(example.model, placed):
        tally["differences left out"] += 1
        return
    sign = np.where(change == 0, 1.0, np.sign(change))
    cotangent = np.asarray(rng.uniform(0.5, 1.5, change.shape) * sign)
    cotangent = cotangent.astype(expected[example.output].dtype)
    given_ = {f"{name}_baseline": value for name, value in reference.items()}
    found = numeric.run(result, {**point, **given_, "seed": cotangent})
    same_outputs(example, expected, found)
    tally["differences"] += 1
    hold_sum(example, found, point, cotangent, y, y_bar)


def hold_sum(
    example: Example,
    found: numeric.Feeds,
    point: numeric.Feeds,
    cotangent: Array,
    y: Array,
    y_bar: Array,
) -> None:
    total, mass = 0.0, 0.0
    for name, value in found.items():
        if name.endswith("_attribution"):
            assert np.isfinite(value).all(), f"{name} is not finite: {value}"
            assert value.shape == point[name.removesuffix("_attribution")].shape
            wide = value.astype(np.float64)
            total, mass = total + float(wide.sum()), mass + float(np.abs(wide).sum())
    weight = cotangent.astype(np.float64)
    exact = float(np.sum(weight * (y - y_bar)))
    outputs = float(np.sum(np.abs(weight) * (np.abs(y) + np.abs(y_bar))))
    relative, rounding = tolerance(example)
    # Values inside the graph are of order one, also where the outputs cancel.
    inside = rounding * float(np.abs(weight).sum()) / 10
    allowed = relative * abs(exact) + rounding * (mass + outputs) + inside
    assert abs(total - exact) <= allowed, (
        f"attributions sum to {total:.6g}, the output changes by {exact:.6g} "
        f"(allowed {allowed:.2g}, mass {mass:.3g})"
    )
    if "convergence_delta" in found:
        residual = float(found["convergence_delta"].astype(np.float64).sum())
        assert abs(residual) <= 2 * allowed, f"convergence_delta is {residual}"


def check_path(example: Example, tally: Tally) -> None:
    """Integrated gradients are the weighted mean of gradients at the points of the path."""
    rng = np.random.default_rng(example.seed + 2)
    chunk = int(rng.integers(1, 5))
    result = compiled(
        tally,
        example.model,
        method="integrated-gradients",
        output=example.output,
        baseline="input",
        steps=3,
        quadrature="middle",
        chunk=chunk,
    )
    single = compiled(tally, example.model, method="gradient", output=example.output)
    if result is None or single is None:
        return
    point, reference = example.feeds, another(rng, example.feeds)
    held = numeric.session(single)
    expected = numeric.run(example.model, point)
    cotangent = normal_like(rng, expected[example.output])
    given_ = {f"{name}_baseline": value for name, value in reference.items()}
    found = numeric.run(result, {**point, **given_, "seed": cotangent})
    same_outputs(example, expected, found)
    means: dict[str, Array] = {}
    fed = [n for n in point if f"{n}_attribution" in found]
    for alpha in (1 / 6, 1 / 2, 5 / 6):
        between = dict(point)
        for name in fed:
            x, base = point[name].astype(np.float64), reference[name].astype(np.float64)
            between[name] = np.asarray(base + alpha * (x - base)).astype(point[name].dtype)
        slopes = numeric.run(held, {**between, "seed": cotangent})
        for name in fed:
            m = slopes[f"{name}_attribution"].astype(np.float64) / 3
            means[name] = means.get(name, 0.0) + m
    loose = {"float16": 5e-2, "float32": 2e-3, "float64": 1e-6}[example.dtype]
    if not all(np.isfinite(mean).all() for mean in means.values()):
        # A point of the path where there is no slope (a normalisation of equal numbers).
        tally["paths left out"] += 1
        return
    for name in fed:
        wanted = means[name] * (point[name].astype(np.float64) - reference[name])
        value = found[f"{name}_attribution"].astype(np.float64)
        assert np.isfinite(value).all()
        size = float(np.abs(wanted).max(initial=0))
        np.testing.assert_allclose(value, wanted, loose, loose * size + 1e-5, err_msg=name)
    tally["paths"] += 1


def check_relevance(example: Example, tally: Tally) -> None:
    """ε-LRP is finite and of the inputs' shapes; the model's own outputs stay."""
    rng = np.random.default_rng(example.seed + 3)
    result = compiled(tally, example.model, method="epsilon-lrp", output=example.output)
    if result is None:
        return
    expected = numeric.run(example.model, example.feeds)
    cotangent = normal_like(rng, expected[example.output])
    found = numeric.run(result, {**example.feeds, "seed": cotangent})
    same_outputs(example, expected, found)
    for name, value in found.items():
        if name.endswith("_attribution"):
            assert value.shape == example.feeds[name.removesuffix("_attribution")].shape
            assert np.isfinite(value).all(), f"{name} is not finite"
    tally["relevance"] += 1


def check_layer(example: Example, tally: Tally) -> None:
    """Attribution to an inner tensor: the gradient of what follows it, and conservation there."""
    rng = np.random.default_rng(example.seed + 4)
    inner = layers(example)
    if not inner:
        return
    name = str(rng.choice(inner))
    request = {"output": example.output, "inputs": [name]}
    gradient = compiled(tally, example.model, method="gradient", **request)
    deeplift = compiled(tally, example.model, method="deeplift", **request)
    if gradient is None or deeplift is None:
        return
    value = numeric.run(shown(example.model, name), example.feeds)[name]
    point = {**example.feeds, name: value}
    after = cut(example.model, name, value)
    source = numeric.session(after)
    expected = numeric.run(source, point)[example.output]
    cotangent = normal_like(rng, expected)
    found = numeric.run(gradient, {**example.feeds, "seed": cotangent})
    oracle = oracle_of(after, example.output, point)
    result = found[f"{name}_attribution"]
    try:
        hold_slope(example, tally, oracle, point, name, cotangent, result, rng)
    except AssertionError:
        if not ties(example, after, point, name, cotangent, result, rng):
            raise
        tally["ties"] += 1
    base = numeric.run(source, {**point, name: np.zeros_like(value)})[example.output]
    if not finite(after, {**point, name: np.zeros_like(value)}):
        return
    y, y_bar = expected.astype(np.float64), base.astype(np.float64)
    sign = np.where(y == y_bar, 1.0, np.sign(y - y_bar))
    cotangent = np.asarray(rng.uniform(0.5, 1.5, y.shape) * sign).astype(expected.dtype)
    found = numeric.run(deeplift, {**example.feeds, "seed": cotangent})
    hold_sum(example, found, point, cotangent, y, y_bar)
    tally["layers"] += 1


def ties(
    example: Example,
    after: ModelProto,
    point: numeric.Feeds,
    name: str,
    cotangent: Array,
    result: Array,
    rng: np.random.Generator,
) -> bool:
    """Whether equal entries at the layer make maxima tie that would not if they differed.

    A tie has no gradient, and several may still cancel in the differences. The model after the
    layer has the same attribution here, and near by the right one (which is asserted).
    """
    request = {"output": example.output, "inputs": [name]}
    gradient = onnx_attrib.compile(after, method="gradient", target="seed", **request)
    key, held = f"{name}_attribution", numeric.session(gradient)
    here = numeric.run(held, {**point, "seed": cotangent})[key]
    if not np.allclose(here, result, 1e-3, 1e-5):
        return False
    moved = point[name] + 1e-2 * np.asarray(rng.standard_normal(point[name].shape))
    near = {**point, name: moved.astype(point[name].dtype)}
    there = numeric.run(held, {**near, "seed": cotangent})[key]
    oracle = oracle_of(after, example.output, near)
    hold_slope(example, Counter(), oracle, near, name, cotangent, there, rng)
    return True


CHECKS = (check_gradient, check_conservation, check_path, check_relevance, check_layer)


def check(example: Example, tally: Tally) -> None:
    """Gradient and conservation always, the others in turn."""
    tally["examples"] += 1
    tally["operators"] += sum(n.op_type != "Constant" for n in example.model.graph.node)
    for one in (*CHECKS[:2], CHECKS[2 + example.seed % 3]):
        hold(one, example, tally)


def hold(one: Callable[[Example, Tally], None], example: Example, tally: Tally) -> None:
    """A check; where it fails in few digits, it must hold for the same model in float64."""
    try:
        one(example, tally)
    except AssertionError:
        wide = widened(example)
        if wide is None:
            raise
        one(wide, Tally())
        tally[f"held in float64 only: {one.__name__}"] += 1


def widened(example: Example) -> Example | None:
    """The example in float64, if onnxruntime has the kernels."""
    if example.dtype == "float64":
        return None
    model = numeric.widened(explained(example))
    feeds = {name: value.astype(np.float64) for name, value in example.feeds.items()}
    try:
        numeric.run(model, feeds)
    except Exception:  # no kernel
        return None
    return replace(example, model=model, feeds=feeds, dtype="float64")


# -- the source model ------------------------------------------------------------------------------


def normal_like(rng: np.random.Generator, like: Array) -> Array:
    return np.asarray(rng.standard_normal(like.shape)).astype(like.dtype)


def leads(model: ModelProto, name: str) -> bool:
    """Whether an input's first axis is a symbol: a baseline of one sample may stand for all."""
    (info,) = [info for info in model.graph.input if info.name == name]
    return any(dim.dim_param for dim in info.type.tensor_type.shape.dim[:1])


def finite(model: ModelProto, feeds: numeric.Feeds) -> bool:
    """Whether every value inside the model is."""
    result = ModelProto()
    result.CopyFrom(model)
    known = {info.name for info in model.graph.output}
    names = [n for node in model.graph.node for n in node.output if n and n not in known]
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return all(bool(numeric.finite(value).all()) for value in numeric.run(result, feeds).values())


def explained(example: Example) -> ModelProto:
    """The model without what the explained output does not need."""
    result = ModelProto()
    result.CopyFrom(example.model)
    needed, kept = {example.output}, []
    for node in reversed(example.model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    outputs = [info for info in example.model.graph.output if info.name == example.output]
    del result.graph.node[:], result.graph.output[:]
    result.graph.node.extend(kept[::-1])
    result.graph.output.extend(outputs)
    return result


def reaches(model: ModelProto, name: str, output: str) -> bool:
    """Whether the value of a tensor flows into another."""
    live = {name}
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and live.intersection(node.input):
            live.update(node.output)
    return output in live


def layers(example: Example) -> list[str]:
    """Inner float tensors between the inputs and the explained output."""
    fixed = {t.name for t in example.model.graph.initializer}
    sources = [i.name for i in example.model.graph.input if i.name not in fixed]
    names = [n for node in example.model.graph.node for n in node.output if n != example.output]
    inferred = onnx.shape_inference.infer_shapes(example.model).graph
    floats = {
        v.name
        for v in (*inferred.value_info, *inferred.output)
        if numeric.element_type(v) in numeric.FLOATS
    }
    return [
        n
        for n in names
        if n in floats
        and reaches(example.model, n, example.output)
        and any(reaches(example.model, source, n) for source in sources)
    ]


def shown(model: ModelProto, name: str) -> ModelProto:
    """The model with an inner tensor as one more output."""
    result = ModelProto()
    result.CopyFrom(model)
    if name not in [info.name for info in result.graph.output]:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        (info,) = [v for v in inferred.value_info if v.name == name]
        result.graph.output.append(info)
    return result


def cut(model: ModelProto, name: str, value: Array) -> ModelProto:
    """The model with an inner tensor given instead of computed."""
    result = ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        for k, output in enumerate(node.output):
            if output == name:
                node.output[k] = f"{name}/before"
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    result.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    return result


# -- tests -----------------------------------------------------------------------------------------

HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def summarize(tally: Tally) -> None:
    """Few examples may go by unchecked."""
    for key, count in sorted(tally.items()):
        print(f"{key}: {count}")
    directions = tally["directions"] + tally["directions left out"]
    assert tally["directions left out"] <= 0.05 * directions + 2
    refused = sum(count for key, count in tally.items() if key.startswith("refused"))
    assert refused <= 0.05 * 3 * tally["examples"] + 2
    assert tally["differences left out"] <= 0.05 * tally["examples"] + 2
    assert tally["paths left out"] <= 0.02 * tally["examples"] + 2
    assert tally["ties"] <= 0.02 * tally["examples"] + 2
    rounded = sum(count for key, count in tally.items() if key.startswith("held in float64"))
    assert rounded <= 0.02 * tally["examples"] + 2


def test_fixed_examples() -> None:
    tally = Tally()

    @settings(
        max_examples=120,
        derandomize=True,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=HEALTH,
    )
    @given(examples(longest=24))
    def run(example: Example) -> None:
        check(example, tally)

    run()
    summarize(tally)


@pytest.mark.slow
def test_new_examples() -> None:
    seconds = float(os.environ.get("ONNX_ATTRIB_FUZZ_SECONDS", "300"))
    start, tally = time.monotonic(), Tally()

    @settings(
        max_examples=50,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=HEALTH,
        print_blob=True,
    )
    @given(examples())
    def run(example: Example) -> None:
        check(example, tally)

    while time.monotonic() - start < seconds:
        run()
    summarize(tally)
