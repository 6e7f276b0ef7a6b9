"""Models of one operator, and what is exactly true of a linear or homogeneous one.

Nothing is approximated here: ⟨m, F(x) − F(0)⟩ = ⟨Fᵀm, x⟩ holds for an affine F whatever the size of
x, and ⟨m, F(x)⟩ = ⟨∇⟨m, F⟩, x⟩ (Euler) for maxima and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, helper
from onnx.numpy_helper import from_array

import onnx_attrib

from . import numeric
from .numeric import Array

Symbols = Callable[[str, int], str | None]

CPU_ONLY = frozenset(
    "AffineGrid Col2Im DFT DeformConv GlobalLpPool LpPool MaxRoiPool MaxUnpool STFT".split()
)
"""Operators without a CUDA kernel in ONNX Runtime 1.31: a backward should do without."""


def batch(name: str, axis: int) -> str | None:
    """A symbolic batch axis for the data ``x``."""
    return "N" if axis == 0 and name == "x" else None


def every(name: str, axis: int) -> str | None:
    """Every axis of the data ``x`` a symbol."""
    return f"x{axis}" if name == "x" else None


@dataclass(frozen=True)
class Single:
    """A model of one operator with values for its inputs; ``y`` is what ONNX Runtime computes."""

    model: ModelProto
    feeds: dict[str, Array]
    y: Array
    session: ort.InferenceSession = field(repr=False)


def single(
    op: str,
    inputs: Mapping[str, Array | None],
    fixed: Collection[str] = (),
    symbols: Symbols | None = None,
    opset: int = 21,
    **attributes: Any,
) -> Single:
    """One node. Inputs by name, None where left out; those in ``fixed`` are initializers."""
    node = helper.make_node(op, [k if v is not None else "" for k, v in inputs.items()], ["y"])
    while node.input and not node.input[-1]:
        del node.input[-1]
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    present = {k: v for k, v in inputs.items() if v is not None}
    feeds = {k: v for k, v in present.items() if k not in fixed}
    graph = helper.make_graph(
        [node],
        op,
        [_info(k, v) for k, v in feeds.items()],
        [helper.make_empty_tensor_value_info("y")],
        [from_array(v, k) for k, v in present.items() if k in fixed],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    y = numeric.session(model).run(None, feeds)[0]
    del model.graph.output[:]
    model.graph.output.append(_info("y", y))
    if symbols is not None:
        model = numeric.symbolic(model, symbols)
    return Single(model, feeds, y, numeric.session(model))


def _info(name: str, value: Array) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name, kind, value.shape)


def pulled(case: Single, seed: Array, wrt: str = "x") -> Array:
    """The compiled gradient of ⟨seed, y⟩."""
    compiled = onnx_attrib.compile(case.model, method="gradient", target="seed", inputs=[wrt])
    numeric.check_graph(compiled)
    result = numeric.run(compiled, {**case.feeds, "seed": seed})
    return result[f"{wrt}_attribution"].astype(np.float64)


def check_exact(
    case: Single, wrt: str = "x", homogeneous: bool = False, relative: float = 1e-5
) -> None:
    """⟨m, y⟩ (less its value at x = 0, unless ``homogeneous``) equals ⟨gradient, x⟩."""
    seed = np.random.default_rng(1).standard_normal(case.y.shape).astype(case.y.dtype)
    gradient, x = pulled(case, seed, wrt), case.feeds[wrt].astype(np.float64)
    assert gradient.shape == x.shape
    change = case.y.astype(np.float64)
    if not homogeneous:
        zero = {**case.feeds, wrt: np.zeros_like(case.feeds[wrt])}
        change = change - case.session.run(None, zero)[0].astype(np.float64)
    terms = seed.astype(np.float64) * change
    scale = float(np.abs(terms).sum()) + 1e-9
    assert abs(float(terms.sum()) - float(np.sum(gradient * x))) <= relative * scale


def check_conserved(case: Single, *wrt: str, shared: bool = False, seed: int = 2) -> None:
    """DeepLIFT sums to the difference, with a random baseline (of batch 1, if ``shared``)."""
    rng = np.random.default_rng(seed)
    names = wrt or ("x",)
    values = {name: case.feeds[name] for name in names}
    baseline = {
        name: rng.standard_normal((1, *v.shape[1:]) if shared else v.shape).astype(v.dtype)
        for name, v in values.items()
    }
    numeric.check_conservation(case.model, (case.feeds, baseline), inputs=list(names))


def loaded_operators(case: Single, folder: Path, wrt: str = "x") -> list[str]:
    """What the compiled gradient consists of once ONNX Runtime has folded its constants."""
    compiled = onnx_attrib.compile(case.model, method="gradient", target="seed", inputs=[wrt])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(compiled.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    return [node.op_type for node in optimized.graph.node]
