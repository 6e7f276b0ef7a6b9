"""Write pools that round their size up the other way where inference contradicts the runtimes.

With ``ceil_mode`` a last window may lie in the padding alone. ONNX's shape inference counts it, its
operators' definitions and the runtimes do not. Rounded down, with as much padding at the end as the
windows reach, everyone agrees.

Precondition: opset 21, shapes inferred. Postcondition of a run that changes nothing: every pool of
known size has the size that is inferred for it, but for windows with gaps that no padding fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto

from onnx_attrib.ir import OPSET, static
from onnx_attrib.writer import Call, Definition, Inexpressible, Rewriter, Writer

_POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
_SETTINGS = ("kernel_shape", "strides", "dilations", "p", "storage_order")


def round_down(model: ModelProto) -> bool:
    """Rewrite the first pool of its kind, in place; the sizes of what follows are then stale."""
    return Rewriter(_First().definition, OPSET).run(model) > 0


@dataclass
class _First:
    """Rewrites one node only: what is inferred behind it is wrong."""

    written: list[str] = field(default_factory=list)

    def definition(self, node: NodeProto) -> Definition | None:
        return self._write if node.op_type in _POOLS and not node.domain else None

    def _write(self, w: Writer, c: Call) -> Sequence[str | None]:
        if self.written or not c.attr("ceil_mode"):
            raise Inexpressible("not now")
        results = rounded_down(w, c)
        self.written.append(c.node.output[0])
        return results


def rounded_down(w: Writer, c: Call) -> Sequence[str | None]:
    """The pool with ``ceil_mode`` off; Inexpressible where it may stay as it is, or has to."""
    dims = c.shape(0)
    size = static(dims[2:]) if dims is not None else None
    if size is None or c.attr("auto_pad") not in ("NOTSET", "VALID"):
        raise Inexpressible("a size that is known at run time only, or that nobody disputes")
    kernel = tuple(c.attr("kernel_shape"))
    rank, ones = len(kernel), (1,) * len(kernel)
    strides, dilations = (tuple(c.attr(n) or ones) for n in ("strides", "dilations"))
    given = c.attr("pads") if c.attr("auto_pad") == "NOTSET" else None
    pads = tuple(given or (0,) * 2 * rank)
    end, disputed = [], False
    for n, k, stride, dilation, before, after in zip(
        size, kernel, strides, dilations, pads[:rank], pads[rank:], strict=True
    ):
        extent = (k - 1) * dilation + 1
        count = -(-(n + before + after - extent) // stride) + 1
        starts = -(-(n + before) // stride)
        disputed = disputed or count > starts
        end.append(max((min(count, starts) - 1) * stride + extent - n - before, 0))
    if not disputed:
        raise Inexpressible("nothing to dispute")
    return _padded(w, c, pads, [*pads[:rank], *end])


def _padded(w: Writer, c: Call, given: Sequence[int], pads: list[int]) -> Sequence[str | None]:
    """The pool with other ``pads``; some of these, or all, as zeros (minima) in the data."""
    kernel = c.attr("kernel_shape")
    data, counted = [0] * len(pads), bool(c.attr("count_include_pad"))
    if counted:
        # Entries past the padding asked for are not counted.
        data = [min(a, b) for a, b in zip(given, pads, strict=True)]
    elif any(pad >= k for pad, k in zip(pads, [*kernel, *kernel], strict=True)):
        if c.node.op_type == "AveragePool" or c.wants(1):
            raise Inexpressible("more padding than the kernel has entries")
        data = pads
    x = c.x(0)
    if any(data):
        kind = c.dtype()
        fill = np.finfo(kind).min if c.node.op_type == "MaxPool" else 0
        half = len(pads) // 2
        x = w.op.Pad(x, [0, 0, *data[:half], 0, 0, *data[half:]], np.array(fill, kind))
    attributes = {name: c.attr(name) for name in _SETTINGS}
    attributes["pads"] = [a - b for a, b in zip(pads, data, strict=True)]
    if c.wants(1):
        return list(w.write("MaxPool", x, outputs=2, **attributes))
    return [w.write(c.node.op_type, x, **attributes)]
