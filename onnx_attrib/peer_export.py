"""Captum's attribution as an ONNX graph, for comparison: what torch itself can export.

torch traces the call of Captum with the backward pass in it (``make_fx``), exports what it traced,
and ONNX Runtime runs that as it runs the compiled model. torch lacks an ONNX spelling of a few
backward operators; those of networks with weights that are constants are spelled here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from onnx import ModelProto

from onnx_attrib.feeds import Array, line
from onnx_attrib.job import Choice
from onnx_attrib.peers import Captum, Unsuited, required
from onnx_attrib.session import onnxruntime, open_session, session_options

CPU = ["CPUExecutionProvider"]


class Exported(Captum):
    """As :class:`Captum`, but each call runs the exported graph in ONNX Runtime, on the CPU."""

    name = "captum-export"

    def __init__(self, model: ModelProto, module: Any, threads: int) -> None:
        super().__init__(model, module, threads)
        required("onnxscript", "onnxscript")
        self._threads = threads

    def call(
        self,
        choice: Choice,
        feeds: Mapping[str, Array],
        attributed: Sequence[str],
        target: Array | None,
        baseline: Any,
    ) -> Callable[[], list[Array]]:
        """See :meth:`Captum.call`."""
        attribute, xs = self._attribution(choice, feeds, attributed, target, baseline)
        try:
            graph = _exported(self._torch, attribute, xs)
            options = session_options(onnxruntime(), self._threads)
            session = open_session(onnxruntime(), graph, CPU, "captum's export", options=options)
            names = [port.name for port in session.get_inputs()]
            held = dict(zip(names, feeds.values(), strict=True))
            session.run(None, held)
        except Exception as error:  # torch's and Captum's own, of many kinds
            raise Unsuited(
                f"captum's {choice.method.name} is not exported: {line(error)}"
            ) from None
        return lambda: list(session.run(None, held))


def _exported(torch: Any, attribute: Callable[..., Any], xs: tuple[Any, ...]) -> bytes:
    """The trace of a function of tensors as the bytes of a model."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with _quiet():
        with sdpa_kernel(SDPBackend.MATH):
            traced = make_fx(attribute, decomposition_table=_spellings(torch))(*xs)
        program = torch.onnx.export(traced, xs, dynamo=True, verbose=False)
    return bytes(program.model_proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter has to say on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- backward operators ----------------------------------------------------------------------------


def _spellings(torch: Any) -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten

    def each(value: Sequence[int], count: int) -> list[int]:
        return list(value) * (count if len(value) == 1 else 1)

    def convolution(
        m: Any,
        x: Any,
        weight: Any,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        wanted: Sequence[bool],
    ) -> tuple[Any, None, None]:
        """The transposed convolution."""
        if transposed or wanted[1] or wanted[2]:
            raise Unsuited("the gradient of a convolution whose weights vary has no export")
        size, kernel = x.shape[2:], weight.shape[2:]
        stride, padding, dilation = (each(v, len(size)) for v in (stride, padding, dilation))
        rest = [
            (n + 2 * pad - gap * (k - 1) - 1) % step
            for n, k, step, pad, gap in zip(size, kernel, stride, padding, dilation, strict=True)
        ]
        back = aten.convolution(m, weight, None, stride, padding, dilation, True, rest, groups)
        return back, None, None

    def max_pool(m: Any, x: Any, *arguments: Any) -> Any:
        """Every entry added where it came from."""
        where, axes = arguments[-1], -2
        flat = torch.zeros_like(x).flatten(axes)
        return flat.scatter_add(-1, where.flatten(axes), m.flatten(axes)).reshape(x.shape)

    def average_pool(
        m: Any,
        x: Any,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil: bool,
        counts_padding: bool,
        divisor: int | None,
    ) -> Any:
        """The transposed convolution by ones, of shares."""
        if ceil:
            raise Unsuited("the gradient of an average pool with ceil_mode has no export")
        kernel, padding = each(kernel, 2), each(padding, 2)
        stride = each(stride, 2) if stride else kernel
        counts: Any = divisor or prod(kernel)
        if not counts_padding and not divisor:
            there = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
            counts = counts * aten.avg_pool2d(there, kernel, stride, padding, False, True)
        channels = x.shape[1]
        ones = torch.ones((channels, 1, *kernel), dtype=x.dtype)
        rest = [
            (n + 2 * pad - k) % step
            for n, k, step, pad in zip(x.shape[2:], kernel, stride, padding, strict=True)
        ]
        return aten.convolution(
            m / counts, ones, None, stride, padding, [1, 1], True, rest, channels
        )

    return {
        aten.convolution_backward.default: convolution,
        aten.max_pool2d_with_indices_backward.default: max_pool,
        aten.avg_pool2d_backward.default: average_pool,
    }


__all__ = ["Exported"]
