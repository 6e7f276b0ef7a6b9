"""Sanity check: attributions must change when the model's weights are randomised.

Adebayo et al. 2018, Sanity checks for saliency maps (arXiv 1810.03292), cascading randomisation:
the weights of the last layer are replaced by random ones, then those of the last two, and so on to
the first. A method whose attributions stay as they were does not depend on what the model learned.
Random weights are normal, with the mean and standard deviation of those that they replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnx_attrib.ir import is_float

LAYERS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "RNN": (1, 2),
    "GRU": (1, 2),
    "LSTM": (1, 2),
}
"""Layers with weights, and which of their operands may be these."""
_PASSING = frozenset("Cast DequantizeLinear Identity Reshape Squeeze Transpose Unsqueeze".split())
STAGES = 8
"""At most so many stages; of deeper models several layers are randomised at a time."""


def layers(model: ModelProto) -> list[tuple[str, ...]]:
    """The initializers of each layer with weights, from the output backwards, each once."""
    weights = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found, seen = list[tuple[str, ...]](), set[str]()
    for node in reversed(model.graph.node):
        operands = LAYERS.get(node.op_type, ()) if not node.domain else ()
        names = [_origin(node.input[k], makers) for k in operands if k < len(node.input)]
        own = tuple(dict.fromkeys(n for n in names if n in weights and n not in seen))
        if own:
            seen.update(own)
            found.append(own)
    return found


def _origin(name: str, makers: Mapping[str, NodeProto]) -> str:
    """What a weight is before it is turned or cast."""
    while name in makers and makers[name].op_type in _PASSING:
        name = makers[name].input[0]
    return name


def randomised(model: ModelProto, seed: int) -> Iterator[tuple[str, ModelProto]]:
    """The model with more and more layers randomised, each with the last of these layers' name."""
    made = ModelProto()
    made.CopyFrom(model)
    weights = {t.name: t for t in made.graph.initializer}
    order = layers(made)
    stops = _stops(len(order))
    for k, names in enumerate(order, start=1):
        for j, name in enumerate(names):
            _randomise(weights[name], np.random.default_rng([seed, _STREAM, k, j]))
        if k in stops:
            stage = ModelProto()
            stage.CopyFrom(made)
            yield names[0], stage


def stages(model: ModelProto) -> int:
    """How many models :func:`randomised` gives."""
    return len(_stops(len(layers(model))))


def _stops(count: int) -> set[int]:
    """After how many layers the attributions are compared."""
    return set(np.rint(np.linspace(1, count, min(count, STAGES))).astype(int).tolist())


_STREAM = 4


def _randomise(tensor: TensorProto, rng: np.random.Generator) -> None:
    array = numpy_helper.to_array(tensor)
    if is_float(array.dtype):
        wide = array.astype(np.float64)
        drawn = rng.normal(wide.mean(), wide.std(), array.shape)
    else:
        # Quantized weights: the same numbers in another order.
        drawn = rng.permutation(array.reshape(-1)).reshape(array.shape)
    tensor.CopyFrom(numpy_helper.from_array(drawn.astype(array.dtype), tensor.name))


__all__ = ["layers", "randomised", "stages"]
