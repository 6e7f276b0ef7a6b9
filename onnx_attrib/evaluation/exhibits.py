"""The page's gallery: some samples, and what each method makes of them, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from onnx_attrib.evaluation.charts import number, swatch
from onnx_attrib.evaluation.pictures import (
    DIVERGING,
    SEQUENTIAL,
    bars,
    cell_bar,
    gradient,
    heat_map,
    picture,
    words,
)
from onnx_attrib.feeds import Array
from onnx_attrib.methods import METHODS
from onnx_attrib.plot import limit, unpadded

FEW = 40
"""At most this many features are a table of bars."""


@dataclass(frozen=True)
class Exhibit:
    """One sample of the gallery.

    ``maps``: by the method's label, of the features: [H, W] of pixels, [T] of positions, [F] of
    columns. ``pixels``: the input as a picture, [H, W, 1 or 3] from 0 to 255. ``values``: the
    input's number at each column or position. ``names``: of columns or positions (words).
    """

    maps: Mapping[str, Array]
    pixels: Array | None = None
    values: Array | None = None
    names: Sequence[str] = ()


def section(
    results: Mapping[str, Any], gallery: Sequence[Exhibit], styles: Mapping[str, int]
) -> str:
    """All exhibits; nothing if there are none."""
    if not gallery:
        return ""
    described = [*(results.get("gallery") or []), *({} for _ in gallery)]
    signed = {label: _signed(results["methods"][label]) for label in results["methods"]}
    unit = str(results["settings"].get("features", "positions")).removesuffix("s")
    classes = (results.get("data") or {}).get("classes") or ()
    shown = [
        _exhibit(place, one, about, signed, styles, unit, classes)
        for place, (one, about) in enumerate(zip(gallery, described, strict=False), 1)
    ]
    return (
        '<section id="gallery">\n<h2>Maps</h2>\n'
        f"{_legend(set(signed.values()))}{''.join(shown)}\n</section>"
    )


# -- parts -----------------------------------------------------------------------------------------


def _signed(part: Mapping[str, Any]) -> bool:
    if "signed" in part:
        return bool(part["signed"])
    method = METHODS.get(str(part.get("method")))
    return method is None or method.is_signed({**method.defaults, **(part.get("options") or {})})


def _legend(kinds: set[bool]) -> str:
    parts = []
    if True in kinds:
        parts.append(f'<span>against <i style="background:{gradient(DIVERGING)}"></i> for</span>')
    if False in kinds:
        parts.append(f'<span>none <i style="background:{gradient(SEQUENTIAL)}"></i> much</span>')
    return (
        "<p>Red speaks for the explained score, blue against it; methods without a sign go from "
        "white to red. Every map has a scale of its own, whose end stands beside its name.</p>\n"
        f'<p class="scale" aria-hidden="true">{"".join(parts)}</p>\n'
    )


def _exhibit(
    place: int,
    one: Exhibit,
    about: Mapping[str, Any],
    signed: Mapping[str, bool],
    styles: Mapping[str, int],
    unit: str,
    classes: Sequence[str],
) -> str:
    maps = {label: np.asarray(a, np.float64) for label, a in one.maps.items()}
    heading, facts = _heading(place, about, classes)
    if all(a.ndim == 2 for a in maps.values()):
        body = _pictures(one, maps, signed, styles, heading)
    else:
        maps = {label: a.reshape(-1) for label, a in maps.items()}
        size = max((a.size for a in maps.values()), default=0)
        named = len(one.names) == size
        if size <= FEW and (one.values is not None or not named):
            body = _rows(one, maps)
        else:
            body = _strips(one, maps, styles, named, unit)
    return (
        f'<article><h3>{escape(heading)}</h3><p class="facts">{escape(facts)}</p>{body}</article>'
    )


def _heading(place: int, about: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, str]:
    def named(index: Any) -> str:
        known = isinstance(index, int) and 0 <= index < len(classes)
        return f"{index} {classes[index]}".rstrip() if known else str(index)

    name = about.get("name")
    index = about.get("index")
    heading = str(name or f"sample {place if index is None else index}")
    heading = heading.replace("sample", "Sample", 1) if heading.startswith("sample ") else heading
    facts = []
    if about.get("target") is not None:
        facts.append(f"explained: class {named(about['target'])}")
    if about.get("score") is not None:
        facts.append(f"score {number(about['score'], 4)}")
    if about.get("label") is not None:
        facts.append(f"label {named(about['label'])}")
    return heading, ", ".join(facts)


def _pictures(
    one: Exhibit,
    maps: Mapping[str, Array],
    signed: Mapping[str, bool],
    styles: Mapping[str, int],
    heading: str,
) -> str:
    tiles = []
    if one.pixels is not None:
        image = picture(np.asarray(one.pixels), f"{heading}: the input")
        tiles.append(f"<figure>{image}<figcaption>input</figcaption></figure>")
    for label, a in maps.items():
        image = heat_map(a, signed.get(label, True), _alt(heading, label, a))
        tiles.append(
            f"<figure>{image}<figcaption>{swatch(styles.get(label))}<span>{escape(label)}</span>"
            f"<small>{_end(a, signed.get(label, True))}</small></figcaption></figure>"
        )
    return f'<div class="tiles" style="--n:{len(tiles)}">{"".join(tiles)}</div>'


def _alt(heading: str, label: str, a: Array) -> str:
    """What a map shows, in words."""
    known = np.nan_to_num(a)
    row, column = np.unravel_index(int(np.abs(known).argmax()), known.shape)
    above, below = known[known > 0].sum(), known[known < 0].sum()
    return (
        f"{heading}: {label}; {number(above)} for and {number(below)} against in all, "
        f"strongest at row {row}, column {column}"
    )


def _end(a: Array, signed: bool) -> str:
    return f"{'±' if signed else '≤ '}{number(limit(np.nan_to_num(a)), 2)}"


def _rows(one: Exhibit, maps: Mapping[str, Array]) -> str:
    """A row for each feature, a column of bars for each method."""
    size = max(a.size for a in maps.values())
    names = list(one.names) if len(one.names) == size else [str(k) for k in range(size)]
    if one.values is not None and np.size(one.values) == size:
        given = np.asarray(one.values).reshape(-1)
        names = [f"{n} = {_value(v)}" for n, v in zip(names, given, strict=True)]
    ends = {label: float(np.abs(np.nan_to_num(a)).max(initial=0)) for label, a in maps.items()}
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in maps)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td>{cell_bar(float(a[k]), ends[label])}<span class="value">{number(float(a[k]))}'
            "</span></td>"
            for label, a in maps.items()
        )
        + "</tr>"
        for k, name in enumerate(names)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="attributions by feature">'
        f'<table class="features"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _value(value: Any) -> str:
    return number(float(value), 4) if np.asarray(value).dtype.kind in "fiub" else str(value)


def _strips(
    one: Exhibit, maps: Mapping[str, Array], styles: Mapping[str, int], named: bool, unit: str
) -> str:
    """The words, or the bars of all positions, of each method, one under the other."""
    parts, names, left_out = [], list(one.names), ""
    if named:
        kept, left_out = unpadded(names)
        names, maps = names[kept], {label: a[kept] for label, a in maps.items()}
    if not named and one.values is not None and np.asarray(one.values).dtype.kind in "fiub":
        shown = bars(np.asarray(one.values, np.float64), "the input's values")
        parts.append(f'<div class="strip"><div class="who">input</div>{shown}</div>')
    for label, a in maps.items():
        known = np.nan_to_num(a)
        where = int(np.abs(known).argmax()) if known.size else 0
        alt = f"{label}: strongest at {unit} {where}"
        shown = words(a, names) if named else bars(a, alt)
        kind = "strip text" if named else "strip"
        end = number(limit(known) if named else float(np.abs(known).max(initial=0.0)), 2)
        parts.append(
            f'<div class="{kind}"><div class="who">{swatch(styles.get(label))}{escape(label)} '
            f"<small>{'±' if (known < 0).any() else '≤ '}{end}</small></div>{shown}</div>"
        )
    if left_out:
        parts.append(f'<p class="note">{escape(left_out)} left out.</p>')
    if not named:
        last = max((a.size for a in maps.values()), default=1) - 1
        parts.append(
            '<div class="strip"><div class="who"></div><p class="ends"><span>0</span>'
            f"<span>{escape(unit)}</span><span>{last}</span></p></div>"
        )
    return f'<div class="strips">{"".join(parts)}</div>'


__all__ = ["Exhibit", "section"]
