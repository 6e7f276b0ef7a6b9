"""Say where a method that compares two inputs cannot conserve exactly on this model.

Operators that are led by a condition or by indices conserve differences where these are the same at
x and x̄ (``Rule.caveat``). And a number that depends on what is attributed only by steps (a vote
counted by comparisons, a rounded value) takes part in the output, but in no attribution.
Precondition: scope and clusters; a cluster conserves as a whole,
whatever it is made of. Postcondition: ``job.notes`` names the nodes, those in subgraphs too, of
which the condition or the indices depend on what is attributed. If and Loop say it themselves, when
the sweep comes to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnx import GraphProto, NodeProto

from onnx_attrib import rules
from onnx_attrib.ir import Node, bodies, captured_names, operands, subgraphs
from onnx_attrib.job import Job
from onnx_attrib.passes.differentiate import active_inputs, flow
from onnx_attrib.rules import Rule, Structured

_SHOWN = 5
# Operators that read no values, only shapes (and dtypes).
_VALUELESS = frozenset("Shape Size EyeLike RandomNormalLike RandomUniformLike".split())

Found = dict[tuple[str, str], list[str]]
"""Names of nodes, by operator and caveat."""


def report(job: Job) -> None:
    """Note the nodes on the way whose caveat applies."""
    if not job.method.compares:
        return
    inside = {id(node) for cluster in job.clusters.values() for node in cluster.nodes}
    changing = _changing(job)
    carried = flow(job.scope.dependent, set(job.scope.names))
    found: Found = {}
    steps: list[str] = []
    for node in job.scope.nodes:
        if id(node) in inside:
            continue
        read = [tensor.name for tensor in operands(node)]
        rule = rules.lookup(node.op, node.domain, active_inputs(node, job.scope.active))
        name = node.name or node.outputs[0].name
        if rule is not None and _applies(rule, read, changing):
            _enter(found, rule, name)
        held = rules.blocked(node.op, node.domain)
        steps += [
            f"'{tensor.name}' into {node.op} '{name}'"
            for i, tensor in enumerate(node.inputs)
            if i not in held and tensor.name in changing and tensor.name not in carried
        ]
        for body in bodies(node):
            formals = _formals(node.op, body, read, changing, _scanned(node))
            _inside(body, changing | formals, found)
    job.notes += [_text(op, caveat, names) for (op, caveat), names in found.items()]
    if steps:
        job.notes.append(
            f"{_some(steps)}: depends on what is attributed by steps only, which have no "
            "derivative; where it differs between x and x̄, attributions need not sum to the "
            "difference of the output"
        )


def _changing(job: Job) -> set[str]:
    """Names of tensors whose values, not only whose shapes, depend on what is attributed."""
    names = set(job.scope.names)
    for node in job.scope.dependent:
        if node.op not in _VALUELESS and any(t.name in names for t in job.graph.uses(node)):
            names.update(t.name for t in node.outputs if t.name)
    return names


def _applies(rule: Rule, read: Sequence[str], changing: set[str]) -> bool:
    if not rule.caveat or (isinstance(rule, Structured) and rule.transparent):
        return False
    # A caveat of a row without blocked inputs is about the values themselves.
    return not rule.blocked or any(
        name in changing for i, name in enumerate(read) if i in rule.blocked
    )


def _enter(found: Found, rule: Rule, name: str) -> None:
    found.setdefault((rule.op, rule.caveat), []).append(name)


def _text(op: str, caveat: str, names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return (
        f"{op} {_some(quoted)}: {caveat}, which depends on what is attributed; elsewhere "
        "attributions need not sum to the difference of the output"
    )


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


# -- subgraphs -------------------------------------------------------------------------------------


def _scanned(node: Node) -> int:
    return int(node.attrs.get("num_scan_inputs", 0))


def _formals(
    op: str, body: GraphProto, read: Sequence[str], changing: set[str], scanned: int
) -> set[str]:
    """A body's inputs whose values depend on what is attributed, in any of its steps.

    A Loop's body takes the number of the step and a condition before the states, and a Scan's the
    entries of ``scanned`` sequences behind them; the next states are its first outputs.
    """
    given = [info.name for info in body.input]
    result = {name for name, outer in zip(given, read, strict=False) if outer in changing}
    first = 2 if op == "Loop" else 0
    if op == "Loop":
        result -= set(given[:first])
    states = given[first : len(given) - scanned]
    after = [info.name for info in body.output][1 if op == "Loop" else 0 :]
    while True:
        reached = _inside(body, changing | result, None)
        arrived = {
            before for before, name in zip(states, after, strict=False) if name in reached
        } - result
        if not arrived:
            return result
        result |= arrived


def _inside(body: GraphProto, changing: Iterable[str], found: Found | None) -> set[str]:
    """Names that ``changing`` reach in a body; enters its nodes whose caveat applies."""
    names = set(changing)
    for node in body.node:
        read = [*node.input, *(n for inner in subgraphs(node) for n in captured_names(inner))]
        if found is not None:
            _enter_inner(node, read, names, found)
        if node.op_type not in _VALUELESS and any(name in names for name in read):
            names.update(name for name in node.output if name)
    return names


def _enter_inner(node: NodeProto, read: Sequence[str], names: set[str], found: Found) -> None:
    held = rules.blocked(node.op_type, node.domain)
    active = tuple(i for i, name in enumerate(read) if name in names and i not in held)
    if active:
        rule = rules.lookup(node.op_type, node.domain, active)
        if rule is not None and _applies(rule, read, names):
            _enter(found, rule, node.name or node.output[0])
    for inner in subgraphs(node):
        scanned = sum(a.i for a in node.attribute if a.name == "num_scan_inputs")
        formals = _formals(node.op_type, inner, node.input, names, scanned)
        _inside(inner, names | formals, found)


__all__ = ["report"]
