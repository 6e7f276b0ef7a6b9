"""Replace the weights of layers by patterns, for methods that send values back along these.

Precondition: scope and merged layers. Postcondition: every layer with weights on the way stands in
``job.clusters`` with its pattern, or weight × pattern, in the weight's place; a plain sweep does
the rest. Raises OptionError for patterns that are missing, or not of the weight's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.errors import CompileError, OptionError, UnsupportedOpError
from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.job import Cluster, Job
from onnx_attrib.passes.differentiate import active_inputs, offence
from onnx_attrib.rules import Bilinear, Linear, Structured

_CASTS = frozenset({"Cast", "CastLike"})


def substitute(job: Job) -> None:
    """Let every layer stand with its pattern."""
    if not job.method.weights:
        return
    graph, weighted = job.graph, job.method.weights == "weighted-patterns"
    arrays: Mapping[str, np.ndarray] = job.options["patterns"].arrays
    found = layers(job)
    origins = [origin(graph, node.inputs[1]) for node in found]
    _check(graph, [tensor for tensor, _ in origins], arrays)
    merged = {id(c.nodes[0]): c for c in job.clusters.values() if c.operands}
    for node, (source, between) in zip(found, origins, strict=True):
        pattern = graph.constant(arrays[source.name].astype(graph.dtype(source)))
        pattern = graph.replicate(between, {source.name: pattern})(node.inputs[1])
        region = merged.get(id(node)) or _alone(node)
        weight, *bias = region.operands
        if weighted:
            pattern = graph.op.Mul(pattern, weight)
        job.clusters[region.output.name] = replace(region, operands=[pattern, *bias])


def layers(job: Job) -> list[Node]:
    """The layers with constant weights on the way, sorted.

    Raises UnsupportedOpError for weights that patterns are not defined for, and CompileError if
    there is no layer at all.
    """
    graph, found, offences = job.graph, [], []
    for node in job.scope.nodes:
        active = active_inputs(node, job.scope.active)
        rule = rules.lookup(node.op, node.domain, active)
        if isinstance(rule, Structured):
            offences.append(offence(graph, node, "patterns are for feed-forward layers"))
        if not isinstance(rule, Bilinear) or not rule.layer or len(active) != 1:
            continue
        weight = origin(graph, node.inputs[1])[0]
        if active == (0,) and node.op != "Einsum" and graph.value(weight) is not None:
            found.append(node)
        else:
            reason = "its weight is not a constant second operand of Conv, Gemm or MatMul"
            offences.append(offence(graph, node, reason))
    if offences:
        raise UnsupportedOpError(offences, "Attribute a tensor behind these nodes (--input NAME).")
    if not found:
        raise CompileError("the model has no layer with weights between input and output")
    return found


def origin(graph: Graph, weight: Tensor) -> tuple[Tensor, list[Node]]:
    """The constant that a weight is, or is made of by nodes that only move entries."""
    between: list[Node] = []
    while weight.inputs:
        node = weight.inputs[0]
        rule = rules.lookup(node.op, node.domain, (0,))
        if not isinstance(rule, Linear) or rule.flow != "moves" or node.op in _CASTS:
            break
        between.insert(0, node)
        weight = node.inputs[0]
    return weight, between


def _alone(node: Node) -> Cluster:
    stand_in = gs.Node(node.op, node.name, dict(node.attrs))
    return Cluster(node.inputs[0], node.outputs[0], [node], stand_in, operands=node.inputs[1:])


def _check(graph: Graph, sources: list[Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    names = list(dict.fromkeys(source.name for source in sources))
    missing = [name for name in names if name not in arrays]
    if missing:
        held = f"; it holds {_some(list(arrays))}" if arrays else ""
        raise OptionError(f"the patterns lack those of {_some(missing)}{held}")
    for source in sources:
        wanted, array = graph.shape(source), arrays[source.name]
        if array.shape != wanted:
            raise OptionError(
                f"the pattern of '{source.name}' has shape {list(array.shape)}; its weight has "
                f"{list(wanted or ())}"
            )
        if not np.isfinite(array).all():
            raise OptionError(f"the pattern of '{source.name}' has entries that are not finite")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


__all__ = ["layers", "origin", "substitute"]
