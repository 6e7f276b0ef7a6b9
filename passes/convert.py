"""Bring a model to opset 21, from older and from newer ones.

Precondition: a checked model without local functions. Postcondition: the same function at opset
21. Raises ModelError, with every node that has no equal there.

Newer models: after opset 21 ONNX only added operators (``onnx_attrib.newer`` defines them) and
types to those it had. Older ones go through ONNX's converter; where its result is another function
or it gives up, the node is rewritten before or mended after it:

- Resize 10 and Upsample lose where they sample (corners in the same place, the index cut off);
- Resize 11 and 12 with sizes keep empty scales beside them;
- Hardmax before 13 takes the maximum over all axes from ``axis`` on;
- GroupNormalization 18 has one scale and bias a group;
- BatchNormalization 7 may have a mean for each feature, and up to 13 unused outputs for training;
- Pad and Clip before 11 lend their attributes float32, whatever they work on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from onnx_attrib import newer
from onnx_attrib.errors import ModelError
from onnx_attrib.ir import OPSET, subgraphs
from onnx_attrib.writer import (
    Call,
    Definition,
    Inexpressible,
    Rewriter,
    Writer,
    all_nodes,
    constant_values,
    infer_shapes,
)


def convert(model: ModelProto, version: int) -> ModelProto:
    """The model at opset 21, given at ``version``."""
    if version > OPSET:
        return _from_newer(model, version)
    if version < OPSET:
        return _from_older(model, version)
    return model


def _refuse(version: int, refused: Sequence[str]) -> None:
    if refused:
        raise ModelError(f"cannot bring opset {version} to {OPSET}: {'; '.join(refused)}")


def _rewrite(
    model: ModelProto, version: int, choose: Callable[[NodeProto], Definition | None]
) -> ModelProto:
    if not any(choose(node) for node in all_nodes(model.graph)):
        return model
    typed = infer_shapes(model)
    rewriter = Rewriter(choose, version)
    rewriter.run(typed)
    _refuse(version, rewriter.refused)
    # Sizes are inferred anew from the definitions; ONNX 1.23 gets some of Attention's wrong.
    for field in ("value_info", "output"):
        typed.graph.ClearField(field)
        getattr(typed.graph, field).extend(getattr(model.graph, field))
    return typed


# -- newer -----------------------------------------------------------------------------------------


def _from_newer(model: ModelProto, version: int) -> ModelProto:
    def choose(node: NodeProto) -> Definition | None:
        return None if node.domain else newer.DEFINITIONS.get(node.op_type)

    model = _rewrite(model, version, choose)
    refused = []
    for node in all_nodes(model.graph):
        if node.domain:
            continue
        try:
            known = onnx.defs.get_schema(node.op_type, OPSET).attributes
        except onnx.defs.SchemaError:
            refused.append(f"{node.op_type} '{node.name or node.output[0]}' is newer")
            continue
        _drop_attributes(node, [a.name for a in node.attribute if a.name not in known])
    _refuse(version, refused)
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = OPSET
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True)
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"cannot bring opset {version} to {OPSET}: {reason}") from None
    return model


def _drop_attributes(node: NodeProto, names: Sequence[str]) -> None:
    """Drop what opset 21 lacks: settings of types it lacks too, or that say what is so anyway."""
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    if len(kept) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(kept)


# -- older -----------------------------------------------------------------------------------------


def _from_older(model: ModelProto, version: int) -> ModelProto:
    _drop_unused_outputs(model)
    model = _rewrite(model, version, lambda node: _older_definition(node, version))
    sampling = _sampling(model, version)
    try:
        model = onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises bare RuntimeErrors
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"ONNX's version converter cannot bring opset {version} to {OPSET}: {reason}"
        ) from None
    for node in all_nodes(model.graph):
        if node.op_type == "Resize":
            _mend_resize(node, sampling)
    if version < 11:
        _mend_bounds(model.graph)
    return model


def _older_definition(node: NodeProto, version: int) -> Definition | None:
    if node.domain:
        return None
    if node.op_type == "Hardmax" and version < 13:
        return _hardmax
    if node.op_type == "GroupNormalization" and version >= 18:
        return _group_normalization
    if node.op_type == "Scan" and version < 9:
        return _batched_scan
    if node.op_type == "BatchNormalization" and version < 9:
        return _feature_normalization if _spatial(node) == 0 else None
    return None


def _spatial(node: NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "spatial"), 1)


def _hardmax(w: Writer, c: Call) -> Sequence[str | None]:
    """Hardmax over all axes from ``axis`` on, as one."""
    axis = c.attr("axis")
    flat = w.op.Flatten(c.x(0), axis=axis if axis >= 0 else axis % c.rank())
    return [w.op.Reshape(w.op.Hardmax(flat, axis=1), w.op.Shape(c.x(0)))]


def _group_normalization(w: Writer, c: Call) -> Sequence[str | None]:
    """The same with each group's scale and bias repeated for its channels."""
    op, groups = w.op, c.attr("num_groups")
    size = op.Div(op.Shape(c.x(0), start=1, end=2), [groups])
    shape = op.Concat([groups], size, axis=0)
    scale, bias = (op.Reshape(op.Expand(op.Unsqueeze(c.x(i), [1]), shape), [-1]) for i in (1, 2))
    epsilon = c.attr("epsilon")
    return [op.GroupNormalization(c.x(0), scale, bias, num_groups=groups, epsilon=epsilon)]


