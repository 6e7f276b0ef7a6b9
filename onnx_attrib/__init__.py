"""onnx-attrib: compile an ONNX model into a graph that also explains its outputs."""

from onnx_attrib.catalog import MethodInfo, OptionInfo, methods
from onnx_attrib.compiler import compile
from onnx_attrib.errors import (
    CompileError,
    ModelError,
    Offence,
    OptionError,
    RuntimeMissingError,
    UnsupportedOpError,
)
from onnx_attrib.evaluation import Evaluation, evaluate
from onnx_attrib.patterns import fit_patterns
from onnx_attrib.runtime import Explainer, Explanation
from onnx_attrib.version import VERSION

__version__ = VERSION

__all__ = [
    "CompileError",
    "Evaluation",
    "Explainer",
    "Explanation",
    "MethodInfo",
    "ModelError",
    "Offence",
    "OptionError",
    "OptionInfo",
    "RuntimeMissingError",
    "UnsupportedOpError",
    "__version__",
    "compile",
    "evaluate",
    "fit_patterns",
    "methods",
]
