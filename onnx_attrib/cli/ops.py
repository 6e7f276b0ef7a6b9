"""``onnx-attrib ops``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click

from onnx_attrib import kernels
from onnx_attrib.cli.common import as_usage_error, json_option, print_json
from onnx_attrib.ir import OPSET
from onnx_attrib.operators import KINDS, OperatorInfo, operators

_HEAD = ("operator", "gradient", "DeepLIFT", "CUDA", "opsets")


@click.command(
    "ops",
    epilog="""\b
Examples:
  onnx-attrib ops
  onnx-attrib ops Conv Relu ai.onnx.ml::Scaler
  onnx-attrib ops --json
""",
)
@click.argument("names", nargs=-1, metavar="[NAME]…")
@json_option
def ops_command(names: tuple[str, ...], as_json: bool) -> None:
    """List ONNX's operators, or those of NAME…, with what happens to each.

    By class: what its gradient is, whether DeepLIFT sums to the difference through it, where ONNX
    Runtime's CUDA provider runs it at opset 21 (in float32), and the opsets that changed it.
    """
    with as_usage_error():
        found = operators(names)
    counts = Counter(info.kind for info in found)
    if as_json:
        print_json(
            {
                "onnxruntime": kernels.VERSION,
                "opset": OPSET,
                "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
                "operators": [info.to_dict() for info in found],
            }
        )
        return
    click.echo("\n".join([*_table(found), _counts(counts)]))


def _table(found: Sequence[OperatorInfo]) -> list[str]:
    cells = {info: _cells(info) for info in found}
    widths = [max(map(len, column)) for column in zip(_HEAD, *cells.values(), strict=True)]
    lines = [_line(_HEAD, widths)]
    for kind in KINDS:
        members = [info for info in found if info.kind == kind]
        if members:
            lines += [f"{kind} ({len(members)})", *(_line(cells[info], widths) for info in members)]
    return lines


def _cells(info: OperatorInfo) -> tuple[str, ...]:
    others = [kind for kind in info.classes if kind != info.kind]
    # A lowered operator conserves as what takes its place does.
    conserves = info.conservation
    if info.note:
        conserves = info.note if info.kind == "no rule" else f"{conserves}: {info.note}"
    elif others:
        conserves = f"{conserves} (also {', '.join(others)})"
    opsets = ",".join(map(str, info.versions))
    return info.label, info.gradient, conserves, info.cuda or "—", opsets


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
    return ("  " + "  ".join(padded)).rstrip()


def _counts(counts: Counter[str]) -> str:
    total = sum(counts.values())
    kinds = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind])
    return f"{total} operator{'s' * (total != 1)}: {kinds}"
