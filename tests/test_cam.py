"""Class activation maps: restated slowly, the layer that is found, the axes, the refusals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import CompileError, OptionError
from onnx_attrib.cli import main
from onnx_attrib.compiler import prepare
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.positions import last_block

from .test_contract import close, run, text

MAPS = ["grad-cam", "grad-cam++", "layer-cam"]


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def network(rng: np.random.Generator, axes: int, sizes: tuple[int, ...]) -> ModelProto:
    """Conv → Tanh (the layer, both signs) → dense → Tanh → dense, with stride 2."""
    after = [(size - 3) // 2 + 1 for size in sizes]
    count = 4 * int(np.prod(after))
    dims = ", ".join(str(size) for size in sizes)
    strides = ", ".join(["2"] * axes)
    return text(
        f"""g (float[N, 2, {dims}] x) => (float[N, 3] y)
        {{ z = Conv <strides = [{strides}]> (x, k, b) a = Tanh(z) f = Flatten(a)
           h = MatMul(f, u) t = Tanh(h) y = MatMul(t, v) }}""",
        k=draw(rng, 4, 2, *[3] * axes),
        b=draw(rng, 4),
        u=draw(rng, count, 5) / np.float32(np.sqrt(count)),
        v=draw(rng, 5, 3),
    )


def shown(model: ModelProto, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """An inner tensor's value."""
    tapped = ModelProto()
    tapped.CopyFrom(model)
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    tapped.graph.output.append(info)
    return run(tapped, feeds)[name].astype(np.float64)


def value_and_gradient(
    model: ModelProto, x: np.ndarray, target: int
) -> tuple[np.ndarray, np.ndarray]:
    """A, and ∂S/∂A by the two dense layers behind it, in float64."""
    w = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    a = shown(model, "a", {"x": x})
    t = np.tanh(a.reshape(len(a), -1) @ w["u"])
    return a, (((1 - t**2) * w["v"][:, target]) @ w["u"].T).reshape(a.shape)


def mapped(method: str, a: np.ndarray, g: np.ndarray, relu: bool) -> np.ndarray:
    """The papers' formulas, channel by channel and position by position; [N, 1, …]."""
    result = np.zeros((len(a), 1, *a.shape[2:]))
    places = list(itertools.product(*map(range, a.shape[2:])))
    for n, k in itertools.product(range(len(a)), range(a.shape[1])):
        own, slope = a[n, k], g[n, k]
        for place in places:
            if method == "grad-cam":
                weight = sum(slope[p] for p in places) / len(places)
            elif method == "layer-cam":
                weight = max(slope[place], 0.0)
            else:
                # exp(S) taken out of numerator and denominator.
                weight, total = 0.0, sum(own[p] for p in places)
                for p in places:
                    alpha = slope[p] ** 2 / (2 * slope[p] ** 2 + total * slope[p] ** 3)
                    weight += alpha * max(slope[p], 0.0)
            result[(n, 0, *place)] += weight * own[place]
    return np.maximum(result, 0) if relu else result


