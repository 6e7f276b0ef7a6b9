"""The graph being compiled: a thin layer over onnx-graphsurgeon.

Operators are emitted by their ONNX names (``graph.op.Mul(a, b)``); every tensor knows its dtype
and, as far as it can be told, its shape. The layer also carries what graphsurgeon cannot:
metadata, documentation strings, attributes of types it drops, and subgraphs. These stay protobufs
here; a rule that has to look inside one opens a copy of it (:meth:`Graph.open`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_attrib.errors import ModelError
from onnx_attrib.protos import (
    captured_names,
    captures_of,
    holds_only_plain,
    inner_names,
    is_plain,
    rename_captures,
    subgraphs,
)

OPSET = 21
"""Emitted opset: the newest that has CUDA kernels for MaxPool, Elu and their like."""
IR_VERSION = 10
"""Emitted IR version, the one that belongs to opset 21."""

Tensor: TypeAlias = gs.Tensor
Node: TypeAlias = gs.Node
Dim = int | str | None
Shape = tuple[Dim, ...]

_SMALL = 4096
_BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
_MOVES_SIXTEEN_BITS = frozenset(
    """
    Cast Concat Flatten Gather GatherElements GatherND Identity IsNaN Reshape ScatterElements
    ScatterND Shape Slice Split Squeeze Transpose Unsqueeze If Loop Scan
    """.split()
)
"""Operators that onnxruntime's CPU kernels, too, take in bfloat16 (or that have a body)."""
INTERNAL = "onnx_attrib"
"""The domain of operators that never leave the compiler: see :func:`spelled_out`."""


def is_float(dtype: Any) -> bool:
    """Whether ``dtype`` is one that can carry a derivative (float16/32/64, bfloat16)."""
    return dtype is not None and (np.dtype(dtype).kind == "f" or np.dtype(dtype).name == "bfloat16")


def _is_bfloat16(tensor: Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == _BFLOAT16


def is_integer(dtype: Any) -> bool:
    """Whether ``dtype`` holds whole numbers or truth values."""
    return dtype is not None and (
        np.dtype(dtype).kind in "iub" or np.dtype(dtype).name.startswith(("int", "uint"))
    )


def is_narrow(dtype: Any) -> bool:
    """Whether ``dtype`` is a 16-bit float."""
    return is_float(dtype) and np.dtype(dtype).itemsize == 2


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of the graph (not a number or an array)."""
    return isinstance(value, gs.Tensor)


def static(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape as integers, or None if a dimension (or the rank) is unknown."""
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))


def operands(node: Node) -> list[Tensor]:
    """What a node reads, by index: its inputs (nameless where left out), then its captures."""
    return [*node.inputs, *_captures(node)]


def bodies(node: Node) -> list[GraphProto]:
    """The subgraphs that a node holds."""
    kept = _kept(node)
    return [] if kept is None else list(subgraphs(kept))


def _captures(node: Node) -> list[Tensor]:
    """Outer tensors that a node's subgraphs read, each once."""
    return getattr(node, "captures", [])


def _kept(node: Node) -> NodeProto | None:
    """The protobuf of a node of which graphsurgeon would lose a part."""
    return getattr(node, "kept", None)


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


class Values:
    """The model's tensors evaluated at one point.

    Tensors that do not depend on the point stand for themselves.
    """

    def __init__(self, mapping: Mapping[str, Tensor] | None = None) -> None:
        self.mapping = dict(mapping or {})

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.mapping.get(tensor.name, tensor)


