"""Maps and inputs for the page: PNG pictures as data URIs, strips of words, bars. No dependency."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from onnx_attrib.evaluation.charts import number
from onnx_attrib.feeds import Array
from onnx_attrib.plot import AGAINST, FOR, limit

LARGEST = 320
"""Pixels a side, at most, of a picture on the page."""
SPANS = 400
"""Steps of a strip of bars, at most."""
_MIDDLE = "#f7f7f7"
_AGAINST = (AGAINST, "#4393c3", "#92c5de", "#d1e5f0")
_FOR = ("#fddbc7", "#f4a582", "#d6604d", FOR)
DIVERGING = (*_AGAINST, _MIDDLE, *_FOR)
SEQUENTIAL = (_MIDDLE, *_FOR)
"""Colours from against to for, and from nothing to much."""


def png(pixels: Array, palette: Array | None = None) -> bytes:
    """A PNG file of 8-bit pixels: [H, W] gray (or places in ``palette``, [K, 3]), or [H, W, 3]."""
    height, width = pixels.shape[:2]
    kind = 3 if palette is not None else 2 if pixels.ndim == 3 else 0
    rows = np.ascontiguousarray(pixels, np.uint8).reshape(height, -1)
    if kind != 3:
        # Each row as its differences from the one above, which pack better.
        rows = rows - np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filters = np.full((height, 1), 0 if kind == 3 else 2, np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if palette is not None:
        chunks.append((b"PLTE", np.asarray(palette, np.uint8).tobytes()))
    packed = zlib.compress(np.hstack([filters, rows]).tobytes(), 9)
    chunks += [(b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def picture(pixels: Array, alt: str) -> str:
    """An <img> of pixels [H, W, 1 or 3] from 0 to 255."""
    shown = _smaller(np.clip(np.nan_to_num(pixels), 0, 255))
    flat = shown[..., 0] if shown.shape[-1] == 1 else shown[..., :3]
    return _img(png(flat.round().astype(np.uint8)), flat.shape, alt)


def heat_map(a: Array, signed: bool, alt: str) -> str:
    """An <img> of an attribution [H, W]: red for, blue against; the ends are :func:`plot.limit`."""
    a = _smaller(_clean(a)[..., None])[..., 0]
    end = limit(a)
    share = (a / end + 1) / 2 if signed else a / end
    places = np.rint(share.clip(0, 1) * 254).astype(np.uint8)
    return _img(png(places, _palette(DIVERGING if signed else SEQUENTIAL)), a.shape, alt)


def words(a: Array, names: Sequence[str]) -> str:
    """A text whose words are as red or blue as they speak for or against."""
    a = _clean(a)
    end = limit(a)
    found = []
    for value, name in zip(a, names, strict=True):
        share = min(abs(float(value)) / end, 1.0)
        kind = "for" if value >= 0 else "against"
        style = f' class="{kind}" style="--a:{share:.2f}"' if share >= 0.02 else ""
        found.append(f'<span{style} title="{number(float(value))}">{escape(name)}</span>')
    return f'<p class="words">{" ".join(found)}</p>'


def bars(a: Array, label: str) -> str:
    """An <svg> of a bar for each position or column, up for and down against; long ones binned."""
    a = _binned(_clean(a).reshape(-1))
    end = float(np.abs(a).max(initial=0.0)) or 1.0
    low = -1.0 if (a < 0).any() else 0.0
    height = 40 if low else 24
    zero = height / 2 if low else height
    parts = []
    for kind, values in (("for", a.clip(min=0)), ("against", a.clip(max=0))):
        if values.any():
            steps = (zero - values / end * (zero - 1)).tolist()
            path = "".join(f"V{y:.1f}h1" for y in steps)
            parts.append(f'<path class="{kind}" d="M0 {zero:g}{path}V{zero:g}z"/>')
    return (
        f'<svg class="bars" viewBox="0 0 {len(a)} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}" style="height:{height}px">'
        f'{"".join(parts)}<path class="zero" d="M0 {zero:g}H{len(a)}"/></svg>'
    )


def cell_bar(value: float, end: float) -> str:
    """A bar in a table cell: to the right of its middle for, to the left against."""
    share = max(-1.0, min(1.0, value / end)) if end else 0.0
    kind = "for" if share >= 0 else "against"
    return f'<span class="bar"><span class="{kind}" style="--a:{abs(share):.3f}"></span></span>'


def gradient(colours: Sequence[str]) -> str:
    """The colours as a CSS background from left to right."""
    return f"linear-gradient(to right,{','.join(colours)})"


# -- parts -----------------------------------------------------------------------------------------


def _clean(a: Array) -> Array:
    return np.nan_to_num(np.asarray(a, np.float64), posinf=0.0, neginf=0.0)


def _palette(colours: Sequence[str]) -> Array:
    """255 colours between the given ones."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], np.float64)
    at = np.linspace(0, len(anchors) - 1, 255)
    between = [np.interp(at, range(len(anchors)), anchors[:, k]) for k in range(3)]
    return np.stack(between, axis=1).round().astype(np.uint8)


def _smaller(pixels: Array) -> Array:
    """[H, W, C] averaged over squares until it fits the page."""
    factor = -(-max(pixels.shape[:2]) // LARGEST)
    if factor == 1:
        return np.asarray(pixels, np.float64)
    rows, columns = (np.arange(0, size, factor) for size in pixels.shape[:2])
    total = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, 0), columns, 1)
    ones = np.ones(pixels.shape[:2])
    count = np.add.reduceat(np.add.reduceat(ones, rows, 0), columns, 1)
    return total / count[..., None]


def _binned(a: Array) -> Array:
    """At most SPANS values: of each group the one that is largest in size."""
    if a.size <= SPANS:
        return a
    groups = np.array_split(a, SPANS)
    return np.array([group[np.abs(group).argmax()] for group in groups])


def _img(file: bytes, shape: Sequence[int], alt: str) -> str:
    source = base64.b64encode(file).decode()
    kind = "coarse" if max(shape[:2]) <= 128 else "fine"
    return (
        f'<img class="{kind}" width="{shape[1]}" height="{shape[0]}" alt="{escape(alt)}" '
        f'src="data:image/png;base64,{source}">'
    )


__all__ = [
    "DIVERGING",
    "SEQUENTIAL",
    "bars",
    "cell_bar",
    "gradient",
    "heat_map",
    "picture",
    "png",
    "words",
]
