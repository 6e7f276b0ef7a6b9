"""Where the nodes of a model run in a CUDA session, and what is copied: told before it runs.

Repeats what ONNX Runtime does with the nodes when it loads a model, graph by graph:

- constants are folded, and what needs no kernel of its own is inlined;
- a node runs on CUDA if there is a kernel for its version and types that does not decline it;
- what computes from sizes alone stays on the CPU, where the kernel of Shape leaves them: every node
  whose inputs are such numbers, graph inputs or small constants, unless its CUDA kernel reads them
  in host memory anyway, or one is a 16-bit float;
- where a tensor is made on one side and read on the other, it is copied. A graph input is if both
  sides read it, and so is, in a subgraph, a constant from outside. What a subgraph reads otherwise
  from outside is brought over before it starts.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TypeProto, helper

from onnx_attrib import kernels
from onnx_attrib.ir import subgraphs
from onnx_attrib.passes.lower import cast_like, instantiated
from onnx_attrib.protos import captured_names
from onnx_attrib.writer import Definition, Rewriter, declared, infer_shapes

_SMALL = 100
"""Entries of a constant that ONNX Runtime still counts as a small one."""
_NARROW = frozenset(("FLOAT16", "BFLOAT16"))


@dataclass(frozen=True)
class Fallback:
    """A node that computes on the CPU, and why."""

    operator: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} '{self.node}': {self.reason}"


@dataclass(frozen=True)
class Copy:
    """A tensor that is copied ``"to host"`` or ``"from host"``, who makes it and who reads it."""

    direction: Literal["to host", "from host"]
    tensor: str
    made_by: str
    read_by: tuple[str, ...]

    def __str__(self) -> str:
        readers = ", ".join(dict.fromkeys(self.read_by))
        return f"{self.direction}: '{self.tensor}', from {self.made_by} to {readers}"


@dataclass
class Placement:
    """How many nodes run on CUDA, what falls back to the CPU and what is copied.

    ``shapes``: nodes on the CPU that compute from sizes and constants alone, which belong there.
    ``onnxruntime``: the release whose kernels this goes by.
    """

    onnxruntime: str = kernels.VERSION
    cuda: int = 0
    shapes: int = 0
    fallbacks: list[Fallback] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        """Whether everything that computes does so on CUDA, without a copy in between."""
        return not self.fallbacks and not self.copies


def placed(model: ModelProto) -> Placement:
    """Where the nodes of a checked model run."""
    model = _inlined(model)
    imports = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
    result = Placement()
    _Level(model.graph, imports, result).run()
    return result


def _inlined(model: ModelProto) -> ModelProto:
    """The model without functions, and without operators that are only defined by others."""
    model = onnx.inliner.inline_local_functions(model) if model.functions else model
    model = infer_shapes(model, data_prop=True)
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def choose(node: NodeProto) -> Definition | None:
        if node.domain or node.op_type == "CastLike":
            return None if node.domain else cast_like
        return instantiated if _only_defined(node, version) else None

    # Definitions may be made of operators that are only defined, too.
    while Rewriter(choose, version).run(model):
        model = infer_shapes(model, data_prop=True)
    return model


def _only_defined(node: NodeProto, version: int) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return False
    if not schema.has_function and not schema.has_context_dependent_function:
        return False
    return kernels.placement(node.op_type, "", version) == "none"


class _Level:
    """One graph, with what it knows of those around it."""

    def __init__(
        self,
        graph: GraphProto,
        imports: Mapping[str, int],
        result: Placement,
        outer: _Level | None = None,
        counters: int = 0,
    ) -> None:
        self.graph, self.imports, self.result, self.outer = graph, imports, result, outer
        self.inputs = {info.name for info in graph.input}
        self.types: dict[str, TypeProto] = {**(outer.types if outer else {}), **declared(graph)}
        self.sizes: dict[str, int | None] = dict(outer.sizes) if outer else {}
        """Entries of every constant, None where unknown."""
        self.known: set[str] = set(outer.known) if outer else {""}
        """What is computed from sizes and constants alone."""
        for name in self.inputs:
            self.sizes.pop(name, None)
            self.known.discard(name)
        own = {t.name: _product(t.dims) for t in graph.initializer if t.name not in self.inputs}
        self.sizes.update(own)
        self.own = set(own)
        self.known |= set(own) | {info.name for info in graph.input[:counters]}
        self.nodes = [node for node in graph.node if not self._folds(node)]
        self.reasons: list[str | None] = [self._reason(node) for node in self.nodes]

    def run(self) -> None:
        """Place the nodes, then those of the subgraphs."""
        on_host = self._kept_on_host()
        on_cuda = [r is None and i not in on_host for i, r in enumerate(self.reasons)]
        for node, cuda, reason in zip(self.nodes, on_cuda, self.reasons, strict=True):
            of_sizes = node.op_type in ("Shape", "Size") or (
                bool(node.input) and not any(subgraphs(node)) and self.known.issuperset(node.input)
            )
            if of_sizes:
                self.known.update(node.output)
            if cuda:
                self.result.cuda += 1
            elif of_sizes:
                self.result.shapes += 1
            else:
                why = reason or "reads only sizes and inputs"
                self.result.fallbacks.append(Fallback(_operator(node), _label(node), why))
        self._copies(on_cuda)
        for node in self.nodes:
            for inner in subgraphs(node):
                counters = 2 if node.op_type == "Loop" else 0
                _Level(inner, self.imports, self.result, self, counters).run()

    # -- kernels ---------------------------------------------------------------------------------

    def _folds(self, node: NodeProto) -> bool:
        """Whether a node is gone before placement: a constant, or the size of a known shape."""
        folds = node.op_type == "Constant"
        if node.op_type == "Shape":
            folds = _entries(self.types.get(node.input[0])) is not None
        elif node.input and not any(subgraphs(node)) and not node.op_type.startswith("Random"):
            folds = all(not name or name in self.sizes for name in node.input)
        for name in node.output if folds else ():
            self.sizes[name] = _entries(self.types.get(name))
            self.own.add(name)
            self.known.add(name)
        return folds

    def _reason(self, node: NodeProto) -> str | None:
        """Why a node does not run on CUDA; None if it does."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        opset = self.imports.get(domain, 1)
        inputs, outputs = ([self._dtype(n) for n in names] for names in (node.input, node.output))
        types = kernels.bound(node.op_type, domain, opset, inputs, outputs)
        if kernels.placement(node.op_type, domain, opset, types) != "cuda":
            if kernels.placement(node.op_type, domain, opset) != "cuda":
                return "no CUDA kernel"
            named = dict.fromkeys(str(t) for t in inputs if t is not None)
            return f"no CUDA kernel for {', '.join(named)}"

        def attribute(name: str) -> Any:
            for given in node.attribute:
                if given.name == name:
                    return helper.get_attribute_value(given)
            default = onnx.defs.get_schema(node.op_type, opset, domain).attributes.get(name)
            if default is None or not default.default_value.name:
                return None
            return helper.get_attribute_value(default.default_value)

        why = kernels.declined(node.op_type, domain, attribute, [bool(n) for n in node.input])
        return None if why is None else f"CUDA's kernel does not take {why}"

    def _dtype(self, name: str) -> Any:
        kind = self.types.get(name) if name else None
        if kind is None:
            return None
        if kind.HasField("sequence_type"):
            element = kind.sequence_type.elem_type.tensor_type.elem_type
            return f"seq(tensor({onnx.TensorProto.DataType.Name(element).lower()}))"
        element = kind.tensor_type.elem_type
        return helper.tensor_dtype_to_np_dtype(element) if element else None

    # -- what stays on the CPU for its inputs' sake ----------------------------------------------

    def _kept_on_host(self) -> set[int]:
        """Nodes with a CUDA kernel that ONNX Runtime keeps on the CPU: arithmetic with sizes."""
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                readers.setdefault(name, []).append(i)
        host, waiting = set[str](), list[int]()
        for i, node in enumerate(self.nodes):
            if self.reasons[i] is None:
                for k in kernels.host_outputs(node.op_type, node.domain):
                    host.add(node.output[k])
                    waiting += readers.get(node.output[k], [])
        heapq.heapify(waiting)
        seen, kept = set[int](), set[int]()
        while waiting:
            i = heapq.heappop(waiting)
            if i in seen:
                continue
            seen.add(i)
            on_cpu = self.reasons[i] is not None
            if on_cpu or self._stays(self.nodes[i], host):
                if not on_cpu:
                    kept.add(i)
                for name in self.nodes[i].output:
                    host.add(name)
                    for reader in readers.get(name, ()):
                        heapq.heappush(waiting, reader)
        return kept

    def _stays(self, node: NodeProto, host: set[str]) -> bool:
        read_there = kernels.host_inputs(node.op_type, node.domain)
        for k, name in enumerate(node.input):
            kind = self.types.get(name)
            element = kind.tensor_type.elem_type if kind is not None else 0
            if onnx.TensorProto.DataType.Name(element) in _NARROW:
                return False
            size = self.sizes.get(name)
            if not name or name in self.inputs or (size is not None and size <= _SMALL):
                continue
            if name not in host or k in read_there:
                return False
        return True

    # -- copies ----------------------------------------------------------------------------------

    def _copies(self, on_cuda: list[bool]) -> None:
        made = dict.fromkeys(self.inputs, (False, "a graph input"))
        readers: dict[tuple[bool, str], list[str]] = {}
        for node, cuda in zip(self.nodes, on_cuda, strict=True):
            host = kernels.host_inputs(node.op_type, node.domain)
            for k, name in enumerate(node.input):
                readers.setdefault((cuda and k not in host, name), []).append(node.op_type)
            for inner in subgraphs(node) if not cuda else ():
                for name in captured_names(inner):
                    readers.setdefault((False, name), []).append(node.op_type)
            host = kernels.host_outputs(node.op_type, node.domain)
            for k, name in enumerate(node.output):
                made[name] = (cuda and k not in host, node.op_type)
        if self.outer is not None:
            # A graph's own constants are there on both sides; those from outside are not.
            outside = {name for _, name in readers if name in self.sizes} - self.own
            made.update((name, (False, "a constant")) for name in outside)
        for name, (cuda, maker) in made.items():
            there = readers.get((not cuda, name), ())
            here = readers.get((cuda, name), ())
            given = maker in ("a graph input", "a constant")
            if name and there and (here or not given):
                direction: Literal["to host", "from host"] = "to host" if cuda else "from host"
                self.result.copies.append(Copy(direction, name, maker, tuple(there)))


def _entries(kind: TypeProto | None) -> int | None:
    """How many entries a tensor of that type has, if its shape is known."""
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    known = all(d.HasField("dim_value") for d in dims)
    return _product([d.dim_value for d in dims]) if known else None


def _product(dims: Any) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total


def _operator(node: NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _label(node: NodeProto) -> str:
    return node.name or next(name for name in node.output if name)


__all__ = ["Copy", "Fallback", "Placement", "placed"]
