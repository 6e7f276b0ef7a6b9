"""Find what lies between the attributed tensors and the explained output.

Precondition: a normalized graph. Postcondition: ``job.scope`` is set; for methods that need
derivatives every node on a differentiable path has a rule, and at least one path exists from each
attributed tensor.
Raises OptionError for names that do not exist or fit, UnsupportedOpError with all nodes that no
rule covers, CompileError when the output does not depend on what is to be attributed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib.errors import CompileError, OptionError, UnsupportedOpError, suggest
from onnx_attrib.ir import Graph, Node, Tensor, is_float, is_integer, operands
from onnx_attrib.job import Job, Scope
from onnx_attrib.passes.differentiate import active_inputs, check_rules, flow, offence
from onnx_attrib.passes.quantized import leaks


def scope(job: Job) -> None:
    """Choose output and attributed tensors, then trace the paths between them."""
    graph = job.graph
    graph.sort()
    output = explained_output(graph, job.request.output)
    upstream = ancestors(graph, output)
    inputs = attributed_tensors(graph, job.request.inputs, upstream)
    if job.request.inputs is None:
        job.notes += _instead(graph, upstream, inputs)
    names = {tensor.name for tensor in inputs}
    dependent, changing = [], set(names)
    for node in upstream:
        if any(t.name in changing for t in graph.uses(node)):
            dependent.append(node)
            changing.update(t.name for t in node.outputs if t.name)
    shape = graph.shape(output)
    job.scope = Scope(inputs, output, [], set(), dependent, shape[0] if shape else None)
    for tensor in inputs:
        _check_reach(graph, tensor, output, upstream, job.request.differentiates)
    if job.request.differentiates:
        _trace(graph, job.scope, upstream)


def between(graph: Graph, inputs: list[Tensor], output: Tensor) -> Scope:
    """The scope of tensors that may lie within the model's own; raises the same errors."""
    upstream = ancestors(graph, output)
    for tensor in inputs:
        _check_reach(graph, tensor, output, upstream, True)
    result = Scope(inputs, output, [], set(), [], None)
    _trace(graph, result, upstream)
    return result


def _trace(graph: Graph, scope: Scope, upstream: Sequence[Node]) -> None:
    """Fill in the differentiable paths; every node on them must have a rule."""
    active = flow(upstream, set(scope.names))
    # Only what also leads to the output: walk back from it over active tensors.
    nodes, needed = [], {scope.output.name}
    for node in reversed(upstream):
        if any(t.name in needed for t in node.outputs):
            indices = active_inputs(node, active)
            if indices:
                nodes.append(node)
                needed.update(operands(node)[i].name for i in indices)
    nodes.reverse()
    check_rules(graph, nodes)
    _check_integers(graph, upstream, active)
    scope.nodes, scope.active = nodes, active & needed


def explained_output(graph: Graph, name: str | None) -> Tensor:
    """The tensor to explain: the named one, or the first float output."""
    if name is None:
        for tensor in graph.outputs:
            if is_float(tensor.dtype):
                return tensor
        kinds = ", ".join(f"{t.name}: {t.dtype or 'not a tensor'}" for t in graph.outputs)
        before = [t for o in graph.outputs for n in o.inputs for t in n.inputs if t.inputs]
        floats = [f"'{t.name}'" for t in before if is_float(t.dtype)]
        advice = f"; name an inner tensor: {', '.join(floats[:3])}" if floats else ""
        raise CompileError(f"the model has no float output to explain ({kinds}){advice}")
    return float_tensor(graph, name, "output")


def attributed_tensors(
    graph: Graph, names: Sequence[str] | None, upstream: Sequence[Node]
) -> list[Tensor]:
    """The named tensors, else the float inputs that reach the output, else what integers become.

    The embeddings of token ids come before the float values that integer inputs are cast to.
    """
    if names is not None:
        if not names:
            raise OptionError("no tensor to attribute was named")
        if len(set(names)) != len(names):
            raise OptionError("a tensor is named twice in inputs")
        return [float_tensor(graph, name, "input", upstream) for name in names]
    used = {t.name for node in upstream for t in graph.uses(node)}
    found = [t for t in graph.inputs if is_float(t.dtype) and t.name in used]
    # Numbers that only serve as indices (some exporters declare token ids as floats) do not count.
    chosen = [t for t in found if _reaches(upstream, t)] or embeddings(graph, upstream)
    chosen = chosen or [t for t, _ in _converted(graph, upstream) if _reaches(upstream, t)] or found
    if not chosen:
        kinds = ", ".join(f"{t.name}: {t.dtype}" for t in graph.inputs)
        raise CompileError(
            "no float input reaches the output, and no embedding or float tensor that an integer "
            f"input becomes was found (inputs: {kinds}); name an inner float tensor with "
            "inputs=[...] (--input)"
        )
    return chosen


def embeddings(graph: Graph, nodes: Sequence[Node]) -> list[Tensor]:
    """Rows of constant float tables that are picked at run time, by index or by one-hot product."""
    return [
        node.outputs[0]
        for node in nodes
        if is_float(node.outputs[0].dtype) and (_picks_rows(graph, node) or _one_hot(graph, node))
    ]


