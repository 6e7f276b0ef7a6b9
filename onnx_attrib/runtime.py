"""Run a compiled model in ONNX Runtime and read its explanation.

A compiled model is plain ONNX and needs none of this; :class:`Explainer` adds what is tedious by
hand: dtypes and batch axes, targets checked against the classes, outputs told from attributions,
batches larger than memory, sessions that are shared, tensors that stay on their device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from onnx import ModelProto

from onnx_attrib.capture import check_capturable, with_capture
from onnx_attrib.device import Captured, Resident, fitted, on_host, taken
from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.feeds import Array, Port, check_range, fit, integers
from onnx_attrib.methods import get as method_named
from onnx_attrib.model_io import Source
from onnx_attrib.runner import Feeds, Runner, opened
from onnx_attrib.session import Provider, onnxruntime, port_of, providers_for, recipe_of

Given = Any
"""An array or what numpy makes one of, an OrtValue, or an object with ``__dlpack__``."""
Outputs = Literal["numpy", "ortvalue"]


@dataclass(frozen=True)
class Explanation:
    """What a compiled model says of one batch of N samples.

    ``attributions``: by tensor name, each of the tensor's shape. ``outputs``: the model's own
    outputs by name. ``delta``: ``convergence_delta``, [N], or None if the model was compiled
    without it. ``by_method`` and ``delta_by_method``: attributions and deltas of each method;
    ``attributions`` and ``delta`` are those of the first. ``prediction``: the largest class at
    each position, [N] (or [N, …] for outputs of rank > 2); None for outputs with one value a
    sample. ``target``: what was explained, [N] (or [N, r-1] for rank r > 2); None for a seed and
    for outputs with one value a sample. ``score``: S, [N]. Prediction, score and a target chosen
    by the model are None where the explained tensor is not among the model's outputs. Where a
    model explains k targets at once, target, score and deltas are [N, k], and attributions have an
    axis of k after the batch's. Of a call with ``outputs="ortvalue"`` attributions, outputs and
    deltas are OrtValues, and prediction, target and score are None.
    """

    attributions: dict[str, Any]
    outputs: dict[str, Any]
    delta: Any = None
    prediction: Array | None = None
    target: Array | None = None
    score: Array | None = None
    inputs: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was fed, in the model's dtypes and shapes; what is on a device as it was given."""
    by_method: dict[str, dict[str, Any]] = field(default_factory=dict)
    delta_by_method: dict[str, Any] = field(default_factory=dict)


