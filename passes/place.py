"""Keep on the host, inside subgraphs too, what CUDA kernels read there: sizes, axes, counts.

Precondition: a finished graph. Postcondition: the same function. ONNX Runtime leaves what computes
from sizes alone on the CPU, but only where it sees the Shape that they come from, and it copies a
constant from outside that a subgraph reads on both sides. So:

- sizes from outside that a subgraph combines with its own → computed in it;
- a constant from outside that is read on both sides → one more, inside, for the host's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from onnx_attrib.ir import Graph, bodies, operands, static, subgraphs
from onnx_attrib.job import Job
from onnx_attrib.kernels import host_inputs, host_outputs

_LARGEST = 100
"""Entries of a constant that ONNX Runtime lets a computation of sizes read."""


def place(job: Job) -> None:
    """Settle the subgraphs of every node."""
    graph = job.graph
    holders = [node for node in graph.nodes if bodies(node)]
    if not holders:
        return
    outside = _Around(
        lambda name: _producer(graph, name), lambda name: _constant(graph, name), set()
    )
    for node in graph.in_order(graph.nodes):
        names = [tensor.name for tensor in operands(node)]
        if not bodies(node) and outside.is_of_sizes(node.op, node.domain or "", names):
            outside.sizes.update(tensor.name for tensor in node.outputs)
    for node in holders:
        proto = graph.proto(node)
        if _settle_all(graph, subgraphs(proto), outside):
            graph.reseal(node, proto)


def _producer(graph: Graph, name: str) -> NodeProto:
    return graph.proto(graph.tensors()[name].inputs[0])


def _constant(graph: Graph, name: str) -> np.ndarray | None:
    tensor = graph.find(name)
    # The value of a large one need not be looked at.
    dims = None if tensor is None else static(graph.shape(tensor))
    return graph.value(tensor) if dims is not None and prod(dims) <= _LARGEST else None


@dataclass
class _Around:
    """What is known of the tensors around a node, by name.

    ``producer`` of those in ``sizes``, which come from sizes and small constants alone;
    ``constant``: the value of a small constant, None for anything else.
    """

    producer: Callable[[str], NodeProto]
    constant: Callable[[str], np.ndarray | None]
    sizes: set[str]

    def is_of_sizes(
        self, op: str, domain: str, inputs: Iterable[str], given: frozenset[str] = frozenset()
    ) -> bool:
        """Whether an operator computes from sizes, small constants and ``given`` tensors alone.

        What its CUDA kernel reads on the host anyway does not count.
        """
        if host_outputs(op, domain):
            return True
        names, read = list(inputs), host_inputs(op, domain)
        if any(name in self.sizes for k, name in enumerate(names) if k in read):
            return False
        rest = [n for n in names if n and n not in given and self.constant(n) is None]
        some = any(name in self.sizes for name in names)
        return some and self.sizes.issuperset(rest)


def _settle_all(graph: Graph, held: Iterable[GraphProto], outside: _Around) -> bool:
    """Change subgraphs; whether there was anything to do in any."""
    return sum(_settle(graph, body, outside) for body in held) > 0


def _settle(graph: Graph, body: GraphProto, outside: _Around) -> bool:
    """Change one subgraph and those in it; whether there was anything to do."""
    own = {name: node for node in body.node for name in node.output}
    held = {t.name: numpy_helper.to_array(t) for t in body.initializer}
    inputs = frozenset(info.name for info in body.input)
    local = {*own, *held, *inputs}
    here = _Around(
        lambda name: own[name] if name in own else outside.producer(name),
        lambda name: held.get(name) if name in local else outside.constant(name),
        outside.sizes - local,
    )
    for node in body.node:
        if not _holds(node) and here.is_of_sizes(node.op_type, node.domain, node.input):
            here.sizes.update(node.output)
    inner = (held for node in body.node for held in subgraphs(node))
    changed = _settle_all(graph, inner, here)
    mixed = _on_host(body, here, inputs)
    first = list(_sizes_inside(graph, [body.node[i] for i in mixed], here, local))
    rest = [_clone(node) for node in body.node]
    del body.node[:]
    body.node.extend([*first, *rest])
    on_host = {*range(len(first)), *(i + len(first) for i in mixed)}
    return _constants_inside(graph, body, here, on_host, local) or bool(first) or changed


def _holds(node: NodeProto) -> bool:
    return any(True for _ in subgraphs(node))


def _on_host(body: GraphProto, here: _Around, inputs: frozenset[str]) -> list[int]:
    """The nodes of a body, by index, that stay on the host if the sizes they read are its own.

    They may also read the body's inputs.
    """
    found, around = list[int](), _Around(here.producer, here.constant, set(here.sizes))
    for i, node in enumerate(body.node):
        if not _holds(node) and around.is_of_sizes(node.op_type, node.domain, node.input, inputs):
            found.append(i)
            around.sizes.update(node.output)
    return found


def _sizes_inside(
    graph: Graph, nodes: Iterable[NodeProto], here: _Around, local: set[str]
) -> Iterator[NodeProto]:
    """Copies of what computes the sizes from outside that ``nodes`` combine, which read these."""
    copies: dict[str, str] = {}
    made: list[NodeProto] = []

    def inside(name: str) -> str:
        if name in local or name not in here.sizes:
            return name
        if name not in copies:
            copy = _clone(here.producer(name))
            copy.name = graph.fresh(f"{copy.name}/copy")
            if not host_outputs(copy.op_type, copy.domain):
                copy.input[:] = [inside(n) for n in copy.input]
            for k, output in enumerate(copy.output):
                copies[output] = copy.output[k] = graph.fresh(f"{output}/copy")
            made.append(copy)
        return copies[name]

    for node in nodes:
        if not host_outputs(node.op_type, node.domain):
            node.input[:] = [inside(name) for name in node.input]
    return iter(made)


def _clone(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _constants_inside(
    graph: Graph, body: GraphProto, here: _Around, on_host: set[int], local: set[str]
) -> bool:
    """Give the host's side constants of its own where both sides read one from outside."""
    there: dict[str, list[tuple[NodeProto, int]]] = {}
    on_device: set[str] = set()
    for i, node in enumerate(body.node):
        read = host_inputs(node.op_type, node.domain)
        for k, name in enumerate(node.input):
            if i in on_host or k in read:
                there.setdefault(name, []).append((node, k))
            else:
                on_device.add(name)
    changed = False
    for name, readers in there.items():
        value = here.constant(name) if name in on_device and name not in local else None
        if value is not None:
            again = graph.fresh(f"{name}/host")
            body.initializer.append(numpy_helper.from_array(value, again))
            for node, k in readers:
                node.input[k] = again
            changed = True
    return changed


__all__ = ["place"]