def resampled(m: np.ndarray, sizes: tuple[int, ...], nearest: bool) -> np.ndarray:
    """One axis after the other, entry by entry, with half-pixel centres."""
    for axis, size in enumerate(sizes, start=2):
        length, parts = m.shape[axis], []
        for i in range(size):
            place = (i + 0.5) * length / size - 0.5
            if nearest:
                parts.append(m.take(min(int(np.floor(place + 0.5)), length - 1), axis=axis))
                continue
            place = min(max(place, 0.0), length - 1.0)
            low = int(np.floor(place))
            high = min(low + 1, length - 1)
            share = place - low
            parts.append((1 - share) * m.take(low, axis=axis) + share * m.take(high, axis=axis))
        m = np.stack(parts, axis=axis)
    return m


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("sizes", [(11,), (9, 12), (7, 5, 6)], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_formulas(
    rng: np.random.Generator, method: str, sizes: tuple[int, ...], relu: bool
) -> None:
    model = network(rng, len(sizes), sizes)
    x = draw(rng, 7, 2, *sizes)
    a, g = value_and_gradient(model, x, 1)
    expected = mapped(method, a, g, relu)
    assert (expected > 0).any()
    assert (expected < 0).any() != relu
    small = onnx_attrib.compile(model, method, target=1, relu=relu, upsample=False)
    onnx.checker.check_model(small, full_check=True)
    close(run(small, {"x": x})["x_attribution"], expected, 2e-5)
    for interpolation in ("bilinear", "nearest"):
        compiled = onnx_attrib.compile(
            model, method, target=1, relu=relu, interpolation=interpolation
        )
        onnx.checker.check_model(compiled, full_check=True)
        found = run(compiled, {"x": x})["x_attribution"]
        close(found, resampled(expected, sizes, interpolation == "nearest"), 2e-5)
        alone = run(compiled, {"x": x[4:5]})["x_attribution"]
        close(alone, found[4:5], 1e-5)


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_types(rng: np.random.Generator, kind: str) -> None:
    dtype = np.dtype({"float16": np.float16, "double": np.float64}[kind])
    model = text(
        f"""g ({kind}[N, 2, 6, 6] x) => ({kind}[N, 3] y)
        {{ z = Mul(x, c) a = Tanh(z) f = Flatten(a) y = MatMul(f, u) }}""",
        c=np.array([[[[0.5]], [[-1.5]]]], dtype),
        u=draw(rng, 72, 3).astype(dtype) / dtype.type(8),
    )
    x = draw(rng, 2, 2, 6, 6).astype(dtype)
    # Named; and half as many positions as the input, of the other axis twice.
    compiled = onnx_attrib.compile(model, "grad-cam", target=0, layer="a", relu="false")
    found = run(compiled, {"x": x})["x_attribution"]
    assert found.dtype == dtype
    u = onnx.numpy_helper.to_array(model.graph.initializer[1]).astype(np.float64)
    a = np.tanh(x.astype(np.float64) * np.array([0.5, -1.5]).reshape(1, 2, 1, 1))
    g = np.broadcast_to(u[:, 0].reshape(2, 6, 6), a.shape)
    close(found, mapped("grad-cam", a, g, False), 1e-2 if kind == "float16" else 1e-6)


# -- the layer that is found -----------------------------------------------------------------------

WEIGHTS: dict[str, tuple[int, ...]] = {
    **{"k": (4, 4, 3, 3), "one": (4, 4, 1, 1), "stem": (4, 3, 3, 3), "n": (4,), "d": (4, 5)},
    **{"wide": (8, 5), "k8": (8, 4, 3, 3), "tall": (4, 5, 5), "logits": (5, 4, 1, 1)},
    "gn": (4, 1, 1),
}
POOLED = "p = GlobalAveragePool(last) f = Flatten(p) y = MatMul(f, d)"
STEM = "s = Conv <pads = [1, 1, 1, 1]> (x, stem) r = Relu(s)"
PAD = "<pads = [1, 1, 1, 1]>"
FOUND = {
    "ResNet": f"""{STEM} c1 = Conv {PAD} (r, k) r1 = Relu(c1) c2 = Conv {PAD} (r1, k)
        b = BatchNormalization(c2, n, n, n, v) a = Add(b, r) last = Relu(a) {POOLED}""",
    "VGG": f"""{STEM} c = Conv {PAD} (r, k) last = Relu(c)
        m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (last)
        q = GlobalAveragePool(m) f = Flatten(q) e = MatMul(f, d) y = Relu(e)""",
    "MobileNet": f"{STEM} c = Conv {PAD} (r, k) last = Clip(c, zero, six) {POOLED}",
    "Inception": f"""{STEM} c = Conv {PAD} (r, k) t = Relu(c)
        m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) e = Conv (m, one)
        w = Relu(e) last = Concat <axis = 1> (t, w)
        p = GlobalAveragePool(last) f = Flatten(p) y = MatMul(f, wide)""",
    "DenseNet": f"""{STEM} c = Conv {PAD} (r, k) j = Concat <axis = 1> (r, c)
        b = BatchNormalization(j, n8, n8, n8, v8) last = Relu(b)
        p = ReduceMean <keepdims = 0> (last, spatial) y = MatMul(p, wide)""",
    "EfficientNet": f"""{STEM} q = GlobalAveragePool(r) e = Conv(q, one) g = Sigmoid(e)
        t = Mul(r, g) c = Conv {PAD} (t, k) o = Sigmoid(c) last = Mul(c, o) {POOLED}""",
    "a classifier of convolutions": f"""{STEM} c = Conv {PAD} (r, k) last = Relu(c)
        p = GlobalAveragePool(last) h = Conv(p, one) i = Relu(h) f = Flatten(i) y = MatMul(f, d)""",
    "group normalisation": f"""{STEM} c = Conv {PAD} (r, k) i = Reshape(c, groups)
        o = InstanceNormalization(i, ones2, ones2) u = Reshape(o, whole) t = Mul(u, gn)
        last = Relu(t) {POOLED}""",
    "a segmenter": f"{STEM} c = Conv {PAD} (r, k) last = Relu(c) h = Conv(last, logits) "
    "y = Softmax <axis = 1> (h)",
    "a gated unit": f"""{STEM} c = Conv {PAD} (r, k8) i, o = Split <axis = 1, num_outputs = 2> (c)
        g = Sigmoid(o) last = Mul(i, g) {POOLED}""",
    "time first": f"""{STEM} c = Conv {PAD} (r, k) last = Relu(c)
        i = Transpose <perm = [3, 0, 1, 2]> (last) j = ReduceMean <keepdims = 0> (i, ends)
        y = MatMul(j, d)""",
    "a mean with an axis put in": f"""{STEM} c = Conv {PAD} (r, k) last = Relu(c)
        i = Unsqueeze(last, behind) j = ReduceMean <keepdims = 0> (i, folded) y = MatMul(j, d)""",
    "CAM": f"""{STEM} c = Conv {PAD} (r, k) last = Conv(c, logits)
        p = GlobalAveragePool(last) y = Flatten(p)""",
}


def classifier(rng: np.random.Generator, body: str, image: str = "N, 3, 8, 8") -> ModelProto:
    arrays = {name: draw(rng, *shape) for name, shape in WEIGHTS.items()}
    arrays |= {name: np.ones(size, np.float32) for name, size in (("v", 4), ("n8", 8), ("v8", 8))}
    arrays |= {
        "ones2": np.ones(2, np.float32),
        "zero": np.zeros((), np.float32),
        "six": np.full((), 6, np.float32),
        "spatial": np.array([2, 3]),
        "inside": np.array([1, 2]),
        "ends": np.array([0, 3]),
        "behind": np.array([2]),
        "folded": np.array([2, 3, 4]),
        "image": np.array([-1, 3, 8, 8]),
        "groups": np.array([0, 2, -1]),
        "whole": np.array([-1, 4, 8, 8]),
    }
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in arrays.items() if name in words}
    scores = "N, C, A, B" if "y = Softmax" in body or "y = Conv" in body else "N, C"
    return text(f"g (float[{image}] x) => (float[{scores}] y) {{ {body} }}", **used)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    # The spelled group normalisation reshapes to fixed sizes.
    [(k, s) for k in FOUND for s in ("8, 8", "H, W") if (k, s) != ("group normalisation", "H, W")],
)
def test_the_layer_found(rng: np.random.Generator, kind: str, sizes: str) -> None:
    model = classifier(rng, FOUND[kind], f"N, 3, {sizes}")
    copied = ModelProto()
    copied.CopyFrom(model)
    graph = normalize(copied)
    found = last_block(graph, graph.nodes, graph.outputs[0])
    assert found is not None
    assert found.name == "last"
    feeds = {"x": draw(rng, 2, 3, 8, 8)}
    if kind == "a segmenter":
        feeds["target"] = np.array([[1, 2, 3], [0, 7, 7]])
    else:
        feeds["target"] = np.array([1, 0])
    result = run(onnx_attrib.compile(model, "grad-cam"), feeds)["x_attribution"]
    assert result.shape == (2, 1, 8, 8)
    assert result.any()


