"""What an evaluation has found so far, kept so that it can go on after an interruption.

A folder ``state`` holds ``settings.json`` and one .npz a unit of work. A unit appears as a whole
or not at all, and is read back instead of being computed again.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array
from onnx_attrib.whole import write_text, write_whole

Unit = dict[str, Array]
STATE = "state"


class Store:
    """Units by key, in a folder or (``folder`` None) in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / STATE
        self._held: dict[str, Unit] = {}

    def open(self, settings: Mapping[str, Any], fresh: bool = False) -> None:
        """Begin, or go on with what is there.

        Raises OptionError if that was found with other settings, unless ``fresh`` throws it away.
        """
        if self._folder is None:
            return
        if fresh and self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                held = {}
            if not isinstance(held, dict):
                held = {}
            changed = [key for key in wanted if held.get(key, ...) != wanted[key]]
            if changed:
                told = "; ".join(_change(key, held.get(key), wanted[key]) for key in changed[:4])
                raise OptionError(
                    f"'{self._folder.parent}' holds an evaluation of something else ({told}): "
                    "start it anew (--fresh), or choose another folder (-o)"
                )
        else:
            text = json.dumps(wanted, indent=1, sort_keys=True)
            write_text(path, text)

    def get(self, key: str) -> Unit | None:
        """A finished unit, or None."""
        if self._folder is None:
            return self._held.get(key)
        try:
            with np.load(self._folder / f"{key}.npz", allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def put(self, key: str, unit: Unit) -> None:
        """Keep a finished unit."""
        if self._folder is None:
            self._held[key] = unit
            return

        arrays: dict[str, Any] = dict(unit)

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        write_whole(self._folder / f"{key}.npz", write)


def _change(key: str, held: Any, wanted: Any) -> str:
    if isinstance(wanted, str) and len(wanted) > 20:
        return f"another {key}"
    return f"{key} {held}, now {wanted}"


__all__ = ["STATE", "Store", "Unit"]
