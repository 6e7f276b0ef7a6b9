"""Map which positions of a layer speak for the output, and enlarge the map to the input's.

Precondition: scope and seed. Postcondition: ``job.attributions`` has one entry more: for each
attributed tensor the map [N, 1, …] of its positions, the axes in its own order (channels last stay
last), or of the layer's positions, [N, 1, …], if the map is not enlarged; or the enlarged map times
the method's multipliers, of the tensor's shape.

The sweep for the map goes from the output to the layer only. Raises OptionError for a layer that
does not exist or fit, CompileError where there is no layer or an input has not its positions.
"""

from __future__ import annotations

import numpy as np

from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Job
from onnx_attrib.methods.base import GRADIENT, Map
from onnx_attrib.passes.differentiate import Sweep, full, multipliers, starts, sweep_of
from onnx_attrib.passes.positions import Roles, last_block, roles_of
from onnx_attrib.passes.scope import ancestors, between, float_tensor


def localize(job: Job) -> None:
    """Emit the map and bring it to every attributed tensor."""
    if job.method.map is None:
        raise LookupError(f"method '{job.method.name}' has no map")
    graph, scope, wanted = job.graph, job.scope, job.method.map(job.options)
    nodes = ancestors(graph, scope.output)
    layer = _layer(job, nodes, wanted.layer)
    told = roles_of(graph, nodes, layer)
    roles = told or tuple(range(len(graph.shape(layer) or ())))
    if not {0, 1} <= set(roles):
        raise OptionError(f"layer {_shown(graph, layer)} has no channels; a map needs [N, C, …]")
    placed = _map(job, layer, roles, wanted)
    if not wanted.upsampled:
        rest = [axis for axis, role in enumerate(roles) if role not in (0, 1)]
        placed = _turned(graph, placed, [roles.index(0), roles.index(1), *rest])
        job.attribute(dict.fromkeys(scope.names, placed))
        return
    guides = multipliers(sweep_of(job), scope, starts(job)) if wanted.guides else {}
    found = {}
    for tensor in scope.inputs:
        # Where nothing tells, both are taken for [N, C, …].
        alike = not told and len(graph.shape(tensor) or ()) == len(roles)
        there = roles_of(graph, nodes, tensor) or (roles if alike else ())
        fitted = _fitted(job, placed, (layer, roles), (tensor, there), wanted.interpolation)
        if wanted.guides:
            product = graph.op.Mul(full(graph, guides[tensor.name], tensor), fitted)
            product.shape = tensor.shape
            fitted = product
        found[tensor.name] = fitted
    job.attribute(found)


def _layer(job: Job, nodes: list[Node], name: str) -> Tensor:
    """The layer asked for, or the last convolution block."""
    graph = job.graph
    if name == "auto":
        found = last_block(graph, nodes, job.scope.output)
        if found is None:
            raise CompileError(
                f"method '{job.method.name}' looks at a convolutional layer, and output "
                f"'{job.scope.output.name}' has none before it that has positions; name a tensor "
                "[N, C, …] with the option layer"
            )
        return found
    layer = float_tensor(graph, name, "layer")
    if graph.value(layer) is not None:
        raise OptionError(f"layer '{name}' is a constant of the model, not a value it computes")
    return layer


def _map(job: Job, layer: Tensor, roles: Roles, wanted: Map) -> Tensor:
    """The map in the layer's axes, with one channel."""
    graph, op = job.graph, job.graph.op
    part = between(graph, [layer], job.scope.output)
    sweep = Sweep(graph, GRADIENT, notes=job.notes)
    gradient = full(graph, multipliers(sweep, part, starts(job))[layer.name], layer)
    axes = [axis for axis, role in enumerate(roles) if role is None or role > 1]
    terms = wanted.weigh(op, layer, gradient, axes)
    total: Tensor = op.ReduceSum(terms, [roles.index(1)], keepdims=1)
    result: Tensor = op.Relu(total) if wanted.rectified else total
    shape = graph.shape(layer) or ()
    result.shape = [1 if role == 1 else dim for dim, role in zip(shape, roles, strict=True)]
    return result