def _batched_scan(w: Writer, c: Call) -> Sequence[str | None]:
    raise Inexpressible("a Scan of opset 8, which loops over a batch of sequences")


def _feature_normalization(w: Writer, c: Call) -> Sequence[str | None]:
    """(x − mean) · scale / √(variance + ε) + bias, with one of each for every feature."""
    op, epsilon = w.op, np.array(c.attr("epsilon"), c.dtype())
    x, scale, bias, mean, variance = (c.x(i) for i in range(5))
    factor = op.Div(scale, op.Sqrt(op.Add(variance, epsilon)))
    return [op.Add(op.Mul(op.Sub(x, mean), factor), bias)]


def _drop_unused_outputs(model: ModelProto) -> None:
    """Running statistics that nothing reads; opset 14 keeps them for training only."""
    used = {t.name for t in model.graph.output}
    for node in all_nodes(model.graph):
        used.update(node.input)
        used.update(t.name for inner in subgraphs(node) for t in inner.output)
    for node in all_nodes(model.graph):
        if node.op_type == "BatchNormalization" and not used.intersection(node.output[1:]):
            del node.output[1:]


def _sampling(model: ModelProto, version: int) -> dict[str, dict[str, str]]:
    """How each Upsample and Resize before opset 11 samples, by the name of its output."""
    if version > 10:
        return {}
    values = {name: numpy_helper.to_array(t) for name, t in constant_values(model.graph).items()}
    modes, refused = {}, []
    for node in all_nodes(model.graph):
        if node.op_type not in ("Resize", "Upsample"):
            continue
        nearest = "floor"
        if node.op_type == "Resize" and _mode(node) == "nearest":
            scales = values.get(node.input[1], np.array([0.5, 2]))
            # Enlarged, the entry before; reduced, the one behind: so ONNX Runtime reads opset 10.
            nearest = "ceil" if (scales < 1).any() else "floor"
            if nearest == "ceil" and (scales > 1).any():
                label = node.name or node.output[0]
                refused.append(f"Resize '{label}' may enlarge one axis and reduce another")
        modes[node.output[0]] = {
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": nearest,
        }
    _refuse(version, refused)
    return modes


def _mode(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")


def _mend_resize(node: NodeProto, sampling: dict[str, dict[str, str]]) -> None:
    for name, value in sampling.get(node.output[0], {}).items():
        node.attribute.append(helper.make_attribute(name, value))
    if len(node.input) > 3 and node.input[3]:
        node.input[2] = ""


_BOUNDS = {"Pad": (2,), "Clip": (1, 2)}


def _mend_bounds(graph: GraphProto) -> None:
    """Give what a Pad fills with, and the bounds of a Clip, the type of what they are for."""
    fixed, nodes = constant_values(graph), list[NodeProto]()
    for node in graph.node:
        for inner in subgraphs(node):
            _mend_bounds(inner)
        for i in _BOUNDS.get(node.op_type, ()) if not node.domain else ():
            name = node.input[i] if i < len(node.input) else ""
            if name not in fixed:
                continue
            if node.op_type == "Pad" and not numpy_helper.to_array(fixed[name]).any():
                node.input[i] = ""
                continue
            typed = f"{node.output[0]}/{name}"
            nodes.append(helper.make_node("CastLike", [name, node.input[0]], [typed], typed))
            node.input[i] = typed
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    del graph.node[:]
    graph.node.extend(nodes)


__all__ = ["convert"]
