"""To ONNX, by torch's two exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, cast

import onnx
import torch
from torch import Tensor, nn

Exporter = Literal["dynamo", "legacy"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "legacy")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print, warn and log."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export(
    module: nn.Module,
    example: Tensor,
    exporter: Exporter,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> onnx.ModelProto:
    """`module` as ONNX, input "x" and output "y", by torch's dynamo or legacy exporter."""
    module = module.eval()
    stream = io.BytesIO()
    with quiet():
        if exporter == "dynamo":
            # An example of one item would make the exporter take the batch for a constant.
            item = torch.cat([example, example]) if dynamic_batch and len(example) < 2 else example
            shapes = ({0: torch.export.Dim("N")},) if dynamic_batch else None
            program = torch.onnx.export(
                module,
                (item,),
                dynamo=True,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        else:
            torch.onnx.export(
                module,
                (example,),
                cast(Any, stream),  # a file-like object is fine here, whatever the hint
                dynamo=False,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "N"}, "y": {0: "N"}} if dynamic_batch else None,
                opset_version=opset,
            )
            model = onnx.load_from_string(stream.getvalue())
    return model
