"""What was asked for, checked against model and data; and how results and a folder describe it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.evaluation.contestants import Reference
from onnx_attrib.evaluation.curves import automatic_step
from onnx_attrib.evaluation.data import Samples, check_labels, digest
from onnx_attrib.evaluation.features import Features
from onnx_attrib.evaluation.scoring import Scoring
from onnx_attrib.evaluation.study import Plan, Study, spread_out
from onnx_attrib.evaluation.subject import Subject
from onnx_attrib.feeds import Array
from onnx_attrib.images import load_arrays
from onnx_attrib.session import onnxruntime
from onnx_attrib.version import VERSION

Target = str | int | tuple[int, ...]
SCHEMA = 1
"""Of results.json."""
RADIUS = 0.02
"""Of max-sensitivity, as a share of the range of the data."""


def check_counts(**given: Any) -> None:
    """Raise OptionError for what is no whole number; given as it is, or with the least it can be.

    None is left to its default.
    """
    for name, wanted in given.items():
        value, least = wanted if isinstance(wanted, tuple) else (wanted, 1)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise OptionError(f"{name} must be a whole number from {least}, not {value!r}")


def single(inputs: str | Sequence[str] | None) -> str | None:
    """The one tensor to attribute to; OptionError for several."""
    if inputs is None or isinstance(inputs, str):
        return inputs
    if len(inputs) > 1:
        raise OptionError(
            f"one tensor is evaluated, not {len(inputs)} ({', '.join(inputs)}); the others stay"
        )
    return inputs[0] if inputs else None


def read_baseline(baseline: Any) -> Any:
    """A baseline as it is, or the array that a path holds."""
    path = isinstance(baseline, os.PathLike) or (isinstance(baseline, str) and baseline != "zeros")
    if not path:
        return baseline
    if not Path(baseline).exists():
        raise OptionError(
            f"baseline '{baseline}' is neither zeros, a number, nor a file that exists"
        )
    return load_arrays(Path(baseline))


def index_of(target: Any, scoring: Scoring, samples: Samples) -> Array | None:
    """What is explained of each sample, [N] or [N, r-1]; None for one value a sample."""
    classes, rank = scoring.classes, scoring.outputs.ndim
    count, output = len(samples.names), scoring.subject.output
    if samples.labels is not None and classes is not None and rank == 2:
        check_labels(samples.labels, classes, output)
    if isinstance(target, str) and target in ("predicted", "argmax"):
        return scoring.predicted()
    if isinstance(target, str):
        if target != "label":
            raise OptionError(
                f"target '{target}' is not one of predicted, label, a class or a tuple of indices"
            )
        if samples.labels is None:
            raise OptionError("target 'label' needs labels")
        if classes is None or rank != 2:
            raise OptionError(f"target 'label' is for an output [N, classes]; '{output}' is not")
        return samples.labels.astype(np.int64)
    wanted = (target,) if isinstance(target, int | np.integer) else tuple(target)
    if classes is None:
        if wanted not in ((0,), (-1,)):
            raise OptionError(
                f"output '{output}' holds one value a sample: it has no target {target}"
            )
        return None
    if wanted == (-1,) and rank == 2:
        return scoring.predicted()
    if len(wanted) != rank - 1 or min(wanted) < 0:
        raise OptionError(
            f"target {target} does not fit output '{output}' of rank {rank}: give {rank - 1} "
            "indices from 0"
        )
    index = np.broadcast_to(np.array(wanted, np.int64), (count, rank - 1)).copy()
    return index[:, 0] if rank == 2 else index


def plan_of(
    count: int,
    values: Array,
    step: int | None,
    limit: int | None,
    subsets: int,
    neighbours: int,
    radius: float | None,
    seed: int,
) -> Plan:
    """What is measured on samples ``values`` of so many features, with the defaults filled in."""
    if radius is not None and not (np.isfinite(radius) and radius > 0):
        raise OptionError(f"radius must be a number above 0, not {radius!r}")
    last = min(limit or count, count)
    spread = float(values.max()) - float(values.min())
    return Plan(
        step=min(step or automatic_step(last), last),
        limit=last,
        subsets=subsets,
        neighbours=neighbours,
        radius=float(radius or RADIUS * spread or RADIUS),
        seed=seed,
    )


def fingerprint(
    subject: Subject, scoring: Scoring, features: Features, reference: Reference, plan: Plan
) -> dict[str, Any]:
    """What the units depend on besides the compiled methods."""
    index = {} if scoring.index is None else {"index": scoring.index}
    return {
        "version": VERSION,
        "model": subject.digest,
        "data": digest(scoring.given),
        "input": subject.name,
        "output": subject.output,
        "target": digest(index),
        "features": features.kind,
        "baseline": digest({"mean": reference.mean}),
        **asdict(plan),
    }


def described(
    samples: Samples, study: Study, target: Target, baseline: Any, sanity: bool
) -> dict[str, Any]:
    """What results say of versions, model, data and settings."""
    scoring, subject = study.scoring, study.scoring.subject
    labelled = samples.labels is not None and scoring.classes is not None
    right = None
    if labelled and scoring.outputs.ndim == 2:
        right = float((scoring.outputs.argmax(axis=1) == samples.labels).mean())
    plan = study.plan
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "onnxruntime": str(onnxruntime().__version__),
        "model": {
            "file": subject.file,
            "sha256": subject.digest,
            "input": subject.name,
            "output": subject.output,
            "shape": list(study.features.shape),
        },
        "data": {
            "files": list(samples.files),
            "samples": study.count,
            "labels": samples.labels is not None,
            "accuracy": right,
            "classes": None if samples.classes is None else list(samples.classes),
        },
        "settings": {
            "features": study.features.kind,
            "count": study.features.count,
            "grid": list(study.features.grid),
            "step": plan.step,
            "limit": plan.limit,
            "baseline": baseline
            if isinstance(baseline, str | int | float)
            else str(baseline)
            if isinstance(baseline, os.PathLike)
            else "array",
            "target": list(target) if isinstance(target, tuple) else target,
            "seed": plan.seed,
            "subsets": plan.subsets,
            "neighbours": plan.neighbours,
            "radius": plan.radius,
            "steady_samples": len(study.steady) if plan.neighbours else 0,
            "sanity_samples": len(study.sane) if sanity else 0,
        },
    }


def shown_of(gallery: int | Sequence[int], count: int) -> list[int]:
    """Which of the samples the report shows; OptionError for one that there is not."""
    if not isinstance(gallery, int | np.integer):
        bad = [i for i in gallery if not 0 <= i < count]
        if bad:
            raise OptionError(f"there is no sample {bad[0]} to show: samples are 0 to {count - 1}")
        return [int(i) for i in gallery]
    if gallery < 0:
        raise OptionError(f"gallery must be a whole number from 0, not {gallery}")
    return [int(i) for i in spread_out(count, int(gallery))]


__all__ = [
    "Target",
    "check_counts",
    "described",
    "fingerprint",
    "index_of",
    "plan_of",
    "read_baseline",
    "shown_of",
    "single",
]
