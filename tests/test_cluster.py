"""The spelling of an activation or a softmax does not change its attribution."""

from __future__ import annotations

import re

import numpy as np
import pytest

import onnx_attrib

from .test_contract import close, run, text

SCALARS = (
    "float one = {1}, float half = {0.5}, float zero = {0}, float three = {3}, float six = {6}, "
    "float root2 = {1.4142135}, float cubic = {0.044715}, float k = {0.7978846}, "
    "float tenth = {0.1}, float twenty = {20}, int64[1] last = {-1}"
)

# (the operator, the same spelled out)
SPELLINGS = {
    "gelu": (
        "y = Gelu(x)",
        "a = Div(x, root2) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)",
    ),
    "gelu-tanh": (
        'y = Gelu <approximate = "tanh"> (x)',
        """p = Pow(x, three) q = Mul(p, cubic) r = Add(x, q) s = Mul(r, k) t = Tanh(s)
        u = Add(t, one) v = Mul(half, u) y = Mul(x, v)""",
    ),
    "hard-swish": (
        "y = HardSwish(x)",
        "a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)",
    ),
    "leaky": (
        "y = LeakyRelu <alpha = 0.1> (x)",
        "a = Greater(x, zero) b = Mul(x, tenth) y = Where(a, x, b)",
    ),
    "leaky-max": ("y = LeakyRelu <alpha = 0.1> (x)", "b = Mul(x, tenth) y = Max(x, b)"),
    "elu": ("y = Elu(x)", "a = Greater(x, zero) e = Exp(x) b = Sub(e, one) y = Where(a, x, b)"),
    "softplus": (
        "y = Softplus(x)",
        "s = Softplus(x) g = Greater(x, twenty) y = Where(g, x, s)",
    ),
    "mish": ("y = Mish(x)", "s = Softplus(x) t = Tanh(s) y = Mul(x, t)"),
    "softplus-log": ("y = Softplus(x)", "e = Exp(x) a = Add(e, one) y = Log(a)"),
    "sigmoid": (
        "y = Sigmoid(x)",
        "n = Neg(x) e = Exp(n) a = Add(e, one) y = Reciprocal(a)",
    ),
    "sigmoid-div": ("y = Sigmoid(x)", "n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(one, a)"),
    "tanh": (
        "y = Tanh(x)",
        """a = Mul(x, two) e = Exp(a) b = Sub(e, one) c = Add(e, one) y = Div(b, c)""",
    ),
    "silu": (
        "s = Sigmoid(x) y = Mul(x, s)",
        "n = Neg(x) e = Exp(n) a = Add(one, e) y = Div(x, a)",
    ),
    "softsign": ("y = Softsign(x)", "a = Abs(x) b = Add(a, one) y = Div(x, b)"),
    "square": ("y = Pow(x, two)", "y = Mul(x, x)"),
    "softmax": (
        "y = Softmax(x)",
        "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)",
    ),
    "softmax-unshifted": (
        "y = Softmax(x)",
        "e = Exp(x) s = ReduceSum(e, last) r = Reciprocal(s) y = Mul(e, r)",
    ),
    "softmax-keepdims": (
        "y = Softmax(x)",
        """m = ReduceMax <keepdims = 0> (x, last) n = Unsqueeze(m, last) d = Sub(x, n)
        e = Exp(d) s = ReduceSum <keepdims = 0> (e, last) t = Unsqueeze(s, last) y = Div(e, t)""",
    ),
    "log-softmax": (
        "y = LogSoftmax(x)",
        """m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last)
        l = Log(s) y = Sub(d, l)""",
    ),
    "layer-norm": (
        "y = LayerNormalization <epsilon = 0.001> (x, scale)",
        """m = ReduceMean(x, last) d = Sub(x, m) p = Pow(d, two) v = ReduceMean(p, last)
        w = Add(v, tiny) s = Sqrt(w) n = Div(d, s) y = Mul(n, scale)""",
    ),
    "layer-norm-fast-variance": (
        "y = LayerNormalization <epsilon = 0.001> (x, scale)",
        """m = ReduceMean(x, last) p = Mul(x, x) q = ReduceMean(p, last) o = Mul(m, m)
        v = Sub(q, o) w = Add(v, tiny) s = Sqrt(w) r = Reciprocal(s) f = Mul(r, scale)
        d = Sub(x, m) y = Mul(d, f)""",
    ),
}


