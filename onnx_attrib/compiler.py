"""``compile()``: a model in, a model with attributions out. The pipeline is :func:`transform`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto

from onnx_attrib.errors import CompileError, OptionError, suggest
from onnx_attrib.job import Baseline, Choice, Job, Request, Target, Targets
from onnx_attrib.methods import METHODS, Method
from onnx_attrib.methods import get as method_named
from onnx_attrib.model_io import Source, load
from onnx_attrib.passes.apart import apart
from onnx_attrib.passes.average import average
from onnx_attrib.passes.bodies import TUNING, within_loops
from onnx_attrib.passes.cluster import cluster
from onnx_attrib.passes.describe import describe
from onnx_attrib.passes.differentiate import differentiate
from onnx_attrib.passes.finalize import finalize
from onnx_attrib.passes.front import front
from onnx_attrib.passes.late import late
from onnx_attrib.passes.legalize import legalize
from onnx_attrib.passes.localize import localize
from onnx_attrib.passes.merge import merge
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.perturb import perturb
from onnx_attrib.passes.place import place
from onnx_attrib.passes.postprocess import postprocess
from onnx_attrib.passes.precision import halve
from onnx_attrib.passes.quantized import mark, unmark
from onnx_attrib.passes.recognize import recognize
from onnx_attrib.passes.rectifiers import rectifiers
from onnx_attrib.passes.reference import reference
from onnx_attrib.passes.report import report
from onnx_attrib.passes.scope import scope
from onnx_attrib.passes.sizes import sizes
from onnx_attrib.passes.substitute import substitute
from onnx_attrib.passes.sums import sums
from onnx_attrib.passes.target import target as choose_target

Methods = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
"""One method, several, or several with options of their own."""
AXES, REDUCTIONS = ("channels", "last"), ("sum", "abs-max", "l2")
Reduce = str | Mapping[str | int, str]
"""``"AXIS=HOW"``, or how by axis."""


def compile(
    model: Source,
    method: Methods = "deeplift",
    *,
    inputs: Sequence[str] | str | None = None,
    output: str | None = None,
    target: Target = "input",
    targets: str | Sequence[int] | None = None,
    baseline: Baseline | str | os.PathLike[str] = "zeros",
    delta: bool = False,
    reduce: Reduce | None = None,
    normalize: bool = False,
    precision: str = "keep",
    provider: str = "portable",
    memory: float | None = None,
    dims: Mapping[str, int] | None = None,
    **method_options: Any,
) -> ModelProto:
    """Compile a model into one graph that computes its outputs and their attribution.

    Args:
        model: a path, the bytes of an .onnx file, or a ModelProto (left unchanged).
        method: a name from :func:`onnx_attrib.methods`. Several names share one forward pass;
            a mapping gives each its options.
        inputs: tensors to attribute to: graph inputs or any inner float tensors. Default: the
            float inputs that reach the output, else the outputs of the embeddings.
        output: the float tensor to explain. Default: the first float output.
        target: what S is. ``"input"``: an int64 graph input ``target``, [N] for an output (N, C)
            and [N, r-1] for rank r > 2, where a negative class is the predicted one; absent when
            the output holds one value a sample. ``"argmax"``: the largest entry of each sample.
            An integer or tuple: fixed. ``"seed"``: a graph input ``seed`` of the output's shape;
            S = Σ seed · output.
        targets: several targets at once instead of one, for an output (N, C): ``"top3"``, the
            three largest classes of each sample in falling order, or a list of classes. The
            attributions get an axis for them after the batch's.
        baseline: x̄, for methods that have a reference: ``"zeros"``, a number, an array (or the
            path of an .npy or .npz), a mapping of arrays by tensor name, or ``"input"``: a graph
            input ``<name>_baseline`` (batch 1 or N) for each model input that feeds the
            attributed tensors. Methods with a background take K samples: arrays [K, …], or K as
            the batch at run time.
        delta: add the output ``convergence_delta`` [N], Σ attribution − (S(x) − S(x̄)); only for
            methods that promise completeness.
        reduce: reduce an axis of the attribution, which stays with size 1: ``{axis: how}`` or
            ``"AXIS=HOW"``. Axis: ``"channels"`` (axis 1 of three or more), ``"last"`` (that of an
            embedding), or a number from 1, the targets' axis not counted. How: ``"sum"``,
            ``"abs-max"`` (max |a|) or ``"l2"`` (√Σ a²). The delta is that of the whole attribution.
        normalize: divide each sample's attribution (of each target) by its largest |a|, after
            reducing; zeros stay zeros.
        precision: ``"keep"``, or ``"fp16"``: compute in float16 where that is safe
            (:mod:`onnx_attrib.passes.precision`); inputs and outputs keep their types.
        provider: ``"portable"``, or ``"cuda"``: operators that have no CUDA kernel, in the model's
            own part too, are spelled by others (:mod:`onnx_attrib.passes.legalize`).
        memory: for methods with the option ``chunk``, which is then the largest with which a run
            takes at most so many MiB; an OptionError where one evaluation takes more.
        dims: the sizes of open dimensions that ``memory`` is reckoned for, by name. Default: one
            sample; other dimensions must be given.
        **method_options: the method's options, see :func:`onnx_attrib.methods`. Of several
            methods, those that have the option take it.

    Returns:
        A ModelProto (opset 21, IR 10) with the model's own inputs and outputs and an output
        ``<T>_attribution`` of T's shape for each attributed tensor T (``<T>_attribution_<method>``
        for each of several methods). Class activation maps have one channel.

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
        targets=targets,
        baseline=baseline,
        delta=delta,
        reduce=reduce,
        normalize=normalize,
        precision=precision,
        provider=provider,
        memory=memory,
        dims=dims,
        **method_options,
    )
    return finished(job)


