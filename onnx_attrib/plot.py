"""Pictures of explanations: the input beside what speaks for and against the explained output.

Red is for, blue against; the colour scale is symmetric around zero and ends at a robust percentile,
so that one extreme entry does not fade the rest. Needs matplotlib, but no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_attrib.errors import CompileError, RuntimeMissingError

Array = npt.NDArray[Any]
Kind = Literal["image", "signal", "bars"]

MOST = 8
"""Samples in one figure."""
PERCENTILE = 99.0
FOR, AGAINST, NEUTRAL = "#b2182b", "#2166ac", "#4d4d4d"
_DIVERGING, _SEQUENTIAL = "RdBu_r", "Reds"
_CHANNELS = 8
"""A short axis of at most this length is one of channels, which are summed."""
_PADDING = 5
"""So many equal words at the beginning or end are padding."""
_COARSE = 64
"""Gray pictures of at most this many pixels a side are outlined instead of underlaid."""
_AXIS = "against ← attribution → for"
_FEW = 32
"""At most this many features get a labelled bar each."""


@dataclass(frozen=True)
class Panel:
    """One sample to draw.

    ``attribution``: [H, W] for an image, [L] for a signal or bars. ``shown``: the input beside it;
    pixels [H, W, C] from 0 to 255, or values [C, L] of a signal or [L] of features; None leaves it
    out. ``labels``: names of features or positions. ``overlay``: an image's input also shows
    through the attribution.
    """

    kind: Kind
    attribution: Array
    shown: Array | None = None
    title: str = ""
    source: str = ""
    labels: Sequence[str] = ()
    overlay: bool = True

    @property
    def caption(self) -> str:
        """Source and title, where they share a line."""
        return f"{self.source}: {self.title}" if self.source and self.title else self.title


def panel_of(
    attribution: Array,
    value: Array | None = None,
    *,
    pixels: Array | None = None,
    inner: bool = False,
    channels_last: bool = False,
    **rest: Any,
) -> Panel:
    """The panel that suits one sample's attribution (without its batch axis).

    [C, H, W] (or [H, W, C]) and volumes (their slice of most attribution) become images, [C, L]
    and [L, C] with few channels signals, other [H, W] heat maps, [F] bars. ``value``: the sample,
    of the same shape. ``pixels``: [H, W, C], the picture it came from, shown in place of the
    values. ``inner``: the attribution is of an inner tensor, so that [L, D] is one of embeddings,
    summed over D.
    """
    a = np.nan_to_num(np.asarray(attribution, np.float64), posinf=0.0, neginf=0.0)
    if a.ndim > 3:
        a, value = _slice(a, value, channels_last)
    if a.ndim == 3:
        axis = 2 if channels_last else 0
        if pixels is None and value is not None:
            pixels = as_pixels(np.moveaxis(value, axis, 2))
        return Panel("image", a.sum(axis=axis), pixels, **rest)
    if pixels is not None and a.ndim == 2:
        return Panel("image", a, pixels, **rest)
    if a.ndim == 2:
        if inner:
            return Panel("bars" if len(a) <= _FEW else "signal", a.sum(axis=1), **rest)
        if min(a.shape) <= _CHANNELS:
            axis = int(np.argmin(a.shape))
            shown = None if value is None else np.moveaxis(value, axis, 0)
            return Panel("signal", a.sum(axis=axis), shown, **rest)
        shown = None if value is None else as_pixels(value[..., None])
        return Panel("image", a, shown, overlay=False, **rest)
    a = a.reshape(-1)
    if value is not None:
        value = value.reshape(-1)
    if a.size <= _FEW:
        return Panel("bars", a, value, **rest)
    return Panel("signal", a, None if value is None else value[None], **rest)


def as_pixels(values: Array) -> Array:
    """Values [H, W, C] as pixels from 0 to 255, [H, W, 1 or 3]: their own range, stretched."""
    values = np.asarray(values, np.float64)
    if values.shape[-1] not in (1, 3):
        values = values[..., :3] if values.shape[-1] == 4 else values.mean(axis=-1, keepdims=True)
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if not np.isfinite(high - low) or high <= low:
        return np.full(values.shape, 255, np.uint8)
    return ((values - low) * (255 / (high - low))).round().astype(np.uint8)


def draw(panels: Sequence[Panel], heading: str = "", signed: bool = True) -> Any:
    """A matplotlib Figure of up to :data:`MOST` panels.

    ``signed``: attributions can be negative, so zero is the middle of the colours; else they run
    from white. Raises RuntimeMissingError without matplotlib.
    """
    figure_module = figures()
    panels = list(panels)[:MOST]
    pictures = all(panel.kind == "image" for panel in panels)
    columns = 1 if len(panels) <= (2 if pictures else 3) else 2
    rows = -(-len(panels) // columns)
    cell = _cell(panels)
    figure = figure_module.Figure(
        figsize=(cell[0] * columns, cell[1] * rows + 0.3), dpi=150, layout="constrained"
    )
    if heading:
        figure.suptitle(heading, fontsize=11, fontweight="bold")
    grid = figure.subfigures(rows, columns, squeeze=False)
    for panel, part in zip(panels, grid.flat, strict=False):
        _KINDS[panel.kind](part, panel, signed)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's ending; CompileError if that cannot be done."""
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.lower().lstrip(".")
    if kind not in known:
        raise CompileError(f"cannot draw a '{path.suffix}' file; choose from: {', '.join(known)}")
    figure.savefig(path, format=kind)


