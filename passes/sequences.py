"""Replace sequences and optionals whose elements are known when the model is compiled.

Precondition: a model at opset 21, types inferred. Postcondition: where a sequence is made of known
tensors and read at known positions, its readers read the tensors. Others are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TypeProto

from onnx_attrib.ir import OPSET, captured_names, subgraphs
from onnx_attrib.writer import Call, Writer, constant_values, declared, renamed, taken_names

Elements = tuple[str, ...]


def unpack(model: ModelProto) -> bool:
    """Rewrite ``model`` in place; True if anything changed."""
    kinds = declared(model.graph)
    present = {node.op_type for node in model.graph.node if not node.domain}
    if not present & REWRITTEN:
        return False
    unpacker = _Unpacker(model, kinds)
    nodes = [new for node in model.graph.node for new in unpacker.visit(node)]
    nodes = _without_unread(nodes, {t.name for t in model.graph.output}, unpacker.known)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    infos = [info for info in model.graph.value_info if info.name not in unpacker.known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    return True


class _Unpacker:
    """``known``: the tensors that a sequence (or an optional) holds, by its name."""

    def __init__(self, model: ModelProto, kinds: Mapping[str, TypeProto]) -> None:
        self.known: dict[str, Elements] = {}
        self._kinds = dict(kinds)
        self._constants = constant_values(model.graph)
        self._taken = set(taken_names(model.graph))

    def visit(self, node: NodeProto) -> list[NodeProto]:
        """What stands in the place of a node: itself, or others that read no sequence."""
        kept = NodeProto()
        kept.CopyFrom(node)
        if node.domain:
            return [kept]
        writer = Writer(self._taken, node.name or f"{node.output[0]}/{node.op_type}")
        call = Call(kept, OPSET, self._kinds, self._constants)
        maker, reader = _MAKERS.get(node.op_type), _READERS.get(node.op_type)
        if maker is not None:
            elements = maker(writer, call, self.known)
            if elements is not None:
                self.known[node.output[0]] = elements
                # The node stays for readers that cannot be replaced.
                return [*writer.nodes, kept]
        elif reader is not None:
            held = _held(call, self.known)
            result = None if held is None else reader(writer, call, held)
            if result is not None:
                return renamed(writer, kept, [result])
        return [kept]


def _held(c: Call, known: Mapping[str, Elements]) -> Elements | None:
    """The elements of the first input; a plain tensor holds itself."""
    name = c.x(0)
    if name is None:
        return ()
    kind = c.types.get(name)
    if name not in known and kind is not None and kind.HasField("tensor_type"):
        return (name,)
    return known.get(name)


def _position(c: Call, i: int, default: int | None) -> int | None:
    if not c.has(i):
        return default
    value = c.value(i)
    return None if value is None else int(value.reshape(()))


# -- what makes a sequence -------------------------------------------------------------------------

Known = Mapping[str, Elements]


def _construct(w: Writer, c: Call, known: Known) -> Elements | None:
    return tuple(c.node.input)


def _empty(w: Writer, c: Call, known: Known) -> Elements | None:
    return ()


def _identity(w: Writer, c: Call, known: Known) -> Elements | None:
    return known.get(c.node.input[0])


def _insert(w: Writer, c: Call, known: Known) -> Elements | None:
    held = known.get(c.node.input[0])
    at = None if held is None else _position(c, 2, len(held))
    if held is None or at is None:
        return None
    return (*held[:at], c.node.input[1], *held[at:])


def _erase(w: Writer, c: Call, known: Known) -> Elements | None:
    held = known.get(c.node.input[0])
    at = None if held is None else _position(c, 1, len(held) - 1)
    if held is None or at is None:
        return None
    at %= len(held)
    return (*held[:at], *held[at + 1 :])


def _optional(w: Writer, c: Call, known: Known) -> Elements | None:
    name = c.x(0)
    if name is None:
        return ()
    kind = c.types.get(name)
    return (name,) if kind is not None and kind.HasField("tensor_type") else None


def _split(w: Writer, c: Call, known: Known) -> Elements | None:
    """Parts along an axis of known length, or of given sizes."""
    shape, given = c.shape(), c.value(1)
    if shape is None or (c.has(1) and given is None):
        return None
    axis = c.attr("axis") % len(shape)
    length = shape[axis]
    if given is not None and given.ndim:
        sizes = given.tolist()
    elif isinstance(length, int):
        step = 1 if given is None else int(given)
        sizes = [min(step, length - start) for start in range(0, length, step)]
    else:
        return None
    parts = w.op.Split(c.x(0), [int(n) for n in sizes], axis=axis, outputs=len(sizes))
    parts = (parts,) if len(sizes) == 1 else parts
    if given is None and not c.attr("keepdims"):
        parts = tuple(w.op.Squeeze(part, [axis]) for part in parts)
    return tuple(parts)


_MAKERS: dict[str, Callable[[Writer, Call, Known], Elements | None]] = {
    "Identity": _identity,
    "Optional": _optional,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SplitToSequence": _split,
}

# -- what reads one --------------------------------------------------------------------------------


def _at(w: Writer, c: Call, held: Elements) -> str | None:
    at = _position(c, 1, None)
    if at is None or not -len(held) <= at < len(held):
        return None
    return str(w.op.Identity(held[at]))


def _concatenated(w: Writer, c: Call, held: Elements) -> str | None:
    axis, parts = c.attr("axis"), list(held)
    if c.attr("new_axis"):
        parts = [w.op.Unsqueeze(part, [axis]) for part in parts]
    return str(w.op.Concat(*parts, axis=axis)) if parts else None


def _length(w: Writer, c: Call, held: Elements) -> str | None:
    return str(w.op.Identity(np.array(len(held), np.int64)))


def _element(w: Writer, c: Call, held: Elements) -> str | None:
    return str(w.op.Identity(held[0])) if len(held) == 1 else None


def _present(w: Writer, c: Call, held: Elements) -> str | None:
    return str(w.op.Identity(np.array(bool(held))))


_READERS: dict[str, Callable[[Writer, Call, Elements], Any]] = {
    "ConcatFromSequence": _concatenated,
    "OptionalGetElement": _element,
    "OptionalHasElement": _present,
    "SequenceAt": _at,
    "SequenceLength": _length,
}

REWRITTEN = (_MAKERS.keys() | _READERS.keys()) - {"Identity"}
"""Operators that this pass can remove."""


def _without_unread(nodes: Sequence[NodeProto], outputs: set[str], known: Known) -> list[NodeProto]:
    """The nodes without makers of sequences that nothing reads any more."""
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if node.output and node.output[0] in known and node.output[0] not in read:
            continue
        kept.append(node)
        read.update(node.input)
        read.update(name for inner in subgraphs(node) for name in captured_names(inner))
    return kept[::-1]


__all__ = ["REWRITTEN", "unpack"]
