"""Random inputs that a model is likely to take: shapes as declared, indices within tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnx_attrib.errors import CompileError, OptionError, suggest
from onnx_attrib.feeds import Array, Port, fit

BATCH = 2
"""Samples of a drawn batch, where the model leaves it open."""
SIZES = (8, 32, 64, 224)
"""What is tried for other open dimensions."""
# Operators whose output holds the same numbers as their first input.
_PASSING = frozenset(
    "Identity Cast Reshape Flatten Squeeze Unsqueeze Transpose Slice Expand".split()
)


@dataclass(frozen=True)
class Drawer:
    """Draws arrays for ``ports``.

    ``dims``: sizes by the name of an open dimension; ``size`` is that of the others (``batch``: of
    the batch). ``tables``: how many rows the table has that an input picks from. ``positive``:
    floats between 0.1 and 0.9, for models of logarithms and roots, not normal ones.
    """

    ports: Sequence[Port]
    dims: Mapping[str, int]
    tables: Mapping[str, int]
    size: int = SIZES[0]
    positive: bool = False
    batch: int = BATCH

    def __call__(self, rng: np.random.Generator) -> dict[str, Array]:
        """One batch."""
        return {port.name: self._array(port, rng) for port in self.ports}

    def other(self, like: Array, rng: np.random.Generator) -> Array:
        """Another batch in the place of one: floats anew, whole numbers in another order."""
        if like.dtype.kind == "f" or like.dtype.name == "bfloat16":
            return self._floats(like.shape, rng).astype(like.dtype)
        return rng.permuted(like.reshape(len(like), -1), axis=1).reshape(like.shape)

    def _floats(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        return np.asarray(rng.uniform(0.1, 0.9, shape) if self.positive else rng.normal(size=shape))

    @staticmethod
    def _indices(rows: int, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        """Each row once in a sample, if there are enough: the same twice makes ties of maxima."""
        length = int(np.prod(shape[1:]))
        if length > rows or not shape:
            return np.asarray(rng.integers(0, rows, shape))
        drawn = [rng.choice(rows, length, replace=False) for _ in range(shape[0])]
        return np.array(drawn).reshape(shape)

    def _array(self, port: Port, rng: np.random.Generator) -> Array:
        shape = self._shape(port)
        kind = "O" if port.dtype is None else port.dtype.kind
        if port.dtype is not None and (kind == "f" or port.dtype.name == "bfloat16"):
            return self._floats(shape, rng).astype(port.dtype)
        if kind == "b" or (kind in "iu" and "mask" in port.name.lower()):
            return np.ones(shape, port.dtype)
        if kind in "iu":
            return self._indices(self.tables.get(port.name, 2), shape, rng).astype(port.dtype)
        raise OptionError(f"input '{port.name}' is not of numbers: give it with --input")

    def _shape(self, port: Port) -> tuple[int, ...]:
        batch = {p.shape[0] for p in self.ports if p.shape and not isinstance(p.shape[0], int)}
        return tuple(
            dim
            if isinstance(dim, int)
            else self.dims.get(
                dim or "", self.batch if axis == 0 or (dim and dim in batch) else self.size
            )
            for axis, dim in enumerate(port.shape)
        )

    @property
    def open(self) -> bool:
        """Whether ``size`` makes a difference."""
        return self._shapes() != Drawer(self.ports, self.dims, self.tables, 1)._shapes()

    def _shapes(self) -> list[tuple[int, ...]]:
        return [self._shape(port) for port in self.ports]


def fill(
    ports: Sequence[Port],
    given: Mapping[str, npt.ArrayLike],
    drawer: Drawer,
    rng: np.random.Generator,
) -> dict[str, Array]:
    """The given inputs, and random ones beside them."""
    drawn = drawer(rng)
    return {
        port.name: fit(port, given[port.name]) if port.name in given else drawn[port.name]
        for port in ports
    }


def drawer_for(
    model: ModelProto,
    inputs: Sequence[Port],
    given: Mapping[str, npt.ArrayLike],
    sizes: Mapping[str, int],
    evaluate: Callable[[dict[str, Array]], Array],
    batch: int = BATCH,
) -> Drawer:
    """What draws inputs that the model runs on, with finite results.

    ``sizes``: of open dimensions by name; ``evaluate``: the output for a batch. OptionError if
    nothing that is tried fits, or names are unknown.
    """
    names = [port.name for port in inputs]
    for name in given:
        if name not in names:
            raise OptionError(f"the model has no input '{name}': {suggest(name, names)}")
    symbols = {d for port in inputs for d in port.shape if isinstance(d, str)}
    for name in sizes:
        if name not in symbols:
            raise OptionError(
                f"the model has no open dimension '{name}': {suggest(name, sorted(symbols))}"
            )
    dims = dict(sizes)
    for port in inputs:
        if port.name in given:
            shape = np.shape(given[port.name])
            if len(shape) == len(port.shape):
                pairs = zip(port.shape, shape, strict=True)
                dims.update({d: size for d, size in pairs if isinstance(d, str)})
    ports = [port for port in inputs if port.name not in given]
    tables, problem = table_sizes(model), ""
    for size in SIZES:
        for positive in (False, True):
            drawer = Drawer(ports, dims, tables, size, positive, batch)
            try:
                y = evaluate(fill(inputs, given, drawer, np.random.default_rng(0)))
            except CompileError as error:
                if isinstance(error, OptionError):
                    raise
                problem = problem or str(error)
                break
            if np.isfinite(y).all():
                return drawer
            problem = "the model's own output is not finite there"
        if not drawer.open:
            break
    raise OptionError(
        f"{'random' if ports else 'the given'} inputs do not fit the model: {problem}; give "
        "sizes with --dim or arrays with --input"
    )


def table_sizes(model: ModelProto) -> dict[str, int]:
    """How many rows the table has from which an integer input picks by Gather."""
    rows = {t.name: t.dims[0] for t in model.graph.initializer if t.dims}
    origin = {info.name: info.name for info in model.graph.input}
    sizes: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _PASSING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type == "Gather" and axis == 0 and node.input[0] in rows:
            name = origin.get(node.input[1])
            if name is not None:
                sizes[name] = min(rows[node.input[0]], sizes.get(name, rows[node.input[0]]))
    return sizes


__all__ = ["BATCH", "SIZES", "Drawer", "drawer_for", "fill", "table_sizes"]
