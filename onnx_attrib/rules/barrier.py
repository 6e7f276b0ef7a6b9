"""Operators through which no derivative flows: integers, truth values, shapes, rounding."""

from onnx_attrib.rules.base import Barrier, add

for name in (
    "And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil ConstantOfShape "
    "Equal EyeLike Floor Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual NonZero Not OneHot Or "
    "Range Round Shape Sign Size Xor"
).split():
    add(Barrier(op=name))
