"""Methods side by side, one of them also twice with different options, in few compiled graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx_attrib.compiler import compile as compile_model
from onnx_attrib.job import Choice
from onnx_attrib.model_io import Source
from onnx_attrib.runtime import Explainer, Explanation
from onnx_attrib.session import Provider


@dataclass(frozen=True)
class Lineup:
    """Explainers of one model that together hold all ``choices``, which have labels.

    >>> lineup = Lineup.of(model, {"ours": deeplift, "plain": other_deeplift})
    >>> lineup(x, target=3).by_method["plain"]["x"]
    """

    choices: Mapping[str, Choice]
    explainers: tuple[Explainer, ...]
    labels: tuple[Mapping[str, str], ...]
    """Of each explainer, by the method's name in its graph."""

    @staticmethod
    def of(
        model: Source,
        choices: Mapping[str, Choice],
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        **compiling: Any,
    ) -> Lineup:
        """Compile ``model`` for all choices: one graph, unless a method stands there twice.

        ``compiling``: what :func:`onnx_attrib.compile` takes beside methods and their options.
        """
        labels: list[dict[str, str]] = []
        for label, choice in choices.items():
            name = choice.method.name
            free = next((graph for graph in labels if name not in graph), None)
            if free is None:
                labels.append(free := {})
            free[name] = label
        explainers = [
            Explainer(
                compile_model(
                    model,
                    {name: dict(choices[label].options) for name, label in graph.items()},
                    **compiling,
                ),
                providers,
                threads=threads,
            )
            for graph in labels
        ]
        return Lineup(choices, tuple(explainers), tuple(labels))

    def __call__(self, inputs: Any, /, **rest: Any) -> Explanation:
        """Explain a batch as :class:`Explainer` does, with ``by_method`` keyed by label."""
        found = [explain(inputs, **rest) for explain in self.explainers]
        maps: dict[str, dict[str, Any]] = {}
        deltas: dict[str, Any] = {}
        for result, labels in zip(found, self.labels, strict=True):
            maps |= {labels[name]: a for name, a in result.by_method.items()}
            deltas |= {labels[name]: delta for name, delta in result.delta_by_method.items()}
        return replace(
            found[0],
            by_method={label: maps[label] for label in self.choices},
            delta_by_method={label: deltas[label] for label in self.choices if label in deltas},
        )


__all__ = ["Lineup"]
