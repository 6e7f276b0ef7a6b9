"""Emitting a Scan whose iterations do as little as possible.

Per-iteration overhead is what a Scan costs. What depends on the scanned sequences alone is
computed before it, for all steps at once, with the steps as a leading axis: in the reverse Scan
of a recurrent network that is everything but a few products with the carried cotangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx_attrib.ir import Dim, Graph, Node, Tensor


@dataclass(frozen=True)
class Track:
    """What a step reads from a sequence: ``formal`` is ``source`` at that step.

    The steps are along ``axis``; ``backward``: the last comes first.
    """

    formal: Tensor
    source: Tensor
    axis: int = 0
    backward: bool = False


@dataclass(frozen=True)
class Carried:
    """A state: ``formal`` before a step, ``result`` after it, ``start`` before the first."""

    formal: Tensor
    result: Tensor
    start: Tensor


@dataclass(frozen=True)
class Stacked:
    """A value of each step, put together along ``axis``; ``backward``: the last comes first."""

    value: Tensor
    axis: int = 0
    backward: bool = False


def emit_scan(
    graph: Graph,
    nodes: Sequence[Node],
    tracks: Sequence[Track],
    carried: Sequence[Carried],
    stacked: Sequence[Stacked],
) -> list[Tensor]:
    """Emit a Scan over ``nodes`` (sorted, live): the final states, then the stacked values."""
    results = [*(c.result for c in carried), *(s.value for s in stacked)]
    nodes, lifted = in_bulk(graph, nodes, tracks, {c.formal.name for c in carried})
    used = {t.name for node in nodes for t in graph.uses(node)} | {t.name for t in results}
    needed = [track for track in lifted if track.formal.name in used] or list(lifted[:1])
    body = graph.subgraph(
        "step", nodes, [*(c.formal for c in carried), *(t.formal for t in needed)], results
    )
    emitted = graph.op.Scan(
        *(c.start for c in carried),
        *(track.source for track in needed),
        body=body,
        num_scan_inputs=len(needed),
        scan_input_axes=[track.axis for track in needed],
        scan_input_directions=[int(track.backward) for track in needed],
        scan_output_axes=[s.axis for s in stacked] or None,
        scan_output_directions=[int(s.backward) for s in stacked] or None,
        outputs=len(results),
    )
    tensors = list(emitted) if isinstance(emitted, tuple) else [emitted]
    for tensor, state in zip(tensors, carried, strict=False):
        tensor.dtype, tensor.shape = state.formal.dtype, state.formal.shape
    for tensor, stack in zip(tensors[len(carried) :], stacked, strict=True):
        tensor.dtype, shape = stack.value.dtype, graph.shape(stack.value)
        if shape is not None:
            tensor.shape = [*shape[: stack.axis], _length(graph, tracks), *shape[stack.axis :]]
    return tensors


def _length(graph: Graph, tracks: Sequence[Track]) -> Dim:
    shapes = ((graph.shape(track.source), track.axis) for track in tracks)
    known = [shape[axis] for shape, axis in shapes if shape is not None]
    return next((n for n in known if n is not None), None)


# -- before the loop -------------------------------------------------------------------------------


def in_bulk(
    graph: Graph, nodes: Sequence[Node], tracks: Sequence[Track], states: set[str]
) -> tuple[list[Node], list[Track]]:
    """Emit here, for all steps at once, what no state has a part in.

    Returns the nodes that stay (sorted) and the sequences they may read.
    """
    bulk = {track.formal.name: track for track in tracks}
    varying = {*bulk, *states}
    kept = []
    for node in nodes:
        used = {tensor.name for tensor in graph.uses(node)}
        if not used & varying:
            graph.place(node)
            continue
        varying.update(tensor.name for tensor in node.outputs)
        sources = _at_all_steps(graph, node, bulk) if used & varying <= bulk.keys() else None
        if sources is None:
            kept.append(node)
            continue
        backward = any(bulk[name].backward for name in used & bulk.keys())
        for formal, source in zip(node.outputs, sources, strict=True):
            bulk[formal.name] = Track(formal, source, 0, backward)
    return kept, list(bulk.values())


_POINTWISE = frozenset(
    """
    Abs Add And Cast Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod
    Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub
    Sum Tanh ThresholdedRelu Where Xor
    """.split()
)
# Operands that must stay what they are: a leading axis would change their meaning.
_SETTINGS = {"Clip": (1, 2), "PRelu": (1,), "Split": (1,)}


def _at_all_steps(graph: Graph, node: Node, bulk: dict[str, Track]) -> list[Tensor] | None:
    """The node's outputs with the steps as a leading axis; None where it cannot be told how."""
    attributes = {attribute.name for attribute in graph.proto(node).attribute}
    out = graph.shape(node.outputs[0])
    shapes = [graph.shape(tensor) for tensor in node.inputs]
    tracks = [bulk.get(tensor.name) for tensor in node.inputs]
    if (
        node.domain
        or out is None
        or None in shapes
        or not attributes <= set(node.attrs)
        or len({track.backward for track in tracks if track}) > 1
        or any(tracks[i] for i in _SETTINGS.get(node.op, ()) if i < len(tracks))
    ):
        return None
    ranks = [len(shape) for shape in shapes if shape is not None]
    attrs = dict(node.attrs)
    if node.op in ("Split", "Concat"):
        if node.op == "Concat" and None in tracks:
            return None
        attrs["axis"] = int(graph.attr(node, "axis")) % len(out) + 1
    elif node.op == "MatMul":
        if min(ranks) < 2:
            return None
    elif node.op not in _POINTWISE:
        return None
    inputs = [
        tensor if track is None else _stacked(graph, bulk, track, len(out) - rank)
        for tensor, track, rank in zip(node.inputs, tracks, ranks, strict=True)
    ]
    emitted = graph.emit(node.op, *inputs, outputs=len(node.outputs), **attrs)
    return list(emitted) if isinstance(emitted, tuple) else [emitted]


def _stacked(graph: Graph, bulk: dict[str, Track], track: Track, missing: int) -> Tensor:
    """The sequence with the steps first, and ``missing`` axes of size 1 after them."""
    if track.axis:
        rank = len(graph.shape(track.source) or ())
        order = [track.axis, *(k for k in range(rank) if k != track.axis)]
        track = replace(track, source=graph.op.Transpose(track.source, perm=order), axis=0)
        bulk[track.formal.name] = track
    if missing <= 0:
        return track.source
    return graph.op.Unsqueeze(track.source, list(range(1, 1 + missing)))
