"""Samples and their labels, checked before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array, Port, fit, integers

Data = npt.ArrayLike | Mapping[str, npt.ArrayLike]


@dataclass(frozen=True)
class Samples:
    """What is evaluated: ``inputs``: arrays by input name, the samples along the first axis.

    ``labels``: the class of each, [N]; ``classes``: what classes are called; ``files``: where the
    samples came from; ``names``: what each is called; ``pictures``: each as pixels from 0 to 255,
    [H, W, C], if they are pictures; ``columns``: what the entries of a sample are called;
    ``words``: what token ids stand for.
    """

    inputs: Mapping[str, Any]
    labels: Any = None
    classes: tuple[str, ...] | None = None
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    pictures: tuple[Array, ...] = ()
    columns: tuple[str, ...] = ()
    words: Mapping[int, str] | None = None


def samples_of(data: Data | Samples, labels: Any, ports: Sequence[Port]) -> Samples:
    """Checked samples in the dtypes and shapes that the model takes.

    Raises OptionError for arrays that are missing, unknown, of the wrong shape or dtype, of
    different lengths, fewer than two, or not finite, and for labels that are not one whole number
    for each sample.
    """
    given = data if isinstance(data, Samples) else Samples(_by_name(data, ports))
    names = [port.name for port in ports]
    missing = [name for name in names if name not in given.inputs]
    unknown = [name for name in given.inputs if name not in names]
    if missing or unknown:
        raise OptionError(
            f"the data must hold an array for each of {', '.join(names)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    arrays = {port.name: _fitted(port, given.inputs[port.name]) for port in ports}
    _check_finite(arrays)
    # What has a fixed first axis of one may be the same for all samples.
    counts = {
        port.name: len(arrays[port.name])
        for port in ports
        if arrays[port.name].ndim and not (port.shape[:1] == (1,) and len(arrays[port.name]) == 1)
    }
    counts = counts or dict.fromkeys(arrays, 1)
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise OptionError(f"the inputs hold different numbers of samples ({shown})")
    count = next(iter(counts.values()))
    if count < 2:
        raise OptionError(f"the data holds {count} sample{'' if count else 's'}: give two or more")
    wanted = given.labels if labels is None else labels
    return Samples(
        arrays,
        None if wanted is None else _labels(wanted, count),
        given.classes,
        given.files,
        given.names or tuple(f"sample {k}" for k in range(count)),
        given.pictures,
        given.columns,
        given.words,
    )


def _by_name(data: Data, ports: Sequence[Port]) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    if len(ports) != 1:
        raise OptionError(
            f"the model has {len(ports)} inputs ({', '.join(p.name for p in ports)}): give arrays "
            "by name"
        )
    return {ports[0].name: data}


def _fitted(port: Port, value: Any) -> Array:
    """The samples for an input, whatever batch the model declares."""
    array = np.asarray(value)
    if port.shape and isinstance(port.shape[0], int) and array.ndim and len(array) != port.shape[0]:
        port = Port(port.name, port.dtype, (None, *port.shape[1:]))
    return fit(port, array)


def _check_finite(arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind in "iub":
            continue
        bad = ~np.isfinite(array.astype(np.float64, copy=False))
        if bad.any():
            first = np.argwhere(bad)[0]
            count = int(bad.sum())
            raise OptionError(
                f"the data for '{name}' has {count} entr{'y' if count == 1 else 'ies'} that "
                f"{'is' if count == 1 else 'are'} not finite (NaN or infinite), the first in "
                f"sample {first[0] if len(first) else 0}"
            )


def _labels(value: Any, count: int) -> Array:
    array = np.asarray(value)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    array = integers(array, "labels")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,):
        raise OptionError(
            f"labels have shape {list(array.shape)}; there are {count} samples: give one for each"
        )
    return array


def check_labels(labels: Array, classes: int, output: str) -> None:
    """Raise OptionError for a label that is none of the output's classes."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise OptionError(
            f"label {labels[bad[0]]} of sample {bad[0]} is out of range: output '{output}' has "
            f"{classes} classes (0 to {classes - 1})"
        )


def digest(arrays: Mapping[str, Array]) -> str:
    """SHA-256 of arrays with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


__all__ = ["Data", "Samples", "check_labels", "digest", "samples_of"]
