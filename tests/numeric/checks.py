"""What a compiled model is held to: derivatives, sums, and a valid graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto

import onnx_attrib

from .differences import Oracle, difference, is_float
from .models import Array, Feeds, all_nodes, float_inputs, is_narrow, joined, run, session


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


def finite(values: Array) -> Array:
    """Where a tensor of any type holds a number."""
    if not is_float(values):
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
