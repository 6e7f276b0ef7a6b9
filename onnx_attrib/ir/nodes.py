"""Nodes, and what they hold beside the inputs that graphsurgeon knows: subgraphs, captures.

graphsurgeon drops subgraphs' captures, attributes of some types and metadata. A node that has any
keeps its protobuf (``node.kept``) and the outer tensors its subgraphs read (``node.captures``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import onnx_graphsurgeon as gs
from onnx import GraphProto, NodeProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_attrib.ir.tensors import Tensor
from onnx_attrib.protos import holds_only_plain, is_plain, subgraphs

Node: TypeAlias = gs.Node

INTERNAL = "onnx_attrib"
"""The domain of operators that never leave the compiler: see :func:`spelled_out`."""


def operands(node: Node) -> list[Tensor]:
    """What a node reads, by index: its inputs (nameless where left out), then its captures."""
    return [*node.inputs, *captures(node)]


def bodies(node: Node) -> list[GraphProto]:
    """The subgraphs that a node holds."""
    kept = kept_of(node)
    return [] if kept is None else list(subgraphs(kept))


def captures(node: Node) -> list[Tensor]:
    """Outer tensors that a node's subgraphs read, each once."""
    return getattr(node, "captures", [])


def kept_of(node: Node) -> NodeProto | None:
    """The protobuf of a node of which graphsurgeon would lose a part."""
    return getattr(node, "kept", None)


def set_aside(node: NodeProto) -> NodeProto | None:
    """Keep a node's protobuf where graphsurgeon would lose or choke on part of it."""
    if holds_only_plain(node):
        return None
    kept = NodeProto()
    kept.CopyFrom(node)
    plain = [attribute for attribute in kept.attribute if is_plain(attribute)]
    del node.attribute[:]
    node.attribute.extend(plain)
    return kept


def restore(exported: NodeProto, node: Node) -> NodeProto:
    """Give an exported node back what graphsurgeon set aside."""
    kept = kept_of(node)
    if kept is not None:
        del exported.attribute[:]
        exported.attribute.extend(kept.attribute)
        exported.doc_string = kept.doc_string
        exported.overload = kept.overload
        exported.metadata_props.extend(kept.metadata_props)
    return exported


def proto_of(node: Node) -> NodeProto:
    """The node as ONNX writes it, with everything graphsurgeon set aside restored."""
    return restore(OnnxExporter.export_node(node), node)


def annotate(node: Node, op_type: str, *extra: Tensor) -> None:
    """Turn a node into one of the compiler's own that reads ``extra`` after its own inputs."""
    node.attrs.update(was=node.op, count=len(node.inputs))
    node.op, node.domain = op_type, INTERNAL
    node.inputs = [*node.inputs, *extra]


def spelled_out(nodes: Sequence[Node]) -> Sequence[Node]:
    """The nodes, with those that were annotated turned back into what they were."""
    for node in nodes:
        if node.domain == INTERNAL:
            node.op, node.domain = node.attrs.pop("was"), None
            node.inputs = list(node.inputs)[: node.attrs.pop("count")]
    return nodes
