"""Random valid models, for property-based tests.

:func:`build` makes one from a source of whole numbers (a hypothesis strategy, or a seeded
generator): 5 to 40 operators over random shapes, element types, opsets and ways to write constants.
Every node is run on its own in onnxruntime as it is added, so the shape and the size of each value
are known: a node that onnxruntime refuses is left out, and values are scaled back to order one.
Logarithms, roots and quotients stand behind positive maps.

Two kinds: with a batch axis ``N`` that every operator keeps apart, or with any dimension mixed with
any other and symbols that say less than the values do.
"""

from .builder import Example, Refused
from .models import build

__all__ = ["Example", "Refused", "build"]
