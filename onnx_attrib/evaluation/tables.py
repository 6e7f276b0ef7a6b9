"""Tables of the page: measures by method, which the page's script can sort, and matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from onnx_attrib.evaluation.charts import interval, number, swatch


@dataclass(frozen=True)
class Column:
    """A measure: ``key`` of a row, heading and what it is; whether ``max`` or ``min`` is best."""

    key: str
    heading: str
    unit: str
    best: Literal["max", "min"]
    drawn: bool = False
    places: int | None = None
    """Behind the point; else three digits are shown."""

    def show(self, value: float) -> str:
        """A value of the column for people."""
        return decimal(value, self.places) if self.places else number(value, full=True)


def stat(value: Any) -> tuple[float, float, float] | None:
    """Mean and band of a measure: a number or ``{"mean", "low", "high"}``; None if unknown."""
    found = value if isinstance(value, Mapping) else {"mean": value}
    mean = found.get("mean")
    if mean is None or not math.isfinite(mean):
        return None
    low, high = (found.get(k) for k in ("low", "high"))
    return mean, mean if low is None else low, mean if high is None else high


def decimal(value: float, places: int = 2) -> str:
    """A number with so many digits behind the point."""
    shown = f"{value:.{places}f}".replace("-", "−")
    return shown if shown.strip("−0.") else shown.removeprefix("−")


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    styles: Mapping[str, int],
    ranked: bool = False,
) -> str:
    """A row for each method; that of the control has no rank and is never best."""
    head = "".join(
        f'<th scope="col" data-sort="{column.best}"><b>{escape(column.heading)}</b>'
        f"<small>{escape(column.unit)}</small></th>"
        for column in columns
    )
    rank = '<th scope="col" class="rank" data-sort="min"><b><abbr title="rank">#</abbr></b></th>'
    name = '<th scope="col" data-sort="text"><b>Method</b></th>'
    best = {column.key: _best(column, rows, styles) for column in columns}
    ends = {column.key: _ends(column, rows) for column in columns if column.drawn}
    body = []
    for place, row in enumerate(rows, 1):
        label = str(row["label"])
        style = styles.get(label)
        cells = [_cell(column, row, best[column.key], ends.get(column.key)) for column in columns]
        if ranked:
            shown = "" if style is None else str(place)
            cells.insert(0, f'<td class="rank" data-v="{shown}">{shown}</td>')
        named = f'<th scope="row"><span class="who">{swatch(style)}{escape(label)}</span></th>'
        cells.insert(1 if ranked else 0, named)
        kind = ' class="control-row"' if style is None else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="measures"><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{rank if ranked else ''}{name}{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def matrix(
    heading: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float | None]],
) -> str:
    """Correlations of pairs, shaded: numbers stand for the methods in the columns' heads."""
    head = "".join(
        f'<th scope="col"><abbr title="{escape(label)}">{k}</abbr></th>'
        for k, label in enumerate(labels, 1)
    )
    body = []
    for k, (label, row) in enumerate(zip(labels, values, strict=True), 1):
        cells = "".join(
            _shaded(value, own=j == k, names=(label, other))
            for j, (value, other) in enumerate(zip(row, labels, strict=True), 1)
        )
        body.append(f'<tr><th scope="row"><b>{k}</b> {escape(label)}</th>{cells}</tr>')
    return (
        f"<figure><h3>{escape(heading)}</h3>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(heading)}">'
        f'<table class="matrix"><caption class="unseen">{escape(heading)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "</figure>"
    )


# -- parts -----------------------------------------------------------------------------------------


def _best(
    column: Column, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, int]
) -> float | None:
    own = [stat(row.get(column.key)) for row in rows if row["label"] in styles]
    known = [found[0] for found in own if found]
    if len(known) < 2:
        return None
    return max(known) if column.best == "max" else min(known)


def _ends(column: Column, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    known = [found for row in rows if (found := stat(row.get(column.key)))]
    return min([0.0, *(k[1] for k in known)]), max([0.0, *(k[2] for k in known)])


def _cell(
    column: Column,
    row: Mapping[str, Any],
    best: float | None,
    ends: tuple[float, float] | None,
) -> str:
    found = stat(row.get(column.key))
    if found is None:
        return '<td data-v="">–</td>'
    mean, low, high = found
    shown = column.show(mean)
    if best is not None and shown == column.show(best):
        shown = f"<strong>{shown}</strong>"
    band = (
        f"<small>[{number(low, full=True)}, {number(high, full=True)}]</small>"
        if high > low
        else ""
    )
    drawn = interval(mean, low, high, ends) if ends and ends[1] > ends[0] else ""
    return f'<td data-v="{found[0]!r}">{drawn}<span class="value">{shown}{band}</span></td>'


def _shaded(value: float | None, own: bool, names: tuple[str, str]) -> str:
    if value is None or not math.isfinite(value):
        return "<td>–</td>"
    kind = "own" if own else "pos" if value >= 0 else "neg"
    title = escape(" and ".join(names))
    shown = decimal(value)
    return f'<td class="{kind}" style="--a:{min(abs(value), 1):.2f}" title="{title}">{shown}</td>'


__all__ = ["Column", "decimal", "matrix", "stat", "table"]
