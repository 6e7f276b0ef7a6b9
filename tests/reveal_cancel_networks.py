"""What the tests of RevealCancel share: networks, small models, and how they are explained."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.numpy_helper import from_array

import onnx_attrib

from . import numeric
from .numeric import Array
from .reveal_cancel_reference import Net

RULES = ("rescale", "reveal-cancel", "genomics", "genomics-converse")
FUNCTIONS = ("Relu", "Tanh", "Sigmoid", "Softplus", "Gelu", "Silu")


def explain(model: onnx.ModelProto, feeds: dict[str, Array], **options: Any) -> dict[str, Array]:
    options = {"rule": "reveal-cancel", "baseline": "input", "delta": True, **options}
    compiled = onnx_attrib.compile(model, options.pop("method", "deeplift"), **options)
    numeric.check_graph(compiled)
    return numeric.run(compiled, feeds)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    return rng.standard_normal(shape).astype(dtype)


def text(source: str, **constants: Any) -> onnx.ModelProto:
    """A model of opset 21 from its graph in ONNX's text form and its weights."""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]>' + source)
    for name, value in constants.items():
        model.graph.initializer.append(from_array(np.asarray(value, np.float32), name))
    return model


def block(*nodes: str, shape: str, outputs: int, **constants: Any) -> onnx.ModelProto:
    body = "\n".join(nodes)
    return text(f"g (float[N, {shape}] x) => (float[N, {outputs}] y) {{ {body} }}", **constants)


MINIMUM = """g (float[N, 1] a, float[N, 1] b) => (float[N, 1] y) {
    h = Sub(a, b)
    r = Relu(h)
    y = Sub(a, r)
}"""


# -- networks ------------------------------------------------------------------------------------


def mlp(rng: np.random.Generator, f: str) -> Net:
    """Dense layers in two spellings, a norm, a residual sum."""
    net = Net((int(rng.integers(4, 9)),), rng)
    net.dense(9)
    net.apply(f)
    net.dense(8, style="MatMul")
    net.norm()
    first = net.apply(f)
    net.add(first, net.dense(8))
    net.apply(f)
    net.dense(3)
    return net


def cnn(rng: np.random.Generator, f: str) -> Net:
    """Overlapping pools on either side of the nonlinearity, norms, a residual sum."""
    net = Net((2, 9, 9), rng)
    net.conv(3, 3, pad=1)
    net.norm()
    net.apply(f)
    first = net.max_pool(3, 2)
    net.conv(3, 3, pad=1)
    net.norm()
    net.add(net.last, first, sign=-1)
    net.apply(f)
    net.conv(3, 2)
    net.max_pool(2, 1)
    net.apply(f)
    net.average_pool(2, 1)
    net.apply(f)
    net.dense(6)
    net.apply(f)
    net.dense(3)
    return net


def motifs(rng: np.random.Generator, f: str) -> Net:
    """One axis; nonlinearities one after another with no layer between them."""
    net = Net((4, 20), rng)
    net.conv(5, 5)
    net.apply(f)
    net.max_pool(4, 2)
    net.conv(4, 3)
    net.average_pool(2, 2)
    net.apply(f)
    net.apply("Abs")
    net.dense(5)
    net.apply(f)
    net.apply("Tanh")
    net.dense(2)
    return net


def samples(net: Net, rng: np.random.Generator, baseline: str) -> tuple[Array, Array, Array]:
    """Seven inputs, their references, and targets.

    The rule is not continuous where a difference is zero: which part's multiplier an entry takes
    depends on the sign. Samples in which float32 and float64 may not agree on one are drawn again.
    """
    count, shape = 7 if baseline == "paired" else 1, net.shape
    base = small(rng, count, *shape)
    if baseline == "zeros":
        base = np.zeros_like(base)
    x = small(rng, 7, *shape)
    for i in range(7):
        for _ in range(100):
            if net.clear(x[i], base[i % count]):
                break
            x[i] = small(rng, *shape)
        else:
            raise AssertionError("the network saturates everywhere")
    return x, base, rng.integers(0, net.shapes[-1][0], 7)


def small(rng: np.random.Generator, *shape: int) -> Array:
    return 0.5 * normal(rng, *shape)
