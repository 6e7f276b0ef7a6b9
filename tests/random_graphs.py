"""Random valid models, for property-based tests.

:func:`build` makes one from a source of whole numbers (a hypothesis strategy, or a seeded
generator): 5 to 40 operators over random shapes, element types, opsets and ways to write constants.
Every node is run on its own in onnxruntime as it is added, so the shape and the size of each value
are known: a node that onnxruntime refuses is left out, and values are scaled back to order one.
Logarithms, roots and quotients stand behind positive maps.

Two kinds: with a batch axis ``N`` that every operator keeps apart, or with any dimension mixed with
any other and symbols that say less than the values do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .numeric import Array, run

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


PLAIN = {
    7: "Relu Sigmoid Tanh Softplus Softsign Abs Neg Sin Cos Atan Identity LeakyRelu Elu Selu "
    "HardSigmoid",
    9: "Erf Sinh Cosh Asinh",
    14: "HardSwish",
    18: "Mish",
    24: "Swish",
}


@recipe()
def activation(b: Builder) -> str:
    names = " ".join(ops for since, ops in PLAIN.items() if b.opset >= since).split()
    op = b.pick(names)
    attributes: dict[str, Any] = {}
    if op in ("LeakyRelu", "Elu") and b.chance(50):
        attributes = {"alpha": 0.3}
    if op == "HardSigmoid" and b.chance(50):
        attributes = {"alpha": 0.4, "beta": 0.3}
    return str(b.emit(op, b.tensor(), **attributes))


@recipe()
def limited(b: Builder) -> str:
    """Functions of a bounded argument."""
    names = ["Tan", "Asin", "Acos", "Exp"] + (["Atanh"] if b.opset >= 9 else [])
    return str(b.emit(b.pick(names), b.bounded(b.tensor())))


@recipe()
def of_positive(b: Builder) -> str:
    x = b.positive(b.tensor())
    op = b.pick(["Log", "Sqrt", "Reciprocal", "Pow", "Acosh"])
    if op == "Acosh":
        if b.opset < 9:
            raise Refused
        return str(b.emit("Acosh", b.emit("Add", x, b.number(1.2))))
    if op == "Pow":
        return str(b.emit("Pow", x, b.number(b.pick([0.5, -1.0, 1.5, -0.5, 1.0, 0.0]))))
    return str(b.emit(op, x))


@recipe()
def power(b: Builder) -> str:
    x = b.tensor()
    if b.chance(50):
        return str(b.emit("Pow", b.positive(x), b.operand(x, constant=30)))
    exponent = b.pick([2.0, 3.0, 1.0, 4.0])
    if b.opset >= 12 and b.chance(30):
        return str(b.emit("Pow", x, b.constant(exponent, np.int64)))
    return str(b.emit("Pow", x, b.number(exponent)))


@recipe()
def clip(b: Builder) -> str:
    x = b.tensor()
    if b.opset < 11:
        return str(b.emit("Clip", x, min=-0.7, max=0.8))
    low, high = b.constant(-0.7), b.constant(0.8)
    low, high = b.pick([(low, high), ("", high), (low, "")])
    return str(b.emit("Clip", x, low, high))


@recipe(9)
def shrink(b: Builder) -> str:
    return str(b.emit("Shrink", b.tensor(), lambd=0.3, bias=b.pick([0.0, 0.1])))


@recipe(10)
def thresholded(b: Builder) -> str:
    return str(b.emit("ThresholdedRelu", b.tensor(), alpha=0.2))


@recipe(12)
def celu(b: Builder) -> str:
    return str(b.emit("Celu", b.tensor(), alpha=b.pick([1.0, 0.6])))


@recipe(20)
def gelu(b: Builder) -> str:
    return str(b.emit("Gelu", b.tensor(), approximate=b.pick(["none", "tanh"])))


@recipe()
def prelu(b: Builder) -> str:
    x = b.tensor()
    slopes = [n for n in b.pool if b.shape(n) == b.shape(x)]
    if slopes and b.chance(30):
        return str(b.emit("PRelu", x, b.pick(slopes)))
    dims = [d if b.chance(50) else 1 for d in b.shape(x)[int(b.batch) :]]
    return str(b.emit("PRelu", x, b.constant(np.abs(b.array(*dims)))))


@recipe()
def gate(b: Builder) -> str:
    """x · f(x): an activation spelled out."""
    x = b.tensor()
    y = b.emit(b.pick(["Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softplus"]), x)
    return str(b.emit("Mul", *([x, y] if b.chance(50) else [y, x])))


@recipe(9)
def piecewise(b: Builder) -> str:
    """A choice by the sign of the argument: one nonlinearity of it."""
    x = b.tensor()
    positive = b.emit("Greater", x, b.constant(0.0))
    other = b.emit(b.pick(["Tanh", "Neg", "Softsign"]), x)
    return str(b.emit("Where", positive, x, other))


@recipe()
def cast(b: Builder) -> str:
    """There and back, by way of a wider type."""
    x = b.tensor()
    if b.dtype == "float64":
        raise Refused
    via = TensorProto.DOUBLE if b.dtype == "float32" else TensorProto.FLOAT
    home = element(b.values[x])
    return str(b.emit("Cast", b.emit("Cast", x, to=via), to=home))


@recipe()
def dropout(b: Builder) -> str:
    x = b.tensor()
    if b.opset < 12:
        return str(b.emit("Dropout", x, ratio=0.3))
    return str(b.emit("Dropout", x, b.constant(0.3, np.float32)))


@recipe(10)
def remainder(b: Builder) -> str:
    return str(b.emit("Mod", b.tensor(), b.number(0.7), fmod=1))


@recipe()
def binary(b: Builder) -> str:
    x = b.tensor()
    pair = [x, b.operand(x)]
    op = b.pick(["Add", "Mul", "Sub", "Div"])
    if op == "Div":
        # The divisor is away from zero.
        pair[1] = b.positive(pair[1])
    elif b.chance(30):
        pair.reverse()
    return str(b.emit(op, *pair))


@recipe()
def quotient(b: Builder) -> str:
    """A constant over a positive map."""
    x = b.tensor()
    top = b.number(0.8)
    return str(b.emit("Div", top, b.positive(x)))


@recipe(8)
def variadic(b: Builder) -> str:
    x = b.tensor()
    count = b.choose(1, 4)
    names = [x, *[b.operand(x, constant=25) for _ in range(count - 1)]]
    return str(b.emit(b.pick(["Max", "Min", "Sum", "Mean"]), *names))


@recipe()
def difference(b: Builder) -> str:
    """A tensor against a constant of its own, by Max or Min."""
    x = b.tensor()
    bound = b.number(0.1) if b.opset >= 8 else b.constant(np.full(b.shape(x), 0.1))
    if b.opset < 8 and b.batch:
        raise Refused
    pair = [x, bound] if b.chance(60) else [bound, x]
    return str(b.emit(b.pick(["Max", "Min"]), *pair))


@recipe(9)
def where(b: Builder) -> str:
    x = b.tensor()
    y = b.operand(x)
    dims = [1, *b.shape(x)[1:]] if b.batch else list(b.shape(x))
    dims = dims[b.choose(0, len(dims)) :]
    mask = b.constant(b.rng.random(dims) < 0.5, np.bool_)
    return str(b.emit("Where", mask, *([x, y] if b.chance(70) else [y, x])))


# -- products --------------------------------------------------------------------------------------


@recipe()
def matmul_weight(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    width = b.shape(x)[-1]
    if b.chance(15):
        return str(b.emit("MatMul", x, b.constant(b.array(width))))
    if b.chance(20) and b.rank(x) >= 2 + int(b.batch):
        rows = b.constant(b.array(b.choose(1, 4), b.shape(x)[-2], scale=0.6))
        return str(b.emit("MatMul", rows, x))
    dims = [width, b.choose(1, 5)]
    if b.chance(15) and b.rank(x) > 2:
        dims = [b.pick([1, b.shape(x)[-3]]) if not b.batch or b.rank(x) > 3 else 1, *dims]
    weight = b.constant(b.array(*dims, scale=1 / math.sqrt(width)))
    return str(b.emit("MatMul", x, weight))


@recipe()
def matmul_pair(b: Builder) -> str:
    """Two variables; the second turned where that makes them fit."""
    x = b.tensor(fits=lambda v: v.ndim >= 1 + 2 * int(b.batch))
    width = b.shape(x)[-1]
    lead = b.shape(x)[:1] if b.batch else ()
    for y in b.pool[::-1]:
        shape = b.shape(y)
        if b.batch and (len(shape) != b.rank(x) or shape[:1] != lead):
            continue
        if not shape or (b.chance(30) and y != x):
            continue
        if shape[-1] == width and len(shape) >= 2:
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            try:
                turned = b.emit("Transpose", y, perm=order)
                return str(b.emit("MatMul", x, turned))
            except Refused:
                continue
        if (len(shape) == 1 or shape[-2] == width) and not b.leads:
            try:
                return str(b.emit("MatMul", x, y))
            except Refused:
                continue
    raise Refused


@recipe()
def gemm(b: Builder) -> str:
    x = b.tensor(2)
    turned = b.chance(30) and not b.batch
    width, rows = b.shape(x)[::-1] if not turned else b.shape(x)
    out = b.choose(1, 5)
    flip = b.chance(40)
    others = [n for n in b.pool if b.rank(n) == 2 and b.shape(n)[int(flip)] == width]
    if others and not b.leads and b.chance(40):
        weight = b.pick(others)
        out = b.shape(weight)[int(not flip)]
    else:
        weight = b.constant(b.array(*((out, width) if flip else (width, out)), scale=0.6))
    attributes: dict[str, Any] = {"transA": int(turned), "transB": int(flip)}
    if b.chance(30):
        attributes |= {"alpha": 0.7, "beta": 1.3}
    if b.opset >= 11 and b.chance(30):
        return str(b.emit("Gemm", x, weight, **attributes))
    shapes = [(out,), (1, out), (1,), (1, 1)] + ([] if b.leads else [(rows, 1), (rows, out), ()])
    wanted = b.pick(shapes)
    biases = [n for n in b.pool if b.shape(n) == wanted] if not b.batch else []
    bias = b.pick(biases) if biases and b.chance(40) else b.constant(b.array(*wanted))
    return str(b.emit("Gemm", x, weight, bias, **attributes))


@recipe(12)
def einsum(b: Builder) -> str:
    if b.batch:
        x = b.tensor(3)
        equation = b.pick(["bij,bkj->bik", "bij,bij->bi", "bij,bij->bji", "bij,bkj->bkij"])
        return str(b.emit("Einsum", x, x, equation=equation))
    x = b.tensor(2)
    equation = b.pick(["ij,ij->i", "ij,kj->ik", "ij,ij->", "ij,kj->", "ij,kl->jl", "ij,ij->ji"])
    return str(b.emit("Einsum", x, x, equation=equation))


# -- windows ---------------------------------------------------------------------------------------


def windows(b: Builder, x: str) -> tuple[list[int], dict[str, Any]]:
    """A kernel and how it slides."""
    sizes = b.shape(x)[2:]
    kernel = [b.choose(1, min(3, size)) for size in sizes]
    attributes: dict[str, Any] = {}
    if b.chance(40):
        attributes["strides"] = [b.choose(1, 2) for _ in sizes]
    mode = b.pick(["", "", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if mode == "pads":
        attributes["pads"] = [b.choose(0, k - 1) for k in kernel * 2]
    elif mode:
        attributes["auto_pad"] = mode
    return kernel, attributes


def dilated(b: Builder, x: str, kernel: list[int], attributes: dict[str, Any]) -> None:
    if b.chance(25) and not attributes.get("auto_pad", "").startswith("SAME"):
        attributes["dilations"] = [
            b.choose(1, 2) if 2 * (k - 1) < size else 1
            for k, size in zip(kernel, b.shape(x)[2:], strict=True)
        ]


@recipe()
def convolution(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    dilated(b, x, kernel, attributes)
    channels = b.shape(x)[1]
    groups = b.pick([1, 1, *[g for g in range(2, channels + 1) if channels % g == 0]])
    out = groups * b.choose(1, 2)
    weight = b.constant(b.array(out, channels // groups, *kernel, scale=0.5))
    bias = b.constant(b.array(out)) if b.chance(60) else ""
    if groups > 1 or b.chance(50):
        attributes["group"] = groups
    if b.chance(50):
        attributes["kernel_shape"] = kernel
    return str(b.emit("Conv", x, weight, bias, **attributes))


@recipe()
def transposed_convolution(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    if attributes.get("auto_pad", "").startswith("SAME"):
        # Where a stride is beyond the kernel, runtimes disagree.
        attributes.pop("strides", None)
    channels = b.shape(x)[1]
    groups = b.pick([1, 1, *[g for g in range(2, channels + 1) if channels % g == 0]])
    weight = b.constant(b.array(channels, b.choose(1, 2), *kernel, scale=0.5))
    bias = b.constant(b.array(b.values[weight].shape[1] * groups)) if b.chance(50) else ""
    strides = attributes.get("strides")
    if strides and "auto_pad" not in attributes and b.chance(40):
        attributes["output_padding"] = [b.choose(0, s - 1) for s in strides]
    return str(b.emit("ConvTranspose", x, weight, bias, group=groups, **attributes))


@recipe()
def pool(b: Builder) -> str:
    x = b.tensor(3, 4)
    kernel, attributes = windows(b, x)
    op = b.pick(["MaxPool", "AveragePool"])
    if op == "AveragePool" and attributes.get("auto_pad", "").startswith("SAME"):
        attributes.pop("strides", None)
    if b.opset >= 10 and attributes.get("auto_pad") is None and b.chance(30):
        attributes["ceil_mode"] = 1
    if op == "AveragePool" and b.chance(40):
        attributes["count_include_pad"] = 1
    if (op == "MaxPool" and b.opset >= 10) or b.opset >= 19:
        dilated(b, x, kernel, attributes)
    result = str(b.emit(op, x, kernel_shape=kernel, **attributes))
    if attributes.get("ceil_mode"):
        # Where the last window starts in the padding, ONNX's inference differs between opsets.
        pads, strides = attributes.get("pads", [0] * 8), attributes.get("strides", [1] * 4)
        dilations = attributes.get("dilations", [1] * 4)
        for k, size in enumerate(b.shape(x)[2:]):
            around = size + pads[k] + pads[k + len(kernel)] - dilations[k] * (kernel[k] - 1) - 1
            if b.shape(result)[2 + k] != -(-around // strides[k]) + 1:
                raise Refused
    return result


@recipe()
def global_pool(b: Builder) -> str:
    return str(b.emit(b.pick(["GlobalAveragePool", "GlobalMaxPool"]), b.tensor(3, 4)))


@recipe()
def lp_pool(b: Builder) -> str:
    x = b.positive(b.tensor(3, 4))
    if b.chance(50):
        return str(b.emit("GlobalLpPool", x, p=b.pick([2, 1, 3])))
    kernel = [b.choose(1, min(3, size)) for size in b.shape(x)[2:]]
    return str(b.emit("LpPool", x, kernel_shape=kernel, p=b.pick([2, 1, 3])))


@recipe(18)
def crop_and_pad(b: Builder) -> str:
    # Of all axes: given only some, onnxruntime 1.31 fails where a Transpose is moved past it.
    if b.leads:
        raise Refused
    x = b.tensor(fits=lambda v: v.ndim > 0)
    return str(b.emit("CenterCropPad", x, b.ints(*[b.choose(1, d + 2) for d in b.shape(x)])))


@recipe(11)
def resize(b: Builder) -> str:
    x = b.tensor(3, 4)
    mode = b.pick(["nearest", "linear", "nearest"])
    attributes: dict[str, Any] = {"mode": mode}
    if b.chance(60):
        attributes["coordinate_transformation_mode"] = b.pick(
            ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
        )
    if mode == "nearest" and b.chance(40):
        attributes["nearest_mode"] = b.pick(["floor", "ceil", "round_prefer_floor"])
    scales = [1.0, 1.0, *[b.pick([2.0, 1.0, 1.5, 0.5]) for _ in b.shape(x)[2:]]]
    roi = b.constant([], np.float32) if b.opset < 13 else ""
    return str(b.emit("Resize", x, roi, b.constant(scales, np.float32), **attributes))


# -- normalisations --------------------------------------------------------------------------------


@recipe()
def softmax(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    op = b.pick(["Softmax", "LogSoftmax"])
    return str(b.emit(op, x, axis=b.signed(b.axis(x), b.rank(x))))


@recipe()
def spelled_softmax(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axes = [b.axis(x)]
    shifted = x
    if b.chance(60):
        top = b.setting(18, "ReduceMax", x, axes=axes, keepdims=1)
        shifted = b.emit("Sub", x, top)
    power_ = b.emit("Exp", shifted)
    total = b.setting(13, "ReduceSum", power_, axes=axes, keepdims=1)
    return str(b.emit("Div", power_, total))


@recipe()
def batch_normalization(b: Builder) -> str:
    x = b.tensor(2, 3, 4)
    channels = b.shape(x)[1]
    scale, bias, mean = (b.constant(b.array(channels)) for _ in range(3))
    variance = b.constant(np.abs(b.array(channels)) + 0.5)
    return str(b.emit("BatchNormalization", x, scale, bias, mean, variance, epsilon=1e-3))


@recipe()
def instance_normalization(b: Builder) -> str:
    x = b.tensor(3, 4, fits=lambda v: math.prod(v.shape[2:]) > 2)
    channels = b.shape(x)[1]
    scale, bias = b.constant(b.array(channels)), b.constant(b.array(channels))
    return str(b.emit("InstanceNormalization", x, scale, bias, epsilon=0.05))


@recipe(17)
def layer_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axis = b.pick(b.free(x)[::-1])
    dims = b.shape(x)[axis:]
    scale = b.constant(b.array(*dims))
    bias = b.constant(b.array(*dims)) if b.chance(60) else ""
    return str(
        b.emit("LayerNormalization", x, scale, bias, axis=b.signed(axis, b.rank(x)), epsilon=0.05)
    )


@recipe(23)
def rms_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axis = b.pick(b.free(x)[::-1])
    scale = b.constant(b.array(*b.shape(x)[axis:]))
    return str(b.emit("RMSNormalization", x, scale, axis=axis, epsilon=0.05))


@recipe(21)
def group_normalization(b: Builder) -> str:
    x = b.tensor(3, 4, fits=lambda v: math.prod(v.shape[2:]) > 2)
    channels = b.shape(x)[1]
    groups = b.pick([g for g in range(1, channels + 1) if channels % g == 0])
    scale, bias = b.constant(b.array(channels)), b.constant(b.array(channels))
    return str(b.emit("GroupNormalization", x, scale, bias, num_groups=groups, epsilon=0.05))


@recipe()
def lp_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    shifted = b.positive(x)
    return str(b.emit("LpNormalization", shifted, axis=b.axis(shifted, 2), p=b.pick([2, 1])))


@recipe()
def local_response(b: Builder) -> str:
    x = b.tensor(3, 4)
    return str(b.emit("LRN", x, size=b.pick([1, 3, 2]), alpha=0.3, beta=0.6, bias=1.2))


@recipe()
def spelled_layer_normalization(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch) and v.shape[-1] > 2)
    axes = [b.rank(x) - 1]
    centred = b.emit("Sub", x, b.setting(18, "ReduceMean", x, axes=axes))
    squared = ("Mul", centred) if b.chance(50) else ("Pow", b.number(2.0))
    square = b.emit(squared[0], centred, squared[1])
    variance = b.setting(18, "ReduceMean", square, axes=axes)
    root = b.emit("Sqrt", b.emit("Add", variance, b.number(0.05)))
    return str(b.emit("Div", centred, root))


@recipe(9)
def mean_variance_normalization(b: Builder) -> str:
    # Its definition adds a float32.
    x = b.tensor(4, fits=lambda v: math.prod(v.shape[2:]) > 2 and v.dtype == np.float32)
    axes = [2, 3] if b.batch or b.chance(50) else [0, 2, 3]
    return str(b.emit("MeanVarianceNormalization", x, axes=axes))


# -- recurrence and attention ----------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@recipe()
def recurrence(b: Builder) -> str:
    x = b.tensor(3)
    if b.batch:
        x = b.emit("Transpose", x, perm=[1, 0, 2])
    op, hidden = b.pick(list(GATES)), b.choose(1, 3)
    directions = b.choose(1, 2)
    rows = GATES[op] * hidden
    weight = b.constant(b.array(directions, rows, b.shape(x)[2], scale=0.6))
    again = b.constant(b.array(directions, rows, hidden, scale=0.6))
    bias = b.constant(b.array(directions, 2 * rows, scale=0.3)) if b.chance(50) else ""
    attributes: dict[str, Any] = {"hidden_size": hidden}
    attributes["direction"] = b.pick(["forward", "reverse"]) if directions == 1 else "bidirectional"
    if op == "GRU" and b.chance(50):
        attributes["linear_before_reset"] = 1
    steps, last = b.emit(op, x, weight, again, bias, outputs=2, **attributes)[:2]
    if not b.batch:
        return str(b.pick([steps, last]))
    return str(b.emit("Transpose", steps, perm=[2, 0, 1, 3]))


@recipe(23)
def attention(b: Builder) -> str:
    x = b.tensor(4, fits=lambda v: v.shape[3] > 1)
    others = [n for n in b.pool if b.shape(n) == b.shape(x)]
    keys, values = b.pick(others), b.pick(others)
    more = {"is_causal": 1} if b.chance(30) else {}
    return str(b.emit("Attention", x, keys, values, **more))


# -- reductions ------------------------------------------------------------------------------------

SUMS = {
    "ReduceSum": 13,
    "ReduceMean": 18,
    "ReduceMax": 18,
    "ReduceMin": 18,
    "ReduceSumSquare": 18,
    "ReduceL1": 18,
    "ReduceLogSumExp": 18,
    "ReduceProd": 18,
    "ReduceL2": 18,
    "ReduceLogSum": 18,
}


@recipe()
def reduction(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    op = b.pick(list(SUMS))
    if op in ("ReduceLogSum", "ReduceL2", "ReduceProd"):
        x = b.positive(x)
    keep = {"keepdims": b.choose(0, 1)}
    if not b.batch and b.chance(15):
        return str(b.emit(op, x, **keep))
    axes = [b.signed(k, b.rank(x)) for k in b.some(b.free(x))]
    return str(b.setting(SUMS[op], op, x, axes=axes, **keep))


@recipe(11)
def cumulative(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.constant(b.signed(b.axis(x), b.rank(x)), np.int64)
    return str(b.emit("CumSum", x, axis, exclusive=b.choose(0, 1), reverse=b.choose(0, 1)))


@recipe(10)
def top_k(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.axis(x)
    count = b.ints(b.choose(1, b.shape(x)[axis]))
    more = {"largest": b.choose(0, 1)} if b.opset >= 11 else {}
    values, _ = b.emit("TopK", x, count, outputs=2, axis=axis, **more)
    return str(values)


# -- shapes ----------------------------------------------------------------------------------------


def factored(b: Builder, size: int) -> list[int]:
    dims: list[int] = []
    while size > 1 and len(dims) < 3:
        divisor = b.pick([d for d in range(2, size + 1) if size % d == 0])
        dims.append(divisor)
        size //= divisor
    if size > 1:
        dims.append(size)
    if len(dims) < 3 and b.chance(25):
        dims.insert(b.choose(0, len(dims)), 1)
    return dims


@recipe()
def reshape(b: Builder) -> str:
    x = b.tensor()
    if b.batch:
        dims = [0, *factored(b, math.prod(b.shape(x)[1:]))]
    else:
        dims = factored(b, b.values[x].size)
        if dims and b.chance(30) and b.rank(x) and b.shape(x)[0] == dims[0]:
            dims[0] = 0
    loose = [k for k in range(int(b.batch), len(dims)) if dims[k]]
    if loose and b.chance(50):
        dims[b.pick(loose)] = -1
    return str(b.emit("Reshape", x, b.constant(dims, np.int64)))


@recipe(10)
def dynamic_reshape(b: Builder) -> str:
    """To a shape computed from the shape, the exporters' way."""
    x = b.tensor(fits=lambda v: v.ndim > 0)
    shape = b.emit("Shape", x)
    first = b.emit("Gather", shape, b.constant(0, np.int64), axis=0)
    lead = b.setting(13, "Unsqueeze", first, axes=[0])
    target = b.emit("Concat", lead, b.ints(-1), axis=0)
    return str(b.emit("Reshape", x, target))


