"""What is spelled for ONNX Runtime's CPU kernels gives the numbers of what is spelled for CUDA."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_attrib

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray[Any, Any]


class Network:
    """A chain of operators on x [N, channels, size, size], summed to one output."""

    def __init__(self, channels: int, size: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.channels, self.size, self.last = channels, size, "x"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def then(self, op: str, *others: Any, source: str = "", **attributes: Any) -> str:
        given = [
            source or self.last,
            *(o if isinstance(o, str) else self.constant(o) for o in others),
        ]
        self.last = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, given, [self.last], **attributes))
        return self.last

    def model(self, batch: int | str = "N") -> onnx.ModelProto:
        self.then("ReduceSum", np.array([1, 2, 3]), keepdims=0)
        self.nodes[-1].output[0] = "y"
        shape = [batch, self.channels, self.size, self.size]
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch])
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def weight(rng: np.random.Generator, *shape: int) -> Array:
    """Quarters, so that sums of many are exact and ties are frequent."""
    return (rng.integers(-4, 5, shape) / 4).astype(np.float32)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: onnx.ModelProto, x: Array | dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    feeds = x if isinstance(x, dict) else {"x": x}
    return [np.asarray(y) for y in session.run(None, feeds)]


def both(model: onnx.ModelProto, x: Array, **request: Any) -> tuple[onnx.ModelProto, Array]:
    """The model for the CPU, and its attribution, which is that of the model for CUDA."""
    tuned, plain = (
        onnx_attrib.compile(model, provider=provider, **request)
        for provider in ("portable", "cuda")
    )
    got, wanted = run(tuned, x), run(plain, x)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)
    assert np.abs(got[1]).max() > 0
    return tuned, got[1]


METHODS = ["gradient", "deeplift"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", [2, 3])
def test_max_pools(
    method: str, batch: int | str, padded: bool, kernel: int, rng: np.random.Generator
) -> None:
    """Ties go to the first entry, also beside the padding and where all is negative."""
    size, channels = 2 * int(rng.integers(13, 17)) + padded, 96
    net = Network(3, size)
    net.then("Conv", weight(rng, channels, 3, 3, 3), pads=[1] * 4)
    if rng.integers(2):
        net.then("Relu")
    else:
        net.then("Neg")
        net.then("Abs")
        net.then("Neg")
    pads = [int(p) for p in rng.integers(0, kernel, 4)] if padded else [0] * 4
    net.then("MaxPool", kernel_shape=[kernel] * 2, strides=[2, int(rng.integers(1, 3))], pads=pads)
    net.then("Conv", weight(rng, 16, channels, 3, 3))
    net.then("Relu")
    x = rng.integers(-1, 2, (2, 3, size, size)).astype(np.float32)
    tuned, _ = both(net.model(batch), x, method=method)
    pools = [node for node in tuned.graph.node if node.op_type == "MaxPool"]
    assert pools
    assert all(len(node.output) == 1 for node in pools)


@pytest.mark.parametrize("baseline", [0.0, "another", "one for all", "one for each"])
@pytest.mark.parametrize("before", ["Relu", "LeakyRelu", "Sigmoid", "Gelu", "none"])
@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_slopes_before_max_pools(
    batch: int | str, before: str, baseline: Any, rng: np.random.Generator
) -> None:
    """Slopes that multiply what a pool sends back are evaluated at its winners alone."""
    size, channels, kernel = 2 * int(rng.integers(6, 9)), 16, int(rng.integers(2, 4))
    count = 1 if batch == 1 else 2
    net = Network(3, size)
    net.then("Conv", weight(rng, channels, 3, 3, 3), pads=[1] * 4)
    if before != "none":
        net.then(before)
    net.then("MaxPool", kernel_shape=[kernel] * 2, strides=[2, 2], pads=[0, 0, 1, 1])
    net.then("Conv", weight(rng, 16, channels, 3, 3))
    net.then("Relu")
    x = (rng.integers(-8, 9, (count, 3, size, size)) / 8).astype(np.float32)
    other = (rng.integers(-8, 9, (count, 3, size, size)) / 8).astype(np.float32)
    feeds = {"x": x}
    if isinstance(baseline, str) and baseline.startswith("one"):
        feeds["x_baseline"] = other if baseline == "one for each" or batch == 2 else other[:1]
        baseline = "input"
    elif baseline == "another":
        baseline = other[:1]
    source = net.model(batch)
    models = [
        onnx_attrib.compile(source, "deeplift", baseline=baseline, provider=p, delta=True)
        for p in ("portable", "cuda")
    ]
    (y, got, delta), (_, wanted, _) = (run(model, feeds) for model in models)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-4 * np.abs(wanted).max())
    assert np.abs(delta).max() < 1e-3 * np.abs(y).max()
    small = onnx.shape_inference.infer_shapes(models[0]).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in small.value_info}
    divided = [node for node in small.node if node.op_type == "Div"]
    # The pool's rule, and the two at its winners: of the layer before it and of the one after.
    flat = [node for node in divided if ranks[node.output[0]] == 2]
    assert bool(flat) == (before != "none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_strided_convolutions(method: str, kernel: int, rng: np.random.Generator) -> None:
    """A block with stride 2 and its shortcut, of even and odd sizes."""
    size, channels = int(rng.integers(8, 16)), 16
    net = Network(3, size)
    start = net.then("Conv", weight(rng, channels, 3, 3, 3), pads=[1] * 4)
    start = net.then("Relu", source=start)
    pads = [kernel // 2] * 2 + [(kernel - 1) // 2] * 2
    long = net.then("Conv", weight(rng, 32, channels, kernel, kernel), strides=[2, 2], pads=pads)
    short = net.then("Conv", weight(rng, 32, channels, 1, 1), source=start, strides=[2, 2])
    net.then("Add", short, source=long)
    net.then("Relu")
    x = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    tuned, _ = both(net.model(), x, method=method)
    # One is left, to the three channels of x.
    assert ops(tuned)["ConvTranspose"] == 1 or kernel < 3


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_shortcuts_beside_bottlenecks(
    method: str, odd: bool, batch: int | str, rng: np.random.Generator
) -> None:
    """A 1×1 shortcut with stride 2 adds to what a layer without stride gives."""
    size = 2 * int(rng.integers(4, 8)) + odd
    net = Network(3, size)
    net.then("Conv", weight(rng, 16, 3, 3, 3), pads=[1] * 4)
    start = net.then("Relu")
    net.then("Conv", weight(rng, 16, 16, 1, 1))
    net.then("Relu")
    net.then("Conv", weight(rng, 16, 16, 3, 3), strides=[2, 2], pads=[1] * 4)
    long = net.then("Relu")
    short = net.then("Conv", weight(rng, 16, 16, 1, 1), source=start, strides=[2, 2])
    net.then("Add", short, source=long)
    net.then("Relu")
    x = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    tuned, _ = both(net.model(batch), x, method=method)
    assert ops(tuned)["Resize"] == (0 if odd else 1)
    assert ops(tuned)["Where"] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_one_phase_of_four(method: str, at: tuple[int, int], rng: np.random.Generator) -> None:
    """A 2×2 kernel of stride 2 meets the data at one phase for each of its entries."""
    net = Network(3, 8)
    net.then("Conv", weight(rng, 16, 3, 3, 3), pads=[1] * 4)
    net.then("Relu")
    cut = np.array(at)
    net.then("Slice", cut, np.array([8, 8]), np.array([2, 3]))
    net.then("Conv", weight(rng, 32, 16, 1, 1), strides=[2, 2])
    net.then("Relu")
    x = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    both(net.model(), x, method=method)


@pytest.mark.parametrize("batch", ["N", 2])
def test_residual_blocks(batch: int | str, rng: np.random.Generator) -> None:
    """The gradient beside a block of convolutions is brought into their layout once."""
    net = Network(3, 6)
    net.then("Conv", weight(rng, 16, 3, 3, 3), pads=[1] * 4)
    net.then("Relu")
    for _ in range(3):
        start = net.last
        net.then("Conv", weight(rng, 16, 16, 3, 3) / 4, pads=[1] * 4)
        net.then("Relu")
        inner = net.then("Conv", weight(rng, 16, 16, 3, 3) / 4, pads=[1] * 4)
        net.then("Add", inner, source=start)
        net.then("Relu")
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    tuned, _ = both(net.model(batch), x, method="gradient")
    assert ops(tuned)["AveragePool"] == 1


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_strided_depthwise_convolutions(kernel: int, rng: np.random.Generator) -> None:
    size, channels = int(rng.integers(8, 16)), 16
    net = Network(3, size)
    net.then("Conv", weight(rng, channels, 3, 3, 3), pads=[1] * 4)
    net.then("Relu")
    pads = [kernel // 2] * 4
    kernels = weight(rng, channels, 1, kernel, kernel)
    net.then("Conv", kernels, strides=[2, 2], pads=pads, group=channels)
    net.then("Relu")
    x = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    tuned, _ = both(net.model(), x, method="gradient")
    assert ops(tuned)["Resize"] == 1
    assert ops(tuned)["ConvTranspose"] == 1  # to the three channels of x


@pytest.mark.parametrize(("low", "high"), [(0, None), (0, 6), (-1, 1), (None, 2), (0.1, 0.7)])
def test_gates(low: float | None, high: float | None, rng: np.random.Generator) -> None:
    """Open between the bounds, and closed at them."""
    net = Network(3, 8)
    net.then("Conv", 4 * weight(rng, 16, 3, 3, 3))
    bounds = ["" if bound is None else np.float32(bound) for bound in (low, high)]
    net.then("Clip", *bounds)
    net.then("Conv", weight(rng, 16, 16, 3, 3))
    x = (rng.integers(-3, 4, (2, 3, 8, 8)) / 4).astype(np.float32)
    tuned, attribution = both(net.model(), x, method="gradient")
    assert ops(tuned)["Where"] == 0
    assert ops(tuned)["HardSigmoid"] == (low is not None) + (high is not None)
    assert (attribution[0] != attribution[1]).any()  # by the gates alone


HIGHS = [6.0, 1.0, 0.7, 2.0**-20, 3e4, np.nextafter(np.float32(4), np.float32(5))]


@pytest.mark.parametrize("high", HIGHS)
def test_gates_between_zero_and_a_bound_are_exact(high: float, rng: np.random.Generator) -> None:
    """Closed at both ends, open at the numbers next to them."""
    f = np.float32
    high = f(high)
    net = Network(1, 4)
    net.then("Conv", np.ones((16, 1, 1, 1), f))
    net.then("Clip", f(0), high)
    net.then("Conv", np.ones((16, 16, 1, 1), f))
    x = (rng.uniform(0.01, 0.99, (1, 1, 4, 4)) * high).astype(f)
    below = np.nextafter(high, f(0))
    x[0, 0, :2] = [
        [0, -0.0, -1, high],
        [np.finfo(f).tiny, below, 2 * high, np.nextafter(below, f(0))],
    ]
    expected = np.where((x > 0) & (x < high), 256.0, 0.0)
    tuned, attribution = both(net.model(), x, method="gradient")
    np.testing.assert_array_equal(attribution, expected)
    assert ops(tuned)["Where"] == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 2.0**70])
def test_max_pools_of_any_scale(scale: float, rng: np.random.Generator) -> None:
    size = 34
    net = Network(16, size)
    net.then("MaxPool", kernel_shape=[3, 3], strides=[1, 1], pads=[0, 1, 1, 0])
    net.then("Conv", weight(rng, 16, 16, 1, 1))
    x = (rng.integers(-2, 3, (2, 16, size, size)) * scale).astype(np.float32)
    both(net.model(), x, method="gradient")


def test_max_pools_of_huge_numbers_stay_within_bounds(rng: np.random.Generator) -> None:
    net = Network(16, 34)
    net.then("MaxPool", kernel_shape=[3, 3], strides=[1, 1])
    net.then("Conv", np.ones((16, 16, 1, 1), np.float32))
    model = onnx_attrib.compile(net.model(), method="gradient")
    for size in (2.0**90, 2.0**110, 3e38, np.inf):
        x = np.where(rng.integers(2, size=(1, 16, 34, 34)), size, -size)
        run(model, x.astype(np.float32))


def test_gates_that_stop_infinities_stay() -> None:
    """√relu(z) has an infinite slope at zero, where the gradient is zero all the same."""
    net = Network(1, 4)
    net.then("Conv", np.ones((16, 1, 1, 1), np.float32))
    net.then("Relu")
    net.then("Sqrt")
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    _, attribution = both(net.model(), x, method="gradient")
    assert np.isfinite(attribution).all()


def test_a_gate_is_open_from_the_smallest_normal_number_on() -> None:
    net = Network(1, 4)
    net.then("Conv", np.ones((16, 1, 1, 1), np.float32))
    net.then("Relu")
    net.then("Conv", np.ones((16, 16, 1, 1), np.float32))
    x = np.full((1, 1, 4, 4), np.finfo(np.float32).tiny)
    x[0, 0, 0] = 0, -1, 1e30, 1e-30
    _, attribution = both(net.model(), x, method="gradient")
    assert set(np.unique(attribution)) == {0.0, 256.0}


def test_what_is_not_a_number_stays_within_bounds() -> None:
    """A NaN in the data gives NaN or numbers, not an index out of bounds."""
    net = Network(16, 48)
    net.then("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    net.then("Conv", np.ones((16, 16, 1, 1), np.float32))
    model = onnx_attrib.compile(net.model(), method="gradient")
    run(model, np.full((1, 16, 48, 48), np.nan, np.float32))
