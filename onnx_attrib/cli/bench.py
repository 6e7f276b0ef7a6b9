"""``onnx-attrib bench``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnx_attrib.bench import PROVIDERS, Case, PeerRow, Quartiles, Row, bench
from onnx_attrib.cli.common import (
    Parameter,
    TargetType,
    as_mapping,
    chosen_methods,
    json_option,
    method_options,
    print_json,
    progress,
    show_bytes,
)
from onnx_attrib.cli.reading import baseline_of, inputs_of, sizes_of
from onnx_attrib.feeds import show_shape
from onnx_attrib.peers import PEERS, module_from
from onnx_attrib.profiling import Profile
from onnx_attrib.session import onnxruntime
from onnx_attrib.version import VERSION

_HEAD = (
    "method",
    "wall ms",
    "×",
    "cpu ms",
    "×",
    "samples/s",
    "loaded",
    "run",
    "×",
    "× act.",
    "compile s",
    "nodes",
    "file",
)
_OPERATORS = 12
"""Lines of a profile."""


class Counts(Parameter):
    """Whole numbers from 1 with commas between them."""

    name = "counts"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How the help shows it."""
        return "INT[,INT…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read the text of the numbers."""
        if not isinstance(value, str):
            return value
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"'{value}' is not a whole number from 1, or several", param, ctx)
        return tuple(int(part) for part in parts)


@click.command(
    "bench",
    epilog="""\b
Examples:
  onnx-attrib bench model.onnx --method gradient --method deeplift
  onnx-attrib bench model.onnx --method integrated-gradients --option steps=20 --batch 1,8
  onnx-attrib bench model.onnx --method gradient --profile
  onnx-attrib bench model.onnx --against captum --module mynetwork:build
  onnx-attrib bench model.onnx --against captum-export --module mynetwork:build

The columns: milliseconds of one run by the wall clock and of processor time (medians), each with
its ratio to the forward pass (the median of the ratios within a round); samples a second; memory
after loading, and what a run needs on top of it at its peak, with its ratio to the forward pass's
peak and to the sum of the forward pass's activations (in a fresh process, with ONNX Runtime's
arena off, on Linux); seconds to compile; nodes and size of the file.
""",
)
@click.argument(
    "models", nargs=-1, required=True, metavar="MODEL…", type=click.Path(path_type=Path)
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("deeplift",),
    show_default="deeplift",
    metavar="NAME",
    help="Attribution method; may be repeated. Each is compiled by itself.",
)
@method_options
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=Counts(),
    help="Samples at once; may be repeated. [default: 1, or those of --input]",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    default=("cpu",),
    show_default="cpu",
    metavar="|".join(PROVIDERS),
    help="Where to run: these, or another of ONNX Runtime's; may be repeated.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That an operator may use.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Of each, all sessions run in turn.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs before the first round.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random inputs.")
