"""Every opset from 7 to 26, and the other ways in which files say the same thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import ModelError, OptionError

from . import numeric
from .numeric import Array

OPSETS = range(7, 27)
# The IR version that came with each opset.
IR_VERSIONS = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8}


def ir_version(opset: int) -> int:
    """An IR version that belongs to the opset and that ONNX Runtime 1.31 loads."""
    return IR_VERSIONS.get(opset, 9 if opset < 21 else 10)


def weights_as_inputs(model: ModelProto) -> None:
    """List the initializers among the inputs, as IR 3 requires and later ones allow."""
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )


# -- one network, written for each opset -----------------------------------------------------------


class Writer:
    """Nodes as the opset wants them: what became an input later is an attribute before."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Array] = {}

    def add(self, op: str, inputs: Sequence[str], output: str | list[str], **attrs: Any) -> str:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}/{outputs[0]}", **attrs))
        return outputs[0]

    def weight(self, name: str, value: Any, dtype: type = np.float32) -> str:
        self.weights[name] = np.asarray(value, dtype)
        return name

    def settings(
        self,
        since: int,
        op: str,
        inputs: Sequence[str],
        output: str | list[str],
        attributes: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> str:
        """A node whose ``values`` are inputs from opset ``since`` on and attributes before."""
        fixed = attributes or {}
        if self.opset < since:
            return self.add(op, inputs, output, **values, **fixed)
        label = output if isinstance(output, str) else output[0]
        extra = [
            self.weight(
                f"{label}/{key}", value, np.int64 if isinstance(value, list) else np.float32
            )
            for key, value in values.items()
        ]
        return self.add(op, [*inputs, *extra], output, **fixed)

    def model(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]]
    ) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in inputs.items()
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in outputs.items()
            ],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = ir_version(self.opset)
        if model.ir_version < 4:
            weights_as_inputs(model)
        onnx.checker.check_model(model)
        return model


@cache
def parameters() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {
        "conv": rng.normal(0, 0.4, (6, 2, 3, 3)),
        "conv_b": rng.normal(0, 0.2, 6),
        "scale": rng.uniform(0.5, 1.5, 6),
        "shift": rng.normal(0, 0.2, 6),
        "mean": rng.normal(0, 0.2, 6),
        "var": rng.uniform(0.5, 1.5, 6),
        "dense": rng.normal(0, 0.4, (12, 8)),
        "dense_b": rng.normal(0, 0.2, 8),
        "head": rng.normal(0, 0.6, (8, 4)),
        "head_b": rng.normal(0, 0.2, 4),
    }


