"""Files on the command line to samples and labels: arrays, tables, pictures, folders of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib.cli.reading import Loaded, Reader, joined, read_labels, single
from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.evaluation.data import Samples
from onnx_attrib.feeds import Array, Port
from onnx_attrib.images import default_scaling, is_array_file, load_arrays

_PICTURES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .ppm".split())
_LABELS = ("labels", "label", "y", "targets", "target", "classes")
"""What the labels are called in an .npz that holds samples too."""
_RANGE = "Image.NominalPixelRange"


@dataclass
class _Found:
    """What the files hold so far: parts of each input, and labels beside them."""

    parts: dict[str, list[Loaded]] = field(default_factory=dict)
    labels: Any = None
    classes: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    outputs: int | None = None


def read_samples(
    reader: Reader,
    ports: Sequence[Port],
    texts: Sequence[str],
    labels: str | None = None,
    classes: Path | None = None,
    limit: int | None = None,
    outputs: int | None = None,
    words: Path | None = None,
) -> Samples:
    """Samples from ``[NAME=]PATH`` texts, and labels from a file (or a column of a table).

    A path is an array (.npy, .npz), a table (.csv), a picture, or a folder of pictures: in
    subfolders, these are the classes. ``limit``: only the first samples. ``outputs``: how many
    classes the model has, if that is known. ``words``: a file of what token ids stand for.
    """
    open_ports = {port.name: _open(port) for port in ports}
    names = None if classes is None else _names(classes)
    found = _Found(classes=names, outputs=outputs)
    for text in texts:
        name, path = reader.split(text, open_ports)
        if not path.exists():
            raise OptionError(f"cannot read '{path}': No such file or directory")
        for key, part in _read(reader, open_ports, name, path, found, labels).items():
            found.parts.setdefault(key, []).append(part)
    loaded = {name: joined(name, parts) for name, parts in found.parts.items()}
    given = found.labels
    if labels is not None and labels not in found.columns:
        given = read_targets(Path(labels), found.classes)
    first = next(iter(loaded.values()))
    count = len(first.value) if limit is None else min(limit, len(first.value))
    several = len(first.files) == len(first.value)
    return Samples(
        {name: item.value[:count] for name, item in loaded.items()},
        given if given is None or limit is None else np.asarray(given)[:limit],
        found.classes,
        tuple(dict.fromkeys(texts)),
        tuple(Path(file).name for file in first.files[:count])
        if several
        else tuple(f"sample {k}" for k in range(count)),
        first.pixels[:count],
        tuple(name for name in found.columns if name != labels),
        None if words is None else read_labels(words),
    )


def _open(port: Port) -> Port:
    """The input with any number of samples."""
    fixed = len(port.shape) > 1 and isinstance(port.shape[0], int)
    return replace(port, shape=(None, *port.shape[1:])) if fixed else port


def _read(
    reader: Reader,
    ports: Mapping[str, Port],
    name: str | None,
    path: Path,
    found: _Found,
    labels: str | None,
) -> dict[str, Loaded]:
    """What one path holds, by input name."""
    if is_array_file(path):
        arrays: Any = load_arrays(path)
        if isinstance(arrays, dict):
            return _from_archive(reader, ports, name, path, arrays, found)
        port = _only(ports, name, path)
        return {port.name: _array(reader, port, arrays, path)}
    port = _only(ports, name, path)
    if path.is_dir():
        return {port.name: _folder(reader, port, path, found)}
    if path.suffix.lower() in (".csv", ".tsv"):
        return {port.name: _table(reader, port, path, found, labels)}
    return {port.name: reader.picture(port, path)}


def _only(ports: Mapping[str, Port], name: str | None, path: Path) -> Port:
    if name is None and len(ports) != 1:
        raise OptionError(
            f"the model has {len(ports)} inputs ({', '.join(ports)}): say which one '{path}' is "
            f"(NAME={path.name})"
        )
    return ports[name] if name is not None else next(iter(ports.values()))


def _array(reader: Reader, port: Port, array: Array, path: Path) -> Loaded:
    """An array; bytes are scaled as pixels if the model says how."""
    scaled = reader.preset is not None or any(change is not None for change in reader.changes)
    bytes_ = array.dtype == np.uint8 and port.dtype is not None and port.dtype.kind == "f"
    if bytes_ and not scaled and _RANGE in reader.metadata:
        reader = replace(reader, preset=default_scaling(port, reader.metadata, 1).name)
    return reader.array(port, array, path)


# -- archives --------------------------------------------------------------------------------------


def _from_archive(
    reader: Reader,
    ports: Mapping[str, Port],
    name: str | None,
    path: Path,
    arrays: dict[str, Array],
    found: _Found,
) -> dict[str, Loaded]:
    """Arrays by input name, or the one that is no labels; labels beside them are taken."""
    for key in _LABELS:
        if key in arrays and key not in ports and key != name and found.labels is None:
            found.labels = arrays[key]
    if name is None and any(key in ports for key in arrays):
        return {k: _array(reader, ports[k], a, path) for k, a in arrays.items() if k in ports}
    port = _only(ports, name, path)
    if port.name in arrays:
        return {port.name: _array(reader, port, arrays[port.name], path)}
    left = {key: array for key, array in arrays.items() if key not in _LABELS} or arrays
    return {port.name: _array(reader, port, single(path, left, port.name), path)}


# -- pictures --------------------------------------------------------------------------------------


def _folder(reader: Reader, port: Port, folder: Path, found: _Found) -> Loaded:
    """The pictures in a folder by name, or those in its subfolders, which are the classes."""
    files = _pictures(folder)
    if not files:
        kinds = sorted(p for p in folder.iterdir() if p.is_dir() and _pictures(p))
        if all(path.name.isdecimal() for path in kinds):
            classes = {path: int(path.name) for path in kinds}
        else:
            known = list(found.classes or (path.name for path in kinds))
            if found.classes is None and len(known) != (found.outputs or len(known)):
                raise OptionError(
                    f"'{folder}' holds {len(known)} folders and the model has {found.outputs} "
                    "classes: name all of them in order (--classes)"
                )
            unknown = [path.name for path in kinds if path.name not in known]
            if unknown:
                raise OptionError(
                    f"folder '{unknown[0]}' is no class: {suggest(unknown[0], known)}"
                )
            found.classes = tuple(known)
            classes = {path: known.index(path.name) for path in kinds}
        labelled = [(file, classes[kind]) for kind in kinds for file in _pictures(kind)]
        files, found.labels = [file for file, _ in labelled], [label for _, label in labelled]
    if not files:
        raise OptionError(f"'{folder}' holds no pictures, nor folders of them")
    return joined(port.name, [reader.picture(port, file) for file in files])


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and p.is_file())


# -- tables ----------------------------------------------------------------------------------------


def _table(reader: Reader, port: Port, path: Path, found: _Found, labels: str | None) -> Loaded:
    """A table of numbers, a row each sample; a first row of names is told from the rest."""
    head, rows = read_table(path)
    found.columns = head
    if labels is not None and labels in head:
        place = head.index(labels)
        found.labels = [_class(row[place], found.classes, path) for row in rows]
        rows = [row[:place] + row[place + 1 :] for row in rows]
    numbers = [[_number(text, k, path, bool(head)) for text in row] for k, row in enumerate(rows)]
    return reader.array(port, np.array(numbers, np.float64), path)


def read_table(path: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """The names of the columns, if the first row has any that is no number, and the rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(f"cannot read '{path}': {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise OptionError(f"'{path}' is not a text file") from None
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
    if not rows:
        raise OptionError(f"'{path}' is empty")
    for k, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise OptionError(
                f"row {k + 1} of '{path}' has {len(row)} fields, the first {len(rows[0])}"
            )
    named = not all(_is_number(text) for text in rows[0])
    return (tuple(text.strip() for text in rows[0]), rows[1:]) if named else ((), rows)


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _number(text: str, row: int, path: Path, headed: bool) -> float:
    if not _is_number(text):
        raise OptionError(f"'{text}' in row {row + 1 + headed} of '{path}' is not a number")
    return float(text or "nan")


# -- labels ----------------------------------------------------------------------------------------


def read_targets(path: Path, classes: tuple[str, ...] | None) -> Any:
    """Labels, one for each sample: .npy, .npz, or text with a class (number or name) each line."""
    if not path.exists():
        raise OptionError(f"cannot read '{path}': No such file or directory")
    if is_array_file(path):
        arrays = load_arrays(path)
        if isinstance(arrays, dict):
            known = next((arrays[key] for key in _LABELS if key in arrays), None)
            return single(path, arrays) if known is None else known
        return arrays
    head, rows = read_table(path)
    if any(len(row) != 1 for row in rows):
        raise OptionError(f"'{path}' has {len(rows[0])} columns: labels are one")
    texts = [row[0] for row in rows]
    if head and head[0] in (classes or ()):
        texts.insert(0, head[0])
    return [_class(text, classes, path) for text in texts]


def _class(text: str, classes: tuple[str, ...] | None, path: Path) -> int:
    text = text.strip()
    if classes is not None and text in classes:
        return classes.index(text)
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
        return int(number)
    except (ValueError, OverflowError):
        if classes is None:
            advice = "give the names of the classes in order (--classes)"
        else:
            advice = suggest(text, classes)
        raise OptionError(f"label '{text}' in '{path}' is not a class: {advice}") from None


def _names(path: Path) -> tuple[str, ...]:
    found = read_labels(path)
    return tuple(found.get(k, str(k)) for k in range(max(found, default=-1) + 1))


__all__ = ["read_samples", "read_table", "read_targets"]
