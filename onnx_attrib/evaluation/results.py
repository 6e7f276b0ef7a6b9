"""What is reported of the units of a study: means over samples with their bands, as plain JSON.

A band is the mean ± 1.96 standard errors over the samples (95 %, normal); samples without a value
(NaN) are left out and counted. Variations, areas and completeness are in units of the score S,
infidelity in units of S², slopes in units of S a feature.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_attrib.evaluation.agreement import agreement, average
from onnx_attrib.evaluation.contestants import CONTROL, Contestant
from onnx_attrib.evaluation.curves import areas, slopes
from onnx_attrib.evaluation.fidelity import residuals
from onnx_attrib.evaluation.store import Unit
from onnx_attrib.evaluation.study import Found, Study
from onnx_attrib.feeds import Array

BAND = 1.96
GAP = (
    "gap = area(LeRF) − area(MoRF): how much higher the score stays when the least relevant "
    "features go first than when the most relevant do"
)


def report(
    contestants: Sequence[Contestant],
    found: Found,
    study: Study,
    differences: Mapping[str, Array],
) -> dict[str, Any]:
    """What was measured, of the control, of each method, and between methods.

    ``differences``: S(x) − S(x̄) of each sample, by the method's label.
    """
    count, maps = study.features.count, found.maps
    methods = {
        one.label: {
            **_method(one, found.units[one.label], found.checks[one.label], differences[one.label]),
            **_judged(found.units[one.label], study.removed, study.sizes, count),
        }
        for one in contestants
    }
    return {
        "methods": methods,
        "control": {CONTROL: _judged(found.control, study.removed, study.sizes, count)},
        "agreement": {"labels": list(maps), **agreement(list(maps.values()))},
        "ranking": _ranking(methods, found.units, study.removed),
        "ranked_by": {"measure": "gap", "why": GAP},
    }


def band(values: Array) -> dict[str, Any]:
    """Mean over the first axis with its band; numbers, or lists along the second axis."""
    held = np.isfinite(values)
    count = held.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(held, values, 0).sum(axis=0) / count
        spread = np.where(held, values - mean, 0)
        error = BAND * np.sqrt((spread**2).sum(axis=0) / (count - 1) / count)
    error = np.where(np.isfinite(error), error, 0)
    found = {"mean": mean, "low": mean - error, "high": mean + error}
    return {key: np.asarray(value).tolist() for key, value in found.items()}


def curve(variations: Array, removed: Array, count: int) -> dict[str, Any]:
    """A curve [N, P] with its area and initial slope."""
    return {
        "removed": removed.tolist(),
        **band(variations),
        "area": band(areas(variations, removed)),
        "slope": band(slopes(variations, removed, count)),
    }


def joined(units: Sequence[Unit], name: str) -> Array:
    """An entry of a method's units, for all samples."""
    return np.concatenate([unit[name] for unit in units])


def _judged(units: Sequence[Unit], removed: Array, sizes: Array, count: int) -> dict[str, Any]:
    """The measures that a control has too."""
    curves = {order: curve(joined(units, order), removed, count) for order in ("morf", "lerf")}
    if not len(sizes):
        return {"curves": curves, "sensitivity": None}
    told = joined(units, "correlation")
    found = band(told)
    sensitivity = {
        "n": sizes.tolist(),
        "correlation": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "undefined": np.isnan(told).sum(axis=0).tolist(),
    }
    return {"curves": curves, "sensitivity": sensitivity}


def _method(
    contestant: Contestant,
    units: Sequence[Unit],
    randomised: Sequence[tuple[str, Unit]],
    differences: Array,
) -> dict[str, Any]:
    """The measures that only a method has."""
    choice = contestant.choice
    return {
        "method": choice.method.name,
        "options": {key: _plain(value) for key, value in choice.options.items()},
        "signed": contestant.signed,
        "completeness": _completeness(contestant, joined(units, "sums"), differences),
        "infidelity": band(joined(units, "infidelity")) if "infidelity" in units[0] else None,
        "max_sensitivity": band(joined(units, "instability"))
        if "instability" in units[0]
        else None,
        "sanity": {
            "layers": [layer for layer, _ in randomised],
            "rank": [band(unit["rank"])["mean"] for _, unit in randomised],
            "pearson": [band(unit["pearson"])["mean"] for _, unit in randomised],
        }
        if randomised
        else None,
        "seconds_per_sample": float(np.median([float(unit["seconds"]) for unit in units])),
    }


def _completeness(contestant: Contestant, sums: Array, differences: Array) -> Any:
    if not contestant.signed:
        return None
    absolute, relative = residuals(sums, differences)
    return {
        **_three(relative),
        "absolute": _three(absolute),
        "promised": contestant.choice.method.complete,
    }


def _three(values: Array) -> dict[str, float]:
    held = values[np.isfinite(values)]
    if not len(held):
        return dict.fromkeys(("mean", "median", "max"), float("nan"))
    return {
        "mean": float(held.mean()),
        "median": float(np.median(held)),
        "max": float(held.max()),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


# -- the ranking -----------------------------------------------------------------------------------


def _ranking(
    methods: Mapping[str, Mapping[str, Any]], units: Mapping[str, Sequence[Unit]], removed: Array
) -> list[dict[str, Any]]:
    """A row for each method, the one with the largest gap first."""
    rows = []
    for label, found in methods.items():
        morf, lerf = (areas(joined(units[label], order), removed) for order in ("morf", "lerf"))
        told = found["sensitivity"]
        rows.append(
            {
                "label": label,
                "gap": band(lerf - morf),
                "morf": found["curves"]["morf"]["area"],
                "lerf": found["curves"]["lerf"]["area"],
                "slope": found["curves"]["morf"]["slope"],
                "sensitivity": None if told is None else average(np.array(told["correlation"])),
                "infidelity": (found["infidelity"] or {}).get("mean"),
                "max_sensitivity": (found["max_sensitivity"] or {}).get("mean"),
                "completeness": (found["completeness"] or {}).get("median"),
                "seconds_per_sample": found["seconds_per_sample"],
            }
        )
    return sorted(rows, key=lambda row: -np.nan_to_num(row["gap"]["mean"], nan=-np.inf))


def finite(value: Any) -> Any:
    """Plain JSON types, in which what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


# -- tables ----------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """``curves.csv``, ``sensitivity.csv`` and ``methods.csv`` as text, by file name."""
    everyone = {**results["methods"], CONTROL: results["control"][CONTROL]}
    curves: list[list[Any]] = [["method", "order", "removed", "mean", "low", "high"]]
    told: list[list[Any]] = [["method", "n", "correlation", "low", "high"]]
    for label, found in everyone.items():
        for order, one in found["curves"].items():
            columns = zip(*(one[key] for key in curves[0][2:]), strict=True)
            curves += [[label, order, *row] for row in columns]
        if found["sensitivity"] is not None:
            columns = zip(*(found["sensitivity"][key] for key in told[0][1:]), strict=True)
            told += [[label, *row] for row in columns]
    flat = [_flat(row) for row in results["ranking"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    methods: list[list[Any]] = [list(names), *([row.get(n) for n in names] for row in flat)]
    return {
        "curves.csv": _csv(curves),
        "sensitivity.csv": _csv(told),
        "methods.csv": _csv(methods),
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found.update({f"{key}_{name}": item for name, item in value.items()})
        else:
            found[key] = value
    return found


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


__all__ = ["band", "finite", "report", "tables"]
