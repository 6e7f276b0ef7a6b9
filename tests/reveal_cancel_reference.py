"""DeepLIFT with RevealCancel and Rescale, restated slowly from the paper, and networks for it.

A network is built twice at once: as ONNX nodes, and as steps over flattened values in float64,
where every layer is a matrix. Formulas: Shrikumar et al. 2017, §3.5; a maximum is split as the
README says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.numpy_helper import from_array

Array = np.ndarray[Any, np.dtype[Any]]

_erf = np.vectorize(math.erf)


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "Relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "Tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "Sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "Softplus": (lambda z: np.logaddexp(z, 0), _sigmoid),
    "Gelu": (
        lambda z: z * (1 + _erf(z / math.sqrt(2))) / 2,
        lambda z: (
            (1 + _erf(z / math.sqrt(2))) / 2 + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        ),
    ),
    "Silu": (
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    ),
    "Abs": (np.abs, np.sign),
}


# -- steps -----------------------------------------------------------------------------------------


@dataclass
class Affine:
    """y = Wx + b, W [outputs, inputs]."""

    source: int
    weight: Array
    bias: Array
    convolution: bool

    def forward(self, values: list[Array]) -> Array:
        return self.weight @ values[self.source] + self.bias


@dataclass
class Sum:
    """y = Σ sign · x."""

    sources: list[int]
    signs: list[int]

    def forward(self, values: list[Array]) -> Array:
        return sum(s * values[k] for s, k in zip(self.signs, self.sources, strict=True))


@dataclass
class Apply:
    """y = f(x)."""

    source: int
    name: str

    def forward(self, values: list[Array]) -> Array:
        return FUNCTIONS[self.name][0](values[self.source])


@dataclass
class Largest:
    """y_j = the largest x_i for i in windows[j]."""

    source: int
    windows: list[list[int]]

    def forward(self, values: list[Array]) -> Array:
        x = values[self.source]
        return np.array([x[window].max() for window in self.windows])


Step = Affine | Sum | Apply | Largest


def fed_by_convolution(steps: Sequence[Step | None], k: int) -> bool:
    """Whether the nearest layers before value ``k`` hold a convolution."""
    step = steps[k]
    if step is None:
        return False
    if isinstance(step, Affine):
        return step.convolution
    sources = step.sources if isinstance(step, Sum) else [step.source]
    return any(fed_by_convolution(steps, source) for source in sources)


def multipliers(
    steps: Sequence[Step | None], x: Array, base: Array, output: int, target: int, rule: str
) -> Array:
    """m of the input, for one sample; ``steps[0]`` is None and stands for the input."""
    here, there = [x], [base]
    for step in steps[1:]:
        assert step is not None
        here.append(step.forward(here))
        there.append(step.forward(there))
    delta = [a - b for a, b in zip(here, there, strict=True)]

    def reveals(step: Apply) -> bool:
        if rule in ("rescale", "reveal-cancel"):
            return rule == "reveal-cancel"
        return fed_by_convolution(steps, step.source) == (rule == "genomics-converse")

    # Positive and negative parts of every value.
    up, down = [np.maximum(delta[0], 0)], [np.minimum(delta[0], 0)]
    for k, step in enumerate(steps[1:], start=1):
        if isinstance(step, Affine):
            terms = step.weight * (up[step.source] + down[step.source])
            up.append(np.where(step.weight * delta[step.source] > 0, terms, 0).sum(1))
            down.append(np.where(step.weight * delta[step.source] < 0, terms, 0).sum(1))
        elif isinstance(step, Sum):
            terms = np.array([s * delta[i] for s, i in zip(step.signs, step.sources, strict=True)])
            up.append(np.where(terms > 0, terms, 0).sum(0))
            down.append(np.where(terms < 0, terms, 0).sum(0))
        elif isinstance(step, Apply):
            f, (p, n, z) = FUNCTIONS[step.name][0], (t[step.source] for t in (up, down, there))
            if reveals(step):
                up.append((f(z + p) - f(z)) / 2 + (f(z + n + p) - f(z + n)) / 2)
                down.append((f(z + n) - f(z)) / 2 + (f(z + p + n) - f(z + p)) / 2)
            else:
                slope = rescale(step.name, here[step.source], z)
                up.append(slope * p)
                down.append(slope * n)
        else:
            factor, place = picked(step, here, there, k)
            up.append(factor * up[step.source][place])
            down.append(factor * down[step.source][place])

    # Their multipliers, backwards.
    plus = [np.zeros_like(value) for value in here]
    minus = [np.zeros_like(value) for value in here]
    plus[output][target] = minus[output][target] = 1.0
    for k in range(len(steps) - 1, 0, -1):
        step, mp, mn = steps[k], plus[k], minus[k]
        assert step is not None
        if isinstance(step, Affine):
            for i in range(step.weight.shape[1]):
                w = step.weight[:, i]
                term = w * delta[step.source][i]
                m = np.where(term > 0, w * mp, np.where(term < 0, w * mn, w * (mp + mn) / 2)).sum()
                plus[step.source][i] += m
                minus[step.source][i] += m
        elif isinstance(step, Sum):
            for s, i in zip(step.signs, step.sources, strict=True):
                term = s * delta[i]
                m = np.where(term > 0, s * mp, np.where(term < 0, s * mn, s * (mp + mn) / 2))
                plus[i] += m
                minus[i] += m
        elif isinstance(step, Apply):
            i, slope = step.source, FUNCTIONS[step.name][1]
            if reveals(step):
                limit = (slope(here[i]) + slope(there[i])) / 2
                plus[i] += mp * ratio(up[k], up[i], limit)
                minus[i] += mn * ratio(down[k], down[i], limit)
            else:
                factor = rescale(step.name, here[i], there[i])
                plus[i] += mp * factor
                minus[i] += mn * factor
        else:
            factor, place = picked(step, here, there, k)
            np.add.at(plus[step.source], place, mp * factor)
            np.add.at(minus[step.source], place, mn * factor)
    both = (plus[0] + minus[0]) / 2
    return np.where(delta[0] > 0, plus[0], np.where(delta[0] < 0, minus[0], both))


def ratio(top: Array, bottom: Array, limit: Array) -> Array:
    small = np.abs(bottom) < 1e-9
    return np.where(small, limit, top / np.where(small, 1, bottom))


def rescale(name: str, z: Array, base: Array) -> Array:
    f, slope = FUNCTIONS[name]
    return ratio(f(z) - f(base), z - base, (slope(z) + slope(base)) / 2)


def picked(step: Largest, here: list[Array], there: list[Array], k: int) -> tuple[Array, Array]:
    """Δy over the winner's own Δz, and the winner: at x where the maximum rose, else at x̄."""
    x, base, place = here[step.source], there[step.source], []
    for j, window in enumerate(step.windows):
        values = x if here[k][j] >= there[k][j] else base
        place.append(window[int(np.argmax(values[window]))])
    chosen = np.array(place)
    step_of = x[chosen] - base[chosen]
    return ratio(here[k] - there[k], step_of, np.ones(len(chosen))), chosen


