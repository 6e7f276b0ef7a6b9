"""The reverse sweep: from the seed back to the attributed tensors, one rule a node.

Precondition: the job has a scope, a seed and, if the method compares, values at the reference.
Postcondition: ``job.attributions`` has one entry more, the attributions for ``job.seed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, cast

import numpy as np
import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.errors import Offence, OptionError, UnsupportedOpError
from onnx_attrib.ir import Dim, Graph, Node, Shape, Tensor, Values, bodies, is_float, operands
from onnx_attrib.job import Cluster, Front, Job, Scope
from onnx_attrib.methods.base import GRADIENT, Shares, Table
from onnx_attrib.passes.cluster import Stretch, find
from onnx_attrib.passes.discarded import discarded, may_be_infinite
from onnx_attrib.passes.recognize import spelled
from onnx_attrib.passes.simplify import share
from onnx_attrib.passes.standardize import standardizations
from onnx_attrib.passes.sums import Path
from onnx_attrib.passes.sums import found as summed
from onnx_attrib.rules import (
    Composite,
    Elementwise,
    Rule,
    Site,
    Structured,
    Unsupported,
    active_inputs,
)
from onnx_attrib.rules.affine import has_layer
from onnx_attrib.rules.base import Cotangent, Pair, each, total
from onnx_attrib.rules.broadcast import expand, is_full, refine, same_shape, unbroadcast


def differentiate(job: Job) -> None:
    """Sweep once over the model's own values."""
    scope = job.scope
    found = multipliers(sweep_of(job), scope, starts(job))
    job.attribute({t.name: full(job.graph, found[t.name], t) for t in scope.inputs})


def sweep_of(
    job: Job,
    at: Values | None = None,
    reference: Values | None = None,
    dims: Mapping[str, Dim] | None = None,
) -> Sweep:
    """The method's sweep over the model's own values, or over those that ``at`` gives.

    ``reference``, ``dims``: the values at the baseline, if not the job's, and how symbolic
    dimensions are renamed there.
    """
    return Sweep(
        job.graph,
        job.table,
        Values() if at is None else at,
        (reference or job.reference) if job.method.compares else None,
        job.clusters,
        job.reference_dims if dims is None else dims,
        job.notes,
        job.method.clusters,
        job.met,
        sums=job.method.sums,
        front=job.front,
    )


def starts(job: Job, at: Values | None = None, seed: Tensor | None = None) -> dict[str, Tensor]:
    """What a sweep of the method starts from: the seed, or the seeded value of the output.

    ``at`` and ``seed``: the values that the sweep is over and the seed there, if not the model's.
    """
    output = job.scope.output
    start = job.seed if seed is None else seed
    if job.method.starts == "value":
        start = job.graph.op.Mul(start, output if at is None else at(output))
    return {output.name: start}