class Explainer:
    """A compiled model, ready to run.

    >>> explain = Explainer("model.deeplift.onnx")
    >>> result = explain(x, target=3)
    >>> result.attributions["x"], result.outputs["logits"]

    ``methods``, ``options``, ``output``, ``target``, ``targets`` and ``baseline`` say how it was
    compiled (``recipe`` has it all), ``attributed`` what is attributed, ``inputs`` and ``outputs``
    are the model's own. Calls from several threads are safe. Explainers of one unchanged file with
    the same settings share a session while one of them lives.
    """

    def __init__(
        self,
        model: Source,
        providers: Sequence[Provider] | None = None,
        *,
        threads: int | None = None,
        session_options: Any = None,
        cuda_graph: bool = False,
        max_batch: int | None = None,
    ) -> None:
        """Load a model that :func:`onnx_attrib.compile` made.

        Args:
            model: a path (also of a model with weights beside it), the bytes of a file, or a
                ModelProto.
            providers: ONNX Runtime's execution providers, by falling priority, each a name or a
                name with options: ``("CUDAExecutionProvider", {"device_id": 1})``. Default: CUDA
                if this ONNX Runtime has it, else CPU.
            threads: how many threads an operator may use on the CPU. Default: ONNX Runtime's.
            session_options: an ``onnxruntime.SessionOptions`` to use as it is.
            cuda_graph: record the run as a CUDA graph and replay it: for models of fixed shapes
                without control flow. Calls then wait for each other.
            max_batch: run larger batches in parts of this size. A batch that memory does not
                suffice for is halved until it does, if the compiler found that samples do not
                depend on each other (as it does for nearly all models) or ``max_batch`` is given.

        Raises:
            ModelError: the file is missing, damaged, or not compiled by onnx-attrib.
            OptionError: a provider that this ONNX Runtime does not have, settings that exclude
                each other, a model that a CUDA graph cannot hold.
            RuntimeMissingError: ONNX Runtime is not installed.
        """
        ort = onnxruntime()
        if max_batch is not None and (isinstance(max_batch, bool) or max_batch < 1):
            raise OptionError(f"max_batch must be a whole number from 1, not {max_batch!r}")
        chosen = providers_for(ort, providers)
        if cuda_graph:
            chosen = with_capture(chosen)
        name = f"'{model}'" if isinstance(model, str | os.PathLike) else "the model"
        if isinstance(model, ModelProto):
            # Before the time that a session takes.
            recipe_of({prop.key: prop.value for prop in model.metadata_props}, name)
        self._session = opened(ort, model, chosen, name, threads, session_options, cuda_graph)
        self.recipe = recipe_of(self._session.get_modelmeta().custom_metadata_map, name)
        ports = [port_of(argument) for argument in self._session.get_inputs()]
        names = {port.name for port in ports}
        extra = {f"{n}_baseline" for n in names} if self.recipe.baseline == "input" else set()
        chooser = self.recipe.target if self.recipe.target in ("input", "seed") else None
        if chooser == "input":
            chooses = self._has_classes() and self.recipe.targets is None
            chooser = "target" if chooses else None
        self._chooser = next((p for p in ports if p.name == chooser), None)
        self._baselines = {
            p.name.removesuffix("_baseline"): p
            for p in ports
            if p.name in extra and p.name in names
        }
        self.inputs = [p for p in ports if p.name not in extra and p is not self._chooser]
        """The source model's inputs."""
        added = {self.recipe.delta(method) for method in self.methods}
        added |= {self.recipe.attribution(t, m) for t in self.recipe.inputs for m in self.methods}
        results = [port_of(argument) for argument in self._session.get_outputs()]
        self.outputs = [port for port in results if port.name not in added]
        """The source model's outputs."""
        self._runner = Runner(
            self._session,
            [*self.inputs, *([self._chooser] if self._chooser else [])],
            results,
            batch=self._batch_symbol(),
            baselines={} if self.background else self._baselines,
            limit=max_batch,
            halves=max_batch is not None or self.recipe.apart,
        )
        if cuda_graph:
            check_capturable(model, [*ports, *results])
            self._runner.captured = Captured(self._session, ports, results)

    def _batch_symbol(self) -> str | None:
        """What the batch axis is called in shapes; None where its size is fixed."""
        shape = self.recipe.output_shape if self._chooser is None else self._chooser.shape
        return str(shape[0]) if shape and isinstance(shape[0], str) else None

    def _has_classes(self) -> bool:
        shape = self.recipe.output_shape
        if shape is None:
            return True
        return len(shape) > 2 or (len(shape) == 2 and shape[1] != 1)

    # -- how it was compiled -------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The method's name; of several, the names with commas between."""
        return self.recipe.method

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, the keys of ``by_method``."""
        return tuple(self.recipe.methods)

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's options; of several, the options of each by name."""
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
    def targets(self) -> int | tuple[int, ...] | None:
        """How many of the largest classes are explained at once, or which ones; None for one."""
        return self.recipe.targets

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
    def background(self) -> bool:
        """Whether the baseline is a background of K samples, [K, …]."""
        return any(method_named(name).background for name in self.methods)

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
        inputs: Given = None,
        /,
        *,
        target: Given = None,
        baseline: Given = None,
        seed: Given = None,
        outputs: Outputs = "numpy",
        **named: Given,
    ) -> Explanation:
        """Explain a batch.

        Args:
            inputs: the array of a model with one input, or arrays by input name. Numbers are
                cast to the input's dtype; one sample without a batch axis gets one. An OrtValue,
                or a DLPack object on a device, is read there without a copy, and must be of the
                input's dtype and shape; the same holds for target, baseline and seed.
            target: a class for all samples or one for each, [N]; −1 is the predicted class,
                which is also the default. For an output of rank r > 2 a tuple of r−1 indices,
                or [N, r−1].
            baseline: for models compiled with ``baseline="input"``: a number, an array (batch 1
                or N; for a background any number of samples) or arrays by input name.
            seed: for models compiled with ``target="seed"``: of the output's shape.
            outputs: ``"numpy"``, or ``"ortvalue"`` to leave the results on the session's device:
                OrtValues, which are DLPack objects (``torch.from_dlpack(value)``).
            **named: arrays by input name.

        Returns:
            The attributions, the model's outputs, and what was explained.

        Raises:
            OptionError: an input that is missing, unknown, or of the wrong dtype or shape; a
                target that the output does not have.
            CompileError: ONNX Runtime failed.
        """
        if outputs not in ("numpy", "ortvalue"):
            raise OptionError(f"outputs '{outputs}' is neither numpy nor ortvalue")
        feeds = self._feeds(inputs, named)
        batch = self._batch(feeds)
        fed = {k: v.owner if isinstance(v, Resident) else v for k, v in feeds.items()}
        self._add_target(feeds, target, batch)
        self._add_baselines(feeds, baseline, batch)
        self._add_seed(feeds, seed, batch)
        whole = outputs == "ortvalue"
        found = self._runner.on_device(feeds) if whole else self._runner.on_host(feeds)
        values = dict(zip(self._runner.names, found, strict=True))
        by_method = {
            method: {
                name: values[self.recipe.attribution(name, method)] for name in self.attributed
            }
            for method in self.methods
        }
        deltas = {
            method: values[self.recipe.delta(method)]
            for method in self.methods
            if self.recipe.delta(method) in values
        }
        first = self.methods[0]
        attributions = by_method[first]
        own = {port.name: values[port.name] for port in self.outputs}
        reading: tuple[Array | None, Array | None, Array | None] = (None, None, None)
        if not whole:
            chosen = on_host(feeds.get("target")) if self.takes_target else None
            if chosen is not None:
                self._check_after(chosen, own, attributions)
            reading = self._reading(own, chosen, on_host(feeds.get("seed")))
        return Explanation(
            attributions,
            own,
            deltas.get(first),
            *reading,
            inputs=fed,
            by_method=by_method,
            delta_by_method=deltas,
        )

    def _feeds(self, inputs: Given, named: Mapping[str, Given]) -> Feeds:
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
        return {port.name: fitted(port, given[port.name]) for port in self.inputs}

    def _batch(self, feeds: Feeds) -> int | None:
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

    def _add_target(self, feeds: Feeds, target: Given, batch: int | None) -> None:
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
        target = taken(target, "target")
        if isinstance(target, Resident):
            feeds["target"] = fitted(self._chooser, target)
            return
        indices = integers(target, "target")
        if batch is None:
            batch = indices.shape[0] if indices.ndim else 1
        wanted = (batch,) if columns is None else (batch, int(columns))
        fits = indices.ndim <= len(wanted) and (
            columns is None or indices.shape[-1:] == wanted[-1:]
        )
        try:
            if not fits:
                raise ValueError
            whole = np.ascontiguousarray(np.broadcast_to(indices, wanted))
        except ValueError:
            raise OptionError(
                f"target has shape {list(indices.shape)}; it must be "
                + (
                    f"one class, or one for each of the {batch} samples"
                    if columns is None
                    else f"{columns} indices, or {columns} for each of the {batch} samples"
                )
            ) from None
        feeds["target"] = whole
        if self.recipe.output_shape is not None:
            check_range(whole, self.recipe.output_shape, self.output)

    def _refuse_target(self, target: Given) -> None:
        fixed = self.recipe.target
        if self.recipe.targets is not None:
            raise OptionError(
                "the model explains several targets at once, fixed when it was compiled; to choose "
                "one at run time, compile it with target 'input'"
            )
        if fixed == "input" or not self._has_classes():
            if np.all(np.isin(integers(target, "target"), (0, -1))):
                return
            raise OptionError(
                f"output '{self.output}' holds one value a sample: it has no target {target!r}"
            )
        if not isinstance(fixed, str) and np.array_equal(
            np.atleast_1d(integers(target, "target")), np.atleast_1d(np.asarray(fixed))
        ):
            return
        how = {"seed": "with a seed", "argmax": "for its largest output"}
        raise OptionError(
            f"the model was compiled {how.get(str(fixed), f'for target {fixed}')}; "
            "to choose the target at run time, compile it with target 'input'"
        )

    def _sized(self, name: str, array: Array, given: Mapping[str, Any]) -> Array:
        """A background with as many samples as the others have."""
        shapes = {key: np.shape(value) for key, value in given.items()}
        counts = {key: shape[0] if shape else 1 for key, shape in shapes.items()}
        count = max(counts.values())
        if not count or array.shape[0] not in (1, count):
            raise OptionError(
                f"the backgrounds must have as many samples each, one or more; they have {counts}"
            )
        return np.broadcast_to(array, (count, *array.shape[1:]))

    def _add_baselines(
        self,
        feeds: Feeds,
        baseline: Given,
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
            one = taken(baseline, "baseline")
            array = one if isinstance(one, Resident) else np.asarray(one)
            if array.ndim and len(names) > 1:
                raise OptionError(
                    f"the model takes {len(names)} baselines ({', '.join(names)}): give a number "
                    "or arrays by name"
                )
            given = dict.fromkeys(names, array)
        for name, port in self._baselines.items():
            like, held = feeds[name], taken(given[name], f"baseline of '{name}'")
            if isinstance(held, Resident):
                feeds[port.name] = fitted(port, held)
                continue
            array = np.asarray(held)
            if array.ndim == 0:
                array = np.broadcast_to(array, (1, *like.shape[1:]) if like.ndim else ())
            array = fit(Port(f"baseline of '{name}'", port.dtype, (None, *like.shape[1:])), array)
            if self.background:
                array = self._sized(name, array, given)
            elif array.ndim and array.shape[0] not in (1, like.shape[0]):
                raise OptionError(
                    f"the baseline of '{name}' holds {array.shape[0]} samples; it must hold 1 or "
                    f"{like.shape[0]}"
                )
            if not np.isfinite(array).all():
                raise OptionError(f"the baseline of '{name}' has entries that are not finite")
            feeds[port.name] = array

    def _add_seed(self, feeds: Feeds, seed: Given, batch: int | None) -> None:
        if not self.takes_seed:
            if seed is not None:
                raise OptionError("the model takes no seed; compile it with target 'seed'")
            return
        if seed is None:
            raise OptionError(
                f"the model takes a seed, S = Σ seed · output, of the shape of '{self.output}'"
            )
        assert self._chooser is not None
        array = fitted(self._chooser, seed)
        if isinstance(array, Resident):
            feeds["seed"] = array
            return
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
            check_range(target, outputs[self.output].shape, self.output)
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
        if self.recipe.targets is not None:
            several = classes_of(y, self.recipe.targets)
            check_range(several.reshape(-1), y.shape, self.output)
            return prediction, several, np.take_along_axis(y, several, axis=1)
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
        check_range(index, y.shape, self.output)
        score = y[(np.arange(len(y)), *index.T)]
        return prediction, index[:, 0] if y.ndim == 2 else index, score


def classes_of(y: Array, targets: int | Sequence[int]) -> Array:
    """The classes that are explained at once, [N, k] for an output [N, C].

    The k largest in falling order (of equal ones the first first, as TopK has them), or the given
    ones, where a negative class is the predicted one.
    """
    if isinstance(targets, int):
        return np.argsort(-y.astype(np.float64), axis=1, kind="stable")[:, :targets]
    wanted = np.broadcast_to(np.asarray(targets, np.int64), (len(y), len(targets)))
    return np.where(wanted < 0, y.argmax(axis=1)[:, None], wanted)


__all__ = ["Explainer", "Explanation", "classes_of"]
