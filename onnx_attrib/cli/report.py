"""What ``onnx-attrib run`` shows: text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib import plot
from onnx_attrib.cli.common import note, rows
from onnx_attrib.cli.reading import Loaded
from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import Array
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
    ) -> None:
        self.explain, self.result = explain, result
        self.loaded, self.labels = loaded, labels
        sizes = [len(a) for a in result.attributions.values() if a.ndim]
        scored = result.score if result.score is not None else result.delta
        self.count = len(scored) if scored is not None else max(sizes, default=1)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        recipe = self.explain.recipe.to_dict()
        kept = ("method", "options", "output", "baseline")
        return {
            **{key: recipe[key] for key in kept},
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
        result = self.result
        sample: dict[str, Any] = {}
        classes = self._classes()
        if classes is not None:
            sample["predicted"] = self._entry(classes[i], int(np.argmax(classes[i])))
        if result.target is not None and result.target.ndim == 1 and classes is not None:
            sample["target"] = self._entry(classes[i], int(result.target[i]))
        elif result.target is not None:
            sample["target"] = {"index": result.target[i].tolist()}
        sample["score"] = None if result.score is None else float(result.score[i])
        sample["attribution_sum"] = {
            name: float(self._per_sample(a)[i].sum(dtype=np.float64))
            for name, a in result.attributions.items()
        }
        if result.delta is not None:
            sample["convergence_delta"] = float(result.delta[i])
        return sample

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
        options = " ".join(f"{k}={v}" for k, v in self.explain.options.items())
        facts = [("method", f"{self.explain.method} {options}".rstrip())]
        if self.explain.baseline is not None:
            facts.append(("baseline", str(self.explain.baseline)))
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
        lines.append(("explained", self._explained(i)))
        for name, a in self.result.attributions.items():
            mine = self._per_sample(a)[i].astype(np.float64)
            above, below = mine[mine > 0].sum(), mine[mine < 0].sum()
            split = f"  ({above:.4g} for, {below:.4g} against)" if self._signed() else ""
            lines.append((f"Σ {name}", f"{mine.sum():.6g}{split}"))
        if self.result.delta is not None:
            lines.append(("delta", f"{self.result.delta[i]:.3g}"))
        return f"{self._source(i)}\n{rows(lines)}"

    def _class(self, index: int) -> str:
        return f"{index} {self.labels[index]}" if index in self.labels else str(index)

    def _explained(self, i: int) -> str:
        target, score = self.result.target, self.result.score
        what = self.explain.output
        if target is not None:
            index = self._class(int(target[i])) if target.ndim == 1 else str(target[i].tolist())
            what += f", target {index}"
        elif self.explain.takes_seed:
            what += ", seeded"
        return what if score is None else f"{what}: {score[i]:.6g}"

    def _source(self, i: int) -> str:
        files = next((item.files for item in self.loaded.values()), ())
        if len(files) == self.count:
            return files[i]
        return f"{files[0]}, sample {i}" if files else f"sample {i}"

    def _signed(self) -> bool:
        method = METHODS.get(self.explain.method)
        return method is None or method.is_signed(self.explain.options)

    def warnings(self) -> list[str]:
        """What should not go unnoticed."""
        found = []
        for name, a in self.result.attributions.items():
            if not np.isfinite(a).all():
                found.append(f"the attribution of '{name}' has entries that are not finite")
            elif a.size and not a.any():
                found.append(
                    f"the attribution of '{name}' is zero everywhere: at this input the output "
                    "does not react to it"
                )
        return found

    # -- picture -------------------------------------------------------------------------------

    def figure(self) -> Any:
        """Input and attribution, for the first samples."""
        result, panels = self.result, list[plot.Panel]()
        several = len(result.attributions) > 1
        for i in range(self.count):
            for name, a in result.attributions.items():
                if len(panels) == plot.MOST:
                    break
                title = self._title(i)
                panels.append(self._panel(i, name, a, f"{name}: {title}" if several else title))
        left_out = self.count * len(result.attributions) - len(panels)
        if left_out > 0:
            note(f"the picture shows {len(panels)} of {len(panels) + left_out}")
        if not panels:
            raise CompileError("there is nothing to draw: the batch is empty")
        heading = f"{self.explain.method} of {self.explain.output}"
        return plot.draw(panels, heading, self._signed())

    def _panel(self, i: int, name: str, a: Array, title: str) -> plot.Panel:
        rest: dict[str, Any] = {"title": title, "source": Path(self._source(i)).name}
        item = self.loaded.get(name)
        if item is None:
            seen = [x for x in self.loaded.values() if x.pixels or (x.form and x.value.ndim == 4)]
            shown = self._pixels(seen[0], i) if seen and a.ndim > 3 else None
            return plot.panel_of(self._per_sample(a)[i], pixels=shown, inner=True, **rest)
        if item.form is None:
            value = self._per_sample(self.result.inputs[name])[i]
            return plot.panel_of(self._per_sample(a)[i], value, **rest)
        picture = item.form.pictures(a)[i]
        shown = self._pixels(item, i)
        return plot.panel_of(picture, pixels=shown, channels_last=True, **rest)

    def _pixels(self, item: Loaded, i: int) -> Array | None:
        if i < len(item.pixels):
            return item.pixels[i]
        return None if item.form is None else plot.as_pixels(item.form.pictures(item.value)[i])

    def _title(self, i: int) -> str:
        target, score, classes = self.result.target, self.result.score, self._classes()
        shown = "" if score is None else f", score {score[i]:.4g}"
        if target is None:
            return (self.explain.output + shown) if shown else "attribution"
        if target.ndim > 1:
            return f"target {target[i].tolist()}{shown}"
        title = f"class {self._class(int(target[i]))}{shown}"
        if classes is not None and int(np.argmax(classes[i])) != int(target[i]):
            title += f" (predicted {self._class(int(np.argmax(classes[i])))})"
        return title