def require() -> None:
    """Raise RuntimeMissingError if matplotlib is not installed, before anything else is done."""
    figures()


def limit(attribution: Array) -> float:
    """The end of the colour scale: a high percentile of the size, or the largest if that is 0."""
    size = np.abs(attribution)
    if not size.size:
        return 1.0
    return float(np.percentile(size, PERCENTILE)) or float(size.max()) or 1.0


# -- kinds -----------------------------------------------------------------------------------------


def _cell(panels: Sequence[Panel]) -> tuple[float, float]:
    if any(panel.kind == "image" for panel in panels):
        ratios = [
            p.attribution.shape[0] / p.attribution.shape[1] for p in panels if p.kind == "image"
        ]
        return 7.2, float(np.clip(3.1 * max(ratios), 1.6, 6.0)) + 0.3
    if any(panel.kind == "bars" for panel in panels):
        return 6.4, 1.0 + 0.21 * max(len(p.attribution) for p in panels if p.kind == "bars")
    return 7.2, 3.2


def _image(part: Any, panel: Panel, signed: bool) -> None:
    axes = part.subplots(1, 1 if panel.shown is None else 2, squeeze=False)[0]
    if panel.shown is not None:
        show_input(axes[0], panel)
    options = show_map(axes[-1], panel, signed)
    axes[-1].set_title(short(panel.caption if panel.shown is None else panel.title), fontsize=9)
    _colour_bar(part, axes[-1], panel, options, signed)


def show_input(ax: Any, panel: Panel) -> None:
    """An image panel's input, in the coordinates of its attribution."""
    shown = panel.shown
    assert shown is not None
    flat = shown[..., 0] if shown.shape[-1] == 1 else shown
    ax.imshow(flat, cmap="gray", vmin=0, vmax=255, extent=_extent(panel), interpolation=_how(shown))
    ax.set_title(short(panel.source), fontsize=9)
    _frame(ax)


def show_map(ax: Any, panel: Panel, signed: bool) -> dict[str, Any]:
    """An image panel's attribution over its pale input; how its colours were chosen."""
    a, extent, end = panel.attribution, _extent(panel), limit(panel.attribution)
    options: dict[str, Any] = {
        "cmap": _DIVERGING if signed else _SEQUENTIAL,
        "vmin": -end if signed else 0.0,
        "vmax": end,
        "extent": extent,
        "interpolation": "nearest",
    }
    under = panel.shown if panel.overlay else None
    drawing = under is not None and under.shape[-1] == 1 and max(under.shape[:2]) <= _COARSE
    if under is not None and not drawing:
        # The input shines through, pale, where there is little attribution.
        pale = 255 - (255 - _gray(under)) * 0.3
        ax.imshow(pale, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation=_how(under))
        options["alpha"] = np.clip(np.abs(a) / end, 0, 1) ** 0.6
    ax.imshow(a, **options)
    if under is not None and drawing and min(under.shape[:2]) > 1:
        _outline(ax, _gray(under), *a.shape)
    _frame(ax)
    return options


def _extent(panel: Panel) -> tuple[int, int, int, int]:
    """One coordinate system, so that a coarse layer lies where it looks."""
    height, width = panel.attribution.shape
    return 0, width, height, 0


def _how(pixels: Array) -> str:
    return "nearest" if max(pixels.shape[:2]) <= 128 else "antialiased"


def _frame(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)
        spine.set_color("#999999")


def _outline(heat: Any, gray: Array, height: int, width: int) -> None:
    """The input's edges as thin lines: its few pixels would cover the attribution's."""
    middle = (gray.min() + gray.max()) / 2
    if gray.max() > gray.min():
        x = (np.arange(gray.shape[1]) + 0.5) * width / gray.shape[1]
        y = (np.arange(gray.shape[0]) + 0.5) * height / gray.shape[0]
        heat.contour(x, y, gray, [middle], colors="#555555", linewidths=0.7, alpha=0.8)


def _colour_bar(part: Any, heat: Any, panel: Panel, options: dict[str, Any], signed: bool) -> None:
    bar = colour_bar(part, heat.inset_axes((1.04, 0.0, 0.045, 1.0)), panel, options, "vertical")
    bar.formatter.set_powerlimits((-3, 4))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.set_label(_AXIS if signed else "attribution", fontsize=8)