def test_the_sweep_ends_at_the_layer(rng: np.random.Generator) -> None:
    model = classifier(rng, FOUND["ResNet"])
    kinds = [node.op_type for node in onnx_attrib.compile(model, "grad-cam").graph.node]
    assert "ConvTranspose" not in kinds
    assert kinds.count("Conv") == 3
    deep = [node.op_type for node in onnx_attrib.compile(model, "guided-grad-cam").graph.node]
    assert deep.count("Conv") + deep.count("ConvTranspose") == 6


# -- axes ------------------------------------------------------------------------------------------


def channels_last(model: ModelProto, order: list[int], dims: str) -> ModelProto:
    """The model with another order of the input's axes, as exporters of Keras models write it."""
    moved = ModelProto()
    moved.CopyFrom(model)
    for node in moved.graph.node:
        node.input[:] = ["inner" if name == "x" else name for name in node.input]
    # Scaling happens on the input's own axes.
    scale = onnx.numpy_helper.from_array(np.full((), 2, np.float32), "scale")
    moved.graph.initializer.append(scale)
    first = onnx.helper.make_node("Mul", ["x", "scale"], ["scaled"])
    second = onnx.helper.make_node("Transpose", ["scaled"], ["inner"], perm=order)
    moved.graph.node.insert(0, second)
    moved.graph.node.insert(0, first)
    shape = [int(d) if d.isdecimal() else d for d in dims.split(", ")]
    kind = onnx.TensorProto.FLOAT
    moved.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", kind, shape))
    onnx.checker.check_model(moved, full_check=True)
    return moved


