"""Bring any ONNX model into the one form that the other passes know.

Precondition: a parsed model of opset 7 to 26. Postcondition: opset 21, no local functions, no
Constant nodes, no initializer listed as an input, small constant arithmetic evaluated, dtypes and
shapes inferred for every tensor as far as ONNX can. Raises ModelError for a model that ONNX's
checker rejects or that cannot be brought to opset 21.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_attrib.errors import ModelError
from onnx_attrib.ir import OPSET, Graph, subgraphs
from onnx_attrib.passes.convert import convert
from onnx_attrib.passes.examples import by_example, dims, vague
from onnx_attrib.passes.lower import lower
from onnx_attrib.passes.windows import round_down
from onnx_attrib.writer import all_nodes, infer_shapes

OLDEST, NEWEST = 7, 26
_DETACH = 1024
"""Initializers of more bytes are kept out of ONNX's own passes, which copy the whole model."""
_FOLD = 1024
"""Constant arithmetic on at most this many elements is evaluated at compile time."""
_GROWING = frozenset(
    """
    AffineGrid BlackmanWindow CenterCropPad Col2Im ConstantOfShape DFT EyeLike Expand HammingWindow
    HannWindow MaxUnpool MelWeightMatrix OneHot Pad Range Resize Tile Upsample
    """.split()
)
"""Operators whose results may be much larger than what they read."""
Sizes = list[int | str | None]


def normalize(model: ModelProto) -> Graph:
    """Check, inline, convert and infer; the model is consumed."""
    _check_opset(model)
    _constants_to_initializers(model)
    _drop_initializer_inputs(model)
    weights = _detach(model)
    _check(model)
    outputs = [_info(info) for info in model.graph.output]
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        _constants_to_initializers(model)
    model = convert(model, default_opset(model))
    _constants_to_initializers(model)
    _spell_out_defaults(model)
    model = _known(model)
    while round_down(model):
        _constants_to_initializers(model)
        del model.graph.value_info[:]
        model = _known(model)
        _correct(outputs, model)
    if lower(model):
        _constants_to_initializers(model)
        model = _known(model)
    by_example(model, _known)
    _attach(model, weights)
    return Graph(model, outputs)


def default_opset(model: ModelProto) -> int:
    """The model's version of the default domain (the newest, if it is listed twice)."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions and all(node.domain not in ("", "ai.onnx") for node in all_nodes(model.graph)):
        # Of ai.onnx.ml alone.
        return OPSET
    if not versions:
        raise ModelError("the model imports no version of ONNX's own operators")
    return max(versions)


def _check_opset(model: ModelProto) -> None:
    version = default_opset(model)
    if not OLDEST <= version <= NEWEST:
        raise ModelError(
            f"the model uses opset {version}; {OLDEST} to {NEWEST} are supported "
            "(convert it with onnx.version_converter)"
        )
    others = [o for o in model.opset_import if o.domain not in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", version), *others])
    for node in model.graph.node:
        if node.domain == "ai.onnx":
            node.domain = ""


def _spell_out_defaults(model: ModelProto) -> None:
    """Write down where STFT is one-sided by default: ONNX's shape inference takes it to be not."""
    for node in model.graph.node:
        if node.op_type == "STFT" and not any(a.name == "onesided" for a in node.attribute):
            node.attribute.append(helper.make_attribute("onesided", 1))


def _check(model: ModelProto) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"ONNX's checker rejects the model: {_line(error)}") from None


# -- weights stay out of ONNX's passes -------------------------------------------------------------


def _detach(model: ModelProto) -> dict[str, TensorProto]:
    """Replace large initializers by graph inputs of the same name, type and shape."""
    weights, small = {}, []
    for tensor in model.graph.initializer:
        try:
            expected = int(np.prod(tensor.dims, dtype=np.int64))
        except (ValueError, OverflowError):
            raise ModelError(f"initializer '{tensor.name}' has an impossible shape") from None
        if tensor.ByteSize() <= _DETACH and expected <= _DETACH:
            small.append(tensor)
            continue
        _check_size(tensor, expected)
        kept = TensorProto()
        kept.CopyFrom(tensor)
        weights[tensor.name] = kept
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    for name, tensor in weights.items():
        model.graph.input.append(
            helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        )
    # Inputs may take the place of initializers from IR 4 on.
    model.ir_version = max(model.ir_version, 4)
    return weights


def _check_size(tensor: TensorProto, expected: int) -> None:
    if not tensor.raw_data or tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return
    bits = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    packed = {"4": 4, "2": 2}
    name = TensorProto.DataType.Name(tensor.data_type)
    if name.startswith(("INT4", "UINT4", "FLOAT4", "INT2", "UINT2")):
        bits = packed[name[-1] if name[-1] in packed else "4"]
    if len(tensor.raw_data) * 8 < expected * bits:
        raise ModelError(
            f"initializer '{tensor.name}' holds {len(tensor.raw_data)} bytes, fewer than its shape "
            f"{list(tensor.dims)} needs: the file is damaged"
        )


