"""Pooling over random configurations of every attribute, with ties, overlaps and dilations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib
from onnx_attrib.errors import CompileError, UnsupportedOpError

from .numeric import Array, check_conservation, check_gradient, run
from .test_convolution import chain, check_placement, draw, emitted


def random_case(op: str, seed: int) -> tuple[list[int], dict[str, Any]]:
    """A shape of x, and attributes on which ONNX's shape inference and onnxruntime agree."""
    rng = np.random.default_rng(seed)
    spatial = 1 + seed % 3
    kernel, strides = draw(rng, 1, 4 - spatial // 3, spatial), draw(rng, 1, 3, spatial)
    if rng.random() < 0.5:
        strides = [1] * spatial if rng.random() < 0.5 else list(kernel)
    mode = str(rng.choice(["NOTSET"] * 4 + ["VALID", "SAME_UPPER", "SAME_LOWER"]))
    dilations = [1] * spatial
    if not mode.startswith("SAME") and rng.random() < 0.3:
        dilations = draw(rng, 1, 2, spatial)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": strides,
        "dilations": dilations,
    }
    if mode != "NOTSET":
        strides[:] = [min(pair) for pair in zip(kernel, strides, strict=True)]
        attributes["auto_pad"] = mode
    elif rng.random() < 0.6:
        attributes["pads"] = [draw(rng, 0, k - 1, 1)[0] for k in kernel + kernel]
    elif rng.random() < 0.7:
        # Without padding, rounding up leaves no window outside unless windows are apart.
        strides[:] = [min(pair) for pair in zip(kernel, strides, strict=True)]
        attributes["ceil_mode"] = 1
    if op == "AveragePool" and rng.random() < 0.5:
        attributes["count_include_pad"] = 1
    if op == "MaxPool" and rng.random() < 0.2:
        attributes["storage_order"] = 1
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [max(e, 2) + more for e, more in zip(extent, draw(rng, 0, 5, spatial), strict=True)]
    return [2, 2, *size], attributes


def spaced(rng: np.random.Generator, shape: list[int]) -> Array:
    """Random values of which no two are close: a maximum is differentiable there."""
    count = int(np.prod(shape))
    return ((rng.permutation(count) - count / 2) / 20).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_random_configuration(op: str, seed: int) -> None:
    shape, attributes = random_case(op, seed)
    check_pool(helper.make_node(op, ["x"], ["y"], **attributes), shape, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global(op: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [2, 3, *draw(rng, 1, 5, 1 + seed % 3)]
    check_pool(helper.make_node(op, ["x"], ["y"]), shape, seed)


def check_pool(node: onnx.NodeProto, shape: list[int], seed: int) -> None:
    """Gradient and conservation, the latter with baselines of batch 1 and N."""
    rng = np.random.default_rng(seed)
    fixed = seed % 5 == 4
    model = chain({"x": shape}, node, dynamic=seed % 4 == 3, batch=not fixed)
    x, base = spaced(rng, shape), spaced(rng, shape)
    check_gradient(model, {"x": x})
    pairs = (
        [({"x": x}, {"x": base})]
        if fixed
        else [
            ({"x": x}, {"x": base}),
            ({"x": x}, {"x": base[:1]}),
        ]
    )
    check_conservation(model, *pairs)
    check_placement(model)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "dilations": [3, 2]},
        {"kernel_shape": [3, 2], "strides": [2, 1], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "strides": [2, 2]},
    ],
    ids=["overlapping", "dilated", "ceil", "tiles"],
)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_between_convolution_and_rectifier(
    op: str, attributes: dict[str, Any], dynamic: bool
) -> None:
    """Ties at zero, and baselines whose winners lie elsewhere."""
    rng = np.random.default_rng(3)
    model = chain(
        {"x": [3, 2, 9, 8], "W": [4, 2, 3, 3], "V": [2, 4, 2, 2]},
        helper.make_node("Conv", ["x", "W"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(op, ["b"], ["c"], **attributes),
        helper.make_node("Conv", ["c", "V"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
        dynamic=dynamic,
    )
    shapes = {"x": [3, 2, 9, 8], "W": [4, 2, 3, 3], "V": [2, 4, 2, 2]}
    point = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    base = {"x": rng.standard_normal(shapes["x"]).astype(np.float32)}
    check_conservation(
        model,
        (point, base),
        (point, {"x": base["x"][:1]}),
        (point, {"x": np.zeros_like(base["x"])}),
        inputs=["x"],
    )
    moved = {name: value[::-1].copy() for name, value in point.items()}
    check_conservation(model, (point, moved), inputs=list(shapes))


def test_the_pool_runs_once() -> None:
    """The indices come from the model's own MaxPool."""
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    model = chain({"x": [1, 2, 6, 6]}, node)
    compiled = onnx_attrib.compile(model, method="gradient")
    assert [n.op_type for n in compiled.graph.node].count("MaxPool") == 1


def test_windows_side_by_side_are_resized() -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    model = chain({"x": [1, 2, 6, 6]}, node)
    compiled = onnx_attrib.compile(model, method="gradient")
    assert emitted(compiled, "Resize")
    assert not emitted(compiled, "ConvTranspose")


def test_global_average_stays_unexpanded() -> None:
    """One entry stands for all positions until the next rule broadcasts it."""
    model = chain(
        {"x": [1, 2, 6, 6]},
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["y"]),
    )
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    assert not emitted(compiled, "Expand")


def test_nan_and_infinity_run() -> None:
    """A window without a maximum has no index; that must not reach the scatter."""
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], strides=[2])
    model = chain({"x": [2, 1, 6]}, node)
    x = np.array([[[np.nan, np.nan, 1, 2, 3, 4]], [[-np.inf, -np.inf, 1, 2, 3, 4]]], np.float32)
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    found = run(compiled, {"x": x, "seed": np.ones((2, 1, 3), np.float32)})["x_attribution"]
    np.testing.assert_array_equal(found[:, 0, 2:], [[0, 1, 0, 1]] * 2)


def with_indices(*nodes: onnx.NodeProto) -> ModelProto:
    pool = helper.make_node("MaxPool", ["x"], ["a", "i"], kernel_shape=[3], strides=[2])
    cast = helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT)
    return chain({"x": [2, 2, 7]}, pool, cast, *nodes)