def multipliers(sweep: Sweep, scope: Scope, seeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the sweep finds for each attributed tensor; zeros, with a note, if nothing arrives."""
    found = sweep.run(scope.nodes, scope.active, seeds, scope.names)
    for tensor in scope.inputs:
        if tensor.name not in found:
            sweep.note(f"nothing flows back to '{tensor.name}': its attribution is zero everywhere")
            zero = np.zeros((), sweep.graph.dtype(tensor))
            found[tensor.name] = filled(sweep.graph, sweep.at(tensor), zero)
    return found


def filled(graph: Graph, like: Tensor, value: np.ndarray) -> Tensor:
    """``value``, broadcast to the shape of ``like`` and in its dtype."""
    shape = graph.shape(like)
    if shape is not None and not _fits(value.shape, shape):
        wanted = ", ".join("?" if d is None else str(d) for d in shape)
        raise OptionError(
            f"an array of shape {list(value.shape)} does not fit '{like.name}', [{wanted}]"
        )
    result = graph.op.Expand(np.asarray(value, graph.dtype(like)), graph.op.Shape(like))
    result.shape = like.shape
    return result


def _fits(given: tuple[int, ...], shape: Shape) -> bool:
    """Whether an array can be broadcast to a shape, as far as that is known."""
    pairs = zip(given[::-1], shape[::-1], strict=False)
    return len(given) <= len(shape) and all(n in (1, d) for n, d in pairs if isinstance(d, int))


def full(graph: Graph, m: Tensor, like: Tensor) -> Tensor:
    """A multiplier in the full shape of its tensor."""
    return m if is_full(graph, m, like) else graph.op.Expand(m, graph.op.Shape(like))


@dataclass
class Sweep:
    """One reverse sweep over a region of the graph.

    ``at`` gives the region's tensors at the point explained, ``reference`` at the baseline
    (``reference_dims``: how symbolic dimensions are renamed there). ``notes`` collects what the
    user should know about the result. ``clustering``: what counts as one nonlinearity in the
    definitions and bodies that the sweep goes through. ``met``: operators that it met, by kind.
    """

    graph: Graph
    table: Table
    at: Values = field(default_factory=Values)
    reference: Values | None = None
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    reference_dims: Mapping[str, Dim] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clustering: str = ""
    met: dict[str, dict[str, None]] = field(default_factory=dict)
    sums: bool = False
    """Whether a sum counts as one, in however many nodes it is spelled."""
    discarded: set[str] = field(default_factory=set)
    """Tensors of which a Where may discard entries."""
    front: Front | None = None
    """What no layer with weights precedes, for methods that look at weights."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What treatments found out about tensors and need again."""
    sources: dict[str, Node] = field(default_factory=dict)
    """The node that computes each tensor of the region swept."""
    active: set[str] = field(default_factory=set)
    """Tensors of the region that carry attribution."""

    def run(
        self,
        nodes: Sequence[Node],
        active: set[str],
        seeds: Mapping[str, Tensor],
        wanted: Iterable[str],
    ) -> dict[str, Tensor]:
        """Multipliers of the ``wanted`` tensors; one that nothing flows to is left out.

        ``nodes`` are sorted; ``active`` names the tensors that carry attribution; ``seeds`` are
        the cotangents to start from. Raises UnsupportedOpError with every node that no rule can
        handle.
        """
        pending: dict[str, list[Cotangent]] = {name: [seed] for name, seed in seeds.items()}
        self.sources, self.active = {t.name: n for n in nodes for t in n.outputs if t.name}, active
        self.discarded = discarded(nodes, self.discarded)
        wanted = set(wanted)
        result: dict[str, Tensor] = {}
        offences: list[Offence] = []
        for node in reversed(nodes):
            if not any(t.name in pending for t in node.outputs):
                continue
            cotangents = [self._total(pending.pop(t.name, [])) for t in node.outputs]
            for tensor, arrived in zip(node.outputs, cotangents, strict=True):
                if arrived is not None and tensor.name in wanted:
                    result[tensor.name] = self._joined(arrived)
            site, rule = self._site(node, cotangents, active)
            if not site.active:
                continue
            try:
                shares = self._apply(site, rule)
            except Unsupported as reason:
                offences.append(offence(self.graph, node, str(reason)))
                shares = _stand_ins(site)
            except UnsupportedOpError as inner:
                offences.extend(reversed(inner.offences))
                shares = _stand_ins(site)
            read = operands(site.node)
            for i, m in shares.items():
                pending.setdefault(read[i].name, []).append(m)
        if offences:
            raise UnsupportedOpError(offences[::-1])
        for name in wanted & pending.keys():
            arrived = self._total(pending[name])
            if arrived is not None:
                result[name] = self._joined(arrived)
        return result

    def made(self, tensor: Tensor) -> tuple[Site, Rule] | None:
        """The site that computes a tensor of the region from attributed ones, and its rule."""
        node = self.sources.get(tensor.name)
        if node is None:
            return None
        site, rule = self._site(node, [None] * len(node.outputs), self.active)
        return None if rule is None or not site.active else (site, rule)

    def again(self, site: Site, inputs: Mapping[int, Tensor]) -> Site:
        """The site at other values of some inputs, with what it computes from them."""
        cluster = self.clusters.get(site.node.outputs[0].name)
        given = tuple(inputs.get(i, x) for i, x in enumerate(site.inputs))
        if cluster is not None and cluster.stand_in is None:
            outputs = [self._inside(cluster, inputs[0])(cluster.output)]
        else:
            outputs = self.graph.repeat(site.node, given, site.outputs)
        return replace(site, inputs=given, outputs=outputs, reference=None)

    def using(self, table: Table) -> Sweep:
        """The sweep by another table."""
        return replace(self, table=table)

    def decompose(
        self, site: Site, rule: Composite, table: Table | None = None, keep: bool = False
    ) -> Shares:
        """Sweep through the operator's definition, emitted at both points."""
        with self.graph.record() as nodes:
            outputs = rule.decompose(site)
        known = {y.name: site.y for y in outputs[:1] if keep and y is not None}
        return self.through(site, nodes, outputs, known, table=table)

    def through(
        self,
        site: Site,
        nodes: Sequence[Node],
        outputs: Sequence[Tensor | None],
        known: Mapping[str, Tensor] | None = None,
        known_reference: Mapping[str, Tensor] | None = None,
        ahead: set[str] | None = None,
        table: Table | None = None,
    ) -> Shares:
        """Sweep through ``nodes``, which compute ``outputs`` from ``site.inputs``.

        What depends on a ``known`` value is computed from it, not from the node that gives it.
        ``ahead``: names among the inputs that no layer with weights precedes, if the site is not
        the node itself.
        """
        graph, reference = self.graph, None
        if site.reference is not None:
            pairs = zip(site.inputs, site.reference.inputs, strict=True)
            moved = {x.name: r for x, r in pairs if x is not None and r is not None}
            moved = {name: r for name, r in moved.items() if name != r.name}
            moved.update(known_reference or {})
            reference = graph.replicate(nodes, moved, self.reference_dims)
        at = graph.replicate(nodes, known) if known else Values()
        seeds: dict[str, Tensor] = {}
        for y, m in zip(outputs, site.cotangents, strict=False):
            if y is not None and m is not None:
                seeds[y.name] = graph.op.Add(seeds[y.name], m) if y.name in seeds else m
        wanted = {site.x(i).name: i for i in reversed(site.active)}
        active = flow(nodes, set(wanted))
        ends = [y for y in outputs if y is not None and y.name in seeds]
        check_rules(graph, [n for n in graph.prune(nodes, ends) if active_inputs(n, active)])
        inner = Sweep(
            graph, table or self.table, at, reference, {}, self.reference_dims, self.notes
        )
        inner.met, inner.sums = self.met, self.sums
        if self.front is not None:
            if ahead is None:
                ahead = {site.x(i).name for i in self.early(site)}
            late = self.behind(nodes, set(wanted) - ahead, active)
            inner.front = replace(self.front, names=self.front.names | (active - late))
        if site.discarded:
            inner.discarded = {y.name for y in outputs if y is not None}
        if self.clustering and table is None:
            inner.clustering = self.clustering
            inner.clusters = self._clusters(site, nodes, active, {y.name for y in ends})
        shares = inner.run(nodes, active, seeds, wanted)
        return {wanted[name]: m for name, m in shares.items()}

    def _clusters(
        self, site: Site, nodes: Sequence[Node], active: set[str], ends: set[str]
    ) -> dict[str, Cluster]:
        """Nonlinearities spelled out within a definition or a body."""
        graph = self.graph
        outside = {t.name for t in site.inputs if t is not None and graph.value(t) is None}
        changing, dependent = set(outside), []
        for node in nodes:
            if any(t.name in changing for t in graph.uses(node)):
                dependent.append(node)
                changing.update(t.name for t in node.outputs if t.name)
        on_path = [node for node in nodes if active_inputs(node, active)]
        found = find(Stretch(graph, on_path, dependent, active, outside), self.clustering)
        whole = spelled(graph, on_path, active)
        if self.clustering == "chains" and bodies(site.node):
            whole |= standardizations(graph, on_path, dependent, active)
        # The definition of a softmax is not to be followed through a softmax.
        own = [r.stand_in is not None and r.stand_in.op == site.node.op for r in whole.values()]
        clusters = found if any(own) else {**found, **whole}
        if self.sums:
            clusters.update(summed(Path(graph, on_path, active, ends | outside), clusters))
        return clusters

    def flow(self, nodes: Sequence[Node], roots: set[str]) -> set[str]:
        """Names of the tensors that ``roots`` reach through differentiable operators."""
        return flow(nodes, roots)

    def share(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> list[Node]:
        """``nodes``, sorted, without those that compute what an earlier one does."""
        return share(self.graph, self.graph.in_order(nodes), {t.name for t in outputs})

    def note(self, message: str) -> None:
        """Tell the user something about the result, once."""
        if message not in self.notes:
            self.notes.append(message)

    def first(self, site: Site) -> bool:
        """Whether no layer with weights precedes the site, for methods with ``merges``."""
        return self.front is not None and self.early(site) == set(site.active)

    def early(self, site: Site) -> set[int]:
        """The active inputs that no layer with weights precedes."""
        read, names = operands(site.node), set() if self.front is None else self.front.names
        return {i for i in site.active if read[i].name in names}

    def behind(self, nodes: Sequence[Node], names: set[str], active: set[str]) -> set[str]:
        """``names``, and those of what is computed from them or by layers with weights."""
        result, active = set(names), flow(nodes, active)
        for node in nodes:
            indices, read = active_inputs(node, active), operands(node)
            if any(read[i].name in result for i in indices) or (
                indices and has_layer(node, indices)
            ):
                result |= {t.name for t in node.outputs if t.name}
        return result

    def scaled(self, site: Site) -> bool:
        """Whether the site reads an input, at most moved, scaled or shifted."""
        read = operands(site.node)
        return self.front is not None and all(
            read[i].name in self.front.scaled for i in site.active
        )

    def bounds(self, site: Site, i: int, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        """Input ``i`` of a first site for attributed tensors at their lowest and highest value.

        What is computed on the way (a factor, a mean taken off) may turn the two around. Of any
        other site it is the input itself that has these values.
        """
        if self.front is None or not self.first(site):
            return filled(self.graph, site.x(i), low), filled(self.graph, site.x(i), high)
        tensor, op = operands(site.node)[i], self.graph.op
        nodes = self.graph.prune(self.front.nodes, [tensor])
        read = {t.name for node in nodes for t in self.graph.uses(node)} | {tensor.name}
        sources = [t for t in self.front.sources if t.name in read]
        if not sources:
            # Within a loop: the elements of an input have its range.
            return filled(self.graph, site.x(i), low), filled(self.graph, site.x(i), high)
        left, right = (
            self.graph.replicate(
                nodes, {t.name: filled(self.graph, self.at(t), end) for t in sources}
            )(tensor)
            for end in (low, high)
        )
        if any(t.name == tensor.name for t in sources):
            return left, right
        return op.Min(left, right), op.Max(left, right)

    def enter(self, site: Site, kind: str) -> None:
        """Note that the site's operator was met and treated as one of a kind."""
        cluster = self.clusters.get(site.node.outputs[0].name)
        name = site.node.op
        if cluster is not None and cluster.stand_in is None:
            parts = list(dict.fromkeys(node.op for node in cluster.nodes))
            name = parts[0] if len(parts) == 1 else f"({', '.join(parts)})"
        self.met.setdefault(kind, {})[name] = None

    def _site(
        self, node: Node, cotangents: list[Cotangent | None], active: set[str]
    ) -> tuple[Site, Rule | None]:
        cluster = self.clusters.get(node.outputs[0].name)
        if cluster is not None:
            # The region stands as a node of its own: its root in, its output out.
            node = _stand_in(cluster)
            indices: tuple[int, ...] = (0,)
            rule: Rule | None
            if cluster.stand_in is None:
                rule = self._cluster_rule(cluster)
            else:
                indices = active_inputs(node, active)
                rule = rules.lookup(node.op, node.domain, indices)
        else:
            indices = active_inputs(node, active)
            rule = rules.lookup(node.op, node.domain, indices)
        site = self._at(node, self.at, indices, cotangents)
        site = replace(site, discarded=node.outputs[0].name in self.discarded)
        if self.reference is not None:
            site = replace(site, reference=self._at(node, self.reference, indices, []))
        return site, rule

    def _at(
        self,
        node: Node,
        values: Values,
        active: tuple[int, ...],
        cotangents: Sequence[Cotangent | None],
    ) -> Site:
        inputs = tuple(values(t) if t.name else None for t in operands(node))
        outputs = tuple(values(t) for t in node.outputs)
        return Site(self.graph, node, inputs, outputs, tuple(cotangents), active)

    def _inside(self, cluster: Cluster, root: Tensor) -> Values:
        """The values in a cluster where its root has the value ``root``."""
        for values in (self.at, self.reference):
            if values is not None and root.name == values(cluster.root).name:
                return values
        key = ("inside", cluster.output.name, root.name)
        if key not in self.kept:
            values = self.graph.replicate(cluster.nodes, {cluster.root.name: root})
            for tensor in (t for node in cluster.nodes for t in node.outputs):
                values(tensor).shape = self.at(tensor).shape
            self.kept[key] = values
        return cast(Values, self.kept[key])

    def _cluster_rule(self, cluster: Cluster) -> Elementwise:
        def derivative(site: Site) -> Tensor:
            values = self._inside(cluster, site.x())
            one = self.graph.constant(1.0, self.graph.dtype(cluster.output))
            root = cluster.root.name
            inner = Sweep(self.graph, GRADIENT, values)
            active = flow(cluster.nodes, {root})
            return inner.run(cluster.nodes, active, {cluster.output.name: one}, [root])[root]

        kinked = any(_bends(self.graph, node) for node in cluster.nodes)
        return Elementwise(
            op="cluster",
            derivative=derivative,
            piecewise=cluster.piecewise,
            kinked=kinked,
            relu_like=lambda site: cluster.rectifier,
        )

    def _apply(self, site: Site, rule: Rule | None) -> Shares:
        if rule is None:
            raise Unsupported("no rule for this operator with these inputs attributed")
        if not (rule.lazy and self._spans(site)):
            full = [
                None if m is None else each(m, partial(expand, site, like=y))
                for m, y in zip(site.cotangents, site.outputs, strict=True)
            ]
            site = replace(site, cotangents=full)
        try:
            shares = self.table[type(rule)](self, site, rule)
        except UnsupportedOpError as inner:
            if isinstance(rule, Structured) and rule.transparent:
                raise
            # In the operator's definition; the user knows only the operator.
            reasons = "; ".join(offence.reason for offence in inner.offences)
            raise Unsupported(reasons) from inner
        if site.discarded and may_be_infinite(site, rule):
            shares = {i: each(m, site.silenced) for i, m in shares.items()}
        if rule.broadcasts:
            return {
                i: each(m, partial(unbroadcast, site, operand=site.x(i), output=site.y))
                for i, m in shares.items()
            }
        return {i: each(m, partial(self._refined, operand=site.x(i))) for i, m in shares.items()}

    def _spans(self, site: Site) -> bool:
        """Whether no active operand is broadcast, so that a lazy cotangent may stay so."""
        return all(same_shape(self.graph, site.x(i), site.y) for i in site.active)

    def _refined(self, m: Tensor, operand: Tensor) -> Tensor:
        return refine(self.graph, m, self.graph.shape(operand))

    def _total(self, terms: list[Cotangent]) -> Cotangent | None:
        return reduce(partial(total, self.graph.op), terms) if terms else None

    def _joined(self, m: Cotangent) -> Tensor:
        return m.joined(self.graph.op) if isinstance(m, Pair) else m


def flow(nodes: Sequence[Node], roots: set[str]) -> set[str]:
    """Names of the tensors that ``roots`` reach through differentiable operators."""
    active = set(roots)
    for node in nodes:
        inside = rules.reach(node.op, node.domain)
        if inside is not None:
            active |= inside(node, active)
        elif active_inputs(node, active):
            # Indices and the like (MaxPool, TopK, Cast to an integer) carry nothing back.
            active.update(t.name for t in node.outputs if t.name and _may_carry(t))
    return active


def _bends(graph: Graph, node: Node) -> bool:
    """Whether a node of a nonlinearity may give it a kink, or a slope without bounds."""
    row = rules.lookup(node.op, node.domain, (0,))
    if not isinstance(row, Elementwise):
        return bool(node.op == "Where")
    site = Site(graph, node, tuple(node.inputs), tuple(node.outputs), (), (0,))
    return row.piecewise or row.kinked or row.partial(site)


def _may_carry(tensor: Tensor) -> bool:
    return tensor.dtype is None or is_float(tensor.dtype)


def offence(graph: Graph, node: Node, reason: str) -> Offence:
    """A node that cannot be handled, for an UnsupportedOpError."""
    label = node.name or (node.outputs[0].name if node.outputs else "")
    return Offence(node.op, node.domain or "", graph.version(node.domain), label, reason)


def check_rules(graph: Graph, nodes: Sequence[Node]) -> None:
    """Raise UnsupportedOpError with all nodes whose operators have no rule."""
    missing = [
        offence(graph, node, "no rule for this operator")
        for node in nodes
        if not rules.known(node.op, node.domain)
    ]
    if missing:
        raise UnsupportedOpError(
            missing,
            "Attribute a tensor behind these nodes (--input NAME), or see 'onnx-attrib inspect'.",
        )


def _stand_ins(site: Site) -> Shares:
    """Go on after a node that cannot be handled, to find the others."""
    return {i: site.zeros_like(site.x(i)) for i in site.active}


def _stand_in(cluster: Cluster) -> Node:
    spelled = cluster.stand_in
    node = gs.Node("cluster", cluster.output.name)
    if spelled is not None:
        node = gs.Node(spelled.op, spelled.name, dict(spelled.attrs))
    # Plain lists: graphsurgeon's own would enter the stand-in as a producer of the output.
    node.inputs, node.outputs = [cluster.root, *cluster.operands], [cluster.output]
    node.late, node.bearer, node.within = cluster.late, cluster.bearer, cluster.within
    return node


__all__ = [
    "Sweep",
    "active_inputs",
    "check_rules",
    "differentiate",
    "filled",
    "flow",
    "full",
    "multipliers",
    "offence",
    "starts",
    "sweep_of",
]
