"""``onnx-attrib compile``."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from onnx import ModelProto

from onnx_attrib.cli.common import (
    TargetsType,
    TargetType,
    as_mapping,
    chosen_methods,
    json_option,
    method_options,
    number_or_text,
    output_option,
    print_json,
    progress,
    reductions,
    rows,
    show_bytes,
    show_processing,
    show_targets,
)
from onnx_attrib.cli.reading import sizes_of
from onnx_attrib.compiler import finished, prepare
from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import show_shape
from onnx_attrib.inspection import behind_softmax
from onnx_attrib.ir import Graph, Tensor
from onnx_attrib.job import Job
from onnx_attrib.model_io import save
from onnx_attrib.rounding import Deviation, deviation


@click.command(
    "compile",
    epilog="""\b
Examples:
  onnx-attrib compile model.onnx --method deeplift
  onnx-attrib compile model.onnx --method integrated-gradients --option steps=100 --delta
  onnx-attrib compile model.onnx --output logits --target argmax --baseline mean.npy
  onnx-attrib compile model.onnx --method deeplift --method grad-cam --targets top3
  onnx-attrib compile model.onnx --reduce channels=sum --normalize
""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write. [default: MODEL's stem + .METHOD.onnx (.METHOD+METHOD.onnx), beside "
    "MODEL]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("deeplift",),
    show_default="deeplift",
    metavar="NAME",
    help="Attribution method; 'onnx-attrib methods' lists them. Repeated, several share one "
    "forward pass.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="TENSOR",
    help="Attribute to this tensor: an input or any inner float tensor; may be repeated. "
    "[default: the float inputs, else the embeddings]",
)
@output_option
@click.option(
    "--target",
    type=TargetType("input", "argmax", "seed"),
    default="input",
    show_default=True,
    help="What to explain: chosen at run time (input: an index, −1 the predicted class; seed: any "
    "weighting), or fixed now.",
)
@click.option(
    "--targets",
    type=TargetsType(),
    help="Explain several at once: the K largest classes of each sample, or these. Attributions "
    "get an axis for them after the batch's.",
)
@click.option(
    "--baseline",
    default="zeros",
    show_default=True,
    metavar="zeros|input|NUMBER|FILE",
    help="The reference x̄: fixed now (FILE: .npy or .npz), or given at run time (input).",
)
@click.option(
    "--delta", is_flag=True, help="Add the output convergence_delta: Σ attribution − (S(x) − S(x̄))."
)
@click.option(
    "--reduce",
    "reduce",
    multiple=True,
    metavar="AXIS=HOW",
    help="Reduce an axis of the attribution to size 1: AXIS is channels (axis 1 of three or more), "
    "last, or a number from 1; HOW is sum, abs-max (the largest |a|) or l2. May be repeated.",
)
@click.option(
    "--normalize",
    is_flag=True,
    help="Divide each sample's attribution by its largest |a|, after --reduce.",
)
@click.option(
    "--precision",
    type=click.Choice(("keep", "fp16")),
    default="keep",
    show_default=True,
    help="fp16: compute in float16 where that is safe, and report the deviation.",
)
@click.option(
    "--provider",
    type=click.Choice(("portable", "cuda")),
    default="portable",
    show_default=True,
    help="cuda: spell operators without a CUDA kernel by others, so that nothing runs on the CPU.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MIB",
    help="For methods that evaluate in chunks: the largest chunk with which a run takes no more.",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of an open dimension, for --memory and the random inputs of --precision; may be "
    "repeated. [default: a batch of 1 for --memory]",
)
@method_options
@json_option
@click.pass_context
def compile_command(
    ctx: click.Context,
    model: Path,
    out: Path | None,
    methods: tuple[str, ...],
    inputs: tuple[str, ...],
    output: str | None,
    target: Any,
    targets: str | tuple[int, ...] | None,
    baseline: str,
    delta: bool,
    reduce: tuple[str, ...],
    normalize: bool,
    precision: str,
    provider: str,
    memory: float | None,
    dims: tuple[str, ...],
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compile MODEL into one graph that computes its outputs and their attribution."""
    if targets is not None and ctx.get_parameter_source("target") != ParameterSource.DEFAULT:
        raise click.UsageError("give --target or --targets, not both")
    chosen = as_mapping(chosen_methods(methods, options))
    reduced, sizes = reductions(reduce), sizes_of(dims)
    destination = _destination(model, out, "+".join(chosen))
    start = time.perf_counter()
    with progress(f"compiling {model.name}"):
        job = prepare(
            model,
            chosen,
            inputs=inputs or None,
            output=output,
            target=target,
            targets=targets,
            baseline=number_or_text(baseline),
            delta=delta,
            reduce=reduced,
            normalize=normalize,
            precision=precision,
            provider=provider,
            memory=memory,
            dims=sizes,
        )
        proto = finished(job)
        files = save(proto, destination)
    seconds = time.perf_counter() - start
    accuracy = None
    if precision != "keep":
        with progress("measuring the deviation"):
            accuracy = _accuracy(job, proto, sizes)
    squashed = behind_softmax(job.scope.output)
    notes = [*job.notes, *([str(squashed)] if squashed else [])]
    made = _Made(files, len(proto.graph.node), seconds, notes, accuracy)
    if as_json:
        print_json(_report(job, model, made))
    else:
        click.echo(_summary(job, made))


def _accuracy(job: Job, made: ModelProto, dims: dict[str, int]) -> Deviation | str:
    """How far float16 is off, or why that could not be measured."""
    try:
        return deviation(job.graph.to_proto(), made, job.request.baseline, dims)
    except CompileError as error:
        return f"not measured: {error}"


def _destination(model: Path, out: Path | None, methods: str) -> Path:
    if not model.name or model.is_dir():
        raise CompileError(f"cannot read '{model}': Is a directory")
    name = f"{model.stem}.{methods}.onnx"
    destination = model.with_name(name) if out is None else out / name if out.is_dir() else out
    # A missing model is reported when it is read.
    if destination.exists() and model.exists() and destination.samefile(model):
        raise CompileError(f"'{destination}' is the source model; write elsewhere (-o FILE)")
    return destination


@dataclass(frozen=True)
class _Made:
    """What was written, and what there is to say about it."""

    files: list[Path]
    nodes: int
    seconds: float
    notes: list[str]
    accuracy: Deviation | str | None


def _report(job: Job, model: Path, made: _Made) -> dict[str, Any]:
    request, found = job.request, made.accuracy
    target, targets = request.target, request.targets
    return {
        "source": str(model),
        "file": str(made.files[-1]),
        "files": [str(path) for path in made.files],
        "bytes": sum(path.stat().st_size for path in made.files),
        "seconds": round(made.seconds, 3),
        "methods": {c.method.name: dict(c.options) for c in request.choices},
        "output": job.scope.output.name,
        "attributed": job.scope.names,
        "target": list(target) if isinstance(target, tuple) else target,
        "targets": list(targets) if isinstance(targets, tuple) else targets,
        "reduce": {str(axis): how for axis, how in request.reduce.items()},
        "normalize": request.normalize,
        "precision": request.precision,
        "deviation": asdict(found) if isinstance(found, Deviation) else found,
        "nodes": made.nodes,
        "inputs": [_interface(t) for t in job.graph.inputs],
        "outputs": [_interface(t) for t in job.graph.outputs],
        "notes": made.notes,
    }


def _interface(tensor: Tensor) -> dict[str, Any]:
    shape = Graph.shape(tensor)
    return {
        "name": tensor.name,
        "dtype": str(Graph.dtype(tensor)),
        "shape": None if shape is None else list(shape),
    }


def _summary(job: Job, made: _Made) -> str:
    graph, request = job.graph, job.request
    size = show_bytes(sum(path.stat().st_size for path in made.files))
    described = [
        *(
            ("method", " ".join([c.method.name, *(f"{k}={v}" for k, v in c.options.items())]))
            for c in request.choices
        ),
        ("explains", f"{_named(job.scope.output)}, {_target(job)}"),
        ("attributes", ", ".join(_named(tensor) for tensor in job.scope.inputs)),
        *((("shows", shown),) if (shown := show_processing(request)) else ()),
        *((("float16", str(made.accuracy)),) if made.accuracy is not None else ()),
        ("inputs", ", ".join(_named(tensor) for tensor in graph.inputs)),
        ("outputs", ", ".join(_named(tensor) for tensor in graph.outputs)),
    ]
    head = f"{made.files[-1]}: {made.nodes} nodes, {size}, {made.seconds:.1f} s"
    return "\n".join([head, rows(described), *(f"Note: {note}" for note in made.notes)])


def _named(tensor: Tensor) -> str:
    shape = Graph.shape(tensor)
    return f"{tensor.name} {'[…]' if shape is None else show_shape(shape)}"


def _target(job: Job) -> str:
    target, targets = job.request.target, job.request.targets
    if targets is not None:
        return f"targets {show_targets(targets)}"
    if target == "input":
        chosen = any(t.name == "target" for t in job.graph.inputs)
        return "target chosen at run time" if chosen else "one value a sample"
    fixed = {"argmax": "the largest entry", "seed": "weighted by a seed given at run time"}
    return fixed.get(str(target), f"target {target}")
