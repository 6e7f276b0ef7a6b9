"""If, Scan and Loop: the same method inside, backwards.

A branch is recomputed and swept in a branch of the same choice. Steps are undone from the last to
the first by a Scan over the states that each step began with, which the forward node is made to
emit. Captured outer tensors are inputs like the others: their cotangents add up over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, NodeProto, helper

from onnx_attrib.ir import Graph, Node, Shape, Tensor, bodies, is_float, operands, subgraphs
from onnx_attrib.rules.base import (
    Sharer,
    Site,
    Structured,
    Unsupported,
    Walker,
    add,
    blocked,
    is_barrier,
)
from onnx_attrib.rules.broadcast import expand
from onnx_attrib.rules.scan import Carried, Stacked, Track, emit_scan

BRANCH_DIFFERS = (
    "the condition of If '{}' depends on what is attributed: where it differs between input and "
    "reference, attributions need not sum to the difference of the output"
)
STEPS_DIFFER = (
    "the number of steps of Loop '{}' depends on what is attributed: where it differs between "
    "input and reference, attributions need not sum to the difference of the output"
)


def captures(site: Site) -> dict[str, int]:
    """The input index of each outer tensor that the node's subgraphs read, by name."""
    first = len(site.node.inputs)
    return {t.name: i for i, t in enumerate(operands(site.node)) if i >= first}


def label(site: Site) -> str:
    """The node's name, or its first output's."""
    return str(site.node.name or next(t.name for t in site.node.outputs if t.name))


def check_types(body: GraphProto) -> None:
    """Raise Unsupported for subgraphs that take or give anything but tensors."""
    for info in (*body.input, *body.output):
        if info.type.WhichOneof("value") not in (None, "tensor_type"):
            raise Unsupported(f"'{info.name}' in its subgraph is not a tensor")


# -- If --------------------------------------------------------------------------------------------


def if_pull(walker: Walker, site: Site) -> dict[int, Tensor]:
    """Forward form Y = then(…) if condition else else(…), of captured tensors.

    Backward returns, from an If on the same condition, the cotangents of the captured tensors
    through the branch taken; zeros for those that it does not use.
    """
    if site.reference is not None and _differ(site.x(0), site.reference.x(0), by_value=True):
        walker.note(BRANCH_DIFFERS.format(label(site)))
    branches = {key: _branch(walker, site, key) for key in ("then_branch", "else_branch")}
    emitted = site.op.If(site.x(0), outputs=len(site.active), **branches)
    results = emitted if isinstance(emitted, tuple) else (emitted,)
    for i, result in zip(site.active, results, strict=True):
        result.dtype, result.shape = site.x(i).dtype, site.x(i).shape
    return dict(zip(site.active, results, strict=True))


def _branch(walker: Walker, site: Site, key: str) -> GraphProto:
    graph, body = site.graph, site.attr(key)
    check_types(body)
    with graph.collect() as nodes:
        with graph.record() as forward:
            outputs = graph.open(body, [], {name: site.x(i) for name, i in captures(site).items()})
        shares = walker.through(site, forward, outputs)
        results = [
            expand(site, shares[i], site.x(i)) if i in shares else site.zeros_like(site.x(i))
            for i in site.active
        ]
    return graph.subgraph(key, live(walker, graph, nodes, results), [], results, hoist=False)


# -- steps: Scan and Loop --------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """How a body's inputs and outputs relate to those of its node.

    Body input k is input k of the node. Body output o is its output o − ``lead``. ``states``:
    the body inputs that are states; ``scanned``: axis and whether it is read backward, for those
    that are sequences. ``stacked``: the same for the body outputs that become sequences.
    """

    body: GraphProto
    states: range
    lead: int
    scanned: dict[int, tuple[int, bool]]
    stacked: dict[int, tuple[int, bool]]

    @property
    def is_loop(self) -> bool:
        """Whether the body also takes the step's number and a condition, and gives the next."""
        return self.lead > 0

    def after(self, state: int) -> int:
        """The body output that is the state after the step."""
        return state - self.states.start + self.lead


