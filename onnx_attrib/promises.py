"""What a method promises of its attributions, checked against the model's forward part.

- Gradients agree with central differences of S.
- An entry's occlusion is the mean change by the windows that cover it.
- Attributions of a conserving method sum to S(x) − S(x̄); those of a path method to the same
  quadrature of differences along the path.

Of attributions that were reduced other than by sums, or normalized, neither can be told: then their
scale is checked, and the model's own convergence delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnx_attrib import covering
from onnx_attrib.covering import Index
from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import Array
from onnx_attrib.forward import attributed
from onnx_attrib.measure import (
    Measured,
    Predict,
    Score,
    best_known,
    central,
    epsilon,
    norms,
    typical,
    weighted,
)
from onnx_attrib.methods import get as method_named
from onnx_attrib.methods.base import GRADIENT, Occluded
from onnx_attrib.passes.postprocess import batch_axis, samples_axis
from onnx_attrib.trial import Point, Trial

Status = Literal["ok", "OFF", "unclear", "skipped", "info"]
"""``unclear``: too uncertain to tell. ``info``: a number that no promise is about."""

_VAGUE = 0.1
"""A relative uncertainty beyond which a check says nothing."""
_DIRECTIONS = 9
"""Of differences, over all batches: with fewer, errors of two steps often agree by chance."""
_WINDOWS = 240
"""How many windows are evaluated one by one, about, over all batches."""
_SUM = "sum = S(x) − S(x̄)"


@dataclass(frozen=True)
class Check:
    """One thing that was checked: ``residual`` and its ``uncertainty`` are relative."""

    name: str
    status: Status
    detail: str = ""
    residual: float | None = None
    uncertainty: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Explained:
    """What one method says of one target at a point: ``weights`` are those of its S."""

    point: Point
    weights: Array
    attributions: Mapping[str, Array]
    delta: Array | None


def promises(
    trial: Trial, points: Sequence[Point], tolerance: float, rng: np.random.Generator
) -> list[Check]:
    """The identities that the methods stand for, for each method and target."""
    count = len(points[0].weights)
    return [
        check
        for method in trial.explain.methods
        for place in range(count)
        for check in _Promise(trial, method, place, tolerance).checks(points, rng)
    ]


class _Promise:
    """One method's promises of one target, the one at ``place``."""

    def __init__(self, trial: Trial, method: str, place: int, tolerance: float) -> None:
        self.trial, self.place, self.tolerance = trial, place, tolerance
        self.name = method
        self.recipe = trial.explain.recipe
        self.options = self.recipe.methods[method]
        self.method, _ = method_named(method).chosen(self.options)
        self.names, self.outermost = trial.names, trial.outermost
        self.perturbed = self.method.perturbs(self.options) if self.method.perturbs else None
        draws = self.method.draws(self.options) if self.method.draws else None
        self.path = draws if draws and draws.path else None

    def checks(self, points: Sequence[Point], rng: np.random.Generator) -> list[Check]:
        """All of them."""
        method, explained = self.method, [self._explained(point) for point in points]
        if self._altered():
            return self._of_altered(explained)
        checks = []
        if self.path is not None:
            checks += [self._path(explained[0]), self._sums(explained)]
        elif method.complete:
            checks.append(self._sums(explained))
        elif isinstance(self.perturbed, Occluded):
            for name in self.outermost:
                checks.append(self._windows(name, self.perturbed, explained, rng))
        elif self._plain():
            for name in self.names:
                checks.append(self._differences(name, explained, rng))
        else:
            name = self._title("attributions")
            checks.append(Check(name, "skipped", f"{method.name} promises no identity"))
        if explained[0].delta is not None:
            checks.append(self._delta(explained))
        return checks

    def _plain(self) -> bool:
        """Whether what is reported is read off the gradient at x."""
        other = self.method.draws or self.method.map or self.method.perturbs
        return not other and self.method.table(self.options) is GRADIENT

    def _explained(self, point: Point) -> Explained:
        attributions = point.result.by_method[self.name]
        delta = point.result.delta_by_method.get(self.name)
        if self.recipe.targets is not None:
            attributions = {name: a[:, self.place] for name, a in attributions.items()}
            delta = None if delta is None else delta[:, self.place]
        return Explained(point, point.weights[self.place], attributions, delta)

    def _title(self, name: str) -> str:
        """A check's name, with the method and the target where there are several."""
        about = [self.name] if len(self.recipe.methods) > 1 else []
        if isinstance(self.recipe.targets, int):
            about.append(f"top {self.place + 1}")
        elif self.recipe.targets is not None:
            about.append(f"target {self.recipe.targets[self.place]}")
        return f"{name} ({', '.join(about)})" if about else name

    # -- what was reduced or normalized --------------------------------------------------------

    def _altered(self) -> str:
        """How the attributions were changed so that sums and differences do not show in them."""
        how = [f"reduced by {h}" for h in dict.fromkeys(self.recipe.reduce.values()) if h != "sum"]
        return " and ".join([*how, *(["normalized"] if self.recipe.normalize else [])])

    def _of_altered(self, explained: Sequence[Explained]) -> list[Check]:
        """The scale, and what the model itself says of the sum."""
        why = f"{self._altered()}: neither sums nor differences are to be seen"
        checks = [Check(self._title("attributions"), "skipped", why)]
        if self.recipe.normalize:
            checks += [self._scale(name, explained) for name in self.names]
        if explained[0].delta is None:
            return checks
        name = self._title("convergence_delta")
        if any(e.point.reference is None for e in explained):
            return [*checks, self._unknown(name)]
        measured = []
        for e in explained:
            rows, change, noise = self._change(e)
            own = self._own_delta(e, rows)
            parts = zip(own, change, noise, strict=True)
            measured += [Measured(*(float(v) for v in part)) for part in parts]
        return [*checks, self._summed(name, measured, "the model's own, of what was not changed")]

    def _scale(self, name: str, explained: Sequence[Explained]) -> Check:
        """Each sample's largest |a| is one, or it is zero everywhere."""
        off = 0.0
        dims = attributed(self.trial.model, name).type.tensor_type.shape.dim
        batch = (self.recipe.output_shape or (None,))[0]
        axis = batch_axis(tuple(d.dim_param or d.dim_value for d in dims), batch) if dims else 0
        for e in explained:
            a = np.abs(np.asarray(e.attributions[name], np.float64))
            rows = np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) if a.ndim else a.reshape(1, 1)
            largest = rows.max(axis=1, initial=0)
            off = max(off, float(np.abs(largest - 1).max(where=largest != 0, initial=0)))
        limit = 4 * epsilon(explained[0].attributions[name])
        status: Status = "ok" if off <= limit else "OFF"
        return Check(
            self._title(f"scale of '{name}'"), status, "largest |a| is 1", off, None, limit
        )

    # -- sums ----------------------------------------------------------------------------------

    def _change(self, e: Explained) -> tuple[int, Array, Array]:
        """S(x) − S(x̄) of each sample, or of the batch where samples cannot be told apart.

        With the number of samples before it, and how exact it is behind it.
        """
        trial, point = self.trial, e.point
        cut = trial.outermost if trial.explain.baseline != "input" else []
        bases = [trial.forward(cut)(there)[0].astype(np.float64) for there in point.there]
        base = np.mean(bases, axis=0)
        rows = len(point.output) if trial.apart else 1
        sides = [weighted(e.weights, y).reshape(rows, -1) for y in (point.output, base)]
        change = (sides[0] - sides[1]).sum(axis=1)
        terms = np.asarray(sum(np.abs(side).sum(axis=1) for side in sides))
        here = {n: point.x[n] for n in cut}
        noise = 4 * epsilon(point.output) * terms + self._noise(e, cut, here) / rows
        return rows, change, noise

    def _sums(self, explained: Sequence[Explained]) -> Check:
        """Σ attribution against S(x) − S(x̄), for each sample."""
        name = self._title(_SUM)
        if any(e.point.reference is None for e in explained):
            return self._unknown(name)
        measured = [m for e in explained for m in self._residuals(e)]
        return self._summed(name, measured, f"{len(measured)} sample{'s' * (len(measured) != 1)}")

    def _summed(self, name: str, measured: Sequence[Measured], detail: str) -> Check:
        """Judged, where the method promises a sum with the options that it has."""
        changed = [
            f"{o.name}={self.options[o.name]}"
            for o in self.method.options
            if o.name in self.options and self.options[o.name] != o.default and o.choices
        ]
        promised = self.path is None
        if promised and not changed:
            return self._judged(name, measured, detail)
        why = " ".join(f"{key}={value}" for key, value in self.options.items())
        why = f"approximated with {why}" if not promised else f"not promised: {' '.join(changed)}"
        residual, uncertainty = norms(measured)
        return Check(name, "info", f"{detail}; {why}", residual, uncertainty)

    def _residuals(self, e: Explained) -> list[Measured]:
        """For each sample, or for the batch where samples cannot be told apart."""
        rows, change, noise = self._change(e)
        given = np.zeros(rows)
        for name in self.outermost:
            entries = np.asarray(e.attributions[name], np.float64).reshape(rows, -1)
            given += entries.sum(axis=1)
            noise = noise + 4 * epsilon(e.point.output) * np.abs(entries).sum(axis=1)
        parts = zip(given - change, change, noise, strict=True)
        return [Measured(*(float(v) for v in part)) for part in parts]

    def _delta(self, explained: Sequence[Explained]) -> Check:
        """The model's own convergence_delta against the residual found here."""
        name = self._title("convergence_delta")
        if any(e.point.reference is None for e in explained):
            return self._unknown(name)
        measured = []
        for e in explained:
            found = self._residuals(e)
            own = self._own_delta(e, len(found))
            measured += [
                Measured(d - f.residual, f.size, f.uncertainty)
                for d, f in zip(own, found, strict=True)
            ]
        return self._judged(name, measured, "agrees with the residual found here")

    def _own_delta(self, e: Explained, rows: int) -> Array:
        own = np.asarray(e.delta, np.float64).ravel()
        return own if len(own) == rows else np.array([own.sum()])

    # -- differences ---------------------------------------------------------------------------

    def _score(self, e: Explained, cut: Sequence[str], *, optimized: bool = True) -> Score:
        """S summed over the batch, as a function of the cut tensors."""
        forward = self.trial.forward(cut, optimized=optimized)

        def score(values: Mapping[str, Array]) -> float:
            (y,) = forward({**e.point.feeds, **values})
            return float(weighted(e.weights, y).sum())

        return score

    def _noise(self, e: Explained, cut: Sequence[str], values: Mapping[str, Array]) -> float:
        """How exact S is: by rounding the output, and by evaluating in another order."""
        size = float(np.abs(weighted(e.weights, e.point.output)).sum())
        floor = epsilon(e.point.output) * size
        try:
            other = self._score(e, cut, optimized=False)(values)
        except CompileError:
            return floor
        return max(floor, abs(other - self._score(e, cut)(values)))

    def _differences(
        self, name: str, explained: Sequence[Explained], rng: np.random.Generator
    ) -> Check:
        """Directional derivatives of S along random directions of one tensor."""
        title, series = self._title(f"differences of '{name}'"), []
        if self.recipe.reduce and not self.method.is_signed(self.options):
            return Check(title, "skipped", "reduced by sum: single entries are not to be seen")
        count = -(-_DIRECTIONS // len(explained))
        for e in explained:
            x = e.point.x[name]
            score, noise = self._score(e, [name]), self._noise(e, [name], {name: x})
            attribution = np.asarray(e.attributions[name], np.float64)
            reference = None if e.point.reference is None else e.point.reference[name]
            probes = self._along if self.method.is_signed(self.options) else self._at_entries
            for direction, predict in probes(x, attribution, reference, rng, count):
                series.append(central(score, name, x, direction, predict, noise))
        return self._judged(title, best_known(series), f"{len(series)} directions")

    def _report(self, m: Array, x: Array, reference: Array | None) -> Array:
        """What the method makes of a multiplier."""
        wide = x.astype(np.float64)
        base = None if reference is None else reference.astype(np.float64)
        reported: Any = self.method.attribution(_NUMPY, m, wide, base)
        return np.asarray(reported, np.float64)

    def _along(
        self,
        x: Array,
        attribution: Array,
        reference: Array | None,
        rng: np.random.Generator,
        count: int,
    ) -> Iterable[tuple[Array, Predict]]:
        """Random directions u. Attributions are slope · m: Σ attribution · u / slope is m · u.

        Along an axis that was reduced by a sum u / slope is the same everywhere.
        """
        slope = self._report(np.ones(x.shape), x, reference)
        safe = np.where(slope == 0, 1, slope)
        reduced = tuple(axis for axis in range(x.ndim) if attribution.shape[axis] != x.shape[axis])
        counted = np.maximum((slope != 0).sum(axis=reduced, keepdims=True), 1) if reduced else 1

        def predict(moved: Array, derivative: float) -> tuple[float, float]:
            factor = np.where(slope == 0, 0, moved / safe)
            if reduced:
                factor = factor.sum(axis=reduced, keepdims=True) / counted
            return float((attribution * factor).sum()), derivative

        for _ in range(count):
            direction = rng.normal(size=attribution.shape) * slope
            yield direction * (typical(x) / (typical(direction) or 1)), predict

    def _at_entries(
        self,
        x: Array,
        attribution: Array,
        reference: Array | None,
        rng: np.random.Generator,
        count: int,
    ) -> Iterable[tuple[Array, Predict]]:
        """Single entries, the largest and random ones: what is reported of the derivative there."""
        order = np.argsort(-np.abs(attribution), axis=None)
        picked = [*order[:count], *rng.integers(0, x.size, count)] if x.size else []
        for place in dict.fromkeys(int(i) for i in picked):
            direction = np.zeros(x.shape)
            direction.flat[place] = typical(x)

            def predict(moved: Array, derivative: float, place: int = place) -> tuple[float, float]:
                m = np.zeros(x.shape)
                m.flat[place] = derivative / moved.flat[place]
                reported = self._report(m, x, reference).flat[place]
                return float(attribution.flat[place]), float(reported)

            yield direction, predict

    def _path(self, e: Explained) -> Check:
        """Σ attribution against the same quadrature of dS/dα along the line from x̄ to x."""
        name, point = self._title("path sum"), e.point
        if point.reference is None or self.path is None:
            return self._unknown(name)
        path, cut = self.path, self.outermost
        score = self._score(e, cut)
        noise = self._noise(e, cut, {n: point.x[n] for n in cut})
        total, uncertain = 0.0, 0.0
        step = 0.25 / len(path.alphas)
        for alpha, weight in zip(path.alphas, path.weights, strict=True):
            slopes = []
            for h in (step, step / 4):
                ends = [self._on_path(point, alpha + d) for d in (h, -h)]
                slopes.append((score(ends[0]) - score(ends[1])) / (2 * h))
            total += weight * slopes[1]
            uncertain += (weight * (abs(slopes[0] - slopes[1]) + 4 * noise / step)) ** 2
        given = sum(float(np.sum(e.attributions[n], dtype=np.float64)) for n in cut)
        measured = [Measured(given - total, total, float(np.sqrt(uncertain)))]
        return self._judged(name, measured, f"{len(path.alphas)} points, differences along them")

    def _on_path(self, point: Point, alpha: float) -> dict[str, Array]:
        assert point.reference is not None
        result = {}
        for name in self.outermost:
            x, base = (v[name].astype(np.float64) for v in (point.x, point.reference))
            result[name] = (base + alpha * (x - base)).astype(point.x[name].dtype)
        return result

    # -- windows -------------------------------------------------------------------------------

    def _windows(
        self, name: str, how: Occluded, explained: Sequence[Explained], rng: np.random.Generator
    ) -> Check:
        """Single entries against the windows that cover them, evaluated one by one."""
        title = self._title(f"windows of '{name}'")
        if any(e.point.reference is None for e in explained):
            return self._unknown(title)
        if self.recipe.reduce:
            return Check(title, "skipped", "reduced by sum: single entries are not to be seen")
        declared = attributed(self.trial.model, name).type.tensor_type.shape.dim
        shape = tuple(d.dim_value or d.dim_param or None for d in declared)
        axis = samples_axis(shape, self.recipe.output_shape)
        measured, count = [], 0
        for e in explained:
            sizes = e.point.x[name].shape
            entries = covering.drawn(sizes, axis, how, rng, _WINDOWS // len(explained))
            for place, slices in entries:
                measured += self._covered(e, name, axis, place, slices)
                count += len(slices)
        return self._judged(title, measured, f"{count} windows, evaluated one by one")

    def _covered(
        self, e: Explained, name: str, axis: int | None, place: Index, slices: Sequence[Index]
    ) -> list[Measured]:
        """An entry of all samples against the mean change by the windows that cover it."""
        x = e.point.x[name]
        given = np.asarray(e.attributions[name], np.float64)[place].ravel()
        reference = (e.point.reference or {})[name]
        before, total = weighted(e.weights, e.point.output), np.zeros(len(given))
        noise = np.zeros(len(given))
        for where in slices:
            there = x.copy()
            there[where] = np.broadcast_to(reference, x.shape)[where]
            (y,) = self.trial.forward([name])({**e.point.feeds, name: there})
            sides = [before, weighted(e.weights, y)]
            apart = axis is not None and y.ndim > 0 and len(y) == x.shape[axis]
            rows = [side.reshape(len(y) if apart else 1, -1) for side in sides]
            total += (rows[0] - rows[1]).sum(axis=1) / len(slices)
            noise += sum(np.abs(row).sum(axis=1) for row in rows) / len(slices)
        noise *= 8 * epsilon(e.point.output)
        parts = zip(given - total, total, noise, strict=True)
        return [Measured(*(float(v) for v in part)) for part in parts]

    # -- judging -------------------------------------------------------------------------------

    def _unknown(self, name: str) -> Check:
        return Check(name, "skipped", "the baseline was fixed as an array: give it (--baseline)")

    def _judged(self, name: str, measured: Sequence[Measured], detail: str) -> Check:
        residual, uncertainty = norms(measured)
        status: Status = "ok"
        if not np.isfinite(residual) or residual > self.tolerance + uncertainty:
            status = "OFF"
        elif uncertainty > _VAGUE:
            status = "unclear"
        return Check(name, status, detail, residual, uncertainty, self.tolerance)


class _Numpy:
    """The few operators by which methods report, on arrays."""

    Mul, Sub, Add, Div = np.multiply, np.subtract, np.add, np.divide
    Abs, Neg, Max = np.abs, np.negative, np.maximum


_NUMPY: Any = _Numpy()


__all__ = ["Check", "Status", "promises"]
