"""Deconvnet and guided backprop: restated neuron by neuron, whatever a ReLU is spelled as."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import CompileError
from onnx_attrib.compiler import prepare

from .test_contract import close, run, text

METHODS = ["deconvnet", "guided-backprop"]
Scalar = Callable[[float], float]

NUMBERS = {
    name: np.array(value, np.float32)
    for name, value in {
        **{"zero": 0, "half": 0.5, "one": 1, "two": 2, "three": 3, "six": 6, "tenth": 0.1},
        **{"minus": -1, "tiny": 1e-3},
    }.items()
}
NUMBERS["slope"] = np.full((1, 4), 0.3, np.float32)


def leaky(slope: float) -> Scalar:
    return lambda z: 1.0 if z > 0 else slope


def inside(low: float, high: float) -> Scalar:
    return lambda z: 1.0 if low < z < high or z == np.inf else 0.0


def elu(scale: float, alpha: float) -> Scalar:
    return lambda z: scale if z > 0 else scale * alpha * float(np.exp(z))


RELU = leaky(0.0)
# How h is made of z, and the derivative.
KIN: dict[str, tuple[str, Scalar]] = {
    "Relu": ("h = Relu(z)", RELU),
    "Max": ("h = Max(z, zero)", RELU),
    "Max, turned": ("h = Max(zero, z)", RELU),
    "Clip": ("h = Clip(z, zero)", RELU),
    "ReLU6": ("h = Clip(z, zero, six)", inside(0, 6)),
    "capped": ("p = Relu(z) h = Min(p, two)", inside(0, 2)),
    "capped maximum": ("p = Max(zero, z) h = Min(two, p)", inside(0, 2)),
    "Where": ("c = Greater(z, zero) h = Where(c, z, zero)", RELU),
    "Where, turned": ("c = Less(z, zero) h = Where(c, zero, z)", RELU),
    "Where, not": ("c = LessOrEqual(z, zero) d = Not(c) h = Where(d, z, zero)", RELU),
    "gate": ("c = Greater(z, zero) d = Cast <to = 1> (c) h = Mul(d, z)", RELU),
    "sign": ("s = Sign(z) r = Max(s, zero) h = Mul(z, r)", RELU),
    "absolute": ("p = Abs(z) q = Add(z, p) h = Mul(q, half)", RELU),
    "twice": ("p = Abs(z) h = Add(z, p)", lambda z: 2.0 if z > 0 else 0.0),
    "less a minimum": ("p = Min(z, zero) h = Sub(z, p)", RELU),
    "LeakyRelu": ("h = LeakyRelu <alpha = 0.2> (z)", leaky(0.2)),
    "leaky maximum": ("p = Mul(z, tenth) h = Max(z, p)", leaky(0.1)),
    "leaky Where": ("c = Greater(z, zero) p = Mul(z, tenth) h = Where(c, z, p)", leaky(0.1)),
    "PRelu": ("h = PRelu(z, slope)", leaky(0.3)),
    "PRelu of two ReLUs": (
        "p = Relu(z) n = Neg(z) q = Relu(n) r = Mul(q, slope) h = Sub(p, r)",
        leaky(0.3),
    ),
    "Elu": ("h = Elu <alpha = 0.7> (z)", elu(1, 0.7)),
    "Elu, by Where": (
        "c = Greater(z, zero) p = Exp(z) q = Sub(p, one) h = Where(c, z, q)",
        elu(1, 1),
    ),
    "Selu": ("h = Selu <alpha = 1.6, gamma = 1.05> (z)", elu(1.05, 1.6)),
    "Celu": ("h = Celu <alpha = 1.0> (z)", elu(1, 1)),
    "ThresholdedRelu": ("h = ThresholdedRelu <alpha = 0.4> (z)", inside(0.4, np.inf)),
}
# What is no ReLU, and the operators that the note names.
OTHERS = {
    "Sigmoid": ("h = Sigmoid(z)", "Sigmoid"),
    "SiLU": ("s = Sigmoid(z) h = Mul(z, s)", "(Sigmoid, Mul)"),
    "hard tanh": ("h = Clip(z, minus, one)", "Clip"),
    "maximum with one": ("h = Max(z, one)", "Max"),
    "minimum": ("h = Min(z, zero)", "Min"),
    "Abs": ("h = Abs(z)", "Abs"),
    "hard swish": (
        "p = Add(z, three) q = Clip(p, zero, six) h = Mul(z, q)",
        "(Add, Clip, Mul)",
    ),
    "more than itself": (
        "c = Greater(z, zero) p = Where(c, z, zero) h = Add(z, p)",
        "(Greater, Where, Add)",
    ),
    "Softmax": ("h = Softmax(z)", "Softmax"),
    "hard sigmoid": ("p = Add(z, half) h = Clip(p, zero, one)", "Clip"),
    "hard sigmoid by bounds": ("p = Add(z, half) q = Min(p, one) h = Max(q, zero)", "Max, Min"),
    "a guarded root": ("p = Max(z, zero) q = Add(p, tiny) h = Sqrt(q)", "Sqrt, Max"),
    "a guarded quotient": ("p = Clip(z, zero) q = Add(p, tiny) h = Div(one, q)", "Div, Clip"),
}


def network(rng: np.random.Generator, *activations: str) -> tuple[ModelProto, list[Any]]:
    """Dense layers with biases, each followed by an activation that makes h of z; and the layers.

    Each activation stands in names of its own.
    """
    widths = [3, *[4] * len(activations), 2]
    arrays, layers, lines = dict(NUMBERS), [], []
    before = "x"
    for k, (rows, columns) in enumerate(itertools.pairwise(widths)):
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        bias = rng.standard_normal(columns).astype(np.float32)
        arrays |= {f"weight{k}": weight, f"bias{k}": bias}
        layers.append((weight.astype(np.float64), bias.astype(np.float64)))
        last = k == len(activations)
        lines.append(f"{'y' if last else f'z{k}'} = Gemm({before}, weight{k}, bias{k})")
        if not last:
            words = activations[k].replace("(", "( ").replace(")", " )").replace(",", " ,").split()
            own = [f"{w}{k}" if len(w) == 1 and w.isalpha() else w for w in words]
            lines.append(" ".join(own))
        before = f"h{k}"
    body = " ".join(lines)
    return text(f"g (float[N, 3] x) => (float[N, 2] y) {{ {body} }}", **arrays), layers


def restated(
    model: ModelProto, layers: list[Any], slopes: list[Scalar], x: np.ndarray, method: str
) -> np.ndarray:
    """What the papers say, number by number; the values before the activations are the model's.

    A deconvnet passes what it would for large z.
    """
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for k in range(len(slopes)):
        shown.graph.output.append(
            onnx.helper.make_tensor_value_info(f"z{k}", onnx.TensorProto.FLOAT, None)
        )
    values = run(shown, {"x": x})
    result = np.zeros(x.shape)
    for n in range(len(x)):
        m = layers[-1][0][:, 0].copy()
        for k in reversed(range(len(slopes))):
            for i, z in enumerate(values[f"z{k}"][n]):
                positive = max(m[i], 0.0)
                at = np.inf if method == "deconvnet" else float(z)
                m[i] = slopes[k](at) * positive
            m = layers[k][0] @ m
        result[n] = m
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kin", KIN)
def test_every_rectifier(rng: np.random.Generator, method: str, kin: str) -> None:
    """Two of a kind, and a ReLU behind them."""
    spelled, slope = KIN[kin]
    model, layers = network(rng, spelled, spelled, "h = Relu(z)")
    x = 2 * rng.standard_normal((7, 3)).astype(np.float32)
    job = prepare(model, method, target=0)
    found = run(job.graph.to_proto(), {"x": x})["x_attribution"]
    close(found, restated(model, layers, [slope, slope, RELU], x, method))
    assert not job.notes
    alone = onnx_attrib.compile(model, method, target=0)
    np.testing.assert_array_equal(run(alone, {"x": x[2:3]})["x_attribution"], found[2:3])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", OTHERS)
def test_others_pass_the_gradient(rng: np.random.Generator, method: str, other: str) -> None:
    """Behind the last ReLU's multiplier everything is the gradient, and a note says of what."""
    spelled, named = OTHERS[other]
    model, _ = network(rng, "h = Relu(z)", spelled)
    x = rng.standard_normal((5, 3)).astype(np.float32)
    job = prepare(model, method, target=0)
    assert job.notes == [f"{method} changes ReLUs and their kin; the plain gradient passes {named}"]
    found = run(job.graph.to_proto(), {"x": x})["x_attribution"]
    inner = onnx_attrib.compile(model, "gradient", inputs=["h0", "x"], target=0)
    gradients = run(inner, {"x": x})
    before = run(onnx_attrib.compile(model, "gradient", inputs=["z0"], target=0), {"x": x})
    m = np.maximum(gradients["h0_attribution"], 0)
    if method == "guided-backprop":
        m = np.where(before["z0_attribution"] == 0, 0, m)
    weight = onnx.numpy_helper.to_array(
        next(t for t in model.graph.initializer if t.name == "weight0")
    )
    close(found, m @ weight.T, 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", OTHERS)
def test_without_a_rectifier(rng: np.random.Generator, method: str, other: str) -> None:
    spelled, named = OTHERS[other]
    model, _ = network(rng, spelled)
    with pytest.raises(CompileError) as error:
        onnx_attrib.compile(model, method)
    message = str(error.value)
    assert f"'{method}'" in message
    assert "between x and y" in message
    assert f"only {named}" in message
    assert "'gradient'" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_with_a_rectifier_in_it(rng: np.random.Generator, method: str) -> None:
    """z + ReLU(z) is no ReLU, but has one."""
    model, layers = network(rng, "p = Relu(z) h = Add(z, p)")
    x = rng.standard_normal((6, 3)).astype(np.float32)
    found = run(onnx_attrib.compile(model, method, target=0), {"x": x})["x_attribution"]
    (first, bias), (second, _) = layers
    m = np.broadcast_to(second[:, 0], (6, 4))
    gate = (x @ first + bias > 0) if method == "guided-backprop" else 1
    close(found, (m + gate * np.maximum(m, 0)) @ first.T)


@pytest.mark.parametrize("method", METHODS)
def test_inside_control_flow(rng: np.random.Generator, method: str) -> None:
    """A ReLU in a branch, once as one operator and once spelled out, is the same as outside."""
    weight = rng.standard_normal((3, 3)).astype(np.float32)
    plain = text("g (float[N, 3] x) => (float[N, 3] y) { z = MatMul(x, w) y = Relu(z) }", w=weight)
    x, seed = (rng.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    expected = run(onnx_attrib.compile(plain, method, target="seed"), {"x": x, "seed": seed})
    for spelled in ("h = Relu(z)", "c = Greater(z, zero) h = Where(c, z, zero)"):
        model = text(
            f"""g (float[N, 3] x, bool b) => (float[N, 3] y) <float zero = {{0}}> {{
            z = MatMul(x, w)
            y = If (b) <then_branch = t () => (float[N, 3] h) {{ {spelled} }},
                        else_branch = e () => (float[N, 3] k) {{ k = Tanh(z) }}>
            }}""",
            w=weight,
        )
        job = prepare(model, method, target="seed")
        assert len(job.notes) == 1
        assert job.notes[0].endswith("passes Tanh")
        found = run(job.graph.to_proto(), {"x": x, "b": np.array(True), "seed": seed})
        close(found["x_attribution"], expected["x_attribution"])


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_types(rng: np.random.Generator, kind: str) -> None:
    dtype = np.dtype({"float16": np.float16, "double": np.float64}[kind])
    weight = rng.standard_normal((3, 4)).astype(dtype)
    model = text(
        f"""g ({kind}[N, 3] x) => ({kind}[N, 4] y)
        {{ z = MatMul(x, w) c = Greater(z, zero) y = Where(c, z, zero) }}""",
        w=weight,
        zero=np.zeros((), dtype),
    )
    x, seed = (rng.standard_normal((2, k)).astype(dtype) for k in (3, 4))
    compiled = onnx_attrib.compile(model, "deconvnet", target="seed")
    found = run(compiled, {"x": x, "seed": seed})["x_attribution"]
    assert found.dtype == dtype
    expected = np.maximum(seed.astype(np.float64), 0) @ weight.T.astype(np.float64)
    close(found, expected, 2e-3 if kind == "float16" else 1e-6)


def test_several_methods_targets_and_inputs(rng: np.random.Generator) -> None:
    """Each as by itself."""
    arrays = {
        "u": rng.standard_normal((3, 6)).astype(np.float32),
        "v": rng.standard_normal((2, 6)).astype(np.float32),
        "w": rng.standard_normal((6, 5)).astype(np.float32),
    }
    model = text(
        """g (float[N, 3] a, float[N, 2] b) => (float[N, 5] y)
        { p = MatMul(a, u) q = MatMul(b, v) s = Add(p, q) h = Relu(s) y = MatMul(h, w) }""",
        **arrays,
    )
    feeds = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal((4, 2))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    both = run(onnx_attrib.compile(model, METHODS, targets=[4, 1]), feeds)
    inner = run(onnx_attrib.compile(model, METHODS[0], inputs=["s"], target=4), feeds)
    close(inner["s_attribution"], np.broadcast_to(arrays["w"][:, 4].clip(0), (4, 6)))
    for method in METHODS:
        for k, target in enumerate((4, 1)):
            one = run(onnx_attrib.compile(model, method, target=target), feeds)
            for name in feeds:
                together = both[f"{name}_attribution_{method}"][:, k]
                np.testing.assert_array_equal(together, one[f"{name}_attribution"])
