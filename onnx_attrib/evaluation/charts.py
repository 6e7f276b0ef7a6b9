"""Charts as inline SVG: lines with bands, and small intervals for the cells of a table.

Colours come from the page's style sheet (classes ``s0`` to ``s6`` and ``control``), so that they
follow light and dark; dashes and markers tell the same lines apart without colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 480.0, 330.0
TOP, BOTTOM, RIGHT = 30.0, 46.0, 16.0
CHARACTER = 6.6
"""Width of a character of the labels, about."""
COLOURS = 7
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 4", "4 2 1 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "drop", "plus", "bar")
READINGS = 60
"""Places where the page can read values off a line."""
_MANY = 12
"""Lines of more points carry markers at some places only."""


@dataclass(frozen=True)
class Line:
    """A line to draw: ``style`` numbers its looks, None is the control's.

    ``low`` and ``high`` bound its band. Values that are None or not finite are left out.
    """

    label: str
    style: int | None
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Scale:
    """Values to pixels; ``log`` by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / ((high - low) or 1.0)
        return self.start + share * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log(value) if self.log else value


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    steps: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """An SVG of lines, with names beside them where there is room.

    ``name`` is unique on the page; ``title`` is for those who cannot see it. ``steps`` names the
    places 0, 1, … of an x axis that is not of numbers. ``limits`` are the least that y shows.
    """
    values = [v for line in lines for part in (line.y, line.low, line.high) for v in _known(part)]
    places = [v for line in lines for v in line.x if v > 0 or not log_x]
    if not values or not places:
        return '<p class="empty">There is nothing to draw.</p>'
    bottom, top = min(values), max(values)
    if limits is not None:
        bottom, top = min(bottom, limits[0]), max(top, limits[1])
    ticks = nice(bottom, top)
    room = (top - bottom) * 0.03 or 0.5
    left = 14 + CHARACTER * max(len(number(tick)) for tick in ticks)
    y = Scale(bottom - room, top + room, HEIGHT - BOTTOM, TOP)
    # Names need room to both sides.
    inset = 36 if steps else 0
    x = Scale(min(places), max(places), left + inset, WIDTH - RIGHT - inset, log_x)
    drawn = [_pixels(line, x, y) for line in lines]
    parts = [_grid(ticks, x, y, left), _x_axis(x, steps, x_label, left)]
    parts.append(f'<text class="axis-title" x="2" y="13">{escape(y_label)}</text>')
    parts += [_band(line, x, y) for line in lines]
    # The control lies below what it controls.
    order = sorted(range(len(lines)), key=lambda k: lines[k].style is not None)
    parts += [_line(lines[k], drawn[k], k) for k in order]
    parts.append(_names(lines, drawn, left))
    parts.append(f'<path class="reading" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-labelledby="{name}-title" data-readings="{escape(_readings(lines, x, steps))}">'
        f'<title id="{name}-title">{escape(title)}</title>{"".join(parts)}</svg>'
    )


def swatch(style: int | None) -> str:
    """A line as the legend shows it."""
    marks = "" if style is None else _marker(style, 17, 6)
    return (
        f'<svg class="swatch {look(style)}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="line" d="M1 6H33"{_dash(style)}/>{marks}</svg>'
    )


def interval(mean: float, low: float, high: float, ends: tuple[float, float]) -> str:
    """A dot with its band on a scale that a column shares; a stroke marks zero."""
    x = Scale(*ends, 5, 155)
    zero = f'<path class="zero" d="M{x(0):.1f} 0V14"/>' if ends[0] <= 0 <= ends[1] else ""
    return (
        '<svg class="interval" viewBox="0 0 160 14" aria-hidden="true">'
        f'{zero}<path class="whisker" d="M{x(low):.1f} 7H{x(high):.1f}"/>'
        f'<circle cx="{x(mean):.1f}" cy="7" r="3"/></svg>'
    )


def look(style: int | None) -> str:
    """The class of a line's colour."""
    return "control" if style is None else f"s{style % COLOURS}"


