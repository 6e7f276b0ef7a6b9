"""Remove what the sweep emitted twice or for nothing.

Precondition: a finished graph. Postcondition: the same outputs from sorted nodes without dead code
or common subexpressions. Rewrites, each with its reason:

- a node that repeats another (same operator, attributes, inputs) → the first one. The rules ask
  for what they need and rely on this: a MaxPool with indices absorbs the model's own, so that the
  pool runs once.
- a node that no output needs → nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from onnx_attrib.ir import Graph, Node, Tensor, subgraphs


def simplify(graph: Graph) -> None:
    """Sort, share, prune."""
    graph.sort()
    shared = share(graph, graph.nodes, {t.name for t in graph.outputs})
    graph.nodes[:] = graph.prune(shared, graph.outputs)


def share(graph: Graph, nodes: Sequence[Node], protected: set[str]) -> list[Node]:
    """``nodes`` (sorted) without those that compute what an earlier one does.

    Tensors named in ``protected`` keep their producers.
    """
    first: dict[bytes, Node] = {}
    renamed: dict[str, Tensor] = {}
    kept = []
    for node in nodes:
        graph.rewire(node, renamed)
        key = _fingerprint(graph.proto(node))
        twin = first.setdefault(key, node) if key else node
        if twin is node or any(t.name in protected for t in node.outputs):
            kept.append(node)
            continue
        for i, tensor in enumerate(node.outputs):
            if i < len(twin.outputs) and twin.outputs[i].name:
                renamed[tensor.name] = twin.outputs[i]
            elif tensor.name:
                graph.give_output(twin, i, tensor)
    return kept


def _fingerprint(proto: NodeProto) -> bytes | None:
    """Equal for nodes that compute the same; None for those that must not be shared."""
    if proto.op_type.startswith("Random") or any(True for _ in subgraphs(proto)):
        return None
    for field in ("name", "output", "doc_string", "metadata_props"):
        proto.ClearField(field)
    attributes = sorted(proto.attribute, key=lambda attribute: attribute.name)
    del proto.attribute[:]
    proto.attribute.extend(attributes)
    return proto.SerializeToString(deterministic=True)
