"""Captum on the same network, for comparison: torch modules and what their attributions take.

The module is converted from the ONNX model by onnx2torch, or given. It has to compute what the
model computes, or the comparison would mean nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto

from onnx_attrib.errors import CompileError, OptionError, RuntimeMissingError
from onnx_attrib.feeds import Array, line
from onnx_attrib.job import Choice

PEERS = ("captum", "captum-export")
_TOLERANCE = 1e-3
"""Of outputs, relative to their largest entry: far more than float32 rounds, far less than another
network differs."""
_NEEDED = {"torch": "torch", "captum.attr": "captum"}


class Unsuited(Exception):
    """The peer lacks the method, or cannot apply it to this module; the message says why."""


def module_from(text: str) -> Any:
    """What ``package.module:factory`` returns when called; the current folder is searched too."""
    place, separator, name = text.partition(":")
    if not separator or not place or not name:
        raise OptionError(f"module '{text}' is not of the form package.module:factory")
    path = sys.path[:]
    sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(place)
        for part in name.split("."):
            made = getattr(made, part)
        return made()
    except Exception as error:  # whatever the user's code raises
        raise OptionError(f"module '{text}' cannot be made: {line(error)}") from None
    finally:
        sys.path[:] = path


class Captum:
    """A torch module, with a call of Captum for each method that Captum has."""

    name = "captum"

    def __init__(self, model: ModelProto, module: Any, threads: int) -> None:
        """``module``: None converts the model. Errors if torch or Captum are not installed, or if
        the conversion fails."""
        found = [required(name, package) for name, package in _NEEDED.items()]
        self._torch, self._captum = found
        self._torch.set_num_threads(threads)
        self.module = _converted(model) if module is None else module
        if not isinstance(self.module, self._torch.nn.Module):
            raise OptionError(f"the module is a {type(self.module).__name__}, not a torch module")
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def check(self, feeds: Mapping[str, Array], expected: Array) -> None:
        """Refuse a module that does not compute the explained output."""
        try:
            with self._torch.no_grad():
                y = self.module(*self._tensors(feeds))
        except Exception as error:  # torch's and the module's own
            raise CompileError(
                f"the torch module does not run on the model's inputs: {line(error)}"
            ) from None
        shape = list(y.shape) if isinstance(y, self._torch.Tensor) else type(y).__name__
        if shape != list(expected.shape):
            raise CompileError(
                f"the torch module gives {shape}, the explained output has {list(expected.shape)}"
            )
        gap = np.abs(y.numpy() - expected).max(initial=0.0)
        if not gap <= _TOLERANCE * np.abs(expected).max(initial=0.0):
            raise CompileError(
                f"the torch module is another network: its output differs by {gap:.2g}, with the "
                f"largest entry {np.abs(expected).max():.2g}"
            )

    def call(
        self,
        choice: Choice,
        feeds: Mapping[str, Array],
        attributed: Sequence[str],
        target: Array | None,
        baseline: Any,
    ) -> Callable[[], list[Array]]:
        """What attributes as ``choice`` does: arrays in the order of ``attributed``.

        ``target``: the class of each sample. Raises Unsuited.
        """
        attribute, xs = self._attribution(choice, feeds, attributed, target, baseline)

        def run() -> list[Array]:
            return [value.detach().numpy() for value in attribute(*xs)]

        try:
            run()
        except Exception as error:  # Captum's own, of many kinds
            raise Unsuited(f"captum failed: {line(error)}") from None
        return run

    def _attribution(
        self,
        choice: Choice,
        feeds: Mapping[str, Array],
        attributed: Sequence[str],
        target: Array | None,
        baseline: Any,
    ) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]:
        """From tensors to tensors what :meth:`call` does, and the tensors to call it with."""
        if list(attributed) != list(feeds):
            raise Unsuited("captum attributes to inputs, to all of them")
        xs = self._tensors(feeds)
        row = _ROWS.get(choice.method.name)
        if row is None:
            raise Unsuited("it is not compared with captum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explainer, arguments = row(self._captum, self.module, choice.options, xs)
        if choice.method.needs_reference:
            arguments["baselines"] = self._baselines(baseline, feeds, choice.method.background)
        classes = None if target is None else self._torch.from_numpy(target)

        def attribute(*tensors: Any) -> tuple[Any, ...]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return tuple(explainer.attribute(tensors, target=classes, **arguments))

        return attribute, xs

    def _tensors(self, feeds: Mapping[str, Array]) -> tuple[Any, ...]:
        return tuple(self._torch.from_numpy(np.array(value)) for value in feeds.values())

    def _baselines(self, baseline: Any, feeds: Mapping[str, Array], background: bool) -> Any:
        """Zeros, a number, or an array of one sample (of a background: of several) for each."""
        given = {
            name: np.asarray(baseline[name] if isinstance(baseline, Mapping) else baseline, x.dtype)
            for name, x in feeds.items()
        }
        rows = {}
        for name, x in feeds.items():
            count = 1 if given[name].ndim < x.ndim else len(given[name])
            rows[name] = np.broadcast_to(given[name], (count, *x.shape[1:]))
            if background and count == 1:
                # Captum takes a background of two samples or more.
                rows[name] = np.repeat(rows[name], 2, axis=0)
        return self._tensors(rows)


def required(name: str, package: str) -> Any:
    """A package that a comparison needs, or RuntimeMissingError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeMissingError(
            f"a comparison with captum needs {package} ({line(error)}): pip install torch captum"
        ) from None


