"""Operators of ai.onnx.ml: against differences of ONNX Runtime's own results, and conservation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_attrib
from onnx_attrib import UnsupportedOpError

from .numeric import Array, check_conservation, check_gradient, run

RNG = np.random.default_rng(0)
COLUMNS, SUPPORTS = 4, 6
LABELS = {"classlabels_ints": [5, 7, 9]}
BOTH = {"classlabels_ints": [0, 1]}


def floats(*shape: int) -> list[float]:
    return [float(v) for v in RNG.standard_normal(shape).ravel().astype(np.float32)]


def vectors(classes: int, kind: str, *parameters: float, **rest: Any) -> dict[str, Any]:
    counts = [SUPPORTS // classes] * classes
    pairs = classes * (classes - 1) // 2
    return {
        "kernel_type": kind,
        "kernel_params": list(parameters or (0.0, 0.0, 0.0)),
        "vectors_per_class": counts,
        "support_vectors": floats(SUPPORTS, COLUMNS),
        "coefficients": floats(classes - 1, SUPPORTS),
        "rho": floats(pairs),
        "classlabels_ints": list(range(classes)),
        **rest,
    }


def regression(kind: str, *parameters: float) -> dict[str, Any]:
    return {
        "kernel_type": kind,
        "kernel_params": list(parameters or (0.0, 0.0, 0.0)),
        "n_supports": SUPPORTS,
        "support_vectors": floats(SUPPORTS, COLUMNS),
        "coefficients": floats(SUPPORTS),
        "rho": floats(1),
    }


LINEAR = {"coefficients": floats(3, COLUMNS), "intercepts": floats(3)}
SINGLE = {"coefficients": floats(1, COLUMNS), "intercepts": floats(1)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scaler": ("Scaler", {"offset": floats(4), "scale": floats(4)}),
    "scaler of one number": ("Scaler", {"offset": [0.5], "scale": [2.0]}),
    "normalizer max": ("Normalizer", {"norm": "MAX"}),
    "normalizer l1": ("Normalizer", {"norm": "L1"}),
    "normalizer l2": ("Normalizer", {"norm": "L2"}),
    "imputer": ("Imputer", {"imputed_value_floats": floats(4), "replaced_value_float": 7.0}),
    "imputer of one": ("Imputer", {"imputed_value_floats": [0.5], "replaced_value_float": 7.0}),
    "features": ("FeatureVectorizer", {"inputdimensions": [4, 2]}),
    "extractor": ("ArrayFeatureExtractor", {}),
    "regressor": ("LinearRegressor", {**LINEAR, "targets": 3}),
    "regressor one": ("LinearRegressor", {"coefficients": floats(4)}),
    "classifier": ("LinearClassifier", {**LINEAR, **LABELS}),
    "classifier softmax": ("LinearClassifier", {**LINEAR, **LABELS, "post_transform": "SOFTMAX"}),
    "classifier logistic": ("LinearClassifier", {**LINEAR, **LABELS, "post_transform": "LOGISTIC"}),
    "classifier of two": ("LinearClassifier", {**SINGLE, **BOTH, "post_transform": "LOGISTIC"}),
    "classifier of two, raw": ("LinearClassifier", {**SINGLE, **BOTH}),
    "svr linear": ("SVMRegressor", regression("LINEAR")),
    "svr rbf": ("SVMRegressor", regression("RBF", 0.4, 0, 0)),
    "svr poly": ("SVMRegressor", regression("POLY", 0.3, 0.7, 3)),
    "svr sigmoid": ("SVMRegressor", regression("SIGMOID", 0.3, 0.1, 0)),
    "svc linear": ("SVMClassifier", vectors(3, "LINEAR")),
    "svc rbf": ("SVMClassifier", vectors(3, "RBF", 0.4, 0, 0)),
    "svc poly": ("SVMClassifier", vectors(3, "POLY", 0.3, 0.7, 2)),
    "svc of two": ("SVMClassifier", vectors(2, "RBF", 0.4, 0, 0)),
    "svc of two, platt": (
        "SVMClassifier",
        vectors(2, "RBF", 0.4, 0, 0, prob_a=[-1.5], prob_b=[0.2]),
    ),
}


def model(name: str, dtype: int = TensorProto.FLOAT) -> ModelProto:
    """The operator between two small layers, so that its input and output both matter."""
    op, attributes = CASES[name]
    info = helper.make_tensor_value_info
    inputs, outputs, weights = ["x"], ["z"], []
    if op in ("LinearClassifier", "SVMClassifier"):
        outputs = ["label", "z"]
    if op == "ArrayFeatureExtractor":
        inputs.append("columns")
        weights.append(onnx.numpy_helper.from_array(np.array([2, 0, 2]), "columns"))
    if op == "FeatureVectorizer":
        inputs.append("u")
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, outputs, domain="ai.onnx.ml", **attributes),
            helper.make_node("Sin", ["z"], ["y"]),
        ],
        "ml",
        [info("x", dtype, ["N", COLUMNS])],
        [info("y", TensorProto.FLOAT, ["N", "K"])],
        weights,
    )
    if "u" in inputs:
        graph.input.append(info("u", dtype, ["N", 2]))
    if "label" in outputs:
        graph.output.append(info("label", TensorProto.INT64, ["N"]))
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def feeds(found: ModelProto, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    result = {}
    for info in found.graph.input:
        width = info.type.tensor_type.shape.dim[1].dim_value
        kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        result[info.name] = rng.standard_normal((3, width)).astype(kind)
    return result


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    found = model(name)
    x, baseline = feeds(found, 1), feeds(found, 2)
    assert check_gradient(found, x)
    check_conservation(found, (x, baseline))
    check_conservation(found, (x, {k: np.zeros_like(v) for k, v in x.items()}))


@pytest.mark.parametrize("name", ["scaler", "normalizer l2"])
def test_float64_inputs(name: str) -> None:
    found = model(name, TensorProto.DOUBLE)
    check_gradient(found, feeds(found, 1))


def test_missing_values_get_nothing() -> None:
    found = model("imputer")
    x = feeds(found, 1)
    x["x"][0, 1] = x["x"][2, 3] = 7
    compiled = onnx_attrib.compile(found, method="gradient", target=0)
    slope = run(compiled, x)["x_attribution"]
    assert (slope[:, 0] != 0).all()
    assert slope[2, 3] == slope[0, 1] == 0


def test_versions_of_other_domains_are_kept() -> None:
    compiled = onnx_attrib.compile(model("scaler"), method="gradient")
    versions = {o.domain: o.version for o in compiled.opset_import}
    assert versions == {"": 21, "ai.onnx.ml": 3}


def test_a_threshold_cuts_the_path() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Binarizer", ["x"], ["z"], domain="ai.onnx.ml", threshold=0.5),
            helper.make_node("Sin", ["z"], ["y"]),
        ],
        "ml",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    found = helper.make_model(graph, opset_imports=imports, ir_version=10)
    with pytest.raises(onnx_attrib.CompileError, match="Binarizer"):
        onnx_attrib.compile(found, method="gradient")


TREE = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_values": [0.5, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
    "target_treeids": [0, 0],
    "target_nodeids": [1, 2],
    "target_ids": [0, 0],
    "target_weights": [1.0, 2.0],
    "n_targets": 1,
}


def test_trees_are_refused_with_advice() -> None:
    op, graph = "TreeEnsembleRegressor", model("scaler").graph
    node = helper.make_node(op, ["x"], ["z"], domain="ai.onnx.ml", name="forest", **TREE)
    graph.node[0].CopyFrom(node)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    found = helper.make_model(graph, opset_imports=imports, ir_version=10)
    with pytest.raises(UnsupportedOpError, match="occlusion") as refused:
        onnx_attrib.compile(found, method="deeplift")
    (offence,) = refused.value.offences
    assert (offence.op, offence.domain, offence.node) == (op, "ai.onnx.ml", "forest")


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("svr rbf", {"one_class": 1}, "one_class"),
        ("svc rbf", {"prob_a": [1.0, 1.0, 1.0], "prob_b": [0.0, 0.0, 0.0]}, "iteration"),
        ("classifier", {"post_transform": "PROBIT"}, "PROBIT"),
    ],
)
def test_refusals(name: str, extra: dict[str, Any], message: str) -> None:
    found = model(name)
    node = found.graph.node[0]
    for key, value in extra.items():
        node.attribute.append(helper.make_attribute(key, value))
    with pytest.raises(UnsupportedOpError, match=message):
        onnx_attrib.compile(found, method="gradient")


def mapped() -> ModelProto:
    """A classifier whose probabilities leave as a map for each sample."""
    found = model("classifier softmax")
    graph = found.graph
    graph.node[1].CopyFrom(
        helper.make_node("ZipMap", ["z"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[5, 7, 9])
    )
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kind = helper.make_map_type_proto(TensorProto.INT64, floats)
    info = helper.make_value_info("y", helper.make_sequence_type_proto(kind))
    graph.output[0].CopyFrom(info)
    return found


def test_a_map_is_not_explained_but_kept() -> None:
    with pytest.raises(onnx_attrib.CompileError, match="name an inner tensor: 'z'"):
        onnx_attrib.compile(mapped(), method="gradient")
    compiled = onnx_attrib.compile(mapped(), method="gradient", output="z", target=0)
    x = feeds(compiled, 1)
    results, expected = run(compiled, x), run(mapped(), x)
    assert results["y"] == expected["y"]
    assert results["x_attribution"].any()
