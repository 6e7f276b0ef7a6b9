"""Pictures: what is drawn for which kind of input, and in which colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_attrib import plot
from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.feeds import Port
from onnx_attrib.images import PRESETS, Scaling, geometry, load_picture, read_pixels
from onnx_attrib.plot import Panel, as_pixels, draw, limit, panel_of, save
from onnx_attrib.plot_lines import draw_lines

RNG = np.random.default_rng(0)


def port(*shape: int | str | None, dtype: str = "float32") -> Port:
    return Port("x", np.dtype(dtype), shape)


# -- what is drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "kind", "drawn"),
    [
        ((3, 8, 9), {}, "image", (8, 9)),
        ((8, 9, 3), {"channels_last": True}, "image", (8, 9)),
        ((2, 5, 8, 9), {}, "image", (8, 9)),
        ((4, 200), {}, "signal", (200,)),
        ((200, 4), {}, "signal", (200,)),
        ((20, 30), {}, "image", (20, 30)),
        ((12, 64), {"inner": True}, "bars", (12,)),
        ((100, 64), {"inner": True}, "signal", (100,)),
        ((13,), {}, "bars", (13,)),
        ((784,), {}, "signal", (784,)),
        ((), {}, "bars", (1,)),
    ],
)
def test_kinds(shape: Any, options: Any, kind: str, drawn: Any, tmp_path: Path) -> None:
    a = RNG.normal(size=shape)
    panel = panel_of(a, RNG.normal(size=shape), title="class 1", source="x.npy", **options)
    assert panel.kind == kind
    assert panel.attribution.shape == drawn
    for signed in (True, False):
        save(draw([panel], "method", signed), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_channels_are_summed() -> None:
    a = RNG.normal(size=(3, 8, 9))
    np.testing.assert_allclose(panel_of(a).attribution, a.sum(axis=0))
    np.testing.assert_allclose(panel_of(a[0, :4]).attribution, a[0, :4].sum(axis=0))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
def test_grids(count: int, tmp_path: Path) -> None:
    panels = [
        panel_of(RNG.normal(size=(1, 6, 6)), pixels=np.zeros((6, 6, 1))) for _ in range(count)
    ]
    figure = draw(panels)
    hearts = [ax for part in figure.subfigs for ax in part.axes if ax.images]
    assert len(hearts) == 2 * min(count, plot.MOST)
    save(figure, tmp_path / "grid.png")


def image_lines(count: int, methods: int, shown: bool = True) -> list[list[Panel]]:
    pixels = np.zeros((6, 6, 1)) if shown else None
    return [
        [
            panel_of(RNG.normal(size=(1, 6, 6)), pixels=pixels, title=f"class {i}", source=f"x{i}")
            for _ in range(methods)
        ]
        for i in range(count)
    ]


def drawn_axes(figure: Any) -> list[Any]:
    return [ax for ax in figure.axes if ax.axison and ax.images]


@pytest.mark.parametrize("count", [1, 3, 11])
def test_lines_of_several_methods(count: int, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    figure = draw_lines(image_lines(count, 3), names, "all", [True, False, True])
    rows = min(count, plot.MOST)
    titles = [ax.get_title() for ax in drawn_axes(figure)]
    # The input stands at the beginning of the line only.
    expected = [[f"x{i}\nclass {i}", *names] for i in range(rows)]
    assert titles == [title for line in expected for title in line]
    _, *maps = drawn_axes(figure)[:4]
    assert [ax.images[-1].get_clim()[0] < 0 for ax in maps] == [True, False, True]
    save(figure, tmp_path / "lines.png")
    sizes = {tuple(np.round(ax.get_position().size, 4)) for ax in drawn_axes(figure)}
    assert len(sizes) == 1, "maps and inputs are of one size"
    bars = [ax for ax in figure.axes if ax not in drawn_axes(figure) and ax.axison]
    assert len([child for ax in maps for child in ax.child_axes]) == 3
    assert not bars


def test_lines_of_many_methods_are_broken(tmp_path: Path) -> None:
    names = [f"method {k}" for k in range(9)]
    figure = draw_lines(image_lines(2, 9), names)
    maps = [ax for ax in drawn_axes(figure) if ax.get_title() in names]
    assert [ax.get_title() for ax in maps] == names * 2
    save(figure, tmp_path / "lines.png")
    assert len({round(ax.get_position().y0, 3) for ax in maps}) == 4
    without = draw_lines(image_lines(1, 2, shown=False), names[:2])
    assert [ax.get_title() for ax in drawn_axes(without)] == ["x0\nclass 0\nmethod 0", "method 1"]


@pytest.mark.parametrize("shape", [(4, 60), (1, 900), (5,)])
@pytest.mark.parametrize("methods", [2, 9])
def test_lines_of_signals_and_features(
    shape: tuple[int, ...], methods: int, tmp_path: Path
) -> None:
    a = RNG.normal(size=shape)
    names = [f"method {k}" for k in range(methods)]
    line = [panel_of(a, a, title="class 1", source="x") for _ in names]
    figure = draw_lines([line, line], names)
    save(figure, tmp_path / "lines.pdf")
    assert len(figure.subfigs) == 2
    for part in figure.subfigs:
        told = [ax.get_title(loc="left") for ax in part.axes] + [str(part.get_suptitle())]
        assert "x: class 1" in told
        shown = [ax.get_title() or ax.get_ylabel() for ax in part.axes if ax.axison]
        assert [text for text in shown if text in names] == names
        spans = {ax.get_xlim() for ax in part.axes if ax.axison}
        # Positions lie below each other.
        assert len(shape) == 1 or len(spans) == 1


def test_colours_are_symmetric_and_robust() -> None:
    a = RNG.normal(size=(1, 50, 50))
    a[0, 0, 0] = 1000
    assert limit(a) < 5
    image = draw([panel_of(a)]).subfigs[0].axes[0].images[0]
    low, high = image.get_clim()
    assert low == -high == -limit(a)
    red, _, blue, _ = image.to_rgba(np.array([high]))[0]
    assert red > blue
    red, _, blue, _ = image.to_rgba(np.array([low]))[0]
    assert blue > red
    assert draw([panel_of(abs(a))], signed=False).subfigs[0].axes[0].images[0].get_clim()[0] == 0


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_degenerate_values(value: float, tmp_path: Path) -> None:
    a = np.full((1, 8, 8), value)
    for sample in (a, a[0, 0], a[0, :4]):
        save(draw([panel_of(sample, sample)]), tmp_path / "flat.png")


def test_sizes_differ(tmp_path: Path) -> None:
    # A coarse layer over a large picture, with text that could be taken for a formula.
    panel = panel_of(
        RNG.normal(size=(16, 7, 7)),
        pixels=np.zeros((224, 224, 3), np.uint8),
        title="a $x_1",
        inner=True,
    )
    save(draw([panel], "h $y"), tmp_path / "coarse.svg")


def test_labels(tmp_path: Path) -> None:
    panel = Panel("bars", np.array([1.0, -2]), np.array([3.0, 4]), labels=["age", "height"])
    axes = draw([panel]).subfigs[0].axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["age = 3", "height = 4"]


def test_pixels_of_values() -> None:
    pixels = as_pixels(np.array([[[-1.0], [1.0]]]))
    assert pixels.tolist() == [[[0], [255]]]
    assert as_pixels(np.full((2, 2, 5), np.nan)).shape == (2, 2, 1)


def test_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot draw a"):
        save(draw([panel_of(np.ones(3))]), tmp_path / "x.xyz")


# -- pictures to inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        (("N", 3, 224, 200), None, ("nchw", 224, 200, 3, False)),
        (("N", 224, 200, 3), None, ("nhwc", 224, 200, 3, False)),
        (("N", None, None, 1), None, ("nhwc", None, None, 1, False)),
        (("N", None, None, None), None, ("nchw", None, None, 3, False)),
        (("N", 3, 3, 3), None, ("nchw", 3, 3, 3, False)),
        (("N", 3, 3, 3), "nhwc", ("nhwc", 3, 3, 3, False)),
        (("N", 28, 20), None, ("nchw", 28, 20, 1, False)),
        ((3, 28, 20), None, ("nchw", 28, 20, 3, False)),
        ((28, 20, 3), None, ("nhwc", 28, 20, 3, False)),
        (("N", 784), None, ("nchw", 28, 28, 1, True)),
        (("N", 3072), None, ("nchw", 32, 32, 3, True)),
    ],
)
def test_geometry(shape: Any, layout: Any, expected: Any) -> None:
    form = geometry(shape, layout)
    assert form is not None
    assert (form.layout, form.height, form.width, form.channels, form.flat) == expected
    pixels = RNG.integers(0, 255, (form.height or 7, form.width or 9, form.channels))
    placed = form.place(pixels)
    assert placed.ndim == len(shape)
    np.testing.assert_array_equal(form.pictures(placed), pixels[None])


def test_no_picture(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    assert geometry(("N", 13)) is None
    with pytest.raises(OptionError, match="does not look like a picture"):
        load_picture(tmp_path / "p.png", port("N", 13))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes(mode: str, tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 64).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray((gray * 257).astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray(gray.astype({"I": np.int32, "F": np.float32}[mode]))
    else:
        image = Image.fromarray(gray.astype(np.uint8)).convert(mode)
    image.save(tmp_path / "p.tif")
    for channels in (1, 3, 4):
        pixels = read_pixels(tmp_path / "p.tif", channels)
        assert pixels.shape == (8, 8, channels)
        assert pixels[0, 0, 0] < 10
        assert pixels[-1, -1, 0] > 245


def test_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "p.png")
    assert (read_pixels(tmp_path / "p.png") == 255).all()


def test_right_way_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.jpg", exif=exif)
    assert read_pixels(tmp_path / "p.jpg").shape == (8, 4, 3)


def test_crop_keeps_the_aspect(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "p.png")
    assert read_pixels(tmp_path / "p.png", 1, 10, 10, crop=True).min() == 255
    assert read_pixels(tmp_path / "p.png", 1, 10, 10).min() == 0


@pytest.mark.parametrize(
    ("form", "metadata", "expected"),
    [
        (port("N", 3, 4, 4), {}, "imagenet"),
        (port("N", 1, 4, 4), {}, "zero-one"),
        (port("N", 3, 4, 4, dtype="uint8"), {}, "raw"),
        (port("N", 1, 4, 4), {"Image.NominalPixelRange": "Normalized_1_1"}, "minus-one-one"),
        (port("N", 3, 4, 4), {"Image.NominalPixelRange": "NominalRange_0_255"}, "raw"),
    ],
)
def test_default_scaling(form: Port, metadata: Any, expected: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 128, 0)).save(tmp_path / "p.png")
    picture = load_picture(tmp_path / "p.png", form, metadata=metadata)
    assert str(picture.scaling) == expected
    assert picture.value.dtype == form.dtype


def test_scaling() -> None:
    pixels = np.array([[[0, 128, 255]]])
    np.testing.assert_allclose(PRESETS["minus-one-one"](pixels)[0, 0, [0, 2]], [-1, 1])
    np.testing.assert_allclose(PRESETS["zero-one"](pixels)[0, 0, [0, 2]], [0, 1])
    np.testing.assert_allclose(PRESETS["imagenet"](pixels)[0, 0, 0], -0.485 / 0.229)
    changed = PRESETS["imagenet"].override(None, (0.5,), None)
    assert (changed.mean, changed.std, changed.name) == ((0.5,), (0.229, 0.224, 0.225), "")
    with pytest.raises(OptionError, match="std must not be zero"):
        Scaling(std=(0.0,))(pixels)
    with pytest.raises(OptionError, match="mean has 2 values"):
        Scaling(mean=(1, 2))(pixels)
