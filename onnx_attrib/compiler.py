"""``compile()``: a model in, a model with attributions out. The pipeline is the list at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto

from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.job import Baseline, Job, Request, Target
from onnx_attrib.methods import METHODS
from onnx_attrib.methods import get as method_named
from onnx_attrib.model_io import Source, load
from onnx_attrib.passes.cluster import cluster
from onnx_attrib.passes.differentiate import differentiate
from onnx_attrib.passes.finalize import finalize
from onnx_attrib.passes.integrate import integrate
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.quantized import mark, unmark
from onnx_attrib.passes.recognize import recognize
from onnx_attrib.passes.reference import reference
from onnx_attrib.passes.report import report
from onnx_attrib.passes.scope import scope
from onnx_attrib.passes.simplify import simplify
from onnx_attrib.passes.target import target as choose_target


def compile(
    model: Source,
    method: str = "deeplift",
    *,
    inputs: Sequence[str] | str | None = None,
    output: str | None = None,
    target: Target = "input",
    baseline: Baseline | str | os.PathLike[str] = "zeros",
    delta: bool = False,
    **method_options: Any,
) -> ModelProto:
    """Compile a model into one graph that computes its outputs and their attribution.

    Args:
        model: a path, the bytes of an .onnx file, or a ModelProto (left unchanged).
        method: a name from :func:`onnx_attrib.methods`.
        inputs: tensors to attribute to: graph inputs or any inner float tensors. Default: the
            float inputs that reach the output, else the outputs of the embeddings.
        output: the float tensor to explain. Default: the first float output.
        target: what S is. ``"input"``: an int64 graph input ``target``, [N] for an output (N, C)
            and [N, r-1] for rank r > 2, where a negative class is the predicted one; absent when
            the output holds one value a sample. ``"argmax"``: the largest entry of each sample.
            An integer or tuple: fixed. ``"seed"``: a graph input ``seed`` of the output's shape;
            S = Σ seed · output.
        baseline: x̄, for methods that have a reference: ``"zeros"``, a number, an array (or the
            path of an .npy or .npz), a mapping of arrays by tensor name, or ``"input"``: a graph
            input ``<name>_baseline`` (batch 1 or N) for each model input that feeds the
            attributed tensors.
        delta: add the output ``convergence_delta`` [N], Σ attribution − (S(x) − S(x̄)); only for
            methods that promise completeness.
        **method_options: the method's options, see :func:`onnx_attrib.methods`.

    Returns:
        A ModelProto (opset 21, IR 10) with the model's own inputs and outputs and an output
        ``<T>_attribution`` of T's shape for each attributed tensor T.

    Raises:
        CompileError: and its subclasses ModelError (the file), OptionError (the request) and
            UnsupportedOpError (operators without a rule, all of them).
    """
    job = prepare(
        model,
        method,
        inputs=inputs,
        output=output,
        target=target,
        baseline=baseline,
        delta=delta,
        **method_options,
    )
    return job.graph.to_proto()


def prepare(
    model: Source,
    method: str,
    *,
    inputs: Sequence[str] | str | None = None,
    output: str | None = None,
    target: Target = "input",
    baseline: Baseline | str | os.PathLike[str] = "zeros",
    delta: bool = False,
    **method_options: Any,
) -> Job:
    """:func:`compile`, returning the finished job with its graph and notes."""
    chosen = method_named(method)
    if delta and not chosen.complete:
        complete = ", ".join(m.name for m in METHODS.values() if m.complete)
        raise OptionError(
            f"method '{chosen.name}' does not promise to sum to the output difference; "
            f"delta is for: {complete}"
        )
    request = Request(
        method=chosen,
        options=chosen.parse(method_options),
        inputs=(inputs,) if isinstance(inputs, str) else None if inputs is None else tuple(inputs),
        output=output,
        target=_checked_target(target),
        baseline=_loaded_baseline(baseline),
        delta=delta,
        source="",
    )
    return run(load(model), request)


def run(loaded: tuple[ModelProto, str], request: Request) -> Job:
    """Normalize the model and apply the pipeline."""
    model, digest = loaded
    job = Job(normalize(model), Request(**{**vars(request), "source": digest}))
    for apply in pipeline(request):
        apply(job)
    return job


def pipeline(request: Request) -> list[Callable[[Job], None]]:
    """The passes, in order."""
    return [
        lambda job: mark(job.graph),
        scope,
        choose_target,
        reference,
        cluster,
        recognize,
        report,
        integrate if request.method.path else differentiate,
        finalize,
        lambda job: unmark(job.graph),
        lambda job: simplify(job.graph),
    ]


def _checked_target(target: Any) -> Target:
    if isinstance(target, str):
        if target not in ("input", "argmax", "seed"):
            raise OptionError(
                f"target '{target}' is not one of input, argmax, seed, an index or a tuple of them"
            )
        return target
    if isinstance(target, bool) or not isinstance(target, int | np.integer | Sequence | np.ndarray):
        raise OptionError(f"target {target!r} is not an index, a tuple of indices, or a mode")
    if isinstance(target, int | np.integer):
        return int(target)
    return tuple(int(i) for i in target)


def _loaded_baseline(baseline: Any) -> Baseline:
    """Read a baseline given as a file; leave the other kinds as they are."""
    if isinstance(baseline, Mapping):
        return {str(name): np.asarray(value) for name, value in baseline.items()}
    if isinstance(baseline, int | float | np.ndarray | np.generic | list | tuple):
        return np.asarray(baseline)
    if isinstance(baseline, str) and baseline in ("zeros", "input"):
        return baseline
    if not isinstance(baseline, str | os.PathLike):
        raise OptionError(f"a baseline cannot be a {type(baseline).__name__}")
    try:
        loaded = np.load(baseline, allow_pickle=False)
    except FileNotFoundError:
        raise OptionError(
            f"baseline '{baseline}' is neither zeros, input, a number, nor a file that exists"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"cannot read the baseline '{baseline}': {error}") from None
    if isinstance(loaded, np.ndarray):
        return loaded
    return {name: loaded[name] for name in loaded.files}


__all__ = ["CompileError", "compile", "prepare"]
