"""The list of networks, their inputs and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import VGG11, Genomics, Inception, MobileNetV2, ResNet, ViT
from .small import (
    Adjacent,
    DenseBlock,
    DilatedPool,
    Encoder,
    GatedProduct,
    GroupNorms,
    Mlp,
    ReusedRelu,
    Segmenter,
    SiLU,
    SqueezeExcite,
)


@dataclass(frozen=True)
class Entry:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # without the batch axis
    slow: bool = False
    data: Literal["normal", "one-hot"] = "normal"


_IMAGE = (3, 16, 16)
ZOO: dict[str, Entry] = {
    "resnet18": Entry(lambda: ResNet((2, 2, 2, 2), bottleneck=False), (3, 64, 64), slow=True),
    "resnet50": Entry(lambda: ResNet((3, 4, 6, 3), bottleneck=True), (3, 64, 64), slow=True),
    "vgg11": Entry(lambda: VGG11(batch_norm=False), (3, 64, 64), slow=True),
    "vgg11_bn": Entry(lambda: VGG11(batch_norm=True), (3, 64, 64), slow=True),
    "mobilenet": Entry(MobileNetV2, (3, 64, 64), slow=True),
    "inception": Entry(Inception, (3, 75, 75), slow=True),
    "genomics": Entry(Genomics, (4, 200), data="one-hot"),
    "vit": Entry(ViT, (3, 32, 32), slow=True),
    "squeeze_excite": Entry(SqueezeExcite, _IMAGE),
    "gated_product": Entry(GatedProduct, _IMAGE),
    "silu": Entry(SiLU, _IMAGE),
    "reused_relu": Entry(ReusedRelu, _IMAGE),
    "adjacent": Entry(Adjacent, _IMAGE),
    "group_norms": Entry(GroupNorms, _IMAGE),
    "dilated_pool": Entry(DilatedPool, _IMAGE),
    "dense_block": Entry(DenseBlock, _IMAGE),
    "mlp": Entry(Mlp, (32,)),
    "encoder": Entry(Encoder, (9, 12)),
    "segmenter": Entry(Segmenter, _IMAGE),
}


def sample(name: str, batch: int, seed: int) -> Tensor:
    """Random inputs of the kind that the network `name` takes."""
    entry = ZOO[name]
    generator = torch.Generator().manual_seed(seed)
    if entry.data == "one-hot":
        channels, length = entry.shape
        letters = torch.randint(channels, (batch, length), generator=generator)
        return functional.one_hot(letters, channels).transpose(1, 2).float().contiguous()
    return torch.randn(batch, *entry.shape, generator=generator)


def baseline(name: str, batch: int, seed: int) -> Tensor:
    """Random references, nowhere zero: offset noise, or the letter frequencies of one-hot DNA."""
    entry = ZOO[name]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *entry.shape, generator=generator)
    return noise.softmax(1) if entry.data == "one-hot" else 0.5 * noise + 0.3


def build(name: str, seed: int = 0) -> nn.Module:
    """The network `name` in eval mode, with weights drawn from `seed`."""
    module = ZOO[name].make()
    _draw(module, torch.Generator().manual_seed(seed))
    _settle(module, sample(name, 16, seed + 1), torch.Generator().manual_seed(seed + 2))
    return module.eval()


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """He-normal matrices and kernels, everything else off its default."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() > 1 and "weight" in leaf:
            gain = 1.0 if "attention" in name or name.startswith("head") else math.sqrt(2)
            parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
        elif leaf in ("token", "positions"):
            parameter.copy_(0.5 * noise)
        elif "weight" in leaf:  # the scale of a normalisation, the slope of a PReLU
            parameter.copy_(parameter + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


@torch.no_grad()
def _settle(module: nn.Module, data: Tensor, generator: torch.Generator) -> None:
    """BatchNorm statistics near those of `data`, and logits with a standard deviation of 2."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None  # a plain average, here of one batch
    module.train()
    module(data)
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean += 0.2 * var.sqrt() * torch.randn(mean.shape, generator=generator)
        var *= 0.6 + 0.8 * torch.rand(var.shape, generator=generator)
    module.eval()
    head = module.get_submodule("head")
    assert isinstance(head, (nn.Linear, nn.Conv2d))
    assert head.bias is not None
    logits = module(data)
    # Each class varies between inputs by about 2; its mean over the inputs stays near zero.
    axes = tuple(axis for axis in range(logits.dim()) if axis != 1)
    head.weight *= (2 / logits.std(axes)).reshape(-1, *[1] * (head.weight.dim() - 1))
    head.bias.zero_()
    head.bias.copy_(0.5 - module(data).mean(axes))