def number(value: float | None, digits: int = 3, full: bool = False) -> str:
    """A number for people, with a true minus; ``full``: with all its digits, so that 12 is 12.0."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    shown = f"{value:#.{digits}g}".removesuffix(".") if full else f"{value:.{digits}g}"
    if "e" in shown:
        mantissa, exponent = shown.replace(".e", "e").split("e")
        if 0 < int(exponent) < 6:
            return f"{value:.0f}".replace("-", "−")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        shown = f"{mantissa}·10{power}"
    return shown.replace("-", "−")


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from ``low`` to ``high``, about ``count``."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if (high - low) / (step * f) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def thinned(points: Points, tolerance: float = 0.2) -> Points:
    """The points that a line needs to stay within ``tolerance`` of all of them (Douglas, Peucker).

    >>> thinned([(0, 0), (1, 0.1), (2, 0)])
    [(0, 0), (2, 0)]
    """
    kept, open_parts = {0, len(points) - 1}, [(0, len(points) - 1)]
    while open_parts:
        first, last = open_parts.pop()
        if last - first < 2:
            continue
        (x0, y0), (x1, y1) = points[first], points[last]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        off, far = max(
            (abs((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) / length, k)
            for k, (x, y) in enumerate(points[first + 1 : last], first + 1)
        )
        if off > tolerance:
            kept.add(far)
            open_parts += [(first, far), (far, last)]
    return [points[k] for k in sorted(kept) if points]


# -- parts -----------------------------------------------------------------------------------------


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _pairs(xs: Sequence[float], ys: Sequence[float | None], x: Scale, y: Scale) -> Points:
    return [
        (x(a), y(b))
        for a, b in zip(xs, ys, strict=True)
        if b is not None and math.isfinite(b) and (a > 0 or not x.log)
    ]


def _pixels(line: Line, x: Scale, y: Scale) -> Points:
    return _pairs(line.x, line.y, x, y)


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _dash(style: int | None) -> str:
    dash = "3 3" if style is None else DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _grid(ticks: Sequence[float], x: Scale, y: Scale, left: float) -> str:
    parts = []
    for tick in ticks:
        kind = "zero" if abs(tick) < 1e-12 else "grid"
        parts.append(f'<path class="{kind}" d="M{left:.1f} {y(tick):.1f}H{WIDTH - RIGHT:g}"/>')
        at = f'x="{left - 6:.1f}" y="{y(tick) + 4:.1f}"'
        parts.append(f'<text class="tick end" {at}>{number(tick)}</text>')
    return "".join(parts)


def _x_axis(x: Scale, steps: Sequence[str], label: str, left: float) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{left:.1f} {base:g}H{WIDTH - RIGHT:g}"/>']
    for tick, text in _x_ticks(x, steps):
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {base:g}v4"/>')
        at = f'x="{x(tick):.1f}" y="{base + 17:g}"'
        parts.append(f'<text class="tick middle" {at}>{escape(text)}</text>')
    at = f'x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 8:g}"'
    parts.append(f'<text class="axis-title middle" {at}>{escape(label)}</text>')
    return "".join(parts)


def _x_ticks(x: Scale, steps: Sequence[str]) -> list[tuple[float, str]]:
    if steps:
        fits = int(abs(x.end - x.start) / len(steps) / CHARACTER) if len(steps) > 1 else 40
        short = [s if len(s) <= fits else f"{s[: max(fits - 1, 1)]}…" for s in steps]
        return [(float(k), text) for k, text in enumerate(short)]
    if not x.log:
        return [(tick, number(tick, 4)) for tick in nice(x.low, x.high, 6)]
    powers = range(math.floor(math.log10(x.low)), math.ceil(math.log10(x.high)) + 1)
    marks = [f * 10.0**p for p in powers for f in (1, 2, 5) if x.low <= f * 10.0**p <= x.high]
    return [(mark, number(mark, 4)) for mark in marks]


def _band(line: Line, x: Scale, y: Scale) -> str:
    if not line.low or not line.high:
        return ""
    above = thinned(_pairs(line.x, line.high, x, y))
    below = thinned(_pairs(line.x, line.low, x, y))
    if len(above) < 2 or len(below) < 2:
        return ""
    outline = _path([*above, *reversed(below)])
    return f'<path class="band {look(line.style)}" d="{outline}Z"/>'


def _line(line: Line, points: Points, place: int) -> str:
    if not points:
        return ""
    marks = ""
    if line.style is not None:
        marks = "".join(_marker(line.style, *at) for at in _marked(points, line.style))
    path = f'<path class="line" d="{_path(thinned(points))}"{_dash(line.style)}/>'
    return f'<g class="{look(line.style)}" data-line="{place}">{path}{marks}</g>'


def _marked(points: Points, style: int) -> Points:
    """Where a line carries its marker: at its points if they are few, else here and there."""
    if len(points) <= _MANY:
        return points
    shares = [(k + (style * 0.381966) % 1) / 5 for k in range(5)]
    return [_at(points, points[0][0] + s * (points[-1][0] - points[0][0])) for s in shares]


def _at(points: Points, x: float) -> tuple[float, float]:
    """The point of a line at ``x``."""
    after = next((k for k, point in enumerate(points) if point[0] >= x), len(points) - 1)
    (x1, y1), (x0, y0) = points[after], points[max(after - 1, 0)]
    share = (x - x0) / (x1 - x0) if x1 > x0 else 1.0
    return x, y0 + min(max(share, 0.0), 1.0) * (y1 - y0)


def _marker(style: int, x: float, y: float) -> str:
    shape = MARKERS[style % len(MARKERS)]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    paths = {
        "square": "m-2.8-2.8h5.6v5.6h-5.6z",
        "triangle": "m0-3.8l3.6 6.4h-7.2z",
        "diamond": "m0-4l4 4l-4 4l-4-4z",
        "drop": "m0 3.8l3.6-6.4h-7.2z",
        "cross": "m-3-3l6 6m0-6l-6 6",
        "plus": "m-3.6 0h7.2m-3.6-3.6v7.2",
        "bar": "m0-4v8",
    }
    kind = "mark stroke" if shape in ("cross", "plus", "bar") else "mark"
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}{paths[shape]}"/>'


def _names(lines: Sequence[Line], drawn: Sequence[Points], left: float) -> str:
    """Each line's name beside it, where it touches nothing; a name without a place is left out."""
    dense = [_dense(points) for points in drawn]
    taken: list[tuple[float, float, float, float]] = []
    parts = []
    for k, line in enumerate(lines):
        width, best = CHARACTER * len(line.label) + 4, None
        for x, y in dense[k][::4]:
            for above in (True, False):
                box = (x - width / 2, y - 18, x + width / 2, y - 4)
                if not above:
                    box = (x - width / 2, y + 4, x + width / 2, y + 18)
                room = _room(box, dense, k, taken, left)
                if room is not None and (best is None or room > best[0] + 1):
                    best = (room, box)
        if best is not None:
            x0, _, x1, y1 = best[1]
            taken.append(best[1])
            at = f'x="{(x0 + x1) / 2:.1f}" y="{y1 - 3:.1f}"'
            parts.append(
                f'<text class="name middle {look(line.style)}" {at}>{escape(line.label)}</text>'
            )
    return "".join(parts)


