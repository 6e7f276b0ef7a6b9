"""Check a compiled model by what it promises, without reading the compiler's rules.

- The graph is valid ONNX, of standard operators, with the source's interface and outputs.
- Gradients agree with central differences of the forward part, run in ONNX Runtime.
- Attributions of a conserving method sum to S(x) − S(x̄), with S from the forward part too.

A central difference is itself inexact: its step may cross kinks, and the model's sums are rounded.
Each comes with an uncertainty, from what a smaller step changes and from how far S moves when the
same model is evaluated in another order; a residual counts as off where it is beyond both the
tolerance and that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from onnx_attrib.compiler import prepare
from onnx_attrib.draw import SIZES, Drawer, table_sizes
from onnx_attrib.errors import CompileError, OptionError, suggest
from onnx_attrib.feeds import Array, fit, line
from onnx_attrib.forward import Forward, computed_from
from onnx_attrib.ir import subgraphs
from onnx_attrib.measure import (
    Measured,
    Predict,
    Score,
    best_known,
    central,
    columns,
    epsilon,
    norms,
    one_hot,
    typical,
    weighted,
)
from onnx_attrib.methods import Method
from onnx_attrib.methods import get as method_named
from onnx_attrib.methods.base import GRADIENT
from onnx_attrib.model_io import Source, is_large, load
from onnx_attrib.recipe import Recipe
from onnx_attrib.runtime import Explainer, Explanation
from onnx_attrib.session import onnxruntime, open_session

Status = Literal["ok", "OFF", "unclear", "skipped", "info"]
"""``unclear``: too uncertain to tell. ``info``: a number that no promise is about."""

TOLERANCE = 5e-3
"""Of differences and sums, relative; ten times that where the model computes in 16 bits."""
_SAME = 1e-4
"""Of outputs, relative to their largest entry: the same sums, in another order."""
_VAGUE = 0.1
"""A relative uncertainty beyond which a check says nothing."""
_DIRECTIONS = 3
_STANDARD = frozenset(("", "ai.onnx", "ai.onnx.ml"))


@dataclass(frozen=True)
class Check:
    """One thing that was checked: ``residual`` and its ``uncertainty`` are relative."""

    name: str
    status: Status
    detail: str = ""
    residual: float | None = None
    uncertainty: float | None = None
    tolerance: float | None = None


@dataclass
class Verification:
    """The findings of :func:`verify`. ``notes``: what the compiler had to say."""

    method: str
    options: Mapping[str, Any]
    samples: int
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return all(check.status != "OFF" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON types."""
        return {
            "ok": self.ok,
            "method": self.method,
            "options": dict(self.options),
            "samples": self.samples,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def verify(
    model: Source,
    method: str | None = None,
    *,
    source: Source | None = None,
    inputs: Mapping[str, npt.ArrayLike] | None = None,
    baseline: Any = None,
    target: Any = None,
    samples: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    dims: Mapping[str, int] | None = None,
    **method_options: Any,
) -> Verification:
    """Check a compiled model, or a model by compiling it first.

    Args:
        model: a model that onnx-attrib compiled, or any other, which is compiled for ``method``.
        method: for a model that is not compiled yet (default: deeplift).
        source: what a compiled model was compiled from.
        inputs: arrays by input name; the others are drawn at random.
        baseline: of a model that is not compiled yet as for :func:`onnx_attrib.compile`; of a
            compiled one what it takes at run time (default: random), or the array that it was
            compiled with.
        target: the index to explain, for models that take one (default: random).
        samples: how many batches are drawn (default 3, or 1 where all inputs are given).
        seed: of the random numbers.
        tolerance: of differences and sums, relative (default: 5e-3, in 16 bits 5e-2).
        dims: sizes of open dimensions by name.
        **method_options: the method's options, for a model that is not compiled yet.

    Returns:
        One entry for each check, with its residual.

    Raises:
        CompileError: the model cannot be compiled or run; OptionError for what does not fit it.
    """
    proto, _ = load(model)
    recipe = Recipe.read({prop.key: prop.value for prop in proto.metadata_props})
    known: Any = baseline
    notes: list[str] = []
    if recipe is None:
        placed = "zeros" if baseline is None else baseline
        job = prepare(proto, method or "deeplift", baseline=placed, **method_options)
        source = proto if source is None else source
        notes, known = list(job.notes), job.request.baseline
        baseline = None
        proto = job.graph.to_proto()
    elif method is not None and method_named(method).name != recipe.method:
        raise OptionError(f"the model was compiled for '{recipe.method}', not for '{method}'")
    elif method_options:
        raise OptionError("the method's options were fixed when the model was compiled")
    run = _Run(proto, known, baseline, target, tolerance)
    found = Verification(run.method.name, run.explain.options, 0, notes=notes)
    found.checks.append(_valid(proto, source))
    given = {} if inputs is None else dict(inputs)
    drawer = run.drawer(given, dict(dims or {}))
    rng = np.random.default_rng(seed)
    everything = all(port.name in given for port in run.explain.inputs)
    count = samples or (1 if everything else 3)
    points = [run.point(run.feeds(given, drawer, rng), drawer, rng) for _ in range(count)]
    found.samples = count
    found.checks += _unchanged(proto, source, points)
    found.checks.append(_finite(points))
    found.checks += run.promises(points, rng)
    return found


# -- the file --------------------------------------------------------------------------------------


def _domains(model: ModelProto) -> set[str]:
    found, graphs = set(), [model.graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(node.domain)
            graphs += subgraphs(node)
    return found


def _valid(model: ModelProto, source: Source | None) -> Check:
    """ONNX's checker, and no operators beyond ONNX's and the source's own."""
    name = "valid ONNX"
    allowed = _STANDARD if source is None else _STANDARD | _domains(load(source)[0])
    foreign = _domains(model) - allowed
    if foreign:
        return Check(name, "OFF", f"operators of {', '.join(sorted(foreign))}")
    if is_large(model):
        return Check(name, "skipped", "more than 2 GiB: ONNX's checker reads it from a file only")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and shape inference's errors share no base class
        return Check(name, "OFF", line(error))
    return Check(name, "ok", "standard operators only")


# -- one batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One batch and what the compiled model says of it.

    ``weights``: S = Σ weights · output. ``x`` and ``reference``: the values of the attributed
    tensors there and at the baseline (``reference`` None where it is not known); ``there``: the
    model's inputs and cut tensors at the baseline.
    """

    feeds: dict[str, Array]
    result: Explanation
    output: Array
    weights: Array
    x: dict[str, Array]
    reference: dict[str, Array] | None
    there: dict[str, Array]


class _Run:
    """A compiled model with the means to evaluate its forward part."""

    def __init__(
        self, model: ModelProto, known: Any, baseline: Any, target: Any, tolerance: float | None
    ) -> None:
        self.ort, self.model = onnxruntime(), model
        self.explain = Explainer(model, providers=["CPUExecutionProvider"])
        self.method: Method = method_named(self.explain.method)
        self._known, self._baseline, self._target = known, baseline, target
        self.names = list(self.explain.attributed)
        inner = computed_from(model, self.names)
        self.outermost = [name for name in self.names if name not in inner]
        self._apart = self._samples_apart()
        self._forwards: dict[tuple[tuple[str, ...], bool], Forward] = {}
        self._values = Forward(self.ort, model, [*self.names, self.explain.output])
        kinds = [p.dtype for p in self.explain.inputs if p.dtype is not None]
        kinds += [p.dtype for p in self.explain.outputs if p.dtype is not None]
        narrow = any(kind.name in ("float16", "bfloat16") for kind in kinds)
        self.tolerance = tolerance or TOLERANCE * (10 if narrow else 1)

    def forward(self, cut: Sequence[str] = (), *, optimized: bool = True) -> Forward:
        """The explained output, from the inputs and the tensors in ``cut``."""
        key = tuple(cut), optimized
        if key not in self._forwards:
            output = [self.explain.output]
            self._forwards[key] = Forward(self.ort, self.model, output, cut, optimized=optimized)
        return self._forwards[key]

    def _samples_apart(self) -> bool:
        """Whether the first axis of the attributed tensors is the batch, as the output's is."""
        declared = {info.name: info.type.tensor_type.shape.dim for info in self.model.graph.output}
        batch = (self.explain.recipe.output_shape or (None,))[0]
        leading = [declared[f"{name}_attribution"][:1] for name in self.outermost]
        symbols = {dims[0].dim_param if dims else "" for dims in leading}
        return bool(batch) and symbols == {batch}

    # -- drawing -----------------------------------------------------------------------------

    def drawer(self, given: Mapping[str, npt.ArrayLike], dims: dict[str, int]) -> Drawer:
        """What draws inputs that the model runs on, with finite results."""
        names = [port.name for port in self.explain.inputs]
        for name in given:
            if name not in names:
                raise OptionError(f"the model has no input '{name}': {suggest(name, names)}")
        symbols = {d for port in self.explain.inputs for d in port.shape if isinstance(d, str)}
        for name in dims:
            if name not in symbols:
                raise OptionError(
                    f"the model has no open dimension '{name}': {suggest(name, sorted(symbols))}"
                )
        for port in self.explain.inputs:
            if port.name in given:
                shape = np.shape(given[port.name])
                if len(shape) == len(port.shape):
                    pairs = zip(port.shape, shape, strict=True)
                    dims.update({d: size for d, size in pairs if isinstance(d, str)})
        ports = [port for port in self.explain.inputs if port.name not in given]
        tables, problem = table_sizes(self.model), ""
        for size in SIZES:
            for positive in (False, True):
                drawer = Drawer(ports, dims, tables, size, positive)
                try:
                    *_, y = self._values(self.feeds(given, drawer, np.random.default_rng(0)))
                except CompileError as error:
                    if isinstance(error, OptionError):
                        raise
                    problem = problem or str(error)
                    break
                if np.isfinite(y).all():
                    return drawer
                problem = "the model's own output is not finite there"
            if not drawer.open:
                break
        raise OptionError(
            f"{'random' if ports else 'the given'} inputs do not fit the model: {problem}; give "
            "sizes with --dim or arrays with --input"
        )

    def feeds(
        self, given: Mapping[str, npt.ArrayLike], drawer: Drawer, rng: np.random.Generator
    ) -> dict[str, Array]:
        """The given inputs, and random ones beside them."""
        drawn = drawer(rng)
        return {
            port.name: fit(port, given[port.name]) if port.name in given else drawn[port.name]
            for port in self.explain.inputs
        }

    def point(self, feeds: dict[str, Array], drawer: Drawer, rng: np.random.Generator) -> _Point:
        """Run the compiled model on one batch."""
        *values, y = self._values(feeds)
        x = dict(zip(self.names, values, strict=True))
        weights, choice = self._chosen(y, rng)
        baselines = self._baselines(feeds, drawer, rng)
        result = self.explain(feeds, baseline=baselines, **choice)
        reference, there = self._placed(feeds, baselines, x)
        return _Point(feeds, result, y, weights, x, reference, there)

    def _chosen(self, y: Array, rng: np.random.Generator) -> tuple[Array, dict[str, Any]]:
        """The weights of S, and what the compiled model has to be told."""
        if self.explain.takes_seed:
            weights = rng.normal(size=y.shape).astype(y.dtype)
            return weights, {"seed": weights}
        if y.ndim < 2 or (y.ndim == 2 and y.shape[1] == 1):
            return np.ones(y.shape), {}
        target: Any = self.explain.target
        choice: dict[str, Any] = {}
        if self.explain.takes_target:
            wanted = rng.integers(0, y.shape[1:], (len(y), y.ndim - 1))
            if self._target is not None:
                wanted = np.broadcast_to(columns(self._target, y.ndim - 1), wanted.shape)
            target = wanted[:, 0] if y.ndim == 2 else wanted
            choice = {"target": target}
        elif self._target is not None:
            raise OptionError("the model takes no target: it was fixed when it was compiled")
        if isinstance(target, str):
            flat = y.reshape(len(y), -1).argmax(axis=1)
            index = np.stack(np.unravel_index(flat, y.shape[1:]), axis=1)
        else:
            index = columns(target, y.ndim - 1)
        return one_hot(y, np.broadcast_to(index, (len(y), y.ndim - 1))), choice

    # -- the reference -----------------------------------------------------------------------

    def _baselines(
        self, feeds: Mapping[str, Array], drawer: Drawer, rng: np.random.Generator
    ) -> Any:
        """What the compiled model takes as a baseline at run time: given, or random."""
        given = self._baseline
        if not self.explain.baselines:
            if given is not None and self.explain.baseline != "array":
                raise OptionError("the baseline was fixed when the model was compiled")
            return None
        if isinstance(given, str) and given != "zeros":
            raise OptionError(f"baseline '{given}' is not zeros, a number, or an array")
        if given is not None:
            return 0.0 if isinstance(given, str) else given
        return {name: drawer.other(feeds[name], rng) for name in self.explain.baselines}

    def _placed(
        self, feeds: Mapping[str, Array], baselines: Any, x: Mapping[str, Array]
    ) -> tuple[dict[str, Array] | None, dict[str, Array]]:
        """x̄ of the attributed tensors, and what the forward part reads there."""
        kind = self.explain.baseline
        if kind is None:
            return None, {}
        if kind == "input":
            there = dict(feeds)
            for name in self.explain.baselines:
                given = baselines[name] if isinstance(baselines, Mapping) else baselines
                like = feeds[name]
                there[name] = np.broadcast_to(np.asarray(given, like.dtype), like.shape).copy()
            *values, _ = self._values(there)
            return dict(zip(self.names, values, strict=True)), there
        if kind == "array" and (self._known is None or isinstance(self._known, str)):
            return None, {}
        reference = {}
        for name in self.outermost:
            value: Any = 0.0 if kind == "zeros" else kind
            if kind == "array":
                value = self._known[name] if isinstance(self._known, Mapping) else self._known
            try:
                reference[name] = np.broadcast_to(
                    np.asarray(value, x[name].dtype), x[name].shape
                ).copy()
            except ValueError:
                raise OptionError(
                    f"a baseline of shape {list(np.shape(value))} does not fit '{name}'"
                ) from None
        return reference, {**feeds, **reference}

    # -- what the method promises ------------------------------------------------------------

    def promises(self, points: Sequence[_Point], rng: np.random.Generator) -> list[Check]:
        """The identities that the method stands for."""
        method, options = self.method, self.explain.options
        checks = []
        if method.path is not None:
            checks += [self._path(points[0]), self._sums(points, promised=False)]
        elif method.complete:
            checks.append(self._sums(points, promised=True))
        elif method.table(options) is GRADIENT:
            for name in self.names:
                checks.append(self._differences(name, points, rng))
        else:
            checks.append(Check("attributions", "skipped", f"{method.name} promises no identity"))
        if points[0].result.delta is not None:
            checks.append(self._delta(points))
        return checks

    def _score(self, point: _Point, cut: Sequence[str], *, optimized: bool = True) -> Score:
        """S summed over the batch, as a function of the cut tensors."""
        forward = self.forward(cut, optimized=optimized)

        def score(values: Mapping[str, Array]) -> float:
            (y,) = forward({**point.feeds, **values})
            return float(weighted(point.weights, y).sum())

        return score

    def _noise(self, point: _Point, cut: Sequence[str], values: Mapping[str, Array]) -> float:
        """How exact S is: by rounding the output, and by evaluating in another order."""
        size = float(np.abs(weighted(point.weights, point.output)).sum())
        floor = epsilon(point.output) * size
        try:
            other = self._score(point, cut, optimized=False)(values)
        except CompileError:
            return floor
        return max(floor, abs(other - self._score(point, cut)(values)))

    def _differences(self, name: str, points: Sequence[_Point], rng: np.random.Generator) -> Check:
        """Directional derivatives of S along random directions of one tensor."""
        series = []
        for point in points:
            x = point.x[name]
            score, noise = self._score(point, [name]), self._noise(point, [name], {name: x})
            attribution = np.asarray(point.result.attributions[name], np.float64)
            reference = None if point.reference is None else point.reference[name]
            probes = self._along if self.method.signed else self._at_entries
            for direction, predict in probes(x, attribution, reference, rng):
                series.append(central(score, name, x, direction, predict, noise))
        title, count = f"differences of '{name}'", len(series)
        return self._judged(title, best_known(series), f"{count} direction{'s' * (count != 1)}")

    def _report(self, m: Array, x: Array, reference: Array | None) -> Array:
        """What the method makes of a multiplier."""
        wide = x.astype(np.float64)
        base = None if reference is None else reference.astype(np.float64)
        reported: Any = self.method.attribution(_NUMPY, m, wide, base)  # type: ignore[arg-type]
        return np.asarray(reported, np.float64)

    def _along(
        self, x: Array, attribution: Array, reference: Array | None, rng: np.random.Generator
    ) -> Iterable[tuple[Array, Predict]]:
        """Random directions u. Attributions are slope · m: Σ attribution · u / slope is m · u."""
        slope = self._report(np.ones(x.shape), x, reference)
        safe = np.where(slope == 0, 1, slope)

        def predict(moved: Array, derivative: float) -> tuple[float, float]:
            return float((attribution * np.where(slope == 0, 0, moved / safe)).sum()), derivative

        for _ in range(_DIRECTIONS):
            direction = rng.normal(size=x.shape) * slope
            yield direction * (typical(x) / (typical(direction) or 1)), predict

    def _at_entries(
        self, x: Array, attribution: Array, reference: Array | None, rng: np.random.Generator
    ) -> Iterable[tuple[Array, Predict]]:
        """Single entries, the largest and random ones: what is reported of the derivative there."""
        order = np.argsort(-np.abs(attribution), axis=None)
        picked = [*order[:_DIRECTIONS], *rng.integers(0, x.size, _DIRECTIONS)] if x.size else []
        for place in dict.fromkeys(int(i) for i in picked):
            direction = np.zeros(x.shape)
            direction.flat[place] = typical(x)

            def predict(moved: Array, derivative: float, place: int = place) -> tuple[float, float]:
                m = np.zeros(x.shape)
                m.flat[place] = derivative / moved.flat[place]
                reported = self._report(m, x, reference).flat[place]
                return float(attribution.flat[place]), float(reported)

            yield direction, predict

    def _path(self, point: _Point) -> Check:
        """Σ attribution against the same quadrature of dS/dα along the line from x̄ to x."""
        name = "path sum"
        if point.reference is None or self.method.path is None:
            return self._unknown(name)
        path, cut = self.method.path(self.explain.options), self.outermost
        score = self._score(point, cut)
        noise = self._noise(point, cut, {n: point.x[n] for n in cut})
        total, uncertain = 0.0, 0.0
        step = 0.25 / len(path.points)
        for alpha, weight in zip(path.points, path.weights, strict=True):
            slopes = []
            for h in (step, step / 4):
                ends = [self._on_path(point, alpha + d) for d in (h, -h)]
                slopes.append((score(ends[0]) - score(ends[1])) / (2 * h))
            total += weight * slopes[1]
            uncertain += (weight * (abs(slopes[0] - slopes[1]) + 4 * noise / step)) ** 2
        given = sum(float(np.sum(point.result.attributions[n], dtype=np.float64)) for n in cut)
        measured = [Measured(given - total, total, float(np.sqrt(uncertain)))]
        return self._judged(name, measured, f"{len(path.points)} points, differences along them")

    def _on_path(self, point: _Point, alpha: float) -> dict[str, Array]:
        assert point.reference is not None
        result = {}
        for name in self.outermost:
            x, base = (v[name].astype(np.float64) for v in (point.x, point.reference))
            result[name] = (base + alpha * (x - base)).astype(point.x[name].dtype)
        return result

    def _sums(self, points: Sequence[_Point], *, promised: bool) -> Check:
        """Σ attribution against S(x) − S(x̄), for each sample."""
        name = "sum = S(x) − S(x̄)"
        if any(point.reference is None for point in points):
            return self._unknown(name)
        measured = [m for point in points for m in self._residuals(point)]
        detail = f"{len(measured)} sample{'s' * (len(measured) != 1)}"
        options = self.explain.options
        changed = [
            f"{o.name}={options[o.name]}"
            for o in self.method.options
            if o.name in options and options[o.name] != o.default and o.choices
        ]
        if promised and not changed:
            return self._judged(name, measured, detail)
        why = " ".join(f"{key}={value}" for key, value in options.items())
        why = f"approximated with {why}" if not promised else f"not promised: {' '.join(changed)}"
        residual, uncertainty = norms(measured)
        return Check(name, "info", f"{detail}; {why}", residual, uncertainty)

    def _residuals(self, point: _Point) -> list[Measured]:
        """For each sample, or for the batch where samples cannot be told apart."""
        cut = self.outermost if self.explain.baseline != "input" else []
        (base,) = self.forward(cut)(point.there)
        attributions = [point.result.attributions[n] for n in self.outermost]
        rows = len(point.output) if self._apart else 1
        sides = [weighted(point.weights, y).reshape(rows, -1) for y in (point.output, base)]
        change = (sides[0] - sides[1]).sum(axis=1)
        given = np.zeros(rows)
        rounding = sum(np.abs(side).sum(axis=1) for side in sides)
        for a in attributions:
            entries = np.asarray(a, np.float64).reshape(rows, -1)
            given += entries.sum(axis=1)
            rounding = rounding + np.abs(entries).sum(axis=1)
        noise = 4 * epsilon(point.output) * rounding
        here = {n: point.x[n] for n in cut}
        noise = noise + self._noise(point, cut, here) / rows
        parts = zip(given - change, change, noise, strict=True)
        return [Measured(*(float(v) for v in part)) for part in parts]

    def _delta(self, points: Sequence[_Point]) -> Check:
        """The model's own convergence_delta against the residual found here."""
        name = "convergence_delta"
        if any(point.reference is None for point in points):
            return self._unknown(name)
        measured = []
        for point in points:
            found = self._residuals(point)
            own = np.asarray(point.result.delta, np.float64).ravel()
            if len(own) != len(found):
                own = np.array([own.sum()])
            measured += [
                Measured(d - f.residual, f.size, f.uncertainty)
                for d, f in zip(own, found, strict=True)
            ]
        return self._judged(name, measured, "agrees with the residual found here")

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


# -- outputs ---------------------------------------------------------------------------------------


def _unchanged(model: ModelProto, source: Source | None, points: Sequence[_Point]) -> list[Check]:
    """The source's interface comes first, and its outputs have the source's values."""
    names = ("interface", "own outputs")
    if source is None:
        return [Check(name, "skipped", "give the source model (--source)") for name in names]
    original, _ = load(source)
    weights = {t.name for t in original.graph.initializer}
    wanted = [info for info in original.graph.input if info.name not in weights]
    problem = _misplaced(wanted, model.graph.input) or _misplaced(
        original.graph.output, model.graph.output
    )
    checks = [Check(names[0], "OFF" if problem else "ok", problem or "names, types and order")]
    outputs = [info.name for info in original.graph.output]
    try:
        opened = source if isinstance(source, str | os.PathLike) else original
        held = open_session(onnxruntime(), opened, ["CPUExecutionProvider"], "the source model")
        runs = [held.run(outputs, point.feeds) for point in points]
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return [*checks, Check(names[1], "skipped", f"the source does not run: {line(error)}")]
    worst, where, limit = 0.0, "", _SAME
    for point, values in zip(points, runs, strict=True):
        for name, value in zip(outputs, values, strict=True):
            given = point.result.outputs.get(name)
            distance = np.inf if given is None else _distance(given, value)
            if isinstance(value, np.ndarray) and value.dtype.itemsize == 2:
                limit = 10 * epsilon(value)
            if not distance <= worst:
                worst, where = distance, name
    status: Status = "ok" if worst <= limit else "OFF"
    detail = f"{len(outputs)} of the source model" if status == "ok" else f"'{where}' differs most"
    return [*checks, Check(names[1], status, detail, worst, None, limit)]


def _misplaced(wanted: Iterable[onnx.ValueInfoProto], given: Sequence[onnx.ValueInfoProto]) -> str:
    for i, info in enumerate(wanted):
        if i >= len(given) or given[i].name != info.name:
            return f"'{info.name}' is not in its place"
        if given[i].type.tensor_type.elem_type != info.type.tensor_type.elem_type:
            return f"'{info.name}' has another type"
    return ""


def _distance(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest entry; NaN equals NaN."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind not in "fV" and a.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(a, b) else float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    finite = np.abs(b[np.isfinite(b)])
    with np.errstate(invalid="ignore"):
        gap = float(np.max(np.where(same, 0, np.abs(a - b))))
    return gap / (float(finite.max()) or 1.0) if finite.size else float("inf")


def _finite(points: Sequence[_Point]) -> Check:
    bad = [
        f"{int((~np.isfinite(a.astype(np.float64))).sum())} of {a.size} entries of '{name}'"
        for point in points
        for name, a in point.result.attributions.items()
        if not np.isfinite(a.astype(np.float64)).all()
    ]
    name = "finite"
    return (
        Check(name, "OFF", f"not finite: {'; '.join(bad[:3])}")
        if bad
        else Check(name, "ok", "all attributions")
    )


class _Numpy:
    """The few operators by which methods report, on arrays."""

    Mul, Sub, Add, Div = np.multiply, np.subtract, np.add, np.divide
    Abs, Neg, Max = np.abs, np.negative, np.maximum


_NUMPY = _Numpy()


__all__ = ["Check", "Verification", "verify"]
