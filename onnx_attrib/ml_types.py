"""Types that ONNX does not infer: of most ai.onnx.ml operators, of STFT and of a Loop's states.

(Of an STFT it infers nothing, not even the rank, unless the length of the signal is known. A state
may have another shape after each step; the body tells what these have in common.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import (
    GraphProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from onnx_attrib.protos import captured_names

DOMAIN = "ai.onnx.ml"
Dim = int | str | None
Known = tuple[int, list[Dim] | None] | None
"""The element type and the shape of a tensor, as far as known."""


def complete(
    graph: GraphProto, types: Mapping[str, TypeProto], imports: Sequence[OperatorSetIdProto]
) -> bool:
    """Declare what ``types`` (by tensor name) lack of such outputs; True if anything."""
    added = False
    for node in graph.node:
        if node.domain != DOMAIN and (node.domain or node.op_type not in _STANDARD):
            continue
        inputs = [_shape(types.get(name)) for name in node.input]
        known = [name in types for name in node.input if name]
        named = [name for name in node.output if name]
        if not node.domain and all(_shape(types.get(name)) is not None for name in named):
            continue
        standard = _STANDARD.get(node.op_type)
        results = standard(node, types, imports) if standard else _outputs(node, inputs)
        for name, found in zip(node.output, results, strict=False):
            if not name or found is None or not all(known) or _shape(types.get(name)) is not None:
                continue
            kind, shape = found
            info = helper.make_tensor_value_info(name, kind, shape)
            stated = [entry for entry in graph.value_info if entry.name == name]
            stated += [entry for entry in graph.output if entry.name == name]
            if stated and shape is None:
                continue
            added = True
            _declare(graph, stated, info)
    return added


def _declare(graph: GraphProto, stated: list[ValueInfoProto], info: ValueInfoProto) -> None:
    for entry in stated:
        entry.type.CopyFrom(info.type)
    if not stated:
        graph.value_info.append(info)


def _shape(kind: TypeProto | None) -> list[Dim] | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
        for d in kind.tensor_type.shape.dim
    ]


def _states(
    node: NodeProto, types: Mapping[str, TypeProto], imports: Sequence[OperatorSetIdProto]
) -> list[Known]:
    """Of a Loop: what a state is before the first step as after each."""
    results: list[Known] = []
    for name, after in zip(node.input[2:], _after_step(node, types, imports)[1:], strict=False):
        start, shape, other = types.get(name), _shape(types.get(name)), _shape(after.type)
        if start is None or shape is None or other is None or len(shape) != len(other):
            results.append(None)
            continue
        dims: list[Dim] = [
            a if isinstance(a, int) and a == b else None for a, b in zip(shape, other, strict=True)
        ]
        results.append((start.tensor_type.elem_type, dims))
    return results


def _after_step(
    node: NodeProto, types: Mapping[str, TypeProto], imports: Sequence[OperatorSetIdProto]
) -> Sequence[ValueInfoProto]:
    """What the body gives, if its states have the ranks that they start with."""
    body = GraphProto()
    body.CopyFrom(next(a.g for a in node.attribute if a.name == "body"))
    for state, name in zip(body.input[2:], node.input[2:], strict=False):
        start = _shape(types.get(name))
        if start is not None and _shape(state.type) is None:
            state.type.CopyFrom(types[name])
            for dim in state.type.tensor_type.shape.dim:
                dim.Clear()
    read = [name for name in captured_names(body) if name in types]
    body.input.extend(ValueInfoProto(name=name, type=types[name]) for name in read)
    model = helper.make_model(body, opset_imports=imports)
    try:
        return onnx.shape_inference.infer_shapes(model).graph.output
    except Exception:  # inference raises bare RuntimeErrors
        return body.output


def _spectra(
    node: NodeProto, types: Mapping[str, TypeProto], imports: Sequence[OperatorSetIdProto]
) -> list[Known]:
    """Of STFT: [batch, frames, bins, 2], in the type of the signal."""
    signal, inputs = types.get(node.input[0]), [_shape(types.get(name)) for name in node.input]
    if signal is None:
        return []
    window = inputs[2] if len(inputs) > 2 else None
    bins = window[0] if window else None
    if isinstance(bins, int) and all(a.i for a in node.attribute if a.name == "onesided"):
        bins = bins // 2 + 1
    batch = inputs[0][0] if inputs[0] else None
    return [(signal.tensor_type.elem_type, [batch, None, bins, 2])]


_STANDARD = {"Loop": _states, "STFT": _spectra}


def _outputs(node: NodeProto, inputs: list[list[Dim] | None]) -> list[Known]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x = inputs[0] if inputs else None
    batch: Dim = x[0] if x and len(x) == 2 else 1 if x is not None else None
    op = node.op_type
    if op in ("Scaler", "Normalizer", "Imputer"):
        return [(TensorProto.FLOAT, x)] if op != "Imputer" else [_imputed(attributes, x)]
    if op == "FeatureVectorizer":
        widths = [s[-1] if s else None for s in inputs]
        total = sum(w for w in widths if isinstance(w, int))
        width: Dim = total if all(isinstance(w, int) for w in widths) else None
        return [(TensorProto.FLOAT, [batch, width])]
    if op in ("LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"):
        targets = attributes.get("targets", attributes.get("n_targets", 1))
        return [(TensorProto.FLOAT, [batch, targets])]
    if op in ("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"):
        return [_labels(attributes, batch), (TensorProto.FLOAT, [batch, _scores(op, attributes)])]
    return []


def _imputed(attributes: Mapping[str, Any], x: list[Dim] | None) -> tuple[int, list[Dim] | None]:
    whole = "imputed_value_int64s" in attributes
    return (TensorProto.INT64 if whole else TensorProto.FLOAT, x)


def _labels(attributes: Mapping[str, Any], batch: Dim) -> tuple[int, list[Dim] | None]:
    strings = attributes.get("classlabels_strings")
    return (TensorProto.STRING if strings else TensorProto.INT64, [batch])


def _scores(op: str, attributes: Mapping[str, Any]) -> int:
    names = ("classlabels_ints", "classlabels_int64s", "classlabels_strings")
    classes = max(len(attributes.get(name, ())) for name in names)
    supports = attributes.get("vectors_per_class", ())
    if op == "SVMClassifier" and supports and not attributes.get("prob_a") and classes > 2:
        return classes * (classes - 1) // 2
    return classes
