"""How a model was compiled, as its metadata tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_attrib.errors import ModelError

PREFIX = "onnx_attrib."
"""Of the metadata that says how a model was compiled."""


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
