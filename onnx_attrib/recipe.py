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
    tuple; ``targets``: how many of the largest classes, or which ones, if several are explained
    (else None); ``baseline``: ``"zeros"``, ``"input"``, a number, ``"array"``, or None for methods
    without a reference; ``reduce`` and ``normalize``: what was made of the attributions;
    ``source_sha256``: of the model it was compiled from; ``apart``: whether the samples of a batch
    are independent of each other; ``precision``: ``"fp16"`` if float16 is used where it is safe.
    ``methods``: the options of each method.
    """

    methods: Mapping[str, Mapping[str, Any]]
    inputs: tuple[str, ...]
    output: str
    output_shape: tuple[int | str | None, ...] | None
    target: str | int | tuple[int, ...]
    baseline: str | float | None
    version: str
    source_sha256: str
    targets: int | tuple[int, ...] | None
    reduce: Mapping[str | int, str]
    normalize: bool
    apart: bool = False
    precision: str = "keep"

    @property
    def method(self) -> str:
        """The method's name; of several, the names with commas between."""
        return ",".join(self.methods)

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's options; of several, the options of each."""
        return self.methods if len(self.methods) > 1 else next(iter(self.methods.values()))

    def attribution(self, tensor: str, method: str) -> str:
        """The output that holds a method's attribution of a tensor."""
        return f"{tensor}_attribution{self._suffix(method)}"

    def delta(self, method: str) -> str:
        """The output that holds a method's convergence delta, if it has one."""
        return f"convergence_delta{self._suffix(method)}"

    def _suffix(self, method: str) -> str:
        return f"_{method}" if len(self.methods) > 1 else ""

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
            targets = json.loads(found.get("targets", "null"))
            shape = json.loads(found.get("output_shape", "null"))
            reduce = json.loads(found.get("reduce", "{}"))
            names, options = found["method"].split(","), json.loads(found["options"])
            return Recipe(
                methods={n: options[n] for n in names} if names[1:] else {names[0]: dict(options)},
                inputs=tuple(json.loads(found["inputs"])),
                output=found["output"],
                output_shape=None if shape is None else tuple(shape),
                target=tuple(target) if isinstance(target, list) else target,
                baseline=json.loads(found["baseline"]),
                version=found.get("version", ""),
                source_sha256=found.get("source_sha256", ""),
                targets=tuple(targets) if isinstance(targets, list) else targets,
                reduce={int(k) if k.isdecimal() else k: how for k, how in reduce.items()},
                normalize=json.loads(found.get("normalize", "false")),
                apart=json.loads(found.get("apart", "false")),
                precision=found.get("precision", "keep"),
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
            "targets": list(self.targets) if isinstance(self.targets, tuple) else self.targets,
            "reduce": {str(axis): how for axis, how in self.reduce.items()},
            "normalize": self.normalize,
            "baseline": self.baseline,
            "precision": self.precision,
            "source_sha256": self.source_sha256,
        }
