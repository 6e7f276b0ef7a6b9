"""Files on the command line to a model's inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnx_attrib.cli.common import Numbers, as_usage_error, note, number_or_text
from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.feeds import Array, Port, fit, show_shape
from onnx_attrib.images import (
    PRESETS,
    Geometry,
    Layout,
    Scaling,
    default_scaling,
    geometry,
    is_array_file,
    load_arrays,
    load_picture,
)
from onnx_attrib.model_io import load
from onnx_attrib.recipe import Recipe
from onnx_attrib.runtime import Explainer
from onnx_attrib.session import onnxruntime, open_session, port_of


def _one(
    ctx: click.Context, param: click.Parameter, value: tuple[float, ...] | None
) -> float | None:
    if value is not None and len(value) != 1:
        raise click.UsageError("--scale is one number")
    return None if value is None else value[0]


_PIXELS = (
    click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        help="How pixels are scaled. [default: see below]",
    ),
    click.option("--mean", type=Numbers(), help="Subtracted after scaling; one, or one a channel."),
    click.option("--std", type=Numbers(), help="Divided by; one, or one a channel."),
    click.option(
        "--scale",
        type=Numbers(),
        callback=_one,
        metavar="NUMBER",
        help="Multiplies pixels, such as 1/255.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["auto", "nchw", "nhwc"]),
        default="auto",
        show_default=True,
        help="Where an image input has its channels.",
    ),
)


PIXELS = """
A pixel p from 0 to 255 becomes (p · scale − mean) / std. The default preset is what the model's
metadata says (Image.NominalPixelRange), else imagenet for colour and zero-one for gray inputs.
Arrays are fed as they are unless one of these options is given.
"""
"""What the help of a command with these options ends with."""


def pixel_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how pixels become a model's input."""
    for option in reversed(_PIXELS):
        command = option(command)
    return command


_SAMPLES = (
    click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="[NAME=]FILE",
        help="An image, .npy or .npz (arrays by input name); repeated: one for each input, or "
        "images of one batch.",
    ),
    click.option(
        "--labels",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Names of the classes: a line each, or a JSON list or object.",
    ),
    click.option(
        "--crop", is_flag=True, help="Cut images to the input's shape; else they stretch."
    ),
    *_PIXELS,
)


def sample_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name samples and classes, and say how pixels become a model's input."""
    for option in reversed(_SAMPLES):
        command = option(command)
    return command


@dataclass(frozen=True)
class Loaded:
    """One input's batch: ``pixels`` are the pictures it came from, [H, W, C] each, if it did."""

    value: Array
    files: tuple[str, ...]
    scaling: str | None = None
    form: Geometry | None = None
    pixels: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads files the way the command line asked for."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Layout | None = None
    preset: str | None = None
    changes: tuple[float | None, tuple[float, ...] | None, tuple[float, ...] | None] = (
        None,
        None,
        None,
    )
    crop: bool = False

    def inputs(self, ports: Sequence[Port], texts: Sequence[str]) -> dict[str, Loaded]:
        """Every input of the model from ``[NAME=]FILE`` texts."""
        if not texts:
            wanted = "; ".join(map(str, ports))
            raise click.UsageError(f"give the model's inputs with --input: {wanted}")
        by_name = {port.name: port for port in ports}
        parts: dict[str, list[Loaded]] = {}
        for text in texts:
            name, path = self.split(text, by_name)
            for key, item in self._read(name, path, by_name).items():
                parts.setdefault(key, []).append(item)
        return {name: joined(name, items) for name, items in parts.items()}

    def baselines(self, explain: Explainer, texts: Sequence[str]) -> Any:
        """A baseline for :class:`Explainer`: a number, or arrays by input name."""
        by_name = {port.name: port for port in explain.inputs if port.name in explain.baselines}
        if not texts or not by_name:
            # The explainer says what is wrong about a baseline too few or too many.
            return 0.0 if texts else None
        if len(texts) == 1:
            number = 0.0 if texts[0] == "zeros" else number_or_text(texts[0])
            if isinstance(number, float):
                return number
        found: dict[str, Any] = {}
        for text in texts:
            name, path = self.split(text, by_name)
            read = self._read(name, path, by_name)
            found.update({key: item.value for key, item in read.items()})
        return found

    def split(self, text: str, ports: Mapping[str, Port]) -> tuple[str | None, Path]:
        """Name and path of a ``[NAME=]FILE`` text."""
        name, separator, path = text.partition("=")
        if not separator or (name not in ports and Path(text).exists()):
            return None, Path(text)
        if name not in ports:
            raise OptionError(f"the model has no input '{name}': {suggest(name, list(ports))}")
        return name, Path(path)

    def _read(self, name: str | None, path: Path, ports: Mapping[str, Port]) -> dict[str, Loaded]:
        if not path.exists():
            raise OptionError(f"cannot read '{path}': No such file or directory")
        arrays: Any = load_arrays(path) if is_array_file(path) else None
        if isinstance(arrays, dict) and name is None:
            known = {key: array for key, array in arrays.items() if key in ports}
            if known:
                return {key: self.array(ports[key], known[key], path) for key in known}
        if name is None:
            if len(ports) != 1:
                raise OptionError(
                    f"the model has {len(ports)} inputs ({', '.join(ports)}): say which one "
                    f"'{path}' is (NAME={path.name})"
                )
            name = next(iter(ports))
        port = ports[name]
        if arrays is None:
            return {name: self.picture(port, path)}
        if isinstance(arrays, dict) and name in arrays:
            arrays = arrays[name]
        return {name: self.array(port, single(path, arrays, name), path)}

    def picture(self, port: Port, path: Path) -> Loaded:
        """An input's sample from an image file."""
        form = geometry(port.shape, self.layout)
        channels = 3 if form is None else form.channels
        scaling = self._scaling(default_scaling(port, self.metadata, channels))
        read = load_picture(path, port, self.layout, scaling, crop=self.crop)
        return Loaded(read.value, (str(path),), str(scaling), read.geometry, (read.pixels,))

    def array(self, port: Port, array: Array, path: Path) -> Loaded:
        """An input's batch from an array, scaled if the command line asks for it."""
        form = geometry(port.shape, self.layout) if len(port.shape) == 4 else None
        scaling = None
        if self.preset is not None or any(change is not None for change in self.changes):
            scaling = self._scaling(PRESETS["raw"])
            form = form or geometry(port.shape, self.layout)
            array = fit(Port(port.name, np.dtype(np.float64), port.shape), array)
            if form is not None:
                # The channels last, as in a picture, and back.
                scaled = scaling(form.pictures(array))
                array = np.concatenate([form.place(picture) for picture in scaled])
            else:
                array = scaling(array[..., None])[..., 0]
        elif array.dtype == np.uint8 and port.dtype is not None and port.dtype.kind == "f":
            note(f"'{path}' holds bytes, fed as they are; --preset scales them like pixels")
        return Loaded(
            fit(port, array), (str(path),), None if scaling is None else str(scaling), form
        )

    def _scaling(self, default: Scaling) -> Scaling:
        chosen = default if self.preset is None else PRESETS[self.preset]
        return chosen.override(*self.changes)


