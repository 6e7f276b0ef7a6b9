"""Convolutions, forward and transposed, over random configurations of every attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib
from onnx_attrib.errors import UnsupportedOpError

from .numeric import Array, check_conservation, check_gradient

Shapes = Mapping[str, Sequence[int]]


def chain(
    shapes: Shapes, *nodes: onnx.NodeProto, dynamic: bool = False, batch: bool = True
) -> ModelProto:
    """A model of ``nodes`` from float inputs to ``y``; the batch of ``x`` is symbolic.

    ``dynamic``: so are its spatial sizes. ``batch=False``: the batch is fixed.
    """
    infos = []
    for name, shape in shapes.items():
        dims: list[int | str] = list(shape)
        if name == "x":
            dims[0] = "N" if batch else dims[0]
            if dynamic:
                dims[2:] = [f"D{axis}" for axis in range(2, len(dims))]
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    rank = len(shapes["x"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(list(nodes), "g", infos, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def normal(rng: np.random.Generator, shapes: Shapes) -> dict[str, Array]:
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def draw(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    """``count`` random integers, both ends included."""
    return [int(value) for value in rng.integers(low, high + 1, count)]


def emitted(compiled: ModelProto, op: str) -> list[dict[str, Any]]:
    """The attributes of the operators that the compiler added."""
    return [
        {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for node in compiled.graph.node
        if node.op_type == op and node.name.startswith("attrib/")
    ]


def check_placement(model: ModelProto) -> None:
    """The CUDA provider has no ConvTranspose with uneven pads or automatic ones."""
    for method in ("gradient", "deeplift"):
        compiled = onnx_attrib.compile(model, method=method, target="seed")
        for attributes in emitted(compiled, "ConvTranspose"):
            pads = attributes.get("pads", [])
            assert pads[: len(pads) // 2] == pads[len(pads) // 2 :]
            assert not attributes.keys() & {"auto_pad", "output_shape"}


def random_case(op: str, seed: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Shapes of x, W and perhaps B, and attributes that onnxruntime accepts."""
    rng = np.random.default_rng(seed)
    spatial = 1 + seed % 3
    group = int(rng.choice([1, 1, 2, 3]))
    inputs, outputs = group * draw(rng, 1, 2, 1)[0], group * draw(rng, 1, 2, 1)[0]
    if rng.random() < 0.2:
        group, outputs = inputs, inputs * draw(rng, 1, 2, 1)[0]
    kernel, strides = draw(rng, 1, 4 - spatial // 3, spatial), draw(rng, 1, 3, spatial)
    if rng.random() < 0.35:
        strides = [1] * spatial
    mode = str(rng.choice(["NOTSET"] * 4 + ["VALID", "SAME_UPPER", "SAME_LOWER"]))
    same = mode.startswith("SAME")
    if op == "ConvTranspose" and same:
        # Runtimes disagree where the kernel is smaller than the stride.
        kernel = [max(pair) for pair in zip(kernel, strides, strict=True)]
    # onnxruntime refuses dilations beside SAME.
    dilations = [1] * spatial if same or rng.random() < 0.5 else draw(rng, 1, 3, spatial)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": group}
    if mode != "NOTSET":
        attributes["auto_pad"] = mode
    elif rng.random() < 0.8:
        attributes["pads"] = draw(rng, 0, 2, 2 * spatial)
    if rng.random() < 0.5:
        attributes["kernel_shape"] = kernel
    if op == "Conv":
        size = [e + more for e, more in zip(extent, draw(rng, 0, 5, spatial), strict=True)]
        weight = [outputs, inputs // group, *kernel]
    else:
        size, weight = draw(rng, 3, 5, spatial), [inputs, outputs // group, *kernel]
        if not same and rng.random() < 0.5:
            surplus = [draw(rng, 0, stride - 1, 1)[0] for stride in strides]
            attributes["output_padding"] = surplus
    shapes = {"x": [2, inputs, *size], "W": weight}
    if rng.random() < 0.6:
        shapes["B"] = [outputs]
    return shapes, attributes


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_random_configuration(op: str, seed: int) -> None:
    """Gradients of data, weight and bias; conservation when all vary, and with x alone."""
    shapes, attributes = random_case(op, seed)
    rng = np.random.default_rng(seed)
    node = helper.make_node(op, list(shapes), ["y"], **attributes)
    model = chain(shapes, node, dynamic=seed % 4 == 3, batch=seed % 5 != 4)
    point, baseline = normal(rng, shapes), normal(rng, shapes)
    check_gradient(model, point, inputs=list(shapes))
    check_conservation(model, (point, baseline), inputs=list(shapes))
    pairs = [(point, {"x": baseline["x"]})]
    if seed % 5 != 4:
        pairs.append((point, {"x": baseline["x"][:1]}))
    check_conservation(model, *pairs, inputs=["x"])
    check_placement(model)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("asked", [[9, 8], [12, 11], [13, 10]])
def test_output_shape(mode: str, asked: list[int], dynamic: bool) -> None:
    """The pads follow from the output's shape: the odd one first, but for SAME_UPPER."""
    rng = np.random.default_rng(asked[0])
    shapes = {"x": [2, 2, 5, 5], "W": [2, 3, 4, 3], "B": [3]}
    node = helper.make_node(
        "ConvTranspose",
        list(shapes),
        ["y"],
        auto_pad=mode,
        output_shape=asked,
        strides=[2, 2],
    )
    point, baseline = normal(rng, shapes), normal(rng, shapes)
    model = chain(shapes, node, dynamic=dynamic)
    check_gradient(model, point, inputs=list(shapes))
    check_conservation(model, (point, baseline), inputs=list(shapes))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_same_padding_of_a_size_known_at_run_time(mode: str, size: int) -> None:
    rng = np.random.default_rng(size)
    shapes = {"x": [2, 2, size, size + 3], "W": [4, 1, 4, 2]}
    node = helper.make_node("Conv", list(shapes), ["y"], auto_pad=mode, strides=[3, 2], group=2)
    model = chain(shapes, node, dynamic=True)
    point, baseline = normal(rng, shapes), normal(rng, shapes)
    check_gradient(model, point, inputs=list(shapes))
    check_conservation(model, (point, baseline), inputs=list(shapes))
    check_placement(model)


@pytest.mark.parametrize("dynamic", [False, True])
def test_unit_stride_is_a_convolution(dynamic: bool) -> None:
    """Depthwise above all: ConvTranspose is many times slower there."""
    shapes = {"x": [1, 4, 6, 6], "W": [4, 1, 3, 3]}
    node = helper.make_node("Conv", list(shapes), ["y"], pads=[1, 1, 1, 1], group=4)
    compiled = onnx_attrib.compile(
        chain(shapes, node, dynamic=dynamic), method="gradient", target="seed", inputs="x"
    )
    assert emitted(compiled, "Conv")
    assert not emitted(compiled, "ConvTranspose")


def test_even_sizes_need_no_crop() -> None:
    """The stem of a residual network: one ConvTranspose, nothing after it."""
    shapes = {"x": [1, 3, 16, 16], "W": [4, 3, 7, 7]}
    node = helper.make_node("Conv", list(shapes), ["y"], strides=[2, 2], pads=[3, 3, 3, 3])
    compiled = onnx_attrib.compile(
        chain(shapes, node), method="gradient", target="seed", inputs="x"
    )
    (attributes,) = emitted(compiled, "ConvTranspose")
    assert attributes["pads"] == [3, 3, 3, 3]
    assert attributes["output_padding"] == [1, 1]
    assert not emitted(compiled, "Slice")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"auto_pad": "SAME_UPPER", "output_padding": [1, 1]}, "output_padding"),
        ({"auto_pad": "SAME_LOWER", "kernel_shape": [1, 1]}, "beyond the kernel"),
    ],
)
def test_says_what_it_cannot_do(attributes: dict[str, Any], reason: str) -> None:
    kernel = attributes.get("kernel_shape", [3, 3])
    shapes = {"x": [1, 1, 4, 4], "W": [1, 1, *kernel]}
    node = helper.make_node("ConvTranspose", list(shapes), ["y"], strides=[2, 2], **attributes)
    with pytest.raises(UnsupportedOpError, match=reason):
        onnx_attrib.compile(chain(shapes, node), method="gradient")
