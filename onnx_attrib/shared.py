"""Sessions that several explainers of one file share.

An entry is a weak reference: a session lives as long as an explainer that uses it. A file that
changed, or weights beside it that did, make a new session.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import onnx

from onnx_attrib.model_io import external_files

Stamp = tuple[tuple[str, int, int, int], ...]
"""Of each file its path, inode, size and time."""

_LIMIT = 32


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stamp: Stamp = ()
        self.session: Callable[[], Any] = lambda: None


_slots: OrderedDict[tuple[str, str], _Slot] = OrderedDict()
_lock = threading.Lock()


def shared(path: str | os.PathLike[str], settings: str, make: Callable[[], Any]) -> Any:
    """The session of a file with these settings: one that is in use, or a new one from ``make``.

    At most 32 are remembered; the one asked for longest ago is forgotten first.
    """
    key = os.path.realpath(path), settings
    with _lock:
        slot = _slots.setdefault(key, _Slot())
        _slots.move_to_end(key)
        while len(_slots) > _LIMIT:
            _slots.popitem(last=False)
    with slot.lock:
        session = slot.session()
        if session is None or slot.stamp != _stamp([name for name, *_ in slot.stamp]):
            before = _stamp([key[0]])
            session = make()
            slot.session = weakref.ref(session)
            beside = [] if not before else _beside(key[0])
            slot.stamp = before + _stamp(beside)
        return session


def _stamp(paths: list[str]) -> Stamp:
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _beside(path: str) -> list[str]:
    """The files that a model keeps its weights in."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") < 0:  # the key that every such tensor has
            return []
    model = onnx.load(path, load_external_data=False)
    return [os.path.join(os.path.dirname(path), name) for name in sorted(external_files(model))]


__all__ = ["shared"]