def _dense(points: Points) -> Points:
    """Points about 4 pixels apart."""
    found = points[:1]
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / 4))
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(1, count)]
        found.append((x1, y1))
    return found if len(found) < 400 else found[:: len(found) // 400 + 1]


def _room(
    box: tuple[float, float, float, float],
    dense: Sequence[Points],
    own: int,
    taken: Sequence[tuple[float, float, float, float]],
    left: float,
) -> float | None:
    """How far the nearest other line is from a name's box; None if something lies inside."""
    x0, y0, x1, y1 = box
    if x0 < left + 2 or x1 > WIDTH - 4 or y0 < TOP - 8 or y1 > HEIGHT - BOTTOM - 2:
        return None
    if any(x0 < c and a < x1 and y0 < d and b < y1 for a, b, c, d in taken):
        return None
    nearest = 24.0
    for k, points in enumerate(dense):
        for x, y in points:
            away = math.hypot(max(x0 - x, x - x1, 0), max(y0 - y, y - y1, 0))
            if away < 1.5:
                return None
            if k != own:
                nearest = min(nearest, away)
    return nearest


def _readings(lines: Sequence[Line], x: Scale, steps: Sequence[str]) -> str:
    """Values at some places of the x axis, for the page's script."""
    longest = max((line.x for line in lines), key=len)
    every = max(1, -(-len(longest) // READINGS))
    wanted = [at for at in [*longest[::every], longest[-1]] if at > 0 or not x.log]
    found = []
    for at in dict.fromkeys(wanted):
        values = []
        for line in lines:
            known = dict(zip(line.x, line.y, strict=True))
            value = known.get(at)
            values.append("" if value is None else number(value, full=True))
        shown = steps[int(at)] if steps else number(at, 4)
        found.append([round(x(at), 1), shown, values])
    return json.dumps(found, ensure_ascii=False)


__all__ = ["Line", "interval", "line_chart", "look", "nice", "number", "swatch", "thinned"]
