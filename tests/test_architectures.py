"""Gradient, DeepLIFT and integrated gradients on whole architectures, as torch exports them.

The networks and their random weights are in zoo. The reference for the gradient family is torch
autograd on the module that was exported. The reference for DeepLIFT is its axiom: attributions sum
to the difference that the *source* model makes between the input and the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_attrib  # noqa: E402

from . import zoo  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray[Any, Any]
BATCH = 3
ALIGNED = ("resnet18", "resnet50", "vgg11", "vgg11_bn", "mobilenet", "inception")


def infer(model: onnx.ModelProto, feeds: dict[str, Array], optimize: bool = True) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def kinks(model: onnx.ModelProto, x: Array) -> list[Tensor]:
    """What ORT computes before each ReLU, ReLU6 and max-pool of `model`, in order."""
    names = [node.input[0] for node in model.graph.node if node.op_type in zoo.KINK_OPS]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            tapped.graph.output.append(info)
    values = infer(tapped, {"x": x}, optimize=False)
    return [torch.from_numpy(values[name]) for name in names]


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def check(compiled: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> None:
    """A valid file of standard operators, with the interface that was asked for."""
    onnx.checker.check_model(compiled, full_check=True)
    assert {node.domain for node in nodes(compiled.graph)} <= {"", "ai.onnx"}
    assert not compiled.functions
    assert [value.name for value in compiled.graph.input] == inputs
    assert [value.name for value in compiled.graph.output] == outputs


def pick(array: Array, target: Array) -> Array:
    """array[i, *target[i]] in float64; `target` is [N] or [N, rank - 1]."""
    index = target[:, None] if target.ndim == 1 else target
    rows = np.arange(len(target)) if len(array) > 1 else np.zeros(len(target), int)
    return cast(Array, array[(rows, *index.T)].astype(np.float64))


def targets(scores: Array) -> Array:
    """A different entry of the output for each sample, the largest in `scores` not yet taken."""
    flat, taken = scores.reshape(len(scores), -1), []
    for row in flat:
        taken.append(next(int(i) for i in np.argsort(-row) if int(i) not in taken))
    index = np.stack(np.unravel_index(taken, scores.shape[1:]), 1).astype(np.int64)
    return index[:, 0] if index.shape[1] == 1 else index


def close(actual: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Every entry within `tolerance` of the largest entry of its sample."""
    assert actual.shape == expected.shape
    axes = tuple(range(1, expected.ndim))
    largest = np.abs(expected).max(axes)
    assert (largest > 0).all()
    error = np.abs(actual.astype(np.float64) - expected).max(axes) / largest
    assert (error <= tolerance).all(), f"error of each sample: {error}"


@dataclass
class Case:
    name: str
    module: nn.Module
    model: onnx.ModelProto
    x: Array
    y: Array

    @classmethod
    def make(cls, name: str, exporter: zoo.Exporter, opset: int | None = None) -> Case:
        torch.set_num_threads(1)
        module = zoo.build(name)
        x = zoo.sample(name, BATCH, seed=5)
        model = zoo.export(module, x, exporter, opset=opset)
        y = infer(model, {"x": x.numpy()})["y"]
        with torch.no_grad():
            close(y, module(x).numpy())
        return cls(name, module, model, x.numpy(), y)

    def gradient(self, x: Array, target: Array, aligned: bool = False) -> Array:
        index = torch.from_numpy(target.reshape(len(target), -1))
        values = kinks(self.model, x) if aligned else None
        grad = zoo.gradient(self.module, torch.from_numpy(x), index, values)
        return cast(Array, grad.numpy())


def param(name: str, *rest: object) -> Any:
    marks = [pytest.mark.slow] if zoo.ZOO[name].slow else []
    return pytest.param((name, *rest), marks=marks, id="-".join(map(str, (name, *rest))))


@pytest.fixture(scope="module", params=[param(n, e) for n in zoo.ZOO for e in zoo.EXPORTERS])
def case(request: pytest.FixtureRequest) -> Case:
    return Case.make(*request.param)


def check_gradient(case: Case) -> None:
    compiled = onnx_attrib.compile(case.model, method="gradient", target="input")
    check(compiled, ["x", "target"], ["y", "x_attribution"])
    x, y = case.x[:2], case.y[:2]
    target = targets(np.abs(y))
    feeds = {"x": x, "target": target}
    result = infer(compiled, feeds)
    close(result["y"], y)
    if case.name not in ALIGNED:
        close(result["x_attribution"], case.gradient(x, target))
        return
    # With graph optimisation off, ORT rounds the forward pass of both graphs alike.
    exact = infer(compiled, feeds, optimize=False)["x_attribution"]
    close(exact, case.gradient(x, target, aligned=True))
    # As it is really run, a unit in a million is on the other side of its kink.
    for actual, expected in zip(result["x_attribution"], exact, strict=True):
        cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
        assert cosine > 0.99


