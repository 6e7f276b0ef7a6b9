"""Table 1 of Ancona et al. 2017 as code: every method is a row."""

from __future__ import annotations

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.methods.base import Method, Option
from onnx_attrib.methods.deeplift import deeplift
from onnx_attrib.methods.gradient import gradient, gradient_x_input, saliency
from onnx_attrib.methods.lrp import epsilon_lrp
from onnx_attrib.methods.path import integrated_gradients

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        gradient,
        saliency,
        gradient_x_input,
        epsilon_lrp,
        deeplift,
        integrated_gradients,
    )
}


def get(name: str) -> Method:
    """The method of that name ('_' and '-' are the same); OptionError if there is none."""
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        raise OptionError(f"unknown method '{name}': {suggest(name, list(METHODS))}")
    return method


__all__ = ["METHODS", "Method", "Option", "get"]