def prepare(
    model: Source,
    method: Methods,
    *,
    inputs: Sequence[str] | str | None = None,
    output: str | None = None,
    target: Target = "input",
    targets: str | Sequence[int] | None = None,
    baseline: Baseline | str | os.PathLike[str] = "zeros",
    delta: bool = False,
    reduce: Reduce | None = None,
    normalize: bool = False,
    precision: str = "keep",
    provider: str = "portable",
    memory: float | None = None,
    dims: Mapping[str, int] | None = None,
    **method_options: Any,
) -> Job:
    """:func:`compile`, returning the job with its graph and notes, of which :func:`finished` makes
    the model."""
    choices = chosen(method, method_options)
    if delta and not any(choice.method.complete for choice in choices):
        complete = ", ".join(m.name for m in METHODS.values() if m.complete)
        raise OptionError(
            f"method '{choices[0].method.name}' does not promise to sum to the output difference; "
            f"delta is for: {complete}"
        )
    several = _checked_targets(targets)
    if several is not None and target != "input":
        raise OptionError("give 'target' or 'targets', not both")
    request = Request(
        choices=choices,
        inputs=(inputs,) if isinstance(inputs, str) else None if inputs is None else tuple(inputs),
        output=output,
        target=_checked_target(target),
        targets=several,
        baseline=_loaded_baseline(baseline),
        delta=delta,
        source="",
        reduce=checked_reduce(reduce),
        normalize=bool(normalize),
        precision=_checked_precision(precision),
        provider=checked_provider(provider),
        memory=_checked_memory(memory, choices),
        dims=dict(dims or {}),
    )
    return run(load(model), request)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cyclic garbage.

    It goes over the whole graph again and again as that grows, and finds nothing: a quarter of the
    time that models of 10,000 nodes take to compile (dense, DeepLIFT: 32 s with it, 24 s without;
    the memory that is taken at most is the same).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def finished(job: Job) -> ModelProto:
    """The compiled model, in the precision that was asked for."""
    model = job.graph.to_proto()
    if job.request.precision == "keep":
        return model
    return halve(model, [seed.name for seed in job.seeds], job.scope.output.name)


