"""Runs of a session: on the host or where its tensors are, whole or in parts, or captured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx_attrib.batches import ShortageError, in_parts, is_shortage
from onnx_attrib.device import Captured, Device, Resident, device_of, run_bound
from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.feeds import Array, Port, line
from onnx_attrib.model_io import Source
from onnx_attrib.session import array_of, open_session, run_session, session_options
from onnx_attrib.shared import shared

Feeds = dict[str, Array | Resident]


@dataclass
class Runner:
    """A session with the batch axes of its inputs and outputs.

    ``batch``: what the batch axis is called in the shapes of ``inputs`` and ``results``; None where
    its size is fixed. ``baselines``: inputs that have as many samples as another input, or one, by
    that input. ``limit``: the most samples of one run. ``halves``: whether a batch that memory does
    not suffice for is halved.
    """

    session: Any
    inputs: Sequence[Port]
    results: Sequence[Port]
    batch: str | None
    baselines: Mapping[str, Port]
    limit: int | None
    halves: bool
    captured: Captured | None = None
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [port.name for port in self.results]

    def on_device(self, feeds: Feeds) -> list[Any]:
        """The outputs as OrtValues on the session's device."""
        return self._run(feeds, device_of(self.session))

    def on_host(self, feeds: Feeds) -> list[Array]:
        """The outputs as arrays, in parts where the batch is too large."""
        axes = self._axes(feeds)
        if not axes:
            return self._run(feeds)
        count = max(feeds[name].shape[axis] for name, axis in axes.items())
        size = min(self.limit or count, count) or 1
        joined = [(port.name, self._axis(port)) for port in self.results]
        found, went = in_parts(self._run, feeds, axes, joined, size, self.halves)
        if went < size:
            self.limit = went  # what memory sufficed for
        return found

    def _run(self, feeds: Feeds, device: Device | None = None) -> list[Any]:
        try:
            if self.captured is not None:
                found = self.captured.run(feeds)
            elif device is None and not _any_resident(feeds):
                return run_session(self.session, self.names, feeds)
            else:
                found = run_bound(self.session, self.names, feeds, device or ("cpu", 0))
            return found if device is not None else [array_of(value) for value in found]
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            kind = ShortageError if is_shortage(error) else CompileError
            raise kind(f"ONNX Runtime failed to run the model: {line(error)}") from None

    def _axes(self, feeds: Feeds) -> dict[str, int]:
        """The batch axis of each input that has one; none where the batch cannot be split."""
        found = {p.name: k for p in self.inputs if (k := self._axis(p)) is not None}
        if not found or self.captured is not None or _any_resident(feeds):
            return {}
        count = next(feeds[name].shape[axis] for name, axis in found.items())
        for name, port in self.baselines.items():
            axis = found.get(name)
            if axis is not None and feeds[port.name].shape[axis] == count != 1:
                found[port.name] = axis
        return found

    def _axis(self, port: Port) -> int | None:
        named = self.batch is not None and self.batch in port.shape
        return port.shape.index(self.batch) if named else None


def _any_resident(feeds: Feeds) -> bool:
    return any(isinstance(value, Resident) for value in feeds.values())


def opened(
    ort: Any,
    model: Source,
    providers: list[Any],
    name: str,
    threads: int | None,
    given: Any,
    captures: bool,
) -> Any:
    """A session of its own, or the one that explainers of this file share.

    ``given``: session options of the user's. ``captures``: the session will hold a CUDA graph.
    """
    if given is not None and threads is not None:
        raise OptionError("give threads or session_options, not both")
    options = session_options(ort, threads) if given is None else given

    def make() -> Any:
        return open_session(ort, model, providers, name, options=options)

    if given is not None or captures or not isinstance(model, str | os.PathLike):
        return make()
    return shared(model, repr((providers, threads)), make)


__all__ = ["Feeds", "Runner", "opened"]
