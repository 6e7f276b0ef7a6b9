"""A subject with its data: scores of perturbed samples, and attributions, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnx_attrib.batches import is_shortage
from onnx_attrib.errors import CompileError, OptionError
from onnx_attrib.evaluation.features import ENTRIES, Score
from onnx_attrib.evaluation.subject import Subject
from onnx_attrib.feeds import Array, check_range, line, show_shape
from onnx_attrib.runtime import Explainer

LARGEST = 256
"""The most samples that are scored in one batch."""
EXPLAINED = 10
"""The most samples that are explained in one batch."""
_SHARE = 4


class Scoring:
    """S and attributions of samples, and of what is made of them.

    ``values``: the attributed tensor of each sample, [N, …]; ``outputs``: the explained output
    there, [N, …]; ``index``: what is explained, [N] or [N, r-1] (None for one value a sample).
    """

    def __init__(self, subject: Subject, feeds: Mapping[str, Array], count: int) -> None:
        self.subject, self._count = subject, count
        leading = subject.port.shape[0] if subject.port.shape else 1
        self._fixed = leading if isinstance(leading, int) else None if subject.apart else 1
        self.given = dict(feeds)
        """The model's inputs."""
        self._tiled = {name for name in feeds if self._per_sample(name)}
        rows = np.arange(count)
        self.values = self._attributed(rows)
        self._size = max(1, min(LARGEST, ENTRIES // max(self.values[0].size, 1)))
        self.outputs = self._explained(self.values, rows)
        self.index: Array | None = None

    def _per_sample(self, name: str) -> bool:
        port = next(port for port in self.subject.inputs if port.name == name)
        array = self.given[name]
        alone = isinstance(port.shape[0] if port.shape else 1, int) and self._fixed is None
        return array.ndim > 0 and len(array) == self._count and not alone

    @property
    def chunk(self) -> int:
        """How many samples are explained at once."""
        return max(1, min(EXPLAINED, ENTRIES // (_SHARE * max(self.values[0].size, 1))))

    # -- what is explained -------------------------------------------------------------------------

    @property
    def classes(self) -> int | None:
        """How many classes the output has; None if it holds one value a sample."""
        shape = self.outputs.shape
        return shape[1] if len(shape) > 2 or (len(shape) == 2 and shape[1] > 1) else None

    def predicted(self) -> Array | None:
        """The largest entry of each sample's output, as an index."""
        if self.classes is None:
            return None
        flat = self.outputs.reshape(self._count, -1).argmax(axis=1)
        if self.outputs.ndim == 2:
            return flat
        return np.stack(np.unravel_index(flat, self.outputs.shape[1:]), axis=1)

    def choose(self, index: Array | None) -> None:
        """Explain these entries of the output; OptionError if it does not have them."""
        if index is not None:
            check_range(index, self.outputs.shape, self.subject.output)
        self.index = index
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if len(bad):
            raise OptionError(
                f"output '{self.subject.output}' is not finite for sample {bad[0]}"
                + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
            )

    @property
    def scores(self) -> Array:
        """S(x) of each sample, [N]."""
        return self._picked(self.outputs, np.arange(self._count))

    def _picked(self, outputs: Array, rows: Array) -> Array:
        if self.index is None:
            picked = outputs.reshape(len(rows), -1).sum(axis=1)
        else:
            columns = self.index[rows].reshape(len(rows), -1)
            picked = outputs[(np.arange(len(rows)), *columns.T)]
        return picked.astype(np.float64)

    # -- running -----------------------------------------------------------------------------------

    def score(self, sample: int) -> Score:
        """S of perturbed versions of one sample."""

        def scored(values: Array) -> Array:
            rows = np.full(len(values), sample)
            return self._picked(self._explained(values, rows), rows)

        return scored

    def score_at(self, values: Array) -> Array:
        """S of each sample's version in ``values`` [N, …]."""
        rows = np.arange(self._count)
        return self._picked(self._explained(values, rows), rows)

    def explain(self, explainer: Explainer, values: Array, rows: Array) -> Array:
        """Attributions of ``values`` [M, …], versions of the samples in ``rows`` [M]."""

        def explained(feeds: dict[str, Array], rows: Array) -> Array:
            target = None if self.index is None else self.index[rows]
            found: Array = explainer(feeds, target=target).attributions[self.subject.name]
            return found

        names = [port.name for port in explainer.inputs]
        return self._in_batches(values, rows, names, self.chunk, explained)

    def _explained(self, values: Array, rows: Array) -> Array:
        def run(feeds: dict[str, Array], rows: Array) -> Array:
            return self.subject.explained(feeds)

        names = [self.subject.name, *self.subject.others]
        return self._in_batches(values, rows, names, self._size, run)

    def _in_batches(
        self,
        values: Array,
        rows: Array,
        names: list[str],
        size: int,
        run: Callable[[dict[str, Array], Array], Array],
    ) -> Array:
        """Results [M, …] for values of the attributed tensor, the other inputs as in ``rows``."""
        parts, start, size = [], 0, self._fixed or size
        while start < len(values):
            part, own = values[start : start + size], rows[start : start + size]
            short = size - len(part) if self._fixed else 0
            if short:
                part = np.concatenate([part, np.repeat(part[-1:], short, axis=0)])
                own = np.concatenate([own, np.repeat(own[-1:], short)])
            feeds = {name: self._given(name, own) for name in names if name != self.subject.name}
            feeds[self.subject.name] = np.ascontiguousarray(part)
            try:
                found = np.asarray(run(feeds, own))
            except CompileError:
                raise
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                if is_shortage(error) and size > 1 and not self._fixed:
                    size = (size + 1) // 2
                    continue
                raise CompileError(f"ONNX Runtime failed to run the model: {line(error)}") from None
            if found.shape[:1] != (len(own),):
                if len(own) != 1:
                    raise OptionError(
                        f"output '{self.subject.output}' {show_shape(found.shape)} does not lead "
                        f"with the samples: {len(own)} were given"
                    )
                found = found[None]
            parts.append(found[: len(part) - short])
            start += size
        return np.concatenate(parts)

    def _given(self, name: str, rows: Array) -> Array:
        array = self.given[name]
        return np.ascontiguousarray(array[rows]) if name in self._tiled else array

    def _attributed(self, rows: Array) -> Array:
        """The attributed tensor of each sample."""
        if not self.subject.inner:
            return self.given[self.subject.name]
        size, parts = self._fixed or LARGEST, []
        for start in range(0, len(rows), size):
            own = rows[start : start + size]
            if self._fixed and len(own) < size:
                own = np.concatenate([own, np.repeat(own[-1:], size - len(own))])
            feeds = {name: self._given(name, own) for name in self.given}
            try:
                found = self.subject.attributed(feeds)
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                raise CompileError(f"ONNX Runtime failed to run the model: {line(error)}") from None
            parts.append(found)
        return np.concatenate(parts)[: len(rows)]


__all__ = ["Scoring"]
