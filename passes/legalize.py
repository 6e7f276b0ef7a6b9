"""Spell what has no CUDA kernel by operators that have one, for ``provider="cuda"``.

Precondition: a finished graph, the model's own part included. Postcondition: the same outputs under
the same names, within rounding, without nodes that ONNX Runtime would leave to the CPU; a note
names those that cannot be spelled. Subgraphs are opened where there is something to do in them.
What ONNX Runtime folds when it loads the model, and arithmetic with sizes, may stay as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onnx import GraphProto, NodeProto

from onnx_attrib.errors import ModelError
from onnx_attrib.ir import OPSET, Graph, Node, Tensor, bodies, subgraphs
from onnx_attrib.job import Job
from onnx_attrib.kernels import bound, declined, host_outputs, placement
from onnx_attrib.passes.lower import has_body
from onnx_attrib.protos import captures_of
from onnx_attrib.rules import Site, Unsupported
from onnx_attrib.spellings import SPELLINGS, in_wider_type

_LISTED = 10
"""Nodes that the note names."""


def legalize(job: Job) -> None:
    """Rewrite the graph, and note what remains on the CPU."""
    if job.request.provider != "cuda":
        return
    graph, left = job.graph, list[str]()
    graph.sort()
    nodes = graph.nodes[:]
    graph.nodes.clear()
    _legal(graph, nodes, _Known(set(), set()), left)
    if left:
        shown = ", ".join(left[:_LISTED])
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        job.notes.append(f"runs on the CPU, for want of a CUDA kernel: {shown}{more}")


class _Known:
    """Names of tensors that are constant when the model is loaded, and of those made of sizes."""

    def __init__(self, constants: set[str], sizes: set[str]) -> None:
        self.constants, self.sizes = constants, sizes

    def follow(self, graph: Graph, node: Node) -> bool:
        """Note what a node makes; whether it makes constants or sizes."""
        if bodies(node) or node.op.startswith("Random"):
            return False
        names = [tensor.name for tensor in node.inputs if tensor.name]
        varying = [n for n in names if n not in self.constants and not _fixed(graph, n)]
        if not varying and names:
            self.constants.update(tensor.name for tensor in node.outputs)
        elif host_outputs(node.op, node.domain or "") or self.sizes.issuperset(varying):
            self.sizes.update(tensor.name for tensor in node.outputs)
        else:
            return False
        return True


def _fixed(graph: Graph, name: str) -> bool:
    tensor = graph.find(name)
    return tensor is not None and graph.value(tensor) is not None


def _legal(graph: Graph, nodes: Sequence[Node], known: _Known, left: list[str]) -> bool:
    """Place ``nodes`` (sorted), or what they are replaced by; whether anything was."""
    changed = False
    for node in nodes:
        exempt = known.follow(graph, node)
        spelled = None if exempt or _on_cuda(graph, node) else _spelled(graph, node)
        if spelled is not None:
            _give(graph, node, *spelled)
            changed = True
            continue
        if not exempt and not _on_cuda(graph, node):
            left.append(_label(node.op, node.name or node.outputs[0].name))
        changed |= _open_bodies(graph, node, known, left)
        graph.place(node)
    return changed


def _on_cuda(graph: Graph, node: Node) -> bool:
    domain = node.domain or ""
    kinds = [[t.dtype if t.name else None for t in ts] for ts in (node.inputs, node.outputs)]
    version = graph.version(domain)
    place = placement(node.op, domain, version, bound(node.op, domain, version, *kinds))
    if place == "none" and has_body(node.op) and node.op not in SPELLINGS:
        # ONNX Runtime puts the definition in its place.
        return True
    given = [bool(tensor.name) for tensor in node.inputs]

    def attribute(name: str) -> Any:
        return graph.attr(node, name)

    return place == "cuda" and declined(node.op, domain, attribute, given) is None


def _spelled(graph: Graph, node: Node) -> tuple[list[Node], list[Tensor | None]] | None:
    """The nodes that stand in for one, and their outputs; None if there are none."""
    if node.domain:
        return None
    inputs = [tensor if tensor.name else None for tensor in node.inputs]
    outputs = list(node.outputs)
    site = Site(graph, node, inputs, outputs, [None] * len(outputs), ())
    for spelling in (SPELLINGS.get(node.op), in_wider_type):
        if spelling is None:
            continue
        with graph.collect() as nodes:
            try:
                results = spelling(site)
            except (Unsupported, ModelError):
                results = None
        if results is not None:
            return nodes, list(results)
    return None


def _give(graph: Graph, node: Node, nodes: list[Node], results: Sequence[Tensor | None]) -> None:
    """Place ``nodes``, whose ``results`` take the names of the outputs of ``node``."""
    wanted = list(node.outputs)
    node.inputs, node.outputs = [], []
    made = {tensor.name for one in nodes for tensor in one.outputs}
    for own, result in zip(wanted, results, strict=False):
        if not own.name or result is None:
            continue
        if result.name not in made:
            with graph.collect() as ends:
                graph.op.Identity(result)
            nodes += ends
            result = ends[-1].outputs[0]
        for one in nodes:
            one.outputs = [own if t.name == result.name else t for t in one.outputs]
            graph.rewire(one, {result.name: own})
        made.discard(result.name)
    for one in nodes:
        graph.place(one)


def _open_bodies(graph: Graph, node: Node, known: _Known, left: list[str]) -> bool:
    """Rewrite what a node holds; whether anything was."""
    if not any(True for body in bodies(node) for _ in _within(body)):
        return False
    proto, changed = NodeProto(), False
    proto.CopyFrom(graph.proto(node))
    captures = {name: graph.tensors()[name] for name in captures_of(proto)}
    for body in subgraphs(proto):
        name, formals = body.name, [_formal(graph, info) for info in body.input]
        if any(formal is None for formal in formals):
            left += [_label(n.op_type, n.name or n.output[0]) for n in _within(body)]
            continue
        with graph.collect() as inner:
            results = graph.open(body, formals, captures)
        with graph.collect() as legal:
            rewritten = _legal(graph, inner, known, left)
        if rewritten:
            body.CopyFrom(graph.subgraph(name, legal, formals, results, hoist=False))
            changed = True
        else:
            for one in legal:
                one.inputs = []
    if changed:
        graph.reseal(node, proto)
    return changed


def _label(op: str, name: str) -> str:
    return f"{op} '{name}'"


def _formal(graph: Graph, info: Any) -> Tensor | None:
    """A variable for the input of a subgraph; None if it is not a tensor."""
    kind = info.type
    if not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
        return None
    return graph.declared(info.name, info)


def _within(body: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a subgraph, and of those in it, that CUDA may not run."""
    for node in body.node:
        if node.op_type in SPELLINGS or placement(node.op_type, node.domain, OPSET) == "cpu":
            yield node
        for inner in subgraphs(node):
            yield from _within(inner)


__all__ = ["legalize"]
