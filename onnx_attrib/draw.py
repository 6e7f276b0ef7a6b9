"""Random inputs that a model is likely to take: shapes as declared, indices within tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array, Port

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

    ``dims``: sizes by the name of an open dimension; ``size`` is that of the others (of the batch:
    :data:`BATCH`). ``tables``: how many rows the table has that an input picks from. ``positive``:
    floats between 0.1 and 0.9, for models of logarithms and roots, not normal ones.
    """

    ports: Sequence[Port]
    dims: Mapping[str, int]
    tables: Mapping[str, int]
    size: int = SIZES[0]
    positive: bool = False

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
                dim or "", BATCH if axis == 0 or (dim and dim in batch) else self.size
            )
            for axis, dim in enumerate(port.shape)
        )

    @property
    def open(self) -> bool:
        """Whether ``size`` makes a difference."""
        return self._shapes() != Drawer(self.ports, self.dims, self.tables, 1)._shapes()

    def _shapes(self) -> list[tuple[int, ...]]:
        return [self._shape(port) for port in self.ports]


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


__all__ = ["BATCH", "SIZES", "Drawer", "table_sizes"]
