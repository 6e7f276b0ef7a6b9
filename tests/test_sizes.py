"""Sizes are taken from the model's inputs, so that no activation is kept for its size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib.verify import verify

from .test_contract import close, mlp, run, text

CNN = """g (float[N, 2, {size}] x) => (float[N, 3] y)
    {{ c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(c) p = MaxPool <kernel_shape = [2, 2]> (r)
      e = Conv(p, v) s = Sigmoid(e) q = GlobalMaxPool(s) f = Flatten(q) y = MatMul(f, d) }}"""


def cnn(rng: np.random.Generator, size: str) -> onnx.ModelProto:
    shapes = {"w": (4, 2, 3, 3), "v": (5, 4, 2, 2), "d": (5, 3)}
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    return text(CNN.format(size=size), **arrays)


def measured(model: onnx.ModelProto) -> set[str]:
    """What Shape and Size read."""
    return {n.input[0] for n in model.graph.node if n.op_type in ("Shape", "Size")}


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_no_activation_is_kept_for_its_size(rng: np.random.Generator, method: str) -> None:
    source = cnn(rng, "7, 6")
    compiled = onnx_attrib.compile(source, method)
    own = {name for node in source.graph.node for name in node.output}
    assert measured(compiled) & own <= {"y"}
    assert "x" in measured(compiled)
    assert verify(source, method).ok


def test_a_baseline_may_have_another_batch(rng: np.random.Generator) -> None:
    """What is known as batch 1 of a reference is a batch of N where N baselines are given."""
    source = cnn(rng, "7, 6")
    compiled = onnx_attrib.compile(source, "deeplift", baseline="input", target=1)
    x, base = (rng.standard_normal((3, 2, 7, 6)).astype(np.float32) for _ in range(2))
    found = run(compiled, {"x": x, "x_baseline": base})["x_attribution"]
    for n in range(3):
        alone = run(compiled, {"x": x[n : n + 1], "x_baseline": base[n : n + 1]})
        close(found[n : n + 1], alone["x_attribution"], 1e-5)


def test_open_sizes(rng: np.random.Generator) -> None:
    """Sizes that no input has, behind a convolution, are still read where they are."""
    source = cnn(rng, "H, W")
    compiled = onnx_attrib.compile(source, "gradient", target=1)
    fixed = onnx_attrib.compile(cnn(np.random.default_rng(0), "9, 8"), "gradient", target=1)
    assert len(measured(compiled)) > len(measured(fixed))
    assert verify(source, "gradient", dims={"H": 9, "W": 8}).ok


def test_symbols_of_several_inputs(rng: np.random.Generator) -> None:
    a = rng.standard_normal((4, 3)).astype(np.float32)
    source = text(
        """g (float[N, T, 4] x, float[M] z) => (float[N, T, 3] y)
        { t = Tanh(x) s = Softmax(t) h = MatMul(s, a) u = ReduceMean <keepdims = 0> (z)
          y = Mul(h, u) }""",
        a=a,
    )
    compiled = onnx_attrib.compile(source, "deeplift", target=(0, 1), baseline=0.5)
    assert not measured(compiled) & set("tshu")
    assert verify(source, "deeplift", target=(0, 1), baseline=0.5).ok
    assert verify(mlp(rng), "gradient").ok
