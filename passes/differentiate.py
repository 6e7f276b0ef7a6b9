"""The reverse sweep: from the seed back to the attributed tensors, one rule a node.

Precondition: the job has a scope, a seed and, if the method compares, values at the reference.
Postcondition: ``job.attributions`` has one entry more, the attributions for ``job.seed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from onnx_attrib import rules
from onnx_attrib.errors import Offence, UnsupportedOpError
from onnx_attrib.ir import Dim, Graph, Node, Tensor, Values, is_float, operands
from onnx_attrib.job import Cluster, Job
from onnx_attrib.methods.base import GRADIENT, Shares, Table
from onnx_attrib.passes.cluster import Stretch, find
from onnx_attrib.passes.simplify import share
from onnx_attrib.rules import Composite, Elementwise, Rule, Site, Structured, Unsupported
from onnx_attrib.rules.broadcast import expand, is_full, refine, same_shape, unbroadcast


def differentiate(job: Job) -> None:
    """Sweep once over the model's own values."""
    scope = job.scope
    found = sweep_of(job).run(scope.nodes, scope.active, starts(job), scope.names)
    job.attribute({t.name: full(job.graph, found[t.name], t) for t in scope.inputs})


def sweep_of(job: Job, at: Values | None = None) -> Sweep:
    """The method's sweep over the model's own values, or over those that ``at`` gives."""
    return Sweep(
        job.graph,
        job.table,
        Values() if at is None else at,
        job.reference if job.method.compares else None,
        job.clusters,
        job.reference_dims,
        job.notes,
        job.method.clusters,
    )


def starts(job: Job) -> dict[str, Tensor]:
    """What a sweep of the method starts from: the seed, or the seeded value of the output."""
    output, start = job.scope.output, job.seed
    if job.method.starts == "value":
        start = job.graph.op.Mul(job.seed, output)
    return {output.name: start}


def full(graph: Graph, m: Tensor, like: Tensor) -> Tensor:
    """A multiplier in the full shape of its tensor."""
    return m if is_full(graph, m, like) else graph.op.Expand(m, graph.op.Shape(like))


