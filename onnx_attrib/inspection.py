"""What a model is made of and whether it can be compiled, found out before anyone waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import onnx
from onnx import ModelProto

from onnx_attrib import rules
from onnx_attrib.compiler import checked_provider, transform
from onnx_attrib.errors import CompileError, Offence, OptionError, UnsupportedOpError
from onnx_attrib.ir import Graph, Node, Shape, Tensor, is_float
from onnx_attrib.job import Choice, Cluster, Job, Request
from onnx_attrib.methods import get as method_named
from onnx_attrib.model_io import Source, load
from onnx_attrib.passes.differentiate import active_inputs, flow, offence
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.scope import ancestors, attributed_tensors, embeddings, explained_output
from onnx_attrib.placement import Placement, placed
from onnx_attrib.recipe import Recipe

_SQUASHING = frozenset(("Softmax", "LogSoftmax", "Sigmoid"))
# Operators that only rename, reorder or repack what they are given.
_PASSING = frozenset(
    "Identity Reshape Flatten Squeeze Unsqueeze Transpose Cast Dropout Slice Split Gather".split()
)
_WEIGHTED = frozenset("Conv ConvTranspose Gemm MatMul LSTM GRU RNN".split())
_NORMALISING = frozenset(
    "BatchNormalization LayerNormalization InstanceNormalization GroupNormalization "
    "RMSNormalization LRN".split()
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model's interface; ``shape`` is None where the rank is unknown."""

    name: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class Squashed:
    """An output behind a Softmax or its like: ``operator``, and the tensor ``before`` it."""

    output: str
    operator: str
    before: str

    def __str__(self) -> str:
        kind = "log-probabilities" if self.operator == "LogSoftmax" else "probabilities"
        why = "depend on every class" if self.operator == "LogSoftmax" else "saturate"
        return (
            f"output '{self.output}' is behind a {self.operator}: {kind} {why}; to explain the "
            f"logits instead: --output {self.before}"
        )


@dataclass(frozen=True)
class Nonlinearity:
    """An operator that is not linear in what is attributed, with its rule's class.

    ``nodes``: the names of all such nodes. A cluster counts as one nonlinearity and is named by
    its operators.
    """

    operator: str
    rule: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """An inner float tensor suited for attribution; ``made_by``: the operators before it."""

    name: str
    made_by: str
    dtype: str
    shape: Shape | None


@dataclass
class Inspection:
    """The findings of :func:`inspect`.

    ``compilable``: whether it compiles for ``method`` with default settings; if not, either
    ``unsupported`` lists the nodes in the way, or ``problem`` says what else is.
    ``unused_unsupported``: nodes without a rule that are not in the way. ``compiled``: how the
    model was compiled, if onnx-attrib made it; then only the interface is described.
    ``placement``: where its nodes run in a CUDA session, if that was asked for.
    """

    opsets: dict[str, int]
    ir_version: int
    producer: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    parameters: int
    nodes: int
    operators: dict[str, int]
    source_sha256: str
    metadata: dict[str, str]
    compiled: Recipe | None = None
    method: str = ""
    output: str | None = None
    attributed: list[str] = field(default_factory=list)
    squashed: Squashed | None = None
    nonlinearities: list[Nonlinearity] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    unsupported: list[Offence] = field(default_factory=list)
    unused_unsupported: list[Offence] = field(default_factory=list)
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    placement: Placement | None = None

    @property
    def compilable(self) -> bool:
        """Whether compiling with default settings works."""
        return not self.compiled and not self.unsupported and self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON types."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {**plain, "compilable": self.compilable}


def inspect(
    model: Source,
    method: str = "deeplift",
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    provider: str = "portable",
) -> Inspection:
    """Describe a model, and try to compile it for ``method`` with default settings.

    ``provider`` ``"cuda"``: also say which nodes of the model as it is would fall back to the CPU
    in a CUDA session, and what would be copied. ``inputs`` and ``output`` as for
    :func:`onnx_attrib.compile`. Raises ModelError for a file that is missing, damaged, or rejected
    by ONNX's checker, OptionError for a method or tensor that does not exist; whatever else is in
    the way of compiling is among the findings.
    """
    chosen = method_named(method)
    proto, digest = load(model)
    report = _describe(proto, digest)
    if checked_provider(provider) == "cuda":
        report.placement = placed(proto)
    report.compiled = Recipe.read(report.metadata)
    if report.compiled is not None:
        return report
    report.method = chosen.name
    graph = normalize(proto)
    choice = Choice(chosen, chosen.parse({}))
    request = Request(
        choices=(choice,),
        inputs=None if inputs is None else tuple(inputs),
        output=output,
        target="input",
        targets=None,
        baseline="zeros",
        delta=False,
        source=digest,
    )
    _analyse(report, Job(graph, request, choice))
    return report


