"""Run a compiled model in ONNX Runtime and read its explanation.

A compiled model is plain ONNX and needs none of this; :class:`Explainer` adds what is tedious by
hand: dtypes and batch axes, targets checked against the classes, outputs told from attributions.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from onnx_attrib.errors import (
    CompileError,
    ModelError,
    OptionError,
    RuntimeMissingError,
    suggest,
)
from onnx_attrib.model_io import Source, is_large, save

Array = npt.NDArray[Any]
Arrays = Mapping[str, npt.ArrayLike]
Provider = str | tuple[str, Mapping[str, Any]]

PREFIX = "onnx_attrib."
"""Of the metadata that says how a model was compiled."""
_SUFFIX = "_attribution"
_DELTA = "convergence_delta"
_ERRORS_ONLY = 3
"""ONNX Runtime's severity: its warnings are about graphs, and of no use to who runs one."""


@dataclass(frozen=True)
class Port:
    """One input or output of the model: ``shape`` holds a name or None where it is dynamic."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        kind = "non-numeric" if self.dtype is None else str(self.dtype)
        return f"{self.name} {kind} {show_shape(self.shape)}"


@dataclass(frozen=True)
class Recipe:
    """How a model was compiled, read from its ``onnx_attrib.*`` metadata.

    ``inputs``: the attributed tensors; ``output``: the explained one, and ``output_shape`` its
    shape (None if unknown); ``target``: ``"input"``, ``"argmax"``, ``"seed"``, an index or a
    tuple; ``baseline``: ``"zeros"``, ``"input"``, a number, ``"array"``, or None for methods
    without a reference; ``source_sha256``: of the model it was compiled from.
    """

    method: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...]
    output: str
    output_shape: tuple[int | str | None, ...] | None
    target: str | int | tuple[int, ...]
    baseline: str | float | None
    version: str
    source_sha256: str

    @staticmethod
    def read(metadata: Mapping[str, str]) -> Recipe | None:
        """The recipe in a model's metadata; None if onnx-attrib did not compile the model.

        Raises ModelError if the entries are there but damaged.
        """
        found = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        if "method" not in found:
            return None
        try:
            target = json.loads(found["target"])
            shape = json.loads(found.get("output_shape", "null"))
            return Recipe(
                method=found["method"],
                options=json.loads(found["options"]),
                inputs=tuple(json.loads(found["inputs"])),
                output=found["output"],
                output_shape=None if shape is None else tuple(shape),
                target=tuple(target) if isinstance(target, list) else target,
                baseline=json.loads(found["baseline"]),
                version=found.get("version", ""),
                source_sha256=found.get("source_sha256", ""),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the model's onnx_attrib metadata is damaged: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON types."""
        return {
            "version": self.version,
            "method": self.method,
            "options": dict(self.options),
            "inputs": list(self.inputs),
            "output": self.output,
            "target": list(self.target) if isinstance(self.target, tuple) else self.target,
            "baseline": self.baseline,
            "source_sha256": self.source_sha256,
        }


@dataclass(frozen=True)
class Explanation:
    """What a compiled model says of one batch of N samples.

    ``attributions``: by tensor name, each of the tensor's shape. ``outputs``: the model's own
    outputs by name. ``delta``: ``convergence_delta``, [N], or None if the model was compiled
    without it. ``prediction``: the largest class at each position, [N] (or [N, …] for outputs of
    rank > 2); None for outputs with one value a sample. ``target``: what was explained, [N] (or
    [N, r-1] for rank r > 2); None for a seed and for outputs with one value a sample. ``score``:
    S, [N]. Prediction, score and a target chosen by the model are None where the explained
    tensor is not among the model's outputs.
    """

    attributions: dict[str, Array]
    outputs: dict[str, Array]
    delta: Array | None = None
    prediction: Array | None = None
    target: Array | None = None
    score: Array | None = None
    inputs: dict[str, Array] = field(default_factory=dict, repr=False)
    """What was fed, in the model's dtypes and shapes."""