@pytest.mark.parametrize("method", ["deeplift", "epsilon-lrp", "gradient"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(rng: np.random.Generator, name: str, method: str) -> None:
    feeds = {"x": (2 * rng.standard_normal((4, 6))).astype(np.float32)}
    feeds["seed"] = rng.standard_normal((4, 6)).astype(np.float32)
    arrays = {"scale": rng.standard_normal(6).astype(np.float32)}
    arrays |= {"two": np.array(2, np.float32), "tiny": np.array(1e-3, np.float32)}
    options = {}
    if method == "deeplift":
        options["baseline"] = "input"
        feeds["x_baseline"] = rng.standard_normal((1, 6)).astype(np.float32)
    results = [
        run(
            onnx_attrib.compile(
                text(f"g (float[N, 6] x) => (float[N, 6] y) <{SCALARS}> {{ {body} }}", **arrays),
                method,
                target="seed",
                **options,
            ),
            feeds,
        )
        for body in SPELLINGS[name]
    ]
    close(results[1]["y"], results[0]["y"], 1e-5)
    # The stabiliser ε = 1e-4 acts on other intermediate values when the variance is spelled so.
    fast = (name, method) == ("layer-norm-fast-variance", "epsilon-lrp")
    close(results[1]["x_attribution"], results[0]["x_attribution"], 1e-4 if fast else 1e-5)


WITHIN = {
    "scan": """g (float[T, N, 6] x) => (float[T, N, 6] y) <SCALARS> {
        y = Scan <num_scan_inputs = 1, body = step (float[N, 6] e) => (float[N, 6] o) { BODY }>
        (x) }""",
    "loop": """g (float[T, N, 6] x) => (float[T, N, 6] y) <SCALARS, int64 count = {2}> {
        y = Loop <body = step (int64 i, bool go, float[T, N, 6] e)
            => (bool on, float[T, N, 6] o) { on = Identity(go) BODY }> (count, , x) }""",
    "if": """g (float[T, N, 6] x) => (float[T, N, 6] y) <SCALARS, bool yes = {1}> {
        y = If <then_branch = left () => (float[T, N, 6] o) { e = Identity(x) BODY },
            else_branch = right () => (float[T, N, 6] z) { z = Neg(x) }> (yes) }""",
}


@pytest.mark.parametrize("method", ["deeplift", "epsilon-lrp"])
@pytest.mark.parametrize("where", WITHIN)
@pytest.mark.parametrize("name", ["elu", "silu", "softmax", "softmax-keepdims", "log-softmax"])
def test_spelling_inside_a_body(
    rng: np.random.Generator, name: str, where: str, method: str
) -> None:
    feeds = {k: rng.standard_normal((3, 2, 6)).astype(np.float32) for k in ("x", "seed")}
    options = {}
    if method == "deeplift":
        options["baseline"] = "input"
        feeds["x_baseline"] = rng.standard_normal((3, 2, 6)).astype(np.float32)
    two = np.array(2, np.float32)
    results = []
    for spelled in SPELLINGS[name]:
        body = re.sub(r"\bx\b", "e_", spelled)
        body = re.sub(r"\be\b", "power", body)
        body = re.sub(r"\by\b", "o", re.sub(r"\be_\b", "e", body))
        source = WITHIN[where].replace("SCALARS", SCALARS).replace("BODY", body)
        model = text(source, two=two)
        results.append(run(onnx_attrib.compile(model, method, target="seed", **options), feeds))
    close(results[1]["y"], results[0]["y"], 1e-5)
    close(results[1]["x_attribution"], results[0]["x_attribution"], 2e-5)
