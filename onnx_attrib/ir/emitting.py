"""The graph as it is written: new tensors, constants and nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_attrib.errors import ModelError
from onnx_attrib.ir.declarations import dimension, type_proto
from onnx_attrib.ir.nodes import Node, bodies
from onnx_attrib.ir.reading import OPSET, Reading
from onnx_attrib.ir.tensors import BFLOAT16, Shape, Tensor, is_bfloat16, is_float, is_narrow
from onnx_attrib.protos import captures_of

IR_VERSION = 10
"""Emitted IR version, the one that belongs to opset 21."""
_SMALL = 4096
_MOVES_SIXTEEN_BITS = frozenset(
    """
    Cast Concat Flatten Gather GatherElements GatherND Identity IsNaN Reshape ScatterElements
    ScatterND Shape Slice Split Squeeze Transpose Unsqueeze If Loop Scan
    """.split()
)
"""Operators that onnxruntime's CPU kernels, too, take in bfloat16 (or that have a body)."""


class Emitter:
    """Emits operators by their ONNX names: ``op.Mul(a, b)``, ``op.Split(x, outputs=2)``.

    Operands may be tensors, numpy arrays, None (an optional input left out), lists of integers
    (int64 constants) or Python numbers, which take the dtype of the first operand that is a number
    (a float, for a float).
    One output is returned as a tensor, several as a tuple. Attributes that are None are left out.
    """

    def __init__(self, graph: Emitting) -> None:
        self._graph = graph

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        return partial(self._graph.emit, op_type)


class Emitting(Reading):
    """What can be added to a graph."""

    op: Emitter
    _names: set[str]
    _counters: dict[str, int]
    _constants: dict[tuple[str, tuple[int, ...], bytes], Tensor]
    _wide: dict[str, Tensor]
    """In float32, what was emitted and then rounded to bfloat16."""
    _sink: list[Node]
    _inferred: dict[Any, list[tuple[np.dtype[Any], Shape | None] | None]]
    """Types and shapes of outputs, by all that they follow from."""

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
        if op_type not in _MOVES_SIXTEEN_BITS and any(map(is_bfloat16, inputs)):
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
        wide = [self._widened(tensor) if is_bfloat16(tensor) else tensor for tensor in inputs]
        found = self.emit(op_type, *wide, outputs=outputs, stem=stem, **attrs)
        results = [found] if outputs == 1 else found
        narrow = [self._narrowed(t) if t.dtype == np.float32 else t for t in results]
        return narrow[0] if outputs == 1 else tuple(narrow)

    def _narrowed(self, tensor: Tensor) -> Tensor:
        narrow: Tensor = self.op.Cast(tensor, to=BFLOAT16)
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
        if bodies(node):
            return
        key = _signature(node)
        if key not in self._inferred:
            self._inferred[key] = self._outputs_of(node)
        for tensor, found in zip(node.outputs, self._inferred[key], strict=True):
            if found is not None:
                tensor.dtype, shape = found
                if shape is not None:
                    tensor.shape = list(shape)

    def _outputs_of(self, node: Node) -> list[tuple[np.dtype[Any], Shape | None] | None]:
        schema = onnx.defs.get_schema(node.op, self.version(node.domain), node.domain or "")
        types = {t.name: type_proto(t) for t in node.inputs if t.name and t.dtype is not None}
        data = {
            t.name: onnx.numpy_helper.from_array(np.asarray(t.values), t.name)
            for t in node.inputs
            if _is_small_constant(t)
        }
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
        return [_declared(inferred.get(tensor.name)) for tensor in node.outputs]

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

    def place(self, node: Node) -> None:
        """Append a node that was emitted into another list."""
        self._sink.append(node)


def _is_small_constant(tensor: Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and np.prod(tensor.shape) <= 64


def _signature(node: Node) -> Any:
    """Equal for nodes whose outputs have the same types and shapes."""
    inputs = tuple(
        t.name
        if not t.name or _is_small_constant(t)
        else (t.dtype, None if t.shape is None else tuple(t.shape), getattr(t, "type", ""))
        for t in node.inputs
    )
    attributes = tuple((key, _frozen(value)) for key, value in sorted(node.attrs.items()))
    kept = node.kept.SerializeToString() if getattr(node, "kept", None) is not None else b""
    outputs = tuple(bool(t.name) for t in node.outputs)
    return node.op, node.domain, inputs, attributes, kept, outputs


def _frozen(value: Any) -> Any:
    if isinstance(value, gs.Constant):
        return str(value.values.dtype), value.values.shape, value.values.tobytes()
    return tuple(value) if isinstance(value, list) else value


def _declared(info: onnx.TypeProto | None) -> tuple[np.dtype[Any], Shape | None] | None:
    if info is None or not info.HasField("tensor_type"):
        return None
    tensor = info.tensor_type
    shape = tuple(map(dimension, tensor.shape.dim)) if tensor.HasField("shape") else None
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape
