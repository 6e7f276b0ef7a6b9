"""Occlusion and Shapley values against Captum, PyTorch networks and scikit-learn's trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import CompileError

from .perturbation_reference import (
    Array,
    occluded,
    scored,
    session,
    windows,
)
from .test_contract import close, run


def exported(network: Any, shape: Sequence[int]) -> ModelProto:
    """A PyTorch network as ONNX, with an open batch."""
    import io

    import torch

    file = io.BytesIO()
    torch.onnx.export(
        network,
        (torch.zeros(2, *shape),),
        file,
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
    )
    return onnx.load_model_from_string(file.getvalue())


def random_network(case: int) -> tuple[Any, tuple[int, ...]]:
    """A dense network, or a convolutional one with normalisation, overlapping pools, a residual."""
    import torch
    from torch import nn

    torch.manual_seed(case)
    kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU]
    act = kinds[case % len(kinds)]
    if case % 3 == 0:
        return nn.Sequential(nn.Linear(9, 8), act(), nn.Linear(8, 6), act(), nn.Linear(6, 4)), (9,)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
            self.act = act()
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: Any) -> Any:
            return x + self.act(self.norm(self.conv(x)))

    sizes = (2 + case % 2, 7 + case % 3, 8)
    return (
        nn.Sequential(
            nn.Conv2d(sizes[0], 5, 3),
            act(),
            Block(5),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.LazyLinear(4),
        ),
        sizes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", range(12))
def test_captum_parity(case: int) -> None:
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    torch.set_num_threads(1)
    network, shape = random_network(case)
    network.eval()(torch.zeros(2, *shape))
    rng = np.random.default_rng(case)
    window = tuple(int(rng.integers(1, size + 1)) for size in shape)
    stride = tuple(int(rng.integers(1, w + 1)) for w in window)
    x, base = (rng.standard_normal((3, *shape)).astype(np.float32) for _ in range(2))
    target = rng.integers(0, 4, 3)
    with torch.no_grad():
        want = captum.Occlusion(network).attribute(
            torch.from_numpy(x),
            sliding_window_shapes=window,
            strides=stride,
            baselines=torch.from_numpy(base),
            target=torch.from_numpy(target),
        )
    options = {"window": window, "stride": stride, "chunk": int(rng.integers(1, 20))}
    compiled = onnx_attrib.compile(
        exported(network, shape), "occlusion", baseline="input", **options
    )
    given = run(compiled, {"x": x, "x_baseline": base, "target": target})["x_attribution"]
    close(given, want.numpy(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
def test_captum_shapley_parity(case: int) -> None:
    """Captum enumerates all orders of the patches; ours are sampled."""
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    torch.set_num_threads(1)
    network, shape = random_network(3 * case + 1)
    network.eval()(torch.zeros(2, *shape))
    rng = np.random.default_rng(case)
    x, base = (rng.standard_normal((2, *shape)).astype(np.float32) for _ in range(2))
    window = (shape[0], 4, 4)
    groups = np.zeros(shape, np.int64)
    for number, patch in enumerate(windows(shape, window, window)):
        groups[patch] = number
    with torch.no_grad():
        want = captum.ShapleyValues(network).attribute(
            torch.from_numpy(x),
            baselines=torch.from_numpy(base),
            target=1,
            feature_mask=torch.from_numpy(groups[None]),
        )
    sizes = np.bincount(groups.ravel())[groups]
    compiled = onnx_attrib.compile(
        exported(network, shape),
        "shapley-sampling",
        window=window,
        samples=3000,
        target=1,
        baseline="input",
        chunk=100,
    )
    given = run(compiled, {"x": x, "x_baseline": base})["x_attribution"] * sizes
    assert np.abs(given - want.numpy()).max() < 0.05 * np.abs(want.numpy()).max()


@pytest.mark.slow
@pytest.mark.parametrize("zipmap", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "RandomForestRegressor",
        "GradientBoostingRegressor",
        "RandomForestClassifier",
        "GradientBoostingClassifier",
        "ExtraTreesClassifier",
    ],
)
def test_scikit_learn_trees(name: str, zipmap: bool) -> None:
    """Pipelines as skl2onnx writes them, judged by scikit-learn's own predictions."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.datasets import load_wine
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data, labels = load_wine(return_X_y=True)
    classifies = name.endswith("Classifier")
    if zipmap and not classifies:
        pytest.skip("regressors have no map of probabilities")
    trees = getattr(ensemble, name)(n_estimators=10, random_state=0)
    pipeline = make_pipeline(StandardScaler(), trees)
    pipeline.fit(data, labels)
    source = skl2onnx.to_onnx(
        pipeline,
        initial_types=[("x", skl2onnx.common.data_types.FloatTensorType([None, 13]))],
        options={"zipmap": zipmap} if classifies else None,
        target_opset=18,
    )
    output = None
    if zipmap:
        with pytest.raises(CompileError, match="no float output to explain") as refusal:
            onnx_attrib.compile(source, "occlusion")
        output = str(refusal.value).split("name an inner tensor: '")[1].split("'")[0]
    x = data[::40].astype(np.float32)
    options: dict[str, Any] = {"target": 2} if classifies else {}
    base = data.mean(0).astype(np.float32)
    compiled = onnx_attrib.compile(source, "occlusion", output=output, baseline=base, **options)
    given = run_plain(compiled, x)["x_attribution"]

    def score(values: Array) -> Array:
        if classifies:
            return np.asarray(pipeline.predict_proba(values)[:, 2])
        return np.asarray(pipeline.predict(values))

    want = occluded(score, x, base, (1,), (1,))
    assert np.abs(want).max() > 0.05
    close(given, want, 1e-4)
    compiled = onnx_attrib.compile(
        source, "shapley-sampling", output=output, baseline=base, delta=True, samples=10, **options
    )
    assert np.abs(run_plain(compiled, x)["convergence_delta"]).max() < 1e-4


def run_plain(model: ModelProto, x: Array) -> dict[str, Any]:
    """All outputs, of whatever type."""
    held = session(model)
    names = [output.name for output in held.get_outputs()]
    return dict(zip(names, held.run(None, {"x": x}), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
@pytest.mark.parametrize(
    "name",
    ["genomics", "squeeze_excite", "silu", "group_norms", "dense_block", "encoder", "segmenter"],
)
def test_architectures(name: str, exporter: Any) -> None:
    """Whole networks against windows evaluated one by one, and the sum of Shapley values."""
    pytest.importorskip("torch")
    from . import zoo

    source = zoo.export(zoo.build(name), zoo.sample(name, 2, 0), exporter)
    x, base = zoo.sample(name, 3, 1).numpy(), zoo.baseline(name, 1, 2).numpy()
    window = tuple(-(-size // 3) for size in x.shape[1:])
    stride = tuple(max(1, size - 1) for size in window)
    (y,) = session(source).run(None, {"x": x})
    seed = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
    feeds, options = {"x": x, "seed": seed}, {"target": "seed", "baseline": base, "chunk": 4}
    compiled = onnx_attrib.compile(source, "occlusion", window=window, stride=stride, **options)
    want = occluded(scored(source, seed), x, base, window, stride)
    close(run(compiled, feeds)["x_attribution"], want, 1e-4)
    options |= {"window": window, "samples": 2, "delta": True}
    given = run(onnx_attrib.compile(source, "shapley-sampling", **options), feeds)
    scale = np.abs(seed * y).reshape(3, -1).sum(axis=1)
    assert (np.abs(given["convergence_delta"]) < 1e-4 * scale).all()
