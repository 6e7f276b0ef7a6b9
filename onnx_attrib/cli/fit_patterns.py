"""``onnx-attrib fit-patterns``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from onnx_attrib.cli.common import json_option, print_json, show_bytes
from onnx_attrib.cli.reading import Reader, pixel_options, single
from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.feeds import Array, Port
from onnx_attrib.images import load_arrays
from onnx_attrib.ir import Graph
from onnx_attrib.model_io import load
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.patterns import fit_patterns
from onnx_attrib.whole import write_whole


@dataclass(frozen=True)
class Samples:
    """An array of samples, scaled as the command line asks when a part of it is read."""

    array: Array
    count: int
    port: Port
    reader: Reader
    path: Path

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Array:
        return self.reader.array(self.port, np.asarray(self.array[part]), self.path).value


@click.command(
    "fit-patterns",
    epilog="""\b
Examples:
  onnx-attrib fit-patterns cnn.onnx --data train.npy
  onnx-attrib fit-patterns cnn.onnx --data images=digits.npz --preset minus-one-one -o digits.npz
  onnx-attrib compile cnn.onnx --method pattern-attribution --option patterns=cnn.patterns.npz

Kindermans et al. 2017. Data that the model was trained on is best; a few thousand samples are a
good start. A pixel p becomes (p · scale − mean) / std; without these options arrays are fed as
they are. An .npy file is read batch by batch and may be larger than the memory.
""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="Samples along the first axis: .npy, or .npz (arrays by input name); one for each input.",
)
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write (.npz). [default: MODEL's stem + .patterns.npz, beside MODEL]",
)
@click.option("--input", "attributed", metavar="TENSOR", help="The tensor to attribute to later.")
@click.option("--output", metavar="TENSOR", help="The tensor to explain. [default: the first]")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Samples evaluated together.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first samples.")
@pixel_options
@json_option
def fit_patterns_command(
    model: Path,
    data: tuple[str, ...],
    out: Path | None,
    attributed: str | None,
    output: str | None,
    batch: int,
    limit: int | None,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    scale: float | None,
    layout: Literal["auto", "nchw", "nhwc"],
    as_json: bool,
) -> None:
    """Estimate the patterns of MODEL's layers from data, for the pattern methods."""
    destination = model.with_name(f"{model.stem}.patterns.npz") if out is None else out
    if destination.suffix.lower() != ".npz":
        raise click.UsageError(f"-o writes .npz files, not '{destination.name}'")
    reader = Reader(
        layout=None if layout == "auto" else layout,
        preset=preset,
        changes=(scale, mean, std),
    )
    given = normalize(load(model)[0]).inputs
    ports = {t.name: Port(t.name, Graph.dtype(t), Graph.shape(t) or ()) for t in given}
    samples = _samples(reader, ports, data, limit)
    count = min(len(part) for part in samples.values())
    with click.progressbar(
        length=count, label="fitting", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        patterns = fit_patterns(
            model,
            samples,
            inputs=attributed,
            output=output,
            batch=batch,
            progress=lambda done, whole: bar.update(done - bar.pos),
        )
    write_whole(destination, lambda path: np.savez(path, allow_pickle=False, **patterns))
    if as_json:
        shapes = {name: list(array.shape) for name, array in patterns.items()}
        print_json({"file": str(destination), "samples": count, "patterns": shapes})
    else:
        size = show_bytes(destination.stat().st_size)
        click.echo(f"{destination}: {len(patterns)} layers from {count} samples, {size}")


def _samples(
    reader: Reader, ports: dict[str, Port], texts: tuple[str, ...], limit: int | None
) -> dict[str, Samples]:
    found: dict[str, Samples] = {}
    for text in texts:
        name, path = reader.split(text, ports)
        if not path.exists():
            raise OptionError(f"cannot read '{path}': No such file or directory")
        arrays: Any = _arrays(path)
        if isinstance(arrays, dict) and name is None and any(key in ports for key in arrays):
            chosen = {key: array for key, array in arrays.items() if key in ports}
        else:
            if name is None:
                if len(ports) != 1:
                    raise OptionError(
                        f"the model has {len(ports)} inputs: say which one '{path}' is "
                        f"(NAME={path.name}); {suggest('', list(ports))}"
                    )
                name = next(iter(ports))
            if isinstance(arrays, dict) and name in arrays:
                arrays = arrays[name]
            chosen = {name: single(path, arrays, name)}
        for key, array in chosen.items():
            if not array.ndim:
                raise OptionError(f"'{path}' holds a single number, no samples")
            count = len(array) if limit is None else min(limit, len(array))
            found[key] = Samples(array, count, ports[key], reader, path)
    return found


def _arrays(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise OptionError(f"cannot read '{path}' as .npy: {error}") from None
    return load_arrays(path)
