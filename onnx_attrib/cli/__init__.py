"""The command line, ``onnx-attrib``: one module a command."""

from __future__ import annotations

import click

from onnx_attrib.cli.bench import bench_command
from onnx_attrib.cli.common import Commands, forgiving_streams
from onnx_attrib.cli.compare import compare_command
from onnx_attrib.cli.compile import compile_command
from onnx_attrib.cli.evaluate import evaluate_command
from onnx_attrib.cli.fit_patterns import fit_patterns_command
from onnx_attrib.cli.inspect import inspect_command
from onnx_attrib.cli.methods import methods_command
from onnx_attrib.cli.ops import ops_command
from onnx_attrib.cli.run import run_command
from onnx_attrib.cli.verify import verify_command
from onnx_attrib.version import VERSION


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="onnx-attrib", message="%(prog)s %(version)s")
def main() -> None:
    """Compile an ONNX model into one ONNX graph that computes outputs and attributions.

    \b
    Examples:
      onnx-attrib inspect model.onnx
      onnx-attrib compile model.onnx --method deeplift
      onnx-attrib run model.deeplift.onnx --input photo.png --plot explained.png
    """
    forgiving_streams()


for command in (
    compile_command,
    run_command,
    inspect_command,
    verify_command,
    methods_command,
    ops_command,
    bench_command,
    compare_command,
    evaluate_command,
    fit_patterns_command,
):
    main.add_command(command)

__all__ = ["main"]
