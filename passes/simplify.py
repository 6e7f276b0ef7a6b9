"""Remove what the sweep emitted twice or for nothing.

Precondition: a finished graph. Postcondition: the same outputs from sorted nodes without dead code
or common subexpressions. Rewrites, each with its reason:

- a node that repeats another (same operator, attributes, inputs) → the first one. The rules ask
  for what they need and rely on this: a MaxPool with indices absorbs the model's own, so that the
  pool runs once.
- a node that no output needs → nothing.
"""

from __future__ import annotations

from onnx_attrib.ir import Graph, Node, Tensor, subgraphs


def simplify(graph: Graph) -> None:
    """Sort, share, prune."""
    graph.sort()
    _share(graph)
    graph.nodes[:] = graph.prune(graph.nodes, graph.outputs)


def _share(graph: Graph) -> None:
    """Merge nodes that compute the same."""
    protected = {t.name for t in graph.outputs}
    first: dict[bytes, Node] = {}
    renamed: dict[str, Tensor] = {}
    kept = []
    for node in graph.nodes:
        graph.rewire(node, renamed)
        proto = graph.proto(node)
        if proto.op_type.startswith("Random") or any(True for _ in subgraphs(proto)):
            kept.append(node)
            continue
        proto.ClearField("name")
        proto.ClearField("output")
        proto.ClearField("doc_string")
        proto.ClearField("metadata_props")
        key = proto.SerializeToString(deterministic=True)
        twin = first.get(key)
        outputs = {t.name for t in node.outputs if t.name}
        if twin is None:
            first[key] = node
        elif outputs & protected:
            kept.append(node)
            continue
        else:
            for i, tensor in enumerate(node.outputs):
                if not tensor.name:
                    continue
                if i < len(twin.outputs) and twin.outputs[i].name:
                    renamed[tensor.name] = twin.outputs[i]
                else:
                    graph.give_output(twin, i, tensor)
            continue
        kept.append(node)
    graph.nodes[:] = kept