def behind_softmax(output: Tensor) -> Squashed | None:
    """Whether a tensor is a Softmax's, LogSoftmax's or Sigmoid's result, and what of.

    Looks through operators that only repack values, and knows the softmax that is spelled as
    e^z / Σ e^z.
    """
    tensor = output
    while tensor.inputs:
        node = tensor.inputs[0]
        if node.op in _SQUASHING and not node.domain:
            return Squashed(output.name, node.op, node.inputs[0].name)
        if node.op == "Div" and (before := _spelled_softmax(node)):
            return Squashed(output.name, "Softmax", before)
        if node.op not in _PASSING or not node.inputs:
            return None
        tensor = node.inputs[0]
    return None


def _spelled_softmax(node: Node) -> str | None:
    above, below = (t.inputs[0] if t.inputs else None for t in node.inputs)
    if above is None or below is None or above.op != "Exp" or below.op != "ReduceSum":
        return None
    if below.inputs[0].name != node.inputs[0].name:
        return None
    shifted = above.inputs[0]
    maker = shifted.inputs[0] if shifted.inputs else None
    if maker is not None and maker.op == "Sub":
        largest = maker.inputs[1].inputs
        if largest and largest[0].op == "ReduceMax":
            return str(maker.inputs[0].name)
    return str(shifted.name)


# -- the file --------------------------------------------------------------------------------------


def _describe(model: ModelProto, digest: str) -> Inspection:
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    weights |= {t.values.name for t in graph.sparse_initializer}
    producer = f"{model.producer_name} {model.producer_version}".strip()
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for node in graph.node
    )
    return Inspection(
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        ir_version=model.ir_version,
        producer=producer,
        inputs=[_value(v) for v in graph.input if v.name not in weights],
        outputs=[_value(v) for v in graph.output],
        parameters=sum(_parameters(model)),
        nodes=len(graph.node),
        operators=dict(operators.most_common()),
        source_sha256=digest,
        metadata={prop.key: prop.value for prop in model.metadata_props},
    )


def _parameters(model: ModelProto) -> Iterator[int]:
    """The sizes of all float weights, of Constant nodes too."""
    tensors = list(model.graph.initializer)
    tensors += [t.values for t in model.graph.sparse_initializer]
    tensors += [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for tensor in tensors:
        if tensor.data_type in onnx.helper.get_all_tensor_dtypes() and is_float(
            onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        ):
            size = 1
            for dim in tensor.dims:
                size *= dim
            yield size


def _value(info: onnx.ValueInfoProto) -> TensorInfo:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        return TensorInfo(info.name, (kind or "unknown").removesuffix("_type"), None)
    tensor = info.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in tensor.shape.dim
        )
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return TensorInfo(info.name, {"float": "float32", "double": "float64"}.get(name, name), shape)


# -- the graph -------------------------------------------------------------------------------------


