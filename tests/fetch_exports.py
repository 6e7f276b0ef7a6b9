"""The exporters' networks of test_exporters.py: the same weights in every framework.

A part of fetch_models.py, which writes them with whatever frameworks there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


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
