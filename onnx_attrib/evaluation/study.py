"""The run: every method on every sample, in units of work that are kept as they finish.

A unit is one method on a few samples. Random numbers are drawn for each sample by its number, so
that units may be computed in any order, and an interrupted run that goes on gives the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib.errors import OptionError
from onnx_attrib.evaluation.agreement import pearson, spearman
from onnx_attrib.evaluation.contestants import CONTROL, Contestant
from onnx_attrib.evaluation.curves import falling, removed_counts, rising, variations
from onnx_attrib.evaluation.features import Features
from onnx_attrib.evaluation.fidelity import infidelity, max_sensitivity, neighbours
from onnx_attrib.evaluation.sanity import randomised, stages
from onnx_attrib.evaluation.scoring import Scoring
from onnx_attrib.evaluation.sensitivity import (
    changes,
    correlations,
    subset_sizes,
    subset_sums,
    subsets,
)
from onnx_attrib.evaluation.store import Store, Unit
from onnx_attrib.feeds import Array
from onnx_attrib.runtime import Explainer

_ORDERS, _SUBSETS, _NEIGHBOURS = 1, 2, 3
"""Streams of random numbers."""
STEADY = 10
"""How many samples max-sensitivity is measured on."""
SANE = 10
"""How many samples the randomisation check is made on."""
_TIMED = 3
"""Of so many chunks the median leaves out the first."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: see :func:`onnx_attrib.evaluate`."""

    step: int
    limit: int
    subsets: int
    neighbours: int
    radius: float
    seed: int


@dataclass(frozen=True)
class Found:
    """The units of the control and, by label, of the methods, and how attributions compare when
    layers (the last of which is named) are randomised."""

    control: list[Unit]
    units: dict[str, list[Unit]]
    checks: dict[str, list[tuple[str, Unit]]]

    @property
    def maps(self) -> dict[str, Array]:
        """The attributions of each method, [N, F]."""
        return {
            label: np.concatenate([unit["maps"] for unit in units])
            for label, units in self.units.items()
        }


class _Ticker:
    """Counts units of work as they are done."""

    def __init__(self, count: int, progress: Progress | None) -> None:
        self._done, self._count, self._progress = 0, count, progress

    def __call__(self, what: str, work: Callable[[], Unit]) -> Unit:
        self._tell(what)
        unit = work()
        self._done += 1
        self._tell(what)
        return unit

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._count, what)