@dataclass
class Sweep:
    """One reverse sweep over a region of the graph.

    ``at`` gives the region's tensors at the point explained, ``reference`` at the baseline
    (``reference_dims``: how symbolic dimensions are renamed there). ``notes`` collects what the
    user should know about the result. ``clustering``: what counts as one nonlinearity in the
    definitions and bodies that the sweep goes through.
    """

    graph: Graph
    table: Table
    at: Values = field(default_factory=Values)
    reference: Values | None = None
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    reference_dims: Mapping[str, Dim] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clustering: str = ""

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
        pending = {name: [seed] for name, seed in seeds.items()}
        wanted = set(wanted)
        result: dict[str, Tensor] = {}
        offences: list[Offence] = []
        for node in reversed(nodes):
            if not any(t.name in pending for t in node.outputs):
                continue
            cotangents = [self._total(pending.pop(t.name, [])) for t in node.outputs]
            for tensor, total in zip(node.outputs, cotangents, strict=True):
                if total is not None and tensor.name in wanted:
                    result[tensor.name] = total
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
            total = self._total(pending[name])
            if total is not None:
                result[name] = total
        return result

    def decompose(self, site: Site, rule: Composite, table: Table | None = None) -> Shares:
        """Sweep through the operator's definition, emitted at both points."""
        with self.graph.record() as nodes:
            outputs = rule.decompose(site)
        return self.through(site, nodes, outputs, table=table)

    def through(
        self,
        site: Site,
        nodes: Sequence[Node],
        outputs: Sequence[Tensor | None],
        known: Mapping[str, Tensor] | None = None,
        known_reference: Mapping[str, Tensor] | None = None,
        table: Table | None = None,
    ) -> Shares:
        """Sweep through ``nodes``, which compute ``outputs`` from ``site.inputs``.

        What depends on a ``known`` value is computed from it, not from the node that gives it.
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
        if self.clustering and table is None:
            inner.clustering = self.clustering
            inner.clusters = self._clusters(site, nodes, active)
        shares = inner.run(nodes, active, seeds, wanted)
        return {wanted[name]: m for name, m in shares.items()}

    def _clusters(self, site: Site, nodes: Sequence[Node], active: set[str]) -> dict[str, Cluster]:
        """Nonlinearities spelled out within a definition or a body."""
        graph = self.graph
        outside = {t.name for t in site.inputs if t is not None and graph.value(t) is None}
        changing, dependent = set(outside), []
        for node in nodes:
            if any(t.name in changing for t in graph.uses(node)):
                dependent.append(node)
                changing.update(t.name for t in node.outputs if t.name)
        on_path = [node for node in nodes if active_inputs(node, active)]
        return find(Stretch(graph, on_path, dependent, active, outside), self.clustering)

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

    def _site(
        self, node: Node, cotangents: list[Tensor | None], active: set[str]
    ) -> tuple[Site, Rule | None]:
        cluster = self.clusters.get(node.outputs[0].name)
        if cluster is not None:
            # The region stands as a node of its own: its root in, its output out.
            node = _stand_in(cluster)
            indices: tuple[int, ...] = (0,)
            rule: Rule | None = (
                rules.lookup(node.op, node.domain, indices)
                if cluster.stand_in is not None
                else self._cluster_rule(cluster)
            )
        else:
            indices = active_inputs(node, active)
            rule = rules.lookup(node.op, node.domain, indices)
        site = self._at(node, self.at, indices, cotangents)
        if self.reference is not None:
            site = replace(site, reference=self._at(node, self.reference, indices, []))
        return site, rule

    def _at(
        self,
        node: Node,
        values: Values,
        active: tuple[int, ...],
        cotangents: Sequence[Tensor | None],
    ) -> Site:
        inputs = tuple(values(t) if t.name else None for t in operands(node))
        outputs = tuple(values(t) for t in node.outputs)
        return Site(self.graph, node, inputs, outputs, tuple(cotangents), active)

    def _cluster_rule(self, cluster: Cluster) -> Elementwise:
        def derivative(site: Site) -> Tensor:
            at_point = site.x().name == self.at(cluster.root).name
            values = self.at if at_point or self.reference is None else self.reference
            one = self.graph.constant(1.0, self.graph.dtype(cluster.output))
            root = cluster.root.name
            inner = Sweep(self.graph, GRADIENT, values)
            active = flow(cluster.nodes, {root})
            return inner.run(cluster.nodes, active, {cluster.output.name: one}, [root])[root]

        kinked = any(_bends(node) for node in cluster.nodes)
        return Elementwise(
            op="cluster", derivative=derivative, piecewise=cluster.piecewise, kinked=kinked
        )

    def _apply(self, site: Site, rule: Rule | None) -> Shares:
        if rule is None:
            raise Unsupported("no rule for this operator with these inputs attributed")
        if not (rule.lazy and self._spans(site)):
            full = [
                None if m is None else expand(site, m, y)
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
        if rule.broadcasts:
            return {i: unbroadcast(site, m, site.x(i), site.y) for i, m in shares.items()}
        return {i: self._refined(m, site.x(i)) for i, m in shares.items()}

    def _spans(self, site: Site) -> bool:
        """Whether no active operand is broadcast, so that a lazy cotangent may stay so."""
        return all(same_shape(self.graph, site.x(i), site.y) for i in site.active)

    def _refined(self, m: Tensor, operand: Tensor) -> Tensor:
        return refine(self.graph, m, self.graph.shape(operand))

    def _total(self, terms: list[Tensor]) -> Tensor | None:
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = self.graph.op.Add(total, term)
        return total


def active_inputs(node: Node, active: set[str]) -> tuple[int, ...]:
    """Indices of the inputs through which attribution flows back."""
    if rules.is_barrier(node.op, node.domain):
        return ()
    blocked = rules.blocked(node.op, node.domain)
    return tuple(i for i, t in enumerate(operands(node)) if t.name in active and i not in blocked)


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


def _bends(node: Node) -> bool:
    """Whether a node of a nonlinearity may give it a kink."""
    row = rules.lookup(node.op, node.domain, (0,))
    return node.op == "Where" or (
        isinstance(row, Elementwise) and bool(row.piecewise or row.kinked)
    )


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
    return node


__all__ = [
    "Sweep",
    "active_inputs",
    "check_rules",
    "differentiate",
    "flow",
    "full",
    "offence",
    "starts",
    "sweep_of",
]
