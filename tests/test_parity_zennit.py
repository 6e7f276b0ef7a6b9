"""LRP against zennit on networks drawn afresh: every rule and composite, and rules by name.

zennit works on torch modules: residuals are its `Sum` here (plain additions in what is exported),
BatchNormalization is merged by its canonizer. It and this package share these conventions: the
bias goes with the positive data, z⁺ and αβ take its positive or negative part, w² its square, flat
none. Only the first layer that runs has a composite's special rule in zennit, so the networks
have one first layer.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_attrib

from . import numeric

torch = pytest.importorskip("torch")
zennit = pytest.importorskip("zennit")

from torch import nn  # noqa: E402
from zennit import composites, rules  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.layer import Sum  # noqa: E402
from zennit.types import Linear  # noqa: E402

from .zoo import quiet  # noqa: E402

pytestmark = pytest.mark.slow

LOW, HIGH = -3.0, 2.5
TARGET = 2
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU)
EXPORTS = ("dynamo", "dynamo-unfolded", "legacy", "legacy-unfolded")


class Residual(nn.Module):
    """body(x) + x, by a module that zennit knows, or (``plain``) by an addition."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.sum, self.plain = body, Sum(), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return x + y if self.plain else self.sum(torch.stack([x, y], -1))


def dense(rng: np.random.Generator, act: type[nn.Module]) -> tuple[nn.Module, tuple[int, ...]]:
    widths = [int(w) for w in rng.integers(6, 24, int(rng.integers(2, 5)))]
    layers: list[nn.Module] = []
    for a, b in zip(widths, [*widths[1:], 5], strict=True):
        layers.append(nn.Linear(a, b))
        if rng.random() < 0.4:
            layers.append(nn.BatchNorm1d(b))
        layers.append(act())
        if rng.random() < 0.4:
            layers.append(Residual(nn.Sequential(nn.Linear(b, b), act())))
    return nn.Sequential(*layers, nn.Linear(5, 4)), (widths[0],)


def convolutional(
    rng: np.random.Generator, act: type[nn.Module], dims: int
) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions with strides, groups and dilations, BatchNormalization, overlapping pools."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    largest = {1: nn.MaxPool1d, 2: nn.MaxPool2d}[dims]
    mean = {1: nn.AvgPool1d, 2: nn.AvgPool2d}[dims]
    whole = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}[dims]
    channels, size = int(rng.integers(1, 4)), (int(rng.integers(21, 26)),) * dims
    layers, width = list[nn.Module](), channels
    for k in range(int(rng.integers(2, 4))):
        out = 2 * int(rng.integers(2, 5))
        how: dict[str, Any] = {"padding": int(rng.integers(0, 2)), "bias": rng.random() < 0.6}
        if rng.random() < 0.3:
            how["stride" if k else "dilation"] = 2
        if width % 2 == 0 and rng.random() < 0.3:
            how["groups"] = 2
        layers.append(conv(width, out, 3, **how))
        if rng.random() < 0.6:
            layers.append(norm(out))
        layers.append(act())
        if rng.random() < 0.4:
            body = [conv(out, out, 3, padding=1, bias=False), norm(out), act()]
            layers.append(Residual(nn.Sequential(*body)))
        pool = rng.integers(0, 3)
        if pool == 1:
            layers.append(largest(3, 2, 1))
        if pool == 2:
            layers.append(mean(3, 2, 1))
        width = out
    if rng.random() < 0.5:
        layers += [whole(1), nn.Flatten()]
    else:
        layers.append(nn.Flatten())
    return nn.Sequential(*layers), (channels, *size)