@dataclass
class Study:
    """A subject with its data, the features, the reference x̄ [...] and what is found."""

    scoring: Scoring
    features: Features
    reference: Array
    plan: Plan
    store: Store
    open: Callable[[Path], Explainer]
    """An explainer of a compiled model."""

    def __post_init__(self) -> None:
        self.count = len(self.scoring.values)
        self.removed = removed_counts(self.plan.limit, self.plan.step)
        self.sizes = subset_sizes(self.features.count if self.plan.subsets else 0)
        self._open: tuple[Path, Explainer] | None = None
        size = self.scoring.chunk
        self.chunks = [
            np.arange(start, min(start + size, self.count)) for start in range(0, self.count, size)
        ]
        self.scores = self.scoring.scores
        self.steady = spread_out(self.count, STEADY)
        self.sane = spread_out(self.count, SANE)

    def run(
        self,
        contestants: Sequence[Contestant],
        make: Callable[..., Iterable[Contestant]] | None,
        progress: Progress | None,
    ) -> Found:
        """All units, those that are kept and the others.

        ``make``: compiles choices by label for a model into a folder, if attributions are to be
        compared with those of randomised models.
        """
        model, chunks = self.scoring.subject.part, range(len(self.chunks))
        random = stages(model) if make is not None else 0
        tick = _Ticker(len(chunks) * (len(contestants) + 2) + random * len(contestants), progress)
        for k in chunks:
            tick("random subsets", partial(self.subset_changes, k))
        control = [tick("random orders", partial(self.control, k)) for k in chunks]
        units = {
            one.label: [tick(one.label, partial(self.method, one, k)) for k in chunks]
            for one in contestants
        }
        found = Found(control, units, {one.label: [] for one in contestants})
        if make is not None:
            for k, (layer, stage) in enumerate(randomised(model, self.plan.seed)):
                for one in contestants:
                    again = partial(make, {one.label: one.choice}, stage)
                    check = partial(self.sanity, one, found.maps[one.label], again, k)
                    found.checks[one.label].append((layer, tick(f"{one.label}, {layer}", check)))
        return found

    # -- units of work -----------------------------------------------------------------------------

    def kept(self, key: str, make: Callable[[], Unit]) -> Unit:
        """A unit that is there, or a new one."""
        unit = self.store.get(key)
        if unit is None:
            unit = make()
            self.store.put(key, unit)
        return unit

    def subset_changes(self, k: int) -> Unit:
        """Random subsets of each sample of a chunk.

        ``packed`` [n, M, bytes] are the subsets, ``changed`` [n, M] S(x) − S(x with each at x̄).
        """

        def make() -> Unit:
            packed, changed = [], []
            if not len(self.sizes):
                return {}
            for i in self.chunks[k]:
                rng = self._rng(_SUBSETS, i)
                masks = subsets(rng, self.features.count, self.sizes, self.plan.subsets)
                packed.append(np.packbits(masks, axis=1))
                x, score = self.scoring.values[i], self.scoring.score(int(i))
                found = changes(score, self.scores[i], x, self.reference, masks, self.features)
                changed.append(found)
            return {"packed": np.stack(packed), "changed": np.stack(changed)}

        return self.kept(f"subsets-{k}", make)

    def control(self, k: int) -> Unit:
        """What a random order gives for a chunk."""

        def make() -> Unit:
            drawn = [self._rng(_ORDERS, i).normal(size=self.features.count) for i in self.chunks[k]]
            return self._measured(k, np.stack(drawn))

        return self.kept(f"{CONTROL}-{k}", make)

    def method(self, one: Contestant, k: int) -> Unit:
        """What a method gives for a chunk."""
        return self.kept(f"{one.key}-{k}", lambda: self._explained(one, self.opened(one), k))

    def opened(self, one: Contestant) -> Explainer:
        """The method's explainer; that of the method before is closed."""
        if self._open is None or self._open[0] != one.file:
            self._open = None
            self._open = one.file, self.open(one.file)
        return self._open[1]

    def sanity(
        self, one: Contestant, maps: Array, compile_to: Callable[..., Iterable[Contestant]], k: int
    ) -> Unit:
        """How alike attributions are to ``maps`` [N, F] in the k-th model with random layers."""

        def make() -> Unit:
            rows, before = self.sane, maps[self.sane].astype(np.float64)
            with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
                (again,) = compile_to(folder=Path(folder))
                explainer = self.opened(again)
            found = self.scoring.explain(explainer, self.scoring.values[rows], rows)
            after = self.features.total(found)
            return {"pearson": pearson(after, before), "rank": spearman(after, before)}

        return self.kept(f"{one.key}-randomised-{k}", make)

    # -- what a unit holds -------------------------------------------------------------------------

    def _explained(self, one: Contestant, explainer: Explainer, k: int) -> Unit:
        rows, values = self.chunks[k], self.scoring.values[self.chunks[k]]
        if len(self.chunks) < _TIMED:
            self.scoring.explain(explainer, values[:1], rows[:1])  # the first run takes longer
        start = time.perf_counter()
        found = self.scoring.explain(explainer, values, rows)
        seconds = (time.perf_counter() - start) / len(rows)
        bad = [int(i) for i, a in zip(rows, found, strict=True) if not np.isfinite(a).all()]
        if bad:
            raise OptionError(
                f"method '{one.label}' gives attributions that are not finite for sample {bad[0]}"
            )
        try:
            maps = self.features.total(found) * one.scale
        except OptionError as error:
            raise OptionError(f"method '{one.label}' does not fit: {error}") from None
        unit = self._measured(k, maps)
        unit["seconds"] = np.array(seconds)
        unit["sums"] = maps.sum(axis=1)
        if self.plan.neighbours:
            unit["instability"] = np.full(len(rows), np.nan)
            for place, i in enumerate(rows):
                if i in self.steady:
                    unit["instability"][place] = self._instability(explainer, int(i), found[place])
        return unit

    def _measured(self, k: int, maps: Array) -> Unit:
        """The measures of attributions [n, F] of a chunk that only need the subject's scores."""
        rows = self.chunks[k]
        falls = [self._curve(int(i), falling(a)) for i, a in zip(rows, maps, strict=True)]
        rises = [self._curve(int(i), rising(a)) for i, a in zip(rows, maps, strict=True)]
        unit = {"maps": maps.astype(np.float32), "morf": np.stack(falls), "lerf": np.stack(rises)}
        drawn, several = self.subset_changes(k), len(self.sizes)
        if several:
            told, off = [], []
            for a, packed, changed in zip(maps, drawn["packed"], drawn["changed"], strict=True):
                masks = np.unpackbits(packed, axis=1, count=self.features.count)
                sums = subset_sums(a, masks)
                told.append(correlations(sums, changed, several))
                off.append(infidelity(sums, changed))
            unit |= {"correlation": np.stack(told), "infidelity": np.array(off)}
        return unit

    def _curve(self, i: int, order: Array) -> Array:
        return variations(
            self.scoring.score(i),
            self.scores[i],
            self.scoring.values[i],
            self.reference,
            order,
            self.removed,
            self.features,
        )

    def _instability(self, explainer: Explainer, i: int, attribution: Array) -> float:
        rng = self._rng(_NEIGHBOURS, i)
        around = neighbours(rng, self.scoring.values[i], self.plan.radius, self.plan.neighbours)

        def explain(values: Array) -> Array:
            return self.scoring.explain(explainer, values, np.full(len(values), i))

        return max_sensitivity(explain, attribution, around)

    def _rng(self, stream: int, i: Any) -> np.random.Generator:
        return np.random.default_rng([self.plan.seed, stream, int(i)])


def spread_out(count: int, several: int) -> Array:
    """The numbers of at most ``several`` samples, evenly from the first to the last."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(several, count))).astype(np.int64))


__all__ = ["Plan", "Progress", "Study", "spread_out"]