def _in_order(graph: Graph, placed: Tensor, roles: Roles) -> tuple[Tensor, list[int]]:
    """A map as samples, one channel and positions in order; and the roles of these.

    Axes that are no positions are left out.
    """
    extra = [axis for axis, role in enumerate(roles) if role is None]
    kept = [role for role in roles if role is not None]
    if extra:
        placed = graph.op.Squeeze(placed, extra)
    order = sorted(range(len(kept)), key=lambda axis: kept[axis])
    return _turned(graph, placed, order), sorted(kept)


def _turned(graph: Graph, placed: Tensor, perm: list[int]) -> Tensor:
    return placed if perm == sorted(perm) else graph.op.Transpose(placed, perm=perm)


def _fitted(
    job: Job,
    placed: Tensor,
    layer: tuple[Tensor, Roles],
    target: tuple[Tensor, Roles],
    interpolation: str,
) -> Tensor:
    """The map at the positions of an attributed tensor, in the order of its axes."""
    graph, op = job.graph, job.graph.op
    tensor, roles = target
    shape = graph.shape(tensor) or ()
    placed, kept = _in_order(graph, placed, layer[1])
    places = [role for role in roles if role is not None and role > 1]
    lone = [i for i, role in enumerate(kept) if role > 1 and role not in places]
    sizes = graph.shape(placed) or ()
    if not places or not set(places) <= set(kept) or any(sizes[i] != 1 for i in lone):
        raise CompileError(_misfit(job, layer[0], tensor))
    if lone:
        placed = op.Squeeze(placed, lone)
    axes = [roles.index(role) for role in sorted(places)]
    placed = _enlarged(graph, placed, tensor, axes, interpolation)
    # Samples, one channel and positions, put where the tensor has them.
    order = [0, 1, *sorted(places)]
    for role in (1, 0):
        if role not in roles:
            placed = op.Squeeze(placed, [order.index(role)])
            order.remove(role)
    kept_roles = [role for role in roles if role is not None]
    placed = _turned(graph, placed, [order.index(role) for role in kept_roles])
    extra = [axis for axis, role in enumerate(roles) if role is None]
    if extra:
        placed = op.Unsqueeze(placed, extra)
    placed.shape = [1 if role in (1, None) else dim for dim, role in zip(shape, roles, strict=True)]
    return placed


def _enlarged(
    graph: Graph, placed: Tensor, tensor: Tensor, axes: list[int], interpolation: str
) -> Tensor:
    """A map [N, 1, …] at as many positions as ``tensor`` has along ``axes``."""
    op, shape = graph.op, graph.shape(tensor) or ()
    sizes = [shape[axis] for axis in axes]
    if sizes == list(graph.shape(placed) or ())[2:] and None not in sizes:
        return placed
    lengths = (
        graph.constant(sizes, np.int64)
        if all(isinstance(size, int) for size in sizes)
        else op.Gather(op.Shape(tensor), axes)
    )
    dtype, single = graph.dtype(placed), np.dtype(np.float32)
    # The CPU resamples float32 only.
    value = placed if dtype == single else op.Cast(placed, to=single)
    value = op.Resize(
        value,
        None,
        None,
        op.Concat(op.Shape(placed, end=2), lengths, axis=0),
        mode="linear" if interpolation == "bilinear" else "nearest",
        coordinate_transformation_mode="half_pixel",
        nearest_mode="round_prefer_ceil",
    )
    result: Tensor = value if dtype == single else op.Cast(value, to=dtype)
    return result


def _misfit(job: Job, layer: Tensor, tensor: Tensor) -> str:
    guides = job.method.map is not None and job.method.map(job.options).guides
    return (
        f"{_shown(job.graph, tensor)} has not the positions of layer {_shown(job.graph, layer)}, "
        f"as far as can be told, so the map of '{job.method.name}' cannot be enlarged to it; "
        + ("" if guides else "use the option upsample=false, or ")
        + "name tensors that have them with inputs=[...] (--input)"
    )


def _shown(graph: Graph, tensor: Tensor) -> str:
    dims = ["?" if dim is None else str(dim) for dim in graph.shape(tensor) or ()]
    return f"'{tensor.name}' [{', '.join(dims)}]"
