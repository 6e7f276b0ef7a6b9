"""Where a graph has positions: what the axes of its tensors stand for, and which layer to look at.

A convolution or a pool says what its operand's axes are: samples, channels, then positions. From
there the roles are followed through operators that keep or move axes.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_attrib import rules
from onnx_attrib.ir import Graph, Node, Shape, Tensor, is_float
from onnx_attrib.passes.differentiate import flow

Roles = tuple[int | None, ...]
"""What each axis is: 0 samples, 1 channels, from 2 on positions; None: one entry put in."""

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_SLIDING = _CONVOLUTIONS | {"MaxPool", "AveragePool", "LpPool", "LRN"}
_CHANNELS_FIRST = _SLIDING | {"BatchNormalization", "InstanceNormalization"}
# What follows a convolution and stays with its positions, besides nonlinearities.
_IN_BLOCK = frozenset(
    """
    Add Sub Mul Div Neg Sum Mean Max Min Pow Where Identity Cast Dropout PRelu Clip Concat
    BatchNormalization InstanceNormalization GroupNormalization LayerNormalization
    QuantizeLinear DequantizeLinear Transpose Squeeze Unsqueeze Reshape Slice Split
    """.split()
)
_MOVING = frozenset("Cast Dropout Identity Reshape Squeeze Transpose Unsqueeze".split())
_KEEPING = _IN_BLOCK | set(
    "Pad Gather Resize Softmax LogSoftmax MatMul DepthToSpace SpaceToDepth".split()
)


def last_block(graph: Graph, nodes: Sequence[Node], output: Tensor) -> Tensor | None:
    """The last tensor with positions that comes of a convolution by arithmetic, activations,
    norms and concatenation; None if there is none. What only moves its entries comes after it.

    ``nodes``: what ``output`` depends on, sorted. A convolution that makes the output itself (of a
    segmenter) does not count: its positions are what is explained.
    """
    roles, block = _followed(graph, nodes)
    head = _head(graph, nodes, output)

    def fits(tensor: Tensor) -> bool:
        sizes = zip(graph.shape(tensor) or (), roles[tensor.name], strict=True)
        spread = any(dim != 1 for dim, role in sizes if role is not None and role > 1)
        placed = roles[tensor.name][0] == 0 and 1 in roles[tensor.name]
        return spread and placed and tensor.name not in head and is_float(tensor.dtype)

    moved = {t.name: node.inputs[0] for node in nodes if node.op in _MOVING for t in node.outputs}
    for tensor in reversed(block.values()):
        if fits(tensor) and output.name in flow(nodes, {tensor.name}):
            while (before := moved.get(tensor.name)) and before.name in block and fits(before):
                tensor = before
            return tensor
    return None


def roles_of(graph: Graph, nodes: Sequence[Node], tensor: Tensor) -> Roles | None:
    """The roles of a tensor's axes, told by what makes it or else by what reads it."""
    made, _ = _followed(graph, nodes)
    if tensor.name in made:
        return made[tensor.name]
    asked: dict[str, Roles] = {}
    for node in reversed(nodes):
        source = node.inputs[0] if node.inputs else None
        if source is not None and node.op in _CHANNELS_FIRST and _rank(graph, source) > 2:
            asked[source.name] = tuple(range(_rank(graph, source)))
            continue
        roles = asked.get(node.outputs[0].name)
        for operand in node.inputs if roles is not None else ():
            moved = _moved(graph, node, operand)
            if roles is not None and moved is not None:
                back: list[int | None] = [None] * _rank(graph, operand)
                for role, axis in zip(roles, moved, strict=True):
                    if axis is not None:
                        back[axis] = role
                asked[operand.name] = tuple(back)
    return asked.get(tensor.name)