def chosen(method: Methods, options: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The methods asked for with their options; OptionError if one is unknown or named twice."""
    names = (method,) if isinstance(method, str) else method
    own = names if isinstance(names, Mapping) else {name: {} for name in names}
    found = {method_named(name): given for name, given in own.items()}
    if not found or len(found) != len(names):
        raise OptionError("no method was named" if not found else "a method is named twice")
    return tuple(
        resolved({one.name: (one, given) for one, given in found.items()}, options).values()
    )


def resolved(
    found: Mapping[str, tuple[Method, Mapping[str, Any]]], common: Mapping[str, Any]
) -> dict[str, Choice]:
    """Methods by label, each with its own options and those of ``common`` that it has.

    OptionError if none has an option; of a single method, with what it has instead.
    """
    common = _spelled(common)
    if len(found) == 1:
        ((label, (one, given)),) = found.items()
        return {label: Choice(*one.chosen({**common, **_spelled(given)}))}
    # What a method's own options make of it decides which of the common ones it has.
    made = {
        label: one.chosen({**{k: v for k, v in common.items() if one.has(k)}, **_spelled(given)})[0]
        for label, (one, given) in found.items()
    }
    for name in common:
        if not any(one.has(name) for one in made.values()):
            known = sorted({option.name for one in made.values() for option in one.options})
            raise OptionError(f"no method here has an option '{name}': {suggest(name, known)}")
    return {
        label: Choice(
            *one.chosen(
                {**{k: v for k, v in common.items() if made[label].has(k)}, **_spelled(given)}
            )
        )
        for label, (one, given) in found.items()
    }


def _spelled(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


@_uncollected()
def run(loaded: tuple[ModelProto, str], request: Request) -> Job:
    """Normalize the model and apply the passes."""
    model, digest = loaded
    request = replace(request, source=digest)
    job = Job(normalize(model), request, request.choices[0])
    transform(job)
    return job


def transform(job: Job) -> None:
    """Apply the passes: once to the model, once for each method and target, once to the result."""
    for apply in PREPARING:
        apply(job)
    for choice in job.request.choices:
        part = job.explaining(choice)
        for apply in COMPARING:
            apply(part)
        if part.method.perturbs:
            perturb(part)  # what is evaluated serves all targets
        else:
            for seed in part.seeds:
                part.seed = seed
                _means(part.method)(part)
        rectifiers(part)
        postprocess(part)
        finalize(part)
    job.request = replace(job.request, choices=tuple(part.choice for part in job.parts))
    for apply in FINISHING:
        apply(job)


def _means(method: Method) -> Pass:
    """How the method comes to its attributions."""
    if method.map:
        return localize
    return average if method.draws else differentiate


Pass = Callable[[Job], None]

PREPARING: tuple[Pass, ...] = (mark, scope, apart, choose_target)
COMPARING: tuple[Pass, ...] = (
    *(reference, cluster, recognize, merge),
    *(sums, front, substitute, report),
)
FINISHING: tuple[Pass, ...] = (
    *(unmark, legalize, place, sizes),
    *(*TUNING, within_loops, late, describe),
)


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


def checked_provider(provider: str) -> str:
    """What the result is made for; OptionError if it is unknown."""
    if provider not in ("portable", "cuda"):
        raise OptionError(f"provider '{provider}' is neither portable nor cuda")
    return provider


def _checked_precision(precision: str) -> str:
    if precision not in ("keep", "fp16"):
        raise OptionError(f"precision '{precision}' is neither keep nor fp16")
    return precision


def _checked_memory(memory: float | None, choices: Sequence[Choice]) -> float | None:
    if memory is None:
        return None
    if not memory > 0:
        raise OptionError(f"memory must be a number of MiB above 0, not {memory}")
    if not any("chunk" in choice.options for choice in choices):
        able = ", ".join(m.name for m in METHODS.values() if m.has("chunk"))
        raise OptionError(f"memory is for methods that evaluate in chunks: {able}")
    return float(memory)


def _checked_targets(targets: Any) -> Targets | None:
    if targets is None:
        return None
    if isinstance(targets, str):
        count = targets.removeprefix("top")
        if count == targets or not count.isdecimal() or int(count) < 1:
            raise OptionError(f"targets '{targets}' is neither topK, like top3, nor a list")
        return int(count)
    if not all(isinstance(k, int | np.integer) and not isinstance(k, bool) for k in targets):
        raise OptionError(f"targets {targets!r} are not whole numbers")
    if not len(targets):
        raise OptionError("targets is an empty list")
    return tuple(int(k) for k in targets)


def checked_reduce(reduce: Any) -> dict[str | int, str]:
    """How each axis is reduced, from ``"AXIS=HOW"`` or a mapping; OptionError if one is unknown."""
    if reduce is None:
        return {}
    if isinstance(reduce, str):
        axis, separator, how = reduce.partition("=")
        if not separator:
            raise OptionError(f"reduce '{reduce}' is not of the form AXIS=HOW")
        reduce = {axis.strip(): how.strip()}
    if not isinstance(reduce, Mapping):
        raise OptionError(f"reduce {reduce!r} is neither AXIS=HOW nor a mapping of axes")
    found: dict[str | int, str] = {}
    for axis, how in reduce.items():
        spelled = str(how).lower().replace("_", "-")
        if spelled not in REDUCTIONS:
            raise OptionError(f"unknown reduction '{how}': {suggest(spelled, REDUCTIONS)}")
        found[_checked_axis(axis)] = spelled
    return found


def _checked_axis(axis: Any) -> str | int:
    if axis in AXES:
        return str(axis)
    number = int(axis) if str(axis).isdecimal() else 0
    if number < 1:
        raise OptionError(
            f"there is no axis '{axis}' to reduce: {suggest(str(axis), AXES)} (or a number from 1)"
        )
    return number


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


__all__ = ["CompileError", "checked_reduce", "chosen", "compile", "finished", "prepare", "resolved"]
