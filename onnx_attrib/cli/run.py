"""``onnx-attrib run``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from onnx_attrib import plot
from onnx_attrib.catalog import describe
from onnx_attrib.cli.common import (
    Numbers,
    TargetType,
    json_option,
    note,
    number_or_text,
    print_json,
    progress,
    rows,
    write_whole,
)
from onnx_attrib.errors import CompileError, OptionError, suggest
from onnx_attrib.images import (
    PRESETS,
    Array,
    Geometry,
    Layout,
    Scaling,
    default_scaling,
    geometry,
    is_array_file,
    load_arrays,
    load_picture,
)
from onnx_attrib.methods import METHODS
from onnx_attrib.runtime import Explainer, Explanation, Port, fit, show_shape

_LINES = 10
"""Samples printed one by one."""


@click.command(
    "run",
    epilog="""\b
Examples:
  onnx-attrib run cnn.deeplift.onnx --input digit.png --plot explained.png
  onnx-attrib run net.gradient.onnx --input photo.jpg --preset imagenet --labels names.txt
  onnx-attrib run bert.gradient.onnx --input batch.npz --target 1 -o out.npz

A pixel p from 0 to 255 becomes (p · scale − mean) / std. The default preset is what the model's
metadata says (Image.NominalPixelRange), else imagenet for colour and zero-one for gray inputs.
Arrays are fed as they are unless one of these options is given.
""",
)
@click.argument("compiled", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]FILE",
    help="An image, .npy or .npz (arrays by input name); repeated: one for each input, or images "
    "of one batch.",
)
@click.option("--target", type=TargetType(), help="Class to explain. [default: the predicted one]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NUMBER|[NAME=]FILE",
    help="The reference, for models compiled with --baseline input.",
)
@click.option(
    "--seed", metavar="FILE", help="Weights .npy, for models compiled with --target seed."
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the classes: a line each, or a JSON list or object.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all arrays (.npz)."
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw input and attribution (.png, .pdf, .svg): red for, blue against.",
)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help="How pixels are scaled. [default: see below]"
)
@click.option("--mean", type=Numbers(), help="Subtracted after scaling; one, or one a channel.")
@click.option("--std", type=Numbers(), help="Divided by; one, or one a channel.")
@click.option("--scale", type=Numbers(), metavar="NUMBER", help="Multiplies pixels, such as 1/255.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "nchw", "nhwc"]),
    default="auto",
    show_default=True,
    help="Where an image input has its channels.",
)
@click.option("--crop", is_flag=True, help="Cut images to the input's shape; else they stretch.")
@json_option
def run_command(
    compiled: Path,
    inputs: tuple[str, ...],
    target: int | tuple[int, ...] | None,
    baselines: tuple[str, ...],
    seed: str | None,
    labels: Path | None,
    out: Path | None,
    picture: Path | None,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    scale: tuple[float, ...] | None,
    layout: Literal["auto", "nchw", "nhwc"],
    crop: bool,
    as_json: bool,
) -> None:
    """Run a COMPILED model on files: print the prediction, write and draw the attribution."""
    if out is not None and out.suffix.lower() != ".npz":
        raise click.UsageError(f"-o writes .npz files, not '{out.name}'")
    if scale is not None and len(scale) != 1:
        raise click.UsageError("--scale is one number")
    if picture is not None:
        plot.require()
    names = read_labels(labels) if labels else {}
    with progress(f"loading {compiled.name}"):
        explain = Explainer(compiled)
    reader = Reader(
        metadata=explain.metadata,
        layout=None if layout == "auto" else layout,
        preset=preset,
        changes=(scale[0] if scale else None, mean, std),
        crop=crop,
    )
    loaded = reader.inputs(explain.inputs, inputs)
    reference = reader.baselines(explain, baselines)
    weights = None if seed is None else _single(Path(seed), load_arrays(Path(seed)))
    with progress("running"):
        result = explain(
            {name: item.value for name, item in loaded.items()},
            target=target,
            baseline=reference,
            seed=weights,
        )
    report = Report(explain, result, loaded, names)
    if out is not None:
        write_whole(out, lambda path: _write_arrays(path, result))
    if picture is not None:
        figure = report.figure()
        write_whole(picture, lambda path: plot.save(figure, path))
    written = [str(path) for path in (out, picture) if path is not None]
    if as_json:
        print_json({"model": str(compiled), **report.to_dict(), "files": written})
    else:
        click.echo("\n".join([report.text(), *(f"Wrote {path}" for path in written)]))
    for warning in report.warnings():
        note(warning)


# -- files to inputs -------------------------------------------------------------------------------


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
            name, path = self._split(text, by_name)
            for key, item in self._read(name, path, by_name).items():
                parts.setdefault(key, []).append(item)
        return {name: _joined(name, items) for name, items in parts.items()}

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
            name, path = self._split(text, by_name)
            read = self._read(name, path, by_name)
            found.update({key: item.value for key, item in read.items()})
        return found

    def _split(self, text: str, ports: Mapping[str, Port]) -> tuple[str | None, Path]:
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
                return {key: self._array(ports[key], known[key], path) for key in known}
        if name is None:
            if len(ports) != 1:
                raise OptionError(
                    f"the model has {len(ports)} inputs ({', '.join(ports)}): say which one "
                    f"'{path}' is (NAME={path.name})"
                )
            name = next(iter(ports))
        port = ports[name]
        if arrays is None:
            return {name: self._picture(port, path)}
        if isinstance(arrays, dict) and name in arrays:
            arrays = arrays[name]
        return {name: self._array(port, _single(path, arrays, name), path)}

    def _picture(self, port: Port, path: Path) -> Loaded:
        form = geometry(port.shape, self.layout)
        channels = 3 if form is None else form.channels
        scaling = self._scaling(default_scaling(port, self.metadata, channels))
        read = load_picture(path, port, self.layout, scaling, crop=self.crop)
        return Loaded(read.value, (str(path),), str(scaling), read.geometry, (read.pixels,))

    def _array(self, port: Port, array: Array, path: Path) -> Loaded:
        form = geometry(port.shape, self.layout) if len(port.shape) == 4 else None
        scaling = None
        if self.preset is not None or any(change is not None for change in self.changes):
            scaling = self._scaling(PRESETS["raw"])
            form = form or geometry(port.shape, self.layout)
            array = np.asarray(array)
            if form is not None:
                # The channels last, as in a picture, and back.
                array = fit(Port(port.name, None, port.shape), array)
                scaled = scaling(form.pictures(array))
                array = np.concatenate([form.place(picture) for picture in scaled])
                array = array.reshape(-1, *array.shape[1:]) if form.rank != 3 else array
            else:
                array = scaling(array[..., None])[..., 0]
        return Loaded(
            fit(port, array), (str(path),), None if scaling is None else str(scaling), form
        )

    def _scaling(self, default: Scaling) -> Scaling:
        chosen = default if self.preset is None else PRESETS[self.preset]
        return chosen.override(*self.changes)


def _joined(name: str, items: Sequence[Loaded]) -> Loaded:
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


def _single(path: Path, arrays: Any, name: str = "") -> Array:
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


def _write_arrays(path: Path, result: Explanation) -> None:
    arrays = dict(result.outputs)
    arrays.update({f"{name}_attribution": a for name, a in result.attributions.items()})
    if result.delta is not None:
        arrays["convergence_delta"] = result.delta
    if result.target is not None:
        arrays.setdefault("target", result.target)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


# -- what is shown ---------------------------------------------------------------------------------


class Report:
    """One run's result, as text, as JSON and as a picture."""

    def __init__(
        self,
        explain: Explainer,
        result: Explanation,
        loaded: Mapping[str, Loaded],
        labels: Mapping[int, str],
    ) -> None:
        self.explain, self.result = explain, result
        self.loaded, self.labels = loaded, labels
        sizes = [len(a) for a in result.attributions.values() if a.ndim]
        scored = result.score if result.score is not None else result.delta
        self.count = len(scored) if scored is not None else max(sizes, default=1)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        recipe = self.explain.recipe.to_dict()
        kept = ("method", "options", "output", "baseline")
        return {
            **{key: recipe[key] for key in kept},
            "providers": self.explain.providers,
            "inputs": {
                name: {
                    "files": list(item.files),
                    "shape": list(self.result.inputs[name].shape),
                    "scaling": item.scaling,
                }
                for name, item in self.loaded.items()
            },
            "samples": [self._sample(i) for i in range(self.count)],
        }

    def _sample(self, i: int) -> dict[str, Any]:
        result = self.result
        sample: dict[str, Any] = {}
        classes = self._classes()
        if classes is not None:
            sample["predicted"] = self._entry(classes[i], int(np.argmax(classes[i])))
        if result.target is not None and result.target.ndim == 1 and classes is not None:
            sample["target"] = self._entry(classes[i], int(result.target[i]))
        elif result.target is not None:
            sample["target"] = {"index": result.target[i].tolist()}
        sample["score"] = None if result.score is None else float(result.score[i])
        sample["attribution_sum"] = {
            name: float(self._per_sample(a)[i].sum(dtype=np.float64))
            for name, a in result.attributions.items()
        }
        if result.delta is not None:
            sample["convergence_delta"] = float(result.delta[i])
        return sample

    def _entry(self, scores: Array, index: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"class": index, "score": float(scores[index])}
        if index in self.labels:
            entry["label"] = self.labels[index]
        return entry

    def _classes(self) -> Array | None:
        """Scores by class, [N, C], if that is what is explained."""
        y = self.result.outputs.get(self.explain.output)
        return y if y is not None and y.ndim == 2 and y.shape[1] > 1 else None

    def _per_sample(self, a: Array) -> Array:
        return a if a.ndim and len(a) == self.count else a.reshape(1, *a.shape)

    # -- text ----------------------------------------------------------------------------------

    def text(self) -> str:
        """What a person reads."""
        scaled = {item.scaling for item in self.loaded.values() if item.scaling}
        options = " ".join(f"{k}={v}" for k, v in self.explain.options.items())
        facts = [("method", f"{self.explain.method} {options}".rstrip())]
        if self.explain.baseline is not None:
            facts.append(("baseline", str(self.explain.baseline)))
        facts += [("pixels", scaling) for scaling in sorted(scaled)]
        blocks = [rows(facts)]
        blocks += [self._block(i) for i in range(min(self.count, _LINES))]
        if self.count > _LINES:
            blocks.append(f"… and {self.count - _LINES} more (--json lists all)")
        return "\n".join(blocks)

    def _block(self, i: int) -> str:
        lines: list[tuple[str, str]] = []
        classes = self._classes()
        if classes is not None:
            order = np.argsort(-classes[i], kind="stable")[:3]
            shown = [f"{self._class(int(k))}: {classes[i][k]:.4g}" for k in order]
            lines.append(("predicted", f"{shown[0]}  (then {', '.join(shown[1:])})"))
        lines.append(("explained", self._explained(i)))
        for name, a in self.result.attributions.items():
            mine = self._per_sample(a)[i].astype(np.float64)
            above, below = mine[mine > 0].sum(), mine[mine < 0].sum()
            split = f"  ({above:.4g} for, {below:.4g} against)" if self._signed() else ""
            lines.append((f"Σ {name}", f"{mine.sum():.6g}{split}"))
        if self.result.delta is not None:
            lines.append(("delta", f"{self.result.delta[i]:.3g}"))
        return f"{self._source(i)}\n{rows(lines)}"

    def _class(self, index: int) -> str:
        return f"{index} {self.labels[index]}" if index in self.labels else str(index)

    def _explained(self, i: int) -> str:
        target, score = self.result.target, self.result.score
        what = self.explain.output
        if target is not None:
            index = self._class(int(target[i])) if target.ndim == 1 else str(target[i].tolist())
            what += f", target {index}"
        elif self.explain.takes_seed:
            what += ", seeded"
        return what if score is None else f"{what}: {score[i]:.6g}"

    def _source(self, i: int) -> str:
        files = next((item.files for item in self.loaded.values()), ())
        if len(files) == self.count:
            return files[i]
        return f"{files[0]}, sample {i}" if files else f"sample {i}"

    def _signed(self) -> bool:
        method = METHODS.get(self.explain.method)
        return method is None or describe(method).signed

    def warnings(self) -> list[str]:
        """What should not go unnoticed."""
        found = []
        for name, a in self.result.attributions.items():
            if not np.isfinite(a).all():
                found.append(f"the attribution of '{name}' has entries that are not finite")
            elif a.size and not a.any():
                found.append(
                    f"the attribution of '{name}' is zero everywhere: at this input the output "
                    "does not react to it"
                )
        return found

    # -- picture -------------------------------------------------------------------------------

    def figure(self) -> Any:
        """Input and attribution, for the first samples."""
        result, panels = self.result, []
        several = len(result.attributions) > 1
        for i in range(self.count):
            for name, a in result.attributions.items():
                if len(panels) == plot.MOST:
                    break
                title = self._title(i)
                panels.append(self._panel(i, name, a, f"{name}: {title}" if several else title))
        left_out = self.count * len(result.attributions) - len(panels)
        if left_out > 0:
            note(f"the picture shows {len(panels)} of {len(panels) + left_out}")
        if not panels:
            raise CompileError("there is nothing to draw: the batch is empty")
        heading = f"{self.explain.method} of {self.explain.output}"
        return plot.draw(panels, heading, self._signed())

    def _panel(self, i: int, name: str, a: Array, title: str) -> plot.Panel:
        rest: dict[str, Any] = {"title": title, "source": Path(self._source(i)).name}
        item = self.loaded.get(name)
        if item is None:
            seen = [x for x in self.loaded.values() if x.pixels or (x.form and x.value.ndim == 4)]
            shown = self._pixels(seen[0], i) if seen and a.ndim > 3 else None
            return plot.panel_of(self._per_sample(a)[i], pixels=shown, inner=True, **rest)
        if item.form is None:
            value = self._per_sample(self.result.inputs[name])[i]
            return plot.panel_of(self._per_sample(a)[i], value, **rest)
        picture = item.form.pictures(a)[i]
        shown = self._pixels(item, i)
        return plot.panel_of(picture, pixels=shown, channels_last=True, **rest)

    def _pixels(self, item: Loaded, i: int) -> Array | None:
        if i < len(item.pixels):
            return item.pixels[i]
        return None if item.form is None else plot.as_pixels(item.form.pictures(item.value)[i])

    def _title(self, i: int) -> str:
        target, score, classes = self.result.target, self.result.score, self._classes()
        shown = "" if score is None else f", score {score[i]:.4g}"
        if target is None:
            return (self.explain.output + shown) if shown else "attribution"
        if target.ndim > 1:
            return f"target {target[i].tolist()}{shown}"
        title = f"class {self._class(int(target[i]))}{shown}"
        if classes is not None and int(np.argmax(classes[i])) != int(target[i]):
            title += f" (predicted {self._class(int(np.argmax(classes[i])))})"
        return title
