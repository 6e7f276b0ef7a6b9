"""Protobufs of nodes and subgraphs: what they read from outside, and what survives graphsurgeon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import AttributeProto, GraphProto, NodeProto

# Attribute types that survive a trip through graphsurgeon unharmed.
_PLAIN_ATTRIBUTES = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}


def captured_names(graph: GraphProto) -> list[str]:
    """Names that a subgraph uses from outside itself, in order of first use."""
    local = {t.name for t in graph.input} | {t.name for t in graph.initializer}
    local |= {t.values.name for t in graph.sparse_initializer}
    used: dict[str, None] = {}
    for node in graph.node:
        for name in node.input:
            if name and name not in local:
                used[name] = None
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                used.update((name, None) for name in captured_names(inner) if name not in local)
        local.update(node.output)
    used.update((t.name, None) for t in graph.output if t.name not in local)
    return list(used)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs a node holds in its attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def captures_of(node: NodeProto) -> list[str]:
    """Names that the subgraphs of a node use from outside, each once."""
    found = (name for inner in subgraphs(node) for name in captured_names(inner))
    return list(dict.fromkeys(found))


def inner_names(node: NodeProto) -> Iterator[str]:
    """Every name that the subgraphs of a node give to something."""
    for graph in subgraphs(node):
        yield from (t.name for t in graph.input)
        yield from (t.name for t in graph.initializer)
        for inner in graph.node:
            yield inner.name
            yield from inner.output
            yield from inner_names(inner)


def rename_captures(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Let a subgraph read other outer tensors in place of those named."""
    local = {t.name for t in graph.input} | {t.name for t in graph.initializer}
    local |= {output for node in graph.node for output in node.output}
    names = {old: new for old, new in names.items() if old not in local}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        for inner in subgraphs(node):
            rename_captures(inner, names)
    for output in graph.output:
        output.name = names.get(output.name, output.name)


def holds_only_plain(node: NodeProto) -> bool:
    """Whether a node survives a trip through graphsurgeon whole."""
    if node.doc_string or node.metadata_props or node.overload:
        return False
    return all(is_plain(attribute) for attribute in node.attribute)


def is_plain(attribute: AttributeProto) -> bool:
    """Whether graphsurgeon keeps an attribute."""
    field = _PLAIN_ATTRIBUTES.get(attribute.type)
    if field is None or attribute.ref_attr_name:
        return False
    value = getattr(attribute, field)
    if field in ("floats", "ints", "strings") and not len(value):
        return False
    if field in ("s", "strings"):
        try:
            _ = [item.decode() for item in ([value] if field == "s" else value)]
        except UnicodeDecodeError:
            return False
    return True
