"""RNN, GRU and LSTM, by their definition as a Scan over one cell.

The model's own fast operator computes the forward pass. It gives the hidden state of every step,
and from those everything inside the cells follows for all steps at once; only the cell state of an
LSTM needs a small Scan of its own. The Scan of the definition is never run: it tells the sweep
what to go back through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from onnx_attrib.ir import Shape, Tensor
from onnx_attrib.rules.base import Sharer, Site, Structured, Unsupported, Walker, add
from onnx_attrib.rules.control_flow import live, producer
from onnx_attrib.rules.scan import Carried, Stacked, Track, emit_scan

X, W, R, B, LENGTHS, H0, C0, PEEPHOLES = range(8)

Function = Callable[[Tensor], Tensor]


# -- activations -----------------------------------------------------------------------------------

# Operator (none: spelled out below), and the defaults of its parameters.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "softsign": ("Softsign", {}),
    "softplus": ("Softplus", {}),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.01}),
    "thresholdedrelu": ("ThresholdedRelu", {"alpha": 1.0}),
    "elu": ("Elu", {"alpha": 1.0}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
    "affine": ("", {"alpha": 1.0, "beta": 0.0}),
    "scaledtanh": ("", {"alpha": 1.0, "beta": 1.0}),
}


def activations(s: Site, count: int, defaults: Sequence[str]) -> list[Function]:
    """The activation functions, direction by direction.

    ``activation_alpha`` and ``activation_beta`` are used up in order by those that take them.
    """
    given = s.attr("activations")
    names = [n.decode() if isinstance(n, bytes) else n for n in given or ()]
    names = (names or list(defaults) * count)[: len(defaults) * count]
    lists = {key: iter(s.attr(f"activation_{key}") or ()) for key in ("alpha", "beta")}
    result: list[Function] = []
    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise Unsupported(f"unknown activation '{name}'")
        _, needed = _ACTIVATIONS[name.lower()]
        settings = {key: float(next(lists[key], value)) for key, value in needed.items()}
        result.append(partial(_activate, s, name.lower(), settings))
    return result


def _activate(s: Site, name: str, settings: Mapping[str, float], z: Tensor) -> Tensor:
    if name == "affine":
        return s.op.Add(s.op.Mul(z, settings["alpha"]), settings["beta"])
    if name == "scaledtanh":
        return s.op.Mul(s.op.Tanh(s.op.Mul(z, settings["beta"])), settings["alpha"])
    emit: Callable[..., Tensor] = getattr(s.op, _ACTIVATIONS[name][0])
    return emit(z, **settings)


# -- cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent node at one point.

    ``inputs`` [T, N, gates · H]: what the inputs add to the gates. ``recurrent`` [H, gates · H],
    ``bias`` [gates · H], ``apart`` (the recurrence's own, where it stays apart) and ``peepholes``
    [3 · H]. ``states`` [N, H]: the initial ones. ``valid`` [T, N, 1]: which steps belong to a
    sequence.
    """

    backward: bool
    functions: Sequence[Function]
    inputs: Tensor
    recurrent: Tensor
    bias: Tensor | None
    apart: Tensor | None
    peepholes: Tensor | None
    states: Sequence[Tensor]
    valid: Tensor | None


Cell = Callable[[Site, Direction, Tensor, Sequence[Tensor]], list[Tensor]]
"""``cell(site, direction, inputs, states)``: the states after a step; the first is the output."""


def clipped(s: Site, z: Tensor) -> Tensor:
    """The input of an activation within ±``clip``."""
    bound = s.attr("clip")
    if not bound:
        return z
    limit = np.array(bound, s.graph.dtype(z))
    result: Tensor = s.op.Clip(z, -limit, limit)
    return result


def gates_sum(s: Site, inputs: Tensor, held: Tensor, bias: Tensor | None) -> Tensor:
    """What goes into the gates: one sum, however the model may have spelled it in other files."""
    terms = [inputs, held, *([] if bias is None else [bias])]
    result: Tensor = s.op.Sum(*terms)
    return result


