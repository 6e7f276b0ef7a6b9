"""The page of an evaluation: what is on it, and that it needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_attrib.evaluation import charts, pictures
from onnx_attrib.evaluation.charts import Line, line_chart, nice, number, thinned
from onnx_attrib.evaluation.report import Exhibit, render
from onnx_attrib.evaluation.tables import decimal

from .made_up_evaluation import METHODS, made_up

VOID = {"meta", "link", "img", "br"}
RNG = np.random.default_rng(0)


class Page(HTMLParser):
    """Elements with their attributes, texts by element; every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        wanted = {key.rstrip("_"): value for key, value in wanted.items()}
        return [a for name, a in self.found if name == tag and wanted.items() <= a.items()]

    @property
    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))


def gallery() -> list[Exhibit]:
    pixels = RNG.integers(0, 256, (28, 28, 1), dtype=np.uint8)
    maps = {label: RNG.normal(size=(28, 28)) for label in METHODS}
    maps["saliency"] = abs(maps["saliency"])
    words = ["not", "<bad>", "&", "good"]
    return [
        Exhibit(maps, pixels=pixels),
        Exhibit({label: RNG.normal(size=4) for label in METHODS}, names=words),
    ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(made_up(), gallery()))


def test_has_all_sections(page: Page) -> None:
    ids = [a["id"] for a in page.all("section")]
    assert ids == "ranking curves sensitivity fidelity agreement sanity gallery".split()
    every = [a["id"] for _, a in page.found if "id" in a]
    assert len(every) == len(set(every))
    assert len(page.all("svg", class_="chart")) == 5


def test_names_are_escaped(page: Page) -> None:
    for text in ("mo<d>el.onnx", "<b>plain</b> & co", "<data>.npz", "<7>.png", "<bad>"):
        assert text in page.text
    assert "Ranked by the gap: it is <simple>." in page.text
    assert not {tag for tag, _ in page.found} & {"d", "data", "bad", "simple"}


