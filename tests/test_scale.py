"""Large models: many nodes, and weights past what one protobuf can hold."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib.model_io import save

from .long_graphs import LONG


def chain(length: int) -> onnx.ModelProto:
    """x → tanh(x + 0.01) → … , ``length`` nodes."""
    nodes, last = [], "x"
    for i in range(length // 2):
        nodes.append(helper.make_node("Add", [last, "step"], [f"a{i}"]))
        last = "y" if 2 * i + 2 == length else f"t{i}"
        nodes.append(helper.make_node("Tanh", [f"a{i}"], [last]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.array(0.01, np.float32), "step")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """Run without graph optimisation: ONNX Runtime's takes minutes on a chain of this length."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


@pytest.mark.parametrize("method", ["gradient", pytest.param("deeplift", marks=pytest.mark.slow)])
def test_ten_thousand_nodes(method: str) -> None:
    source = chain(10_000)
    # Of the processor, which others may share.
    start = time.process_time()
    compiled = onnx_attrib.compile(source, method, target=0)
    assert time.process_time() - start < 30
    x = np.array([[0.5, -0.5, 1, 2]], np.float32)
    y, attribution = plain(compiled, x)
    assert np.isfinite(attribution).all()
    np.testing.assert_array_equal(y, plain(source, x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated-gradients", "lrp"])
@pytest.mark.parametrize("name", LONG)
def test_ten_thousand_nodes_of_architectures(name: str, method: str) -> None:
    """Half of them take half the time: under 15 s."""
    source = LONG[name](5000)
    assert 4850 < len(source.graph.node) <= 5000
    start = time.process_time()
    onnx_attrib.compile(source, method, target=0)
    assert time.process_time() - start < 15


def test_one_tensor_with_ten_thousand_readers() -> None:
    """Σ tanh(x): the fan-out that makes list-based graph surgery quadratic."""
    nodes = [helper.make_node("Tanh", ["x"], [f"t{i}"]) for i in range(10_000)]
    nodes.append(helper.make_node("Sum", [f"t{i}" for i in range(10_000)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "fan",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    start = time.process_time()
    compiled = onnx_attrib.compile(model, "gradient", target=0)
    assert time.process_time() - start < 30
    x = np.array([[0.5, -0.5]], np.float32)
    result = plain(compiled, x)[1]
    np.testing.assert_allclose(result, [[1e4 * (1 - np.tanh(0.5) ** 2), 0]], rtol=1e-4)


@pytest.mark.slow
def test_past_two_gibibytes(tmp_path: Path) -> None:
    """Weights in external data of 2.2 GiB come back as external data."""
    width, layers = 12_000, 4
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((width, width), np.float32) / np.sqrt(width)).astype(np.float32)
    nodes, initializers, last = [], [], "x"
    for i in range(layers):
        initializers.append(numpy_helper.from_array(np.roll(weight, i, 0), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        last = "y" if i + 1 == layers else f"t{i}"
        nodes.append(helper.make_node("Tanh", [f"h{i}"], [last]))
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "wide.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="wide.data")
    del model, graph, initializers
    compiled = onnx_attrib.compile(path, "deeplift", target=3, delta=True)
    written = save(compiled, tmp_path / "wide.deeplift.onnx")
    assert [file.name for file in written] == ["wide.deeplift.onnx.data", "wide.deeplift.onnx"]
    del compiled
    onnx.checker.check_model(str(tmp_path / "wide.deeplift.onnx"))
    session = ort.InferenceSession(
        str(tmp_path / "wide.deeplift.onnx"), providers=["CPUExecutionProvider"]
    )
    x = rng.standard_normal((2, width), np.float32)
    y, attribution, delta = session.run(None, {"x": x})
    np.testing.assert_allclose(attribution.sum(1), y[:, 3], rtol=1e-3, atol=1e-4)
    assert np.abs(delta).max() < 1e-3
