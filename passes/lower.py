"""Replace operators that no rule covers by the definitions that ONNX gives them.

Precondition: a model at opset 21, types inferred. Postcondition: no CastLike (ONNX Runtime has no
kernel for it), no sequences or optionals whose elements are known, and no operator that lacks a
rule but has a function body in ONNX's schema. Which ones these are follows from the rule table.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import FunctionProto, ModelProto, NodeProto, helper

from onnx_attrib import rules
from onnx_attrib.ir import OPSET, subgraphs
from onnx_attrib.passes.sequences import unpack
from onnx_attrib.writer import Call, Definition, Inexpressible, Rewriter, Writer, infer_shapes

_DEEPEST = 8
"""Bodies are made of operators that may have bodies themselves."""


def lower(model: ModelProto) -> bool:
    """Rewrite ``model`` in place; True if anything changed."""
    changed = unpack(model)
    for _ in range(_DEEPEST):
        if not Rewriter(definition, OPSET).run(model):
            break
        changed = True
        typed = infer_shapes(model)
        model.graph.CopyFrom(typed.graph)
    return changed


def definition(node: NodeProto) -> Definition | None:
    """How to replace a node, or None to keep it."""
    if node.domain:
        return None
    if node.op_type == "CastLike":
        return cast_like
    if rules.known(node.op_type, node.domain) or not has_body(node.op_type):
        return None
    return instantiated


def has_body(op_type: str) -> bool:
    """Whether ONNX defines the operator by others."""
    try:
        schema = onnx.defs.get_schema(op_type, OPSET)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def cast_like(w: Writer, c: Call) -> Sequence[str | None]:
    """A Cast to the type of the second input."""
    return [w.op.Cast(c.x(0), to=helper.np_dtype_to_tensor_dtype(c.dtype(1)))]


def instantiated(w: Writer, c: Call) -> Sequence[str | None]:
    """The schema's own function body, for this node's inputs and attributes."""
    body = function_body(c)
    names = dict.fromkeys(body.input, "")
    names.update(zip(body.input, c.node.input, strict=False))
    for inner in body.node:
        if any(True for _ in subgraphs(inner)):
            raise Inexpressible("its definition contains a loop")
        node = NodeProto()
        node.CopyFrom(inner)
        node.input[:] = [names[name] if name else "" for name in inner.input]
        for i, name in enumerate(inner.output):
            names[name] = node.output[i] = w.fresh(name) if name else ""
        _resolve_attributes(node, inner, c)
        node.name = node.output[0]
        w.nodes.append(node)
    return [names.get(name) for name in body.output]


def function_body(c: Call) -> FunctionProto:
    """The newest definition that holds at the model's opset."""
    schema = onnx.defs.get_schema(c.node.op_type, c.version)
    if schema.has_function:
        version = max(v for v in schema.function_opset_versions if v <= c.version)
        data = schema.get_function_with_opset_version(version)
    else:
        versions = schema.context_dependent_function_opset_versions
        types = [c.types[name].SerializeToString() if name else b"" for name in c.node.input]
        data = schema.get_context_dependent_function_with_opset_version(
            max(v for v in versions if v <= c.version), c.node.SerializeToString(), types
        )
    body = FunctionProto()
    body.ParseFromString(data)
    return body


def _resolve_attributes(node: NodeProto, inner: NodeProto, c: Call) -> None:
    """Put the caller's attributes (or their defaults) where the body refers to them."""
    del node.attribute[:]
    for attribute in inner.attribute:
        if not attribute.ref_attr_name:
            node.attribute.append(attribute)
            continue
        value = c.attr(attribute.ref_attr_name)
        if value is not None:
            node.attribute.append(helper.make_attribute(attribute.name, value))


__all__ = ["definition", "lower"]
