"""The methods as data, for people and programs: ``onnx_attrib.methods()``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnx_attrib.methods import METHODS, Method


@dataclass(frozen=True)
class OptionInfo:
    """One option: ``choices`` is empty for numbers; ``minimum`` is None where there is none."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    required: bool = False


@dataclass(frozen=True)
class MethodInfo:
    """One attribution method.

    ``formula``: g(z), what takes the place of f'(z) at a nonlinearity. ``complete``: attributions
    sum to S(x) − S(x̄). ``needs_reference``: there is a baseline x̄. ``signed``: attributions can
    be negative.
    """

    name: str
    summary: str
    formula: str
    paper: str
    complete: bool
    needs_reference: bool
    signed: bool
    options: tuple[OptionInfo, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON types."""
        return asdict(self)


def methods() -> list[MethodInfo]:
    """Every method that :func:`onnx_attrib.compile` knows, with its options."""
    return [describe(method) for method in METHODS.values()]


def describe(method: Method) -> MethodInfo:
    """One method's description."""
    return MethodInfo(
        name=method.name,
        summary=method.summary,
        formula=method.g,
        paper=method.paper,
        complete=method.complete,
        needs_reference=method.needs_reference,
        signed=method.is_signed(method.defaults),
        options=tuple(
            OptionInfo(o.name, o.default, o.help, o.choices, o.minimum, o.required)
            for o in method.options
        ),
    )
