"""What the passes work on and hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_attrib.ir import Dim, Graph, Node, Tensor, Values
from onnx_attrib.methods.base import Method, Table

Target = str | int | tuple[int, ...]
Targets = int | tuple[int, ...]
"""Several targets at once: the k largest classes, or fixed ones."""
Baseline = str | float | np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Choice:
    """A method with its options, checked."""

    method: Method
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked but not yet held against a model."""

    choices: tuple[Choice, ...]
    inputs: tuple[str, ...] | None
    output: str | None
    target: Target
    targets: Targets | None
    baseline: Baseline
    delta: bool
    source: str
    """SHA-256 of the source model."""
    reduce: Mapping[str | int, str] = field(default_factory=dict)
    """How axes of the attribution are reduced, by ``"channels"``, ``"last"`` or number."""
    normalize: bool = False
    precision: str = "keep"
    """``"keep"``, or ``"fp16"``: float16 where it is safe."""
    provider: str = "portable"
    """``"cuda"``: without operators that have no CUDA kernel."""
    memory: float | None = None
    """MiB that a run of evaluations in groups may take."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Sizes of open dimensions that it is reckoned for."""

    @property
    def differentiates(self) -> bool:
        """Whether any method needs derivatives."""
        return any(choice.method.differentiates for choice in self.choices)


@dataclass
class Scope:
    """What lies between the attributed tensors and the explained output.

    ``nodes``: sorted, those on a differentiable path; ``active``: their tensors that carry
    attribution; ``dependent``: sorted, all nodes whose values change with the attributed tensors.
    """

    inputs: list[Tensor]
    output: Tensor
    nodes: list[Node]
    active: set[str]
    dependent: list[Node]
    batch: Dim
    """The batch dimension of the explained output (None if it has no batch axis)."""

    @property
    def names(self) -> list[str]:
        return [tensor.name for tensor in self.inputs]


@dataclass
class Cluster:
    """A region with one variable input that counts as one operator.

    Either elementwise ``nodes`` that are one nonlinearity, or the spelling of an operator
    (``stand_in``, whose rule applies to ``root`` and ``operands``).
    """

    root: Tensor
    output: Tensor
    nodes: list[Node]
    stand_in: Node | None = None
    operands: list[Tensor] = field(default_factory=list)
    """What the operator reads besides the root: merged weights."""
    late: tuple[tuple[str, Tensor], ...] = ()
    """Factors and terms of the operator's that the model has only behind ``output``: by which
    operators they are applied, in order."""
    piecewise: bool = False
    """Whether the nonlinearity is piecewise linear."""
    rectifier: float = 0.0
    """Its slope for positive numbers, if it is a ReLU or its kin."""
    bearer: int | None = None
    """Which of a sum's operands the constants among them belong to, if one does."""
    within: tuple[Tensor | None, ...] = ()
    """What of a sum's varying operands is constant."""


@dataclass
class Background:
    """K references, of which each draw of a method has one.

    ``sources``: what they replace; ``rows``: by its name, [K, …]; ``region``: the nodes between it
    and the explained output or attributed tensors; ``shared``: one row may serve all samples;
    ``count``: K, int64 [1] if it is known at run time only.
    """

    sources: list[Tensor]
    region: list[Node]
    rows: dict[str, Tensor]
    shared: bool
    count: int | Tensor


@dataclass
class Front:
    """Where the model begins: what no layer with weights precedes.

    ``sources``: the attributed tensors, of several in a row the first; ``nodes``: sorted, those
    before the first layers; ``names``: the tensors that they compute or read, constants aside;
    ``scaled``: those among them that are an input, with its entries moved, scaled or shifted.
    """

    sources: list[Tensor]
    nodes: list[Node]
    names: set[str]
    scaled: set[str]


@dataclass
class Job:
    """A compilation in progress; each pass fills in its part.

    Scope, seeds and what the user is told are shared by all methods; :meth:`explaining` gives the
    job of one method, and ``seed`` is the one that it explains at the moment.
    """

    graph: Graph
    request: Request
    choice: Choice
    scope: Scope = field(init=False)
    seed: Tensor = field(init=False)
    seeds: list[Tensor] = field(default_factory=list)
    """One for each target."""
    placed: dict[str, Tensor] = field(default_factory=dict)
    """Baselines that are inputs of the compiled model, by the name of what they replace."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the result (shown by the command line)."""
    baselines: dict[str, Tensor] = field(default_factory=dict)
    """The reference value of each attributed tensor, by name."""
    reference: Values | None = None
    reference_dims: dict[str, Dim] = field(default_factory=dict)
    background: Background | None = None
    expected: Tensor | None = None
    """With a background: the output's mean over the references, of batch 1 or N."""
    clusters: dict[str, Cluster] = field(default_factory=dict)
    bearers: dict[str, int] = field(default_factory=dict)
    """Of sums with a layer that takes their constants: which term it is, by the sum's name."""
    front: Front | None = None
    parts: list[Job] = field(default_factory=list)
    """The jobs of the methods."""
    attributions: list[dict[str, Tensor]] = field(default_factory=list)
    """For each seed so far, the attribution of each attributed tensor by name."""
    met: dict[str, dict[str, None]] = field(default_factory=dict)
    """Operators that the sweeps met, by what treatments called them."""
    fitted: int | None = None
    """The smallest chunk that a bound on memory left."""
    apart: bool = False
    """Whether the samples of a batch are known to be independent of each other."""
    shown: list[dict[str, Tensor]] = field(default_factory=list)
    """The same, reduced and normalized as asked for."""

    def explaining(self, choice: Choice) -> Job:
        """A job of its own for one method."""
        part = Job(self.graph, self.request, choice)
        part.scope, part.seeds = self.scope, self.seeds
        part.placed, part.notes = self.placed, self.notes
        self.parts.append(part)
        return part

    @property
    def method(self) -> Method:
        return self.choice.method

    @property
    def options(self) -> Mapping[str, Any]:
        return self.choice.options

    @property
    def table(self) -> Table:
        return self.method.table(self.options)

    def attribute(self, multipliers: Mapping[str, Tensor]) -> None:
        """Enter what the method reports of the multipliers of the attributed tensors."""
        self.attributions.append(
            {
                t.name: self.method.attribution(
                    self.graph.op, multipliers[t.name], t, self.baselines.get(t.name)
                )
                for t in self.scope.inputs
            }
        )


__all__ = [
    "Background",
    "Baseline",
    "Choice",
    "Cluster",
    "Job",
    "Request",
    "Scope",
    "Target",
    "Targets",
]
