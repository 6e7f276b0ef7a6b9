"""What the passes work on and hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_attrib.ir import Dim, Graph, Node, Tensor, Values
from onnx_attrib.methods.base import Method, Table

Target = str | int | tuple[int, ...]
Baseline = str | float | np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked but not yet held against a model."""

    method: Method
    options: Mapping[str, Any]
    inputs: tuple[str, ...] | None
    output: str | None
    target: Target
    baseline: Baseline
    delta: bool
    source: str
    """SHA-256 of the source model."""


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
    (``stand_in``, whose rule applies).
    """

    root: Tensor
    output: Tensor
    nodes: list[Node]
    stand_in: Node | None = None
    piecewise: bool = False
    """Whether the nonlinearity is piecewise linear."""


@dataclass
class Job:
    """A compilation in progress; each pass fills in its part."""

    graph: Graph
    request: Request
    scope: Scope = field(init=False)
    seed: Tensor = field(init=False)
    baselines: dict[str, Tensor] = field(default_factory=dict)
    """The reference value of each attributed tensor, by name."""
    reference: Values | None = None
    reference_dims: dict[str, Dim] = field(default_factory=dict)
    clusters: dict[str, Cluster] = field(default_factory=dict)
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know about the result (shown by the command line)."""

    @property
    def method(self) -> Method:
        return self.request.method

    @property
    def table(self) -> Table:
        return self.method.table(self.request.options)


__all__ = ["Baseline", "Cluster", "Job", "Request", "Scope", "Sequence", "Target"]
