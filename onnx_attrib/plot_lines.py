"""Pictures of several attributions of the same inputs: a line for each input, the input first.

As Figures 1 and 2 and Table 1 of Ancona et al. 2017 show them. Every map has a colour scale of its
own, because methods have units of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_attrib.plot import (
    MOST,
    Panel,
    colour_bar,
    figures,
    limit,
    short,
    show_bars,
    show_input,
    show_map,
    show_signal,
    show_values,
    tidy,
)

_COLUMNS, _LINE = 105, 0.185
"""Characters in a row of text, and its height in inches."""
ACROSS = 7
"""Maps beside each other, at most; more of them go on in another row."""


def draw_lines(
    lines: Sequence[Sequence[Panel]],
    names: Sequence[str],
    heading: str = "",
    signed: Sequence[bool] = (),
) -> Any:
    """A matplotlib Figure of up to :data:`MOST` ``lines``, one panel in each for each of ``names``.

    Images: the input, then the maps. Signals: the same from the top down, at one scale of
    positions; with names of the positions a text, whose words are coloured. Bars: features from
    the top down, methods from left to right. ``signed``: of each name, as for :func:`draw`. Raises
    RuntimeMissingError without matplotlib.
    """
    lines = [list(line) for line in lines][:MOST]
    signs = list(signed) or [True] * len(names)
    if all(panel.labels and panel.kind != "image" for line in lines for panel in line):
        return _texts(lines, names, heading, signs)
    draw = {"image": _images, "signal": _signals, "bars": _bars}[lines[0][0].kind]
    return draw(lines, names, heading, signs)


# -- kinds -----------------------------------------------------------------------------------------


def _images(
    lines: Sequence[Sequence[Panel]], names: Sequence[str], heading: str, signed: Sequence[bool]
) -> Any:
    inputs = int(any(line[0].shown is not None for line in lines))
    rows = -(-len(names) // ACROSS)
    across = -(-len(names) // rows)
    tall = max(line[0].attribution.shape[0] / line[0].attribution.shape[1] for line in lines)
    side = float(np.clip(10.5 / (across + inputs), 1.6, 2.6))
    size = side * (across + inputs), (side * float(np.clip(tall, 0.25, 3)) + 0.62) * rows
    figure = _figure(size[0], size[1] * len(lines) + 0.45, heading)
    grid = figure.subplots(rows * len(lines), across + inputs, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, line in enumerate(lines):
        block = grid[i * rows : (i + 1) * rows]
        if line[0].shown is not None:
            block[0, 0].set_axis_on()
            show_input(block[0, 0], line[0])
            about = "\n".join(filter(None, (short(line[0].source, 34), _told(line[0]))))
            block[0, 0].set_title(about, fontsize=8)
        for k, (panel, name) in enumerate(zip(line, names, strict=True)):
            place = block[k // across, inputs + k % across]
            place.set_axis_on()
            options = show_map(place, panel, signed[k])
            title = short(name, 34)
            if k == 0 and panel.shown is None:
                title = "\n".join(filter(None, (short(panel.source, 34), _told(panel), title)))
            place.set_title(title, fontsize=9)
            below = place.inset_axes((0.0, -0.075 / min(tall, 1.5), 1.0, 0.035 / min(tall, 1.5)))
            bar = colour_bar(figure, below, panel, options, "horizontal")
            low, high = options["vmin"], options["vmax"]
            ticks = (low, 0.0, high) if low < 0 else (0.0, high)
            bar.set_ticks(ticks, labels=[f"{tick:.2g}".replace("-", "−") for tick in ticks])
            texts = bar.ax.get_xticklabels()
            texts[0].set_ha("left")
            texts[-1].set_ha("right")
    kinds = [
        "red: for, blue: against" if True in signed else "",
        "white to red where there is no sign" if False in signed else "",
        "each map has its own scale",
    ]
    figure.supxlabel("; ".join(filter(None, kinds)), fontsize=8, color="#555555")
    return figure


def _signals(
    lines: Sequence[Sequence[Panel]], names: Sequence[str], heading: str, signed: Sequence[bool]
) -> Any:
    inputs = int(any(line[0].shown is not None for line in lines))
    rows = len(names) + inputs
    labelled = any(line[0].labels for line in lines)
    height = (0.7 * rows + 0.3 + 0.7 * labelled) * len(lines) + 0.3
    figure = _figure(9.0, height, heading)
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for line, part in zip(lines, parts, strict=True):
        axes = part.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        axes[0].set_title(short(line[0].caption, 100), fontsize=9, loc="left")
        if line[0].shown is not None:
            show_values(axes[0], line[0].shown)
        if inputs:
            _beside(axes[0], "input")
        for ax, panel, name in zip(axes[inputs:], line, names, strict=True):
            show_signal(ax, panel)
            _beside(ax, name)
        for ax in axes[:-1]:
            ax.tick_params(labelbottom=False)
        tidy(axes)
    return figure


def _bars(
    lines: Sequence[Sequence[Panel]], names: Sequence[str], heading: str, signed: Sequence[bool]
) -> Any:
    longest = max(len(panel.attribution) for line in lines for panel in line)
    rows = -(-len(names) // ACROSS)
    across = -(-len(names) // rows)
    each = 0.95 + 0.19 * longest
    figure = _figure(1.6 + 1.9 * across, each * rows * len(lines) + 0.3, heading)
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for line, part in zip(lines, parts, strict=True):
        part.suptitle(short(line[0].caption, 100), fontsize=9, x=0.01, ha="left")
        grid = part.subplots(rows, across, sharey=True, squeeze=False)
        for ax in grid.flat[len(names) :]:
            ax.set_axis_off()
        for k, (ax, panel, name) in enumerate(zip(grid.flat, line, names, strict=False)):
            show_bars(ax, panel, signed[k])
            ax.set_title(short(name, 30), fontsize=9)
            if k % across:
                ax.tick_params(labelleft=False)
        tidy(grid.flat)
    return figure


def _texts(
    lines: Sequence[Sequence[Panel]], names: Sequence[str], heading: str, signed: Sequence[bool]
) -> Any:
    from matplotlib import colormaps

    places = [_wrapped(line[0].labels) for line in lines]
    rows = [max(row for row, _ in placed) + 1 for placed in places]
    height = sum(_LINE * (count + 0.7) * len(names) + 0.35 for count in rows) + 0.5
    figure = _figure(9.0, height, heading)
    heights = [_LINE * (count + 0.7) * len(names) + 0.35 for count in rows]
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for line, part, placed, count in zip(lines, parts, places, rows, strict=True):
        axes = part.subplots(len(names), 1, squeeze=False)[:, 0]
        axes[0].set_title(short(line[0].caption, 100), fontsize=9, loc="left")
        for ax, panel, name, sign in zip(axes, line, names, signed, strict=True):
            end = limit(panel.attribution)
            colours = colormaps["RdBu_r" if sign else "Reds"]
            for (row, column), word, value in zip(
                placed, panel.labels, panel.attribution, strict=True
            ):
                # Colours up to less than two thirds of the scale, on which black can be read.
                share = float(np.clip(value / end, -1, 1)) * 0.62
                ax.text(
                    column,
                    row,
                    short(word, _COLUMNS),
                    family="monospace",
                    fontsize=8,
                    va="center",
                    bbox={
                        "facecolor": colours((share + 1) / 2 if sign else share),
                        "edgecolor": "none",
                        "pad": 1.5,
                    },
                )
            ax.set_xlim(0, _COLUMNS)
            ax.set_ylim(count - 0.4, -0.6)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_frame_on(False)
            told = f"{short(name, 30)}\n{'±' if sign else '0 to '}{end:.2g}"
            ax.set_ylabel(told, rotation=0, ha="right", va="center", fontsize=8, labelpad=8)
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _figure(width: float, height: float, heading: str) -> Any:
    figure = figures().Figure(figsize=(width, height), dpi=150, layout="constrained")
    if heading:
        figure.suptitle(short(heading, int(12 * width)), fontsize=11, fontweight="bold")
    return figure


def _wrapped(words: Sequence[str]) -> list[tuple[int, int]]:
    """Row and column of each word of a text that is broken into rows."""
    found, row, column = [], 0, 0
    for word in words:
        width = min(len(word), _COLUMNS)
        if column and column + width > _COLUMNS:
            row, column = row + 1, 0
        found.append((row, column))
        column += width + 1
    return found


def _told(panel: Panel) -> str:
    """What is explained, in lines that fit beside a narrow map."""
    return short(panel.title, 80).replace(" (", "\n(")


def _beside(ax: Any, name: str) -> None:
    ax.set_ylabel(short(name, 30), rotation=0, ha="right", va="center", fontsize=8)
    ax.yaxis.set_label_coords(-0.06, 0.5)
    ax.locator_params(axis="y", nbins=3)


__all__ = ["ACROSS", "draw_lines"]