def colour_bar(part: Any, place: Any, panel: Panel, options: dict[str, Any], way: str) -> Any:
    """The bar of a map's colours; arrows tell of values beyond its ends."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = options["vmin"], options["vmax"]
    mappable = ScalarMappable(Normalize(low, high), options["cmap"])
    beyond = bool((np.abs(panel.attribution) > high).any())
    extend = ("both" if low < 0 else "max") if beyond else "neither"
    bar = part.colorbar(mappable, cax=place, extend=extend, orientation=way)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.5)
    return bar


def _signal(part: Any, panel: Panel, signed: bool) -> None:
    count = 1 if panel.shown is None else 2
    axes = part.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    if panel.shown is not None:
        show_values(axes[0], panel.shown)
        axes[0].set_title(short(panel.source), fontsize=9, loc="left")
        axes[0].set_ylabel("value", fontsize=8)
    show_signal(axes[-1], panel)
    title = panel.caption if panel.shown is None else panel.title
    axes[-1].set_title(short(title), fontsize=9, loc="left")
    axes[-1].set_ylabel("attribution", fontsize=8)
    tidy(axes)


def show_values(ax: Any, shown: Array) -> None:
    """A signal's own values [C, L]."""
    if len(shown) > 1 and _is_one_hot(shown):
        ax.imshow(shown, cmap="gray_r", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        ax.set_yticks(range(len(shown)))
        return
    for row in shown:
        colour = NEUTRAL if len(shown) == 1 else None
        ax.plot(np.arange(len(row)), row, linewidth=0.8, color=colour)


def show_signal(ax: Any, panel: Panel) -> None:
    """A signal panel's attribution as bars, or as an area where they are many."""
    a = panel.attribution
    at = np.arange(len(a))
    if len(a) <= 128:
        ax.bar(at, a, width=0.9, color=_colours(a))
    else:
        for part_of, colour in ((a.clip(min=0), FOR), (a.clip(max=0), AGAINST)):
            ax.fill_between(at, part_of, step="mid", color=colour, linewidth=0.4)
    ax.axhline(0, color="black", linewidth=0.5)
    if len(panel.labels) == len(a) <= 64:
        ax.set_xticks(at, [short(label, 16) for label in panel.labels], rotation=90)
    ax.set_xlim(-0.5, len(a) - 0.5)


def _bars(part: Any, panel: Panel, signed: bool) -> None:
    ax = part.subplots(1, 1)
    show_bars(ax, panel, signed)
    ax.set_title(short(panel.caption), fontsize=9, loc="left")
    tidy([ax])


def show_bars(ax: Any, panel: Panel, signed: bool) -> None:
    """A bar for each feature, from the top down, with its name and value."""
    a = panel.attribution
    at = np.arange(len(a))
    ax.barh(at, a, color=_colours(a), height=0.75)
    labels = list(panel.labels) if len(panel.labels) == len(a) else [str(i) for i in at]
    if panel.shown is not None and panel.shown.size == a.size:
        values = panel.shown.reshape(-1)
        labels = [f"{name} = {value:.4g}" for name, value in zip(labels, values, strict=True)]
    ax.set_yticks(at, [short(label, 28) for label in labels])
    ax.set_ylim(len(a) - 0.5, -0.5)
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_xlabel(_AXIS if signed else "attribution", fontsize=8)


_KINDS = {"image": _image, "signal": _signal, "bars": _bars}


# -- parts -----------------------------------------------------------------------------------------


def unpadded(labels: Sequence[str]) -> tuple[slice, str]:
    """Where positions differ, and what is left out before or after: one word again and again."""
    for step in (1, -1):
        words = labels[::step]
        count = next((k for k, word in enumerate(words) if word != words[0]), 0)
        if count >= _PADDING:
            kept = slice(count, None) if step == 1 else slice(0, len(labels) - count)
            return kept, f"{count} × {words[0]}"
    return slice(None), ""


def tidy(axes: Any) -> None:
    """Small ticks, no frame above and to the right."""
    for ax in axes:
        ax.tick_params(labelsize=7)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)


def _colours(a: Array) -> list[str]:
    return [FOR if value >= 0 else AGAINST for value in a]


def _gray(pixels: Array) -> Array:
    if pixels.shape[-1] == 1:
        return pixels[..., 0].astype(np.float64)
    return np.asarray(pixels[..., :3].astype(np.float64) @ np.array([0.299, 0.587, 0.114]))


def _is_one_hot(values: Array) -> bool:
    return bool(np.isin(values, (0, 1)).all()) and bool((values.sum(axis=0) <= 1).all())


def _slice(a: Array, value: Array | None, channels_last: bool) -> tuple[Array, Array | None]:
    """[C, D, H, W] at the depth of most attribution; more axes likewise."""
    while a.ndim > 3:
        axis = 0 if channels_last else 1
        others = tuple(i for i in range(a.ndim) if i != axis)
        best = int(np.abs(a).sum(axis=others).argmax())
        a = a.take(best, axis=axis)
        value = None if value is None else value.take(best, axis=axis)
    return a, value


def short(text: str, length: int = 60) -> str:
    """A text that fits, in which nothing is taken for a formula."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def figures() -> ModuleType:
    """matplotlib.figure; RuntimeMissingError without it."""
    try:
        import matplotlib.figure
    except ImportError:
        raise RuntimeMissingError(
            "drawing needs matplotlib: pip install onnx-attrib[plot]"
        ) from None
    return matplotlib.figure


__all__ = [
    "MOST",
    "Panel",
    "as_pixels",
    "draw",
    "limit",
    "panel_of",
    "require",
    "save",
    "unpadded",
]