@click.option(
    "--target",
    type=TargetType("argmax"),
    default="argmax",
    show_default=True,
    help="What to explain.",
)
@click.option(
    "--baseline",
    default="zeros",
    show_default=True,
    metavar="zeros|input|NUMBER|FILE",
    help="The reference x̄, as for compile; given at run time (input), it is zeros.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]FILE",
    help="An image, .npy or .npz (arrays by input name), as for run; repeated to fill a batch. "
    "[default: random]",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of an open dimension of random inputs; may be repeated.",
)
@click.option(
    "--against",
    type=click.Choice(PEERS),
    help="Run this library's implementation on the same network, too (needs torch); "
    "captum-export: what torch exports of it to ONNX, in the same ONNX Runtime.",
)
@click.option(
    "--module",
    metavar="PACKAGE.MODULE:FACTORY",
    help="The network for --against: what makes the torch module. [default: converted by "
    "onnx2torch]",
)
@click.option("--profile", is_flag=True, help="Time operators, of the forward and backward half.")
@json_option
def bench_command(
    models: tuple[Path, ...],
    methods: tuple[str, ...],
    options: tuple[str, ...],
    batches: tuple[tuple[int, ...], ...],
    providers: tuple[str, ...],
    threads: int,
    rounds: int,
    warmup: int,
    seed: int,
    target: Any,
    baseline: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    against: str | None,
    module: str | None,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure what attribution costs beside the forward pass of MODEL.

    Sessions take turns in rounds, on one thread unless --threads says otherwise.
    """
    if module is not None and against is None:
        raise click.UsageError("--module is the network for --against")
    chosen = as_mapping(chosen_methods(methods, options))
    network = None if module is None else module_from(module)
    sizes = sizes_of(dims)
    found = []
    for model in models:
        cases = bench(
            model,
            chosen,
            inputs=inputs_of(model, inputs) if inputs else None,
            dims=sizes,
            batches=[n for several in batches for n in several] or None,
            providers=providers,
            threads=threads,
            rounds=rounds,
            warmup=warmup,
            seed=seed,
            baseline=baseline_of(baseline),
            target=target,
            against=against,
            module=network,
            profiled=profile,
            watch=progress,
        )
        found.append({"model": str(model), "cases": [case.to_dict() for case in cases]})
        if not as_json:
            shown = [_text(model, case, threads, rounds) for case in cases]
            click.echo("\n".join(shown))
    if as_json:
        settings = {"threads": threads, "rounds": rounds, "warmup": warmup, "seed": seed}
        versions = {"version": VERSION, "onnxruntime": onnxruntime().__version__}
        request = {"target": target, "baseline": baseline, "against": against}
        print_json({**versions, **settings, **request, "models": found})


# -- text ------------------------------------------------------------------------------------------


def _text(model: Path, case: Case, threads: int, rounds: int) -> str:
    inputs = ", ".join(f"{name} {show_shape(shape)}" for name, shape in case.inputs.items())
    place = case.provider.removesuffix("ExecutionProvider").lower()
    head = (
        f"{model}: {place}, {threads} thread{'s' * (threads > 1)}, batch {case.batch}, "
        f"{rounds} round{'s' * (rounds > 1)}; {inputs}"
    )
    peers = [row.peer for row in case.rows if row.peer is not None]
    heads = [*_HEAD, *_peer_head(peers)]
    lines = [head, *_aligned([heads, *(_cells(row, bool(peers)) for row in case.rows)], 1)]
    lines += [
        f"Note: {row.method}: {row.peer.problem}"
        for row in case.rows
        if row.peer is not None and row.peer.problem
    ]
    for row in case.rows:
        if row.profile is not None:
            lines += _profile(row.method or "", row.profile)
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of columns; the first ``left`` are aligned on their left, the others on their right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _cells(row: Row, compared: bool) -> list[str]:
    times = row.times
    return [
        row.method or "(forward)",
        _number(times.wall_ms),
        _ratio(times.wall_ratio),
        _number(times.cpu_ms),
        _ratio(times.cpu_ratio),
        _number(row.samples_per_s),
        _bytes(row.loaded_bytes),
        _bytes(row.run_bytes),
        _number(row.run_ratio),
        _number(row.activation_ratio),
        _number(row.compile_s),
        str(row.nodes),
        show_bytes(row.file_bytes),
        *(_peer(row.peer) if compared else ()),
    ]


def _peer_head(peers: Sequence[PeerRow]) -> list[str]:
    return [f"{peers[0].name} cpu ms", "× ours", "differs by"] if peers else []


def _peer(peer: PeerRow | None) -> list[str]:
    if peer is None or peer.times is None:
        return ["", "", ""]
    times = peer.times
    on_cpu = times.cpu_ms is not None
    return [
        _number(times.cpu_ms if on_cpu else times.wall_ms),
        _ratio(times.cpu_ratio if on_cpu else times.wall_ratio),
        "" if peer.difference is None else f"{peer.difference:.1e}",
    ]


def _profile(method: str, found: Profile) -> list[str]:
    whole = found.run_ms
    parts = [
        f"{name} {_number(ms)} ({ms / whole:.0%})"
        for name, ms in (
            ("forward half", found.forward_ms),
            ("backward half", found.backward_ms),
            ("between operators", found.between_ms),
        )
    ]
    head = f"{method}, profiled: {_number(whole)} ms a run; {', '.join(parts)}"
    table = [["half", "operator", "kernels", "ms", "share"]]
    table += [
        [o.half, o.op, f"{o.count:g}", _number(o.ms), f"{o.ms / whole:.1%}"]
        for o in found.operators[:_OPERATORS]
    ]
    return [head, *_aligned(table, 2)]


def _ratio(ratio: Quartiles | None) -> str:
    return "" if ratio is None else _number(ratio.median)


def _number(value: float | None) -> str:
    """Three digits, as people write them."""
    if value is None:
        return ""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{min(max(digits, 0), 4)}f}"


def _bytes(count: int | None) -> str:
    return "" if count is None else show_bytes(count)
