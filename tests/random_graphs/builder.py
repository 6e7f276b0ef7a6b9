"""A graph in the making: every node is run as it is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ..numeric import Array

Choose = Callable[[int, int], int]
"""``choose(low, high)``: a whole number, both ends included."""

IR_VERSIONS = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8}
LARGEST = 200
"""Entries that a tensor may have."""
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16}


NO_DOUBLE = frozenset(
    "LeakyRelu PRelu HardSigmoid HardSwish Celu Mish Shrink ThresholdedRelu Softsign Softplus "
    "Swish Gelu".split()
)
"""Operators that onnxruntime runs in float64 only in the opsets in which it takes them apart."""


class Refused(Exception):
    """A node that does not fit here; the builder goes on with another."""


@dataclass(frozen=True)
class Example:
    """A model, values for its inputs, and what is to be explained.

    ``batch``: samples are independent and the leading symbol may be another number. ``steps``:
    the recipes that made it.
    """

    model: ModelProto
    feeds: dict[str, Array]
    output: str
    seed: int
    batch: bool
    dtype: str
    opset: int
    steps: tuple[str, ...]

    def __repr__(self) -> str:
        kind = "batch" if self.batch else "mixed"
        head = f"# {self.dtype}, opset {self.opset}, {kind}, explains {self.output}"
        return f"{head}\n{onnx.printer.to_text(self.model)}"


@dataclass
class Builder:
    """A graph in the making. ``values`` holds what every tensor is at the first point."""

    choose: Choose
    opset: int
    dtype: str
    batch: bool
    rng: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, list[int | str | None]] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)

    @property
    def operators(self) -> int:
        return sum(node.op_type != "Constant" for node in self.nodes)

    @property
    def leads(self) -> bool:
        """Whether an input has a leading symbol: constants with an entry a sample would pin it."""
        return any(isinstance(dim, str) for dims in self.inputs.values() for dim in dims[:1])

    # -- choices ---------------------------------------------------------------------------------

    def chance(self, percent: int) -> bool:
        """Whether to do the less simple thing; the simplest choices are the smallest numbers."""
        return self.choose(0, 99) >= 100 - percent

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.choose(0, len(options) - 1)]

    def some(self, options: Sequence[int], least: int = 1) -> list[int]:
        """A subset, in order."""
        chosen = [k for k in options if self.chance(50)]
        while len(chosen) < least:
            rest = [k for k in options if k not in chosen]
            if not rest:
                raise Refused
            chosen.append(self.pick(rest))
        return sorted(chosen)

    def tensor(self, *ranks: int, fits: Callable[[Array], bool] = lambda value: True) -> str:
        """A tensor so far, one of the last made rather than an old one."""
        names = [n for n in self.pool if not ranks or self.rank(n) in ranks]
        names = [n for n in names if fits(self.values[n])]
        if not names:
            raise Refused
        loose = [n for n in names if n not in self.used]
        if loose and self.chance(50):
            return str(self.pick(loose[::-1]))
        return str(self.pick(names[-4:][::-1] if self.chance(60) else names[::-1]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def rank(self, name: str) -> int:
        return self.values[name].ndim

    def free(self, name: str) -> list[int]:
        """Axes that an operator may mix."""
        return list(range(int(self.batch), self.rank(name)))

    def axis(self, name: str, least: int = 1) -> int:
        """One of the free axes, of at least that size."""
        sizes = self.shape(name)
        return int(self.pick_or_refuse([k for k in self.free(name) if sizes[k] >= least]))

    def pick_or_refuse(self, options: Sequence[Any]) -> Any:
        if not options:
            raise Refused
        return self.pick(options)

    def signed(self, axis: int, rank: int, since: int = 11) -> int:
        """The axis, sometimes counted from the end."""
        return axis - rank if self.opset >= since and self.chance(30) else axis

    # -- constants -------------------------------------------------------------------------------

    def array(self, *shape: int, scale: float = 1.0) -> Array:
        return np.asarray(self.rng.normal(0, scale, shape)).astype(DTYPES[self.dtype])

    def name(self, stem: str) -> str:
        return f"{stem}{len(self.nodes) + len(self.weights)}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A constant, written in one of the ways that ONNX has."""
        array = np.asarray(value)
        array = array.astype(DTYPES[self.dtype] if dtype is None else dtype)
        name = self.name("c")
        self.constants[name] = self.values[name] = array
        if self.chance(25) and (self.opset >= 9 or array.dtype.kind == "f"):
            attributes: dict[str, Any] = {"value": numpy_helper.from_array(array)}
            if self.opset >= 12 and array.ndim == 0 and array.dtype == np.float32:
                attributes = {"value_float": float(array)}
            elif self.opset >= 12 and array.ndim == 1 and array.dtype == np.int64 and array.size:
                attributes = {"value_ints": array.tolist()}
            self.nodes.append(helper.make_node("Constant", [], [name], **attributes))
        else:
            self.weights[name] = array
        return name

    def number(self, value: float) -> str:
        """A scalar, or a vector of one entry where that broadcasts alike."""
        return self.constant(value if self.chance(70) else [value])

    def ints(self, *values: int) -> str:
        return self.constant(list(values), np.int64)

    # -- nodes -----------------------------------------------------------------------------------

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and run it; Refused if onnxruntime does not, or the result is unusable."""
        if self.dtype == "float64" and op in NO_DOUBLE:
            raise Refused
        held = list(inputs)
        while held and not held[-1]:
            held.pop()
        stem = f"t{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}{letter}" for letter in "abcdefgh"[:outputs]]
        kept = {k: v for k, v in attributes.items() if v is not None}
        node = helper.make_node(op, held, names, **kept)
        results = self._run(node)
        for value in results:
            if not 0 < value.size <= LARGEST or value.ndim > 6 or not np.isfinite(value).all():
                raise Refused
        self.nodes.append(node)
        self.values.update(zip(names, results, strict=True))
        for name in held:
            self.used.add(name)
        return names[0] if outputs == 1 else names

    def _run(self, node: NodeProto) -> list[Array]:
        given = [name for name in dict.fromkeys(node.input) if name]
        infos = [
            helper.make_tensor_value_info(n, element(self.values[n]), self.shape(n)) for n in given
        ]
        fixed = [n for n in given if n in self.constants]
        graph = helper.make_graph(
            [node],
            "one",
            [info for info in infos if info.name not in fixed or self.opset < 9],
            [onnx.ValueInfoProto(name=name) for name in node.output],
            [numpy_helper.from_array(self.values[n], n) for n in fixed],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = ir_version(self.opset)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            feeds = {n: self.values[n] for n in given if n not in fixed}
            return [np.asarray(value) for value in session.run(None, feeds)]
        except Exception:  # no kernel for the type, or a shape that does not fit
            raise Refused from None

    def setting(self, since: int, op: str, x: str, outputs: int = 1, **given: Any) -> Any:
        """A node with one setting: an attribute before the opset ``since``, an input after."""
        (name, value), *rest = given.items()
        if self.opset < since:
            return self.emit(op, x, outputs=outputs, **{name: value}, **dict(rest))
        whole = isinstance(value, list | int)
        extra = self.constant(value, np.int64 if whole else None)
        return self.emit(op, x, extra, outputs=outputs, **dict(rest))

    def add(self, name: str) -> None:
        """Make a tensor available, scaled back to order one."""
        self.pool.append(self.tamed(name))

    def tamed(self, name: str) -> str:
        value = self.values[name].astype(np.float64)
        size = float(np.abs(value).max())
        if size > 4:
            return str(self.emit("Mul", name, self.number(round(2 / size, 6))))
        if 1e-3 < size < 0.05 and self.chance(70):
            return str(self.emit("Mul", name, self.number(float(f"{1 / size:.4g}"))))
        return name

    # -- common maps -----------------------------------------------------------------------------

    def positive(self, x: str) -> str:
        """A map of ``x`` that stays above a tenth."""
        kind = self.choose(0, 4)
        if kind == 0:
            return str(self.emit("Add", self.emit("Mul", x, x), self.number(0.5)))
        if kind == 1:
            return str(self.emit("Add", self.emit("Sigmoid", x), self.number(0.2)))
        if kind == 2:
            return str(self.emit("Exp", self.bounded(x)))
        if kind == 3:
            return str(self.emit("Add", self.emit("Abs", x), self.number(0.3)))
        return str(self.emit("Add", self.emit("Softplus", x), self.number(0.25)))

    def bounded(self, x: str) -> str:
        """A map of ``x`` that stays within ±0.9."""
        squashed = self.emit(self.pick(["Tanh", "Softsign"]), x)
        return str(self.emit("Mul", squashed, self.number(0.9)))

    def operand(self, x: str, constant: int = 40) -> str:
        """Another operand that broadcasts with ``x``: a constant, or a tensor so far."""
        shape = self.shape(x)
        fitting = [n for n in self.pool if self.meets(n, shape)]
        if fitting and not self.chance(constant):
            return str(self.pick(fitting[::-1]))
        start = self.choose(int(self.batch and self.rank(x) > 0), self.rank(x))
        dims = [d if not self.chance(30) else 1 for d in shape[start:]]
        if self.batch and len(dims) == self.rank(x) and dims:
            dims[0] = 1
        if not self.batch and self.chance(15):
            dims = [self.choose(1, 3) if d == 1 else d for d in dims]
        return self.constant(self.array(*dims))

    def meets(self, name: str, shape: tuple[int, ...]) -> bool:
        other = self.shape(name)
        if self.batch:
            if len(other) != len(shape):
                return False
            pairs = list(zip(other, shape, strict=True))[1:]
        else:
            short = min(len(other), len(shape))
            pairs = list(zip(other[::-1][:short], shape[::-1][:short], strict=True))
        return all(a == b or 1 in (a, b) for a, b in pairs)


def element(value: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(value.dtype))


def ir_version(opset: int) -> int:
    return IR_VERSIONS.get(opset, 9 if opset < 21 else 10)


# -- recipes: each adds a few nodes and returns the tensors to go on with --------------------------

Recipe = Callable[[Builder], "str | list[str]"]
RECIPES: dict[str, tuple[int, Recipe]] = {}
"""By name: the first opset and the recipe."""


def recipe(since: int = 7) -> Callable[[Recipe], Recipe]:
    def enter(made: Recipe) -> Recipe:
        RECIPES[made.__name__] = since, made
        return made

    return enter
