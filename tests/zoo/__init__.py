"""Architectures with random weights, as plain torch modules, and their export to ONNX.

Every network is written out here, small where size does not matter, so that the tests need torch
and nothing else. The weights are drawn from a seed and settled on random data: activations keep
their scale through the depth, BatchNorm statistics are off the identity, and the logits differ
between inputs and between classes. An explanation of a degenerate network proves nothing.
"""

from .autograd import KINK_OPS, gradient
from .entries import ZOO, baseline, build, sample
from .exporting import EXPORTERS, Exporter, export, quiet

__all__ = [
    "EXPORTERS",
    "KINK_OPS",
    "ZOO",
    "Exporter",
    "baseline",
    "build",
    "export",
    "gradient",
    "quiet",
    "sample",
]