def _converted(model: ModelProto) -> Any:
    try:
        from onnx2torch import convert
    except ImportError as error:
        raise RuntimeMissingError(
            "a comparison with captum needs the network as a torch module: give --module, or "
            f"install onnx2torch, which converts some models ({line(error)})"
        ) from None
    try:
        return convert(model)
    except Exception as error:  # onnx2torch's own, of many kinds
        raise CompileError(
            f"onnx2torch cannot convert the model: {line(error)}; give the network with --module"
        ) from None


# -- a row a method: Captum's explainer and its arguments ----------------------------------------

Row = Callable[[Any, Any, Mapping[str, Any], tuple[Any, ...]], tuple[Any, dict[str, Any]]]


def _plain(name: str, **arguments: Any) -> Row:
    return lambda captum, module, options, xs: (getattr(captum, name)(module), dict(arguments))


def _integrated(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
    quadrature = options["quadrature"].replace("-", "")
    method = quadrature if quadrature.startswith("gauss") else f"riemann_{quadrature}"
    arguments = {"n_steps": options["steps"], "method": method}
    return captum.IntegratedGradients(module), arguments


def _deeplift(name: str) -> Row:
    def row(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
        if options["rule"] != "rescale":
            raise Unsuited("captum has the Rescale rule only")
        return getattr(captum, name)(module), {}

    return row


def _expected(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
    arguments = {"n_samples": options["samples"], "stdevs": options["noise"]}
    return captum.GradientShap(module), arguments


def _smoothgrad(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
    averaged = options["of"]
    if averaged not in _AVERAGED:
        raise Unsuited(f"captum has no smoothgrad of {averaged}")
    inner, arguments = _ROWS[averaged](captum, module, options, xs)
    kinds = {"1": "smoothgrad", "2": "smoothgrad_sq", "variance": "vargrad"}
    deviations = tuple(float(options["noise"] * (x.max() - x.min())) for x in xs)
    draws = {"nt_samples": options["samples"], "stdevs": deviations}
    return captum.NoiseTunnel(inner), {"nt_type": kinds[options["power"]], **draws, **arguments}


def _windows(sizes: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """A window's sizes without the batch axis."""
    wanted = (sizes,) * len(shape) if isinstance(sizes, int) else tuple(sizes)
    if len(wanted) != len(shape):
        raise Unsuited(f"a window of {len(wanted)} sizes for an input of {len(shape)} axes")
    return tuple(n if size == -1 else min(size, n) for size, n in zip(wanted, shape, strict=True))


def _occlusion(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
    shapes = [tuple(x.shape[1:]) for x in xs]
    arguments = {
        "sliding_window_shapes": tuple(_windows(options["window"], shape) for shape in shapes),
        "strides": tuple(_windows(options["stride"], shape) for shape in shapes),
        "perturbations_per_eval": options["chunk"],
    }
    return captum.Occlusion(module), arguments


def _shapley(captum: Any, module: Any, options: Mapping[str, Any], xs: Any) -> Any:
    masks, count = [], 0
    for x in xs:
        shape = tuple(x.shape[1:])
        window = _windows(options["window"], shape)
        grid = [-(-n // size) for n, size in zip(shape, window, strict=True)]
        place = [i // size for i, size in zip(np.indices(shape), window, strict=True)]
        masks.append(x.new_tensor(np.ravel_multi_index(place, grid)[None] + count).long())
        count += int(np.prod(grid))
    arguments = {
        "n_samples": options["samples"],
        "feature_mask": tuple(masks),
        "perturbations_per_eval": options["chunk"],
    }
    return captum.ShapleyValueSampling(module), arguments


_ROWS: dict[str, Row] = {
    "gradient": _plain("Saliency", abs=False),
    "saliency": _plain("Saliency"),
    "gradient-x-input": _plain("InputXGradient"),
    "deconvnet": _plain("Deconvolution"),
    "guided-backprop": _plain("GuidedBackprop"),
    "deeplift": _deeplift("DeepLift"),
    "deep-shap": _deeplift("DeepLiftShap"),
    "integrated-gradients": _integrated,
    "expected-gradients": _expected,
    "smoothgrad": _smoothgrad,
    "occlusion": _occlusion,
    "shapley-sampling": _shapley,
}
_AVERAGED = ("gradient", "saliency", "gradient-x-input", "deconvnet", "guided-backprop")
RANDOM = ("expected-gradients", "smoothgrad", "shapley-sampling")
"""Methods whose numbers depend on what is drawn."""

__all__ = ["PEERS", "RANDOM", "Captum", "Unsuited", "module_from", "required"]