def drawn(kind: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network of a kind with random weights, biases and statistics, and inputs for it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    act = ACTIVATIONS[seed % len(ACTIVATIONS)]
    if kind == "dense":
        model, shape = dense(rng, act)
    else:
        model, shape = convolutional(rng, act, 2 if kind == "2-D" else 1)
        with torch.no_grad():
            wide = model(torch.zeros(2, *shape)).shape[1]
        model = nn.Sequential(*model, nn.Linear(wide, 8), act(), nn.Linear(8, 4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.4)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        alive = bool((model.eval()(x).std(0) > 1e-5).all())
    return (model, x) if alive else drawn(kind, seed + 1000 * len(ACTIVATIONS))


def exported(model: nn.Module, x: torch.Tensor, how: str) -> onnx.ModelProto:
    """``model`` as ONNX with a dynamic batch."""
    folded = "unfolded" not in how
    for module in model.modules():
        if isinstance(module, Residual):
            module.plain = True
    with quiet():
        if how.startswith("dynamo"):
            shapes = ({0: torch.export.Dim("N")},)
            program = torch.onnx.export(
                model, (x,), dynamo=True, dynamic_shapes=shapes, input_names=["x"], optimize=folded
            )
            result = program.model_proto
        else:
            stream = io.BytesIO()
            mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
            axes = {"x": {0: "N"}, "y": {0: "N"}}
            torch.onnx.export(
                model,
                (x,),
                stream,
                dynamo=False,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes=axes,
                training=mode,
            )
            result = onnx.load_from_string(stream.getvalue())
    for module in model.modules():
        if isinstance(module, Residual):
            module.plain = False
    return result


def oracle(
    model: nn.Module, x: torch.Tensor, composite: Any, dtype: torch.dtype = torch.float64
) -> np.ndarray:
    """zennit's relevance of the input."""
    x = x.clone().to(dtype).requires_grad_()
    with composite.context(copy.deepcopy(model).to(dtype)) as hooked:
        y = hooked(x)
        seed = torch.zeros_like(y)
        seed[:, TARGET] = y[:, TARGET].detach()
        (relevance,) = torch.autograd.grad(y, x, seed)
    return relevance.numpy()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest entry."""
    assert np.isfinite(expected).all()
    assert expected.any()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def agrees(
    proto: onnx.ModelProto, model: nn.Module, x: torch.Tensor, theirs: Any, **options: Any
) -> bool:
    """Whether relevances are within 1e-4 of the largest.

    Where an average or a sum is close to zero, relevance that does not vanish with it is a matter
    of rounding: zennit's own in float32 is off. Such networks are judged in float64, within 1e-6,
    from an export whose weights are those of the module.
    """
    options = {"method": "lrp", "target": TARGET, **options}
    expected = oracle(model, x, theirs)
    found = numeric.run(onnx_attrib.compile(proto, **options), {"x": x.numpy()})
    if apart(found["x_attribution"], expected) <= 1e-4:
        return True
    if apart(oracle(model, x, theirs, torch.float32), expected) <= 1e-5:
        return False
    wide = numeric.widened(onnx_attrib.compile(exported(model, x, "legacy-unfolded"), **options))
    with numeric.wide_evaluator():
        evaluator = numeric.Evaluator(wide)
        (exact,) = evaluator.run(["x_attribution"], {"x": x.double().numpy()})
    return apart(exact, expected) <= 1e-6


def one_rule(rule: Any) -> Any:
    """A composite of one rule for all layers."""
    layer_map = [*composites.layer_map_base(), (Linear, rule)]
    return composites.LayerMapComposite(layer_map, canonizers=[SequentialMergeBatchNorm()])


RULES: dict[str, tuple[Callable[[], Any], Mapping[str, Any]]] = {
    "epsilon": (lambda: rules.Epsilon(0.05), {"epsilon": 0.05}),
    "zplus": (rules.ZPlus, {}),
    "gamma": (lambda: rules.Gamma(0.4), {"gamma": 0.4}),
    "alpha1beta0": (lambda: rules.AlphaBeta(1.0, 0.0), {}),
    "alpha2beta1": (lambda: rules.AlphaBeta(2.0, 1.0), {}),
    "wsquare": (rules.WSquare, {}),
    "flat": (rules.Flat, {}),
    "zbox": (lambda: rules.ZBox(LOW, HIGH), {"low": LOW, "high": HIGH}),
}
COMPOSITES: dict[str, Mapping[str, Any]] = {
    "epsilon-plus": {},
    "epsilon-plus-flat": {},
    "epsilon-gamma-box": {"low": LOW, "high": HIGH},
    "epsilon-alpha2-beta1": {},
    "epsilon-alpha2-beta1-flat": {},
}


KINDS = ("dense", "2-D", "1-D")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_rules_and_composites(kind: str, seed: int) -> None:
    model, x = drawn(kind, seed)
    proto = exported(model, x, EXPORTS[(seed // len(ACTIVATIONS) + seed) % len(EXPORTS)])
    wrong = [
        rule
        for rule, (make, options) in RULES.items()
        if not agrees(proto, model, x, one_rule(make()), rule=rule, **options)
    ]
    for name, options in COMPOSITES.items():
        if kind == "dense" and "box" in name:
            continue  # zennit has the box for convolutions only, and so have we
        make = composites.COMPOSITES[name.replace("-", "_")]
        theirs = make(**options, canonizers=[SequentialMergeBatchNorm()])
        if not agrees(proto, model, x, theirs, composite=name, **options):
            wrong.append(name)
    assert not wrong


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_rules_by_name(kind: str, seed: int) -> None:
    """A rule of its own for each layer, by the node's name here and the module's there."""
    model, x = drawn(kind, 100 + seed)
    proto = exported(model, x, "legacy-unfolded")
    rng = np.random.default_rng(seed)
    modules = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    nodes = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    chosen = rng.choice([name for name in RULES if name != "zbox"], len(modules))
    assert len(modules) == len(nodes)
    there = [((m,), RULES[rule][0]()) for m, rule in zip(modules, chosen, strict=True)]
    here = {
        node: {"rule": rule, **RULES[rule][1]}
        for node, rule in zip(nodes, chosen, strict=True)
        if rule != "zplus"
    }
    by_name = composites.NameMapComposite(there)
    others = composites.LayerMapComposite(composites.layer_map_base())
    mixed = composites.MixedComposite([by_name, others], [SequentialMergeBatchNorm()])
    # Patterns are tried in order: the last one takes what is left.
    rules_by_name = {**here, "*": "zplus"}
    assert agrees(proto, model, x, mixed, rules=rules_by_name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_deep_taylor(kind: str, seed: int) -> None:
    """z⁺ without biases, w² or the box in the first layer: zennit's rules with ``zero_params``."""
    model, x = drawn(kind, 260 + seed)
    proto = exported(model, x, EXPORTS[seed % len(EXPORTS)])
    for box in (False, True):
        first = rules.ZBox(LOW, HIGH) if box else rules.WSquare(zero_params="bias")
        composite = composites.SpecialFirstLayerMapComposite(
            [*composites.layer_map_base(), (Linear, rules.ZPlus(zero_params="bias"))],
            [(Linear, first)],
            canonizers=[SequentialMergeBatchNorm()],
        )
        options = {"low": LOW, "high": HIGH} if box else {}
        assert agrees(proto, model, x, composite, method="deep-taylor", **options)


def test_range_of_each_channel() -> None:
    """The box may be an array, of one range for each channel."""
    model, x = drawn("2-D", 302)
    channels = x.shape[1]
    rng = np.random.default_rng(0)
    low = -2 - rng.random((channels, 1, 1)).astype(np.float32)
    high = 2 + rng.random((1, channels, 1, 1)).astype(np.float32)
    box = rules.ZBox(torch.tensor(low[None]).double(), torch.tensor(high).double())
    composite = composites.SpecialFirstLayerMapComposite(
        [*composites.layer_map_base(), (Linear, rules.ZPlus())],
        [(Linear, box)],
        canonizers=[SequentialMergeBatchNorm()],
    )
    proto = exported(model, x, "dynamo")
    first = next(n.name for n in proto.graph.node if n.op_type == "Conv")
    options = {"rule": "zplus", "rules": {first: "zbox"}, "low": low, "high": high}
    assert agrees(proto, model, x, composite, **options)