@pytest.mark.parametrize("method", [*MAPS, "guided-grad-cam"])
def test_channels_last(rng: np.random.Generator, method: str) -> None:
    """The map has the input's own order: [N, H, W, 1]."""
    model = classifier(rng, FOUND["ResNet"], "N, 3, 8, 10")
    last = channels_last(model, [0, 3, 1, 2], "N, 8, 10, 3")
    x, target = draw(rng, 3, 3, 8, 10), np.array([0, 2, 4])
    one = run(onnx_attrib.compile(model, method), {"x": 2 * x, "target": target})
    turned = x.transpose(0, 2, 3, 1).copy()
    compiled = onnx_attrib.compile(last, method)
    other = run(compiled, {"x": turned, "target": target})
    expected = one["x_attribution"].transpose(0, 2, 3, 1)
    if method == "guided-grad-cam":
        expected = 2 * expected
    assert other["x_attribution"].shape == (3, 8, 10, 3 if method == "guided-grad-cam" else 1)
    close(other["x_attribution"], expected)


def test_a_layer_with_channels_last(rng: np.random.Generator) -> None:
    """An activation between two Transposes is the layer, in its own order."""
    body = f"""{STEM} c = Conv {PAD} (r, k) i = Transpose <perm = [0, 2, 3, 1]> (c)
        b = Add(i, n) last = Relu(b) p = ReduceMean <keepdims = 0> (last, inside)
        y = MatMul(p, d)"""
    model = classifier(rng, body)
    same = classifier(rng, f"{STEM} c = Conv {PAD} (r, k) b = Add(c, gn) last = Relu(b) {POOLED}")
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        for other in same.graph.initializer:
            if other.name == ("gn" if tensor.name == "n" else tensor.name):
                shape = (4, 1, 1) if tensor.name == "n" else value.shape
                other.CopyFrom(onnx.numpy_helper.from_array(value.reshape(shape), other.name))
    feeds = {"x": draw(rng, 2, 3, 8, 8), "target": np.array([1, 3])}
    for upsample in (True, False):
        one, two = (
            run(onnx_attrib.compile(m, "grad-cam", upsample=upsample), feeds)["x_attribution"]
            for m in (model, same)
        )
        assert two.any()
        close(one, two)


def test_signals_through_images(rng: np.random.Generator) -> None:
    """A signal [N, L, C] that is convolved as an image [N, C, 1, L], as tf2onnx does."""
    model = text(
        """g (float[N, 12, 3] x) => (float[N, 5] y)
        { t = Transpose <perm = [0, 2, 1]> (x) u = Unsqueeze(t, axis) c = Conv(u, k)
          s = Squeeze(c, axis) r = Relu(s) last = Unsqueeze(r, axis)
          p = ReduceMean <keepdims = 0> (last, ends) y = MatMul(p, d) }""",
        axis=np.array([2]),
        ends=np.array([2, 3]),
        k=draw(rng, 4, 3, 1, 3),
        d=draw(rng, 4, 5),
    )
    feeds = {"x": draw(rng, 2, 12, 3), "target": np.array([1, 3])}
    for layer, shape in (("auto", (2, 1, 10)), ("last", (2, 1, 1, 10))):
        options: dict[str, Any] = {"layer": layer, "method": "grad-cam"}
        found = run(onnx_attrib.compile(model, **options), feeds)["x_attribution"]
        small = run(onnx_attrib.compile(model, upsample=False, **options), feeds)["x_attribution"]
        assert found.shape == (2, 12, 1)
        assert small.shape == shape
        assert small.any()
        expected = resampled(small.reshape(2, 1, 10), (12,), False).transpose(0, 2, 1)
        close(found, expected)


def test_gray_images_without_a_channel(rng: np.random.Generator) -> None:
    model = text(
        """g (float[N, 8, 8] x) => (float[N, 5] y)
        { u = Unsqueeze(x, axis) c = Conv(u, k) last = Relu(c)
          p = ReduceMean <keepdims = 0> (last, spatial) y = MatMul(p, d) }""",
        axis=np.array([1]),
        spatial=np.array([2, 3]),
        k=draw(rng, 4, 1, 3, 3),
        d=draw(rng, 4, 5),
    )
    feeds = {"x": draw(rng, 2, 8, 8), "target": np.array([1, 3])}
    found = run(onnx_attrib.compile(model, "layer-cam"), feeds)["x_attribution"]
    small = run(onnx_attrib.compile(model, "layer-cam", upsample="false"), feeds)["x_attribution"]
    assert found.shape == (2, 8, 8)
    close(found, resampled(small, (8, 8), False)[:, 0])