def _picks_rows(graph: Graph, node: Node) -> bool:
    if node.op not in ("Gather", "GatherND"):
        return False
    table, indices = node.inputs[:2]
    return _is_table(graph, table) and graph.value(indices) is None


def _one_hot(graph: Graph, node: Node) -> bool:
    """A product of truth values, seen as zeros and ones, with a table."""
    if node.op not in ("MatMul", "Gemm") or not _is_table(graph, node.inputs[1]):
        return False
    for source in node.inputs[0].inputs:
        if source.op == "OneHot":
            return True
        if source.op == "Cast":
            return source.inputs[0].dtype == np.bool_
    return False


def _converted(graph: Graph, nodes: Sequence[Node]) -> list[tuple[Tensor, str]]:
    """Float tensors that hold the numbers of an integer input, and that input's name.

    The numbers may be moved and reckoned with as integers before; the sizes of a tensor, and what
    comparing its entries gives, are none of its numbers.
    """
    origin = {t.name: t.name for t in graph.inputs if is_integer(t.dtype)}
    found = []
    for node in nodes:
        reads = node.op in ("OneHot", "DequantizeLinear")
        indices = (0,) if reads else active_inputs(node, set(origin))
        if not indices or indices[0] >= len(node.inputs):
            # (What a subgraph reads from outside is its own affair.)
            continue
        if node.inputs[indices[0]].name not in origin:
            continue
        source = origin[node.inputs[indices[0]].name]
        for tensor in node.outputs:
            if is_float(tensor.dtype):
                found.append((tensor, source))
            elif is_integer(tensor.dtype):
                origin[tensor.name] = source
    return found


def _instead(graph: Graph, upstream: Sequence[Node], chosen: Sequence[Tensor]) -> list[str]:
    """That floats are attributed in the place of integer inputs."""
    names = {tensor.name for tensor in chosen}
    return [
        f"input '{source}' holds integers; attributed is the float tensor they become, "
        f"'{tensor.name}'"
        for tensor, source in _converted(graph, upstream)
        if tensor.name in names
    ]


def _is_table(graph: Graph, tensor: Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(graph.shape(tensor) or ()) == 2


def ancestors(graph: Graph, output: Tensor) -> list[Node]:
    """The nodes that ``output`` depends on, sorted."""
    return graph.prune(graph.nodes, [output])


def _reaches(upstream: Sequence[Node], tensor: Tensor) -> bool:
    reached = flow(upstream, {tensor.name})
    last = upstream[-1].outputs if upstream else []
    return any(t.name in reached for t in last)


def float_tensor(graph: Graph, name: str, role: str, upstream: Sequence[Node] = ()) -> Tensor:
    tensor = graph.find(name)
    if tensor is None:
        known = [t for k, t in graph.tensors().items() if k in graph.own and is_float(t.dtype)]
        choices = [t.name for t in known if graph.value(t) is None]
        raise OptionError(
            f"the model has no tensor '{name}' to use as {role}: {suggest(name, choices)}"
        )
    if not is_float(tensor.dtype):
        kind = "of unknown type" if tensor.dtype is None else str(np.dtype(tensor.dtype))
        advice = ""
        if role == "input":
            become = [t.name for t, source in _converted(graph, upstream) if source == name]
            what = "the float tensor it becomes" if become else "the output of its embedding"
            become = become or [t.name for t in embeddings(graph, upstream)]
            names = " or ".join(f"'{t}'" for t in become[:3])
            advice = f"; attribute {what} instead" + (f": {names}" if names else "")
        raise OptionError(f"tensor '{name}' is {kind}, not float: no attribution{advice}")
    if role == "input" and graph.value(tensor) is not None:
        raise OptionError(f"tensor '{name}' is a constant of the model, not a value it computes")
    return tensor


def _check_reach(
    graph: Graph, tensor: Tensor, output: Tensor, upstream: Sequence[Node], differentiates: bool
) -> None:
    if tensor.name == output.name:
        raise OptionError(f"tensor '{tensor.name}' is the explained output itself")
    carried = flow(upstream, {tensor.name})
    if output.name in carried:
        return
    changing, cut = {tensor.name}, []
    for node in upstream:
        if any(t.name in changing for t in graph.uses(node)):
            changing.update(t.name for t in node.outputs if t.name)
        reads = any(t.name in carried for t in graph.uses(node))
        if reads and any(t.name and t.name not in carried for t in node.outputs):
            cut.append(node)
    if output.name not in changing:
        raise CompileError(f"output '{output.name}' does not depend on '{tensor.name}'")
    if not differentiates:
        return
    where = ", ".join(f"{node.op} '{node.name or node.outputs[0].name}'" for node in cut[:5])
    raise CompileError(
        f"no derivative flows from output '{output.name}' to '{tensor.name}': every path is cut "
        f"by an operator without one ({where}{', …' if len(cut) > 5 else ''}); the method "
        "'occlusion' needs none"
    )


def _check_integers(graph: Graph, upstream: Sequence[Node], active: set[str]) -> None:
    reason = "attributed numbers reach it as quantized integers, and it has no rule for these"
    found = [offence(graph, node, reason) for node in leaks(graph, upstream, active)]
    if found:
        raise UnsupportedOpError(found, "Attribute a tensor behind these nodes (--input NAME).")
