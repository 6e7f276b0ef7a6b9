"""Class activation maps: which positions of a convolutional layer speak for the output.

With A [N, C, …] the value of a layer and g = ∂S/∂A, the map is max(0, Σ_k …) over its channels k,
[N, 1, …], enlarged to the input's positions:

- Grad-CAM: Σ_k mean(g_k) · A_k, the mean over positions (Selvaraju et al. 2017);
- Grad-CAM++: Σ_k w_k · A_k with w_k = Σ α_k · max(g_k, 0) over positions and
  α_k = g_k² / (2 g_k² + (Σ A_k) · g_k³) (Chattopadhay et al. 2018). This is the paper's closed form
  for the score exp(S), of which only the factor exp(S) is left out: it is positive and the same
  for all positions of a sample. Common implementations compute the same; some skip max(g, 0);
- Layer-CAM: Σ_k max(g_k, 0) · A_k (Jiang et al. 2021);
- guided Grad-CAM: the enlarged map of Grad-CAM times guided backprop, [N, C, …] like the input.

Enlarging is linear or by the nearest entry, with half-pixel centres: torch's
``align_corners=False`` and ``nearest-exact``. Captum's ``nearest`` takes other entries where
sizes are no multiples, and its maps keep negative entries unless told otherwise.
"""

from collections.abc import Callable

from onnx_attrib.ir import Emitter, Tensor
from onnx_attrib.methods.base import GRADIENT, Map, Method, Option, Options, Table, switch
from onnx_attrib.methods.rectifier import GUIDED

Weigh = Callable[[Emitter, Tensor, Tensor, list[int]], Tensor]


def by_mean(op: Emitter, value: Tensor, gradient: Tensor, axes: list[int]) -> Tensor:
    """mean(g) · A."""
    weight = op.ReduceMean(gradient, axes, keepdims=1) if axes else gradient
    return op.Mul(weight, value)


def by_curvature(op: Emitter, value: Tensor, gradient: Tensor, axes: list[int]) -> Tensor:
    """(Σ α · max(g, 0)) · A, where α · g = g / (2 + g · Σ A): no power can underflow."""
    total = op.ReduceSum(value, axes, keepdims=1) if axes else value
    share = op.Div(gradient, op.Add(op.Mul(gradient, total), 2.0))
    share = op.Where(op.Greater(gradient, 0.0), share, 0.0)
    weight = op.ReduceSum(share, axes, keepdims=1) if axes else share
    return op.Mul(weight, value)


def by_position(op: Emitter, value: Tensor, gradient: Tensor, axes: list[int]) -> Tensor:
    """max(g, 0) · A."""
    return op.Mul(op.Relu(gradient), value)


LAYER = Option(
    "layer",
    "auto",
    "a tensor's name; auto: the last convolution block, after its activation",
    read=str,
)
INTERPOLATION = Option(
    "interpolation",
    "bilinear",
    "how the map is enlarged; bilinear is linear and trilinear for one and three axes",
    ("bilinear", "nearest"),
)
UPSAMPLE = Option(
    "upsample",
    True,
    "enlarge the map to the input's positions, or leave it at the layer's",
    read=switch,
)
RELU = Option("relu", True, "negative entries of the map become zero", read=switch)


def activation_map(
    name: str, summary: str, paper: str, weigh: Weigh, table: Table = GRADIENT, guides: bool = False
) -> Method:
    """A method that reports a map, or its product with the multipliers by ``table``."""

    def made(options: Options) -> Map:
        return Map(
            layer=options["layer"],
            weigh=weigh,
            rectified=options["relu"],
            upsampled=options.get("upsample", True),
            interpolation=options["interpolation"],
            guides=guides,
        )

    return Method(
        name=name,
        summary=summary,
        g="f'(z) · [m > 0] at ReLUs, f'(z) elsewhere" if guides else "f'(z)",
        paper=paper,
        table=lambda options: table,
        attribution=lambda op, m, x, reference: m,
        options=(LAYER, INTERPOLATION, *(() if guides else (UPSAMPLE,)), RELU),
        clusters="rectifiers" if guides else "",
        signed=True if guides else lambda options: not options["relu"],
        map=made,
    )


grad_cam = activation_map(
    "grad-cam",
    "max(0, Σ mean gradient · channel) at each position of a convolutional layer",
    "Selvaraju et al. 2017, Grad-CAM (arXiv 1610.02391)",
    by_mean,
)
grad_cam_plus_plus = activation_map(
    "grad-cam++",
    "Grad-CAM with weights that count positions by their curvature",
    "Chattopadhay et al. 2018, Grad-CAM++ (arXiv 1710.11063)",
    by_curvature,
)
layer_cam = activation_map(
    "layer-cam",
    "max(0, Σ positive gradient · channel), position by position",
    "Jiang et al. 2021, LayerCAM (doi 10.1109/TIP.2021.3089943)",
    by_position,
)
guided_grad_cam = activation_map(
    "guided-grad-cam",
    "guided backprop, times the enlarged map of Grad-CAM",
    "Selvaraju et al. 2017, Grad-CAM (arXiv 1610.02391)",
    by_mean,
    table=GUIDED,
    guides=True,
)
