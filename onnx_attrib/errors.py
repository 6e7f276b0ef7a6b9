"""The errors that compiling and running can raise; all derive from :class:`CompileError`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class CompileError(Exception):
    """Something about the model or the request makes the attribution graph impossible.

    The message says what happened, where, and what to do; it is meant to be shown as is.
    """


class ModelError(CompileError):
    """The file is missing, damaged, or not a model that ONNX's checker accepts."""


class OptionError(CompileError):
    """A method, option, tensor name, target or baseline that does not exist or does not fit."""


class RuntimeMissingError(CompileError):
    """ONNX Runtime (or a plotting library) is not installed; the message names the extra."""


WITHOUT = "The method 'occlusion' needs no derivatives."


@dataclass(frozen=True)
class Offence:
    """One node that cannot be handled, and why."""

    op: str
    domain: str
    version: int
    node: str
    reason: str

    def __str__(self) -> str:
        domain = self.domain or "ai.onnx"
        return f"{domain}::{self.op} (version {self.version}), node '{self.node}': {self.reason}"


class UnsupportedOpError(CompileError):
    """Nodes on the way from the attributed tensors to the output that no rule covers.

    ``offences`` lists every one of them, in graph order.
    """

    def __init__(self, offences: Sequence[Offence], advice: str = "") -> None:
        self.offences = tuple(offences)
        count = len(self.offences)
        head = f"{count} node{'s' if count > 1 else ''} cannot be differentiated:"
        lines = [head, *(f"  {offence}" for offence in self.offences)]
        told = any("'occlusion'" in offence.reason for offence in self.offences)
        closing = advice if told else f"{advice} {WITHOUT}".strip()
        if closing:
            lines.append(closing)
        super().__init__("\n".join(lines))


_MOST = 25


def suggest(name: str, choices: Sequence[str]) -> str:
    """A clause naming the closest valid spelling, and the others."""
    close = get_close_matches(name, choices, n=1, cutoff=0.6)
    shown = ", ".join(choices[:_MOST]) + (", …" if len(choices) > _MOST else "")
    if close:
        return f"did you mean '{close[0]}'?" + (f" (of {shown})" if len(choices) <= _MOST else "")
    return f"choose from: {shown}" if choices else "there are none"
