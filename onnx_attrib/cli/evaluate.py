"""``onnx-attrib evaluate``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from onnx_attrib.cli.common import (
    TargetType,
    as_usage_error,
    compared_methods,
    json_option,
    labelled_methods,
    method_options,
    note,
    number_or_text,
    output_option,
    print_json,
    progress,
    words_option,
)
from onnx_attrib.cli.reading import PIXELS, Reader, pixel_options
from onnx_attrib.cli.samples import read_samples
from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.evaluation import Subject, evaluate
from onnx_attrib.evaluation.contestants import CONTROL
from onnx_attrib.evaluation.features import KINDS


@click.command(
    "evaluate",
    epilog="""\b
Examples:
  onnx-attrib evaluate cnn.onnx --data digits.npz --methods deeplift,saliency -o judged
  onnx-attrib evaluate net.onnx --data photos/ --preset imagenet --methods deeplift,occlusion
  onnx-attrib evaluate net.onnx --data table.csv --labels class --target label --methods lrp
  onnx-attrib evaluate net.onnx --data x.npy --methods deeplift,ig=integrated-gradients \\
      --option ig.steps=200 --sanity

DATA: .npy or .npz (arrays by input name), a table (.csv), pictures, or a folder of pictures (whose
subfolders are the classes). Features go to the baseline in the order of their attribution, most and
least relevant first; the variation of the score is in its own units. Interrupted, the same command
goes on where it stopped. results.json, three tables and report.html are written to DIR. Arrays of
bytes are scaled like pixels if the metadata says how.
"""
    + PIXELS,
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="[NAME=]DATA",
    help="Samples; repeated: one for each input, or pictures of one batch.",
)
@click.option(
    "--labels",
    metavar="FILE|COLUMN",
    help="The class of each sample: .npy, a text file with one each line, or a column of a table.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the classes: a line each, or a JSON list or object.",
)
@words_option
@compared_methods
@method_options
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to write. [default: MODEL's stem + .evaluation, beside MODEL]",
)
@click.option(
    "--features",
    type=click.Choice(("auto", *KINDS)),
    default="auto",
    show_default=True,
    help="What is removed as one: pixels (channels together), positions (embedding components "
    "together) or columns (every entry). auto: by the rank, 4, 3 or another.",
)
@click.option(
    "--step",
    type=click.IntRange(min=1),
    help="Features removed at a time. [default: 1 up to 100 features, else for about 100 points]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Remove only so many features. [default: all]"
)
@click.option("--samples", type=click.IntRange(min=1), help="Use only the first samples.")
@click.option(
    "--input",
    "attributed",
    metavar="TENSOR",
    help="Attribute to, and perturb, this tensor: an input or an inner float tensor. "
    "[default: the float input, else the embedding]",
)
@output_option
@click.option(
    "--target",
    type=TargetType("predicted", "label"),
    default="predicted",
    show_default=True,
    help="The class that is explained.",
)
@click.option(
    "--baseline",
    default="zeros",
    show_default=True,
    metavar="zeros|NUMBER|FILE",
    help="The reference x̄: of the methods, and what removed features are replaced by.",
)
@click.option(
    "--subsets",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Random subsets of each size for sensitivity-n and infidelity; 0: neither.",
)
@click.option(
    "--neighbours",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Points around a sample for max-sensitivity; 0: without.",
)
@click.option(
    "--radius",
    type=click.FloatRange(min=0, min_open=True),
    help="How far these are in each entry. [default: 2 % of the range of the data]",
)
@click.option(
    "--sanity", is_flag=True, help="Randomise the weights of the last layers, and compare."
)
@click.option(
    "--gallery",
    default="8",
    show_default=True,
    metavar="COUNT|I,I,…",
    help="How many samples the report shows, or which ('3,': the sample 3).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of an operator. [default: ORT's]"
)
@click.option("--fresh", is_flag=True, help="Throw away what DIR holds of an earlier run.")
@pixel_options
@click.option("--crop", is_flag=True, help="Cut images to the input's shape; else they stretch.")
@json_option
def evaluate_command(
    model: Path,
    data: tuple[str, ...],
    labels: str | None,
    classes: Path | None,
    words: Path | None,
    methods: tuple[str, ...],
    options: tuple[str, ...],
    out: Path | None,
    features: str,
    step: int | None,
    limit: int | None,
    samples: int | None,
    attributed: str | None,
    output: str | None,
    target: Any,
    baseline: str,
    subsets: int,
    neighbours: int,
    radius: float | None,
    sanity: bool,
    gallery: str,
    seed: int,
    threads: int | None,
    fresh: bool,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    scale: float | None,
    layout: Literal["auto", "nchw", "nhwc"],
    crop: bool,
    as_json: bool,
) -> None:
    """Judge attribution METHODS on a MODEL and its DATA: which explains it best?"""
    chosen = labelled_methods(_without_control(methods), options)
    shown = _gallery(gallery)
    folder = model.with_name(f"{model.stem}.evaluation") if out is None else out
    if folder.exists() and not folder.is_dir():
        raise CompileError(f"cannot write to '{folder}': it is not a folder")
    with progress(f"loading {model.name}"):
        subject = Subject(model, attributed, output, threads)
        reader = Reader(
            metadata=subject.metadata,
            layout=None if layout == "auto" else layout,
            preset=preset,
            changes=(scale, mean, std),
            crop=crop,
        )
        read = read_samples(
            reader, subject.inputs, data, labels, classes, samples, subject.classes, words
        )
    for text in subject.notes:
        note(text)
    with _resumable(folder), _bar() as report:
        evaluation = evaluate(
            subject,
            read,
            chosen,
            features=features,
            baseline=number_or_text(baseline),
            target=target,
            step=step,
            limit=limit,
            subsets=subsets,
            neighbours=neighbours,
            radius=radius,
            sanity=sanity,
            gallery=shown,
            seed=seed,
            folder=folder,
            fresh=fresh,
            progress=report,
            threads=threads,
            layout=reader.layout,
        )
    if as_json:
        print_json(evaluation.results)
    else:
        click.echo(_summary(evaluation.results, folder))


def _without_control(methods: tuple[str, ...]) -> list[str]:
    names = [name for text in methods for name in text.split(",") if name.strip()]
    left = [name for name in names if name.strip() != CONTROL]
    if not left:
        raise click.UsageError(f"name a method beside '{CONTROL}', which is always there")
    return left


def _gallery(text: str) -> int | list[int]:
    with as_usage_error():
        try:
            numbers = [int(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise OptionError(
                f"--gallery is a count, or numbers of samples, not '{text}'"
            ) from None
        return numbers[0] if "," not in text and numbers else numbers


# -- while it runs ---------------------------------------------------------------------------------


class _StoppedError(KeyboardInterrupt):
    """The process was asked to end."""


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """End an interrupted run with a word on how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise _StoppedError

    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if alone else None
    try:
        yield
    except KeyboardInterrupt as error:
        click.echo(
            f"Interrupted: what is done is kept in '{folder}'; the same command goes on there.",
            err=True,
        )
        asked = signal.SIGTERM if isinstance(error, _StoppedError) else signal.SIGINT
        raise click.exceptions.Exit(128 + asked) from None
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar, on a terminal only."""
    with click.progressbar(
        length=1, label="evaluating", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def report(done: int, count: int, what: str) -> None:
            bar.length, bar.label = count, f"{what[:24]:<24}"
            bar.update(done - bar.pos)
            bar.render_progress()

        yield report


# -- what is printed -------------------------------------------------------------------------------

_COLUMNS = (
    ("gap", "gap"),
    ("MoRF", "morf"),
    ("LeRF", "lerf"),
    ("slope", "slope"),
    ("sensitivity-n", "sensitivity"),
    ("infidelity", "infidelity"),
    ("max-sens.", "max_sensitivity"),
    ("incomplete", "completeness"),
    ("ms/sample", "seconds_per_sample"),
)


def _summary(results: Mapping[str, Any], folder: Path) -> str:
    data, settings = results["data"], results["settings"]
    accuracy = f", accuracy {data['accuracy']:.1%}" if data["accuracy"] is not None else ""
    head = (
        f"{data['samples']} samples{accuracy}; {settings['limit']} of {settings['count']} "
        f"{settings['features']} removed, {settings['step']} at a time; target "
        f"{settings['target']}, baseline {settings['baseline']}"
    )
    random = results["control"][CONTROL]["curves"]
    control = {"label": f"({CONTROL})", "morf": random["morf"]["area"]}
    control |= {"lerf": random["lerf"]["area"], "slope": random["morf"]["slope"]}
    lines = [["method", *(title for title, _ in _COLUMNS)]]
    for row in (*results["ranking"], control):
        lines.append([row["label"], *(_cell(row.get(key), key) for _, key in _COLUMNS)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    table = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    return "\n".join([head, *table, results["ranked_by"]["why"], f"Wrote {folder / 'report.html'}"])


def _cell(value: Any, key: str) -> str:
    if isinstance(value, Mapping):
        value = value["mean"]
    if value is None:
        return ""
    return f"{1000 * value:.3g}" if key == "seconds_per_sample" else f"{value:.3g}"
