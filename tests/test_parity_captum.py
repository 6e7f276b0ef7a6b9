"""The gradient family against Captum, on drawn networks, as both of torch's exporters write them.

Convolutional networks over one, two and three axes with BatchNormalization, overlapping pools,
residuals and mixed activations, and MLPs with biases; every weight and most of the structure come
from a seed. Where Captum computes something else, the test says what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
captum = pytest.importorskip("captum.attr")

import onnx_attrib  # noqa: E402

from . import zoo  # noqa: E402
from .test_architectures import close, infer  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn

    Module = nn.Module
else:
    from torch import nn

    Module = nn.Module

Array = np.ndarray[Any, Any]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU)
BATCH, CLASSES = 3, 6


class Residual(Module):
    """x + norm(conv(act(norm(conv(x))))), then an activation."""

    def __init__(self, axes: int, channels: int, inner: Module, outer: Module) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        self.body = nn.Sequential(
            conv(channels, channels, 3, padding=1),
            norm(channels),
            inner,
            conv(channels, channels, 3, padding=1, bias=False),
            norm(channels),
        )
        self.outer = outer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(x + self.body(x))
        return out


class Drawn(Module):
    """features (the layer for Grad-CAM), an overlapping pool, dense layers.

    Every activation is a module of its own: Captum finds ReLUs by their modules.
    """

    def __init__(self, axes: int, rng: np.random.Generator) -> None:
        super().__init__()

        def activation(relu: float = 0.6) -> Module:
            if rng.random() < relu:
                return nn.ReLU()
            made: Module = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]()
            return made

        width = int(rng.integers(4, 8))
        dense: list[Module] = []
        if axes:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
            norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
            pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
            mean = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
            layers = [conv(2, width, 3, padding=int(rng.integers(2))), norm(width), nn.ReLU()]
            layers += [pool(3, 2, int(rng.integers(2)))]
            for _ in range(int(rng.integers(1, 3))):
                layers.append(Residual(axes, width, activation(), activation()))
            layers += [mean(2, 1), conv(width, width + 1, 2), activation(1 / 3)]
            self.features: Module = nn.Sequential(*layers)
            dense += [(mean, pool)[rng.integers(2)](2, 1), nn.Flatten(), nn.LazyLinear(10)]
        else:
            self.features = nn.Identity()
            dense += [nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 10)]
        dense += [activation(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, CLASSES)]
        self.head = nn.Sequential(*dense)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


@dataclass
class Case:
    axes: int
    module: Module
    model: onnx.ModelProto
    x: Tensor
    base: Tensor
    target: Tensor

    def ours(self, method: str, **options: Any) -> Array:
        """One attribution of the compiled model."""
        compiled = onnx_attrib.compile(self.model, method, **options)
        onnx.checker.check_model(compiled, full_check=True)
        feeds = {"x": self.x.numpy(), "target": self.target.numpy()}
        if options.get("baseline") == "input":
            feeds["x_baseline"] = self.base.numpy()
        found: Array = infer(compiled, feeds)["x_attribution"]
        return found

    def theirs(self, made: Callable[[Module], Any], **options: Any) -> Array:
        """Captum's, with the method that ``made`` gives for the module."""
        found = made(self.module).attribute(self.x.clone(), target=self.target, **options)
        array: Array = found.detach().numpy()
        return array


def drawn(axes: int, seed: int, exporter: zoo.Exporter) -> Case:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng([axes, seed])
    module = Drawn(axes, rng)
    sizes = [int(size) for size in rng.integers(*((12, 18) if axes < 3 else (13, 15)), axes)]
    shape = (2, *sizes) if axes else (9,)
    module.train()
    with torch.no_grad():
        module(torch.randn(16, *shape) * 2)  # running statistics off the identity
    module.eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, base = torch.randn(BATCH, *shape), 0.5 * torch.randn(BATCH, *shape)
    target = torch.from_numpy(rng.permutation(CLASSES)[:BATCH])
    return Case(axes, module, zoo.export(module, x, exporter), x, base, target)


@pytest.fixture(
    scope="module",
    params=[
        (axes, seed, exporter)
        for axes, seeds in ((0, 2), (1, 2), (2, 3), (3, 1))
        for seed in range(seeds)
        for exporter in zoo.EXPORTERS
    ],
    ids=lambda p: f"{p[0]}d-{p[1]}-{p[2]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    return drawn(*request.param)


@pytest.fixture
def spatial(case: Case) -> Case:
    if not case.axes:
        pytest.skip("an MLP has no positions")
    return case


@pytest.mark.parametrize(
    ("method", "made", "options"),
    [
        ("gradient", captum.Saliency, {"abs": False}),
        ("saliency", captum.Saliency, {}),
        ("gradient-x-input", captum.InputXGradient, {}),
        ("deconvnet", captum.Deconvolution, {}),
        ("guided-backprop", captum.GuidedBackprop, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients(case: Case, method: str, made: Any, options: dict[str, Any]) -> None:
    close(case.ours(method), case.theirs(made, **options))


STEPS = 12


@pytest.mark.parametrize(
    ("quadrature", "theirs", "factor"),
    [
        ("gauss-legendre", "gausslegendre", 1),
        # Captum's weights are 1/n and half of it at the ends: they sum to (n − 1)/n.
        ("trapezoid", "riemann_trapezoid", STEPS / (STEPS - 1)),
        ("middle", "riemann_middle", 1),
        ("left", "riemann_left", 1),
        ("right", "riemann_right", 1),
    ],
)
def test_integrated_gradients(case: Case, quadrature: str, theirs: str, factor: float) -> None:
    found = case.ours("integrated-gradients", steps=STEPS, quadrature=quadrature, baseline="input")
    expected = case.theirs(
        captum.IntegratedGradients, baselines=case.base, n_steps=STEPS, method=theirs
    )
    close(found, expected * factor)


def same(found: Array, expected: Array) -> None:
    """Within 1e-4 of the largest entry of each sample; some maps are zero, and not all of them."""
    there = expected.reshape(BATCH, -1).any(1)
    assert there.any()
    assert not found[~there].any()
    close(found[there], expected[there])


LINEAR = ("linear", "bilinear", "trilinear")


def grad_cam(case: Case, relu: bool) -> Tensor:
    """Captum's map at its layer."""
    layer = captum.LayerGradCam(case.module, case.module.features)
    found: Tensor = layer.attribute(case.x, target=case.target, relu_attributions=relu)
    return found.detach()


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_of_the_layer(spatial: Case, relu: bool) -> None:
    """The layer that is found is the last block's output."""
    same(spatial.ours("grad-cam", relu=relu, upsample=False), grad_cam(spatial, relu).numpy())


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_grad_cam(spatial: Case, relu: bool, interpolation: str) -> None:
    # Captum passes the mode on to torch; its "nearest" has no half-pixel centres.
    mode = "nearest-exact" if interpolation == "nearest" else LINEAR[spatial.axes - 1]
    expected = captum.LayerAttribution.interpolate(
        grad_cam(spatial, relu), tuple(spatial.x.shape[2:]), mode
    )
    same(spatial.ours("grad-cam", relu=relu, interpolation=interpolation), expected.numpy())


def test_guided_grad_cam(spatial: Case) -> None:
    expected = spatial.theirs(
        lambda module: captum.GuidedGradCam(module, module.features),
        interpolate_mode=LINEAR[spatial.axes - 1],
    )
    same(spatial.ours("guided-grad-cam"), expected)
