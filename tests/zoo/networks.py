"""Well-known architectures, small where size does not matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A residual block: `body`, a projection where the shape changes, one ReLU used throughout."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * (4 if bottleneck else 1)
        self.relu = nn.ReLU()
        if bottleneck:
            layers = [
                conv_bn(inputs, width, 1),
                self.relu,
                conv_bn(width, width, 3, stride, 1),
                self.relu,
                conv_bn(width, outputs, 1),
            ]
        else:
            layers = [
                conv_bn(inputs, width, 3, stride, 1),
                self.relu,
                conv_bn(width, width, 3, 1, 1),
            ]
        self.body = nn.Sequential(*layers)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """ResNet (He et al. 2016) at full width: overlapping max-pool 3x3/2 right after a ReLU."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Residual(channels, width, stride, bottleneck))
                channels = width * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return out


class VGG11(nn.Module):
    """VGG-11 (Simonyan & Zisserman 2015): a max-pool after ReLU five times, a dense classifier."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if not step:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(channels, step, 3, padding=1))
            layers += [nn.BatchNorm2d(step)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = step
        self.features = nn.Sequential(*layers)
        self.dense = nn.Sequential(
            nn.Linear(512 * 2 * 2, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU()
        )
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dense(torch.flatten(self.features(x), 1)))
        return out


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [conv_bn(inputs, width, 1), nn.ReLU6()]
        layers += [conv_bn(width, width, 3, stride, 1, groups=width), nn.ReLU6()]
        layers.append(conv_bn(width, outputs, 1))
        self.body = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.skip else out


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) at half width: depthwise convolutions, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, 1), nn.ReLU6()]
        channels = 16
        for expand, width, depth, stride in (
            (1, 8, 1, 1),
            (6, 12, 2, 2),
            (6, 16, 3, 2),
            (6, 32, 4, 2),
            (6, 48, 3, 1),
            (6, 80, 3, 2),
            (6, 160, 1, 1),
        ):
            for index in range(depth):
                layers.append(
                    InvertedResidual(channels, width, 1 if index else stride, expand),
                )
                channels = width
        layers += [conv_bn(channels, 640, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(640, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


def conv_relu(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
) -> nn.Sequential:
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride, padding), nn.ReLU())


class Branches(nn.Module):
    """Parallel branches over one input, concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception(nn.Module):
    """The block types of Inception V3 (Szegedy et al. 2016), thin.

    Average pools that count their padding and ones that do not, an overlapping max-pool as a
    branch of its own, 1x7 and 7x1 convolutions, a branch that splits again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_relu(3, 16, 3, 2), conv_relu(16, 24, 3, 1, 1), nn.MaxPool2d(3, 2)
        )
        self.a = Branches(
            conv_relu(24, 16, 1),
            nn.Sequential(conv_relu(24, 12, 1), conv_relu(12, 16, 5, 1, 2)),
            nn.Sequential(conv_relu(24, 16, 1), conv_relu(16, 24, 3, 1, 1)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_relu(24, 8, 1)),
        )
        self.b = Branches(
            conv_relu(64, 48, 3, 2),
            nn.Sequential(conv_relu(64, 16, 1), conv_relu(16, 16, 3, 2)),
            nn.MaxPool2d(3, 2),
        )
        self.c = Branches(
            conv_relu(128, 32, 1),
            nn.Sequential(
                conv_relu(128, 24, 1),
                conv_relu(24, 24, (1, 7), 1, (0, 3)),
                conv_relu(24, 32, (7, 1), 1, (3, 0)),
            ),
            nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv_relu(128, 32, 1)),
        )
        self.d = Branches(
            conv_relu(96, 32, 1),
            nn.Sequential(
                conv_relu(96, 32, 1),
                Branches(
                    conv_relu(32, 32, (1, 3), 1, (0, 1)), conv_relu(32, 32, (3, 1), 1, (1, 0))
                ),
            ),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_relu(96, 32, 1)),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.d(self.c(self.b(self.a(self.stem(x))))))
        out: Tensor = self.head(torch.flatten(features, 1))
        return out


class Genomics(nn.Module):
    """A motif scanner over one-hot DNA [N, 4, L]: overlapping max-pools, a dilated layer, dense."""

    def __init__(self, length: int = 200) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(4, 48, 19, padding=9),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.MaxPool1d(5, 3),
            nn.Conv1d(48, 64, 7, padding=3),
            nn.ReLU(),
            nn.Conv1d(64, 64, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.MaxPool1d(4, 2, padding=1),
        )
        pooled = ((length - 5) // 3 + 1 + 2 - 4) // 2 + 1
        self.dense = nn.Sequential(nn.Linear(64 * pooled, 96), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dense(torch.flatten(self.features(x), 1)))
        return out


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021): 8x8 patches, a class token, pre-norm."""

    def __init__(self, size: int = 32, patch: int = 8, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.expand(x.shape[0], -1, -1)
        hidden = torch.cat([token, tokens], 1) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(hidden))[:, 0])
        return out
