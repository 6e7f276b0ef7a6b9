"""Where ONNX Runtime runs an operator: the kernels that a release registers, as data.

``data/kernels-<version>.json`` holds ``{"onnxruntime": version, "sets": [[type, …], …],
"kernels": {domain: {operator: {provider: [[first, last, {parameter: set}], …]}}}, "host":
{"inputs": {operator: [index, …]}, "outputs": …}}``: for the providers CUDA and CPU the opset
versions of each registration (last null: open) and, for each of its type parameters, the index of
the set of types that it takes; and what the CUDA kernels of ONNX's operators read and write in the
host's memory. :func:`compact` makes it from the list of ONNX Runtime's own registrations.

The table knows operators, versions and types. What the CUDA provider declines for its attributes (a
GRU with linear_before_reset=0), which the registrations do not say, is :func:`declined`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import combinations
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper

VERSION = "1.31.1"
"""The ONNX Runtime release that the table was read from."""
OPEN = 2**31 - 1
"""How ONNX Runtime spells "no last version"."""
Place = Literal["cuda", "cpu", "none"]

_PROVIDERS = {"CUDAExecutionProvider": "CUDA", "CPUExecutionProvider": "CPU"}
_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")


def placement(op: str, domain: str, opset: int, dtypes: Mapping[str, Any] | None = None) -> Place:
    """Which provider of a CUDA session runs a node: CUDA where it has a kernel, else the CPU.

    ``opset``: the version of ``domain`` that the model imports. ``dtypes``: the types that the
    node's type parameters stand for (:func:`bound`), as dtypes or as ONNX writes them; a parameter
    that is left out fits every kernel. ``"none"``: neither has a kernel, or the operator does not
    exist at that version.
    """
    version = since_version(op, domain, opset)
    if version is None:
        return "none"
    kernels = table()["kernels"].get(domain, {}).get(op, {})
    given = {parameter: _type_name(dtype) for parameter, dtype in (dtypes or {}).items()}
    for provider, place in (("CUDA", "cuda"), ("CPU", "cpu")):
        if any(_matches(kernel, version, given) for kernel in kernels.get(provider, ())):
            return "cuda" if place == "cuda" else "cpu"
    return "none"


def declined(
    op: str, domain: str, attribute: Callable[[str], Any], given: Sequence[bool]
) -> str | None:
    """Why the CUDA provider leaves a node to the CPU although it has a kernel, or None.

    ``attribute``: an attribute's value by name, with its default. ``given``: which inputs are.
    """
    if domain:
        return None
    if op in _ACTIVATIONS:
        return _declined_recurrence(op, attribute, given)
    if op == "ConvTranspose":
        pads = list(attribute("pads") or ())
        if _spelled(attribute("auto_pad")).startswith("same"):
            return "auto_pad SAME"
        return "uneven pads" if pads[: len(pads) // 2] != pads[len(pads) // 2 :] else None
    if op in ("ArgMax", "ArgMin") and attribute("select_last_index"):
        return "select_last_index"
    if op == "Cast" and attribute("to") == onnx.TensorProto.STRING:
        return "text"
    return None


_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


def _declined_recurrence(
    op: str, attribute: Callable[[str], Any], given: Sequence[bool]
) -> str | None:
    for name in ("activation_alpha", "activation_beta", "clip"):
        if attribute(name) is not None:
            return name
    names = [_spelled(name) for name in attribute("activations") or ()]
    if names != list(_ACTIVATIONS[op] * 2)[: len(names)]:
        return f"activations {', '.join(names)}"
    if op == "LSTM" and (attribute("input_forget") or given[7:8] == [True]):
        return "input_forget" if attribute("input_forget") else "peepholes"
    if op == "GRU" and not attribute("linear_before_reset"):
        return "linear_before_reset=0"
    return None


def _spelled(value: Any) -> str:
    return (value.decode() if isinstance(value, bytes) else str(value)).lower()


def host_inputs(op: str, domain: str = "") -> frozenset[int]:
    """The inputs that an operator's CUDA kernel reads in the host's memory: sizes, axes, counts."""
    return frozenset(() if domain else table()["host"]["inputs"].get(op, ()))


def host_outputs(op: str, domain: str = "") -> frozenset[int]:
    """The outputs that an operator's CUDA kernel writes in the host's memory."""
    return frozenset(() if domain else table()["host"]["outputs"].get(op, ()))


def since_version(op: str, domain: str, opset: int) -> int | None:
    """The version that an operator has had since its last change up to ``opset``.

    None if it does not exist there. Operators of other domains than ONNX's have version 1.
    """
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return 1 if domain == "com.microsoft" else None
    return None if schema.deprecated else int(schema.since_version)


def bound(
    op: str, domain: str, opset: int, inputs: Sequence[Any], outputs: Sequence[Any] = ()
) -> dict[str, Any]:
    """The dtypes of a node's inputs and outputs by type parameter; None for unknown or absent."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    found: dict[str, Any] = {}
    for formals, given in ((schema.inputs, inputs), (schema.outputs, outputs)):
        for i, dtype in enumerate(given):
            if dtype is None or not formals:
                continue
            formal = formals[min(i, len(formals) - 1)]
            varied = formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            if not (varied and not formal.is_homogeneous):
                # Kernels name a fixed type by the input.
                fixed = "(" in formal.type_str
                found.setdefault(formal.name if fixed else formal.type_str, dtype)
    return found


