"""``onnx-attrib verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from onnx_attrib.cli.common import (
    TargetsType,
    TargetType,
    as_mapping,
    chosen_methods,
    json_option,
    method_options,
    print_json,
    progress,
)
from onnx_attrib.cli.reading import baseline_of, inputs_of, sizes_of
from onnx_attrib.verify import Check, Verification, verify

_HEAD = ("check", "", "residual", "± uncertainty", "limit", "")


@click.command(
    "verify",
    epilog="""\b
Examples:
  onnx-attrib verify model.onnx --method gradient
  onnx-attrib verify model.deeplift.onnx --source model.onnx
  onnx-attrib verify model.deeplift.onnx --input batch.npz --dim sequence=128 --json

A residual is relative to what it is a residual of. It is OFF where it is beyond the limit and the
uncertainty together; "unclear" where the uncertainty alone is too large to tell.
""",
)
@click.argument("model", metavar="MODEL|COMPILED", type=click.Path(path_type=Path))
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Compile MODEL for this method first; may be repeated. [default: deeplift]",
)
@method_options
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="What COMPILED was compiled from: its outputs must be unchanged.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]FILE",
    help="An image, .npy or .npz (arrays by input name), as for run. [default: random]",
)
@click.option(
    "--baseline",
    metavar="zeros|input|NUMBER|FILE",
    help="The reference: of MODEL as for compile; what COMPILED takes at run time, or the array it "
    "was compiled with. [default: zeros; random at run time]",
)
@click.option("--target", type=TargetType(), help="The index to explain. [default: random]")
@click.option(
    "--targets", type=TargetsType(), help="Several at once, to compile MODEL for, as for compile."
)
@click.option(
    "--samples", type=click.IntRange(min=1), help="Random batches. [default: 3; 1 if all are given]"
)
@click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Of differences and sums, relative. [default: 0.005; 0.05 in 16 bits]",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of an open dimension of random inputs; may be repeated. [default: 2 for the batch]",
)
@json_option
@click.pass_context
def verify_command(
    ctx: click.Context,
    model: Path,
    methods: tuple[str, ...],
    options: tuple[str, ...],
    source: Path | None,
    inputs: tuple[str, ...],
    baseline: str | None,
    target: Any,
    targets: str | tuple[int, ...] | None,
    samples: int | None,
    seed: int,
    tolerance: float | None,
    dims: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check a COMPILED model, or compile MODEL and check the result.

    The graph is valid, the model's own outputs are unchanged, gradients agree with differences of
    the model's own values, attributions of conserving methods sum to S(x) − S(x̄). Exits 1 when one
    of these is off.
    """
    choices = chosen_methods(methods or ("deeplift",), options)
    named = as_mapping(choices) if options else [choice.method.name for choice in choices]
    given = inputs_of(model, inputs) if inputs else None
    with progress(f"verifying {model.name}"):
        found = verify(
            model,
            named if methods or options else None,
            source=source,
            inputs=given,
            baseline=None if baseline is None else baseline_of(baseline),
            target=target,
            targets=targets,
            samples=samples,
            seed=seed,
            tolerance=tolerance,
            dims=sizes_of(dims),
        )
    if as_json:
        print_json({"model": str(model), **found.to_dict()})
    else:
        click.echo(_text(model, found))
    if not found.ok:
        ctx.exit(1)


def _text(model: Path, found: Verification) -> str:
    batches = f"{found.samples} batch{'es' * (found.samples != 1)}"
    several = "," in found.method
    of = found.options if several else {found.method: found.options}
    shown = [
        " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        for name, options in of.items()
    ]
    lines = [f"{model}: {'; '.join(shown)}, {batches}"]
    table = [_HEAD, *(_row(check) for check in found.checks)]
    widths = [max(len(row[k]) for row in table) for k in range(len(_HEAD))]
    for row in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    lines += [f"Note: {note}" for note in found.notes]
    off = sum(check.status == "OFF" for check in found.checks)
    counts = {"unclear": "unclear", "skipped": "not checked"}
    rest = [
        f"{count} {text}"
        for status, text in counts.items()
        if (count := sum(check.status == status for check in found.checks))
    ]
    verdict = f"{off} of {len(found.checks)} checks OFF" if off else "Nothing is off"
    return "\n".join([*lines, ", ".join([verdict, *rest])])


def _row(check: Check) -> tuple[str, ...]:
    return (
        check.name,
        check.status,
        _number(check.residual),
        _number(check.uncertainty),
        "" if check.tolerance is None else f"{check.tolerance:.2g}",
        check.detail,
    )


def _number(value: float | None) -> str:
    return "" if value is None else "nan" if np.isnan(value) else f"{value:.1e}"