@recipe()
def flatten(b: Builder) -> str:
    x = b.tensor()
    axis = 1 if b.batch else b.choose(0, b.rank(x))
    return str(b.emit("Flatten", x, axis=axis))


@recipe()
def transpose(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > 1)
    rest = b.free(x)
    if not b.batch and b.chance(30):
        return str(b.emit("Transpose", x))
    order = [0] if b.batch else []
    while rest:
        order.append(rest.pop(b.choose(0, len(rest) - 1)))
    return str(b.emit("Transpose", x, perm=order))


@recipe()
def squeeze(b: Builder) -> str:
    x = b.tensor(fits=lambda v: 1 in v.shape[int(b.batch) :])
    axes = b.some([k for k in b.free(x) if b.shape(x)[k] == 1])
    axes = [b.signed(k, b.rank(x)) for k in axes]
    if not b.batch and b.chance(10):
        return str(b.emit("Squeeze", x))
    return str(b.setting(13, "Squeeze", x, axes=axes))


@recipe()
def unsqueeze(b: Builder) -> str:
    x = b.tensor(0, 1, 2, 3)
    axes = [b.choose(int(b.batch), b.rank(x))]
    if b.rank(x) < 3 and b.chance(30):
        axes = sorted({*axes, b.choose(int(b.batch), b.rank(x) + 1)})
    axes = [b.signed(k, b.rank(x) + len(axes)) for k in axes]
    return str(b.setting(13, "Unsqueeze", x, axes=axes))


