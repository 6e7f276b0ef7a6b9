"""Whether the samples of a batch stay apart, and along which axes they lie.

The batch is an axis N of its own, or what a Reshape makes of it: an axis k · N, with the entries of
each sample in one piece (attention puts a sample's heads there). Shapes show it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_attrib import rules
from onnx_attrib.ir import Dim, Graph, Node, Shape, Tensor, is_float
from onnx_attrib.rules.einsum import read

_SHAPES = frozenset({"Shape", "Size"})
_CASTS = frozenset({"Cast", "CastLike"})
_RESHAPES = frozenset({"Reshape", "Flatten"})
_MULTIPLE = re.compile(r"(\d+)\*(.+)")


@dataclass(frozen=True)
class Merged:
    """Where a tensor has the samples along an axis with others: of size outer · N · inner."""

    axis: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Samples:
    """The axes that hold samples: those of size ``batch``, but in ``merged`` tensors (by name)."""

    batch: str
    merged: Mapping[str, Merged] = field(default_factory=dict)

    def dims(self, batch: int) -> dict[str, Dim]:
        """How dimensions are renamed where there are so many samples."""
        found: dict[str, Dim] = {self.batch: batch}
        for place in self.merged.values():
            times = place.outer * place.inner
            found[multiple(times, self.batch)] = times * batch
        return found


def multiple(times: int, symbol: str) -> str:
    """The name of a dimension that is so many times another."""
    return symbol if times == 1 else f"{times}*{symbol}"


def batch_symbol(graph: Graph, sources: Sequence[Tensor]) -> str | None:
    """The symbol of the batch axis, if all sources lead with the same one."""
    leading = {(graph.shape(t) or (None,))[0] for t in sources}
    symbol = leading.pop() if len(leading) == 1 else None
    return symbol if isinstance(symbol, str) else None


def kept_apart(
    graph: Graph, sources: Sequence[Tensor], region: Sequence[Node], batch: str
) -> Samples | None:
    """Where the samples lie, if every tensor of values in the region has them along one axis.

    Then nothing mixes samples with other axes or with each other: the region can be evaluated at
    another batch. Only what depends on the sources by their shape alone may be free of the batch,
    and how many samples there are must not be a number to reckon with.
    """
    tracing = _Tracing(graph, batch, dict.fromkeys((t.name for t in sources), (1, 1)))
    return Samples(batch, tracing.merged) if all(map(tracing.follow, region)) else None


_Layout = tuple[int, int]
"""Of the axis that holds the samples: outer and inner, as in Merged."""


@dataclass
class _Tracing:
    """``carrying``: what depends on the sources' values, by name, and how it has the samples;
    ``counts``: the dimensions that whole numbers are made of."""

    graph: Graph
    batch: str
    carrying: dict[str, _Layout]
    counts: dict[str, Shape] = field(default_factory=dict)

    @property
    def merged(self) -> dict[str, Merged]:
        found = {}
        for name, (outer, inner) in self.carrying.items():
            if outer * inner > 1:
                shape = self.graph.shape(self.graph.tensors()[name]) or ()
                found[name] = Merged(shape.index(self._named((outer, inner))), outer, inner)
        return found

    def follow(self, node: Node) -> bool:
        """Whether a node keeps the samples apart."""
        graph = self.graph
        layout = self._layout(node)
        if layout is None or not _keeps_samples_apart(graph, node, self._named(layout)):
            return False
        counted = _counted(graph, node, self.counts)
        if not is_float(node.outputs[0].dtype):
            self.counts.update((t.name, counted) for t in node.outputs)
        elif node.op in _CASTS and not all(
            _is_known(graph, dim) and dim != self.batch for dim in counted
        ):
            return False
        carries = node.op not in _SHAPES and any(t.name in self.carrying for t in graph.uses(node))
        for tensor in node.outputs:
            if not tensor.name:
                continue
            if carries:
                self.carrying[tensor.name] = layout
            if not self._apart(tensor, self._named(layout), carries):
                return False
        return True

    def _named(self, layout: _Layout) -> str:
        return multiple(math.prod(layout), self.batch)

    def _layout(self, node: Node) -> _Layout | None:
        """How a node's results have the samples.

        None if operands have them differently, or a Reshape does not leave the axis before them.
        """
        carried = [t for t in self.graph.uses(node) if t.name in self.carrying]
        found = {self.carrying[t.name] for t in carried}
        if len(found) > 1:
            return None
        outer, inner = found.pop() if found else (1, 1)
        if node.op not in _RESHAPES or node.domain or not carried:
            return outer, inner
        before = _ahead(self.graph.shape(carried[0]), self._named((outer, inner)))
        result = self.graph.shape(node.outputs[0]) or ()
        made = [(dim, times) for dim in result if (times := self._times(dim))]
        if before is None or len(made) != 1:
            return None
        name, times = made[0]
        after = _ahead(result, name)
        count = before[0] * outer
        if after is None or after[1] != before[1] or count % after[0]:
            return None
        outer = count // after[0]
        return None if times % outer else (outer, times // outer)

    def _times(self, dim: Dim) -> int:
        """How many times the batch a dimension is; 0 if it is none of its multiples."""
        if dim == self.batch:
            return 1
        found = _MULTIPLE.fullmatch(dim) if isinstance(dim, str) else None
        return int(found[1]) if found is not None and found[2] == self.batch else 0

    def _apart(self, tensor: Tensor, axis: str, carries: bool) -> bool:
        """Whether a result has the samples along an axis of that name, and only there."""
        shape = self.graph.shape(tensor)
        if not is_float(tensor.dtype):
            return not carries or (shape or ()).count(axis) == 1
        if shape is None:
            return False
        held = [dim for dim in shape if self._times(dim)]
        if shape and shape[0] == axis == self.batch:
            # Unknown dimensions behind a leading batch axis cannot hold the batch once more.
            return len(held) == 1
        others = all(_is_known(self.graph, dim) for dim in shape if dim not in held)
        return others and held == [axis] * int(carries)


def _ahead(shape: Shape | None, name: Dim) -> tuple[int, tuple[str, ...]] | None:
    """The product of the dimensions before one: its number, and its symbols sorted."""
    before = shape[: shape.index(name)] if shape and name in shape else (None,)
    if any(dim is None for dim in before):
        return None
    symbols = tuple(sorted(dim for dim in before if isinstance(dim, str)))
    return math.prod(dim for dim in before if isinstance(dim, int)), symbols


def _keeps_samples_apart(graph: Graph, node: Node, batch: str) -> bool:
    """Whether the batch is none of the axes that a node goes along or mixes.

    Operators whose outputs show it by their shape need not be here.
    """
    shape = graph.shape(node.inputs[0]) if node.inputs else None
    rule = rules.lookup(node.op, node.domain, ())
    if isinstance(rule, rules.Structured):
        axis = rule.batch_axis(graph, node)
        if shape is None or axis is None or shape[axis] != batch:
            return False
    if node.op == "Einsum" and not _labelled_alike(graph, node, batch):
        return False
    return shape is None or (
        all(shape[k] != batch for k in _mixed_axes(graph, node, len(shape)))
        and all(dim in (batch, free) for dim, free in _beside_batch(graph, node, shape, batch))
    )


def _beside_batch(graph: Graph, node: Node, shape: Shape, batch: str) -> Iterable[tuple[Dim, Dim]]:
    """What meets the batch in operands that the output's shape does not follow.

    Each with another dimension that it may have there: 1 where the operand is broadcast.
    """
    if batch not in shape or node.domain:
        return
    axis = shape.index(batch)
    if node.op == "ScatterND":
        depth = (graph.shape(node.inputs[1]) or (None,))[-1]
        # Samples are picked by number, unless the axes picked from come before theirs.
        yield batch if isinstance(depth, int) and axis >= depth else None, batch
    states: dict[int, tuple[int, Dim]] = {4: (0, batch), 5: (axis, batch), 6: (axis, batch)}
    meets: dict[str, dict[int, tuple[int, Dim]]] = {
        "PRelu": {1: (axis - len(shape), 1)},
        "Gemm": {2: (-2, 1)},
        "ScatterElements": {1: (axis, batch), 2: (axis, batch)},
        "ReverseSequence": {1: (0, batch)},
        "RNN": states,
        "GRU": states,
        "LSTM": states,
    }
    for i, (k, free) in meets.get(node.op, {}).items():
        operand = node.inputs[i] if i < len(node.inputs) else None
        dims = graph.shape(operand) if operand is not None and operand.name else ()
        if dims is None:
            yield None, free
        elif -len(dims) <= k < len(dims):
            yield dims[k], free


def _labelled_alike(graph: Graph, node: Node, batch: str) -> bool:
    """Whether all operands of an Einsum have the batch under one letter, which the result has."""
    shapes = [graph.shape(t) for t in node.inputs]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return False
    equation = read(graph.attr(node, "equation"), [len(shape) for shape in known])
    letters = {
        letter
        for term, shape in zip(equation.operands, known, strict=True)
        for letter, dim in zip(term, shape, strict=True)
        if dim == batch
    }
    return len(letters) <= 1 and letters <= set(equation.output)


_AXIS = {
    **dict.fromkeys("Softmax LogSoftmax Hardmax LpNormalization".split(), "axis"),
    **dict.fromkeys("Gather GatherElements ScatterElements TopK".split(), "axis"),
    "ReverseSequence": "time_axis",
}
"""The attribute that names the axis along which entries meet or are picked."""
_AXES_FROM = {
    **dict.fromkeys("InstanceNormalization GroupNormalization LRN".split(), 1),
    **dict.fromkeys("Conv ConvTranspose DeformConv GridSample Col2Im".split(), 1),
    **dict.fromkeys("DepthToSpace SpaceToDepth".split(), 1),
    **dict.fromkeys("MaxPool AveragePool LpPool MaxUnpool".split(), 2),
    "Trilu": -2,
}
"""The first of the axes along which they do."""


def _mixed_axes(graph: Graph, node: Node, rank: int) -> Iterable[int]:
    """Axes along which entries meet or move though the output keeps the input's shape."""
    if node.domain:
        return ()
    if node.op in _AXIS:
        return (graph.attr(node, _AXIS[node.op]),)
    if node.op in ("LayerNormalization", "RMSNormalization"):
        return range(graph.attr(node, "axis") % rank, rank)
    if node.op in _AXES_FROM:
        return range(_AXES_FROM[node.op] % rank, rank)
    if node.op == "MeanVarianceNormalization":
        return [int(k) for k in graph.attr(node, "axes") if -rank <= k < rank]
    if node.op == "CumSum":
        return _listed(graph, node, 1, rank)
    if node.op == "DFT":
        return _listed(graph, node, 2, rank) if len(node.inputs) > 2 else (rank - 2,)
    if node.op == "Slice":
        steps = graph.value(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        return () if steps is not None and (steps == 1).all() else range(rank)
    if node.op == "Pad":
        pads = graph.value(node.inputs[1])
        axes = graph.value(node.inputs[3]) if len(node.inputs) > 3 else np.arange(rank)
        if pads is None or axes is None:
            return range(rank)
        return [int(k) for k in axes[pads.reshape(2, -1).any(0)]]
    if node.op == "Resize" and graph.attr(node, "coordinate_transformation_mode") == _CROPS:
        return range(rank)
    return ()


_CROPS = "tf_crop_and_resize"


def _listed(graph: Graph, node: Node, i: int, rank: int) -> Iterable[int]:
    """The axis that an operand names; all if it is not known."""
    axis = graph.value(node.inputs[i])
    return range(rank) if axis is None else (int(axis.reshape(())),)


def _counted(graph: Graph, node: Node, counts: Mapping[str, Shape]) -> Shape:
    """The dimensions that whole numbers which a node puts out are made of, as far as known."""
    if node.op in _SHAPES:
        shape = graph.shape(node.inputs[0])
        if shape is None:
            return (None,)
        return shape[graph.attr(node, "start") or 0 : graph.attr(node, "end")]
    found = tuple(dim for t in graph.uses(node) for dim in counts.get(t.name, ()))
    index = graph.value(node.inputs[1]) if node.op == "Gather" else None
    if index is not None and any(source.op == "Shape" for source in node.inputs[0].inputs):
        return tuple(found[k] for k in index.reshape(-1).tolist())
    return found


def captured(graph: Graph, sources: Sequence[Tensor], region: Sequence[Node]) -> list[Tensor]:
    """Tensors, constants aside, that the region reads but neither is nor computes."""
    inside = {t.name for t in sources} | {t.name for node in region for t in node.outputs}
    found = {t.name: t for node in region for t in graph.uses(node) if t.name not in inside}
    return [t for t in found.values() if graph.value(t) is None]


def counts_batch(graph: Graph, outside: Sequence[Tensor], batch: str) -> bool:
    """Whether a tensor without a batch axis may hold the number of samples, as a shape does."""
    free = [t for t in outside if batch not in (graph.shape(t) or ())]
    counts = dict[str, Shape]()
    for node in graph.prune(graph.nodes, free):
        counted = _counted(graph, node, counts)
        counts.update((t.name, counted) for t in node.outputs)
    return any(
        dim == batch or (not is_float(t.dtype) and not _is_known(graph, dim))
        for t in free
        for dim in counts.get(t.name, ())
    )


def fully_known(graph: Graph, tensor: Tensor) -> bool:
    """Whether every dimension is a number or a symbol of the model's inputs.

    Other symbols stand for something computed, which may hold the batch ("4*N").
    """
    shape = graph.shape(tensor)
    return shape is not None and all(_is_known(graph, dim) for dim in shape)


def _is_known(graph: Graph, dim: Dim) -> bool:
    symbols = {dim for t in graph.inputs for dim in graph.shape(t) or ()}
    return isinstance(dim, int) or (dim is not None and dim in symbols)


__all__ = [
    "Merged",
    "Samples",
    "batch_symbol",
    "captured",
    "counts_batch",
    "fully_known",
    "kept_apart",
    "multiple",
]
