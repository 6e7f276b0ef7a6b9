"""Occlusion and Shapley value sampling: the model is evaluated, never differentiated.

They explain any model, also one of steps (tree ensembles, comparisons, integers) where nothing else
here can. They cost one evaluation of the model for each window, or for each feature of each sample.

**Occlusion** (Zeiler and Fergus 2014, arXiv 1311.2901): S(x) − S(x with a window at x̄). An entry's
attribution is the mean over the windows that cover it, as in Captum; DeepExplain also divides by
the number of entries in the window. Windows start at multiples of the stride until the end is
covered; the last is cut at the edge. Windows of one entry (the default) give leave-one-out
differences of T's shape [N, …].

**Shapley value sampling** (Castro et al. 2009): the features go to the reference one after another,
in a random order; the change of S that each makes, averaged over orders, estimates its Shapley
value. The changes of one order add up to S(x) − S(x̄), and so do the attributions: the value of a
feature of several entries (a patch of the size ``window``, cut at the edge) is split evenly among
them. Captum reports the feature's whole value at each of them. Several attributed tensors play one
game together.
"""

from __future__ import annotations

from typing import Any

from onnx_attrib.methods.base import Method, Occluded, Option, Options, Permuted, Sizes

WHOLE = -1
"""In the place of a size: the whole axis."""


def window(value: Any) -> Sizes:
    """A window from a number, a sequence, or text such as "1,3,3" or "1,all"."""
    return _sizes(value, "a size for every axis, or one for each (1,3,3; 'all': the whole axis)")


def stride(value: Any) -> Sizes:
    """A stride, likewise; no axis has it whole."""
    wanted = "a step for every axis, or one for each (1,2,2)"
    steps = _sizes(value, wanted)
    if WHOLE in (steps if isinstance(steps, tuple) else (steps,)):
        raise ValueError(wanted)
    return steps


def _sizes(value: Any, wanted: str) -> Sizes:
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    several = isinstance(parts, list | tuple)
    sizes = tuple(_size(part, wanted) for part in (parts if several else [parts]))
    if not sizes:
        raise ValueError(wanted)
    return sizes if several and not (isinstance(value, str) and len(sizes) == 1) else sizes[0]


def _size(part: Any, wanted: str) -> int:
    text = str(part).strip().replace("−", "-")
    if text in ("all", str(WHOLE)):
        return WHOLE
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(wanted)
    return int(text)


def _chunk(default: int) -> Option:
    text = "evaluations made together; bounds the memory to chunk × batch"
    return Option("chunk", default, text, minimum=1)


def _occluded(options: Options) -> Occluded:
    return Occluded(window(options["window"]), stride(options["stride"]), options["chunk"])


def _permuted(options: Options) -> Permuted:
    sizes = window(options["window"])
    return Permuted(options["samples"], sizes, options["seed"], options["chunk"])


occlusion = Method(
    name="occlusion",
    summary="S(x) − S(x with a window at x̄): the model is only evaluated",
    g="none: no derivative is taken",
    paper="Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks "
    "(arXiv 1311.2901)",
    table=lambda options: {},
    attribution=lambda op, m, x, reference: m,
    options=(
        Option(
            "window",
            1,
            "what is occluded at once: a size for every axis but the batch's, or one for each "
            "(3,8,8); 'all' or -1 is the whole axis (1,all: a token)",
            read=window,
        ),
        Option(
            "stride", 1, "how far apart windows start, likewise; at most the window", read=stride
        ),
        _chunk(16),
    ),
    needs_reference=True,
    differentiates=False,
    perturbs=_occluded,
)

shapley_sampling = Method(
    name="shapley-sampling",
    summary="Shapley values of the features, from random orders: the model is only evaluated",
    g="none: no derivative is taken",
    paper="Castro, Gómez, Tejada 2009, Polynomial calculation of the Shapley value based on "
    "sampling (doi 10.1016/j.cor.2008.04.004)",
    table=lambda options: {},
    attribution=lambda op, m, x, reference: m,
    options=(
        Option("samples", 100, "random orders of the features", minimum=1),
        Option(
            "window",
            1,
            "what is one feature: a size for every axis but the batch's, or one for each (3,8,8); "
            "'all' or -1 is the whole axis (1,all: a token)",
            read=window,
        ),
        Option("seed", 0, "of the orders", minimum=0),
        _chunk(16),
    ),
    needs_reference=True,
    complete=True,
    differentiates=False,
    perturbs=_permuted,
)
