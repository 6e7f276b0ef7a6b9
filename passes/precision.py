"""Compute in float16 where that is safe and pays: ``precision="fp16"``.

Precondition: a finished model. Postcondition: the same interface and outputs; in float16 are

- layers (Conv, ConvTranspose, MatMul, Gemm) of both halves, with their constant weights,
- between the layers of the forward half: ReLU, Add, pooling, what only moves numbers, comparisons.

Everything else stays in float32, with Casts between: sums, normalisations, softmaxes, every other
nonlinearity (a quotient of differences then has the slope of its float16 arguments, which rounding
cannot spoil), quotients, products of multipliers, the states of loops, and the last layer of the
forward half, whose differences are explained.

Multipliers, and what comes straight from the model's inputs, may be far outside float16's range.
A layer y = Wx takes them as s · W(x/s), with s = max |x| of each row (of each sample, for a
convolution): in float16 nothing then overflows or vanishes that matters beside the largest entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_attrib.protos import captures_of, subgraphs

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_SMALLEST, _LARGEST = 2.0**-8, 65504.0
"""Of the largest entry of a constant: smaller, and too much beside it would be rounded to zero."""
_SMALL = 1024

_LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_MOVES = frozenset(
    """
    Concat DepthToSpace Expand Flatten Gather Identity Pad Reshape Slice SpaceToDepth Split Squeeze
    Tile Transpose Unsqueeze
    """.split()
)
_LIGHT = frozenset({"Add", "Relu", "MaxPool", "GlobalMaxPool", "AveragePool"}) | _MOVES
_COMPARES = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})


def halve(model: ModelProto, seeds: Iterable[str], output: str) -> ModelProto:
    """The model in float16 where it is safe.

    ``seeds``: the tensors that multipliers start from; ``output``: the explained one.
    """
    result = ModelProto()
    result.CopyFrom(model)
    top = _Scope(result.graph, None, _inferred(model))
    top.multipliers.update(seeds)
    top.raw.update(info.name for info in result.graph.input)
    top.full_read.update(info.name for info in result.graph.output)
    _Namer(result.graph).claim(top)
    top.enter_last(output)
    top.plan()
    top.settle()
    top.rewrite()
    return result


def _inferred(model: ModelProto) -> GraphProto:
    """The graph with the types of all tensors; large weights are left out."""
    slim = ModelProto(ir_version=model.ir_version)
    slim.opset_import.extend(model.opset_import)
    graph = slim.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return onnx.shape_inference.infer_shapes(slim).graph


class _Namer:
    """Names that the model does not have."""

    def __init__(self, graph: GraphProto) -> None:
        self._taken = set(_names(graph))

    def claim(self, scope: _Scope) -> None:
        scope.namer = self

    def fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name


def _names(graph: GraphProto) -> Iterator[str]:
    for part in (graph.input, graph.initializer):
        yield from (item.name for item in part)
    for node in graph.node:
        yield from (*node.output, node.name)
        for inner in subgraphs(node):
            yield from _names(inner)


@dataclass
class _Scope:
    """A graph or subgraph, and what is known of the tensors that it defines.

    ``multipliers``: what is computed from a seed. ``raw``: what is computed from the model's
    inputs with no layer between. ``halves``: made in float16. ``full_read`` and ``half_read``:
    read in float32, in float16. ``large``: moved constants out of float16's range. ``fixed``: what
    is computed from constants with no layer between. ``plans``: by the number of a node that is
    computed in float16, which of its operands are scaled.
    """

    graph: GraphProto
    parent: _Scope | None
    inferred: GraphProto
    namer: _Namer = field(init=False)
    multipliers: set[str] = field(default_factory=set)
    raw: set[str] = field(default_factory=set)
    halves: set[str] = field(default_factory=set)
    full_read: set[str] = field(default_factory=set)
    half_read: set[str] = field(default_factory=set)
    plans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    half_names: dict[str, str] = field(default_factory=dict)
    inner: dict[int, list[_Scope]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    fixed: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    """What the last layers make, and their weights, which copies of them have too."""

    def __post_init__(self) -> None:
        graph, inferred = self.graph, self.inferred
        self.constants = {t.name: t for t in graph.initializer}
        self.types: dict[str, tuple[int, int | None]] = {
            t.name: (t.data_type, len(t.dims)) for t in graph.initializer
        }
        for info in (*inferred.input, *inferred.value_info, *inferred.output):
            kind = info.type.tensor_type
            rank = len(kind.shape.dim) if kind.HasField("shape") else None
            self.types.setdefault(info.name, (kind.elem_type, rank))
        self.own = {info.name for info in graph.input} | set(self.constants)
        self.own |= {name for node in graph.node for name in node.output}
        if self.parent is not None:
            self.namer, self.last = self.parent.namer, self.parent.last

    def owner(self, name: str) -> _Scope | None:
        """The scope that defines what is called so here."""
        scope: _Scope | None = self
        while scope is not None and name not in scope.own:
            scope = scope.parent
        return scope

    def holds(self, kind: str, name: str) -> bool:
        """Whether a tensor is in one of the sets, of its own scope."""
        scope = self.owner(name)
        return scope is not None and name in getattr(scope, kind)

    def type_of(self, name: str) -> tuple[int, int | None]:
        scope = self.owner(name)
        return (0, None) if scope is None else scope.types.get(name, (0, None))

    def is_float(self, name: str) -> bool:
        return self.type_of(name)[0] == _FLOAT

    def constant(self, name: str) -> TensorProto | None:
        scope = self.owner(name)
        return None if scope is None else scope.constants.get(name)

    # -- planning --------------------------------------------------------------------------------

    def plan(self) -> None:
        """Decide for every node, in order, here and in the subgraphs."""
        for i, node in enumerate(self.graph.node):
            reads = [name for name in (*node.input, *captures_of(node)) if name]
            backward = any(self.holds("multipliers", name) for name in reads)
            if backward:
                self.multipliers.update(node.output)
            if node.op_type not in _LAYERS and any(self.holds("raw", name) for name in reads):
                self.raw.update(node.output)
            if node.op_type not in _LAYERS and reads and all(map(self._is_fixed, reads)):
                self.fixed.update(node.output)
            self._enter(i, node, backward)
            scaled, names = None, (*node.output, *node.input)
            if not node.domain:
                if node.op_type in _LAYERS and (backward or not self.last.intersection(names)):
                    scaled = self._layer(node)
                elif node.op_type in _LIGHT | _COMPARES and not backward:
                    scaled = self._light(node)
            floats = [name for name in node.input if name and self.is_float(name)]
            if scaled is None:
                self._read("full_read", floats)
                if node.op_type in _MOVES and not all(map(self._fits, floats)):
                    self.large.update(node.output)
                continue
            self.plans[i] = scaled
            apart = [node.input[k] for k in scaled]
            apart += [name for name in node.input[2:] if name and scaled]
            self._read("full_read", apart)
            self._read("half_read", [name for name in floats if name not in apart])
            if not scaled and node.op_type not in _COMPARES:
                self.halves.update(name for name in node.output if self.is_float(name))

    def _read(self, kind: str, names: Iterable[str]) -> None:
        for name in names:
            scope = self.owner(name)
            if scope is not None:
                getattr(scope, kind).add(name)

    def _enter(self, i: int, node: NodeProto, backward: bool) -> None:
        """Plan a node's subgraphs; what they take and give stays in float32."""
        twins = list(subgraphs(self.inferred.node[i]))
        self.inner[i] = []
        for body, twin in zip(subgraphs(node), twins, strict=True):
            scope = _Scope(body, self, twin)
            given = {info.name for info in body.input if scope.is_float(info.name)}
            scope.raw |= given
            if backward:
                scope.multipliers |= given
            scope.full_read.update(info.name for info in body.output)
            self.inner[i].append(scope)
            scope.plan()
            self._read("full_read", (t.name for t in body.output if t.name not in scope.own))

    def enter_last(self, output: str) -> None:
        """Note the layers that the model's outputs come from with no other layer between."""
        moving = set(self.multipliers)
        for node in self.graph.node:
            if any(name in moving for name in (*node.input, *captures_of(node))):
                moving.update(node.output)
        wanted = {info.name for info in self.graph.output if info.name not in moving} | {output}
        for node in reversed(self.graph.node):
            if not any(name in wanted for name in node.output):
                continue
            wanted.update(captures_of(node))
            if node.op_type in _LAYERS:
                self.last.update(node.output)
                self.last.update(name for name in node.input if self.constant(name) is not None)
            else:
                wanted.update(node.input)

    def _layer(self, node: NodeProto) -> tuple[int, ...] | None:
        """Which operands of a layer are scaled; None if it stays in float32."""
        if not all(self.is_float(name) for name in (*node.input, *node.output) if name):
            return None
        if not all(self._fits(name) for name in node.input if name):
            return None
        wide = [self._wide(name) for name in node.input[:2]]
        if not any(wide) and all(map(self._is_fixed, node.input[:2])):
            wide[0] = not self.holds("halves", node.input[0])  # the first layer, at a baseline
        scaled = tuple(k for k in (0, 1) if wide[k])
        if not scaled:
            return ()
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        ranks = [self.type_of(name)[1] for name in node.input]
        if node.op_type == "MatMul":
            return scaled if all(rank is not None and rank > 1 for rank in ranks) else None
        if scaled != (0,) or ranks[0] is None or attributes.get("transA"):
            return None
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Gemm":
            return scaled if not bias or attributes.get("beta", 1.0) == 1.0 else None
        return scaled if not bias or self.constant(bias) is not None else None

    def _wide(self, name: str) -> bool:
        """Whether a tensor in float32 may be out of float16's range."""
        far = self.holds("multipliers", name) or self.holds("raw", name)
        return far and self.constant(name) is None and not self.holds("halves", name)

    def _is_fixed(self, name: str) -> bool:
        return self.constant(name) is not None or self.holds("fixed", name)

    def _light(self, node: NodeProto) -> tuple[int, ...] | None:
        """Nothing is scaled, if a node between layers has only float16 and constants to read.

        What is added to float16, or joined with it, is of its size and may be rounded.
        """
        floats = [name for name in node.input if name and self.is_float(name)]
        if node.op_type == "MaxPool" and len(node.output) > 1:
            return None  # CUDA's kernel loses indices from 2048 on
        moved = node.op_type in _MOVES and all(self.constant(name) is not None for name in floats)
        if not floats or not (moved or any(self.holds("halves", name) for name in floats)):
            return None
        if node.op_type not in _COMPARES and not all(map(self.is_float, filter(None, node.output))):
            return None
        exact = node.op_type in _COMPARES
        joins = node.op_type in ("Add", "Concat")
        fits = (
            self.holds("halves", name)
            or self._small(name, exact)
            or (joins and not self._is_fixed(name) and not self._wide(name))
            for name in floats
        )
        return () if all(fits) else None

    def _small(self, name: str, exact: bool) -> bool:
        tensor = self.constant(name)
        if tensor is None:
            return False
        values = numpy_helper.to_array(tensor)
        same = not exact or np.array_equal(values.astype(np.float16).astype(np.float32), values)
        return same and self._fits(name)

    def _fits(self, name: str) -> bool:
        """Whether a constant, or one that was moved, is in float16's range."""
        tensor = self.constant(name)
        if tensor is None:
            return not self.holds("large", name)
        values = numpy_helper.to_array(tensor)
        largest = float(np.abs(values).max(initial=0.0))
        return largest == 0 or _SMALLEST <= largest <= _LARGEST

    def settle(self) -> None:
        """Transpose in float32 what is read in both precisions.

        ONNX Runtime (1.31) takes a Transpose into the MatMul that reads it, across a Cast too, and
        crashes where something else reads it through another Cast.
        """
        for i, node in reversed(list(enumerate(self.graph.node))):
            for scope in self.inner[i]:
                scope.settle()
            if i in self.plans and node.op_type == "Transpose" and node.output[0] in self.full_read:
                del self.plans[i]
                self.halves.difference_update(node.output)
                self._read("full_read", node.input)

    # -- rewriting -------------------------------------------------------------------------------

    def rewrite(self) -> None:
        """Replace the nodes, with Casts after what is read in both precisions."""
        nodes: list[NodeProto] = []
        for info in self.graph.input:
            nodes += self._both(info.name)
        for name, tensor in list(self.constants.items()):
            if name in self.half_read:
                self._halve_constant(tensor, name)
        for i, node in enumerate(self.graph.node):
            scaled = self.plans.get(i)
            for scope in self.inner[i]:
                scope.rewrite()
            copy = NodeProto()
            copy.CopyFrom(node)
            if scaled:
                nodes += self._scaled(copy, scaled)
            else:
                if scaled is not None:
                    self._in_half(copy)
                nodes.append(copy)
            for name in node.output:
                nodes += self._both(name)
        read = {name for node in nodes for name in (*node.input, *captures_of(node))}
        read |= {info.name for info in self.graph.output}
        kept = [t for t in self.graph.initializer if t.name in read]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(kept)

    def half_name(self, name: str) -> str:
        """What a tensor is called in float16."""
        scope = self.owner(name)
        assert scope is not None
        if name not in scope.half_names:
            scope.half_names[name] = scope.namer.fresh(f"{name}/half")
        return scope.half_names[name]

    def _both(self, name: str) -> list[NodeProto]:
        if name in self.halves:
            half = self.half_name(name)
            return [_cast(half, name, _FLOAT)] if name in self.full_read else []
        if name in self.half_read and name not in self.constants:
            return [_cast(name, self.half_name(name), _HALF)]
        return []

    def _halve_constant(self, tensor: TensorProto, name: str) -> None:
        values = numpy_helper.to_array(tensor).astype(np.float16)
        self.graph.initializer.append(numpy_helper.from_array(values, self.half_name(name)))

    def _in_half(self, node: NodeProto) -> None:
        for k, name in enumerate(node.input):
            if name and self.is_float(name):
                node.input[k] = self.half_name(name)
        for k, name in enumerate(node.output):
            if name in self.halves:
                node.output[k] = self.half_name(name)

    def _scaled(self, node: NodeProto, scaled: Sequence[int]) -> list[NodeProto]:
        """y = s · W(x/s), and the bias after it."""
        emit = _Nodes(self.namer)
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and node.op_type != "Gemm":
            bias = self._along_channels(bias, self.type_of(node.input[0])[1] or 0)
        sizes = []
        for k in (0, 1):
            name = node.input[k]
            if k not in scaled:
                node.input[k] = self.half_name(name)
                continue
            size = self._size(emit, node, k)
            node.input[k] = emit("Cast", emit("Div", name, size), to=_HALF)
            sizes.append(size)
        y = node.output[0]
        node.output[0] = self.namer.fresh(f"{y}/half")
        del node.input[2:]
        emit.nodes.append(node)
        value = emit("Cast", node.output[0], to=_FLOAT)
        for size in sizes:
            value = emit("Mul", value, size)
        if bias:
            value = emit("Add", value, bias)
        emit.nodes[-1].output[0] = y
        return emit.nodes

    def _size(self, emit: _Nodes, node: NodeProto, k: int) -> str:
        """max |x| of each row that is summed up, never zero."""
        rank = self.type_of(node.input[k])[1] or 0
        axes = list(range(1, rank))
        if node.op_type == "MatMul":
            axes = [-1] if k == 0 else [-2]
        places = self._add(np.array(axes, np.int64))
        largest = emit("ReduceMax", emit("Abs", node.input[k]), places, keepdims=1)
        return emit("Max", largest, self._add(np.array(np.finfo(np.float32).tiny)))

    def _along_channels(self, name: str, rank: int) -> str:
        """A constant bias [C] as [C, 1, …]."""
        tensor = self.constant(name)
        assert tensor is not None
        return self._add(numpy_helper.to_array(tensor).reshape(-1, *[1] * (rank - 2)))

    def _add(self, values: np.ndarray) -> str:
        name = self.namer.fresh("attrib/precision")
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name


class _Nodes:
    """Emits nodes into a list."""

    def __init__(self, namer: _Namer) -> None:
        self._namer, self.nodes = namer, list[NodeProto]()

    def __call__(self, op_type: str, *inputs: str, **attributes: int) -> str:
        name = self._namer.fresh(f"attrib/precision/{op_type}")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name


def _cast(name: str, output: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [name], [output], f"{output}.cast", to=to)


__all__ = ["halve"]