def _followed(graph: Graph, nodes: Sequence[Node]) -> tuple[dict[str, Roles], dict[str, Tensor]]:
    """Roles from convolutions and pools onwards, and the tensors that convolutions come to.

    A tensor that is taken apart and put together again (group normalisation over [N, G, …]) has
    the roles that it had.
    """
    roles: dict[str, Roles] = {}
    block: dict[str, Tensor] = {}
    origin: dict[str, Tensor] = {}
    for node in nodes:
        output = node.outputs[0]
        shape = graph.shape(output) or ()
        found: Roles | None = None
        inside = node.op in _CONVOLUTIONS
        if node.op in _SLIDING and len(shape) > 2:
            found = tuple(range(len(shape)))
        for operand in node.inputs if found is None else ():
            moved = _moved(graph, node, operand)
            if operand.name in roles and moved is not None:
                given = roles[operand.name]
                found = tuple(None if axis is None else given[axis] for axis in moved)
                inside = _stays(node) and any(t.name in block for t in node.inputs)
                break
        before = next((origin[t.name] for t in node.inputs if t.name in origin), None)
        if found is None and before is not None:
            origin[output.name] = before
            sizes = shape[1:] if len(shape) > 2 else (None,)
            if None not in sizes and sizes == (graph.shape(before) or ())[1:]:
                found, inside = roles[before.name], before.name in block
        for tensor in node.outputs:
            if found is not None and tensor.name:
                roles[tensor.name], origin[tensor.name] = found, tensor
                if inside:
                    block[tensor.name] = tensor
    return roles, block


def _moved(graph: Graph, node: Node, operand: Tensor) -> list[int | None] | None:
    """For each axis of a node's output the operand's axis that it is, or None if it is new.

    None for an operator that does not keep axes, or an operand that is broadcast over some.
    """
    rank, after = _rank(graph, operand), _rank(graph, node.outputs[0])
    if not rank or not (node.op in _KEEPING or _stays(node) or node.op in _SLIDING):
        return None
    if node.op == "Transpose":
        return list(graph.attr(node, "perm") or range(rank)[::-1])
    first = operand.name == node.inputs[0].name
    if node.op in ("Squeeze", "Unsqueeze", "Reshape"):
        shapes = graph.shape(operand), graph.shape(node.outputs[0])
        return _past_units(shapes[0] or (), shapes[1] or ()) if first else None
    if node.op == "MatMul" and not first:
        return None
    return list(range(rank)) if rank == after else None


def _past_units(before: Shape, after: Shape) -> list[int | None] | None:
    """The same for a change of shape that only puts in, takes out or moves axes of one entry."""
    long = [[axis for axis, dim in enumerate(shape) if dim != 1] for shape in (before, after)]
    if len(long[0]) != len(long[1]):
        return None
    moved: list[int | None] = [None] * len(after)
    for source, axis in zip(*long, strict=True):
        sizes = before[source], after[axis]
        if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            return None
        moved[axis] = source
    ones = [[axis for axis, dim in enumerate(shape) if dim == 1] for shape in (before, after)]
    if len(ones[0]) == len(ones[1]) == 1:
        moved[ones[1][0]] = ones[0][0]
    return moved


def _head(graph: Graph, nodes: Sequence[Node], output: Tensor) -> set[str]:
    """Names of the tensors of which the output is made entry by entry: logits and the like."""
    names = {output.name}
    for node in reversed(nodes):
        varying = [t for t in node.inputs if t.name and graph.value(t) is None]
        alone = node.outputs[0].name in names and len(varying) == 1
        if (
            alone
            and node.op not in _SLIDING | {"MatMul"}
            and _moved(graph, node, varying[0]) is not None
        ):
            names.add(varying[0].name)
    return names


def _stays(node: Node) -> bool:
    """Whether a node belongs to the block of the convolution before it."""
    row = rules.lookup(node.op, node.domain, (0,))
    return node.op in _IN_BLOCK or isinstance(row, rules.Elementwise)


def _rank(graph: Graph, tensor: Tensor) -> int:
    return len(graph.shape(tensor) or ())


__all__ = ["Roles", "last_block", "roles_of"]
