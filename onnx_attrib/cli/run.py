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
    picture_option,
    print_json,
    progress,
)
from onnx_attrib.cli.reading import PIXELS, Reader, read_labels, sample_options, single
from onnx_attrib.cli.report import Report
from onnx_attrib.images import load_arrays
from onnx_attrib.recipe import Recipe
from onnx_attrib.runtime import Explainer, Explanation
from onnx_attrib.whole import write_whole


@click.command(
    "run",
    epilog="""\b
Examples:
  onnx-attrib run cnn.deeplift.onnx --input digit.png --plot explained.png
  onnx-attrib run net.gradient.onnx --input photo.jpg --preset imagenet --labels names.txt
  onnx-attrib run bert.gradient.onnx --input batch.npz --target 1 -o out.npz
"""
    + PIXELS,
)
@click.argument("compiled", type=click.Path(path_type=Path))
@sample_options
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
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all arrays (.npz)."
)
@picture_option
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
