"""Reductions, and operators that move entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import numpy_helper

from ..numeric import Array
from .builder import DTYPES, Builder, Refused, element, recipe

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
    if b.chance(20):
        # All of them, however many these are.
        count = b.emit("Gather", b.emit("Shape", x), b.constant([axis], np.int64), axis=0)
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
    kinds = ["none"] + ["add", "mul"] * (b.opset >= 16) + ["max", "min"] * (b.opset >= 18)
    how = b.pick(kinds)
    more: dict[str, Any] = {"reduction": how} if b.opset >= 16 else {}
    # Only what is written over depends on the order of updates that meet.
    meet = how != "none" and b.chance(60)
    if b.chance(50):
        axis = b.axis(x)
        size = b.shape(x)[axis]
        dims = list(b.shape(x))
        dims[axis] = b.choose(1, size + 2 * meet)
        order = b.rng.permuted(np.broadcast_to(place(size, axis, b.rank(x)), b.shape(x)), axis=axis)
        index = (
            b.rng.integers(-size, size, dims) if meet else np.take(order, range(dims[axis]), axis)
        )
        indices = b.constant(index, np.int64)
        updates = matching(b, dims)
        return str(b.emit("ScatterElements", x, indices, updates, axis=axis, **more))
    count = b.choose(1, b.shape(x)[0] + 2 * meet)
    rows = b.rng.integers(0, b.shape(x)[0], count) if meet else b.rng.permutation(b.shape(x)[0])
    rows = rows[:count]
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
