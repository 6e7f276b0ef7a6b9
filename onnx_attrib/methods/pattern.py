"""PatternNet and PatternAttribution (Kindermans et al. 2017, arXiv 1705.05598).

A weight vector w says how a neuron reads its input, not what it reads: it must also cancel the
distractors. The pattern a, estimated from data, is the direction in which the input changes with
the neuron's output, scaled to wᵀa = 1. The value S(x) is sent back by the chain rule with each
weight replaced by its pattern (``pattern-net``: the signal, in the input's units) or by weight ×
pattern (``pattern-attribution``: relevance). ReLUs gate as in the gradient, a maximum sends all to
its winner, everything else is transposed. What arrives at T, of T's shape, is the attribution.

Layers are Conv, ConvTranspose, Gemm and MatMul with a constant weight; a BatchNormalization or a
factor after one belongs to it, so that w is the merged weight. innvestigate estimates layers
without a ReLU by the linear estimator; here, as in the authors' own code, every layer has a₊ of the
two-component estimator (:mod:`onnx_attrib.patterns`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.methods.base import GRADIENT, Method, Option

PAPER = "Kindermans et al. 2017, Learning How to Explain Neural Networks (arXiv 1705.05598)"


@dataclass(frozen=True)
class Patterns:
    """Arrays by initializer name, each in the initializer's own layout; ``source``: whence."""

    arrays: Mapping[str, np.ndarray]
    source: str

    def __str__(self) -> str:
        return self.source

    def __hash__(self) -> int:
        return id(self)


def read_patterns(value: Any) -> Patterns:
    """Patterns from a mapping of arrays, or from the .npz file that ``fit-patterns`` wrote."""
    if isinstance(value, Patterns):
        return value
    if isinstance(value, Mapping):
        return Patterns({str(name): np.asarray(a) for name, a in value.items()}, "arrays")
    if not isinstance(value, str | os.PathLike):
        raise ValueError("an .npz file, or arrays by initializer name")
    try:
        with np.load(value, allow_pickle=False) as held:
            if isinstance(held, np.ndarray):
                raise ValueError("it holds one array, not arrays by initializer name")
            return Patterns({name: held[name] for name in held.files}, str(value))
    except FileNotFoundError:
        raise OptionError(
            f"there is no file of patterns '{value}'; onnx-attrib fit-patterns makes one"
        ) from None
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise OptionError(f"cannot read the patterns '{value}': {error}") from None


OPTIONS = (
    Option(
        "patterns",
        None,
        "the .npz file that 'onnx-attrib fit-patterns' made for this model",
        read=read_patterns,
        required=True,
    ),
)

pattern_net = Method(
    name="pattern-net",
    summary="S(x) sent back along estimated patterns: the part of the input that is signal",
    g="f'(z), with patterns for weights",
    paper=PAPER,
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: m,
    options=OPTIONS,
    starts="value",
    merges=True,
    weights="patterns",
)

pattern_attribution = replace(
    pattern_net,
    name="pattern-attribution",
    summary="S(x) sent back along weights × patterns: what the signal contributes",
    g="f'(z), with weights × patterns for weights",
    weights="weighted-patterns",
)