def split(s: Site, tensor: Tensor, parts: int) -> list[Tensor]:
    """Equal parts along the last axis."""
    if parts == 1:
        return [tensor]
    return list(s.op.Split(tensor, axis=-1, num_outputs=parts, outputs=parts))


def rnn_cell(s: Site, d: Direction, inputs: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """h' = f(inputs + h · R)."""
    (f,), (h,) = d.functions, states
    return [f(clipped(s, gates_sum(s, inputs, s.op.MatMul(h, d.recurrent), d.bias)))]


def gru_cell(s: Site, d: Direction, inputs: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """h' = (1 − z) · n + z · h, with the gates z and r, and n from r · h or from r · (h · R)."""
    op, (f, g), (h,) = s.op, d.functions, states
    size = hidden_size(s)
    gates_in, new_in = op.Split(inputs, [2 * size, size], axis=-1, outputs=2)
    to_gates, to_new = op.Split(d.recurrent, [2 * size, size], axis=-1, outputs=2)
    gate_bias, new_bias = (None, None)
    if d.bias is not None:
        gate_bias, new_bias = op.Split(d.bias, [2 * size, size], axis=0, outputs=2)
    gates = clipped(s, gates_sum(s, gates_in, op.MatMul(h, to_gates), gate_bias))
    z, r = (f(gate) for gate in split(s, gates, 2))
    if s.attr("linear_before_reset"):
        held = op.MatMul(h, to_new)
        new = op.Mul(r, held if d.apart is None else op.Add(held, d.apart))
    else:
        new = op.MatMul(op.Mul(r, h), to_new)
    n = g(clipped(s, gates_sum(s, new_in, new, new_bias)))
    return [op.Add(op.Mul(op.Sub(1.0, z), n), op.Mul(z, h))]


def lstm_cell(s: Site, d: Direction, inputs: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """c' = f · c + i · g and h' = o · tanh(c'), with the gates i, o and f and the candidate g."""
    op, (f, g, h), (hidden, cell) = s.op, d.functions, states
    gates = split(s, gates_sum(s, inputs, op.MatMul(hidden, d.recurrent), d.bias), 4)
    look = [None] * 3 if d.peepholes is None else split(s, d.peepholes, 3)

    def gate(z: Tensor, peephole: Tensor | None, seen: Tensor) -> Tensor:
        peeked = z if peephole is None else op.Add(z, op.Mul(peephole, seen))
        return f(clipped(s, peeked))

    into = gate(gates[0], look[0], cell)
    keep = op.Sub(1.0, into) if s.attr("input_forget") else gate(gates[2], look[2], cell)
    after = op.Add(op.Mul(keep, cell), op.Mul(into, g(clipped(s, gates[3]))))
    out = gate(gates[1], look[1], after)
    return [op.Mul(out, h(after)), after]


@dataclass(frozen=True)
class Kind:
    """What distinguishes the three operators."""

    cell: Cell
    gates: int
    functions: tuple[str, ...]


KINDS = {
    "RNN": Kind(rnn_cell, 1, ("Tanh",)),
    "GRU": Kind(gru_cell, 3, ("Sigmoid", "Tanh")),
    "LSTM": Kind(lstm_cell, 4, ("Sigmoid", "Tanh", "Tanh")),
}


# -- what the operands say -------------------------------------------------------------------------


def hidden_size(s: Site) -> int:
    """H."""
    shape = s.shape(s.x(R))
    size = s.attr("hidden_size") or (shape[2] if shape is not None else None)
    if not isinstance(size, int):
        raise Unsupported("the hidden size is unknown")
    return size


def directions(s: Site) -> list[Direction]:
    """Both directions, or the one there is, with what the inputs add to all their gates."""
    which = s.attr("direction")
    which = which.decode() if isinstance(which, bytes) else which
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[which]
    kind, count = KINDS[s.node.op], len(backward)
    functions = activations(s, count, kind.functions)
    x = steps_first(s, s.x(X))
    valid = _valid(s, x)
    operands = [_operand(s, i, count) for i in (W, R, B, H0, C0, PEEPHOLES)]
    result = []
    for k in range(count):
        w, r, b, h0, c0, p = (parts[k] for parts in operands)
        assert w is not None
        assert r is not None
        inputs = s.op.MatMul(x, s.op.Transpose(w, perm=[1, 0]))
        if valid is not None:
            # Padding may hold anything, NaN too.
            inputs = s.op.Where(valid, inputs, 0.0)
        states = [_zeros(s, x) if t is None else t for t in (h0, c0)]
        result.append(
            Direction(
                backward[k],
                functions[k * len(kind.functions) : (k + 1) * len(kind.functions)],
                inputs,
                s.op.Transpose(r, perm=[1, 0]),
                *_biases(s, kind, b),
                p,
                states[: 2 if s.node.op == "LSTM" else 1],
                valid,
            )
        )
    return result


def steps_first(s: Site, tensor: Tensor) -> Tensor:
    """A sequence [T, N, …] from the node's layout, which may be [N, T, …]."""
    if not s.attr("layout"):
        return tensor
    rank = s.rank(tensor)
    order = [1, 0, 2] if rank == 3 else [1, 2, 0, 3]
    result: Tensor = s.op.Transpose(tensor, perm=order)
    return result


def states_first(s: Site, tensor: Tensor) -> Tensor:
    """Initial or final states [directions, N, H] from the node's layout, or the other way round."""
    if not s.attr("layout"):
        return tensor
    result: Tensor = s.op.Transpose(tensor, perm=[1, 0, 2])
    return result


def by_direction(s: Site, tensor: Tensor, count: int, axis: int = 0) -> list[Tensor]:
    """``tensor`` for each direction, without the axis of directions."""
    parts = [tensor]
    if count > 1:
        parts = list(s.op.Split(tensor, axis=axis, num_outputs=count, outputs=count))
    return [s.op.Squeeze(part, [axis]) for part in parts]


def _operand(s: Site, i: int, count: int) -> Sequence[Tensor | None]:
    """Input ``i`` for each direction."""
    tensor = s.optional(i)
    if tensor is None:
        return [None] * count
    return by_direction(s, states_first(s, tensor) if i in (H0, C0) else tensor, count)


def _biases(s: Site, kind: Kind, both: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What of the biases is added to all, and what only to the recurrence's part."""
    if both is None:
        return None, None
    op, size = s.op, hidden_size(s)
    if s.node.op == "GRU" and s.attr("linear_before_reset"):
        parts = op.Split(both, [3 * size, 2 * size, size], axis=0, outputs=3)
        early = op.Pad(parts[1], [0, size])
        return op.Add(parts[0], early), parts[2]
    return op.Add(*op.Split(both, axis=0, num_outputs=2, outputs=2)), None


def _valid(s: Site, x: Tensor) -> Tensor | None:
    """[T, N, 1]: whether a step is within its sequence."""
    lengths = s.optional(LENGTHS)
    if lengths is None:
        return None
    op = s.op
    lengths = op.Cast(lengths, to=np.dtype(np.int64))
    steps = op.Range(np.int64(0), op.Squeeze(op.Shape(x, end=1), [0]), np.int64(1))
    result: Tensor = op.Less(op.Reshape(steps, [-1, 1, 1]), op.Unsqueeze(lengths, [0, 2]))
    return result


def _zeros(s: Site, x: Tensor) -> Tensor:
    """An initial state [N, H] that was left out."""
    op, shape, size = s.op, s.shape(x), hidden_size(s)
    batch = shape[1] if shape is not None else None
    if isinstance(batch, int) and batch > 1:
        return s.graph.constant(np.zeros((batch, size), s.graph.dtype(x)))
    zeros = op.ConstantOfShape(
        op.Concat(op.Shape(x, start=1, end=2), [size], axis=0),
        value=np.zeros(1, s.graph.dtype(x)),
    )
    zeros.shape = [batch, size]
    return zeros


# -- the definition, and what the fast operator knows of it ----------------------------------------


def steps(walker: Sharer, s: Site, d: Direction) -> list[Tensor]:
    """The Scan: the final states, their values [T, N, H] before every step, then those after."""
    graph, cell = s.graph, KINDS[s.node.op].cell
    formals = [_formal(s, "state", state) for state in d.states]
    given = _formal(s, "inputs", d.inputs, scanned=True)
    tracks = [Track(given, d.inputs, 0, d.backward)]
    with graph.collect() as nodes:
        after = cell(s, d, given, formals)
        if d.valid is not None:
            counts = _formal(s, "valid", d.valid, scanned=True)
            tracks.append(Track(counts, d.valid, 0, d.backward))
            after = [s.op.Where(counts, *pair) for pair in zip(after, formals, strict=True)]
    nodes = live(walker, graph, nodes, after)
    carried = [Carried(*triple) for triple in zip(formals, after, d.states, strict=True)]
    stacked = [Stacked(t, 0, d.backward) for t in (*formals, *after)]
    return emit_scan(graph, nodes, tracks, carried, stacked)


def definition(walker: Sharer, s: Site) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Y, Y_h and Y_c, and by direction what :func:`steps` returns."""
    op, traces = s.op, list[list[Tensor]]()
    wholes, ends = list[Tensor](), list[list[Tensor]]()
    for d in directions(s):
        trace = steps(walker, s, d)
        count = len(d.states)
        y = trace[2 * count]
        wholes.append(op.Unsqueeze(y if d.valid is None else op.Where(d.valid, y, 0.0), [1]))
        ends.append([op.Unsqueeze(state, [0]) for state in trace[:count]])
        traces.append(trace)
    whole = _joined(s, wholes, axis=1)
    if s.attr("layout"):
        whole = op.Transpose(whole, perm=[2, 0, 1, 3])
    finals = [states_first(s, _joined(s, parts, axis=0)) for parts in zip(*ends, strict=True)]
    return [whole, *finals], traces


def _joined(s: Site, parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else s.op.Concat(*parts, axis=axis)


def known(walker: Walker, s: Site) -> list[list[Tensor]]:
    """The values of what :func:`steps` returns, from the outputs of the model's own operator.

    The states of padded steps are not: nothing that depends on them counts.
    """
    found = directions(s)
    count = len(found)
    hidden = by_direction(s, steps_first(s, own_output(s, 0)), count, axis=1)
    finals = [
        by_direction(s, states_first(s, own_output(s, 1 + k)), count)
        for k in range(len(found[0].states))
    ]
    result = []
    for d, y, ends in zip(found, hidden, zip(*finals, strict=True), strict=True):
        after = [y]
        if d.valid is not None and d.backward:
            # Where going back has not reached the sequence yet, the state is the initial one.
            after = [s.op.Where(d.valid, y, d.states[0])]
        before = [_delayed(s, d, after[0], d.states[0])]
        if s.node.op == "LSTM":
            after.append(_cell_states(walker, s, d, before[0]))
            before.append(_delayed(s, d, after[1], d.states[1]))
        result.append([*ends, *before, *after])
    return result


def own_output(s: Site, k: int) -> Tensor:
    """Y, Y_h or Y_c of the model's own operator, which is made to give it if it does not."""
    node = producer(s)
    if k < len(node.outputs) and node.outputs[k].name:
        return node.outputs[k]
    like = next(t for t in s.outputs if t.name)
    added = s.graph.variable(s.graph.fresh("attrib/output"), like.dtype, _output_shape(s, k))
    s.graph.give_output(node, k, added)
    return added


def _output_shape(s: Site, k: int) -> Shape:
    shape, count = s.shape(s.x(X)), 2 if "bi" in str(s.attr("direction")) else 1
    first, second = (None, None) if shape is None else shape[:2]
    size = hidden_size(s)
    if s.attr("layout"):
        return (first, second, count, size) if k == 0 else (first, count, size)
    return (first, count, second, size) if k == 0 else (count, second, size)


def _delayed(s: Site, d: Direction, after: Tensor, start: Tensor) -> Tensor:
    """The states before every step, from those after it."""
    op = s.op
    first = op.Unsqueeze(start, [0])
    if d.backward:
        late = op.Slice(after, [1], [np.iinfo(np.int64).max], [0])
        return s.shaped(op.Concat(late, first, axis=0), after)
    return s.shaped(op.Concat(first, op.Slice(after, [0], [-1], [0]), axis=0), after)


def _cell_states(walker: Walker, s: Site, d: Direction, hidden: Tensor) -> Tensor:
    """The cell states of an LSTM after every step, given the hidden states before it."""
    graph = s.graph
    state = _formal(s, "state", d.states[1])
    sequences = [d.inputs, hidden, *([] if d.valid is None else [d.valid])]
    formals = [_formal(s, "step", t, scanned=True) for t in sequences]
    with graph.collect() as nodes:
        _, after = lstm_cell(s, d, formals[0], [formals[1], state])
        if d.valid is not None:
            after = s.op.Where(formals[2], after, state)
    nodes = live(walker, graph, nodes, [after])
    tracks = [Track(f, t, 0, d.backward) for f, t in zip(formals, sequences, strict=True)]
    carried = [Carried(state, after, d.states[1])]
    return emit_scan(graph, nodes, tracks, carried, [Stacked(after, 0, d.backward)])[1]


def _formal(s: Site, name: str, like: Tensor, scanned: bool = False) -> Tensor:
    """A variable for a state, or for one step of a sequence."""
    shape = s.shape(like)
    if scanned and shape is not None:
        shape = shape[1:]
    return s.graph.variable(s.graph.fresh(f"attrib/{name}"), like.dtype, shape)


def _state_ranks(s: Site) -> None:
    """Sequences, states and weights have the ranks that the operator asks for.

    Inference cannot tell behind a branch that restores a squeezed axis.
    """
    for tensor in (s.x(X), *(s.optional(i) for i in (H0, C0)), *s.outputs[1:]):
        if tensor is not None and tensor.name and s.shape(tensor) is None:
            tensor.shape = [None, None, None]
    if s.y.name and s.shape(s.y) is None:
        s.y.shape = [None, None, None, None]


def recurrent_pull(walker: Walker, site: Site) -> dict[int, Tensor]:
    """Forward form Y [T, directions, N, H], Y_h and Y_c [directions, N, H] from X [T, N, I].

    Backward returns the cotangents of X, the initial states and, where they are attributed, the
    weights, through the cells from the last step to the first.
    """
    for one in (site, *([site.reference] if site.reference is not None else [])):
        _state_ranks(one)
    with site.graph.record() as nodes:
        outputs, traces = definition(walker, site)
    here = _values(traces, known(walker, site))
    there = None
    if site.reference is not None:
        there = _values(traces, known(walker, site.reference))
    return walker.through(site, nodes, outputs, here, there)


def _values(traces: list[list[Tensor]], values: list[list[Tensor]]) -> dict[str, Tensor]:
    pairs = zip(chain(*traces), chain(*values), strict=True)
    return {trace.name: value for trace, value in pairs}


for name in KINDS:
    add(
        Structured(
            op=name,
            pull=recurrent_pull,
            blocked=frozenset({LENGTHS}),
            transparent=False,
            batch_axis=lambda graph, node: 0 if graph.attr(node, "layout") else 1,
        )
    )
