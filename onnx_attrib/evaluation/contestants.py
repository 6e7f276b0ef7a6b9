"""The methods that are compared: compiled for the subject, one graph each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnx_attrib.compiler import compile as compiled
from onnx_attrib.compiler import resolved
from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.evaluation.features import Features
from onnx_attrib.feeds import Array
from onnx_attrib.job import Choice
from onnx_attrib.methods import get as method_named
from onnx_attrib.methods.base import Occluded
from onnx_attrib.model_io import save

CONTROL = "random"
"""The label of the control, which is always there."""
Wanted = str | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Contestant:
    """One method with its options, and the compiled model, a file.

    ``key``: another method, option, model or compiler has another. ``scale``: of the attributions,
    where a feature's whole value stands at each of its entries.
    """

    label: str
    choice: Choice
    file: Path
    key: str
    scale: float = 1.0

    @property
    def signed(self) -> bool:
        """Whether attributions can be negative."""
        return self.choice.method.is_signed(self.choice.options)


@dataclass(frozen=True)
class Reference:
    """x̄: one sample ``mean`` [...], and what methods are given: ``single`` or a ``background``."""

    mean: Array
    single: Any
    background: Any


def choices_of(methods: Wanted | Mapping[str, Choice]) -> dict[str, Choice]:
    """Methods by label.

    ``methods``: a name, names, or by label a name, (name, options), or the options of the method
    that the label names. ``random`` is left out. Raises OptionError for what does not exist.
    """
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Mapping):
        if len(set(methods)) < len(methods):
            raise OptionError("a method is named twice; give mappings from labels to methods")
        methods = {name: name for name in methods}
    found: dict[str, Choice] = {}
    for label, wanted in methods.items():
        if label == CONTROL:
            if wanted != CONTROL:
                raise OptionError(
                    f"'{CONTROL}' is what the control is called: choose another label"
                )
            continue
        if isinstance(wanted, Choice):
            found[label] = wanted
            continue
        if isinstance(wanted, Mapping):
            name, options = label, wanted
        elif isinstance(wanted, str):
            name, options = wanted, {}
        else:
            name, options = wanted
        found.update(resolved({label: (method_named(name), dict(options))}, {}))
    if not found:
        raise OptionError("no method was named")
    return found


def reference_of(
    baseline: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Reference:
    """The baseline of samples of this shape: zeros, a number, an array, or a background [K, …].

    Where it is a background, what takes one reference (perturbation too) has its mean.
    """
    if isinstance(baseline, Mapping):
        if set(baseline) != {name}:
            raise OptionError(
                f"the baseline must hold an array for '{name}'; it holds {', '.join(baseline)}"
            )
        baseline = baseline[name]
    if isinstance(baseline, str):
        if baseline != "zeros":
            raise OptionError(f"baseline '{baseline}' is neither zeros, a number, nor an array")
        baseline = 0.0
    array = np.asarray(baseline)
    if array.dtype.kind not in "fiub":
        raise OptionError(f"the baseline must be real numbers, not {array.dtype}")
    if not np.isfinite(array).all():
        raise OptionError("the baseline has entries that are not finite")
    array = array.astype(dtype)
    if array.ndim == 0:
        return Reference(np.full(shape, array, dtype), float(array), float(array))
    rows = array if array.ndim == len(shape) + 1 else array[None]
    fits = rows.ndim == len(shape) + 1 and all(
        have in (1, want) for have, want in zip(rows.shape[1:], shape, strict=True)
    )
    if not fits or not len(rows):
        raise OptionError(
            f"the baseline has shape {list(array.shape)}; a sample of '{name}' has {list(shape)}"
        )
    rows = np.broadcast_to(rows, (len(rows), *shape))
    mean = rows[0] if len(rows) == 1 else rows.mean(axis=0, dtype=np.float64).astype(dtype)
    return Reference(np.ascontiguousarray(mean), mean[None], np.ascontiguousarray(rows))


def compile_all(
    choices: Mapping[str, Choice],
    source: ModelProto,
    name: str,
    output: str,
    reference: Reference,
    features: Features,
    folder: Path,
) -> Iterator[Contestant]:
    """The methods compiled for the subject, into ``folder``, one after another.

    Perturbation methods without a window of their own take one feature at a time. Raises
    OptionError, naming it, for a method that the model refuses.
    """
    for number, (label, choice) in enumerate(choices.items()):
        choice = _by_feature(choice, features)
        given = reference.background if choice.method.background else reference.single
        try:
            made = compiled(
                source,
                {choice.method.name: choice.options},
                inputs=[name],
                output=output,
                baseline=given,
            )
        except CompileError as error:
            raise OptionError(f"method '{label}' is refused: {_one_line(error)}") from None
        files = save(made, folder / f"{number}.onnx")
        yield Contestant(label, choice, files[-1], _key(files), _scale(choice, features))


def _key(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _scale(choice: Choice, features: Features) -> float:
    """Occlusion of one feature gives the change at each of its entries."""
    perturbs = choice.method.perturbs
    how = None if perturbs is None else perturbs(choice.options)
    whole = isinstance(how, Occluded) and how.window == features.window
    return 1.0 / math.prod(features.window) if whole else 1.0


def _by_feature(choice: Choice, features: Features) -> Choice:
    if choice.method.perturbs is None or choice.options.get("window") != 1 or not features.grouped:
        return choice
    return replace(choice, options={**choice.options, "window": features.window})


def _one_line(error: CompileError) -> str:
    first, *rest = [text.strip() for text in str(error).splitlines()]
    return " ".join([first, *rest[:1], *(["…"] if len(rest) > 1 else [])])


__all__ = [
    "CONTROL",
    "Contestant",
    "Reference",
    "Wanted",
    "choices_of",
    "compile_all",
    "reference_of",
]