def scan_steps(site: Site) -> Steps:
    """Of a Scan: states first, then the sequences."""
    body, sequences = site.attr("body"), site.attr("num_scan_inputs")
    states = len(body.input) - sequences
    outputs = range(states, len(body.output))
    axes = site.attr("scan_input_axes") or [0] * sequences
    directions = site.attr("scan_input_directions") or [0] * sequences
    scanned = {
        states + i: (axis % site.rank(site.x(states + i)), bool(direction))
        for i, (axis, direction) in enumerate(zip(axes, directions, strict=True))
    }
    axes = site.attr("scan_output_axes") or [0] * len(outputs)
    directions = site.attr("scan_output_directions") or [0] * len(outputs)
    stacked = {
        o: (axis if axis >= 0 else axis + site.rank(site.outputs[o]), bool(direction))
        for o, axis, direction in zip(outputs, axes, directions, strict=False)
        if o < len(site.outputs)
    }
    return Steps(body, range(states), 0, scanned, stacked)


def loop_steps(site: Site) -> Steps:
    """Of a Loop: the number of the step, a condition, then states."""
    body = site.attr("body")
    states = range(2, len(body.input))
    stacked = dict.fromkeys(range(len(states) + 1, len(body.output)), (0, False))
    return Steps(body, states, 1, {}, stacked)


def scan_pull(walker: Walker, site: Site) -> dict[int, Tensor]:
    """Forward form (state, element, captured) → (state, element) step by step.

    Backward returns the carried cotangents of the initial states, those of each sequence put
    together in its order, and the sums of those of captured tensors.
    """
    return Reverse(walker, site, scan_steps(site)).shares()


def loop_pull(walker: Walker, site: Site) -> dict[int, Tensor]:
    """Forward form (number, condition, state, captured) → (condition, state, element).

    Backward returns what it does for a Scan, for as many steps as were taken at run time.
    """
    return Reverse(walker, site, loop_steps(site)).shares()


