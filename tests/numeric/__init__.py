"""Numeric checks that come from outside the compiler.

Gradients are held against central differences of ``onnx.reference.ReferenceEvaluator`` run in
float64, DeepLIFT against the difference that the source model itself makes between input and
baseline. Nothing here reads the compiler's rules: a wrong rule cannot make its own check pass.
"""

from .checks import (
    check_conservation,
    check_gradient,
    check_graph,
    finite,
    near,
)
from .differences import (
    Difference,
    Oracle,
    difference,
    difference_at,
)
from .float64 import (
    Evaluator,
    wide_evaluator,
    widened,
)
from .models import (
    FLOATS,
    Array,
    Feeds,
    all_nodes,
    element_type,
    float_inputs,
    frozen,
    graphs,
    is_narrow,
    joined,
    run,
    session,
    symbolic,
)

__all__ = [
    "FLOATS",
    "Array",
    "Difference",
    "Evaluator",
    "Feeds",
    "Oracle",
    "all_nodes",
    "check_conservation",
    "check_gradient",
    "check_graph",
    "difference",
    "difference_at",
    "element_type",
    "finite",
    "float_inputs",
    "frozen",
    "graphs",
    "is_narrow",
    "joined",
    "near",
    "run",
    "session",
    "symbolic",
    "wide_evaluator",
    "widened",
]
