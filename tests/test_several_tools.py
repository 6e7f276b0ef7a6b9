"""The command line and ``verify`` on several methods and targets, reduced and normalized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib import Explainer, OptionError
from onnx_attrib.verify import Verification, verify

from .command import CNN, DIGIT, call, fails, succeeds
from .test_several import METHODS, RNG, images, network

# -- verify ----------------------------------------------------------------------------------------


def statuses(found: Verification) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def multiplied(model: ModelProto, name: str, factor: np.ndarray) -> None:
    """Multiply an output."""
    for node in model.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "before"
    model.graph.initializer.append(numpy_helper.from_array(factor.astype(np.float32), "factor"))
    model.graph.node.append(helper.make_node("Mul", ["before", "factor"], [name]))


@pytest.mark.parametrize("options", [{}, {"targets": "top2"}, {"targets": [1, -1]}])
@pytest.mark.parametrize("reduce", [None, {"channels": "sum"}, {1: "sum", "last": "sum"}])
def test_verify(options: dict[str, Any], reduce: Any) -> None:
    methods = [*METHODS, "gradient-x-input"]
    model = onnx_attrib.compile(network(), methods, delta=True, reduce=reduce, **options)
    found = verify(model, source=network(), samples=2)
    assert found.ok, found
    count = 1 if not options else 2
    names = [check.name for check in found.checks]
    for title in ("sum = S(x) − S(x̄) (deeplift", "path sum (integrated", "convergence_delta (deep"):
        assert sum(name.startswith(title) for name in names) == count
    for method in ("gradient", "gradient-x-input"):
        checks = [c for c in found.checks if c.name.startswith(f"differences of 'x' ({method}")]
        exact = [c for c in checks if c.name[len(f"differences of 'x' ({method}")] in ",)"]
        assert len(exact) == count
        assert all(c.status == "ok" and (c.residual or 0) < 1e-3 for c in exact)
    skipped = {name for name, status in statuses(found).items() if status == "skipped"}
    assert all("saliency" in name for name in skipped)
    assert bool(skipped) == bool(reduce)


DAMAGE: list[tuple[str, str, dict[str, Any]]] = [
    ("deeplift", "sum = S(x) − S(x̄) (deeplift, top 2)", {}),
    ("gradient", "differences of 'x' (gradient, top 2)", {}),
    ("saliency", "differences of 'x' (saliency, top 2)", {}),
    ("deeplift", "sum = S(x) − S(x̄) (deeplift, top 2)", {"reduce": "channels=sum"}),
    ("gradient", "differences of 'x' (gradient, top 2)", {"reduce": "last=sum"}),
    ("gradient", "scale of 'x' (gradient, top 2)", {"normalize": True}),
]


@pytest.mark.parametrize(("method", "name", "options"), DAMAGE)
def test_damage_to_one_target_of_one_method_is_found(
    method: str, name: str, options: dict[str, Any]
) -> None:
    model = onnx_attrib.compile(network(), METHODS[:3], targets="top3", **options)
    multiplied(model, f"x_attribution_{method}", np.array([1, 1.03, 1]).reshape(3, 1, 1, 1))
    off = [name for name, status in statuses(verify(model)).items() if status == "OFF"]
    assert off == [name]


def test_targets_in_another_order_are_found() -> None:
    model = onnx_attrib.compile(network(), "deeplift", targets="top2")
    for node in model.graph.node:
        if node.output[0] == "x_attribution":
            node.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0]), "order"))
    model.graph.node.append(
        helper.make_node("Gather", ["before", "order"], ["x_attribution"], axis=1)
    )
    assert list(statuses(verify(model)).values()).count("OFF") == 2


@pytest.mark.parametrize("options", [{"reduce": "channels=l2"}, {"normalize": True}])
def test_what_cannot_be_checked_is_named(options: dict[str, Any]) -> None:
    model = onnx_attrib.compile(network(), "deeplift", delta=True, **options)
    found = verify(model)
    assert found.ok
    (check,) = [c for c in found.checks if c.name == "attributions"]
    assert check.status == "skipped"
    assert ("reduced by l2" in check.detail) == ("reduce" in options)
    assert ("normalized" in check.detail) == ("normalize" in options)
    assert statuses(found)["convergence_delta"] == "ok"
    multiplied(model, "convergence_delta", np.array([1e6]))
    assert statuses(verify(model))["convergence_delta"] == "OFF"


def test_verify_compiles_for_several() -> None:
    found = verify(network(), ["gradient", "deeplift"], targets=[0, 2], product="gradient")
    assert found.ok
    assert found.method == "gradient,deeplift"
    compiled = onnx_attrib.compile(network(), ["gradient", "deeplift"])
    assert verify(compiled, ["deeplift", "gradient"], samples=1).ok
    for wrong in ("gradient", ["gradient", "saliency"]):
        with pytest.raises(OptionError, match="compiled for 'gradient,deeplift'"):
            verify(compiled, wrong)
    with pytest.raises(OptionError, match="fixed when the model was compiled"):
        verify(compiled, targets="top2")
    with pytest.raises(OptionError, match="takes no target"):
        verify(onnx_attrib.compile(network(), targets="top2"), target=1)


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def network_file(elsewhere: Path) -> Path:
    onnx.save(network(), elsewhere / "net.onnx")
    np.save(elsewhere / "x.npy", images(2))
    return elsewhere / "net.onnx"


SEVERAL = ["--method", "deeplift", "--method", "saliency", "--targets", "top2", "--delta"]


def test_compile_command(network_file: Path) -> None:
    text = succeeds("compile", network_file, *SEVERAL, "--reduce", "channels=sum", "--normalize")
    written = network_file.with_name("net.deeplift+saliency.onnx")
    assert text.startswith(f"{written}: ")
    for part in ("  method      saliency", "top 2", "channels reduced by sum, normalized"):
        assert part in text
    text = succeeds("inspect", written)
    for part in ("saliency", "top 2: the largest", "channels reduced by sum, normalized"):
        assert part in text
    compiled = json.loads(succeeds("inspect", written, "--json"))["compiled"]
    assert compiled["targets"] == 2
    assert compiled["reduce"] == {"channels": "sum"}
    arguments = ["--method", "saliency", "--targets", "1,-1", "--reduce", "2=l2", "--json"]
    report = json.loads(succeeds("compile", network_file, *arguments))
    assert (report["targets"], report["reduce"], report["normalize"]) == (
        [1, -1],
        {"2": "l2"},
        False,
    )
    assert report["outputs"][1]["shape"] == ["N", 2, 2, 1, 5]


def test_options_on_the_command_line(network_file: Path) -> None:
    methods = ["--method", "deeplift", "--method", "integrated_gradients"]
    options = ["deeplift.product=gradient", "integrated_gradients.steps=3", "chunk=2"]
    flags = [flag for option in options for flag in ("--option", option)]
    report = json.loads(succeeds("compile", network_file, *methods, *flags, "--json"))
    assert report["methods"]["deeplift"]["product"] == "gradient"
    assert report["methods"]["integrated-gradients"]["steps"] == 3
    assert report["methods"]["integrated-gradients"]["chunk"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "gradient", "--method", "gradient"], "named twice"),
        (["--method", "gradient", "--method", "deplift"], "did you mean 'deeplift'"),
        (["--option", "deplift.product=gradient"], "did you mean 'deeplift'"),
        (["--option", "deeplift.prodct=gradient"], "did you mean 'product'"),
        (["--method", "gradient", *SEVERAL[:2], "--option", "prodct=gradient"], "did you mean"),
        (["--option", "product=midpoint", "--option", "product=gradient"], "given twice"),
        (["--option", "product=x"], "choose from: midpoint, gradient"),
        (["--option", ".product=x"], "[METHOD.]KEY=VALUE"),
        (["--targets", "tp3"], "like top3"),
        (["--targets", "top0"], "like top3"),
        (["--targets", "top3", "--target", "input"], "not both"),
        (["--reduce", "channels"], "AXIS=HOW"),
        (["--reduce", "channels=sum", "--reduce", "channels=l2"], "reduced twice"),
        (["--reduce", "channels=su"], "did you mean 'sum'"),
    ],
)
def test_usage_errors(arguments: list[str], expected: str, network_file: Path) -> None:
    assert expected in fails("compile", network_file, *arguments, code=2)
    assert not list(network_file.parent.glob("net.*.onnx"))


def test_run_command(network_file: Path) -> None:
    succeeds("compile", network_file, *SEVERAL, "-o", "both.onnx")
    text = succeeds("run", "both.onnx", "--input", "x.npy", "-o", "out.npz", "--plot", "out.png")
    assert text.count("explained") == 4
    assert text.count("Σ x (deeplift)") == text.count("Σ x (saliency)") == 4
    assert text.count("delta (deeplift)") == 4
    assert "delta (saliency)" not in text
    explained = Explainer("both.onnx")(images(2))
    with np.load("out.npz") as arrays:
        names = {"y", "targets", "convergence_delta_deeplift"}
        assert set(arrays) == names | {f"x_attribution_{m}" for m in ("deeplift", "saliency")}
        np.testing.assert_array_equal(
            arrays["x_attribution_saliency"], explained.by_method["saliency"]["x"]
        )
        np.testing.assert_array_equal(arrays["targets"], explained.target)
    report = json.loads(succeeds("run", "both.onnx", "--input", "x.npy", "--json"))
    assert list(report["methods"]) == ["deeplift", "saliency"]
    assert report["targets"] == 2
    assert explained.target is not None
    for i, sample in enumerate(report["samples"]):
        assert [entry["class"] for entry in sample["targets"]] == explained.target[i].tolist()
        assert len(sample["score"]) == 2
        for method, attributions in explained.by_method.items():
            sums = attributions["x"][i].sum(axis=(1, 2, 3))
            np.testing.assert_allclose(sample["attribution_sum"][method]["x"], sums, rtol=1e-4)
        assert list(sample["convergence_delta"]) == ["deeplift"]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "deeplift", "--method", "saliency"],
        ["--targets", "top3"],
        [*SEVERAL, "--normalize"],
        [*SEVERAL, "--reduce", "last=abs-max"],
    ],
)
def test_plots(options: list[str], elsewhere: Path) -> None:
    succeeds("compile", CNN, *options, "-o", "m.onnx")
    result = call("run", "m.onnx", "--input", DIGIT, "--plot", "m.png")
    assert result.exit_code == 0, result.output
    assert (elsewhere / "m.png").stat().st_size > 10_000


@pytest.mark.parametrize("shape", [(4, 50), (6,)])
def test_plots_of_signals_and_features(shape: tuple[int, ...], elsewhere: Path) -> None:
    size = int(np.prod(shape))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(RNG.normal(size=(size, 3)).astype(np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), "linear.onnx")
    np.save("x.npy", RNG.normal(size=(1, *shape)))
    succeeds("compile", "linear.onnx", *SEVERAL, "--reduce", "last=sum", "-o", "m.onnx")
    succeeds("run", "m.onnx", "--input", "x.npy", "--plot", "p.png")
    assert (elsewhere / "p.png").stat().st_size > 10_000


def test_verify_command(network_file: Path) -> None:
    succeeds("compile", network_file, *SEVERAL, "-o", "both.onnx")
    text = succeeds("verify", "both.onnx", "--source", network_file, "--samples", "1")
    assert "sum = S(x) − S(x̄) (deeplift, top 2)" in text
    assert "Nothing is off\n" in text
    arguments = [network_file, *SEVERAL[:-1], "--option", "deeplift.product=gradient", "--json"]
    found = json.loads(succeeds("verify", *arguments))
    assert found["method"] == "deeplift,saliency"
    assert found["options"]["deeplift"]["product"] == "gradient"
    succeeds("compile", network_file, "--normalize", "-o", "one.onnx")
    text = succeeds("verify", "one.onnx", "--source", network_file, "--method", "deeplift")
    assert "Nothing is off, 1 not checked" in text
    message = fails("verify", "one.onnx", "--option", "product=gradient")
    assert "fixed when the model was compiled" in message
