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
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from onnx_attrib.compiler import Methods, finished, prepare
from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import line
from onnx_attrib.ir import subgraphs
from onnx_attrib.measure import epsilon
from onnx_attrib.methods import get as method_named
from onnx_attrib.model_io import Source, is_large, load
from onnx_attrib.promises import Check, Status, promises
from onnx_attrib.recipe import Recipe
from onnx_attrib.session import onnxruntime, open_session, run_session
from onnx_attrib.trial import Point, Trial

TOLERANCE = 5e-3
"""Of differences and sums, relative; ten times that where the model computes in 16 bits."""
_SAME = 1e-4
"""Of outputs, relative to their largest entry: the same sums, in another order."""
_HALVED = 10 * 2.0**-10
"""The same, of float32 that was computed in float16."""
_STANDARD = frozenset(("", "ai.onnx", "ai.onnx.ml"))


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
    method: Methods | None = None,
    *,
    source: Source | None = None,
    inputs: Mapping[str, npt.ArrayLike] | None = None,
    baseline: Any = None,
    target: Any = None,
    targets: str | Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    dims: Mapping[str, int] | None = None,
    **method_options: Any,
) -> Verification:
    """Check a compiled model, or a model by compiling it first.

    Args:
        model: a model that onnx-attrib compiled, or any other, which is compiled for ``method``.
        method: for a model that is not compiled yet (default: deeplift), or several.
        source: what a compiled model was compiled from.
        inputs: arrays by input name; the others are drawn at random.
        baseline: of a model that is not compiled yet as for :func:`onnx_attrib.compile`; of a
            compiled one what it takes at run time (default: random), or the array that it was
            compiled with.
        target: the index to explain, for models that take one (default: random).
        targets: several at once, for a model that is not compiled yet.
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
        job = prepare(
            proto, method or "deeplift", baseline=placed, targets=targets, **method_options
        )
        source = proto if source is None else source
        notes, known = list(job.notes), job.request.baseline
        baseline = None
        proto = finished(job)
    elif method is not None and _names(method) != set(recipe.methods):
        wanted = ", ".join(f"'{name}'" for name in sorted(_names(method)))
        raise OptionError(f"the model was compiled for '{recipe.method}', not for {wanted}")
    elif (
        method_options
        or targets is not None
        or (isinstance(method, Mapping) and any(method.values()))
    ):
        raise OptionError("options and targets were fixed when the model was compiled")
    trial = Trial(proto, known, baseline, target)
    found = Verification(trial.explain.method, trial.explain.options, 0, notes=notes)
    found.checks.append(_valid(proto, source))
    given = {} if inputs is None else dict(inputs)
    drawer = trial.drawer(given, dict(dims or {}))
    rng = np.random.default_rng(seed)
    everything = all(port.name in given for port in trial.explain.inputs)
    count = samples or (1 if everything else 3)
    points = [trial.point(trial.feeds(given, drawer, rng), drawer, rng) for _ in range(count)]
    found.samples = count
    halved = trial.explain.recipe.precision != "keep"
    found.checks += _unchanged(proto, source, points, _HALVED if halved else _SAME)
    found.checks.append(_finite(points))
    found.checks += promises(
        trial, points, tolerance or TOLERANCE * (10 if trial.narrow else 1), rng
    )
    return found


def _names(method: Methods) -> set[str]:
    return {method_named(name).name for name in ((method,) if isinstance(method, str) else method)}


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


# -- outputs ---------------------------------------------------------------------------------------


def _unchanged(
    model: ModelProto, source: Source | None, points: Sequence[Point], limit: float
) -> list[Check]:
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
        runs = [run_session(held, outputs, point.feeds) for point in points]
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return [*checks, Check(names[1], "skipped", f"the source does not run: {line(error)}")]
    worst, where = 0.0, ""
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


def _finite(points: Sequence[Point]) -> Check:
    bad = [
        f"{int((~np.isfinite(a.astype(np.float64))).sum())} of {a.size} entries of '{name}'"
        for point in points
        for attributions in point.result.by_method.values()
        for name, a in attributions.items()
        if not np.isfinite(a.astype(np.float64)).all()
    ]
    name = "finite"
    return (
        Check(name, "OFF", f"not finite: {'; '.join(bad[:3])}")
        if bad
        else Check(name, "ok", "all attributions")
    )


__all__ = ["Check", "Verification", "verify"]
