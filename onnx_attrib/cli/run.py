"""``onnx-attrib run``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import numpy as np

from onnx_attrib import plot
from onnx_attrib.cli.common import (
    TargetType,
    json_option,
    note,
    print_json,
    progress,
    write_whole,
)
from onnx_attrib.cli.reading import Reader, pixel_options, read_labels, single
from onnx_attrib.cli.report import Report
from onnx_attrib.images import load_arrays
from onnx_attrib.recipe import Recipe
from onnx_attrib.runtime import Explainer, Explanation


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
@pixel_options
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
    scale: float | None,
    layout: Literal["auto", "nchw", "nhwc"],
    crop: bool,
    as_json: bool,
) -> None:
    """Run a COMPILED model on files: print the prediction, write and draw the attribution."""
    if out is not None and out.suffix.lower() != ".npz":
        raise click.UsageError(f"-o writes .npz files, not '{out.name}'")
    if picture is not None:
        plot.require()
    names = read_labels(labels) if labels else {}
    with progress(f"loading {compiled.name}"):
        explain = Explainer(compiled)
    reader = Reader(
        metadata=explain.metadata,
        layout=None if layout == "auto" else layout,
        preset=preset,
        changes=(scale, mean, std),
        crop=crop,
    )
    loaded = reader.inputs(explain.inputs, inputs)
    reference = reader.baselines(explain, baselines)
    weights = None if seed is None else single(Path(seed), load_arrays(Path(seed)))
    with progress("running"):
        result = explain(
            {name: item.value for name, item in loaded.items()},
            target=target,
            baseline=reference,
            seed=weights,
        )
    report = Report(explain, result, loaded, names)
    if out is not None:
        write_whole(out, lambda path: _write_arrays(path, explain.recipe, result))
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


def _write_arrays(path: Path, recipe: Recipe, result: Explanation) -> None:
    """All arrays, by the names that the model's outputs have."""
    arrays = dict(result.outputs)
    for method, attributions in result.by_method.items():
        arrays.update({recipe.attribution(name, method): a for name, a in attributions.items()})
    arrays.update({recipe.delta(method): delta for method, delta in result.delta_by_method.items()})
    if result.target is not None:
        arrays.setdefault("target" if recipe.targets is None else "targets", result.target)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
