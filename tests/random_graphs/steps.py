"""Scan and Loop: a small body, step by step."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from .builder import NO_DOUBLE, Builder, Refused, element, recipe

MAPS = ("Tanh", "Sigmoid", "Softsign", "Relu")


def infos(b: Builder, like: str, axis: int | None, *names: str) -> list[ValueInfoProto]:
    """Values of the type and rank of a tensor, or of its entries along an axis."""
    rank = b.rank(like) - int(axis is not None)
    kind = element(b.values[like])
    return [helper.make_tensor_value_info(name, kind, [None] * rank) for name in names]


def cell(b: Builder, state: str, entry: str, after: str) -> list[NodeProto]:
    """after = f(state · weight + entry), with a weight of its own."""
    weight = numpy_helper.from_array(b.array(scale=0.6))
    maps = [op for op in MAPS if b.dtype != "float64" or op not in NO_DOUBLE]
    return [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Mul", [state, "w"], ["scaled"]),
        helper.make_node("Add", ["scaled", entry], ["sum"]),
        helper.make_node(b.pick(maps), ["sum"], [after]),
    ]


@recipe(9)
def scan(b: Builder) -> str:
    """A recurrence along an axis, from the first entry or from zeros."""
    x = b.tensor(2, 3, fits=lambda v: v.shape[-1] > 1)
    # The reference evaluator knows the first axis only, read forward.
    axis = b.rank(x) - 1 if b.batch or b.chance(30) else 0
    start = b.emit("ReduceMean", x, axes=[axis], keepdims=0) if b.opset < 18 else None
    if start is None:
        start = b.emit("ReduceMean", x, b.ints(axis), keepdims=0)
    body = helper.make_graph(
        [*cell(b, "h", "x", "next"), helper.make_node("Identity", ["next"], ["out"])],
        "step",
        infos(b, x, axis, "h", "x"),
        infos(b, x, axis, "next", "out"),
    )
    direction = int(b.chance(30))
    names = b.emit(
        "Scan",
        start,
        x,
        outputs=2,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[axis],
        scan_input_directions=[direction],
        scan_output_axes=[axis],
    )
    return str(names[b.choose(0, 1)])


@recipe(11)
def loop(b: Builder) -> str:
    """One map again and again, as often as a number says."""
    x = b.tensor()
    body = loop_body(b, x)
    count = b.constant(b.choose(1, 3), np.int64)
    # The reference evaluator takes a condition that is left out for false.
    goes = b.constant(True, np.bool_) if b.chance(80) else ""
    return str(b.emit("Loop", count, goes, x, x, outputs=2, body=body)[0])


def loop_body(b: Builder, x: str) -> GraphProto:
    """(number, condition, state, given) → (condition, state, given)."""
    if b.rank(x) == 0:
        raise Refused
    flag = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("goes", "on")]
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    nodes = [
        helper.make_node("Identity", ["goes"], ["on"]),
        *cell(b, "h", "given", "next"),
        helper.make_node("Identity", ["given"], ["kept"]),
    ]
    inputs = [number, flag[0], *infos(b, x, None, "h", "given")]
    return helper.make_graph(nodes, "again", inputs, [flag[1], *infos(b, x, None, "next", "kept")])