def joined(name: str, items: Sequence[Loaded]) -> Loaded:
    """One batch of what several files hold; OptionError if they differ in shape."""
    if len(items) == 1:
        return items[0]
    shapes = {item.value.shape[1:] for item in items}
    if len(shapes) > 1:
        shown = ", ".join(show_shape(shape) for shape in sorted(shapes))
        raise OptionError(f"the files for '{name}' differ in shape ({shown}): no batch of them")
    return Loaded(
        np.concatenate([item.value for item in items]),
        tuple(file for item in items for file in item.files),
        items[0].scaling,
        items[0].form,
        tuple(p for item in items for p in item.pixels) if all(i.pixels for i in items) else (),
    )


def single(path: Path, arrays: Any, name: str = "") -> Array:
    """The one array of a .npy or .npz file; OptionError if there are several."""
    if not isinstance(arrays, dict):
        return np.asarray(arrays)
    if len(arrays) == 1:
        return np.asarray(next(iter(arrays.values())))
    held = ", ".join(arrays) or "no array"
    raise OptionError(
        f"'{path}' holds {held}" + (f"; none of them is called '{name}'" if name else ": want one")
    )


def read_labels(path: Path) -> dict[int, str]:
    """Class names: a line each, a JSON list, or a JSON object {"0": "name", …}."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot read '{path}': {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise OptionError(f"'{path}' is not a text file of labels") from None
    if not text.lstrip().startswith(("[", "{")):
        return {i: line.strip() for i, line in enumerate(text.splitlines()) if line.strip()}
    try:
        held = json.loads(text)
        pairs = held.items() if isinstance(held, dict) else enumerate(held)
        # {"0": ["n01440764", "tench"]} is how ImageNet's names are often kept.
        return {int(k): str(v[-1] if isinstance(v, list) and v else v) for k, v in pairs}
    except (ValueError, TypeError) as error:
        raise OptionError(f"'{path}' does not hold labels: {error}") from None


def inputs_of(model: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Arrays for the inputs of a model, compiled or not, from ``[NAME=]FILE`` texts."""
    proto, _ = load(model)
    weights = {tensor.name for tensor in proto.graph.initializer}
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    recipe = Recipe.read(metadata)
    session = open_session(onnxruntime(), proto, ["CPUExecutionProvider"], f"'{model}'")
    ports = [port for port in map(port_of, session.get_inputs()) if port.name not in weights]
    if recipe is not None:
        ports = [port for port in ports if not _added(port, recipe, ports)]
    loaded = Reader(metadata=metadata).inputs(ports, texts)
    return {name: item.value for name, item in loaded.items()}


def _added(port: Port, recipe: Recipe, ports: Sequence[Port]) -> bool:
    """Whether an input is the compiler's: a target, a seed, or a baseline."""
    if port.name == recipe.target and port.name in ("seed",):
        return True
    if port.name == "target" and recipe.target == "input" and recipe.targets is None:
        return True
    names = {f"{other.name}_baseline" for other in ports}
    return recipe.baseline == "input" and port.name in names


def baseline_of(text: str) -> Any:
    """A number, an array, arrays by name, or the text itself."""
    value = number_or_text(text)
    if isinstance(value, str) and is_array_file(Path(value)):
        return load_arrays(Path(value))
    return value


def sizes_of(texts: Sequence[str]) -> dict[str, int]:
    """Sizes of open dimensions from NAME=SIZE texts."""
    found = {}
    with as_usage_error():
        for text in texts:
            name, _, size = text.rpartition("=")
            if not name or not size.isdecimal() or int(size) < 1:
                raise OptionError(f"'{text}' is not of the form NAME=SIZE")
            found[name] = int(size)
    return found
