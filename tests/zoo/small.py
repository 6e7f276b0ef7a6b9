"""Small networks, each with something that other libraries get wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import CLASSES


class Small(nn.Module):
    """stem -> `middle` (16 channels at 16x16 to 16 channels) -> mean -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.stem(x)).mean((2, 3)))
        return out


class SqueezeExcite(Small):
    """A channel gate: the product of two branches that both depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(16, 8, 1)
        self.excite = nn.Conv2d(8, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        gate = torch.sigmoid(
            self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1))))
        )
        return x * gate


class GatedProduct(Small):
    """A gated linear unit, and a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Conv2d(16, 32, 3, padding=1)
        self.scale = nn.Conv2d(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        gated = functional.glu(self.value(torch.tanh(x)), 1)
        return gated / (1 + functional.softplus(self.scale(x)))


class SiLU(Small):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 3, 2, 1)

    def middle(self, x: Tensor) -> Tensor:
        return functional.silu(self.inner(functional.silu(x)))


class ReusedRelu(Small):
    """One nn.ReLU and the functional one, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        first = self.relu(x)
        second = self.relu(self.inner(first))
        return functional.relu(second - first) + functional.relu(first - 0.5)


class Adjacent(Small):
    """Nonlinearities one after another with no layer between them, a pool among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.tanh(functional.relu(x)), 2)
        x = functional.softplus(functional.leaky_relu(self.inner(x), 0.2))
        return functional.max_pool2d(torch.sigmoid(functional.elu(x - 1)), 3, 1)


class GroupNorms(Small):
    """Normalisation by statistics of the input itself: over groups, and over each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(4, 16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.instance = nn.InstanceNorm2d(16, affine=True)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.group(x))
        return functional.relu(self.instance(self.inner(x)))


class DilatedPool(Small):
    """Max-pools with dilation, with padding, with ceil_mode; an average pool with a ragged edge."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, padding=1, dilation=2)
        self.ragged = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.average = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.inner = nn.Conv2d(16, 16, 3)

    def middle(self, x: Tensor) -> Tensor:
        x = self.average(self.pool(functional.relu(x)))
        out: Tensor = self.ragged(self.inner(x))
        return functional.hardswish(out)


class DenseBlock(Small):
    """Pre-activation, densely connected: no BatchNorm can be folded into a convolution before."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(16 + 8 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3)])
        self.transition = nn.Conv2d(40, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(functional.relu(norm(x)))], 1)
        return functional.avg_pool2d(functional.relu(self.transition(x)), 2)


class Mlp(nn.Module):
    """Dense layers over a vector; the last layer's input is a Mish and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 48)
        self.prelu = nn.PReLU(48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.prelu(self.first(x))
        out: Tensor = self.head(hidden + functional.mish(self.second(hidden)))
        return out


class Encoder(nn.Module):
    """nn.MultiheadAttention in a post-norm encoder layer over a sequence of vectors."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 64), nn.GELU(approximate="tanh"), nn.Linear(64, width)
        )
        self.norm2 = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm1(x + self.attention(x, x, x, need_weights=True)[0])
        x = self.norm2(x + self.mlp(x))
        out: Tensor = self.head(x.mean(1))
        return out


class Segmenter(nn.Module):
    """An encoder and decoder with a skip: an output per pixel, strided ConvTranspose."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.relu(self.down1(x))
        deep = functional.relu(self.up(functional.relu(self.down2(skip))))
        out: Tensor = self.head(torch.cat([skip, deep], 1))
        return out
