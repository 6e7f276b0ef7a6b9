"""Architectures with random weights, as plain torch modules, and their export to ONNX.

Every network is written out here, small where size does not matter, so that the tests need torch
and nothing else. The weights are drawn from a seed and settled on random data: activations keep
their scale through the depth, BatchNorm statistics are off the identity, and the logits differ
between inputs and between classes. An explanation of a degenerate network proves nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

Exporter = Literal["dynamo", "legacy"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "legacy")
CLASSES = 10


# ---------------------------------------------------------------------------------------------
# The architectures that the acceptance names


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


# ---------------------------------------------------------------------------------------------
# Small networks, each with something that other libraries get wrong


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


# ---------------------------------------------------------------------------------------------
# The list, the weights, the export


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export(
    module: nn.Module,
    example: Tensor,
    exporter: Exporter,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> onnx.ModelProto:
    """`module` as ONNX, input "x" and output "y", by torch's dynamo or legacy exporter."""
    module = module.eval()
    stream = io.BytesIO()
    with _quiet():
        if exporter == "dynamo":
            # An example of one item would make the exporter take the batch for a constant.
            item = torch.cat([example, example]) if dynamic_batch and len(example) < 2 else example
            shapes = ({0: torch.export.Dim("N")},) if dynamic_batch else None
            program = torch.onnx.export(
                module,
                (item,),
                dynamo=True,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        else:
            torch.onnx.export(
                module,
                (example,),
                cast(Any, stream),  # a file-like object is fine here, whatever the hint
                dynamo=False,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "N"}, "y": {0: "N"}} if dynamic_batch else None,
                opset_version=opset,
            )
            model = onnx.load_from_string(stream.getvalue())
    return model


# ---------------------------------------------------------------------------------------------
# The reference: torch autograd


class _Substitute(torch.autograd.Function):
    """The value of the second argument, the gradient to the first."""

    @staticmethod
    def forward(ctx: object, computed: Tensor, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


KINKS = (nn.ReLU, nn.ReLU6, nn.MaxPool1d, nn.MaxPool2d)
KINK_OPS = ("Relu", "Clip", "MaxPool")


def gradient(
    module: nn.Module, x: Tensor, indices: Tensor, kinks: list[Tensor] | None = None
) -> Tensor:
    """The gradient of sum_i y[i, *indices[i]] with respect to `x`.

    A deep ReLU network has so many units that in float32 a few lie within rounding of their kink,
    and their gradient is a matter of the order of summation: two correct libraries differ by
    percents. `kinks`, the values that the other library computed before each ReLU, ReLU6 and
    max-pool (in the order of execution), replace torch's own, so that both are on the same side.
    """
    values = iter(kinks or [])

    def substitute(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = next(values)
        torch.testing.assert_close(args[0].detach(), given, rtol=1e-3, atol=1e-3)
        return (_Substitute.apply(args[0], given),)  # type: ignore[no-untyped-call]

    hooked = [m for m in module.modules() if isinstance(m, KINKS)] if kinks is not None else []
    handles = [m.register_forward_pre_hook(substitute) for m in hooked]
    try:
        x = x.clone().requires_grad_(True)
        y = module(x)
        score = y[(torch.arange(len(x)), *indices.unbind(1))].sum()
        (grad,) = torch.autograd.grad(score, x)
    finally:
        for handle in handles:
            handle.remove()
    assert next(values, None) is None, "the other library has more kinks than torch"
    return grad