class Emitter:
    """Emits operators by their ONNX names: ``op.Mul(a, b)``, ``op.Split(x, outputs=2)``.

    Operands may be tensors, numpy arrays, None (an optional input left out), lists of integers
    (int64 constants) or Python numbers, which take the dtype of the first operand that is a number
    (a float, for a float).
    One output is returned as a tensor, several as a tuple. Attributes that are None are left out.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        return partial(self._graph.emit, op_type)


class Graph:
    """A model at opset 21, open for surgery.

    ``model`` must be normalized: opset 21, no local functions, constants as initializers, and
    types and shapes inferred into ``value_info``. It is taken over, not copied. ``outputs``: how
    the model declares its outputs, which may say less of their shapes than is known.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[onnx.ValueInfoProto] = ()) -> None:
        self._interface = {info.name: info for info in outputs}
        self._header = ModelProto()
        for field, value in model.ListFields():
            if field.name == "metadata_props":
                self._header.metadata_props.extend(value)
            elif field.name in ("producer_name", "producer_version", "domain", "doc_string"):
                setattr(self._header, field.name, value)
            elif field.name == "model_version":
                self._header.model_version = value
        self._imports = {o.domain: o.version for o in model.opset_import if o.domain}
        self._graph_metadata = list(model.graph.metadata_props)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        kept = [self._set_aside(node) for node in model.graph.node]
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            self.gs = gs.import_onnx(model)
        for tensor in self.gs.tensors().values():
            if isinstance(tensor.dtype, int):
                # graphsurgeon leaves types that plain numpy lacks as enumeration values.
                # (Undefined: a sequence or a map.)
                code = tensor.dtype
                holder = tensor._values if isinstance(tensor, gs.Constant) else tensor
                holder.dtype = helper.tensor_dtype_to_np_dtype(code) if code else None
        self._tensors: dict[str, Tensor] = dict(self.gs.tensors())
        for node, proto in zip(self.gs.nodes, kept, strict=True):
            if proto is not None:
                node.kept = proto
                node.captures = [self._tensor(name) for name in captures_of(proto)]
        self._names = set(self._tensors) | {node.name for node in self.gs.nodes}
        self._names |= {name for proto in kept if proto for name in inner_names(proto)}
        self._counters: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}
        self._wide: dict[str, Tensor] = {}
        """In float32, what was emitted and then rounded to bfloat16."""
        self._sink: list[Node] = self.gs.nodes
        self.op = Emitter(self)

    @staticmethod
    def _set_aside(node: NodeProto) -> NodeProto | None:
        """Keep a node's protobuf where graphsurgeon would lose or choke on part of it."""
        if holds_only_plain(node):
            return None
        kept = NodeProto()
        kept.CopyFrom(node)
        plain = [attribute for attribute in kept.attribute if is_plain(attribute)]
        del node.attribute[:]
        node.attribute.extend(plain)
        return kept

    # -- reading -----------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        return self.gs.nodes

    @property
    def inputs(self) -> list[Tensor]:
        return self.gs.inputs

    @property
    def outputs(self) -> list[Tensor]:
        return self.gs.outputs

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            # graphsurgeon knows only what a node reads: not a weight that only subgraphs use.
            kept = self._initializers.get(name)
            self._tensors[name] = (
                gs.Variable(name) if kept is None else OnnxImporter.import_tensor(kept)
            )
        return self._tensors[name]

    def find(self, name: str) -> Tensor | None:
        """The tensor of that name, or None."""
        return self._tensors.get(name)

    def tensors(self) -> Mapping[str, Tensor]:
        """Every named tensor of the graph."""
        return self._tensors

    def uses(self, node: Node) -> list[Tensor]:
        """What a node reads: its inputs, then what its subgraphs capture."""
        return [tensor for tensor in operands(node) if tensor.name]

    def proto(self, node: Node) -> NodeProto:
        """The node as ONNX writes it, with everything graphsurgeon set aside restored."""
        return self._restore(OnnxExporter.export_node(node), node)

    def version(self, domain: str | None) -> int:
        """The version of a domain's operators that the model imports."""
        return self._imports.get(domain, 1) if domain else OPSET

    def attr(self, node: Node, name: str) -> Any:
        """An attribute's value, or the operator's default for it, or None."""
        if name in node.attrs:
            value = node.attrs[name]
            return value.values if isinstance(value, gs.Constant) else value
        kept = _kept(node)
        for attribute in kept.attribute if kept else ():
            if attribute.name == name:
                return helper.get_attribute_value(attribute)
        schema = onnx.defs.get_schema(node.op, self.version(node.domain), node.domain or "")
        declared = schema.attributes.get(name)
        if declared is None or not declared.default_value.name:
            return None
        value = helper.get_attribute_value(declared.default_value)
        return value.decode() if isinstance(value, bytes) else value

    @staticmethod
    def dtype(tensor: Tensor) -> np.dtype[Any]:
        return np.dtype(tensor.dtype)

    @staticmethod
    def shape(tensor: Tensor) -> Shape | None:
        return None if tensor.shape is None else tuple(tensor.shape)

    def value(self, tensor: Tensor | None) -> np.ndarray | None:
        """A constant's value; None for anything computed at run time (or absent)."""
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values)
        return None

    # -- emitting ----------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        """A name that nothing else in the model has, nor any of its subgraphs."""
        count = self._counters.get(stem, 0)
        name = stem if count == 0 else f"{stem}_{count}"
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._counters[stem] = count + 1
        self._names.add(name)
        return name

    def constant(self, value: Any, dtype: Any = None) -> Tensor:
        """A constant tensor; equal small ones are shared."""
        array = np.asarray(value, dtype=dtype)
        if array.size > _SMALL:
            return self._new_constant(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._new_constant(array)
        return self._constants[key]

    def number(self, count: Tensor, dtype: Any) -> Tensor:
        """A count (int64, one entry) that is known at run time, as a float [].

        A Cast would leave it with the sizes, on the CPU, and every use of it elsewhere be a copy;
        a Range reads its ends there and writes where it is used.
        """
        start = count if self.shape(count) == () else self.op.Reshape(count, np.zeros(0, np.int64))
        alone = self.op.Range(start, self.op.Add(start, 1), self.constant(1, np.int64))
        alone.shape = [1]
        result: Tensor = self.op.Squeeze(self.op.Cast(alone, to=np.dtype(dtype)), [0])
        return result

    def _new_constant(self, array: np.ndarray) -> Tensor:
        tensor = gs.Constant(self.fresh("attrib/constant"), np.ascontiguousarray(array).copy())
        # ascontiguousarray promotes rank 0 to rank 1.
        tensor.values = tensor.values.reshape(array.shape)
        self._tensors[tensor.name] = tensor
        return tensor

    def variable(self, name: str, dtype: Any, shape: Shape | None) -> Tensor:
        """A new tensor without a producer (a graph or subgraph input)."""
        tensor = gs.Variable(name, np.dtype(dtype), None if shape is None else list(shape))
        self._names.add(name)
        self._tensors[name] = tensor
        return tensor

    def emit(
        self, op_type: str, *operands: Any, outputs: int = 1, stem: str = "", **attrs: Any
    ) -> Any:
        """Append a node; see :class:`Emitter`. Shapes and types come from ONNX's inference."""
        inputs = self._operands(operands)
        if op_type not in _MOVES_SIXTEEN_BITS and any(map(_is_bfloat16, inputs)):
            return self._emit_wide(op_type, inputs, outputs, stem, attrs)
        if attrs.get("reduction") in ("add", "mul") and is_narrow(inputs[0].dtype):
            # Many entries brought into one: float16 loses digits, and the CPU has no kernel for it.
            wide = [self.op.Cast(inputs[i], to=np.dtype(np.float32)) for i in (0, 2)]
            total = self.emit(op_type, wide[0], inputs[1], wide[1], stem=stem, **attrs)
            return self.op.Cast(total, to=self.dtype(inputs[0]))
        bodies = {k: v for k, v in attrs.items() if isinstance(v, GraphProto)}
        attrs = {
            k: self._attribute(v) for k, v in attrs.items() if v is not None and k not in bodies
        }
        label = stem or f"attrib/{op_type}"
        names = [self.fresh(label) for _ in range(outputs)]
        results = [gs.Variable(name) for name in names]
        node = gs.Node(op_type, self.fresh(f"{label}.node"), attrs, inputs, results)
        if bodies:
            node.kept = OnnxExporter.export_node(node)
            node.kept.attribute.extend(helper.make_attribute(k, v) for k, v in bodies.items())
            node.captures = [self._tensors[name] for name in captures_of(node.kept)]
        self.infer(node)
        for tensor in results:
            self._tensors[tensor.name] = tensor
        self._sink.append(node)
        return results[0] if outputs == 1 else tuple(results)

    def _emit_wide(
        self, op_type: str, inputs: Sequence[Tensor], outputs: int, stem: str, attrs: Any
    ) -> Any:
        """In float32, between casts: onnxruntime's CPU kernels only move bfloat16."""
        wide = [self._widened(tensor) if _is_bfloat16(tensor) else tensor for tensor in inputs]
        found = self.emit(op_type, *wide, outputs=outputs, stem=stem, **attrs)
        results = [found] if outputs == 1 else found
        narrow = [self._narrowed(t) if t.dtype == np.float32 else t for t in results]
        return narrow[0] if outputs == 1 else tuple(narrow)

    def _narrowed(self, tensor: Tensor) -> Tensor:
        narrow: Tensor = self.op.Cast(tensor, to=_BFLOAT16)
        self._wide[narrow.name] = tensor
        return narrow

    def _widened(self, tensor: Tensor) -> Tensor:
        if tensor.name in self._wide:
            # What is computed here is not rounded on the way.
            return self._wide[tensor.name]
        if isinstance(tensor, gs.Constant):
            return self.constant(tensor.values.astype(np.float32))
        wide: Tensor = self.op.Cast(tensor, to=np.dtype(np.float32))
        return wide

    @staticmethod
    def _attribute(value: Any) -> Any:
        if isinstance(value, np.dtype):
            return helper.np_dtype_to_tensor_dtype(value)
        if isinstance(value, np.ndarray):
            return gs.Constant("", value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, list | tuple):
            return [item.item() if isinstance(item, np.generic) else item for item in value]
        return value

    def _operands(self, operands: Sequence[Any]) -> list[Tensor]:
        dtypes = [np.dtype(x.dtype) for x in operands if isinstance(x, gs.Tensor) and x.dtype]
        # A condition does not lend its type, and an index not to a fraction.
        numbers = next((d for d in dtypes if d != np.bool_), None)
        floats = next((d for d in dtypes if is_float(d)), None)
        result = []
        for operand in operands:
            if operand is None:
                result.append(gs.Variable.empty())
            elif isinstance(operand, gs.Tensor):
                result.append(operand)
            elif isinstance(operand, np.ndarray | np.generic):
                result.append(self.constant(operand))
            elif isinstance(operand, list | tuple):
                result.append(self.constant(operand, np.int64))
            else:
                dtype = floats if isinstance(operand, float) else numbers
                if dtype is None:
                    raise TypeError("a Python number needs a tensor beside it to take its dtype")
                result.append(self.constant(operand, dtype))
        while result and not result[-1].name:
            result.pop()
        return result

    def infer(self, node: Node) -> None:
        """Set dtype and shape of a node's outputs by the operator's own inference function."""
        schema = onnx.defs.get_schema(node.op, self.version(node.domain), node.domain or "")
        types = {t.name: _type_proto(t) for t in node.inputs if t.name and t.dtype is not None}
        data = {
            t.name: onnx.numpy_helper.from_array(np.asarray(t.values), t.name)
            for t in node.inputs
            if isinstance(t, gs.Constant) and np.prod(t.shape) <= 64
        }
        if bodies(node):
            return
        untyped = [t.name for t in node.inputs if t.name and t.name not in types]
        if untyped:
            raise ModelError(f"ONNX's type inference does not get as far as tensor '{untyped[0]}'")
        try:
            inferred = onnx.shape_inference.infer_node_outputs(
                schema,
                self.proto(node),
                types,
                data,
                opset_imports=[helper.make_opsetid("", OPSET)],
                ir_version=IR_VERSION,
            )
        except onnx.shape_inference.InferenceError as error:
            names = ", ".join(types)
            raise ModelError(
                f"shapes in the model contradict each other at {node.op} of {names}: {error}"
            ) from None
        for tensor in node.outputs:
            if tensor.name in inferred and inferred[tensor.name].HasField("tensor_type"):
                tensor_type = inferred[tensor.name].tensor_type
                tensor.dtype = helper.tensor_dtype_to_np_dtype(tensor_type.elem_type)
                if tensor_type.HasField("shape"):
                    tensor.shape = [_dim(dim) for dim in tensor_type.shape.dim]

    @contextmanager
    def collect(self) -> Iterator[list[Node]]:
        """Emit into a list of its own instead of the graph: the body of a subgraph."""
        outer = self._sink
        inner: list[Node] = []
        self._sink = inner
        try:
            yield inner
        finally:
            self._sink = outer

    @contextmanager
    def record(self) -> Iterator[list[Node]]:
        """Emit as usual, and also list the nodes emitted meanwhile."""
        start, recorded = len(self._sink), list[Node]()
        yield recorded
        recorded.extend(self._sink[start:])

    def replicate(
        self,
        nodes: Iterable[Node],
        substitution: Mapping[str, Tensor],
        dims: Mapping[str, Dim] | None = None,
    ) -> Values:
        """Evaluate ``nodes`` (in topological order) again with some tensors substituted.

        Only nodes that depend on a substituted tensor are copied. ``dims`` renames symbolic
        dimensions: the copies' shapes are the originals' with these replaced.
        """
        mapping = dict(substitution)
        for node in nodes:
            if not any(tensor.name in mapping for tensor in self.uses(node)):
                continue
            fixed = [t for t in node.outputs if t.name in substitution]
            copy = gs.Node(
                node.op,
                self.fresh(f"{node.name or node.op}/copy"),
                dict(node.attrs),
                [mapping.get(t.name, t) for t in node.inputs],
                [self._copy_tensor(t, dims or {}) for t in node.outputs],
                node.domain,
            )
            self._copy_extras(node, copy, mapping)
            for original, replica in zip(node.outputs, copy.outputs, strict=True):
                if original.name and original.name not in substitution:
                    mapping[original.name] = replica
            if len(fixed) < len(node.outputs):
                self._sink.append(copy)
        return Values(mapping)

    def repeat(
        self, node: Node, inputs: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """The outputs of a node for other inputs; they have the types and shapes of ``like``."""
        copy = gs.Node(
            node.op,
            self.fresh(f"{node.name or node.op}/copy"),
            dict(node.attrs),
            [gs.Variable.empty() if x is None else x for x in inputs],
            [self._copy_tensor(t, {}) for t in like],
            node.domain,
        )
        self._copy_extras(node, copy, {})
        self._sink.append(copy)
        return list(copy.outputs)

    def _copy_tensor(self, tensor: Tensor, dims: Mapping[str, Dim]) -> Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        shape = self.shape(tensor)
        if shape is not None:
            shape = tuple(dims.get(dim, dim) if isinstance(dim, str) else dim for dim in shape)
        name = self.fresh(f"{tensor.name}/copy")
        replica = gs.Variable(name, tensor.dtype, None if shape is None else list(shape))
        self._tensors[name] = replica
        return replica

    def _copy_extras(self, node: Node, copy: Node, mapping: Mapping[str, Tensor]) -> None:
        kept, captures = _kept(node), _captures(node)
        if kept is None:
            return
        renamed = {t.name: mapping[t.name].name for t in captures if t.name in mapping}
        if renamed:
            original, kept = kept, NodeProto()
            kept.CopyFrom(original)
            for inner in subgraphs(kept):
                rename_captures(inner, renamed)
        copy.kept = kept
        copy.captures = [mapping.get(t.name, t) for t in captures]

    def rewire(self, node: Node, renamed: Mapping[str, Tensor]) -> None:
        """Let ``node`` read other tensors in place of those named."""
        if not any(tensor.name in renamed for tensor in self.uses(node)):
            return
        node.inputs = [renamed.get(t.name, t) for t in node.inputs]
        if _captures(node):
            self._copy_extras(node, node, renamed)

    def reseal(self, node: Node, proto: NodeProto) -> None:
        """Give ``node`` the subgraphs of ``proto``, which may read other outer tensors."""
        node.kept = proto
        node.captures = [self._tensor(name) for name in captures_of(proto)]

    def give_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make ``tensor`` the output ``index`` of ``node``, which has none there yet."""
        outputs = list(node.outputs)
        outputs += [gs.Variable.empty() for _ in range(index + 1 - len(outputs))]
        outputs[index] = tensor
        node.outputs = outputs

    # -- order, dead code, export --------------------------------------------------------------

    def sort(self) -> None:
        """Order the nodes topologically (iteratively; stable for an already sorted graph)."""
        self.nodes[:] = self.in_order(self.nodes)

    def in_order(self, nodes: Sequence[Node]) -> list[Node]:
        """``nodes`` in topological order; ties keep their order."""
        producer = {t.name: i for i, node in enumerate(nodes) for t in node.outputs if t.name}
        needs = [
            sorted({producer[t.name] for t in self.uses(node) if t.name in producer})
            for node in nodes
        ]
        state, order = [0] * len(nodes), list[Node]()
        for start in range(len(nodes)):
            stack = [start]
            while stack:
                i = stack[-1]
                if state[i] == 0:
                    state[i] = 1
                    stack.extend(j for j in reversed(needs[i]) if state[j] == 0)
                else:
                    stack.pop()
                    if state[i] == 1:
                        state[i] = 2
                        order.append(nodes[i])
        return order

    def prune(self, nodes: Sequence[Node], outputs: Iterable[Tensor]) -> list[Node]:
        """``nodes`` (sorted) without those that no output needs."""
        needed = {tensor.name for tensor in outputs}
        kept = []
        for node in reversed(nodes):
            if any(tensor.name in needed for tensor in node.outputs if tensor.name):
                needed.update(tensor.name for tensor in self.uses(node))
                kept.append(node)
        return kept[::-1]

    def subgraph(
        self,
        name: str,
        nodes: Sequence[Node],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        hoist: bool = True,
    ) -> GraphProto:
        """Seal ``nodes`` as a subgraph; constants and outer tensors are captured by name.

        What does not depend on the subgraph's inputs is emitted outside instead: it is computed
        once, not in every iteration. Unless ``hoist`` is false: a branch must not run untaken.
        """
        live = self.prune(self.in_order(spelled_out(nodes)), outputs)
        varying = {tensor.name for tensor in inputs}
        inner: list[Node] = []
        for node in live:
            if not hoist or any(tensor.name in varying for tensor in self.uses(node)):
                varying.update(tensor.name for tensor in node.outputs)
                inner.append(node)
            else:
                self._sink.append(node)
        own = {tensor.name for node in inner for tensor in node.outputs}
        results = []
        with self.collect() as ends:
            for tensor in outputs:
                # An output must come from a node inside, and be one output only.
                results.append(tensor if tensor.name in own else self.op.Identity(tensor))
                own.discard(tensor.name)
        return helper.make_graph(
            [self.proto(node) for node in (*inner, *ends)],
            name,
            [_declaration(tensor) for tensor in inputs],
            [_declaration(tensor) for tensor in results],
        )

    # -- inside subgraphs ----------------------------------------------------------------------

    def open(
        self, body: GraphProto, inputs: Sequence[Tensor], captures: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Emit the nodes of a subgraph here and return its outputs.

        ``inputs`` stand for the subgraph's own, ``captures`` for the outer tensors it reads, by
        name. Subgraphs inside it stay sealed.
        """
        bound = dict(captures)
        bound.update(zip((t.name for t in body.input), inputs, strict=True))
        for tensor in body.initializer:
            bound[tensor.name] = self.constant(onnx.numpy_helper.to_array(tensor))
        declared = {info.name: info for info in (*body.value_info, *body.output)}
        for proto in body.node:
            self._open_node(proto, bound, declared)
        return [bound[tensor.name] for tensor in body.output]

    def _open_node(
        self,
        proto: NodeProto,
        bound: dict[str, Tensor],
        declared: Mapping[str, onnx.ValueInfoProto],
    ) -> None:
        copy = NodeProto()
        copy.CopyFrom(proto)
        kept = self._set_aside(copy)
        outputs = [
            self.declared(name, declared.get(name)) if name else gs.Variable.empty()
            for name in proto.output
        ]
        node = gs.Node(
            proto.op_type,
            self.fresh(proto.name or f"attrib/{proto.op_type}.node"),
            OnnxImporter.import_attributes(copy.attribute, {}, {}, OPSET, None),
            [bound[name] if name else gs.Variable.empty() for name in proto.input],
            outputs,
            proto.domain or None,
        )
        if kept is not None:
            captured = captures_of(kept)
            for inner in subgraphs(kept):
                rename_captures(inner, {name: bound[name].name for name in captured})
            node.kept, node.captures = kept, [bound[name] for name in captured]
        self._infer_more(node)
        bound.update((n, t) for n, t in zip(proto.output, outputs, strict=True) if n)
        self._sink.append(node)

    def declared(self, name: str, info: onnx.ValueInfoProto | None) -> Tensor:
        """A new tensor for an opened subgraph, with what its declaration says for sure.

        Symbols are left out: at another point they may stand for another size.
        """
        tensor = gs.Variable(self.fresh(name))
        self._tensors[tensor.name] = tensor
        if info is not None and info.type.HasField("tensor_type"):
            declared = info.type.tensor_type
            if declared.elem_type:
                tensor.dtype = helper.tensor_dtype_to_np_dtype(declared.elem_type)
            if declared.HasField("shape"):
                dims = [_dim(dim) for dim in declared.shape.dim]
                tensor.shape = [dim if isinstance(dim, int) else None for dim in dims]
        return tensor

    def _infer_more(self, node: Node) -> None:
        """Infer types and shapes; keep the declared sizes that inference leaves open."""
        typed = all(tensor.dtype is not None for tensor in node.inputs if tensor.name)
        if not typed or not onnx.defs.has(node.op, node.domain or ""):
            return
        declared = [self.shape(tensor) for tensor in node.outputs]
        self.infer(node)
        for tensor, known in zip(node.outputs, declared, strict=True):
            shape = self.shape(tensor)
            if shape is not None and known is not None and len(shape) == len(known):
                tensor.shape = [k if d is None else d for d, k in zip(shape, known, strict=True)]

    def place(self, node: Node) -> None:
        """Append a node that was emitted into another list."""
        self._sink.append(node)

    def emit_steps(self, node: Node, formal: str, like: Tensor) -> Tensor:
        """Let a Scan or Loop also emit its body's input ``formal``, as it is at every step.

        ``like`` has its type and shape. Returns the new scan output [steps, …].
        """
        kept = NodeProto()
        kept.CopyFrom(node.kept)
        attributes = {attribute.name: attribute for attribute in kept.attribute}
        body = attributes["body"].g
        index = len(body.output) - (node.op == "Loop")
        name = self.fresh("attrib/step")
        body.node.append(helper.make_node("Identity", [formal], [name]))
        step = gs.Variable(name, like.dtype, like.shape)
        body.output.append(_declaration(step))
        for key in ("scan_output_axes", "scan_output_directions"):
            if key in attributes:
                attributes[key].ints.append(0)
        node.kept = kept
        shape = None if like.shape is None else [None, *like.shape]
        steps = gs.Variable(self.fresh("attrib/steps"), like.dtype, shape)
        self._tensors[steps.name] = steps
        self.give_output(node, index, steps)
        return steps

    def to_proto(self) -> ModelProto:
        """The model as ONNX: opset 21, IR 10, metadata restored."""
        self.gs.opset = OPSET
        self.gs.ir_version = IR_VERSION
        imports = {"": OPSET, **self._imports}
        self.gs.import_domains = [helper.make_opsetid(*entry) for entry in imports.items()]
        model = gs.export_onnx(self.gs, do_type_check=False)
        for exported, node in zip(model.graph.node, self.nodes, strict=True):
            self._restore(exported, node)
        present = {t.name for t in model.graph.initializer}
        for node in self.nodes:
            for tensor in _captures(node):
                if isinstance(tensor, gs.Constant) and tensor.name not in present:
                    present.add(tensor.name)
                    model.graph.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        for info in model.graph.output:
            declared = self._interface.get(info.name)
            # A file may declare another rank than its outputs have.
            if declared is not None and _rank(declared) in (None, _rank(info)):
                info.CopyFrom(declared)
        del model.graph.value_info[:]
        model.graph.metadata_props.extend(self._graph_metadata)
        model.MergeFrom(self._header)
        return model

    def set_metadata(self, entries: Mapping[str, str]) -> None:
        """Add (or replace) entries of the model's metadata_props."""
        kept = [prop for prop in self._header.metadata_props if prop.key not in entries]
        del self._header.metadata_props[:]
        self._header.metadata_props.extend(kept)
        for key, value in entries.items():
            self._header.metadata_props.add(key=key, value=value)

    def _restore(self, exported: NodeProto, node: Node) -> NodeProto:
        kept = _kept(node)
        if kept is not None:
            del exported.attribute[:]
            exported.attribute.extend(kept.attribute)
            exported.doc_string = kept.doc_string
            exported.overload = kept.overload
            exported.metadata_props.extend(kept.metadata_props)
        return exported


def _declaration(tensor: Tensor) -> onnx.ValueInfoProto:
    """An input or output of a subgraph: type and rank.

    Sizes are left to run time: what is known as batch 1 may be a batch of N there.
    """
    free = gs.Variable(tensor.name, tensor.dtype, tensor.shape and [None] * len(tensor.shape))
    return OnnxExporter.export_value_info_proto(free, True)


def _rank(info: onnx.ValueInfoProto) -> int | None:
    kind = info.type.tensor_type
    return len(kind.shape.dim) if kind.HasField("shape") else None


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param else None


def _type_proto(tensor: Tensor) -> TypeProto:
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    shape = None if tensor.shape is None else list(tensor.shape)
    if getattr(tensor, "type", "tensor_type") == "sequence_type":
        return helper.make_sequence_type_proto(helper.make_tensor_type_proto(elem_type, shape))
    return helper.make_tensor_type_proto(elem_type, shape)


__all__ = [
    "INTERNAL",
    "IR_VERSION",
    "OPSET",
    "Dim",
    "Emitter",
    "Graph",
    "Node",
    "Shape",
    "Tensor",
    "TensorProto",
    "Values",
    "bodies",
    "captured_names",
    "is_float",
    "is_integer",
    "is_narrow",
    "is_tensor",
    "operands",
    "static",
    "subgraphs",
]