def network(opset: int) -> ModelProto:
    """A convolution, BatchNormalization, ReLU6, pools, dense layers and a Softmax."""
    w = Writer(opset)
    for name, value in parameters().items():
        w.weight(name, value)
    x = w.settings(11, "Pad", ["x"], "padded", pads=[0, 0, 1, 1, 0, 0, 1, 1])
    x = w.add("Conv", [x, "conv", "conv_b"], "conv_y", kernel_shape=[3, 3])
    x = w.add("BatchNormalization", [x, "scale", "shift", "mean", "var"], "bn_y", epsilon=1e-4)
    x = w.settings(11, "Clip", [x], "relu6", min=0.0, max=6.0)
    x = w.add("MaxPool", [x], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    if opset < 12:
        x = w.add("Dropout", [x], "dropped", ratio=0.5)
    else:
        x = w.add("Dropout", [x, w.weight("ratio", 0.5)], "dropped")
    gap = w.add("GlobalAveragePool", [x], "gap")
    gap = w.settings(13, "Squeeze", [gap], "gap_flat", axes=[2, 3])
    flat = {"keepdims": 0}
    rows = w.settings(18, "ReduceMean", [x], "rows", attributes=flat, axes=[3])
    columns = w.settings(13, "ReduceSum", [rows], "columns", attributes=flat, axes=[2])
    x = w.add("Concat", [gap, columns], "features", axis=1)
    x = w.add("Gemm", [x, "dense", "dense_b"], "dense_y")
    w.settings(13, "Split", [x], ["left", "right"], attributes={"axis": 1}, split=[4, 4])
    if opset < 10:
        w.add("Slice", ["left"], "first", axes=[1], starts=[0], ends=[2])
    else:
        names = [
            w.weight(f"first/{key}", value, np.int64)
            for key, value in (("starts", [0]), ("ends", [2]), ("axes", [1]))
        ]
        w.add("Slice", ["left", *names], "first")
    w.add("Concat", ["first", "left", "right"], "joined", axis=1)
    w.settings(13, "Unsqueeze", ["joined"], "lifted", axes=[2])
    w.weight("flat", [-1, 10], np.int64)
    x = w.add("Reshape", ["lifted", "flat"], "flattened")
    w.weight("mix", np.random.default_rng(8).normal(0, 0.5, (10, 8)))
    x = w.add("MatMul", [x, "mix"], "mixed")
    x = w.add("Tanh", [x], "tanh")
    x = w.add("Gemm", [x, "head", "head_b"], "logits")
    w.add("Softmax", [x], "y", axis=1)
    return w.model({"x": ["N", 2, 8, 8]}, {"y": ["N", 4], "logits": ["N", 4]})


def feeds(size: int = 3) -> dict[str, Array]:
    return {"x": np.random.default_rng(0).normal(0, 1, (size, 2, 8, 8)).astype(np.float32)}


def explained(model: Any, method: str = "gradient", **options: Any) -> dict[str, Array]:
    """All outputs of the compiled model, for the first class."""
    compiled = onnx_attrib.compile(model, method=method, target=1, **options)
    numeric.check_graph(compiled)
    return numeric.run(compiled, feeds())


@cache
def expected() -> dict[str, Array]:
    return explained(network(21))


def close(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_network_has_a_gradient_by_differences() -> None:
    residuals = numeric.check_gradient(network(21), feeds(), inputs=["x"], output="y")
    assert all(r.applies and r.precision == "float64" for r in residuals)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int) -> None:
    close(explained(network(opset)), expected())


@pytest.mark.parametrize("opset", [7, 12, 17, 26])
def test_deeplift_sums_at_every_opset(opset: int) -> None:
    x = feeds()
    baseline = {"x": np.random.default_rng(1).normal(0, 1, x["x"].shape).astype(np.float32)}
    numeric.check_conservation(network(opset), (x, baseline), inputs=["x"], output="logits")


@pytest.mark.parametrize("opset", [1, 6, 27, 28])
def test_other_opsets_are_refused(opset: int) -> None:
    model = network(21)
    model.opset_import[0].version = opset
    with pytest.raises(ModelError, match=f"opset {opset}; 7 to 26 are supported") as caught:
        onnx_attrib.compile(model)
    assert "\n" not in str(caught.value)


# -- other ways to write the same network ----------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 8, 9, 13])
def test_weights_as_inputs(opset: int) -> None:
    model = network(opset)
    if len(model.graph.input) == 1:
        weights_as_inputs(model)
    onnx.checker.check_model(model)
    compiled = onnx_attrib.compile(model, method="gradient", target=1)
    assert [info.name for info in compiled.graph.input] == ["x"]
    close(numeric.run(compiled, feeds()), expected())


@pytest.mark.parametrize("opset", [7, 12, 21, 26])
def test_weights_as_constant_nodes(opset: int) -> None:
    model = network(opset)
    constants = [
        helper.make_node("Constant", [], [t.name], name=f"constant/{t.name}", value=t)
        for t in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    del model.graph.input[1:]
    del model.graph.initializer[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    close(explained(model), expected())


FUNCTIONS = """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    functions (float[N, 3] x) => (float[N, 2] y)
    <float[3, 2] w = {0.5, -1, 2, 0.25, -0.75, 1}, float[2] b = {0.1, -0.2}>
    {
        h = local.Dense <slope = 0.3> (x, w, b)
        g = local.Leaky <slope = 0.1> (h)
        y = local.Leaky <slope: float = 0.2> (g)
    }
    <domain: "local", opset_import: ["": 21, "local": 1]>
    Dense <slope> (a, w, b) => (out)
    {
        z = MatMul(a, w)
        s = Add(z, b)
        out = local.Leaky <slope: float = @slope> (s)
    }
    <domain: "local", opset_import: ["": 21]>
    Leaky <slope> (a) => (out)
    {
        out = LeakyRelu <alpha: float = @slope> (a)
    }
"""


def test_local_functions() -> None:
    """Nested functions with attributes give the gradient of what they spell out."""
    model = parser.parse_model(FUNCTIONS)
    onnx.checker.check_model(model)
    x = np.random.default_rng(2).normal(0, 1, (5, 3)).astype(np.float32)
    residuals = numeric.check_gradient(model, {"x": x})
    assert any(r.applies for r in residuals)
    baseline = {"x": np.flip(x, 0).copy()}
    numeric.check_conservation(model, ({"x": x}, baseline))


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    onnx.save_model(
        network(17), str(path), save_as_external_data=True, location="weights", size_threshold=0
    )
    assert (tmp_path / "weights").stat().st_size > 500
    close(explained(path), expected())
    close(explained(str(path)), expected())
    (tmp_path / "weights").unlink()
    with pytest.raises(ModelError, match="external data"):
        onnx_attrib.compile(path)


def test_unsorted_nodes_are_refused_in_one_line() -> None:
    model = network(21)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(ModelError, match="topologically sorted") as caught:
        onnx_attrib.compile(model)
    assert "\n" not in str(caught.value)


def test_a_stale_batch_of_value_infos() -> None:
    """A batch axis made dynamic by hand leaves old numbers in value_info; they are not believed."""
    model = network(21)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 1
    model = onnx.shape_inference.infer_shapes(model)
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    close(explained(model), expected())


def test_documentation_is_kept() -> None:
    model = network(21)
    model.producer_name, model.producer_version = "someone", "3.1"
    model.domain, model.model_version, model.doc_string = "org.example", 7, "the model"
    model.metadata_props.add(key="author", value="a person")
    model.graph.doc_string = "the graph"
    model.graph.metadata_props.add(key="graph", value="its own")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.doc_string = "the convolution"
    conv.metadata_props.add(key="layer", value="1")
    source = ModelProto()
    source.CopyFrom(model)
    compiled = onnx_attrib.compile(model, method="gradient", target=1)
    assert model == source, "the source was changed"
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(compiled, name) == getattr(model, name), name
    properties = {prop.key: prop.value for prop in compiled.metadata_props}
    assert properties["author"] == "a person"
    assert properties["onnx_attrib.method"] == "gradient"
    assert compiled.graph.doc_string == "the graph"
    assert compiled.graph.name == model.graph.name
    assert [(p.key, p.value) for p in compiled.graph.metadata_props] == [("graph", "its own")]
    kept = next(node for node in compiled.graph.node if node.name == conv.name)
    assert kept.doc_string == "the convolution"
    assert [(p.key, p.value) for p in kept.metadata_props] == [("layer", "1")]
    infos = {info.name: info for info in compiled.graph.input}
    assert infos["x"].type == model.graph.input[0].type


# -- names -----------------------------------------------------------------------------------------


def renamed(model: ModelProto, names: Mapping[str, str]) -> ModelProto:
    """The model with inner tensors renamed."""
    result = ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    for tensor in result.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return result


TAKEN = {
    "conv_y": "attrib/Mul",
    "bn_y": "attrib/Where",
    "relu6": "attrib/constant",
    "pooled": "attrib/Conv_1",
    "dropped": "attrib/ConvTranspose",
    "gap": "attrib/constant_1",
    "conv_b": "attrib/constant_2",
    "dense_y": "convergence_delta",
}


@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated-gradients"])
def test_names_that_the_compiler_would_choose(method: str) -> None:
    model = renamed(network(21), TAKEN)
    for node in model.graph.node:
        node.name = f"{TAKEN.get(node.output[0], node.output[0])}.node"
    close(explained(model, method), explained(network(21), method))


@pytest.mark.parametrize(
    ("name", "options", "escape"),
    [
        ("target", {}, {"target": 1}),
        ("seed", {"target": "seed"}, {"target": 1}),
        ("x_attribution", {}, None),
        ("x_baseline", {"baseline": "input"}, {"target": 1}),
        ("convergence_delta", {"delta": True}, {"target": 1}),
    ],
)
def test_names_of_the_contract(
    name: str, options: dict[str, Any], escape: dict[str, Any] | None
) -> None:
    """A tensor of the model that has a name of the contract: refused only if it is in the way."""
    model = renamed(network(21), {"tanh": name})
    with pytest.raises(OptionError, match=f"already has a tensor named '{name}'") as caught:
        onnx_attrib.compile(model, method="deeplift", **options)
    assert "\n" not in str(caught.value)
    if escape is not None:
        compiled = onnx_attrib.compile(model, method="deeplift", **escape)
        close(numeric.run(compiled, feeds()), explained(network(21), "deeplift"))


# -- size ------------------------------------------------------------------------------------------


def chain(length: int) -> ModelProto:
    """``length`` nodes in a row: x ← LeakyRelu(a · x + b)."""
    nodes, last = [], "x"
    kinds: list[Callable[[str, str], NodeProto]] = [
        lambda a, b: helper.make_node("Mul", [a, "slope"], [b]),
        lambda a, b: helper.make_node("Add", [a, "shift"], [b]),
        lambda a, b: helper.make_node("LeakyRelu", [a], [b], alpha=0.9995),
    ]
    for i in range(length):
        output = "y" if i == length - 1 else f"t{i}"
        nodes.append(kinds[i % 3](last, output))
        last = output
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [
            numpy_helper.from_array(np.array([0.9999], np.float32), "slope"),
            numpy_helper.from_array(np.array([1e-5], np.float32), "shift"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return model


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_ten_thousand_nodes(method: str) -> None:
    model = chain(10_000)
    start = time.perf_counter()
    compiled = onnx_attrib.compile(model, method=method)
    seconds = time.perf_counter() - start
    assert seconds < 60, f"{seconds:.0f} s"
    x = np.array([[1.0], [-2.0]], np.float32)
    # ONNX Runtime takes a minute to load a chain of this length; the reference evaluator does not.
    names = [info.name for info in compiled.graph.output]
    results = dict(zip(names, ReferenceEvaluator(compiled).run(None, {"x": x}), strict=True))
    evaluate = ReferenceEvaluator(model)
    y, zero = (evaluate.run(None, {"x": point})[0] for point in (x, 0 * x))
    np.testing.assert_allclose(results["y"], y, rtol=1e-5)
    if method == "deeplift":
        np.testing.assert_allclose(results["x_attribution"], y - zero, rtol=1e-3)
    else:
        assert (results["x_attribution"] > 0.01).all()
