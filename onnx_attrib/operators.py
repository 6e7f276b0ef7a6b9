"""What happens to each operator that ONNX knows, read off the rule table: ``onnx-attrib ops``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import NodeProto
from onnx.defs import OpSchema

from onnx_attrib import kernels, newer, rules
from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.ir import OPSET
from onnx_attrib.passes import lower, quantized, sequences
from onnx_attrib.passes.normalize import NEWEST

KINDS = (
    "linear",
    "elementwise",
    "bilinear",
    "max-like",
    "composite",
    "structured",
    "lowered",
    "barrier",
    "no rule",
)
"""The classes, in the order in which the table shows them."""

_CLASSES: dict[type[rules.Rule], str] = {
    rules.Linear: "linear",
    rules.Elementwise: "elementwise",
    rules.Bilinear: "bilinear",
    rules.MaxLike: "max-like",
    rules.Composite: "composite",
    rules.Structured: "structured",
    rules.Barrier: "barrier",
}
_ML = "ai.onnx.ml"
_NONE = "—"


@dataclass(frozen=True)
class OperatorInfo:
    """One operator of ai.onnx (``domain`` empty) or ai.onnx.ml.

    ``kind``: its class when its first input is attributed (all inputs of those that take any
    number), one of :data:`KINDS`; "lowered": other operators take its place before the sweep.
    ``classes``: all that it may have, depending on the attributed inputs. ``versions``: the opsets
    that changed it. ``gradient`` and ``conservation`` (under DeepLIFT): "exact", with a condition
    where there is one, "zero" through a barrier, "none" without a rule. ``cuda``: where ONNX
    Runtime's CUDA provider puts it at opset 21, for float32: "cuda", "cpu", "inlined" (its
    definition runs in its place), or None where it does not exist there. ``note``: how it is
    lowered, or why it is refused.
    """

    name: str
    domain: str
    kind: str
    classes: tuple[str, ...]
    versions: tuple[int, ...]
    gradient: str
    conservation: str
    cuda: str | None
    note: str = ""

    @property
    def label(self) -> str:
        """The name, with its domain if that is not ONNX's own."""
        return f"{self.domain}::{self.name}" if self.domain else self.name

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON types."""
        return asdict(self)


def operators(names: Sequence[str] = ()) -> list[OperatorInfo]:
    """Every operator of ai.onnx up to opset 26 and of ai.onnx.ml, or those of ``names``.

    A name may have its domain before it (``ai.onnx.ml::Scaler``). Raises OptionError for one that
    does not exist, with the nearest spelling.
    """
    history: dict[tuple[str, str], list[OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if (schema.domain == "" and schema.since_version <= NEWEST) or schema.domain == _ML:
            history.setdefault((schema.domain, schema.name), []).append(schema)
    for schemas in history.values():
        schemas.sort(key=lambda schema: int(schema.since_version))
    known = {f"{d}::{n}" if d else n: (d, n) for d, n in sorted(history)}
    if not names:
        return [_describe(history[key]) for key in known.values()]
    return [_describe(history[_found(name, known)]) for name in dict.fromkeys(names)]


def _found(name: str, known: dict[str, tuple[str, str]]) -> tuple[str, str]:
    plain = name.removeprefix("ai.onnx::")
    spelled = {label.lower(): key for label, key in known.items()}
    spelled = {**{key[1].lower(): key for key in known.values()}, **spelled}
    key = known.get(plain) or spelled.get(plain.lower())
    if key is None:
        raise OptionError(f"ONNX has no operator '{name}': {suggest(plain, list(known))}")
    return key


def _describe(schemas: Sequence[OpSchema]) -> OperatorInfo:
    newest = schemas[-1]
    name, domain = newest.name, newest.domain
    rows = [row for row in rules.table() if (row.domain, row.op) == (domain, name)]
    refused = next((row.refused for row in rows if row.refused), "")
    how = _lowered(newest, bool(rows))
    kind = "lowered" if how else "no rule" if refused or not rows else _kind(newest)
    if kind == "no rule" and not refused and newest.max_input == 0:
        # Nothing goes in, so nothing flows back.
        kind = "barrier"
    caveats = [row.caveat for row in rows if row.caveat]
    status = {"barrier": "zero", "no rule": "none"}.get(kind, "exact")
    return OperatorInfo(
        name=name,
        domain=domain,
        kind=kind,
        classes=tuple(dict.fromkeys(_CLASSES[type(row)] for row in rows)) or (kind,),
        versions=tuple(int(schema.since_version) for schema in schemas),
        gradient="straight through" if name in quantized.STRAIGHT and not domain else status,
        conservation="; ".join(dict.fromkeys(caveats)) or {"exact": "exact"}.get(status, _NONE),
        cuda=_cuda(name, domain),
        note=how or refused,
    )


def _lowered(schema: OpSchema, has_rows: bool) -> str:
    """What takes the operator's place before the sweep; empty if it stays."""
    if schema.domain:
        return ""
    if schema.deprecated:
        return "replaced by the operator that took its place"
    node = NodeProto(op_type=schema.name)
    if schema.name in newer.DEFINITIONS:
        return "written with operators of opset 21"
    holds_graph = any(a.type == OpSchema.AttrType.GRAPH for a in schema.attributes.values())
    if lower.definition(node) is not None and not holds_graph:
        return "written out by its definition in ONNX"
    if schema.name in sequences.REWRITTEN and not has_rows:
        return "removed where the elements are known at compile time"
    return ""


def _kind(schema: OpSchema) -> str:
    variadic = OpSchema.FormalParameterOption.Variadic
    several = bool(schema.inputs) and schema.inputs[0].option == variadic
    held = rules.blocked(schema.name, schema.domain)
    active = tuple(i for i in range(2 if several else 1) if i not in held)
    row = rules.lookup(schema.name, schema.domain, active)
    return "no rule" if row is None else _CLASSES[type(row)]


def _cuda(name: str, domain: str) -> str | None:
    opset = onnx.defs.onnx_ml_opset_version() if domain == _ML else OPSET
    version = kernels.since_version(name, domain, opset)
    if version is None:
        return None
    schema = onnx.defs.get_schema(name, opset, domain)
    place = kernels.placement(name, domain, opset, _floats(schema))
    if place != "none":
        return place
    if schema.has_function or schema.has_context_dependent_function:
        return "inlined"
    # A Constant is folded away.
    return place if schema.max_input else None


def _floats(schema: OpSchema) -> dict[str, str]:
    """float32 for the type of the first output, or of the first input, where that may be."""
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for formals in (schema.outputs, schema.inputs):
        if formals and "tensor(float)" in allowed.get(formals[0].type_str, ()):
            return {formals[0].type_str: "tensor(float)"}
    return {}


__all__ = ["KINDS", "OperatorInfo", "operators"]