# -- networks --------------------------------------------------------------------------------------


@dataclass
class Net:
    """A network of float32 weights, as ONNX and as steps; values are numbered from the input, 0."""

    shape: tuple[int, ...]
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    steps: list[Step | None] = field(default_factory=lambda: [None])
    names: list[str] = field(default_factory=lambda: ["x"])

    def __post_init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = [self.shape]

    @property
    def last(self) -> int:
        return len(self.steps) - 1

    def _constant(self, value: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(from_array(value, name))
        return name

    def _emit(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def _step(self, step: Step, name: str, shape: tuple[int, ...]) -> int:
        self.steps.append(step)
        self.names.append(name)
        self.shapes.append(shape)
        return self.last

    def draw(self, *shape: int, scale: float = 1.0) -> Array:
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def dense(
        self,
        width: int,
        source: int | None = None,
        style: str = "Gemm",
        weight: Array | None = None,
        bias: Array | None = None,
    ) -> int:
        """A dense layer, flattening what is before it: Gemm, or MatMul and Add."""
        k = self.last if source is None else source
        name, inputs = self.names[k], math.prod(self.shapes[k])
        if len(self.shapes[k]) > 1:
            name = self._emit("Flatten", [name])
        w = self.draw(inputs, width, scale=1.5 / math.sqrt(inputs)) if weight is None else weight
        b = self.draw(width, scale=0.5) if bias is None else bias
        if style == "Gemm":
            inputs_of = [name, self._constant(np.ascontiguousarray(w.T)), self._constant(b)]
            y = self._emit("Gemm", inputs_of, transB=1)
        else:
            y = self._emit("MatMul", [name, self._constant(w)])
            y = self._emit("Add", [y, self._constant(b)])
        matrix = w.T.astype(np.float64)
        return self._step(Affine(k, matrix, b.astype(np.float64), False), y, (width,))

    def norm(self) -> int:
        """A BatchNormalization, part of the layer before it; some of its factors are negative."""
        layer, shape = self.steps[-1], self.shapes[-1]
        assert isinstance(layer, Affine)
        channels = shape[0]
        scale, bias, mean = self.draw(channels), self.draw(channels), self.draw(channels)
        variance = (0.5 + self.rng.random(channels)).astype(np.float32)
        constants = [self._constant(v) for v in (scale, bias, mean, variance)]
        y = self._emit("BatchNormalization", [self.names[-1], *constants], epsilon=1e-3)
        factor = scale / np.sqrt(variance.astype(np.float64) + 1e-3)
        shift = bias - mean * factor
        each = math.prod(shape[1:])
        factor, shift = np.repeat(factor, each), np.repeat(shift, each)
        self.names[-1] = y
        weight, old = layer.weight * factor[:, None], layer.bias * factor
        self.steps[-1] = Affine(layer.source, weight, old + shift, layer.convolution)
        return self.last

    def conv(self, channels: int, kernel: int, stride: int = 1, pad: int = 0) -> int:
        """A convolution over one or two axes."""
        c, *sizes = self.shapes[-1]
        w = self.draw(channels, c, *[kernel] * len(sizes))
        w = (w * 1.5 / math.sqrt(c * kernel ** len(sizes))).astype(np.float32)
        b = self.draw(channels, scale=0.3)
        y = self._emit(
            "Conv",
            [self.names[-1], self._constant(w), self._constant(b)],
            strides=[stride] * len(sizes),
            pads=[pad] * 2 * len(sizes),
        )
        out = [(size + 2 * pad - kernel) // stride + 1 for size in sizes]
        matrix = np.zeros((channels, *out, c, *sizes))
        for o, m in np.ndindex(channels, c):
            for place in np.ndindex(*out):
                for tap in np.ndindex(*[kernel] * len(sizes)):
                    at = [p * stride + t - pad for p, t in zip(place, tap, strict=True)]
                    if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
                        matrix[(o, *place, m, *at)] += w[(o, m, *tap)]
        matrix = matrix.reshape(channels * math.prod(out), -1)
        bias = np.repeat(b.astype(np.float64), math.prod(out))
        return self._step(Affine(self.last, matrix, bias, True), y, (channels, *out))

    def _windows(self, kernel: int, stride: int) -> tuple[list[list[int]], tuple[int, ...]]:
        c, *sizes = self.shapes[-1]
        out = [(size - kernel) // stride + 1 for size in sizes]
        number = np.arange(c * math.prod(sizes)).reshape(c, *sizes)
        windows = []
        for m in range(c):
            for place in np.ndindex(*out):
                cut = tuple(slice(p * stride, p * stride + kernel) for p in place)
                windows.append(number[(m, *cut)].reshape(-1).tolist())
        return windows, (c, *out)

    def max_pool(self, kernel: int, stride: int) -> int:
        windows, shape = self._windows(kernel, stride)
        axes = len(shape) - 1
        y = self._emit(
            "MaxPool", [self.names[-1]], kernel_shape=[kernel] * axes, strides=[stride] * axes
        )
        return self._step(Largest(self.last, windows), y, shape)

    def average_pool(self, kernel: int, stride: int) -> int:
        windows, shape = self._windows(kernel, stride)
        axes = len(shape) - 1
        y = self._emit(
            "AveragePool", [self.names[-1]], kernel_shape=[kernel] * axes, strides=[stride] * axes
        )
        matrix = np.zeros((len(windows), math.prod(self.shapes[-1])))
        for j, window in enumerate(windows):
            matrix[j, window] = 1 / len(window)
        before = fed_by_convolution(self.steps, self.last)
        step = Affine(self.last, matrix, np.zeros(len(windows)), before)
        return self._step(step, y, shape)

    def apply(self, name: str) -> int:
        """A nonlinearity; Silu is spelled x · σ(x)."""
        x = self.names[-1]
        if name == "Silu":
            y = self._emit("Mul", [x, self._emit("Sigmoid", [x])])
        else:
            y = self._emit(name, [x])
        return self._step(Apply(self.last, name), y, self.shapes[-1])

    def add(self, a: int, b: int, sign: int = 1) -> int:
        y = self._emit("Add" if sign > 0 else "Sub", [self.names[a], self.names[b]])
        return self._step(Sum([a, b], [1, sign]), y, self.shapes[a])

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", *self.shape])],
            [
                helper.make_tensor_value_info(
                    self.names[-1], onnx.TensorProto.FLOAT, ["N", *self.shapes[-1]]
                )
            ],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def clear(self, x: Array, base: Array) -> bool:
        """Whether rounding to float32 leaves the sign of each difference between two samples."""
        here, there = ([t.reshape(-1).astype(np.float64)] for t in (x, base))
        for step in self.steps[1:]:
            assert step is not None
            here.append(step.forward(here))
            there.append(step.forward(there))
            size = np.abs(here[-1] - there[-1])
            largest = np.abs([here[-1], there[-1]]).max()
            if np.any((size > 0) & (size < 1e-6 * largest)):
                return False
        return True

    def attributions(self, x: Array, base: Array, targets: Sequence[int], rule: str) -> Array:
        """(x − x̄) · m for each sample of x [N, …] against the sample of x̄ [1 or N, …]."""
        base = np.broadcast_to(base, x.shape)
        rows = []
        for sample, reference, target in zip(x, base, targets, strict=True):
            a, b = (t.reshape(-1).astype(np.float64) for t in (sample, reference))
            m = multipliers(self.steps, a, b, self.last, int(target), rule)
            rows.append((m * (a - b)).reshape(self.shape))
        return np.array(rows)