def _attach(model: ModelProto, weights: dict[str, TensorProto]) -> None:
    inputs = [tensor for tensor in model.graph.input if tensor.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(weights.values())


def _drop_initializer_inputs(model: ModelProto) -> None:
    """IR 3 lists weights as inputs too; with a value in the file they are constants."""
    names = {t.name for t in model.graph.initializer}
    names |= {t.values.name for t in model.graph.sparse_initializer}
    inputs = [tensor for tensor in model.graph.input if tensor.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _constants_to_initializers(model: ModelProto) -> None:
    _initialize(model.graph)


def _initialize(graph: GraphProto) -> None:
    """The Constant nodes of a graph, and of the graphs in it, as initializers."""
    for node in graph.node:
        for inner in subgraphs(node):
            _initialize(inner)
    outputs = {t.name for t in graph.output}
    nodes = []
    for node in graph.node:
        value = _constant_value(node) if node.op_type == "Constant" and not node.domain else None
        if value is None or node.output[0] in outputs:
            nodes.append(node)
            continue
        value.name = node.output[0]
        graph.initializer.append(value)
    if len(nodes) < len(graph.node):
        kept = [_copied(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _constant_value(node: NodeProto) -> TensorProto | None:
    """The tensor a Constant node holds; None for kinds that stay nodes (sparse, strings)."""
    attribute = node.attribute[0]
    value = TensorProto()
    if attribute.ref_attr_name:
        return None
    if attribute.name == "value":
        value.CopyFrom(attribute.t)
    elif attribute.name in ("value_float", "value_floats"):
        data = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        value = numpy_helper.from_array(np.array(data, np.float32))
    elif attribute.name in ("value_int", "value_ints"):
        data = attribute.i if attribute.name == "value_int" else list(attribute.ints)
        value = numpy_helper.from_array(np.array(data, np.int64))
    else:
        return None
    return value


# -- versions, shapes, constants -------------------------------------------------------------------


def _known(model: ModelProto) -> ModelProto:
    """Infer what can be known before run time."""
    model = _infer(model)
    while _fold(model):
        model = _infer(model)
    return model


def _infer(model: ModelProto) -> ModelProto:
    """Infer shapes afresh; take the file's own only where inference knows less.

    A file's value_info can be stale (a batch axis made dynamic by hand), so one contradiction
    is enough not to believe any of it. What it says of its outputs is no more than that: a symbol
    of their own would hide that they have the shape of what they are computed from.
    """
    declared = {v.name: v for v in model.graph.value_info}
    del model.graph.value_info[:]
    outputs = [_info(info) for info in model.graph.output]
    for info in model.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    try:
        inferred = infer_shapes(model, data_prop=True)
    except Exception as error:  # inference raises bare RuntimeErrors
        raise ModelError(f"ONNX's shape inference fails: {_line(error)}") from None
    known = {v.name: v for v in inferred.graph.value_info}
    named: dict[str, str] = {}
    if all(_agree(known[name], v) for name, v in declared.items() if name in known):
        for name, v in declared.items():
            if name not in known:
                inferred.graph.value_info.append(v)
            elif _knows_more(v, known[name]):
                pairs = zip(dims(known[name]) or (), dims(v) or (), strict=False)
                named.update((h, s) for h, s in pairs if isinstance(h, str) and isinstance(s, str))
                known[name].CopyFrom(v)
    _rename((*inferred.graph.value_info, *inferred.graph.output), named)
    symbols = {dim for info in model.graph.input for dim in dims(info) or ()}
    for have, said in zip(inferred.graph.output, outputs, strict=True):
        _fill_in(have, said, symbols)
    return inferred


def _correct(declared: Iterable[onnx.ValueInfoProto], model: ModelProto) -> None:
    """Declare the outputs' sizes as they are inferred now."""
    for said, have in zip(declared, model.graph.output, strict=True):
        pairs = zip(dims(said) or (), dims(have) or (), strict=False)
        for k, (old, new) in enumerate(pairs):
            if isinstance(old, int) and isinstance(new, int):
                said.type.tensor_type.shape.dim[k].dim_value = new


def _rename(infos: Iterable[onnx.ValueInfoProto], named: Mapping[str, str]) -> None:
    """Give dimensions that inference made a symbol up for the symbols that the file has there."""
    for info in infos:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_param = named[dim.dim_param]


def _info(info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(info)
    return copy


def _fill_in(
    inferred: onnx.ValueInfoProto, declared: onnx.ValueInfoProto, symbols: set[int | str | None]
) -> None:
    """Take what is declared where inference does not know: numbers, and symbols of the inputs."""
    have, said = dims(inferred), dims(declared)
    if have is None:
        inferred.CopyFrom(declared)
        return
    if said is None or len(have) != len(said):
        return
    for k, (known, dim) in enumerate(zip(have, said, strict=True)):
        if known is None or (vague(known) and (isinstance(dim, int) or dim in symbols)):
            inferred.type.tensor_type.shape.dim[k].CopyFrom(declared.type.tensor_type.shape.dim[k])


def _agree(inferred: onnx.ValueInfoProto, declared: onnx.ValueInfoProto) -> bool:
    if inferred.type.tensor_type.elem_type != declared.type.tensor_type.elem_type:
        return False
    have, said = dims(inferred), dims(declared)
    if have is None or said is None:
        return True
    if len(have) != len(said):
        return False
    # A number where inference keeps the batch symbol is the classic stale entry.
    return all(
        h == s or not (isinstance(s, int) and (isinstance(h, int) or not vague(h)))
        for h, s in zip(have, said, strict=True)
    )


def _knows_more(declared: onnx.ValueInfoProto, inferred: onnx.ValueInfoProto) -> bool:
    have, said = dims(inferred), dims(declared)
    if have is None or said is None:
        return said is not None
    open_ = [vague(h) for h in have]
    kept = all(v or h == s for v, h, s in zip(open_, have, said, strict=True))
    return kept and any(v and not vague(s) for v, s in zip(open_, said, strict=True))


def _fold(model: ModelProto) -> bool:
    """Evaluate small arithmetic on constants and known shapes; True if anything was folded."""
    graph = model.graph
    values = {t.name: t for t in graph.initializer}
    shapes = {v.name: dims(v) for v in (*graph.value_info, *graph.input, *graph.output)}
    sizes: dict[str, Sizes] = {}
    outputs = {t.name for t in graph.output}
    kept, folded = [], 0
    for node in graph.node:
        results = None
        if not node.domain and not outputs.intersection(node.output):
            results = _evaluate(node, values, shapes, sizes)
        if results is None:
            kept.append(_copied(node))
            continue
        folded += 1
        for name, array in zip(node.output, results, strict=False):
            if name:
                values[name] = numpy_helper.from_array(array, name)
                graph.initializer.append(values[name])
    if folded:
        del graph.node[:]
        graph.node.extend(kept)
    return folded > 0


def _evaluate(
    node: NodeProto,
    values: dict[str, TensorProto],
    shapes: dict[str, Sizes | None],
    sizes: dict[str, Sizes],
) -> list[np.ndarray] | None:
    """What a node makes, if it is known; ``sizes``: results of Shape of which only some are."""
    if node.op_type == "Shape":
        known = shapes.get(node.input[0])
        if known is None and node.input[0] in values:
            known = list(values[node.input[0]].dims)
        if known is None:
            return None
        bounds = {a.name: a.i for a in node.attribute}
        sizes[node.output[0]] = known[bounds.get("start", 0) : bounds.get("end")]
        return _all_known(sizes[node.output[0]])
    if node.op_type in ("Gather", "Slice") and node.input[0] in sizes:
        picked = sizes[node.input[0]]
        places = numpy_helper.from_array(np.arange(len(picked)), node.input[0])
        found = _evaluate(node, {**values, node.input[0]: places}, shapes, {})
        return None if found is None else _all_known(np.array(picked, object)[found[0]])
    if not node.input or any(name and name not in values for name in node.input):
        return None
    if node.op_type.startswith("Random") or any(True for _ in subgraphs(node)):
        return None
    made = [shapes.get(name) for name in node.output if name]
    if any(_size(shape) is None and node.op_type in _GROWING for shape in made):
        return None
    if any((_size(shape) or 0) > _FOLD for shape in made):
        return None
    operands = {name: values[name] for name in node.input if name}
    if sum(int(np.prod(t.dims, dtype=np.int64)) for t in operands.values()) > _FOLD:
        return None
    try:
        feeds = {name: numpy_helper.to_array(tensor) for name, tensor in operands.items()}
        evaluator = onnx.reference.ReferenceEvaluator(_one_node(node, operands))
        results = evaluator.run(None, feeds)
    except Exception:  # an operator the evaluator lacks is left for run time
        return None
    if not all(isinstance(r, np.ndarray | np.generic) and np.size(r) <= _FOLD for r in results):
        return None
    return [np.asarray(r) for r in results]


def _size(shape: Sizes | None) -> int | None:
    """How many entries a tensor of that shape has; None where that is not known."""
    known = [dim for dim in shape or () if isinstance(dim, int)]
    return None if shape is None or len(known) < len(shape) else math.prod(known)


def _all_known(sizes: Any) -> list[np.ndarray] | None:
    known = all(isinstance(size, int) for size in np.array(sizes, object).flat)
    return [np.array(sizes, np.int64)] if known else None


def _one_node(node: NodeProto, operands: dict[str, TensorProto]) -> ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, t.data_type, list(t.dims))
        for name, t in operands.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = GraphProto(name="fold", node=[node], input=inputs, output=outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


__all__ = ["default_opset", "normalize"]