@cache
def table() -> Mapping[str, Any]:
    """The data file."""
    file = resources.files("onnx_attrib") / "data" / f"kernels-{VERSION}.json"
    result: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _matches(kernel: Sequence[Any], version: int, dtypes: Mapping[str, str]) -> bool:
    """ONNX Runtime's rule: an open registration serves the version it starts at, no later one."""
    first, last, parameters = kernel
    if first != version and not (first < version and last is not None and last >= version):
        return False
    sets = table()["sets"]
    return all(
        parameter not in dtypes or dtypes[parameter] in sets[index]
        for parameter, index in parameters.items()
    )


def _type_name(dtype: Any) -> str:
    """A type as the table writes it: ``float``, ``int64``, ``seq(float)``."""
    if isinstance(dtype, str) and "(" in dtype:
        return _short(dtype)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return str(onnx.TensorProto.DataType.Name(element)).lower()


def _short(name: str) -> str:
    return re.sub(r"tensor\((\w+)\)", r"\1", name)


# -- making the table ------------------------------------------------------------------------------


def compact(
    registrations: Iterable[Mapping[str, Any]],
    version: str,
    host: Mapping[str, Mapping[str, Sequence[int]]],
) -> dict[str, Any]:
    """The table from ONNX Runtime's registrations, and what its kernels keep in host memory.

    Each is ``{"domain", "op", "prov", "ver": [first, last], "tc": {parameter: [type, …]}}``, as
    onnxruntime-gpu's ``get_all_opkernel_def()`` lists them. Those of an operator's version that
    differ in one parameter's types only (a kernel for each type) become one.
    """
    found: dict[tuple[str, str, str], dict[tuple[int, int], list[dict[str, set[str]]]]] = {}
    for entry in registrations:
        if entry["domain"] in _DOMAINS and entry["prov"] in _PROVIDERS:
            key = entry["domain"], entry["op"], _PROVIDERS[entry["prov"]]
            first, last = entry["ver"]
            types = {name: {_short(t) for t in held} for name, held in entry["tc"].items()}
            found.setdefault(key, {}).setdefault((first, last), []).append(types)
    sets: dict[tuple[str, ...], int] = {}
    kernels: dict[str, Any] = {}
    for (domain, op, provider), versions in sorted(found.items()):
        rows = kernels.setdefault(domain, {}).setdefault(op, {}).setdefault(provider, [])
        for (first, last), entries in sorted(versions.items()):
            for types in _merged(entries):
                indices = {
                    name: sets.setdefault(tuple(sorted(held)), len(sets))
                    for name, held in sorted(types.items())
                }
                rows.append([first, None if last == OPEN else last, indices])
    held = [list(types) for types in sets]
    return {"onnxruntime": version, "sets": held, "kernels": kernels, "host": host}


def _merged(entries: list[dict[str, set[str]]]) -> list[dict[str, set[str]]]:
    """Entries that differ in at most one parameter, put together until none are left."""
    entries = list(entries)
    while True:
        for a, b in combinations(entries, 2):
            differing = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
            if a.keys() == b.keys() and len(differing) <= 1:
                entries.remove(b)
                for name in differing:
                    a[name] = a[name] | b[name]
                break
        else:
            return entries


__all__ = [
    "VERSION",
    "bound",
    "compact",
    "declined",
    "host_inputs",
    "host_outputs",
    "placement",
    "since_version",
    "table",
]
