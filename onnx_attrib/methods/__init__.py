"""Table 1 of Ancona et al. 2017 as code: every method is a row."""

from __future__ import annotations

from onnx_attrib.errors import OptionError, suggest
from onnx_attrib.methods.base import Method, Option
from onnx_attrib.methods.cam import grad_cam, grad_cam_plus_plus, guided_grad_cam, layer_cam
from onnx_attrib.methods.deeplift import deeplift
from onnx_attrib.methods.gradient import gradient, gradient_x_input, saliency
from onnx_attrib.methods.lrp import epsilon_lrp
from onnx_attrib.methods.path import integrated_gradients
from onnx_attrib.methods.pattern import pattern_attribution, pattern_net
from onnx_attrib.methods.perturbation import occlusion, shapley_sampling
from onnx_attrib.methods.rectifier import deconvnet, guided_backprop
from onnx_attrib.methods.relevance import deep_taylor, lrp
from onnx_attrib.methods.shap import deep_shap, expected_gradients
from onnx_attrib.methods.smoothgrad import smoothgrad

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        gradient,
        saliency,
        gradient_x_input,
        deconvnet,
        guided_backprop,
        grad_cam,
        grad_cam_plus_plus,
        layer_cam,
        guided_grad_cam,
        epsilon_lrp,
        lrp,
        deep_taylor,
        deeplift,
        deep_shap,
        integrated_gradients,
        expected_gradients,
        pattern_net,
        pattern_attribution,
    )
}
METHODS["smoothgrad"] = smoothgrad(list(METHODS.values()))
METHODS |= {method.name: method for method in (occlusion, shapley_sampling)}


def get(name: str) -> Method:
    """The method of that name ('_' and '-' are the same); OptionError if there is none."""
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        raise OptionError(f"unknown method '{name}': {suggest(name, list(METHODS))}")
    return method


__all__ = ["METHODS", "Method", "Option", "get"]
