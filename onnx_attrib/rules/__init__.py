"""The rule table: one row an operator, in a file per class."""

from onnx_attrib.rules import (  # noqa: F401  (each module enters its rows)
    barrier,
    bilinear,
    composite,
    convolution,
    elementwise,
    indexing,
    maxlike,
    pooling,
    reduction,
    shape,
)
from onnx_attrib.rules.base import (
    Barrier,
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    MaxLike,
    Rule,
    Site,
    Unsupported,
    blocked,
    is_barrier,
    known,
    lookup,
    table,
)

__all__ = [
    "Barrier",
    "Bilinear",
    "Composite",
    "Elementwise",
    "Linear",
    "MaxLike",
    "Rule",
    "Site",
    "Unsupported",
    "blocked",
    "is_barrier",
    "known",
    "lookup",
    "table",
]
