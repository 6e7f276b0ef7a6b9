"""Operators through which no derivative flows: integers, truth values, shapes, rounding."""

from onnx_attrib.rules.base import Barrier, add

NAMES = """
And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil ConstantOfShape Equal
EyeLike Floor Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual NonZero Not OneHot Or Range Round
Shape Sign Size Xor
"""

for name in NAMES.split():
    add(Barrier(op=name))
