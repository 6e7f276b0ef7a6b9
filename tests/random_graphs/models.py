"""Whole models out of recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from ..numeric import run
from . import elementwise, layers, shapes, steps  # noqa: F401  (each enters its recipes)
from .builder import RECIPES, Builder, Choose, Example, Refused, element, ir_version


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