def test_needs_nothing_else() -> None:
    text = render(made_up(), gallery())
    own = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|url\(", own)
    page = Page(text)
    for tag, attributes in page.found:
        for name in ("src", "href", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, value)
    assert page.all("meta", charset="utf-8")
    assert page.all("meta", name="viewport")


def test_numbers_of_the_results_are_there(page: Page) -> None:
    results = made_up()
    for row in results["ranking"]:
        for key in ("gap", "morf", "lerf", "slope"):
            value = row[key]
            assert number(value["mean"], full=True) in page.text
            assert f"[{number(value['low'], full=True)}, {number(value['high'], full=True)}]" in (
                page.text
            )
    for text in ("3.21·10⁻⁵", "1.25", "2.34", "4.68", "97.5 %", "−1", "100 samples"):
        assert text in page.text
    assert "explained: class 3, score 12.25, label 5 <five>" in page.text
    cells = [a["data-v"] for a in page.all("td") if "data-v" in a]
    assert repr(results["ranking"][1]["gap"]["mean"]) in cells


def test_says_which_is_best_and_what_is_uncertain(page: Page) -> None:
    assert "By the gap" in page.text
    text = " ".join(text for _, text in page.texts)
    assert "deeplift explains this model best" in text
    assert "overlaps" not in text
    results = made_up()
    first, second = results["ranking"][:2]
    second["gap"]["high"] = first["gap"]["low"] + 0.01
    text = Page(render(results)).text
    assert "overlaps that of integrated-gradients: the order" in text


def test_is_accessible(page: Page) -> None:
    assert page.all("html", lang="en")
    for image in page.all("img"):
        assert len(image["alt"]) > 5
    titles = {a["id"] for a in page.all("title") if "id" in a}
    for svg in page.all("svg"):
        named = svg.get("aria-label") or svg.get("aria-labelledby") in titles
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and named)
    for scroll in page.all("div", class_="scroll"):
        assert scroll.get("aria-label") or "tabindex" not in scroll
    headings = [tag for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_maps_are_pictures(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 1 + len(METHODS)
    for image in images:
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert opened.size == (28, 28)
            opened.load()


def test_legends_point_to_their_lines() -> None:
    results = made_up()
    for k, part in enumerate(results["methods"].values()):
        part["sanity"]["rank"] = [0.5, 0.1 * k]
    text = render(results)
    figures = re.findall(r'<figure class="plot">.*?</figure>', text, re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        drawn = dict(re.findall(r'<g class="(\w+)" data-line="(\d)">', figure))
        named = dict(re.findall(r'<li data-line="(\d)"><svg class="swatch (\w+)"', figure))
        assert len(named) >= len(METHODS)
        assert named == {place: look for look, place in drawn.items()}
    orders = [re.findall(r'<li data-line="(\d)">', figure) for figure in figures]
    assert any(order != sorted(order) for order in orders)


def test_padding_is_left_out() -> None:
    words = ["(padding)"] * 9 + ["good", "film"]
    a = np.arange(11.0)
    page = Page(render(made_up(), [Exhibit({"deeplift": a}, names=words)]))
    assert "9 × (padding) left out." in page.text
    shown = [text for tag, text in page.texts if text in words]
    assert shown == ["good", "film"]


@pytest.mark.parametrize("missing", ["sanity", "completeness", "infidelity", "max_sensitivity"])
def test_what_was_not_measured_is_left_out(missing: str) -> None:
    results = made_up()
    for part in results["methods"].values():
        part[missing] = None
    page = Page(render(results))
    assert ("sanity" in [a["id"] for a in page.all("section")]) == (missing != "sanity")
    heads = {"completeness": "Completeness", "infidelity": "Infidelity", "sanity": "Randomisation"}
    assert heads.get(missing, "Max-sensitivity") not in page.text
    assert "Time" in page.text
    assert not page.all("section", id="gallery")


def test_barely_any_results() -> None:
    results = made_up({"deeplift": METHODS["deeplift"]})
    part = results["methods"]["deeplift"]
    for key in ("sensitivity", "completeness", "infidelity", "max_sensitivity", "sanity"):
        part[key] = None
    part["curves"]["morf"]["mean"] = [None] * len(part["curves"]["morf"]["removed"])
    part["curves"]["morf"] |= {"low": None, "high": None, "area": None}
    results["control"], results["agreement"], results["ranking"] = {}, {}, []
    results["gallery"], results["data"]["accuracy"] = [], None
    page = Page(render(results))
    assert [a["id"] for a in page.all("section")] == ["curves", "fidelity"]
    assert "There is nothing to draw." in page.text


@pytest.mark.parametrize("count", [1, 9, 17])
def test_many_methods_differ_in_looks(count: int) -> None:
    methods = {f"method {k}": ("deeplift", {}) for k in range(count)}
    page = Page(render(made_up(methods)))
    looks = {(k % charts.COLOURS, k % len(charts.DASHES)) for k in range(count)}
    assert len(looks) == count
    assert len(page.all("tr")) > 2 * count


@pytest.mark.parametrize(
    ("exhibit", "expected"),
    [
        (Exhibit({"deeplift": RNG.normal(size=300)}), "bars"),
        (Exhibit({"deeplift": RNG.normal(size=(3, 4, 5))}), "bars"),
        (Exhibit({"deeplift": RNG.normal(size=5)}, values=RNG.normal(size=5)), "features"),
        (Exhibit({"deeplift": RNG.normal(size=5)}), "features"),
        (Exhibit({"deeplift": RNG.normal(size=5)}, names=list("abcde")), "words"),
        (Exhibit({"deeplift": np.full(5, np.nan)}, names=list("abcde")), "words"),
        (Exhibit({"deeplift": np.zeros((4, 4))}), "coarse"),
        (Exhibit({"deeplift": np.ones((700, 900))}, pixels=np.ones((700, 900, 3))), "fine"),
    ],
)
def test_kinds_of_samples(exhibit: Exhibit, expected: str) -> None:
    page = Page(render(made_up(), [exhibit]))
    classes = {a.get("class") for _, a in page.found}
    assert expected in classes
    for image in page.all("img"):
        assert int(image["width"]) <= pictures.LARGEST


# -- charts ----------------------------------------------------------------------------------------


def test_thinning_keeps_the_line() -> None:
    x = np.linspace(0, 400, 1001)
    points = list(zip(x, 50 * np.sin(x / 30) + RNG.normal(size=x.size) * 0.05, strict=True))
    kept = thinned(points, 0.2)
    assert 10 < len(kept) < 300
    again = np.interp(x, *np.array(kept).T)
    assert abs(again - np.array(points)[:, 1]).max() < 0.5
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert thinned([(0, 0), (1, 0.1), (2, 0)]) == [(0, 0), (2, 0)]
    assert thinned([]) == []


@pytest.mark.parametrize(("low", "high"), [(-12.3, 0), (0, 1), (0.01, 0.03), (-1e6, 4e7), (3, 3)])
def test_ticks_are_round(low: float, high: float) -> None:
    ticks = nice(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)
    assert all(len(number(tick)) < 9 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (-1.5, "−1.5"), (12, "12"), (1e-7, "1·10⁻⁷"), (None, "–"), (float("nan"), "–")],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_full_numbers() -> None:
    assert [number(v, full=True) for v in (12, 0.9, 1e-7)] == ["12.0", "0.900", "1.00·10⁻⁷"]
    assert [number(v, full=True) for v in (123.4, 1273.4, -2e7)] == ["123", "1273", "−2.00·10⁷"]
    assert [decimal(v) for v in (0.123, -0.5, -0.001, 0)] == ["0.12", "−0.50", "0.00", "0.00"]


def test_readings_are_the_values() -> None:
    lines = [Line("a", 0, [0, 1, 2], [0.0, None, 4.0]), Line("b", None, [0, 1, 2], [1.0, 2.0, 3.0])]
    chart = line_chart(lines, name="c", title="t", x_label="x", y_label="y")
    readings = json.loads(Page(chart).all("svg")[0]["data-readings"])
    assert [r[1:] for r in readings] == [
        ["0", ["0", "1.00"]],
        ["1", ["", "2.00"]],
        ["2", ["4.00", "3.00"]],
    ]
    places = [r[0] for r in readings]
    assert places == sorted(places)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_names_touch_no_line(count: int, rng: np.random.Generator) -> None:
    x = np.linspace(0, 1, 60)
    lines = [
        Line(f"line {k}", k, list(x), list(a * x**b + c))
        for k, (a, b, c) in enumerate(rng.uniform([-9, 0.2, -3], [9, 3, 3], (count, 3)))
    ]
    chart = line_chart(lines, name="c", title="t", x_label="x", y_label="y")
    boxes = []
    found = re.findall(r'class="name[^"]*" x="([\d.]+)" y="([\d.]+)">([^<]+)', chart)
    for at, base, name in found:
        half = charts.CHARACTER * len(name) / 2
        boxes.append((float(at) - half, float(base) - 10, float(at) + half, float(base) + 1))
    assert boxes
    drawn = []
    for path in re.findall(r'class="line" d="M([^"]+)"', chart):
        points = np.array([p.split() for p in path.split("L")], float)
        dense = np.linspace(points[0, 0], points[-1, 0], 2000)
        drawn.append((dense, np.interp(dense, *points.T)))
    assert len(drawn) == count
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        assert x0 > 0
        assert x1 < charts.WIDTH
        for across, down in drawn:
            assert not ((across > x0) & (across < x1) & (down > y0) & (down < y1)).any()
        for a0, b0, a1, b1 in boxes[:k]:
            assert a1 <= x0 or x1 <= a0 or b1 <= y0 or y1 <= b0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_differ_without_red_or_green(scheme: str) -> None:
    """Machado et al. 2009, Table 1, severity 1."""
    kinds = [
        np.eye(3),
        np.array(
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ]
        ),
        np.array(
            [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ]
        ),
    ]
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    style = (resources.files("onnx_attrib") / "data" / "report.css").read_text(encoding="utf-8")
    roots = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme == "dark"]
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", roots))
    colours = [named[f"s{k}"] for k in range(charts.COLOURS)]

    def linear(colour: str) -> np.ndarray:
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)

    def lab(rgb: np.ndarray) -> np.ndarray:
        xyz = to_xyz @ rgb.clip(0, 1) / to_xyz.sum(axis=1)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for kind in kinds:
        seen = [lab(kind @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 28
    light = [float(to_xyz[1] @ linear(colour)) for colour in [named["page"], *colours]]
    for value in light[1:]:
        high, low = max(value, light[0]), min(value, light[0])
        assert (high + 0.05) / (low + 0.05) > 3


def test_bands_and_dashes() -> None:
    lines = [Line(str(k), k, [0, 1], [k, k], [k - 1, k - 1], [k + 1, k + 1]) for k in range(3)]
    chart = line_chart(lines, name="c", title="t", x_label="x", y_label="y")
    assert chart.count('class="band') == 3
    dashes = re.findall(r'class="line" d="[^"]*"( stroke-dasharray="[^"]*")?', chart)
    assert len(set(dashes)) == 3


# -- pictures --------------------------------------------------------------------------------------


def opened(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 300), (7, 5, 3)])
def test_png(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(opened(pictures.png(pixels)), pixels)
    if len(shape) == 2:
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        np.testing.assert_array_equal(opened(pictures.png(pixels, palette)), palette[pixels])


def test_red_is_for_and_blue_against() -> None:
    def colours(a: list[float], signed: bool) -> list[list[int]]:
        source = re.search(r"base64,([^\"]+)", pictures.heat_map(np.array([a]), signed, "alt"))
        assert source
        return opened(base64.b64decode(source[1]))[0].tolist()

    against, none, above = colours([-1, 0, 1], True)
    assert above[0] > above[2] + 80
    assert against[2] > against[0] + 80
    assert min(none) > 230
    none, above = colours([0, 1], False)
    assert min(none) > 230
    assert above[0] > above[2] + 80


def test_large_pictures_are_averaged(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (641, 400, 3)).astype(np.float64)
    image = Page(pictures.picture(pixels, "alt")).all("img")[0]
    shown = opened(base64.b64decode(image["src"].split(",")[1]))
    assert shown.shape == (214, 134, 3)
    np.testing.assert_allclose(shown[5, 7], pixels[15:18, 21:24].mean((0, 1)), atol=0.51)
    np.testing.assert_allclose(shown[-1, -1], pixels[639:, 399:].mean((0, 1)), atol=0.51)


def test_long_bars_keep_what_is_largest() -> None:
    a = np.zeros(5000)
    a[[123, 4000]] = 5, -5
    drawn = pictures.bars(a, "label")
    assert 'class="for"' in drawn
    assert 'class="against"' in drawn
    assert f'viewBox="0 0 {pictures.SPANS} ' in drawn