class Reverse:
    """The steps of one node, undone.

    ``formals`` stand for the body's inputs at one step; the body is opened on them once.
    """

    def __init__(self, walker: Walker, site: Site, steps: Steps) -> None:
        check_types(steps.body)
        self.walker, self.site, self.steps = walker, site, steps
        self.graph: Graph = site.graph
        self.first_capture = len(site.node.inputs)
        self.formals = [self._formal(site, k) for k in range(len(steps.body.input))]

    def shares(self) -> dict[int, Tensor]:
        """The cotangents of the node's active inputs."""
        graph, walker, active = self.graph, self.walker, self.site.active
        with graph.collect() as nodes:
            with graph.record() as forward:
                taken = {name: self.site.x(i) for name, i in captures(self.site).items()}
                outputs = graph.open(self.steps.body, self.formals, taken)
            moved = self._moved(forward, outputs)
            names = self._active(forward, outputs)
            inner = self._inner(outputs, names, moved)
            ahead = self._ahead(forward, outputs, names)
            found = walker.through(inner, forward, outputs, ahead=ahead)
            back = {**self._states_back(inner, found), **self._sums(inner, found)}
            stacked = {
                k: Stacked(self._full(inner, found, k), axis, not backward)
                for k, (axis, backward) in self.steps.scanned.items()
                if k in active
            }
        carried = [Carried(m, after, self._start(i)) for i, (m, after) in back.items()]
        results = [*(c.result for c in carried), *(s.value for s in stacked.values())]
        nodes = live(walker, graph, nodes, results)
        # Only now is it known which values the way back needs.
        used = {t.name for node in nodes for t in graph.uses(node)} | {t.name for t in results}
        limit = self._limit(forward, outputs, moved)
        tracks = self._tracks(inner, used) or [self._any_track(inner)]
        tracks = [_first(graph, track, limit) for track in tracks]
        with graph.collect() as scan:
            emitted = emit_scan(graph, nodes, tracks, carried, list(stacked.values()))
        if self._takes_steps(limit):
            for node in scan:
                graph.place(node)
        else:
            emitted = _if_any(graph, tracks[0].source, scan, emitted, carried)
        shares = dict(zip([*back, *stacked], emitted, strict=True))
        return {i: shares[i] for i in active}

    # -- one step ----------------------------------------------------------------------------

    def _formal(self, side: Site, k: int) -> Tensor:
        """A variable for body input ``k``; a condition that a step was taken on is true."""
        info = self.steps.body.input[k]
        name = self.graph.fresh(info.name)
        if self.steps.is_loop and k == 1:
            return self.graph.constant(True, np.bool_)
        if self.steps.is_loop and k == 0:
            return self.graph.variable(name, np.int64, (1,) * len(info.type.tensor_type.shape.dim))
        shape = self.graph.shape(side.x(k))
        if k in self.steps.scanned and shape is not None:
            axis, _ = self.steps.scanned[k]
            shape = (*shape[:axis], *shape[axis + 1 :])
        return self.graph.variable(name, side.x(k).dtype, shape)

    def _inside(self, i: int) -> int:
        """The place among the step's inputs of the node's input ``i``: captures come last."""
        return i if i < self.first_capture else i - self.first_capture + len(self.formals)

    def _values(self, side: Site, formals: Sequence[Tensor]) -> list[Tensor]:
        return [*formals, *(side.x(i) for i in captures(self.site).values())]

    def _inner(self, outputs: Sequence[Tensor], active: set[str], moved: set[str]) -> Site:
        """The site inside: one step, between its inputs and its outputs."""
        site, graph = self.site, self.graph
        values, reference = self._values(site, self.formals), None
        if site.reference is not None:
            formals = [
                self._formal(site.reference, k) if t.name in moved else t
                for k, t in enumerate(self.formals)
            ]
            there = self._values(site.reference, formals)
            reference = Site(graph, site.node, there, (), (), ())
        for k in self.steps.states:
            if self.formals[k].name in active:
                self._check_shape(k, outputs)
        cotangents = [self._cotangent(o, t, active) for o, t in enumerate(outputs)]
        indices = tuple(i for i, t in enumerate(values) if t.name in active)
        return Site(graph, site.node, values, tuple(outputs), cotangents, indices, reference)

    def _cotangent(self, o: int, output: Tensor, active: set[str]) -> Tensor | None:
        """A variable for the cotangent of body output ``o`` at a step, if it has one."""
        states, index = self.steps.states, o - self.steps.lead
        shape = self.graph.shape(output)
        if 0 <= index < len(states):
            formal = self.formals[states[index]]
            if formal.name not in active:
                return None
            shape = self.graph.shape(formal)
        elif _at(self.site.cotangents, index) is None:
            return None
        return self.graph.variable(self.graph.fresh("attrib/cotangent"), output.dtype, shape)

    def _check_shape(self, state: int, outputs: Sequence[Tensor]) -> None:
        before = self.graph.shape(self.formals[state])
        after = self.graph.shape(outputs[self.steps.after(state)])
        if not _compatible(before, after):
            name = self.steps.body.input[state].name
            raise Unsupported(f"its state '{name}' changes its shape from step to step")

    # -- what carries attribution, and what differs at the reference -------------------------

    def _active(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> set[str]:
        """Names of the step's inputs that carry attribution."""
        values = self._values(self.site, self.formals)
        roots = {values[self._inside(i)].name for i in self.site.active}
        return self._with_states(outputs, roots, lambda names: self.walker.flow(nodes, names))

    def _ahead(self, nodes: Sequence[Node], outputs: Sequence[Tensor], own: set[str]) -> set[str]:
        """Names of the step's inputs, ``own`` active, that no layer precedes in any step."""
        walker, values = self.walker, self._values(self.site, self.formals)
        names = {i: values[self._inside(i)].name for i in self.site.active}
        first, late = {names.pop(i) for i in walker.early(self.site)}, set(names.values())
        if first:
            first -= self._with_states(outputs, late, lambda t: walker.behind(nodes, t, own))
        return first

    def _moved(
        self, nodes: Sequence[Node], outputs: Sequence[Tensor], *, by_value: bool = False
    ) -> set[str]:
        """Names of the step's inputs whose values differ at the reference."""
        reference, values = self.site.reference, self._values(self.site, self.formals)
        if reference is None:
            return set()
        roots = {
            values[self._inside(i)].name
            for i, (x, r) in enumerate(zip(self.site.inputs, reference.inputs, strict=True))
            if i >= self.steps.states.start and _differ(x, r, by_value=by_value)
        }
        return self._with_states(outputs, roots, lambda names: depends(self.graph, nodes, names))

    def _with_states(
        self, outputs: Sequence[Tensor], roots: set[str], reach: Callable[[set[str]], set[str]]
    ) -> set[str]:
        """``roots`` and the states that they reach in any number of steps."""
        while True:
            reached = reach(roots)
            arrived = {
                self.formals[k].name
                for k in self.steps.states
                if outputs[self.steps.after(k)].name in reached
            }
            if arrived <= roots:
                return roots
            roots = roots | arrived

    # -- what goes back ----------------------------------------------------------------------

    def _full(self, inner: Site, found: dict[int, Tensor], k: int) -> Tensor:
        """The cotangent of the step's input ``k`` in its full shape."""
        x = inner.x(k)
        return expand(inner, found[k], x) if k in found else inner.zeros_like(x)

    def _states_back(
        self, inner: Site, found: dict[int, Tensor]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """For each active state: its cotangent after the step, and before it."""
        after = {k: inner.cotangents[self.steps.after(k)] for k in self.steps.states}
        return {k: (m, self._full(inner, found, k)) for k, m in after.items() if m is not None}

    def _sums(self, inner: Site, found: dict[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """For each active captured tensor: the sum of its cotangents before the step and after."""
        result, graph = {}, self.graph
        for i in self.site.active:
            if i >= self.first_capture:
                x, share = self.site.x(i), found.get(self._inside(i))
                name = graph.fresh("attrib/total")
                total = graph.variable(name, x.dtype, graph.shape(x))
                result[i] = (total, total if share is None else graph.op.Add(total, share))
        return result

    def _start(self, i: int) -> Tensor:
        """Of what is carried back for input ``i``, the value after the last step."""
        given = None
        if i < self.first_capture:
            given = _at(self.site.cotangents, i - self.steps.states.start)
        return self.site.zeros_like(self.site.x(i)) if given is None else given

    # -- sequences to go back along ----------------------------------------------------------

    def _tracks(self, inner: Site, used: set[str]) -> list[Track]:
        """The values that steps began with, here and at the reference, and the cotangents."""
        tracks: dict[str, Track] = {}
        sides = [(self.site, inner)]
        if self.site.reference is not None and inner.reference is not None:
            sides.append((self.site.reference, inner.reference))
        for side, step in sides:
            for k in range(len(self.formals)):
                formal = step.x(k)
                if formal.name in used and formal.name not in tracks and not self._fixed(k):
                    tracks[formal.name] = self._track(side, formal, k, inner.outputs)
        for o, (axis, backward) in self.steps.stacked.items():
            m, given = inner.cotangents[o], _at(self.site.cotangents, o - self.steps.lead)
            if m is not None and given is not None and m.name in used:
                tracks[m.name] = Track(m, given, axis, not backward)
        return list(tracks.values())

    def _fixed(self, k: int) -> bool:
        return self.graph.value(self.formals[k]) is not None

    def _any_track(self, inner: Site) -> Track:
        """Something to count the steps by."""
        k = 0 if self.steps.is_loop else self.steps.states.stop
        return self._track(self.site, self.formals[k], k, inner.outputs)

    def _track(self, side: Site, formal: Tensor, k: int, outputs: Sequence[Tensor]) -> Track:
        if k in self.steps.scanned:
            axis, backward = self.steps.scanned[k]
            return Track(formal, side.x(k), axis, not backward)
        if k in self.steps.states:
            self._check_shape(k, outputs)
        name = self.steps.body.input[k].name
        for o, (axis, backward) in self.steps.stacked.items():
            # The model may emit the very sequence.
            given = _at(side.outputs, o - self.steps.lead)
            copied = axis == 0 and self._origin(self.steps.body.output[o].name) == name
            if copied and given is not None and given.name and _belongs(given, side):
                return Track(formal, given, 0, not backward)
        return Track(formal, self.graph.emit_steps(producer(side), name, formal), 0, True)

    def _origin(self, name: str) -> str:
        """The tensor in the body that ``name`` is a copy of."""
        for node in reversed(self.steps.body.node):
            if node.op_type == "Identity" and node.output[0] == name:
                name = node.input[0]
        return name

    def _takes_steps(self, limit: Tensor | None) -> bool:
        """Whether there is a step at all, as far as is known; a Scan needs one."""
        if not self.steps.is_loop:
            return True
        count, goes = (_at(self.site.inputs, k) for k in (0, 1))
        known = [self.graph.value(t) for t in (count, goes) if t is not None]
        return limit is None and all(v is not None and v.reshape(-1)[0] > 0 for v in known)

    def _limit(
        self, nodes: Sequence[Node], outputs: Sequence[Tensor], moved: set[str]
    ) -> Tensor | None:
        """The number of steps taken both here and at the reference, where it may differ."""
        site, reference = self.site, self.site.reference
        if reference is None or not self.steps.is_loop:
            return None
        pairs = list(zip(site.inputs[:2], reference.inputs[:2], strict=True))
        goes_on = outputs[0].name in depends(self.graph, nodes, moved)
        if not goes_on and not any(_differ(x, r) for x, r in pairs):
            return None
        led = depends(self.graph, nodes, self._moved(nodes, outputs, by_value=True))
        if outputs[0].name in led or any(_differ(x, r, by_value=True) for x, r in pairs):
            self.walker.note(STEPS_DIFFER.format(label(site)))
        op = self.graph.op
        counts = [
            op.Size(self._track(side, self.formals[0], 0, outputs).source)
            for side in (site, reference)
        ]
        return op.Reshape(op.Min(*counts), [1])


def live(
    walker: Sharer, graph: Graph, nodes: Sequence[Node], results: Sequence[Tensor]
) -> list[Node]:
    """``nodes``, sorted, without what repeats and what no result needs."""
    return graph.prune(walker.share(nodes, results), results)


def depends(graph: Graph, nodes: Sequence[Node], roots: set[str]) -> set[str]:
    """``roots`` and the names of what is computed from them."""
    names = set(roots)
    for node in nodes:
        if any(t.name in names for t in graph.uses(node)):
            names.update(t.name for t in node.outputs)
    return names


def _first(graph: Graph, track: Track, limit: Tensor | None) -> Track:
    """The first ``limit`` steps of a Loop's sequence."""
    if limit is None:
        return track
    return replace(track, source=graph.op.Slice(track.source, [0], limit, [0]))


def _if_any(
    graph: Graph,
    sequence: Tensor,
    nodes: Sequence[Node],
    results: Sequence[Tensor],
    carried: Sequence[Carried],
) -> list[Tensor]:
    """The ``results`` of ``nodes``, or what is carried as it is if there is no step."""
    op, starts = graph.op, [state.start for state in carried]
    emitted = op.If(
        op.Greater(op.Shape(sequence, end=1), 0),
        then_branch=graph.subgraph("steps", nodes, [], results, hoist=False),
        else_branch=graph.subgraph("no_steps", [], [], starts, hoist=False),
        outputs=len(results),
    )
    tensors = list(emitted) if isinstance(emitted, tuple) else [emitted]
    for tensor, result in zip(tensors, results, strict=True):
        tensor.dtype, tensor.shape = result.dtype, result.shape
    return tensors


def producer(side: Site) -> Node:
    """The node that computed the site's outputs there."""
    return next(t for t in side.outputs if t.name).inputs[0]


def _belongs(given: Tensor, side: Site) -> bool:
    """Whether an output has its value from this side, not from the node as the model has it."""
    return not given.inputs or given.inputs[0] is not side.node or producer(side) is side.node


def _at(tensors: Sequence[Tensor | None], i: int) -> Tensor | None:
    return tensors[i] if 0 <= i < len(tensors) else None


def _differ(x: Tensor | None, r: Tensor | None, *, by_value: bool = False) -> bool:
    """Whether the two are computed apart; ``by_value``: and not from shapes alone."""
    apart = x is not None and r is not None and x.name != r.name
    return apart and not (by_value and _from_shapes(x))


def _from_shapes(tensor: Tensor | None) -> bool:
    """Whether only shapes and constants go into a tensor: the same at input and reference."""
    pending, seen = [tensor], set[str]()
    while pending:
        here = pending.pop()
        if here is None or here.name in seen or isinstance(here, gs.Constant):
            continue
        seen.add(here.name)
        if not here.inputs:
            return False
        if here.inputs[0].op not in ("Shape", "Size"):
            pending += [t for t in operands(here.inputs[0]) if t.name]
    return True


def _compatible(a: Shape | None, b: Shape | None) -> bool:
    if a is None or b is None:
        return True
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int)
    )


# -- what active tensors reach ---------------------------------------------------------------------


def reach(node: Node, active: set[str]) -> set[str]:
    """Names of the node's outputs that active tensors reach through differentiable operators."""
    inputs = [tensor.name for tensor in node.inputs]
    sequences = node.attrs.get("num_scan_inputs", 0)
    reached = _reached(node.op, bodies(node), inputs, active, sequences)
    return {t.name for t, there in zip(node.outputs, reached, strict=False) if there and t.name}


def _reached(
    op: str, graphs: Sequence[GraphProto], inputs: Sequence[str], active: set[str], sequences: int
) -> list[bool]:
    """For each output of a node with these subgraphs: whether active tensors reach it."""
    if op == "If":
        ends = [_ends(graph, active) for graph in graphs]
        return [any(pair) for pair in zip(*ends, strict=True)]
    (body,), lead = graphs, int(op == "Loop")
    formals = [info.name for info in body.input]
    states = formals[2 * lead : len(formals) - sequences]
    names = active | {formal for formal, x in zip(formals, inputs, strict=False) if x in active}
    while True:
        reached = _ends(body, names)[lead:]
        # States come first among the outputs, and go round to the inputs.
        arrived = {state for state, there in zip(states, reached, strict=False) if there}
        if arrived <= names:
            return reached
        names |= arrived


def _ends(body: GraphProto, active: set[str]) -> list[bool]:
    """For each output of a subgraph: whether active tensors, by name, reach it."""
    infos = (*body.value_info, *body.output)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    names = set(active)
    for node in body.node:
        inner = list(subgraphs(node))
        if inner:
            sequences = sum(a.i for a in node.attribute if a.name == "num_scan_inputs")
            reached = _reached(node.op_type, inner, node.input, names, sequences)
            found = [o for o, there in zip(node.output, reached, strict=False) if there]
        else:
            found = list(node.output) if _passes(node, names) else []
        names.update(name for name in found if name and _may_carry(types.get(name)))
    return [info.name in names for info in body.output]


def _passes(node: NodeProto, names: set[str]) -> bool:
    """Whether a derivative flows through an operator from one of ``names``."""
    if is_barrier(node.op_type, node.domain):
        return False
    held = blocked(node.op_type, node.domain)
    return any(name in names and i not in held for i, name in enumerate(node.input))


def _may_carry(element_type: int | None) -> bool:
    return not element_type or is_float(helper.tensor_dtype_to_np_dtype(element_type))


add(
    Structured(
        op="If",
        pull=if_pull,
        reach=reach,
        blocked=frozenset({0}),
        caveat="exact where the same branch is taken at x and x̄",
    )
)
add(Structured(op="Scan", pull=scan_pull, reach=reach))
add(
    Structured(
        op="Loop",
        pull=loop_pull,
        reach=reach,
        blocked=frozenset({0, 1}),
        caveat="exact where it takes as many steps at x as at x̄",
    )
)
