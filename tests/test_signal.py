"""Fourier transforms, held against their adjoints on ONNX Runtime's own outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_attrib
from onnx_attrib.rules import signal

from .numeric import Array
from .single import CPU_ONLY, Symbols, batch, check_conserved, check_exact, loaded_operators, single

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def all_but_last(name: str, axis: int) -> str | None:
    """Every axis of the data a symbol, save the one of real and imaginary parts."""
    return f"x{axis}" if name == "x" and axis < 3 else None


def every(name: str, axis: int) -> str | None:
    return f"x{axis}" if name == "x" else None


def scalar(value: int | None) -> Array | None:
    return None if value is None else np.array(value)


@pytest.fixture(params=["matrix", "transform"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both lowerings, whatever the size."""
    if request.param == "transform":
        monkeypatch.setattr(signal, "_LARGEST", 2)
    return str(request.param)


# -- DFT -------------------------------------------------------------------------------------------

SIGNALS = [
    ((2, 6, 2), None),
    ((2, 6, 3, 1), 1),
    ((2, 7, 3, 2), 1),
    ((2, 3, 7, 1), -2),
    ((2, 3, 7, 2), -3),
]
FORMS: list[tuple[tuple[str, ...], Symbols | None]] = [
    (("length", "axis"), None),
    (("length", "axis"), batch),
    (("length", "axis"), all_but_last),
    ((), None),
    ((), every),
]


def transforms(samples: int, parts: int) -> Iterator[tuple[dict[str, int], list[int | None]]]:
    """Attributes that such a signal can have, with lengths."""
    lengths: list[int | None] = [None, samples - 2, samples + 3]
    yield {}, lengths
    yield {"inverse": 1}, lengths
    if parts == 1:
        yield {"onesided": 1}, lengths


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("shape", "axis"), SIGNALS)
def test_dft(shape: tuple[int, ...], axis: int | None) -> None:
    samples, forms = shape[-2 if axis is None else axis], itertools.cycle(FORMS)
    for attributes, lengths in transforms(samples, shape[-1]):
        for length in lengths:
            for _ in range(3):
                fixed, symbols = next(forms)
                inputs = {"x": normal(*shape), "length": scalar(length), "axis": scalar(axis)}
                check_exact(single("DFT", inputs, fixed, symbols, **attributes))


@pytest.mark.parametrize("length", [None, 10, 11, 9])
def test_real_signal_from_half_a_spectrum(length: int | None) -> None:
    inputs = {"x": normal(2, 6, 3, 2), "length": scalar(length), "axis": scalar(1)}
    half = {"inverse": 1, "onesided": 1}
    for symbols in (None, batch):
        check_exact(single("DFT", inputs, ("length", "axis"), symbols, **half))
    if length is None:
        check_exact(single("DFT", inputs, (), every, **half))
        return
    case = single("DFT", inputs, ("length", "axis"), all_but_last, **half)
    with pytest.raises(onnx_attrib.CompileError, match="dft_length of a one-sided inverse"):
        onnx_attrib.compile(case.model, method="gradient")


def test_dft_folds_to_a_matrix_product(tmp_path: Path) -> None:
    inputs = {"x": normal(2, 16, 1), "length": None, "axis": scalar(1)}
    case = single("DFT", inputs, ("axis",), batch, onesided=1)
    operators = loaded_operators(case, tmp_path)
    assert operators.count("DFT") == 1
    assert operators.count("MatMul") == 1
    check_conserved(case)
    check_conserved(case, shared=True)


def test_double_precision() -> None:
    inputs = {"x": RNG.standard_normal((2, 12, 2)), "length": None, "axis": scalar(1)}
    check_exact(single("DFT", inputs, ("axis",)), relative=1e-12)


# -- STFT ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize(("window", "length"), [(True, None), (True, 8), (False, 8)])
def test_stft(parts: int, onesided: int, window: bool, length: int | None) -> None:
    frozen = ("step", "window", "length")
    forms: list[tuple[tuple[str, ...], Symbols | None]] = [
        (frozen, None),
        (frozen, batch),
        (("step", "length"), all_but_last),
        ((), every),
    ]
    for step, (fixed, symbols) in zip((3, 8, 9, 3), forms, strict=True):
        inputs = {
            "x": normal(2, 40, parts),
            "step": scalar(step),
            "window": normal(8) if window else None,
            "length": scalar(length),
        }
        case = single("STFT", inputs, fixed, symbols, onesided=onesided)
        check_exact(case)
        if window and "window" not in fixed:
            check_exact(case, "window")
            check_conserved(case, "x", "window")


def test_stft_is_one_sided_by_default(tmp_path: Path) -> None:
    """ONNX's shape inference takes the default to be the other way."""
    attributes: dict[str, Any] = {}
    inputs = {"x": normal(2, 40, 1), "step": scalar(4), "window": normal(8)}
    case = single("STFT", inputs, ("step", "window"), batch, **attributes)
    assert case.y.shape[2] == 5
    check_exact(case)
    check_conserved(case, shared=True)
    assert sum(op in CPU_ONLY for op in loaded_operators(case, tmp_path)) == 1
