"""Files that appear as a whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from onnx_attrib.errors import CompileError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there."""
    if path.is_dir():
        raise CompileError(f"cannot write '{path}': Is a directory")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise CompileError(f"cannot write '{path}': {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """The same for a text."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


__all__ = ["write_text", "write_whole"]
