"""Make of the attributions what is shown: sums over channels, a scale of one.

Precondition: one entry of ``job.attributions`` for each seed. Postcondition: ``job.shown`` has the
same, each reduced along the axes asked for (which stay, of size 1) and then, if asked for, divided
by the sample's largest |a|: [−1, 1], or [0, 1] where nothing is negative. A map of zeros stays one.
16-bit floats are computed in float32 in between. Summation is checked on ``job.attributions``.
Raises OptionError for an axis that no attribution has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Dim, Graph, Shape, Tensor, is_narrow
from onnx_attrib.job import Job


def postprocess(job: Job) -> None:
    """Reduce and normalize the attributions of every seed."""
    request = job.request
    job.shown = list(job.attributions)
    if not request.reduce and not request.normalize:
        return
    shapes = {
        t.name: shape
        for one in job.shown
        for t, a in _pairs(job, one)
        if (shape := _shape(job.graph, t, a)) is not None
    }
    axes = {
        name: [(_axis(job, axis, name, shape), how) for axis, how in request.reduce.items()]
        for name, shape in shapes.items()
    }
    for k, axis in enumerate(request.reduce):
        if all(found[k][0] is None for found in axes.values()):
            ranks = [f"the attribution of '{n}' has rank {len(s)}" for n, s in shapes.items()]
            raise OptionError(
                f"there is no axis '{axis}' to reduce: {', '.join(ranks)}"
                + ("; channels are axis 1 of three axes or more" if axis == "channels" else "")
            )
    job.shown = [
        {
            t.name: _shown(job, a, shapes[t.name], axes[t.name]) if t.name in shapes else a
            for t, a in _pairs(job, one)
        }
        for one in job.shown
    ]


def _pairs(job: Job, attributions: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(t, attributions[t.name]) for t in job.scope.inputs]


def _axis(job: Job, axis: str | int, name: str, shape: Shape) -> int | None:
    """The axis of that name or number; None where a tensor of this rank has none."""
    rank = len(shape)
    if axis == "channels":
        found = 1 if rank > 2 else None
    elif axis == "last":
        found = rank - 1 if rank > 1 else None
    else:
        found = int(axis) if int(axis) < rank else None
    if found is not None and found == batch_axis(shape, job.scope.batch):
        raise OptionError(f"axis {found} of '{name}' is that of the samples: it cannot be reduced")
    return found


def _shape(graph: Graph, tensor: Tensor, attribution: Tensor) -> Shape | None:
    """The attribution's shape, with the symbols that the attributed tensor's shape has."""
    known, shape = graph.shape(tensor), graph.shape(attribution)
    if known is None or shape is None or len(known) != len(shape):
        return shape
    return tuple(k if s is None else s for k, s in zip(known, shape, strict=True))


def _shown(
    job: Job, a: Tensor, shape: Shape, reductions: Sequence[tuple[int | None, str]]
) -> Tensor:
    graph, op, dtype = job.graph, job.graph.op, job.graph.dtype(a)
    narrow = is_narrow(dtype)
    value = op.Cast(a, to=np.dtype(np.float32)) if narrow else a
    sizes = list(shape)
    for axis, how in reductions:
        if axis is not None:
            value = _reduced(graph, value, axis, how)
            sizes[axis] = 1
    if job.request.normalize:
        batch = batch_axis(shape, job.scope.batch)
        axes = [axis for axis in range(len(shape)) if axis != batch]
        value, _ = _scaled(graph, value, axes)
    if narrow:
        value = op.Cast(value, to=dtype)
    value.shape = sizes
    return value


def _reduced(graph: Graph, a: Tensor, axis: int, how: str) -> Tensor:
    op = graph.op
    if how == "sum":
        return op.ReduceSum(a, [axis], keepdims=1)
    if how == "abs-max":
        return op.ReduceMax(op.Abs(a), [axis], keepdims=1)
    # Squares of what is scaled to one neither overflow nor vanish.
    unit, size = _scaled(graph, a, [axis])
    return op.Mul(op.Sqrt(op.ReduceSum(op.Mul(unit, unit), [axis], keepdims=1)), size)


def _scaled(graph: Graph, a: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """a / max|a| over ``axes``, and the maximum (1 where it is 0)."""
    op = graph.op
    size = op.Abs(a)
    if axes:
        size = op.ReduceMax(size, list(axes), keepdims=1)
    size = op.Where(op.Equal(size, 0.0), 1.0, size)
    return op.Div(a, size), size


def batch_axis(shape: Shape, batch: Dim) -> int:
    """Which axis counts the samples: the first, unless the batch's symbol is found elsewhere."""
    if isinstance(batch, str) and shape[0] != batch and shape.count(batch) == 1:
        return shape.index(batch)
    return 0


def samples_axis(shape: Shape | None, output: Shape | None) -> int | None:
    """The axis that counts the output's samples, unless none can: the sizes are known to differ.

    An axis of size one counts as that of a single sample.
    """
    if not shape or output == ():
        return None
    want = output[0] if output else None
    axis = batch_axis(shape, want)
    have = shape[axis]
    if have in (1, None) or want is None or not (isinstance(have, int) or isinstance(want, int)):
        return axis
    return axis if have == want else None
