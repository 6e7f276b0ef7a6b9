"""Which method explains a model best: measures, curves, a report."""

from onnx_attrib.evaluation.evaluating import Evaluation, evaluate
from onnx_attrib.evaluation.subject import Subject

__all__ = ["Evaluation", "Subject", "evaluate"]
