"""Estimate the patterns of a model's layers from data, for pattern-net and pattern-attribution.

The two-component estimator of Kindermans et al. 2017 (arXiv 1705.05598): for a neuron y = wᵀx + b,

    a₊ = (E₊[x y] − E₊[x] E[y]) / (wᵀE₊[x y] − wᵀE₊[x] E[y]),

where E₊ is the mean over the samples (and positions, padding included) at which y > 0, and E[y]
that over all of them. The negative component a₋ never passes the ReLU behind y, so it is not kept.
A neuron that is never positive has a pattern of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.errors import CompileError, OptionError, UnsupportedOpError
from onnx_attrib.feeds import Array, Port, fit, line
from onnx_attrib.ir import Graph, Node, Tensor, is_narrow
from onnx_attrib.job import Choice, Job, Request
from onnx_attrib.methods.pattern import Patterns, pattern_net
from onnx_attrib.model_io import Source, load
from onnx_attrib.passes.cluster import cluster
from onnx_attrib.passes.differentiate import offence
from onnx_attrib.passes.merge import Affine, layer_at, merge
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.quantized import mark, unmark
from onnx_attrib.passes.recognize import recognize
from onnx_attrib.passes.scope import scope
from onnx_attrib.passes.simplify import simplify
from onnx_attrib.passes.substitute import layers, origin
from onnx_attrib.rules import Site
from onnx_attrib.rules.broadcast import unbroadcast
from onnx_attrib.session import onnxruntime, open_session, port_of, providers_for


class Samples(Protocol):
    """Samples along the first axis, read part by part."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


Data = npt.ArrayLike | Mapping[str, npt.ArrayLike | Samples]

_SUMS = ("product", "input", "count", "total")


