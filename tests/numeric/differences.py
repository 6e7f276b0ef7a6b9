"""Central differences of the source model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from .float64 import Evaluator, wide_evaluator, widened
from .models import Array, Feeds, is_narrow, run, session


def is_float(value: Array) -> bool:
    """Whether an array holds floats, bfloat16 among them."""
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


def weighted(seed: Array, output: Array) -> float:
    """Σ seed · output, where a seed of zero silences an infinity too."""
    wide = seed.astype(np.float64)
    return float(np.sum(np.where(wide == 0, 0.0, output.astype(np.float64)) * wide))


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
            self._reference = Evaluator(widened(model))
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
            name: value.astype(np.float64) if is_float(value) else value
            for name, value in feeds.items()
            if name in self.names
        }
        with wide_evaluator():
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
