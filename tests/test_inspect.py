"""What inspection finds out before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib
from onnx_attrib.inspection import Inspection, behind_softmax, inspect
from onnx_attrib.passes.normalize import normalize

MODELS = Path(__file__).parent.parent / "models"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def parsed(body: str) -> ModelProto:
    return onnx.parser.parse_model(f"{HEAD}\n{body}")


def found(body: str) -> Inspection:
    report = inspect(parsed(body))
    json.dumps(report.to_dict())
    return report


def test_cnn() -> None:
    report = inspect(MODELS / "mnist_cnn.onnx")
    assert report.compilable
    assert report.problem is None
    assert report.opsets == {"ai.onnx": 20}
    assert report.parameters == 1_199_882
    assert report.nodes == 9
    assert report.inputs[0].shape == ("N", 1, 28, 28)
    kinds = {(n.operator, n.rule): len(n.nodes) for n in report.nonlinearities}
    assert kinds == {("Relu", "elementwise"): 3, ("MaxPool", "max-like"): 1}
    assert [layer.made_by for layer in report.layers] == ["Conv+Relu", "Conv+Relu", "Gemm+Relu"]
    for layer in report.layers:
        onnx_attrib.compile(MODELS / "mnist_cnn.onnx", inputs=layer.name)


@pytest.mark.parametrize(
    ("nodes", "operator", "before"),
    [
        ("y = Softmax <axis = 1> (z)", "Softmax", "z"),
        ("y = LogSoftmax <axis = 1> (z)", "LogSoftmax", "z"),
        ("y = Sigmoid (z)", "Sigmoid", "z"),
        ("s = Softmax <axis = 1> (z)  y = Identity (s)", "Softmax", "z"),
        ("e = Exp (z)  s = ReduceSum <keepdims = 1> (e, axes)  y = Div (e, s)", "Softmax", "z"),
        (
            "m = ReduceMax <axes = [1]> (z)  d = Sub (z, m)  e = Exp (d) "
            "s = ReduceSum <keepdims = 1> (e, axes)  y = Div (e, s)",
            "Softmax",
            "z",
        ),
        ("y = Relu (z)", None, None),
        ("s = Softmax <axis = 1> (z)  y = Mul (s, s)", None, None),
    ],
)
def test_behind_softmax(nodes: str, operator: str | None, before: str | None) -> None:
    body = (
        f"g (float[N, 3] x) => (float[N, 3] y) <int64[1] axes = {{1}}> {{ z = Mul (x, x) {nodes} }}"
    )
    graph = normalize(parsed(body))
    squashed = behind_softmax(graph.outputs[0])
    if operator is None:
        assert squashed is None
    else:
        assert squashed is not None
        assert (squashed.operator, squashed.before) == (operator, before)
        assert f"--output {before}" in str(squashed)


def test_clusters_count_once() -> None:
    report = found(
        "g (float[N, 3] x) => (float[N, 3] y) <float[3, 3] w> "
        "{ z = MatMul (x, w) s = Sigmoid (z) h = Mul (z, s) y = MatMul (h, w) }".replace(
            "w>", "w = {1, 0, 0, 0, 1, 0, 0, 0, 1}>"
        )
    )
    assert [(n.operator, n.rule) for n in report.nonlinearities] == [("Sigmoid+Mul", "cluster")]
    assert [(layer.name, layer.made_by) for layer in report.layers] == [("h", "MatMul+activation")]


def test_products_are_nonlinear_only_in_variables() -> None:
    report = found("g (float[N, 3] a, float[N, 3] b) => (float[N, 3] y) { y = Mul (a, b) }")
    assert [(n.operator, n.rule) for n in report.nonlinearities] == [("Mul", "bilinear")]
    report = found("g (float[N, 3] a) => (float[N, 3] y) <float[1] c = {2}> { y = Mul (a, c) }")
    assert report.nonlinearities == []


def test_embeddings() -> None:
    report = found(
        "g (int64[N, 4] ids) => (float[N, 2] y) <float[3, 2] table = {1, 2, 3, 4, 5, 6}, "
        "int64[1] axes = {1}> "
        "{ e = Gather (table, ids) y = ReduceSum <keepdims = 0> (e, axes) }"
    )
    assert report.attributed == ["e"]
    assert [(layer.name, layer.made_by) for layer in report.layers] == [("e", "embedding")]
    assert report.compilable


def test_unsupported_on_and_off_the_path() -> None:
    model = parsed(
        "g (float[N, 2] x) => (float[N, 2] y, float[N, 2] z) { y = Relu (x) z = Relu (x) }"
    )
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    model.graph.node.append(helper.make_node("Odd", ["x"], ["odd"], name="odd", domain="my.ops"))
    model.graph.output.append(helper.make_tensor_value_info("odd", TensorProto.FLOAT, ["N", 2]))
    report = inspect(model)
    assert report.compilable
    assert [o.node for o in report.unused_unsupported] == ["odd"]
    report = inspect(model, output="odd")
    assert not report.compilable
    assert [(o.op, o.domain, o.node) for o in report.unsupported] == [("Odd", "my.ops", "odd")]


def test_problems_are_findings() -> None:
    report = found("g (float[N, 2] x) => (float[N, 2] y) { y = Floor (x) }")
    assert not report.compilable
    assert report.problem is not None
    assert "no derivative" in report.problem
    report = found("g (float[N, 2] x) => (int64[N, 2] y) { y = Cast <to = 7> (x) }")
    assert not report.compilable
    assert "no float output" in str(report.problem)


def test_compiled() -> None:
    model = onnx_attrib.compile(MODELS / "mnist_mlp.onnx", method="saliency", target=2)
    report = inspect(model)
    assert report.compiled is not None
    assert report.compiled.method == "saliency"
    assert report.compiled.target == 2
    assert not report.compilable
    assert json.loads(json.dumps(report.to_dict()))["compiled"]["target"] == 2


def test_types_and_shapes_of_the_interface() -> None:
    model = parsed("g (float16[N, ?] x) => (float16[N, ?] y) { y = Relu (x) }")
    (port,) = inspect(model).inputs
    assert port.dtype == "float16"
    assert port.shape == ("N", None)