def _analyse(report: Inspection, job: Job) -> None:
    """Trace the paths, name what is on them, and try to compile. Changes the graph."""
    graph, request = job.graph, job.request
    graph.sort()
    try:
        output = explained_output(graph, request.output)
        report.output = output.name
        upstream = ancestors(graph, output)
        attributed = attributed_tensors(graph, request.inputs, upstream)
        report.attributed = [t.name for t in attributed]
    except OptionError:
        # A tensor that the caller named does not exist or does not fit.
        raise
    except CompileError as error:
        report.problem = str(error)
        _without_rule(report, graph, ())
        return
    report.squashed = behind_softmax(output)
    active = flow(upstream, {t.name for t in attributed})
    path = [(n, indices) for n in upstream if (indices := active_inputs(n, active))]
    _without_rule(report, graph, [n for n, _ in path])
    consumers: dict[str, list[Node]] = {}
    for node, _ in path:
        for tensor in graph.uses(node):
            consumers.setdefault(tensor.name, []).append(node)
    found = embeddings(graph, upstream)

    try:
        transform(job)
    except UnsupportedOpError as error:
        known = {o.node for o in report.unsupported}
        report.unsupported += [o for o in error.offences if o.node not in known]
    except CompileError as error:
        report.problem = str(error)
    report.notes = list(job.notes)

    clusters = job.parts[0].clusters if job.parts else {}
    report.nonlinearities = _nonlinearities(path, clusters)
    hidden = {output.name, report.squashed.before if report.squashed else ""}
    layers = [_layer(t, "embedding") for t in found]
    layers += _layers(graph, path, consumers, clusters)
    seen: set[str] = set()
    for layer in layers:
        if layer.name not in seen | hidden:
            seen.add(layer.name)
            report.layers.append(layer)


def _without_rule(report: Inspection, graph: Graph, path: Sequence[Node]) -> None:
    on_path = {id(node) for node in path}
    for node in graph.nodes:
        if not rules.known(node.op, node.domain):
            found = offence(graph, node, "no rule for this operator")
            if id(node) in on_path:
                report.unsupported.append(found)
            else:
                report.unused_unsupported.append(found)


def _nonlinearities(
    path: Sequence[tuple[Node, tuple[int, ...]]], clusters: Mapping[str, Cluster]
) -> list[Nonlinearity]:
    """Operators grouped by name and class, the most frequent first."""
    inside = {id(node) for cluster in clusters.values() for node in cluster.nodes}
    groups: dict[tuple[str, str], list[str]] = {}
    for node, indices in path:
        rule = rules.lookup(node.op, node.domain, indices)
        name = node.name or node.outputs[0].name
        cluster = next((clusters[t.name] for t in node.outputs if t.name in clusters), None)
        if cluster is not None:
            key = "+".join(n.op for n in cluster.nodes), "cluster"
        elif id(node) in inside or rule is None or isinstance(rule, rules.Linear | rules.Barrier):
            continue
        elif isinstance(rule, rules.Bilinear) and len(indices) < 2:
            # Linear in the one operand that varies: a layer with constant weights.
            continue
        else:
            key = (
                node.op,
                "max-like" if isinstance(rule, rules.MaxLike) else type(rule).__name__.lower(),
            )
        groups.setdefault(key, []).append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [Nonlinearity(op, rule, tuple(nodes)) for (op, rule), nodes in ordered]


def _layers(
    graph: Graph,
    path: Sequence[tuple[Node, tuple[int, ...]]],
    consumers: Mapping[str, Sequence[Node]],
    clusters: Mapping[str, Cluster],
) -> Iterator[Layer]:
    """Outputs of weighted operators and residual sums, after normalisation and activation."""
    roots = {cluster.root.name: cluster for cluster in clusters.values()}
    for node, indices in path:
        if (node.op in _WEIGHTED and len(indices) == 1) or (
            node.op in ("Add", "Sum") and len(indices) > 1
        ):
            made_by = node.op
        else:
            continue
        tensor = node.outputs[0]
        for _ in range(8):
            cluster, after = roots.get(tensor.name), consumers.get(tensor.name, ())
            if cluster is not None:
                tensor, made_by = cluster.output, f"{made_by}+activation"
                continue
            if len(after) != 1:
                break
            step = after[0]
            row = rules.lookup(step.op, step.domain, (0,))
            if step.op in _NORMALISING or isinstance(row, rules.Elementwise):
                made_by += f"+{step.op}"
            elif step.op not in ("Add", "Identity", "Dropout") or _varying(graph, step) > 1:
                break
            tensor = step.outputs[0]
        yield _layer(tensor, made_by)


def _varying(graph: Graph, node: Node) -> int:
    return sum(graph.value(t) is None for t in node.inputs if t.name)


def _layer(tensor: Tensor, made_by: str) -> Layer:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return Layer(tensor.name, made_by, str(Graph.dtype(tensor)), shape)


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


__all__ = ["Inspection", "Squashed", "behind_softmax", "inspect"]