def fit_patterns(
    model: Source,
    data: Data,
    *,
    inputs: str | None = None,
    output: str | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """Patterns of every layer with weights between input and output.

    Args:
        model: a path, the bytes of an .onnx file, or a ModelProto.
        data: samples [M, …] of a model with one input, or arrays by input name; a memory map, or
            anything with a length and slices, is read one batch at a time. A model of a
            fixed batch leaves an incomplete last one out.
        inputs: the tensor that will be attributed to, if not the model's float inputs.
        output: the tensor that will be explained, if not the first float output.
        batch: samples evaluated together (1 each for a model of batch 1).
        progress: called with the number of samples done and of all.

    Returns:
        For each layer, by the name of the initializer that holds its weights, a₊ in the
        initializer's own layout and dtype. A layer that shares its weights pools its statistics.

    Raises:
        OptionError: data that does not fit the model. CompileError: a model without layers.
        UnsupportedOpError: layers that patterns are not defined for (recurrent, Einsum).
    """
    if batch < 1:
        raise OptionError("batch must be at least 1")
    job = _merged(model, inputs, output)
    units = [_unit(job, node) for node in layers(job)]
    graph = job.graph
    graph.outputs[:] = [t for unit in units for t in (*unit.sums, unit.weight, unit.order)]
    for apply in (unmark, simplify):
        apply(job)
    ort = onnxruntime()
    session = open_session(ort, graph.to_proto(), providers_for(ort, None), "the model")
    ports = [port_of(argument) for argument in session.get_inputs()]
    names = [tensor.name for unit in units for tensor in unit.sums]
    totals: list[Array] | None = None
    for feeds, done, whole in _batches(ports, data, batch):
        found = [np.asarray(a, np.float64) for a in _run(session, names, feeds)]
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
        if progress is not None:
            progress(done, whole)
    if totals is None:
        raise OptionError("the data holds no sample")
    fixed = _run(session, [t.name for unit in units for t in (unit.weight, unit.order)], feeds)
    return _patterns(units, totals, fixed)


def _merged(model: Source, inputs: str | None, output: str | None) -> Job:
    """The model with its layers found and merged."""
    choice = Choice(pattern_net, {"patterns": Patterns({}, "")})
    request = Request(
        choices=(choice,),
        inputs=None if inputs is None else (inputs,),
        output=output,
        target="input",
        targets=None,
        baseline="zeros",
        delta=False,
        source="",
    )
    job = Job(normalize(load(model)[0]), request, choice)
    for apply in (mark, scope, cluster, recognize, merge):
        apply(job)
    return job


def _run(session: Any, names: list[str], feeds: Mapping[str, Array]) -> list[Array]:
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise CompileError(f"ONNX Runtime failed: {line(error)}") from None


@dataclass(frozen=True)
class Unit:
    """One layer: where its statistics come out.

    ``sums``: Σ x·y and Σ x over the positive y, in the layout of the weight as the layer reads it;
    the number of positive and the sum and number of all y, for each channel. ``weight``: merged
    with what belongs to the layer; ``order``: places of the initializer's entries in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layer: Affine
    sums: tuple[Tensor, Tensor, Tensor, Tensor]
    weight: Tensor
    order: Tensor


def _unit(job: Job, node: Node) -> Unit:
    graph, op = job.graph, job.graph.op
    layer = layer_at(graph, node, (0,))
    matrix = node.op != "MatMul" or len(graph.shape(node.inputs[1]) or ()) == 2
    if layer is None or not matrix:
        raise UnsupportedOpError([offence(graph, node, "its weights are not a plain matrix")])
    source, between = origin(graph, node.inputs[1])
    region = next((c for c in job.clusters.values() if c.operands and c.nodes[0] is node), None)
    y = node.outputs[0] if region is None else region.output
    x, weight = node.inputs[0], node.inputs[1]
    merged = layer.weight if region is None else region.operands[0]
    if is_narrow(x.dtype):
        x, y, weight, merged = (op.Cast(t, to=np.dtype("f4")) for t in (x, y, weight, merged))
    positive = op.Cast(op.Greater(y, 0.0), to=graph.dtype(y))
    rest = [axis for axis in range(len(graph.shape(y) or ())) if axis != layer.channel]
    shape = tuple(int(size) for size in source.shape)
    order = graph.constant(np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
    for step in between:
        order = graph.emit(step.op, order, *step.inputs[1:], **step.attrs)
    every = op.Add(op.Mul(y, 0.0), 1.0)
    total = op.Concat(
        op.Unsqueeze(op.ReduceSum(y, rest, keepdims=0), [0]),
        op.Unsqueeze(op.ReduceSum(every, rest, keepdims=0), [0]),
        axis=0,
    )
    sums = (
        _to_weight(graph, node, x, weight, y, op.Mul(y, positive)),
        _to_weight(graph, node, x, weight, y, positive),
        op.ReduceSum(positive, rest, keepdims=0),
        total,
    )
    named = tuple(op.Identity(t) for t in sums)
    return Unit(
        source.name,
        shape,
        graph.dtype(source),
        layer,
        (named[0], named[1], named[2], named[3]),
        op.Identity(merged),
        op.Identity(order),
    )


def _to_weight(graph: Graph, node: Node, x: Tensor, weight: Tensor, y: Tensor, m: Tensor) -> Tensor:
    """Σ x · m over samples and positions, in the weight's layout."""
    plain = gs.Node(
        node.op, node.name, {k: v for k, v in node.attrs.items() if k not in ("alpha", "beta")}
    )
    rule = rules.lookup(node.op, node.domain, (1,))
    assert isinstance(rule, rules.Bilinear)
    site = Site(graph, plain, (x, weight), (y,), (m,), (1,))
    share = rule.pull(site, 1)
    return unbroadcast(site, share, weight, y) if rule.broadcasts else share


def _batches(
    ports: list[Port], data: Data, size: int
) -> Iterator[tuple[dict[str, Array], int, int]]:
    """Feeds of ``size`` samples, with how many samples are done and how many there are."""
    by_name = {port.name: port for port in ports}
    given: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {ports[0].name: data}
    if not isinstance(data, Mapping) and len(ports) != 1:
        raise OptionError(f"the model has {len(ports)} inputs: give arrays by name")
    missing, unknown = set(by_name) - set(given), set(given) - set(by_name)
    if missing or unknown:
        raise OptionError(
            f"the data must hold one array for each of {sorted(by_name)}; it holds {sorted(given)}"
        )
    arrays = {k: a if hasattr(a, "__getitem__") else np.asarray(a) for k, a in given.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise OptionError(f"the inputs have different numbers of samples: {lengths}")
    whole = next(iter(lengths.values()))
    fixed = {port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)}
    if len(fixed) > 1:
        raise OptionError("the model's inputs have different fixed batches")
    if fixed:
        # A model of a fixed batch cannot take what is left over.
        size = fixed.pop()
        whole -= whole % size
    for start in range(0, whole, size):
        stop = min(start + size, whole)
        yield {name: fit(by_name[name], a[start:stop]) for name, a in arrays.items()}, stop, whole


def _patterns(units: list[Unit], totals: list[Array], fixed: list[Array]) -> dict[str, Array]:
    """a₊ of each layer from its sums, in its initializer's layout."""
    pooled: dict[str, list[Array]] = {}
    for k, unit in enumerate(units):
        sums = totals[4 * k : 4 * k + 4]
        held = pooled.setdefault(unit.name, [np.zeros_like(a) for a in sums])
        pooled[unit.name] = [a + b for a, b in zip(held, sums, strict=True)]
    patterns: dict[str, Array] = {}
    for k, unit in enumerate(units):
        if unit.name in patterns:
            continue
        product, entry, count, (total, every) = pooled[unit.name]
        weight, order = np.asarray(fixed[2 * k], np.float64), fixed[2 * k + 1]
        # E₊[x y] − E₊[x] E[y], times the number of positive y.
        rise = product - entry * _by_channel(total / every, unit.layer, product.shape)
        length = _per_neuron(weight * rise, unit.layer)
        dead = (_by_channel(count, unit.layer, product.shape) == 0) | (length == 0)
        pattern = np.zeros(product.size)
        # Back to where the initializer has its entries.
        pattern[order.reshape(-1)] = np.divide(
            rise, length, out=np.zeros_like(rise), where=~dead
        ).reshape(-1)
        patterns[unit.name] = pattern.reshape(unit.shape).astype(unit.dtype)
    return patterns


def _by_channel(values: Array, layer: Affine, shape: tuple[int, ...]) -> Array:
    """One number for each channel, [channels], at every weight of its neuron."""
    grouped = _grouped(shape, layer)
    places = [1] * len(grouped)
    places[0], places[layer.output + 1] = layer.groups, -1
    return np.broadcast_to(values.reshape(places), grouped).reshape(shape)


def _per_neuron(products: Array, layer: Affine) -> Array:
    """Sums over the weights of each neuron, at every one of these."""
    grouped = products.reshape(_grouped(products.shape, layer))
    axes = tuple(k for k in range(1, grouped.ndim) if k != layer.output + 1)
    sums = grouped.sum(axis=axes, keepdims=True)
    return np.broadcast_to(sums, grouped.shape).reshape(products.shape)


def _grouped(shape: tuple[int, ...], layer: Affine) -> tuple[int, ...]:
    """The weight's shape with an axis for its groups in front."""
    return (layer.groups, shape[0] // layer.groups, *shape[1:])
