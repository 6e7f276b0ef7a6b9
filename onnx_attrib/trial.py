"""A compiled model on random batches, and the means to evaluate its forward part by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnx_attrib.draw import Drawer, drawer_for, fill
from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array
from onnx_attrib.forward import Forward, attributed, computed_from
from onnx_attrib.measure import columns, one_hot
from onnx_attrib.runtime import Explainer, Explanation, classes_of
from onnx_attrib.session import onnxruntime


@dataclass(frozen=True)
class Point:
    """One batch and what the compiled model says of it.

    ``weights``: S = Σ weights · output, for each target. ``x`` and ``reference``: the values of
    the attributed tensors there and at the baseline (``reference`` None where it is not known);
    ``there``: the model's inputs and cut tensors at the baseline, or at each sample of a background
    (of which ``reference`` is the last).
    """

    feeds: dict[str, Array]
    result: Explanation
    output: Array
    weights: list[Array]
    x: dict[str, Array]
    reference: dict[str, Array] | None
    there: list[dict[str, Array]]


class Trial:
    """A compiled model with the means to evaluate its forward part."""

    def __init__(self, model: ModelProto, known: Any, baseline: Any, target: Any) -> None:
        self.ort, self.model = onnxruntime(), model
        self.explain = Explainer(model, providers=["CPUExecutionProvider"])
        self._known, self._baseline, self._target = known, baseline, target
        self.names = list(self.explain.attributed)
        inner = computed_from(model, self.names)
        self.outermost = [name for name in self.names if name not in inner]
        self.apart = self._samples_apart()
        self._forwards: dict[tuple[tuple[str, ...], bool], Forward] = {}
        self._values = Forward(self.ort, model, [*self.names, self.explain.output])

    @property
    def narrow(self) -> bool:
        """Whether the model takes or gives 16-bit floats, or was compiled for them."""
        if self.explain.recipe.precision != "keep":
            return True
        ports = [*self.explain.inputs, *self.explain.outputs]
        return any(p.dtype is not None and p.dtype.name in ("float16", "bfloat16") for p in ports)

    def forward(self, cut: Sequence[str] = (), *, optimized: bool = True) -> Forward:
        """The explained output, from the inputs and the tensors in ``cut``."""
        key = tuple(cut), optimized
        if key not in self._forwards:
            output = [self.explain.output]
            self._forwards[key] = Forward(self.ort, self.model, output, cut, optimized=optimized)
        return self._forwards[key]

    def _samples_apart(self) -> bool:
        """Whether the first axis of the attributed tensors is the batch, as the output's is."""
        batch = (self.explain.recipe.output_shape or (None,))[0]
        infos = [attributed(self.model, name) for name in self.outermost]
        leading = [info.type.tensor_type.shape.dim[:1] for info in infos]
        symbols = {dims[0].dim_param if dims else "" for dims in leading}
        return bool(batch) and symbols == {batch}

    # -- drawing -----------------------------------------------------------------------------

    def drawer(self, given: Mapping[str, npt.ArrayLike], dims: dict[str, int]) -> Drawer:
        """What draws inputs that the model runs on, with finite results."""
        return drawer_for(self.model, self.explain.inputs, given, dims, self._output)

    def _output(self, feeds: Mapping[str, Array]) -> Array:
        *_, y = self._values(feeds)
        return y

    def feeds(
        self, given: Mapping[str, npt.ArrayLike], drawer: Drawer, rng: np.random.Generator
    ) -> dict[str, Array]:
        """The given inputs, and random ones beside them."""
        return fill(self.explain.inputs, given, drawer, rng)

    def point(self, feeds: dict[str, Array], drawer: Drawer, rng: np.random.Generator) -> Point:
        """Run the compiled model on one batch."""
        *values, y = self._values(feeds)
        x = dict(zip(self.names, values, strict=True))
        weights, choice = self._chosen(y, rng)
        baselines = self._baselines(feeds, drawer, rng)
        result = self.explain(feeds, baseline=baselines, **choice)
        reference, there = self._placed(feeds, baselines, x)
        return Point(feeds, result, y, weights, x, reference, there)

    def _chosen(self, y: Array, rng: np.random.Generator) -> tuple[list[Array], dict[str, Any]]:
        """The weights of S for each target, and what the compiled model has to be told."""
        if self.explain.takes_seed:
            weights = rng.normal(size=y.shape).astype(y.dtype)
            return [weights], {"seed": weights}
        if y.ndim < 2 or (y.ndim == 2 and y.shape[1] == 1 and self.explain.targets is None):
            return [np.ones(y.shape)], {}
        if self._target is not None and not self.explain.takes_target:
            raise OptionError("the model takes no target: it was fixed when it was compiled")
        if self.explain.targets is not None:
            classes = classes_of(y, self.explain.targets)
            return [one_hot(y, column[:, None]) for column in classes.T], {}
        target: Any = self.explain.target
        choice: dict[str, Any] = {}
        if self.explain.takes_target:
            wanted = rng.integers(0, y.shape[1:], (len(y), y.ndim - 1))
            if self._target is not None:
                wanted = np.broadcast_to(columns(self._target, y.ndim - 1), wanted.shape)
            target = wanted[:, 0] if y.ndim == 2 else wanted
            choice = {"target": target}
        if isinstance(target, str):
            flat = y.reshape(len(y), -1).argmax(axis=1)
            index = np.stack(np.unravel_index(flat, y.shape[1:]), axis=1)
        else:
            index = columns(target, y.ndim - 1)
        return [one_hot(y, np.broadcast_to(index, (len(y), y.ndim - 1)))], choice

    # -- the reference -----------------------------------------------------------------------

    def _baselines(
        self, feeds: Mapping[str, Array], drawer: Drawer, rng: np.random.Generator
    ) -> Any:
        """What the compiled model takes as a baseline at run time: given, or random."""
        given = self._baseline
        if not self.explain.baselines:
            if given is not None and self.explain.baseline != "array":
                raise OptionError("the baseline was fixed when the model was compiled")
            return None
        if isinstance(given, str) and given != "zeros":
            raise OptionError(f"baseline '{given}' is not zeros, a number, or an array")
        if given is not None:
            return 0.0 if isinstance(given, str) else given
        return {name: drawer.other(feeds[name], rng) for name in self.explain.baselines}

    def _placed(
        self, feeds: Mapping[str, Array], baselines: Any, x: Mapping[str, Array]
    ) -> tuple[dict[str, Array] | None, list[dict[str, Array]]]:
        """x̄ of the attributed tensors, and what the forward part reads there."""
        kind = self.explain.baseline
        if kind is None:
            return None, []
        if kind == "input":
            there = self._spread(baselines, {n: feeds[n] for n in self.explain.baselines})
            there = [{**feeds, **values} for values in there]
            *values, _ = self._values(there[-1])
            return dict(zip(self.names, values, strict=True)), there
        known: Any = 0.0 if kind == "zeros" else kind
        if kind == "array":
            known = self._known
        if known is None or isinstance(known, str):
            return None, []
        references = self._spread(known, {name: x[name] for name in self.outermost})
        return references[-1], [{**feeds, **reference} for reference in references]

    def _spread(self, given: Any, like: Mapping[str, Array]) -> list[dict[str, Array]]:
        """A baseline in the full shapes of what it replaces, for each sample of a background."""
        values = {name: given[name] if isinstance(given, Mapping) else given for name in like}
        arrays = {name: np.asarray(values[name], like[name].dtype) for name in like}
        rows: list[dict[str, Array]] = [arrays]
        if self.explain.background:
            arrays = {n: a[None] if a.ndim < like[n].ndim else a for n, a in arrays.items()}
            count = max(len(a) for a in arrays.values())
            rows = [{n: a[min(k, len(a) - 1)] for n, a in arrays.items()} for k in range(count)]
        for name, array in rows[0].items():
            try:
                np.broadcast_to(array, like[name].shape)
            except ValueError:
                raise OptionError(
                    f"a baseline of shape {list(np.shape(values[name]))} does not fit '{name}'"
                ) from None
        return [
            {n: np.broadcast_to(a, like[n].shape).copy() for n, a in row.items()} for row in rows
        ]


__all__ = ["Point", "Trial"]
