"""``onnx-attrib compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from onnx_attrib import plot
from onnx_attrib.cli.common import (
    TargetsType,
    TargetType,
    compared_methods,
    json_option,
    labelled_methods,
    method_options,
    note,
    number_or_text,
    output_option,
    picture_option,
    print_json,
    progress,
    words_option,
)
from onnx_attrib.cli.reading import PIXELS, Reader, read_labels, sample_options
from onnx_attrib.cli.report import Report
from onnx_attrib.lineup import Lineup
from onnx_attrib.whole import write_whole


@click.command(
    "compare",
    epilog="""\b
Examples:
  onnx-attrib compare cnn.onnx --input 3.png --methods deeplift,saliency,occlusion --plot 3.cmp.png
  onnx-attrib compare net.onnx --input photo.jpg --methods a=occlusion,b=occlusion \\
      --option a.window=3,8,8 --option b.window=3,16,16 --plot windows.png
  onnx-attrib compare text.onnx --input ids.npy --words vocabulary.txt --methods deeplift,lrp \\
      --plot words.pdf

MODEL is compiled for all methods at once, in memory. The picture has a row for each sample: the
input, then each method's map on a colour scale of its own. 'onnx-attrib methods' lists them.
"""
    + PIXELS,
)
@click.argument("model", type=click.Path(path_type=Path))
@sample_options
@compared_methods
@method_options
@picture_option
@click.option("--target", type=TargetType(), help="Class to explain. [default: the predicted one]")
@click.option(
    "--targets",
    type=TargetsType(),
    help="Explain several at once: the K largest classes of each sample, or these.",
)
@click.option(
    "--baseline",
    default="zeros",
    show_default=True,
    metavar="zeros|NUMBER|FILE",
    help="The reference x̄ of the methods that have one (FILE: .npy or .npz).",
)
@click.option(
    "--attribute",
    "attributed",
    multiple=True,
    metavar="TENSOR",
    help="Attribute to this tensor: an input or any inner float tensor; may be repeated. "
    "[default: the float inputs, else the embeddings]",
)
@output_option
@words_option
@json_option
def compare_command(
    model: Path,
    inputs: tuple[str, ...],
    labels: Path | None,
    crop: bool,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    scale: float | None,
    layout: Literal["auto", "nchw", "nhwc"],
    methods: tuple[str, ...],
    options: tuple[str, ...],
    picture: Path | None,
    target: int | tuple[int, ...] | None,
    targets: str | tuple[int, ...] | None,
    baseline: str,
    attributed: tuple[str, ...],
    output: str | None,
    words: Path | None,
    as_json: bool,
) -> None:
    """Explain files by several methods of a MODEL, side by side in one picture."""
    if targets is not None and target is not None:
        raise click.UsageError("give --target or --targets, not both")
    if baseline == "input":
        raise click.UsageError("--baseline is zeros, a number or a file here")
    if not inputs:
        raise click.UsageError("give the samples with --input")
    choices = labelled_methods(methods, options)
    if picture is not None:
        plot.require()
    names = read_labels(labels) if labels else {}
    vocabulary = read_labels(words) if words else {}
    with progress(f"compiling {model.name}"):
        lineup = Lineup.of(
            model,
            choices,
            inputs=attributed or None,
            output=output,
            targets=targets,
            baseline=number_or_text(baseline),
        )
    first = lineup.explainers[0]
    reader = Reader(
        metadata=first.metadata,
        layout=None if layout == "auto" else layout,
        preset=preset,
        changes=(scale, mean, std),
        crop=crop,
    )
    loaded = reader.inputs(first.inputs, inputs)
    with progress("running"):
        result = lineup({name: item.value for name, item in loaded.items()}, target=target)
    report = Report(first, result, loaded, names, choices, vocabulary)
    if picture is not None:
        figure = report.figure()
        write_whole(picture, lambda path: plot.save(figure, path))
    if as_json:
        print_json(_told(model, report, picture))
    else:
        click.echo("\n".join([report.text(), *([f"Wrote {picture}"] if picture else [])]))
    for warning in report.warnings():
        note(warning)


def _told(model: Path, report: Report, picture: Path | None) -> dict[str, Any]:
    """What ``run`` tells, with the method behind each label."""
    told = report.to_dict()
    methods = {
        label: {"method": method, "options": dict(options)}
        for label, (method, options) in report.methods.items()
    }
    kept = {key: value for key, value in told.items() if key not in ("method", "options")}
    files = [] if picture is None else [str(picture)]
    return {"model": str(model), **kept, "methods": methods, "files": files}