def test_inputs_of_several_sizes(rng: np.random.Generator) -> None:
    """Every input has the map at its own positions."""
    model = text(
        """g (float[N, 3, 9, 9] a, float[N, 1, 5, 5] b) => (float[N, 5] y)
        { c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (a, k) e = Conv <pads = [1, 1, 1, 1]>
          (b, l) s = Add(c, e) last = Relu(s) p = GlobalAveragePool(last) f = Flatten(p)
          y = MatMul(f, d) }""",
        k=draw(rng, 4, 3, 3, 3),
        l=draw(rng, 4, 1, 3, 3),
        d=draw(rng, 4, 5),
    )
    feeds = {"a": draw(rng, 2, 3, 9, 9), "b": draw(rng, 2, 1, 5, 5), "target": np.array([1, 3])}
    found = run(onnx_attrib.compile(model, "grad-cam"), feeds)
    assert found["b_attribution"].shape == (2, 1, 5, 5)
    close(found["a_attribution"], resampled(found["b_attribution"], (9, 9), False))
    inner = run(onnx_attrib.compile(model, "grad-cam", inputs="last"), feeds)
    close(inner["last_attribution"], found["b_attribution"])


# -- requests --------------------------------------------------------------------------------------


def test_several_methods_and_targets(rng: np.random.Generator) -> None:
    model = classifier(rng, FOUND["Inception"])
    x = draw(rng, 3, 3, 8, 8)
    methods = [*MAPS, "guided-grad-cam", "guided-backprop"]
    compiled = onnx_attrib.compile(model, methods, targets=[3, 0], relu=False)
    onnx.checker.check_model(compiled, full_check=True)
    both = run(compiled, {"x": x})
    for method in methods:
        options: dict[str, Any] = {} if method == "guided-backprop" else {"relu": False}
        for k, target in enumerate((3, 0)):
            one = onnx_attrib.compile(model, method, target=target, **options)
            close(both[f"x_attribution_{method}"][:, k], run(one, {"x": x})["x_attribution"])


def test_guided_grad_cam_is_the_product(rng: np.random.Generator) -> None:
    model = classifier(rng, FOUND["ResNet"])
    feeds = {"x": draw(rng, 3, 3, 8, 8), "target": np.array([0, 2, 4])}
    for options in ({}, {"relu": False, "interpolation": "nearest", "layer": "r"}):
        given: dict[str, Any] = dict(options)
        product, guides, cam = (
            run(onnx_attrib.compile(model, method, **kept), feeds)["x_attribution"]
            for method, kept in (
                ("guided-grad-cam", given),
                ("guided-backprop", {}),
                ("grad-cam", given),
            )
        )
        assert product.shape == (3, 3, 8, 8)
        close(product, guides * cam)


@pytest.mark.parametrize("method", [*MAPS, "guided-grad-cam"])
def test_without_positions(rng: np.random.Generator, method: str) -> None:
    dense = text(
        "g (float[N, 4] x) => (float[N, 5] y) { h = MatMul(x, d) y = Relu(h) }", d=draw(rng, 4, 5)
    )
    with pytest.raises(CompileError, match=r"'y' has none before it that has positions.*layer"):
        onnx_attrib.compile(dense, method)
    # The only convolution makes the output.
    only = classifier(rng, "y = Conv (x, stem)")
    with pytest.raises(CompileError, match="has none before it"):
        onnx_attrib.compile(only, method)


def test_a_flat_input(rng: np.random.Generator) -> None:
    """Pixels in a row have no positions: the map can be had as it is."""
    body = f"x2 = Reshape(x, image) {FOUND['VGG'].replace('(x,', '(x2,')}"
    model = classifier(rng, body, "N, 192")
    with pytest.raises(CompileError, match=r"'x' \[N, 192\].*'last' \[.*4, 8, 8\].*upsample=false"):
        onnx_attrib.compile(model, "grad-cam")
    with pytest.raises(CompileError, match=r"inputs=\[...\]"):
        onnx_attrib.compile(model, "guided-grad-cam")
    feeds = {"x": draw(rng, 2, 192), "target": np.array([1, 3])}
    small = run(onnx_attrib.compile(model, "grad-cam", upsample=False), feeds)["x_attribution"]
    inner = run(onnx_attrib.compile(model, "grad-cam", inputs="x2"), feeds)["x2_attribution"]
    assert small.shape == (2, 1, 8, 8)
    close(small, inner)