def test_indices_are_no_path() -> None:
    rng = np.random.default_rng(0)
    beside = with_indices(helper.make_node("Add", ["a", "f"], ["y"]))
    check_gradient(beside, {"x": spaced(rng, [2, 2, 7])})
    with pytest.raises(CompileError, match="every path is cut"):
        onnx_attrib.compile(with_indices(helper.make_node("Neg", ["f"], ["y"])))


@pytest.mark.parametrize(
    ("op", "attributes", "reason"),
    [
        ("MaxPool", {"auto_pad": "SAME_UPPER", "dilations": [2]}, "dilations"),
        ("AveragePool", {"auto_pad": "SAME_LOWER", "strides": [3]}, "beyond the kernel"),
        (
            "AveragePool",
            {"ceil_mode": 1, "kernel_shape": [1, 2], "dilations": [1, 5], "strides": [3, 4]},
            "ceil_mode",
        ),
    ],
)
def test_says_what_it_cannot_do(op: str, attributes: dict[str, Any], reason: str) -> None:
    node = helper.make_node(op, ["x"], ["y"], **{"kernel_shape": [2], **attributes})
    shape = [1, 1, 9, 7][: 2 + len(attributes.get("kernel_shape", [2]))]
    with pytest.raises(UnsupportedOpError, match=reason):
        onnx_attrib.compile(chain({"x": shape}, node), method="gradient")


def rounding_up(op: str, seed: int) -> tuple[onnx.NodeProto, list[int]]:
    """A pool of which some last window lies in the padding, or would without data behind it."""
    rng = np.random.default_rng(seed)
    while True:
        spatial = 1 + seed % 2
        kernel, strides = draw(rng, 1, 3, spatial), draw(rng, 2, 4, spatial)
        dilations = draw(rng, 1, 2, spatial) if seed % 3 == 2 and op != "AveragePool" else None
        spread = dilations or [1] * spatial
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
        pads = [draw(rng, 0, k - 1, 1)[0] for k in kernel + kernel]
        size = [e + more for e, more in zip(extent, draw(rng, 0, 6, spatial), strict=True)]
        last = [
            -(-(n + a + b - e) // s) * s - n - a
            for n, a, b, e, s in zip(
                size, pads[:spatial], pads[spatial:], extent, strides, strict=True
            )
        ]
        if max(last) >= 0:
            break
    more: dict[str, Any] = {"count_include_pad": seed % 2} if op == "AveragePool" else {}
    node = helper.make_node(
        op,
        ["h"],
        ["k"],
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        ceil_mode=1,
        **more,
    )
    return node, [2, 2, *size]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("op", ["AveragePool", "LpPool", "MaxPool"])
def test_last_windows_in_the_padding(op: str, seed: int) -> None:
    """ONNX's shape inference counts them, and onnxruntime does not."""
    pool, shape = rounding_up(op, seed)
    before = helper.make_node("Tanh", ["x"], ["h"])
    model = chain({"x": shape}, before, pool, helper.make_node("Exp", ["k"], ["y"]))
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.Clear()
    rng = np.random.default_rng(seed)
    x, base = spaced(rng, shape), spaced(rng, shape)
    check_gradient(model, {"x": x})
    check_conservation(model, ({"x": x}, {"x": base}), ({"x": x}, {"x": base[:1]}))


def test_pools_that_follow_each_other_in_the_padding() -> None:
    """The size of the second is inferred wrongly until the first is right; so is a branch's."""
    pool = {"kernel_shape": [1], "strides": [3], "ceil_mode": 1}
    model = chain(
        {"x": [1, 1, 27]},
        helper.make_node("MaxPool", ["x"], ["a"], **pool),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("AveragePool", ["b"], ["c"], **pool),
        helper.make_node("MaxPool", ["c"], ["d", "i"], **pool),
        helper.make_node("Exp", ["d"], ["y"]),
    )
    # As a file may declare that was made by inference.
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 2
    rng = np.random.default_rng(0)
    x, base = spaced(rng, [1, 1, 27]), spaced(rng, [1, 1, 27])
    assert run(model, {"x": x})["y"].shape == (1, 1, 1)
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    onnx.checker.check_model(compiled, full_check=True)
    check_gradient(model, {"x": x})
    check_conservation(model, ({"x": x}, {"x": base}))