class Explainer:
    """A compiled model, ready to run.

    >>> explain = Explainer("model.deeplift.onnx")
    >>> result = explain(x, target=3)
    >>> result.attributions["x"], result.outputs["logits"]

    ``method``, ``options``, ``output``, ``target`` and ``baseline`` say how it was compiled,
    ``attributed`` what is attributed, ``inputs`` and ``outputs`` are the model's own.
    Calls from several threads are safe.
    """

    def __init__(self, model: Source, providers: Sequence[Provider] | None = None) -> None:
        """Load a model that :func:`onnx_attrib.compile` made.

        Args:
            model: a path (also of a model with weights beside it), the bytes of a file, or a
                ModelProto.
            providers: ONNX Runtime's execution providers, by falling priority. Default: CUDA if
                this ONNX Runtime has it, else CPU.

        Raises:
            ModelError: the file is missing, damaged, or not compiled by onnx-attrib.
            OptionError: a provider that this ONNX Runtime does not have.
            RuntimeMissingError: ONNX Runtime is not installed.
        """
        ort = onnxruntime()
        chosen = _providers(ort, providers)
        name = f"'{model}'" if isinstance(model, str | os.PathLike) else "the model"
        if isinstance(model, ModelProto):
            # Before the time that a session takes.
            _recipe({prop.key: prop.value for prop in model.metadata_props}, name)
        self._session = _session(ort, model, chosen, name)
        self.recipe = _recipe(self._session.get_modelmeta().custom_metadata_map, name)
        ports = [_port(argument) for argument in self._session.get_inputs()]
        names = {port.name for port in ports}
        extra = {f"{n}_baseline" for n in names} if self.recipe.baseline == "input" else set()
        chooser = self.recipe.target if self.recipe.target in ("input", "seed") else None
        if chooser == "input":
            chooser = "target" if self._has_classes() else None
        self._chooser = next((p for p in ports if p.name == chooser), None)
        self._baselines = {
            p.name.removesuffix("_baseline"): p
            for p in ports
            if p.name in extra and p.name in names
        }
        self.inputs = [p for p in ports if p.name not in extra and p is not self._chooser]
        """The source model's inputs."""
        added = {*(f"{n}{_SUFFIX}" for n in self.recipe.inputs), _DELTA}
        results = [_port(argument) for argument in self._session.get_outputs()]
        self.outputs = [port for port in results if port.name not in added]
        """The source model's outputs."""
        self._results = [port.name for port in results]

    def _has_classes(self) -> bool:
        shape = self.recipe.output_shape
        if shape is None:
            return True
        return len(shape) > 2 or (len(shape) == 2 and shape[1] != 1)

    # -- how it was compiled -------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The method's name."""
        return self.recipe.method

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's options."""
        return self.recipe.options

    @property
    def attributed(self) -> tuple[str, ...]:
        """Names of the attributed tensors, the keys of ``attributions``."""
        return self.recipe.inputs

    @property
    def output(self) -> str:
        """The explained tensor's name."""
        return self.recipe.output

    @property
    def target(self) -> str | int | tuple[int, ...]:
        """``"input"``, ``"argmax"``, ``"seed"``, or the target fixed at compile time."""
        return self.recipe.target

    @property
    def takes_target(self) -> bool:
        """Whether a call chooses the target."""
        return self._chooser is not None and self._chooser.name == "target"

    @property
    def takes_seed(self) -> bool:
        """Whether a call must give a seed."""
        return self._chooser is not None and self._chooser.name == "seed"

    @property
    def baseline(self) -> str | float | None:
        """``"zeros"``, ``"input"``, a number, ``"array"``, or None without a reference."""
        return self.recipe.baseline

    @property
    def baselines(self) -> tuple[str, ...]:
        """The inputs that a call must give a baseline for."""
        return tuple(self._baselines)

    @property
    def metadata(self) -> dict[str, str]:
        """The model's whole metadata, that of its source included."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, by falling priority."""
        return list(self._session.get_providers())

    def __repr__(self) -> str:
        tensors = ", ".join(self.attributed)
        return f"<Explainer {self.method}: {self.output} attributed to {tensors}>"

    # -- running -------------------------------------------------------------------------------

    def __call__(
        self,
        inputs: npt.ArrayLike | Arrays | None = None,
        /,
        *,
        target: npt.ArrayLike | None = None,
        baseline: npt.ArrayLike | Arrays | None = None,
        seed: npt.ArrayLike | None = None,
        **named: npt.ArrayLike,
    ) -> Explanation:
        """Explain a batch.

        Args:
            inputs: the array of a model with one input, or arrays by input name. Numbers are
                cast to the input's dtype; one sample without a batch axis gets one.
            target: a class for all samples or one for each, [N]; −1 is the predicted class,
                which is also the default. For an output of rank r > 2 a tuple of r−1 indices,
                or [N, r−1].
            baseline: for models compiled with ``baseline="input"``: a number, an array (batch 1
                or N) or arrays by input name.
            seed: for models compiled with ``target="seed"``: of the output's shape.
            **named: arrays by input name.

        Returns:
            The attributions, the model's outputs, and what was explained.

        Raises:
            OptionError: an input that is missing, unknown, or of the wrong dtype or shape; a
                target that the output does not have.
            CompileError: ONNX Runtime failed.
        """
        feeds = self._feeds(inputs, named)
        batch = self._batch(feeds)
        fed = dict(feeds)
        self._add_target(feeds, target, batch)
        self._add_baselines(feeds, baseline, batch)
        self._add_seed(feeds, seed, batch)
        values = dict(zip(self._results, self._run(feeds), strict=True))
        attributions = {name: values[f"{name}{_SUFFIX}"] for name in self.attributed}
        outputs = {port.name: values[port.name] for port in self.outputs}
        chosen = feeds.get("target") if self.takes_target else None
        if chosen is not None:
            self._check_after(chosen, outputs, attributions)
        prediction, explained, score = self._reading(outputs, chosen, feeds.get("seed"))
        return Explanation(
            attributions=attributions,
            outputs=outputs,
            delta=values.get(_DELTA),
            prediction=prediction,
            target=explained,
            score=score,
            inputs=fed,
        )

    def _run(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return list(self._session.run(self._results, dict(feeds)))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise CompileError(f"ONNX Runtime failed to run the model: {_line(error)}") from None

    def _feeds(
        self, inputs: npt.ArrayLike | Arrays | None, named: Mapping[str, npt.ArrayLike]
    ) -> dict[str, Array]:
        given: dict[str, Any] = dict(named)
        names = [port.name for port in self.inputs]
        if isinstance(inputs, Mapping):
            twice = given.keys() & inputs.keys()
            if twice:
                raise OptionError(f"input '{min(twice)}' is given twice")
            given.update(inputs)
        elif inputs is not None:
            free = [name for name in names if name not in given]
            if len(free) != 1:
                raise OptionError(
                    f"the model has {len(names)} inputs ({', '.join(names)}): give arrays by name"
                )
            given[free[0]] = inputs
        for name in given:
            if name not in names:
                raise OptionError(f"the model has no input '{name}': {suggest(name, names)}")
        missing = [str(port) for port in self.inputs if port.name not in given]
        if missing:
            raise OptionError(f"missing input: {'; '.join(missing)}")
        return {port.name: fit(port, given[port.name]) for port in self.inputs}

    def _batch(self, feeds: Mapping[str, Array]) -> int | None:
        """N, read off an input that shares the batch axis of what is chosen per sample."""
        wanted = self._chooser.shape[0] if self._chooser and self._chooser.shape else None
        if isinstance(wanted, int):
            return wanted
        sizes = {
            dim: feeds[port.name].shape[axis]
            for port in reversed(self.inputs)
            for axis, dim in enumerate(port.shape)
            if isinstance(dim, str)
        }
        if isinstance(wanted, str) and wanted in sizes:
            return sizes[wanted]
        attributed = [p for p in self.inputs if p.name in self.attributed] or self.inputs
        return next((feeds[p.name].shape[0] for p in attributed if feeds[p.name].ndim), None)

    # -- target, baseline, seed ----------------------------------------------------------------

    def _add_target(
        self, feeds: dict[str, Array], target: npt.ArrayLike | None, batch: int | None
    ) -> None:
        if not self.takes_target:
            if target is not None:
                self._refuse_target(target)
            return
        assert self._chooser is not None
        columns = self._chooser.shape[1] if len(self._chooser.shape) > 1 else None
        if target is None:
            if columns is not None:
                raise OptionError(
                    f"output '{self.output}' has {columns} axes behind the batch: give the target "
                    f"as a tuple of {columns} indices (−1 first is the predicted class)"
                )
            target = -1
        indices = _integers(target, "target")
        if batch is None:
            batch = indices.shape[0] if indices.ndim else 1
        wanted = (batch,) if columns is None else (batch, int(columns))
        fits = indices.ndim <= len(wanted) and (
            columns is None or indices.shape[-1:] == wanted[-1:]
        )
        try:
            if not fits:
                raise ValueError
            feeds["target"] = np.ascontiguousarray(np.broadcast_to(indices, wanted))
        except ValueError:
            raise OptionError(
                f"target has shape {list(indices.shape)}; it must be "
                + (
                    f"one class, or one for each of the {batch} samples"
                    if columns is None
                    else f"{columns} indices, or {columns} for each of the {batch} samples"
                )
            ) from None
        shape = self.recipe.output_shape
        if shape is not None:
            _check_range(feeds["target"], shape, self.output)

    def _refuse_target(self, target: npt.ArrayLike) -> None:
        fixed = self.recipe.target
        if fixed == "input" or not self._has_classes():
            if np.all(np.isin(_integers(target, "target"), (0, -1))):
                return
            raise OptionError(
                f"output '{self.output}' holds one value a sample: it has no target {target}"
            )
        if not isinstance(fixed, str) and np.array_equal(
            np.atleast_1d(_integers(target, "target")), np.atleast_1d(np.asarray(fixed))
        ):
            return
        how = {"seed": "with a seed", "argmax": "for its largest output"}
        raise OptionError(
            f"the model was compiled {how.get(str(fixed), f'for target {fixed}')}; "
            "to choose the target at run time, compile it with target 'input'"
        )

    def _add_baselines(
        self,
        feeds: dict[str, Array],
        baseline: npt.ArrayLike | Arrays | None,
        batch: int | None,
    ) -> None:
        if not self._baselines:
            if baseline is not None:
                raise OptionError(
                    f"method '{self.method}' has no baseline"
                    if self.recipe.baseline is None
                    else "the baseline was fixed when the model was compiled; to give one at run "
                    "time, compile it with baseline 'input'"
                )
            return
        names = list(self._baselines)
        if baseline is None:
            raise OptionError(
                f"the model takes a baseline for {', '.join(names)}: give a number, an array or "
                "arrays by name"
            )
        if isinstance(baseline, Mapping):
            given = {str(k).removesuffix("_baseline"): v for k, v in baseline.items()}
            for name in given:
                if name not in names:
                    raise OptionError(f"no baseline for '{name}': {suggest(name, names)}")
            missing = [name for name in names if name not in given]
            if missing:
                raise OptionError(f"missing baseline: {', '.join(missing)}")
        else:
            array = np.asarray(baseline)
            if array.ndim and len(names) > 1:
                raise OptionError(
                    f"the model takes {len(names)} baselines ({', '.join(names)}): give a number "
                    "or arrays by name"
                )
            given = dict.fromkeys(names, array)
        for name, port in self._baselines.items():
            like, array = feeds[name], np.asarray(given[name])
            if array.ndim == 0:
                array = np.broadcast_to(array, (1, *like.shape[1:]) if like.ndim else ())
            array = fit(Port(f"baseline of '{name}'", port.dtype, (None, *like.shape[1:])), array)
            if array.ndim and array.shape[0] not in (1, like.shape[0]):
                raise OptionError(
                    f"the baseline of '{name}' holds {array.shape[0]} samples; it must hold 1 or "
                    f"{like.shape[0]}"
                )
            if not np.isfinite(array).all():
                raise OptionError(f"the baseline of '{name}' has entries that are not finite")
            feeds[port.name] = array

    def _add_seed(
        self, feeds: dict[str, Array], seed: npt.ArrayLike | None, batch: int | None
    ) -> None:
        if not self.takes_seed:
            if seed is not None:
                raise OptionError("the model takes no seed; compile it with target 'seed'")
            return
        if seed is None:
            raise OptionError(
                f"the model takes a seed, S = Σ seed · output, of the shape of '{self.output}'"
            )
        assert self._chooser is not None
        array = fit(self._chooser, seed)
        if array.ndim and array.shape[0] == 1 and batch not in (None, 1):
            array = np.repeat(array, int(batch or 1), axis=0)
        if array.ndim and batch is not None and array.shape[0] != batch:
            raise OptionError(f"seed holds {array.shape[0]} samples; the inputs hold {batch}")
        feeds["seed"] = array

    def _check_after(
        self, target: Array, outputs: Mapping[str, Array], attributions: Mapping[str, Array]
    ) -> None:
        """Check a target against classes that only the run has counted."""
        shape = self.recipe.output_shape
        if shape is not None and all(isinstance(size, int) for size in shape[1:]):
            return
        if self.output in outputs:
            _check_range(target, outputs[self.output].shape, self.output)
        elif any(a.size and np.isnan(a).all() for a in attributions.values()):
            raise OptionError(
                f"target {target.tolist()} gives no attribution: it is out of the range of output "
                f"'{self.output}', or the model's own values are not finite"
            )

    def _reading(
        self, outputs: Mapping[str, Array], chosen: Array | None, seed: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Prediction, target and score, as far as the outputs show them."""
        y = outputs.get(self.output)
        if y is None:
            target = None if chosen is None or (chosen < 0).any() else chosen
            return None, target, None
        if not y.size or y.ndim < 1:
            return None, None, y.reshape(1) if y.size else None
        classes = y.ndim > 2 or (y.ndim == 2 and y.shape[1] > 1)
        prediction = np.argmax(y, axis=1) if classes else None
        if seed is not None:
            return prediction, None, (seed * y).reshape(len(y), -1).sum(axis=1)
        if prediction is None:
            return None, None, y.reshape(len(y), -1).sum(axis=1)
        if chosen is None and self.recipe.target == "argmax":
            flat = y.reshape(len(y), -1).argmax(axis=1)
            index = np.stack(np.unravel_index(flat, y.shape[1:]), axis=1)
        else:
            fixed = np.asarray(self.recipe.target) if chosen is None else chosen
            index = np.broadcast_to(
                fixed if chosen is None or chosen.ndim == 2 else chosen[:, None],
                (len(y), y.ndim - 1),
            ).copy()
            places = (np.arange(len(y)), *index[:, 1:].T)
            index[:, 0] = np.where(index[:, 0] < 0, prediction[places], index[:, 0])
        score = y[(np.arange(len(y)), *index.T)]
        return prediction, index[:, 0] if y.ndim == 2 else index, score


# -- arrays to inputs ------------------------------------------------------------------------------


def fit(port: Port, value: Any) -> Array:
    """``value`` as an array of the port's dtype and rank.

    Numbers are cast (fractions never to integers). A batch axis or axes of size 1 that are
    missing are added: [28, 28] and [7, 28, 28] both fit [N, 1, 28, 28]. Raises OptionError
    otherwise.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{port.name} is not an array: {_line(error)}") from None
    if port.dtype is not None:
        array = _cast(port, array)
    shape = _completed(array.shape, port.shape)
    if shape is None:
        raise OptionError(
            f"{port.name} has shape {list(array.shape)}; the model takes {show_shape(port.shape)}"
        )
    return np.ascontiguousarray(array).reshape(shape)


def _completed(
    shape: tuple[int, ...], wanted: Sequence[int | str | None]
) -> tuple[int, ...] | None:
    """``shape`` with the axes of size 1 that ``wanted`` has more, or None if it does not fit."""
    if shape_fits(shape, wanted):
        return shape
    long = [axis for axis, dim in enumerate(wanted) if dim != 1]
    for axes in (list(range(1, len(wanted))), long, [axis for axis in long if axis > 0]):
        if len(axes) < len(wanted) and shape_fits(shape, [wanted[axis] for axis in axes]):
            sizes = dict(zip(axes, shape, strict=True))
            complete = tuple(sizes.get(axis, 1) for axis in range(len(wanted)))
            if shape_fits(complete, wanted):
                return complete
    return None


def shape_fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether an array of ``shape`` can be fed where ``wanted`` is declared."""
    return len(shape) == len(wanted) and all(
        have == want or not isinstance(want, int) for have, want in zip(shape, wanted, strict=True)
    )


def _cast(port: Port, array: Array) -> Array:
    wanted = port.dtype
    assert wanted is not None
    if array.dtype == wanted:
        return array
    whole = np.dtype(wanted).kind in "iub"
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise OptionError(f"{port.name} must be {wanted} numbers, not {array.dtype}")
    if whole and array.dtype.kind == "f":
        raise OptionError(f"{port.name} must be {wanted}, not {array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if whole and array.dtype.kind in "iu" and not np.array_equal(result, array):
        raise OptionError(f"{port.name} holds numbers that {wanted} cannot")
    return result


def _integers(value: npt.ArrayLike, name: str) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} is not an array: {_line(error)}") from None
    if array.dtype.kind not in "iu":
        raise OptionError(f"{name} must be whole numbers, not {value!r}")
    return array.astype(np.int64)


def _check_range(target: Array, shape: Sequence[int | str | None], output: str) -> None:
    """Check indices [N] or [N, r-1] against an output's shape; a negative class is predicted."""
    columns = target[:, None] if target.ndim == 1 else target
    for axis, column in enumerate(columns.T, start=1):
        size = shape[axis] if axis < len(shape) else None
        bad = column[(column < 0) & (axis > 1)]
        if isinstance(size, int):
            bad = np.concatenate([bad, column[column >= size]])
        if bad.size:
            what = "classes" if axis == 1 else f"entries along axis {axis}"
            raise OptionError(
                f"target {bad[0]} is out of range: output '{output}' has {size} {what} "
                f"(0 to {size - 1 if isinstance(size, int) else '…'}"
                + (", or −1 for the predicted one)" if axis == 1 else ")")
            )


def show_shape(shape: Sequence[int | str | None]) -> str:
    """A shape as text: ``[N, 3, 224, 224]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


# -- ONNX Runtime ----------------------------------------------------------------------------------


def onnxruntime() -> ModuleType:
    """ONNX Runtime, or RuntimeMissingError that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        found = getattr(error, "name", None) == "onnxruntime"
        raise RuntimeMissingError(
            "running a model needs ONNX Runtime: pip install onnx-attrib[cpu] (or [gpu])"
            if found
            else f"ONNX Runtime cannot be loaded: {_line(error)}"
        ) from None
    return onnxruntime


def _providers(ort: ModuleType, wanted: Sequence[Provider] | None) -> list[Any]:
    available = list(ort.get_available_providers())
    if wanted is None:
        preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
        return [name for name in preferred if name in available]
    if isinstance(wanted, str):
        wanted = [wanted]
    for provider in wanted:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise OptionError(
                f"this ONNX Runtime has no provider '{name}': {suggest(name, available)}"
            )
    return list(wanted)


def _session(ort: ModuleType, model: Source, providers: list[Any], name: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if isinstance(model, str | os.PathLike):
        try:
            with open(model, "rb"):
                pass
        except OSError as error:
            raise ModelError(f"cannot read {name}: {error.strerror or error}") from None
        source: str | bytes = os.fspath(model)
    elif isinstance(model, bytes):
        source = model
    elif not is_large(model):
        source = model.SerializeToString()
    else:
        # Past a protobuf message's limit ONNX Runtime reads files only.
        with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
            path = os.path.join(folder, "model.onnx")
            save(model, path)
            return _session(ort, path, providers, name)
    try:
        return ort.InferenceSession(source, sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        _refuse_uncompiled(model, name)
        raise ModelError(f"ONNX Runtime cannot load {name}: {_line(error)}") from None


def _refuse_uncompiled(model: Source, name: str) -> None:
    """Say that a model was never compiled, where that explains more than a failed session."""
    try:
        if isinstance(model, str | os.PathLike):
            model = onnx.load(model, load_external_data=False)
        elif isinstance(model, bytes):
            model = onnx.load_from_string(model)
    except Exception:  # not a model at all: the session's error says so
        return
    if model.HasField("graph"):
        _recipe({prop.key: prop.value for prop in model.metadata_props}, name)


def _recipe(metadata: Mapping[str, str], name: str) -> Recipe:
    recipe = Recipe.read(metadata)
    if recipe is None:
        raise ModelError(
            f"{name} was not compiled by onnx-attrib; first: onnx-attrib compile MODEL.onnx"
        )
    return recipe


def _port(argument: Any) -> Port:
    kind = str(argument.type)
    shape = argument.shape or ()
    return Port(str(argument.name), _DTYPES.get(kind), tuple(shape))


def _bfloat16() -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)  # type: ignore[no-any-return]


_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": _bfloat16(),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({np.dtype(t).name})": np.dtype(t) for t in ("i1", "i2", "i4", "i8")},
    **{f"tensor({np.dtype(t).name})": np.dtype(t) for t in ("u1", "u2", "u4", "u8")},
}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


__all__ = ["Explainer", "Explanation", "Port", "Recipe", "fit", "onnxruntime", "show_shape"]