@recipe(8)
def expand(b: Builder) -> str:
    x = b.tensor()
    dims = [d if d > 1 else b.choose(1, 3) for d in b.shape(x)]
    if b.batch:
        dims[0] = 1
    elif b.rank(x) < 4 and b.chance(40):
        dims = [b.choose(1, 3), *dims]
    if not dims:
        raise Refused
    if not b.batch and b.chance(30):
        # To the shape of another tensor.
        others = [n for n in b.pool if b.rank(n) and b.meets(n, b.shape(x))]
        if others:
            return str(b.emit("Expand", x, b.emit("Shape", b.pick(others))))
    return str(b.emit("Expand", x, b.constant(dims, np.int64)))


@recipe()
def tile(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > 0)
    repeats = [1 if b.batch and k == 0 else b.choose(1, 2) for k in range(b.rank(x))]
    return str(b.emit("Tile", x, b.ints(*repeats)))


@recipe()
def concat(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.axis(x)

    def fits(n: str) -> bool:
        return b.rank(n) == b.rank(x) and all(
            k == axis or p == q for k, (p, q) in enumerate(zip(b.shape(n), b.shape(x), strict=True))
        )

    parts = [x, *[n for n in b.pool[::-1] if fits(n) and b.chance(50)][:2]]
    if not b.batch and b.chance(30):
        dims = list(b.shape(x))
        dims[axis] = b.choose(1, 2)
        parts.append(b.constant(b.array(*dims)))
    if b.chance(20):
        parts.append(x)
    return str(b.emit("Concat", *parts, axis=b.signed(axis, b.rank(x))))


@recipe()
def split(b: Builder) -> list[str]:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.axis(x, 2)
    size = b.shape(x)[axis]
    cut = b.choose(1, size - 1)
    parts = [cut, size - cut]
    if size > 2 and b.chance(30):
        parts = [1, *parts] if parts[0] > 1 else [*parts]
        parts = [1, parts[1] - 1, parts[2]] if len(parts) == 3 else parts
    signed = b.signed(axis, b.rank(x))
    if b.opset >= 18 and b.chance(30):
        names = b.emit("Split", x, outputs=2, num_outputs=2, axis=signed)
    else:
        names = b.setting(13, "Split", x, outputs=len(parts), split=parts, axis=signed)
    # Sometimes not all of them are used.
    return list(names) if b.chance(70) else [str(b.pick(names))]


@recipe()
def slices(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axes = b.some(b.free(x))
    starts, ends, steps = [], [], []
    for k in axes:
        size = b.shape(x)[k]
        step = b.pick([1, 1, 2, -1, -2, 3]) if b.opset >= 10 else 1
        low = b.choose(0, size - 1)
        high = b.choose(low, size - 1)
        if step > 0:
            starts.append(low - size if b.chance(20) else low)
            ends.append(b.pick([high + 1, 2**31 - 1]))
        else:
            starts.append(b.pick([high, -1]))
            ends.append(low - 1 - size if b.chance(50) else -(2**31))
        steps.append(step)
    if b.opset < 10:
        return str(b.emit("Slice", x, starts=starts, ends=ends, axes=axes))
    given = [b.ints(*starts), b.ints(*ends), b.ints(*[b.signed(k, b.rank(x)) for k in axes])]
    return str(b.emit("Slice", x, *given, b.ints(*steps)))


@recipe()
def pad(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    mode = b.pick(["constant", "edge", "reflect"] + (["wrap"] if b.opset >= 19 else []))
    most = [0 if k not in b.free(x) else 2 for k in range(b.rank(x))]
    if mode in ("reflect", "wrap"):
        most = [min(m, size - 1) for m, size in zip(most, b.shape(x), strict=True)]
    pads = [b.choose(0, m) for m in most * 2]
    if mode == "constant" and b.chance(8):
        axis = b.axis(x, 3)
        pads[axis] = -1
    if b.opset < 11:
        return str(b.emit("Pad", x, pads=pads, mode=mode))
    fill = b.constant(0.3) if mode == "constant" and b.chance(50) else ""
    if b.opset >= 18 and b.chance(40):
        rank = b.rank(x)
        axes = b.ints(*range(rank)) if b.chance(50) else b.ints(*range(-rank, 0))
        return str(b.emit("Pad", x, b.ints(*pads), fill, axes, mode=mode))
    return str(b.emit("Pad", x, b.ints(*pads), fill, mode=mode))


@recipe()
def gather(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.axis(x)
    size = b.shape(x)[axis]
    dims = b.pick([(), (1,), (2,), (3,), (2, 2), (1, 2)])
    low = -size if b.opset >= 11 else 0
    indices = b.rng.integers(low, size, dims)
    dtype = b.pick([np.int64, np.int32])
    signed = b.signed(axis, b.rank(x), since=7)
    return str(b.emit("Gather", x, b.constant(indices, dtype), axis=signed))


@recipe(11)
def gather_elements(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > 0)
    if b.batch:
        raise Refused
    axis = b.axis(x)
    dims = list(b.shape(x))
    dims[axis] = b.choose(1, dims[axis] + 1)
    size = b.shape(x)[axis]
    indices = b.constant(b.rng.integers(-size, size, dims), np.int64)
    return str(b.emit("GatherElements", x, indices, axis=axis))


@recipe(11)
def gather_nd(b: Builder) -> str:
    if b.batch:
        raise Refused
    x = b.tensor(fits=lambda v: v.ndim > 0)
    depth = b.choose(1, b.rank(x))
    count = b.choose(1, 3)
    columns = [b.rng.integers(-d, d, count) for d in b.shape(x)[:depth]]
    return str(b.emit("GatherND", x, b.constant(np.stack(columns, -1), np.int64)))


@recipe(11)
def scatter(b: Builder) -> str:
    if b.leads:
        raise Refused
    x = b.tensor(fits=lambda v: v.ndim > 0)
    more: dict[str, Any] = {"reduction": "add"} if b.opset >= 16 and b.chance(30) else {}
    if b.chance(50):
        axis = b.axis(x)
        size = b.shape(x)[axis]
        dims = list(b.shape(x))
        dims[axis] = b.choose(1, size)
        order = b.rng.permuted(np.broadcast_to(place(size, axis, b.rank(x)), b.shape(x)), axis=axis)
        indices = b.constant(np.take(order, range(dims[axis]), axis), np.int64)
        updates = matching(b, dims)
        return str(b.emit("ScatterElements", x, indices, updates, axis=axis, **more))
    rows = b.rng.permutation(b.shape(x)[0])[: b.choose(1, b.shape(x)[0])]
    updates = matching(b, [len(rows), *b.shape(x)[1:]])
    return str(b.emit("ScatterND", x, b.constant(rows[:, None], np.int64), updates, **more))


def place(size: int, axis: int, rank: int) -> Array:
    return np.arange(size).reshape([-1 if k == axis else 1 for k in range(rank)])


def matching(b: Builder, dims: Sequence[int]) -> str:
    """A tensor of exactly that shape."""
    found = [n for n in b.pool if b.shape(n) == tuple(dims)]
    return str(b.pick(found)) if found and b.chance(70) else b.constant(b.array(*dims))


@recipe(9)
def compress(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim > int(b.batch))
    axis = b.axis(x)
    keep = b.rng.random(b.shape(x)[axis]) < 0.6
    keep[0] = True
    return str(b.emit("Compress", x, b.constant(keep, np.bool_), axis=axis))


@recipe()
def blocks(b: Builder) -> str:
    if b.chance(50):
        x = b.tensor(4, fits=lambda v: v.shape[1] % 4 == 0)
        more = {"mode": b.pick(["DCR", "CRD"])} if b.opset >= 11 else {}
        return str(b.emit("DepthToSpace", x, blocksize=2, **more))
    x = b.tensor(4, fits=lambda v: v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0)
    return str(b.emit("SpaceToDepth", x, blocksize=2))


@recipe(14)
def triangle(b: Builder) -> str:
    x = b.tensor(fits=lambda v: v.ndim >= 2 + int(b.batch))
    k = b.constant(b.choose(-1, 1), np.int64) if b.chance(50) else ""
    return str(b.emit("Trilu", x, k, upper=b.choose(0, 1)))


@recipe(10)
def reverse(b: Builder) -> str:
    if b.leads:
        raise Refused
    x = b.tensor(fits=lambda v: v.ndim >= 2)
    time, sample = b.pick([(0, 1), (1, 0)])
    lengths = b.rng.integers(1, b.shape(x)[time] + 1, b.shape(x)[sample])
    given = b.constant(lengths, np.int64)
    return str(b.emit("ReverseSequence", x, given, time_axis=time, batch_axis=sample))


@recipe(9)
def filled(b: Builder) -> str:
    """A constant as large as a tensor, made at run time."""
    x = b.tensor(fits=lambda v: v.ndim > 0)
    value = numpy_helper.from_array(np.array([0.4], DTYPES[b.dtype]))
    ones = b.emit("ConstantOfShape", b.emit("Shape", x), value=value)
    return str(b.emit(b.pick(["Add", "Mul"]), x, ones))


@recipe()
def mean_by_size(b: Builder) -> str:
    """Divided by a size that is read at run time."""
    x = b.tensor(fits=lambda v: v.ndim > 0)
    shape = b.emit("Shape", x)
    size = b.emit("Gather", shape, b.constant(b.rank(x) - 1, np.int64), axis=0)
    return str(b.emit("Div", x, b.emit("Cast", size, to=element(b.values[x]))))


# -- the whole -------------------------------------------------------------------------------------


def build(choose: Choose, newest: int = 26, longest: int = 40) -> Example:
    """A random model; raises Refused if nothing came of it."""
    opset = choose(7, newest)
    pick = choose(0, 9)
    dtype = "float64" if pick == 9 else "float16" if pick == 8 else "float32"
    batch = choose(0, 2) == 0
    seed = choose(0, 2**16)
    b = Builder(choose, opset, dtype, batch, np.random.default_rng(seed))
    _inputs(b)
    names = [name for name, (since, _) in RECIPES.items() if since <= opset]
    wanted = choose(5, longest if dtype != "float16" else min(longest, 14))
    for _ in range(3 * wanted):
        if b.operators >= wanted:
            break
        _step(b, names, longest)
    return _finished(b, seed, longest)


def _inputs(b: Builder) -> None:
    count = b.pick([1, 1, 2, 3])
    samples = b.choose(1, 3)
    symbols: dict[str, int] = {}
    for k in range(count):
        rank = b.choose(1, 4) if b.batch else b.pick([2, 3, 1, 4, 0])
        dims = [b.pick([3, 2, 4, 1, 5, 6]) for _ in range(rank)]
        if b.batch:
            dims[0] = samples
        while math.prod(dims) > 96:
            dims[dims.index(max(dims[int(b.batch) :]))] = 2
        name = "xyz"[k]
        b.values[name] = b.array(*dims)
        b.inputs[name] = [_symbol(b, name, axis, size, symbols) for axis, size in enumerate(dims)]
        b.pool.append(name)


def _symbol(b: Builder, name: str, axis: int, size: int, symbols: dict[str, int]) -> int | str:
    if b.batch and axis == 0:
        return "N"
    if not b.chance(30):
        return size
    shared = [symbol for symbol, known in symbols.items() if known == size]
    if shared and b.chance(50):
        return str(b.pick(shared))
    symbol = f"{name}_{axis}"
    symbols[symbol] = size
    return symbol


def _step(b: Builder, names: Sequence[str], longest: int) -> None:
    """Try one recipe; take back what it left if it does not fit."""
    name = names[b.choose(0, len(names) - 1)]
    state = len(b.nodes), dict(b.weights), set(b.used), dict(b.constants)
    try:
        made = RECIPES[name][1](b)
        made = [made] if isinstance(made, str) else made
        for tensor in made:
            b.add(tensor)
        if b.operators > longest:
            raise Refused
        b.steps.append(name)
    except Refused:
        del b.nodes[state[0] :]
        b.weights, b.used, b.constants = state[1], state[2], state[3]
        known = set(b.inputs) | set(b.weights) | {n for node in b.nodes for n in node.output}
        b.pool = [n for n in b.pool if n in known]


def _reached(b: Builder) -> set[str]:
    """Tensors that depend on the inputs' values."""
    live = set(b.inputs)
    for node in b.nodes:
        if node.op_type not in ("Shape", "Size") and live.intersection(node.input):
            live.update(node.output)
    return live


def _finished(b: Builder, seed: int, longest: int) -> Example:
    live = _reached(b)
    ends = [n for n in b.pool if n not in b.used and n in live and n not in b.inputs]
    if not ends:
        raise Refused
    main = ends[-1]
    if len(ends) > 1 and b.operators + len(ends) < longest and b.chance(60):
        main = _merged(b, ends)
    extra = [n for n in ends if n != main][:2] if b.chance(50) else []
    if b.chance(15):
        inner = [n for n in b.pool if n in b.used and n in live and n not in b.inputs]
        extra += inner[:1]
    outputs = list(dict.fromkeys([main, *extra]))
    if b.chance(30):
        outputs.reverse()
    model = _model(b, outputs)
    feeds = {name: b.values[name] for name in b.inputs}
    try:
        run(model, feeds)
    except Exception:  # onnxruntime fails at some of what it makes of several nodes
        raise Refused from None
    return Example(model, feeds, main, seed, b.batch, b.dtype, b.opset, tuple(b.steps))


def _merged(b: Builder, ends: Sequence[str]) -> str:
    """All ends in one tensor."""
    flat = []
    for name in ends:
        if b.batch:
            flat.append(b.emit("Flatten", name, axis=1))
        else:
            flat.append(b.emit("Reshape", name, b.ints(-1)))
    return str(b.emit("Concat", *flat, axis=int(b.batch)))


def _model(b: Builder, outputs: Sequence[str]) -> ModelProto:
    infos = [
        helper.make_tensor_value_info(name, element(b.values[name]), dims)
        for name, dims in b.inputs.items()
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in b.weights.items()]
    if ir_version(b.opset) < 4:
        infos += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights]
    results = [
        helper.make_tensor_value_info(name, element(b.values[name]), None) for name in outputs
    ]
    graph = helper.make_graph(b.nodes, "random", infos, results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)])
    model.ir_version = ir_version(b.opset)
    inferred = onnx.shape_inference.infer_shapes(model)
    for declared, known in zip(model.graph.output, inferred.graph.output, strict=True):
        shape = declared.type.tensor_type.shape
        shape.SetInParent()
        found = known.type.tensor_type
        if found.HasField("shape"):
            shape.CopyFrom(found.shape)
        else:
            for _ in range(b.rank(declared.name)):
                shape.dim.add()
        for axis, dim in enumerate(shape.dim):
            # ONNX's inference of old operators keeps the symbol of an axis that was cut.
            wrong = b.opset < 13 and dim.dim_param and not (b.batch and axis == 0)
            if dim.dim_param.startswith("unk__") or wrong:
                dim.dim_param = f"{declared.name}_{axis}"
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError:
        # ONNX does not accept all that onnxruntime runs.
        raise Refused from None
    return model
