"""Remove what the sweep emitted twice or for nothing.

Precondition: a finished graph. Postcondition: the same outputs from sorted nodes without dead code
or common subexpressions. Rewrites, each with its reason:

- a node that repeats another (same operator, attributes, inputs) → the first one. The rules ask
  for what they need and rely on this: a MaxPool with indices absorbs the model's own, so that the
  pool runs once.
- a node that no output needs → nothing.
- a Cast back from a type that holds every number of the first → what was cast: ONNX Runtime 1.31
  drops such pairs itself, even where the body of a Loop reads what it dropped.
- a Pad of some axes → one of all axes: when ONNX Runtime 1.31 moves a Transpose past it, it takes
  the pads to be those of all axes, and fails.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from onnx_attrib.ir import Graph, Node, Tensor, subgraphs
from onnx_attrib.job import Job


def simplify(job: Job) -> None:
    """Sort, share, prune."""
    graph = job.graph
    pad_all_axes(graph)
    graph.sort()
    kept = [*graph.outputs, *job.scope.inputs, job.scope.output]
    if job.request.precision != "keep":
        kept += job.seeds  # from which the multipliers start
    shared = share(graph, graph.nodes, {t.name for t in kept})
    graph.nodes[:] = graph.prune(shared, graph.outputs)


def pad_all_axes(graph: Graph) -> None:
    """Let every Pad name the pads of all axes."""
    for node in list(graph.nodes):
        if node.op == "Pad" and not node.domain and len(node.inputs) > 3:
            rank, axes = len(graph.shape(node.inputs[0]) or ()), graph.value(node.inputs[3])
            if rank and axes is not None:
                pads = _of_all_axes(graph, node.inputs[1], axes.astype(np.int64) % rank, rank)
                graph.let_read(node, [node.inputs[0], pads, node.inputs[2]])


def _of_all_axes(graph: Graph, pads: Tensor, axes: np.ndarray, rank: int) -> Tensor:
    place, zeros = np.concatenate([axes, axes + rank]), np.zeros(2 * rank, np.int64)
    known = graph.value(pads)
    if known is not None:
        zeros[place] = known
        return graph.constant(zeros)
    wide: Tensor = graph.op.ScatterElements(zeros, place, graph.op.Cast(pads, to=np.dtype("i8")))
    return wide


def share(graph: Graph, nodes: Sequence[Node], protected: set[str]) -> list[Node]:
    """``nodes`` (sorted) without those that compute what an earlier one does.

    Tensors named in ``protected`` keep their producers.
    """
    first: dict[bytes, Node] = {}
    renamed: dict[str, Tensor] = {}
    kept = []
    for node in nodes:
        graph.rewire(node, renamed)
        same = _cast_back(graph, node)
        if same is not None and node.outputs[0].name not in protected:
            renamed[node.outputs[0].name] = same
            continue
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


def _cast_back(graph: Graph, node: Node) -> Tensor | None:
    """What a Cast gives back unchanged, if another Cast before it took it to a wider type."""
    before = next(iter(node.inputs[0].inputs), None) if node.op == "Cast" else None
    if before is None or before.op != "Cast" or node.inputs[0].dtype is None:
        return None
    source = before.inputs[0]
    if source.dtype is None or source.dtype != node.outputs[0].dtype:
        return None
    own, between = graph.dtype(source), graph.dtype(node.inputs[0])
    wider = own.kind in "fiu" and own.kind == between.kind and own.itemsize <= between.itemsize
    wider |= own.name == "bfloat16" and between.kind == "f" and between.itemsize > own.itemsize
    return source if wider else None


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