def check_deeplift(case: Case, references: int, **options: str) -> None:
    compiled = onnx_attrib.compile(
        case.model, method="deeplift", target="input", baseline="input", delta=True, **options
    )
    check(compiled, ["x", "target", "x_baseline"], ["y", "x_attribution", "convergence_delta"])
    baseline = zoo.baseline(case.name, references, seed=6).numpy()
    y_baseline = infer(case.model, {"x": baseline})["y"]
    target = targets(np.abs(case.y - y_baseline))
    score = pick(case.y, target)
    difference = score - pick(y_baseline, target)
    assert (np.abs(difference) > 0.2).all(), "the baseline explains nothing"

    result = infer(compiled, {"x": case.x, "target": target, "x_baseline": baseline})
    close(result["y"], case.y)
    attribution = result["x_attribution"]
    assert attribution.shape == case.x.shape
    total = attribution.reshape(BATCH, -1).sum(1, dtype=np.float64)
    tolerance = 1e-3 * np.maximum(np.abs(difference), 0.05 * np.abs(score))
    assert (np.abs(total - difference) <= tolerance).all(), f"{total} is not {difference}"
    delta = result["convergence_delta"]
    assert delta.shape == (BATCH,)
    assert (np.abs(delta) <= tolerance).all(), f"the graph reports a delta of {delta}"


def test_gradient_equals_autograd(case: Case) -> None:
    check_gradient(case)


@pytest.mark.parametrize("references", [1, BATCH], ids=["shared", "paired"])
def test_deeplift_sums_to_the_difference(case: Case, references: int) -> None:
    check_deeplift(case, references)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gated_product", {"product": "gradient"}),
        ("encoder", {"product": "gradient"}),
        ("dilated_pool", {"maxpool": "gradient"}),
        ("adjacent", {"maxpool": "gradient"}),
    ],
)
def test_the_sum_depends_on_the_rule(name: str, options: dict[str, str]) -> None:
    """The check above notices a product or a pool that does not conserve."""
    case = Case.make(name, "dynamo")
    check_deeplift(case, BATCH)
    with pytest.raises(AssertionError, match="is not"):
        check_deeplift(case, BATCH, **options)


# Older opsets spell the same networks differently: LayerNorm and GELU in primitive operators,
# axes and split sizes as attributes, hard-swish as HardSigmoid and Mul.
OLDER = [
    ("mlp", 9),
    ("group_norms", 9),
    ("adjacent", 11),
    ("gated_product", 11),
    ("dilated_pool", 13),
    ("encoder", 13),
    ("encoder", 17),
    ("vit", 16),
    ("vit", 17),
]


@pytest.mark.parametrize("spec", [param(*spec) for spec in OLDER])
def test_older_opsets(spec: tuple[str, int]) -> None:
    name, opset = spec
    case = Case.make(name, "legacy", opset)
    assert case.model.opset_import[0].version == opset
    check_gradient(case)
    check_deeplift(case, BATCH)


@pytest.mark.parametrize("name", ["mlp", "squeeze_excite", "segmenter"])
def test_predicted_class(name: str) -> None:
    """A negative class means the predicted one, in one batch with explicit ones."""
    case = Case.make(name, "dynamo")
    target = targets(-case.y)
    compiled = onnx_attrib.compile(case.model, method="gradient")
    asked = target.copy()
    if target.ndim == 1:
        target[1] = case.y[1].argmax()
        asked[1] = -1
    else:
        target[1, 0] = case.y[(1, slice(None), *target[1, 1:])].argmax()
        asked[1, 0] = -1
    result = infer(compiled, {"x": case.x, "target": asked})
    close(result["x_attribution"], case.gradient(case.x, target))


def restated_integral(case: Case, target: Array, baseline: Array, steps: int) -> Array:
    """Integrated gradients by Gauss-Legendre quadrature, a gradient of torch at a time."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    mean = np.zeros(case.x.shape)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        x = (baseline + point * (case.x - baseline)).astype(np.float32)
        mean += weight * case.gradient(x, target)
    return cast(Array, mean * (case.x - baseline))


INTEGRATED = ["genomics", "squeeze_excite", "encoder", "vit"]


@pytest.mark.parametrize("spec", [param(n, e) for n in INTEGRATED for e in zoo.EXPORTERS])
@pytest.mark.parametrize("references", [1, BATCH], ids=["shared", "paired"])
def test_integrated_gradients(spec: tuple[str, zoo.Exporter], references: int) -> None:
    case = Case.make(*spec)
    steps = 7
    compiled = onnx_attrib.compile(
        case.model,
        method="integrated-gradients",
        target="input",
        baseline="input",
        steps=steps,
        quadrature="gauss-legendre",
    )
    check(compiled, ["x", "target", "x_baseline"], ["y", "x_attribution"])
    baseline = zoo.baseline(case.name, references, seed=6).numpy()
    target = targets(np.abs(case.y))
    result = infer(compiled, {"x": case.x, "target": target, "x_baseline": baseline})
    close(result["y"], case.y)
    close(result["x_attribution"], restated_integral(case, target, baseline, steps))


@pytest.fixture(scope="module")
def resnet50_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At the size of ImageNet: there, a folded reference pass would be 40 MB."""
    path = tmp_path_factory.mktemp("resnet50") / "resnet50.onnx"
    model = zoo.export(zoo.build("resnet50"), torch.zeros(2, 3, 224, 224), "dynamo")
    onnx.save(model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradient", {}),
        ("deeplift", {"baseline": "zeros"}),
        ("deeplift", {"baseline": "input", "delta": True}),
    ],
    ids=["gradient", "deeplift-zeros", "deeplift-input"],
)
def test_resnet50_compiles_fast_and_small(
    resnet50_file: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    times = []
    for _ in range(2):
        start = time.perf_counter()
        compiled = onnx_attrib.compile(resnet50_file, method=method, **options)
        times.append(time.perf_counter() - start)
    assert min(times) < 5
    out = tmp_path / "compiled.onnx"
    onnx.save(compiled, out)
    assert out.stat().st_size <= 1.1 * resnet50_file.stat().st_size
