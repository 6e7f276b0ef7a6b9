"""Operators through which no derivative flows.

Integers, truth values, shapes, rounding, text, random numbers, and choices of entries. Quantized
integers too: what passes them straight through is found before the rules are asked
(``passes/quantized.py``).
"""

from onnx_attrib.rules.base import Barrier, add

NAMES = """
And ArgMax ArgMin Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow
Ceil ConstantOfShape ConvInteger Equal EyeLike Floor Greater GreaterOrEqual HammingWindow
HannWindow Hardmax ImageDecoder IsInf IsNaN Less LessOrEqual MatMulInteger MelWeightMatrix
Multinomial NonMaxSuppression NonZero Not OptionalHasElement Or QLinearConv QLinearMatMul
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range RegexFullMatch
Round SequenceEmpty SequenceLength Shape Sign Size StringConcat StringNormalizer StringSplit
TfIdfVectorizer Xor
"""

for name in NAMES.split():
    add(Barrier(op=name))