def test_positions_that_cannot_be_told(rng: np.random.Generator) -> None:
    """After arithmetic across axes, nothing says where an input has its channels."""
    model = text(
        """g (float[N, 5, 6] x) => (float[N, 4] y)
        { e = Einsum <equation = "ncl,lk->nkc"> (x, u) c = Conv(e, k) last = Relu(c)
          p = ReduceMean <keepdims = 0> (last, end) y = MatMul(p, d) }""",
        u=draw(rng, 6, 3),
        k=draw(rng, 4, 3, 3),
        end=np.array([2]),
        d=draw(rng, 4, 4),
    )
    with pytest.raises(
        CompileError, match=r"'x' \[N, 5, 6\] has not the positions of layer 'last'"
    ):
        onnx_attrib.compile(model, "layer-cam")
    feeds = {"x": draw(rng, 2, 5, 6), "target": np.array([1, 3])}
    found = run(onnx_attrib.compile(model, "layer-cam", inputs="e"), feeds)
    assert found["e_attribution"].shape == (2, 1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "lasd"}, "no tensor 'lasd' to use as layer: did you mean 'last'"),
        ({"layer": "stem"}, "layer 'stem' is a constant of the model"),
        ({"layer": "y"}, "'y' is the explained output itself"),
        ({"layer": "groups"}, "'groups' is int64"),
        ({"upsample": "maybe"}, "option 'upsample' must be true or false, not 'maybe'"),
        ({"relu": 2}, "option 'relu' must be true or false, not '2'"),
        ({"interpolation": "cubic"}, "choose from: bilinear, nearest"),
        ({"layers": "last"}, "no option 'layers': did you mean 'layer'"),
    ],
)
def test_bad_options(rng: np.random.Generator, options: dict[str, Any], message: str) -> None:
    model = classifier(rng, FOUND["group normalisation"])
    with pytest.raises(OptionError, match=message):
        onnx_attrib.compile(model, "grad-cam", **options)


def test_a_name_that_there_is_not(rng: np.random.Generator) -> None:
    """What could be a layer is listed: no constants, no integers, nothing that is emitted."""
    with pytest.raises(OptionError, match=r"choose from: x, s, r, c, last, m, q, f, e, y$"):
        onnx_attrib.compile(classifier(rng, FOUND["VGG"]), "grad-cam", layer="?")


def test_a_layer_beside_the_path(rng: np.random.Generator) -> None:
    model = classifier(rng, f"{FOUND['VGG']} beside = Conv {PAD} (r, k)")
    with pytest.raises(CompileError, match="does not depend on 'beside'"):
        onnx_attrib.compile(model, "grad-cam", layer="beside")


def test_signs_follow_the_options(rng: np.random.Generator, tmp_path: Any) -> None:
    listed = {method.name: method.signed for method in onnx_attrib.methods()}
    assert not any(listed[name] for name in MAPS)
    assert listed["guided-grad-cam"]
    onnx.save(classifier(rng, FOUND["VGG"]), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", draw(rng, 1, 3, 8, 8))
    for relu, signed in (("true", False), ("false", True)):
        arguments = ["compile", tmp_path / "m.onnx", "-o", tmp_path / "c.onnx"]
        arguments += ["--method", "grad-cam", "--option", f"relu={relu}"]
        assert CliRunner().invoke(main, [str(a) for a in arguments]).exit_code == 0
        arguments = ["run", tmp_path / "c.onnx", "--input", tmp_path / "x.npy"]
        arguments += ["--plot", tmp_path / "c.png"]
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        assert ("against" in done.output) == signed


def test_defaults_are_visible() -> None:
    shown_defaults = CliRunner().invoke(main, ["methods", "grad-cam"]).output
    for line in ("layer=auto", "interpolation=bilinear", "upsample=", "relu="):
        assert line in shown_defaults


def test_notes_name_what_is_plain(rng: np.random.Generator) -> None:
    job = prepare(classifier(rng, FOUND["EfficientNet"]), "guided-grad-cam")
    assert job.notes == [
        "guided-grad-cam changes ReLUs and their kin; the plain gradient passes "
        "(Sigmoid, Mul), Mul, Sigmoid"
    ]
