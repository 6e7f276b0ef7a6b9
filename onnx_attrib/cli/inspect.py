"""``onnx-attrib inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnx_attrib.cli.common import (
    as_usage_error,
    json_option,
    print_json,
    progress,
    rows,
    show_processing,
    show_targets,
)
from onnx_attrib.feeds import show_shape
from onnx_attrib.inspection import Inspection, Layer, TensorInfo, inspect
from onnx_attrib.methods import get as method_named
from onnx_attrib.placement import Placement
from onnx_attrib.recipe import Recipe

_SHOWN = 20


@click.command(
    "inspect",
    epilog="""\b
Examples:
  onnx-attrib inspect model.onnx
  onnx-attrib inspect model.onnx --method gradient --output logits --json
  onnx-attrib inspect compiled.onnx --provider cuda
""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--method",
    default="deeplift",
    show_default=True,
    metavar="NAME",
    help="Say whether it compiles for this method.",
)
@click.option(
    "--input", "inputs", multiple=True, metavar="TENSOR", help="As for compile; may be repeated."
)
@click.option("--output", metavar="TENSOR", help="As for compile.")
@click.option(
    "--provider",
    type=click.Choice(("portable", "cuda")),
    default="portable",
    show_default=True,
    help="cuda: also show what would fall back to the CPU in a CUDA session, and each copy.",
)
@json_option
def inspect_command(
    model: Path,
    method: str,
    inputs: tuple[str, ...],
    output: str | None,
    provider: str,
    as_json: bool,
) -> None:
    """Show what MODEL is made of, and whether and how it can be explained.

    Lists its nonlinearities with the rule each gets, the layers suited for attribution, and every
    operator that cannot be handled. Of a compiled model it shows how it was compiled. Exits 0 also
    for a model that cannot be compiled: read "compilable".
    """
    with as_usage_error():
        chosen = method_named(method)
    with progress(f"reading {model.name}"):
        found = inspect(model, chosen.name, inputs or None, output, provider)
    if as_json:
        print_json({"file": str(model), **found.to_dict()})
    else:
        click.echo("\n".join([str(model), *_text(found)]))


def _text(found: Inspection) -> list[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    facts = [
        ("opset", opsets),
        ("IR version", str(found.ir_version)),
        ("producer", found.producer or "unknown"),
        ("parameters", f"{found.parameters:,}"),
        ("nodes", f"{found.nodes:,}: {_counts(found.operators)}"),
        *_tensors("input", found.inputs),
        *_tensors("output", found.outputs),
    ]
    lines = [rows(facts), *_placement(found.placement)]
    if found.compiled is not None:
        return [*lines, "Compiled by onnx-attrib", rows(_recipe(found.compiled))]
    if found.output is not None:
        lines.append(f"Explained: {found.output}, attributed to {', '.join(found.attributed)}")
    if found.squashed is not None:
        lines.append(f"Note: {found.squashed}")
    lines += [f"Note: {note}" for note in found.notes]
    if found.nonlinearities:
        lines.append("Nonlinearities")
        lines.append(
            rows(
                [
                    (n.operator, f"{n.rule:<11} × {len(n.nodes)}  {_some(n.nodes)}")
                    for n in found.nonlinearities
                ]
            )
        )
    if found.layers:
        lines.append("Layers suited for attribution (--input NAME)")
        lines.append(rows([_layer(layer) for layer in found.layers[:_SHOWN]]))
        if len(found.layers) > _SHOWN:
            lines.append(f"  … and {len(found.layers) - _SHOWN} more (--json lists all)")
    return lines + _verdict(found)


def _placement(found: Placement | None) -> list[str]:
    """Where the nodes run in a CUDA session."""
    if found is None:
        return []
    runs = f"{found.cuda} nodes on CUDA"
    if found.shapes:
        runs += f", {found.shapes} of sizes on the CPU"
    lines = [f"With CUDA (kernels of ONNX Runtime {found.onnxruntime}): {runs}"]
    if found.on_cuda:
        return [*lines, "  no fallback to the CPU, no copy between devices"]
    for title, items in (("Falls back to the CPU", found.fallbacks), ("Copied", found.copies)):
        if items:
            lines.append(f"{title} ({len(items)})")
            lines += [f"  {item}" for item in items[:_SHOWN]]
            if len(items) > _SHOWN:
                lines.append(f"  … and {len(items) - _SHOWN} more (--json lists all)")
    return lines


def _verdict(found: Inspection) -> list[str]:
    lines = []
    if found.unsupported:
        count = len(found.unsupported)
        lines.append(
            f"Not compilable for {found.method}: {count} node{'s' * (count > 1)} cannot be handled"
        )
        lines += [f"  {offence}" for offence in found.unsupported]
        lines.append("  Attribute a layer behind them (--input NAME), if there is one.")
    elif found.problem is not None:
        lines.append(f"Not compilable for {found.method}: {found.problem}")
    else:
        lines.append(f"Compilable for {found.method}")
    if found.unused_unsupported:
        lines.append("Operators without a rule that are not in the way of the explained output")
        lines += [f"  {offence}" for offence in found.unused_unsupported]
    return lines


def _counts(operators: dict[str, int]) -> str:
    named = [f"{op} {count}" for op, count in operators.items()]
    return ", ".join(named[:12]) + (f", … ({len(named)} kinds)" if len(named) > 12 else "")


def _tensors(role: str, tensors: Sequence[TensorInfo]) -> list[tuple[str, str]]:
    return [
        (role, f"{t.name} {t.dtype} {'[…]' if t.shape is None else show_shape(t.shape)}")
        for t in tensors
    ]


def _layer(layer: Layer) -> tuple[str, str]:
    shape = "[…]" if layer.shape is None else show_shape(layer.shape)
    return layer.name, f"{shape}  {layer.made_by}"


def _recipe(recipe: Recipe) -> list[tuple[str, str]]:
    options = {
        name: " ".join(f"{key}={value}" for key, value in given.items())
        for name, given in recipe.methods.items()
    }
    targets, shown = recipe.targets, show_processing(recipe)
    return [
        ("version", recipe.version),
        *(("method", f"{name} {given}".rstrip()) for name, given in options.items()),
        ("explains", recipe.output),
        ("attributes", ", ".join(recipe.inputs)),
        ("target", str(recipe.target)) if targets is None else ("targets", show_targets(targets)),
        ("baseline", "none" if recipe.baseline is None else str(recipe.baseline)),
        *([("shows", shown)] if shown else []),
        ("source SHA-256", recipe.source_sha256),
    ]


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
