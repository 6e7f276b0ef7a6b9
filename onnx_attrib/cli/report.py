"""What ``onnx-attrib run`` shows: text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib import plot, plot_lines
from onnx_attrib.cli.common import note, rows, show_processing
from onnx_attrib.cli.reading import Loaded
from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import Array
from onnx_attrib.job import Choice
from onnx_attrib.methods import METHODS
from onnx_attrib.runtime import Explainer, Explanation

_LINES = 10
"""Samples printed one by one."""


class Report:
    """One run's result, as text, as JSON and as a picture."""

    def __init__(
        self,
        explain: Explainer,
        result: Explanation,
        loaded: Mapping[str, Loaded],
        labels: Mapping[int, str],
        choices: Mapping[str, Choice] | None = None,
        words: Mapping[int, str] | None = None,
    ) -> None:
        """``choices``: what ``result.by_method`` holds, if that are not the explainer's methods;
        ``words``: the words of token ids."""
        self.explain, self.result = explain, result
        self.loaded, self.labels, self.words = loaded, labels, words or {}
        self.methods: dict[str, tuple[str, Mapping[str, Any]]] = {
            name: (name, options) for name, options in explain.recipe.methods.items()
        }
        if choices is not None:
            self.methods = {label: (one.method.name, one.options) for label, one in choices.items()}
        self.several = explain.targets is not None
        sizes = [len(a) for a in result.attributions.values() if a.ndim]
        scored = result.score if result.score is not None else result.delta
        self.count = len(scored) if scored is not None else max(sizes, default=1)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        recipe = self.explain.recipe.to_dict()
        kept = ("method", "options", "output", "baseline")
        return {
            **{key: recipe[key] for key in kept},
            "methods": {label: dict(options) for label, (_, options) in self.methods.items()},
            "targets": recipe["targets"],
            "reduce": recipe["reduce"],
            "normalize": recipe["normalize"],
            "providers": self.explain.providers,
            "inputs": {
                name: {
                    "files": list(item.files),
                    "shape": list(self.result.inputs[name].shape),
                    "scaling": item.scaling,
                }
                for name, item in self.loaded.items()
            },
            "samples": [self._sample(i) for i in range(self.count)],
        }

    def _sample(self, i: int) -> dict[str, Any]:
        """One sample: lists where there are several targets, by method where there are several."""
        result = self.result
        sample: dict[str, Any] = {}
        classes = self._classes()
        if classes is not None:
            sample["predicted"] = self._entry(classes[i], int(np.argmax(classes[i])))
        if self.several:
            sample["targets"] = None
            if result.target is not None and classes is not None:
                sample["targets"] = [self._entry(classes[i], int(k)) for k in result.target[i]]
        elif result.target is not None and result.target.ndim == 1 and classes is not None:
            sample["target"] = self._entry(classes[i], int(result.target[i]))
        elif result.target is not None:
            sample["target"] = {"index": result.target[i].tolist()}
        sample["score"] = None if result.score is None else _plain(result.score[i])
        sums = {
            method: {name: self._sums(a, i) for name, a in attributions.items()}
            for method, attributions in result.by_method.items()
        }
        sample["attribution_sum"] = sums if len(sums) > 1 else next(iter(sums.values()))
        deltas = {method: _plain(delta[i]) for method, delta in result.delta_by_method.items()}
        if deltas:
            several = len(result.by_method) > 1
            sample["convergence_delta"] = deltas if several else next(iter(deltas.values()))
        return sample

    def _sums(self, a: Array, i: int) -> float | list[float]:
        sums = [float(mine.sum(dtype=np.float64)) for mine in self._of_sample(a, i)]
        return sums if self.several else sums[0]

    def _of_sample(self, a: Array, i: int) -> Array:
        """A sample's attributions, one for each target."""
        mine = self._per_sample(a)[i]
        return mine if self.several else mine[None]

    def _entry(self, scores: Array, index: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"class": index, "score": float(scores[index])}
        if index in self.labels:
            entry["label"] = self.labels[index]
        return entry

    def _classes(self) -> Array | None:
        """Scores by class, [N, C], if that is what is explained."""
        y = self.result.outputs.get(self.explain.output)
        return y if y is not None and y.ndim == 2 and y.shape[1] > 1 else None

    def _per_sample(self, a: Array) -> Array:
        return a if a.ndim and len(a) == self.count else a.reshape(1, *a.shape)

    # -- text ----------------------------------------------------------------------------------

    def text(self) -> str:
        """What a person reads."""
        scaled = {item.scaling for item in self.loaded.values() if item.scaling}
        recipe = self.explain.recipe
        facts = [
            ("method", " ".join([_named(label, name), *(f"{k}={v}" for k, v in options.items())]))
            for label, (name, options) in self.methods.items()
        ]
        if self.explain.baseline is not None:
            facts.append(("baseline", str(self.explain.baseline)))
        if shown := show_processing(recipe):
            facts.append(("shows", shown))
        facts += [("pixels", scaling) for scaling in sorted(scaled)]
        blocks = [rows(facts)]
        blocks += [self._block(i) for i in range(min(self.count, _LINES))]
        if self.count > _LINES:
            blocks.append(f"… and {self.count - _LINES} more (--json lists all)")
        return "\n".join(blocks)

    def _block(self, i: int) -> str:
        lines: list[tuple[str, str]] = []
        classes = self._classes()
        if classes is not None:
            order = np.argsort(-classes[i], kind="stable")[:3]
            shown = [f"{self._class(int(k))}: {classes[i][k]:.4g}" for k in order]
            lines.append(("predicted", f"{shown[0]}  (then {', '.join(shown[1:])})"))
        for place in range(self._places()):
            lines.append(("explained", self._explained(i, place)))
            for method, attributions in self.result.by_method.items():
                of = f" ({method})" if len(self.result.by_method) > 1 else ""
                for name, a in attributions.items():
                    mine = self._of_sample(a, i)[place].astype(np.float64)
                    lines.append((f"Σ {name}{of}", self._split(mine, method)))
                delta = self.result.delta_by_method.get(method)
                if delta is not None:
                    lines.append((f"delta{of}", f"{np.atleast_1d(delta[i])[place]:.3g}"))
        return f"{self._source(i)}\n{rows(lines)}"

    def _split(self, mine: Array, method: str) -> str:
        above, below = mine[mine > 0].sum(), mine[mine < 0].sum()
        split = f"  ({above:.4g} for, {below:.4g} against)" if self._signed(method) else ""
        return f"{mine.sum():.6g}{split}"

    def _places(self) -> int:
        """How many targets are explained at once."""
        targets = self.explain.targets
        return 1 if targets is None else targets if isinstance(targets, int) else len(targets)

    def _class(self, index: int) -> str:
        return f"{index} {self.labels[index]}" if index in self.labels else str(index)

    def _explained(self, i: int, place: int) -> str:
        what, score = self.explain.output, self._score(i, place)
        if (target := self._target(i, place)) is not None:
            what += f", target {target}"
        elif self.explain.takes_seed:
            what += ", seeded"
        return what if score is None else f"{what}: {score:.6g}"

    def _score(self, i: int, place: int) -> float | None:
        score = self.result.score
        return None if score is None else float(np.atleast_1d(score[i])[place])

    def _target(self, i: int, place: int) -> str | None:
        """What was explained, by name if it has one."""
        target, targets = self.result.target, self.explain.targets
        if target is None:
            if isinstance(targets, int):
                return f"number {place + 1} by size"
            return None if targets is None else str(targets[place])
        if target.ndim > 1 and not self.several:
            return str(target[i].tolist())
        return self._class(int(np.atleast_1d(target[i])[place]))

    def _source(self, i: int) -> str:
        files = next((item.files for item in self.loaded.values()), ())
        if len(files) == self.count:
            return files[i]
        return f"{files[0]}, sample {i}" if files else f"sample {i}"

    def _signed(self, name: str) -> bool:
        """Whether what is shown of a method can be negative."""
        of, options = self.methods[name]
        method = METHODS.get(of)
        if {"abs-max", "l2"} & set(self.explain.recipe.reduce.values()):
            return False
        return method is None or method.is_signed(options)

    def warnings(self) -> list[str]:
        """What should not go unnoticed."""
        found = []
        for method, attributions in self.result.by_method.items():
            of = f"{method} " if len(self.result.by_method) > 1 else ""
            for name, a in attributions.items():
                if not np.isfinite(a).all():
                    found.append(f"the {of}attribution of '{name}' has entries that are not finite")
                elif a.size and not a.any():
                    found.append(
                        f"the {of}attribution of '{name}' is zero everywhere: at this input the "
                        "output does not react to it"
                    )
        return found

    # -- picture -------------------------------------------------------------------------------

    def figure(self) -> Any:
        """Inputs and attributions of the first samples; of several methods side by side."""
        methods, tensors = tuple(self.methods), self.explain.attributed
        wanted = [
            (i, place, name)
            for i in range(self.count)
            for place in range(self._places())
            for name in tensors
        ]
        if not wanted:
            raise CompileError("there is nothing to draw: the batch is empty")
        if len(wanted) > plot.MOST:
            note(f"the picture shows {plot.MOST} of {len(wanted)}")
        signed = [self._signed(method) for method in methods]
        if len(methods) == 1:
            panels = [self._panel(*one, methods[0]) for one in wanted[: plot.MOST]]
            return plot.draw(panels, f"{methods[0]} of {self.explain.output}", signed[0])
        lines = [[self._panel(*one, method) for method in methods] for one in wanted[: plot.MOST]]
        return plot_lines.draw_lines(lines, methods, f"{self.explain.output} explained", signed)

    def _panel(self, i: int, place: int, name: str, method: str) -> plot.Panel:
        title = self._title(i, place)
        if len(self.explain.attributed) > 1:
            title = f"{name}: {title}"
        rest: dict[str, Any] = {"title": title, "source": Path(self._source(i)).name}
        a = self.result.by_method[method][name]
        mine = self._of_sample(a, i)[place]
        item = self.loaded.get(name)
        if item is None:
            seen = [x for x in self.loaded.values() if x.pixels or (x.form and x.value.ndim == 4)]
            shown = self._pixels(seen[0], i) if seen and mine.ndim > 2 else None
            labels = self._tokens(mine, i)
            kept, left_out = plot.unpadded(labels)
            if left_out:
                rest["title"] += f" ({left_out} left out)"
                mine, labels = mine[kept], labels[kept]
            return plot.panel_of(mine, pixels=shown, inner=True, labels=labels, **rest)
        if item.form is None or (item.form.flat and mine.size < item.value[0].size):
            value = self._per_sample(self.result.inputs[name])[i]
            return plot.panel_of(mine, value if value.ndim == mine.ndim else None, **rest)
        picture = item.form.pictures(mine[None])[0]
        shown = self._pixels(item, i)
        return plot.panel_of(picture, pixels=shown, channels_last=True, **rest)

    def _tokens(self, mine: Array, i: int) -> list[str]:
        """The words, or ids, at the positions of an embedding [T, D]."""
        for value in self.result.inputs.values():
            ids = np.asarray(value)
            if mine.ndim == 2 and ids.dtype.kind in "iu" and ids.shape[1:] == mine.shape[:1]:
                return [self.words.get(int(k), str(int(k))) for k in ids[i]]
        return []

    def _pixels(self, item: Loaded, i: int) -> Array | None:
        if i < len(item.pixels):
            return item.pixels[i]
        return None if item.form is None else plot.as_pixels(item.form.pictures(item.value)[i])

    def _title(self, i: int, place: int) -> str:
        target, score = self._target(i, place), self._score(i, place)
        shown = "" if score is None else f", score {score:.4g}"
        if target is None:
            return (self.explain.output + shown) if shown else "attribution"
        classes = self._classes()
        if classes is None or self.result.target is None:
            return f"target {target}{shown}"
        predicted = int(np.argmax(classes[i]))
        title = f"class {target}{shown}"
        if not self.several and predicted != int(self.result.target[i]):
            title += f" (predicted {self._class(predicted)})"
        return title


def _named(label: str, method: str) -> str:
    return method if label == method else f"{label}: {method}"


def _plain(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()
