"""Operators that ONNX's reference evaluator lacks or gets wrong, restated slowly in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, np.dtype[Any]]


class _Stated(OpRun):
    """Reads what the node states; defaults are written where they are used."""

    op_domain = ""

    def stated(self, name: str, default: Any) -> Any:
        for attribute in self.onnx_node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default


class Celu(_Stated):
    """The evaluator's own has constants in float32."""

    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        alpha = self.stated("alpha", 1.0)
        return (np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(x / alpha)),)


class GlobalLpPool(_Stated):
    """The evaluator has none."""

    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        p = self.stated("p", 2)
        return (np.sum(np.abs(x) ** p, axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


class LpPool(_Stated):
    """The evaluator's own fails for kernels with an axis of size 1."""

    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        p, kernel = self.stated("p", 2), self.stated("kernel_shape", ())
        ones = [1] * len(kernel)
        strides, dilations = self.stated("strides", ones), self.stated("dilations", ones)
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        counts, begin, end = [], [], []
        given = self.stated("pads", [0] * 2 * len(kernel))
        mode = self.stated("auto_pad", "NOTSET")
        for j, size in enumerate(x.shape[2:]):
            before, after = (0, 0) if mode == "VALID" else (given[j], given[j + len(kernel)])
            if mode.startswith("SAME"):
                count = -(-size // strides[j])
                total = max((count - 1) * strides[j] + extent[j] - size, 0)
                half, rest = total // 2, total - total // 2
                before, after = (rest, half) if mode == "SAME_LOWER" else (half, rest)
            room = size + before + after - extent[j]
            count = room // strides[j] + 1
            if self.stated("ceil_mode", 0):
                count = -(-room // strides[j]) + 1
                count -= (count - 1) * strides[j] >= size + before
            counts.append(count)
            begin.append(before)
            end.append(after + strides[j])
        padded = np.pad(np.abs(x) ** p, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
        total = np.zeros((*x.shape[:2], *counts))
        for offset in itertools.product(*map(range, kernel)):
            total += padded[(..., *_read(offset, dilations, strides, counts))]
        return (np.asarray(total ** (1 / p), x.dtype),)


def _read(
    offset: Sequence[int], dilations: Sequence[int], strides: Sequence[int], counts: Sequence[int]
) -> list[slice]:
    """The entries that one entry of the kernel reads, window by window."""
    starts = [o * d for o, d in zip(offset, dilations, strict=True)]
    return [
        slice(start, start + stride * (count - 1) + 1, stride)
        for start, stride, count in zip(starts, strides, counts, strict=True)
    ]


class ConvTranspose(_Stated):
    """The evaluator's own fails for groups with auto_pad."""

    def _run(self, x: Array, w: Array, b: Array | None = None, **_: Any) -> tuple[Array]:
        kernel, size, group = w.shape[2:], x.shape[2:], self.stated("group", 1)
        ones = [1] * len(kernel)
        strides, dilations = self.stated("strides", ones), self.stated("dilations", ones)
        more = self.stated("output_padding", [0] * len(kernel))
        pads = self.stated("pads", [0] * 2 * len(kernel))
        asked, mode = self.stated("output_shape", ()), self.stated("auto_pad", "NOTSET")
        full, starts, wanted = [], [], []
        for j, (k, n, stride) in enumerate(zip(kernel, size, strides, strict=True)):
            full.append((n - 1) * stride + (k - 1) * dilations[j] + 1 + more[j])
            begin, end = (0, 0) if mode == "VALID" else (pads[j], pads[j + len(kernel)])
            if asked or mode.startswith("SAME"):
                surplus = max(full[j] - (asked[j - len(kernel)] if asked else n * stride), 0)
                half = surplus // 2
                upper = mode == "SAME_UPPER"
                begin, end = (half, surplus - half) if upper else (surplus - half, half)
            starts.append(begin)
            wanted.append(asked[j - len(kernel)] if asked else full[j] - begin - end)
        room = [max(f, a + n) for f, a, n in zip(full, starts, wanted, strict=True)]
        parts = []
        for rows, weights in zip(np.split(x, group, 1), np.split(w, group, 0), strict=True):
            total = np.zeros((x.shape[0], w.shape[1], *room))
            for offset in itertools.product(*map(range, kernel)):
                share = np.einsum("nc...,cm->nm...", rows, weights[(..., *offset)])
                total[(..., *_read(offset, dilations, strides, size))] += share
            parts.append(total)
        whole = np.concatenate(parts, 1)
        cut = [slice(a, a + n) for a, n in zip(starts, wanted, strict=True)]
        y = whole[(..., *cut)]
        return (np.asarray(y if b is None else y + b.reshape(-1, *ones), x.dtype),)


class MeanVarianceNormalization(_Stated):
    """The evaluator's own has a constant in float32."""

    def _run(self, x: Array, **_: Any) -> tuple[Array]:
        axes = tuple(self.stated("axes", [0, 2, 3]))
        centred = x - x.mean(axes, keepdims=True)
        return (centred / (np.sqrt(np.mean(centred**2, axes, keepdims=True)) + 1e-9),)


class Pad(_Stated):
    """The evaluator's own takes no negative pads."""

    def _run(
        self,
        x: Array,
        pads: Any = None,
        fill: Any = None,
        axes: Any = None,
        mode: str = "constant",
        value: float = 0.0,
    ) -> tuple[Array]:
        axes = range(x.ndim) if axes is None else [int(k) % x.ndim for k in axes]
        widths = [(0, 0)] * x.ndim
        for k, axis in enumerate(axes):
            widths[axis] = int(pads[k]), int(pads[k + len(pads) // 2])
        if mode == "constant":
            number = value if fill is None else np.asarray(fill).item()
            grown = np.pad(
                x, [(max(a, 0), max(b, 0)) for a, b in widths], constant_values=number or 0
            )
        else:
            grown = np.pad(x, widths, mode=mode)
        sizes = zip(widths, grown.shape, strict=True)
        cut = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in sizes]
        return (np.asarray(grown[tuple(cut)], x.dtype),)


OPERATORS = [Celu, ConvTranspose, GlobalLpPool, LpPool, MeanVarianceNormalization, Pad]
