"""Models taken apart, and run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Element types that carry a derivative."""
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and every graph inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from graphs(inner)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of a model: those of subgraphs and of local functions too."""
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    for graph in graphs(inner):
                        yield from graph.node


def element_type(info: onnx.ValueInfoProto) -> int:
    """The element type of a tensor; 0 for a sequence or an optional."""
    return int(info.type.tensor_type.elem_type)


def float_inputs(model: ModelProto) -> list[str]:
    """Names of the float graph inputs that are not initializers."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return [
        info.name
        for info in model.graph.input
        if info.name not in fixed and element_type(info) in FLOATS
    ]


def is_narrow(model: ModelProto) -> bool:
    """Whether the model computes in 16 bits anywhere."""
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = {element_type(info) for info in infos}
    types |= {tensor.data_type for tensor in model.graph.initializer}
    for node in all_nodes(model):
        types |= {a.i for a in node.attribute if a.name in ("to", "dtype")}
        types |= {a.t.data_type for a in node.attribute if a.type == AttributeProto.TENSOR}
    return bool(types.intersection(NARROW))


def joined(model: ModelProto) -> tuple[ModelProto, str]:
    """The model with one float output to explain, and that output's name.

    Several float outputs are flattened and concatenated into one more output, so that a random
    cotangent reaches all of them at once.
    """
    floats = [info for info in model.graph.output if element_type(info) in FLOATS]
    if len(floats) == 1:
        return model, floats[0].name
    result = ModelProto()
    result.CopyFrom(model)
    graph, kind = result.graph, element_type(floats[0])
    graph.initializer.append(from_array(np.array([-1], np.int64), "joined/flat"))
    parts = []
    for info in floats:
        part = f"joined/{info.name}"
        graph.node.append(helper.make_node("Reshape", [info.name, "joined/flat"], [part]))
        if element_type(info) != kind:
            graph.node.append(helper.make_node("Cast", [part], [f"{part}/cast"], to=kind))
            part = f"{part}/cast"
        parts.append(part)
    graph.node.append(helper.make_node("Concat", parts, ["joined"], axis=0))
    graph.output.append(helper.make_tensor_value_info("joined", kind, ["joined_length"]))
    return result, "joined"


def frozen(model: ModelProto, values: Feeds) -> ModelProto:
    """The model with some of its inputs turned into initializers."""
    result = ModelProto()
    result.CopyFrom(model)
    infos = [info for info in result.graph.input if info.name not in values]
    types = {info.name: element_type(info) for info in model.graph.input}
    del result.graph.input[:]
    result.graph.input.extend(infos)
    for name, value in values.items():
        tensor = from_array(np.asarray(value), name)
        assert tensor.data_type == types[name], f"{name}: {value.dtype}"
        result.graph.initializer.append(tensor)
    return result


def symbolic(model: ModelProto, axes: Callable[[str, int], str | None]) -> ModelProto:
    """The model with dimensions of its inputs renamed: ``axes(input, axis)`` is the symbol.

    Declared shapes of the outputs are forgotten, and inferred again where ONNX can.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for info in result.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            symbol = axes(info.name, axis)
            if symbol is not None:
                dim.dim_param = symbol
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in result.graph.output}
    for node in result.graph.node:
        if node.op_type == "STFT" and not any(a.name == "onesided" for a in node.attribute):
            # The default; shape inference takes another.
            node.attribute.append(helper.make_attribute("onesided", 1))
    del result.graph.value_info[:]
    for info in result.graph.output:
        info.type.tensor_type.ClearField("shape")
    result = onnx.shape_inference.infer_shapes(result)
    for info in result.graph.output:
        shape = info.type.tensor_type.shape
        if not info.type.tensor_type.HasField("shape"):
            shape.SetInParent()
            for _ in range(ranks[info.name]):
                shape.dim.add()
        for axis, dim in enumerate(shape.dim):
            # ONNX 1.23 infers a size of zero for Attention with a symbolic number of features.
            if not dim.dim_value and not dim.dim_param:
                dim.dim_param = f"{info.name}_{axis}"
    return result


def session(model: ModelProto, optimize: bool = True) -> ort.InferenceSession:
    """The model in onnxruntime, on the CPU, with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    steps = {"RNN", "GRU", "LSTM"}.intersection(node.op_type for node in all_nodes(model))
    # onnxruntime 1.31 crashes while it optimises some recurrent models in 16 bits.
    left_out = ["NchwcTransformer"] if steps and is_narrow(model) else []
    return ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=left_out,
    )


def run(model: ModelProto | ort.InferenceSession, feeds: Feeds) -> dict[str, Array]:
    """Every output by name; feeds that the model has no input for are left out."""
    held = session(model) if isinstance(model, ModelProto) else model
    wanted = {info.name for info in held.get_inputs()}
    names = [info.name for info in held.get_outputs()]
    values = held.run(names, {k: v for k, v in feeds.items() if k in wanted})
    return dict(zip(names, values, strict=True))
