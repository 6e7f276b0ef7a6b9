"""Published numbers: DeepExplain's and Captum's own unit tests, and the identities of the paper.

Sources, each named where its numbers stand:

- DeepExplain, ``deepexplain/tests/test_tensorflow.py`` (Ancona et al. 2017's implementation);
- Captum 0.9, ``tests/attr/test_integrated_gradients_basic.py``, ``test_deeplift_basic.py`` and
  ``layer/test_layer_deeplift.py``, with the models of ``captum.testing.helpers.basic_models``;
- Ancona et al. 2017, arXiv 1711.06104, section 3 (equalities between the methods).

The slow tests run Captum itself on the same networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

pytest.importorskip("onnxruntime")

import onnx_attrib

from . import numeric
from .numeric import Array


def text(body: str, weights: Mapping[str, Array] | None = None) -> ModelProto:
    """A model from ONNX's text form, with more initializers added."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {body}')
    for name, value in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def explain(
    model: ModelProto, method: str, feeds: Mapping[str, Any], **options: Any
) -> dict[str, Array]:
    """Attributions by tensor name, in plain onnxruntime."""
    compiled = onnx_attrib.compile(model, method=method, **options)
    numeric.check_graph(compiled)
    arrays = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
    results = numeric.run(compiled, arrays)
    ending = "_attribution"
    return {k.removesuffix(ending): v for k, v in results.items() if k.endswith(ending)}


# -- DeepExplain -----------------------------------------------------------------------------------

SIMPLER_MODEL = text("""
    simpler_model (float[N, 2] x) => (float[N, 1] y)
    <float[2, 2] w1 = {1, 0, 0, 1}, float[2] b1 = {-1, 0}, float[2, 1] w2 = {1, -1}>
    {
        h = MatMul(x, w1)
        z = Add(h, b1)
        a = Relu(z)
        d = MatMul(a, w2)
        y = Relu(d)
    }
""")
"""ReLU(ReLU(x1 − 1) − ReLU(x2)), as ``simpler_model`` there."""

POINTS = [[-10.0, -5.0], [3.0, 1.0]]


@pytest.mark.parametrize(
    ("method", "options", "expected", "decimals"),
    [
        ("saliency", {}, [1, 1], 7),
        ("gradient-x-input", {}, [3, -1], 7),
        ("integrated-gradients", {}, [1.5, -0.5], 1),
        ("integrated-gradients", {"steps": 500}, [1.5, -0.5], 2),
        ("epsilon-lrp", {}, [3, -1], 3),
        ("epsilon-lrp", {"epsilon": 1e-9}, [3, -1], 6),
        ("deeplift", {}, [2, -1], 7),
    ],
)
def test_deepexplain(
    method: str, options: dict[str, Any], expected: list[float], decimals: int
) -> None:
    """``test_saliency_method``, ``test_int_grad``, ``test_elrp_method``, ``test_deeplift``, …"""
    found = explain(SIMPLER_MODEL, method, {"x": POINTS}, **options)["x"]
    np.testing.assert_almost_equal(found, [[0.0, 0.0], expected], decimals)


@pytest.mark.parametrize("method", ["integrated-gradients", "deeplift"])
def test_deepexplain_baseline(method: str) -> None:
    """``test_int_grad_baseline``, ``test_deeplift_baseline``: nothing at the baseline itself."""
    point = np.array(POINTS[1], np.float32)
    found = explain(SIMPLER_MODEL, method, {"x": point[None]}, baseline=point)["x"]
    np.testing.assert_almost_equal(found, [[0.0, 0.0]], 5)


def test_deepexplain_other_network() -> None:
    """``simple_model``, of which ``test_simple_model`` has the output."""
    weights = {"w1": [[1, -1], [-1, 1]], "b1": [1.5, -1], "w2": [[1.1, 1.4], [-0.5, 1]]}
    model = text(
        """simple_model (float[N, 2] x) => (float[N, 2] y)
        { h = Gemm(x, w1, b1) a = Relu(h) y = Gemm(a, w2, b2) }""",
        {name: np.array(value) for name, value in {**weights, "b2": [0, 2]}.items()},
    )
    x = np.array([[1, 0]], np.float32)
    for target, gradient in enumerate([[1.1, -1.1], [1.4, -1.4]]):
        compiled = onnx_attrib.compile(model, "gradient", target=target)
        result = numeric.run(compiled, {"x": x})
        np.testing.assert_allclose(result["y"], [[2.75, 5.5]], rtol=1e-6)
        np.testing.assert_allclose(result["x_attribution"], [gradient], rtol=1e-6)


# -- Captum ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """One of Captum's test networks (``name``, in its basic_models) as ONNX text."""

    name: str
    body: str
    extra: tuple[Any, ...] = ()
    model: ModelProto = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", text(f"{self.name} {self.body}"))


BASIC = Net(
    "BasicModel",
    """(float[N] x) => (float[N] y) <float one = {1}>
    {
        d = Sub(one, x)
        r = Relu(d)
        y = Sub(one, r)
    }""",
)
BASIC_2 = Net(
    "BasicModel2",
    """(float[N] x1, float[N] x2) => (float[N] y) <float one = {1}>
    {
        r1 = Relu(x1)
        r2 = Relu(x2)
        s = Sub(r1, one)
        d = Sub(s, r2)
        y = Relu(d)
    }""",
)
BASIC_3 = Net(
    "BasicModel3",
    """(float[N] x1, float[N] x2) => (float[N] y) <float one = {1}>
    {
        s = Sub(x1, one)
        r1 = Relu(s)
        r2 = Relu(x2)
        d = Sub(r1, r2)
        y = Relu(d)
    }""",
)
MULTI_ARGS = Net(
    "BasicModel4_MultiArgs",
    """(float[N, 3] x1, float[N, 3] x2) => (float[N] y)
    <float one = {1}, float[1, 3] x3 = {1, 2, 3}, int64 column = {0}>
    {
        s = Sub(x1, one)
        r1 = Relu(s)
        r2 = Relu(x2)
        q = Div(r2, x3)
        d = Sub(r1, q)
        r = Relu(d)
        y = Gather <axis = 1> (r, column)
    }""",
    extra=(np.array([[1, 2, 3]], np.float32),),
)
MULTI_TENSOR = Net(
    "BasicModel6_MultiTensor",
    """(float[N, 3] x1, float[N, 3] x2) => (float[N] y) <float one = {1}, int64 column = {1}>
    {
        s = Add(x1, x2)
        d = Sub(one, s)
        r = Relu(d)
        c = Gather <axis = 1> (r, column)
        y = Sub(one, c)
    }""",
)
RELU_DEEPLIFT = Net(
    "ReLUDeepLiftModel",
    """(float[N] x1, float[N] x2) => (float[N] y) <float two = {2}, float c = {1.5}>
    {
        r1 = Relu(x1)
        s = Sub(x2, c)
        r2 = Relu(s)
        a = Mul(two, r1)
        b = Mul(two, r2)
        y = Add(a, b)
    }""",
)
TANH_DEEPLIFT = Net(
    "TanhDeepLiftModel",
    """(float[N] x1, float[N] x2) => (float[N] y) <float two = {2}, float c = {1.5}>
    {
        r1 = Tanh(x1)
        s = Sub(x2, c)
        r2 = Tanh(s)
        a = Mul(two, r1)
        b = Mul(two, r2)
        y = Add(a, b)
    }""",
)
RELU_LINEAR = Net(
    "ReLULinearModel",
    """(float[N, 3] x1, float[N, 3] x2) => (float[N, 1] y)
    <float[1, 3] l1 = {3, 1, 0}, float[1, 3] l2 = {2, 3, 0}, float[1, 2] l3 = {1, 1}>
    {
        a = Gemm <transB = 1> (x1, l1)
        b = Gemm <transB = 1> (x2, l2)
        z = Concat <axis = 1> (a, b)
        h = Relu(z)
        y = Gemm <transB = 1> (h, l3)
    }""",
)
MAXPOOL_LINEAR = Net(
    "LinearMaxPoolLinearModel",
    """(float[N, 4] x) => (float[N, 1] y)
    <float[4, 4] eye = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float[1, 1] w = {1},
     int64[1] axis = {1}>
    {
        u = Unsqueeze(x, axis)
        l = MatMul(u, eye)
        p = MaxPool <kernel_shape = [4], strides = [4]> (l)
        f = Squeeze(p, axis)
        y = Gemm <transB = 1> (f, w)
    }""",
)

X1, X2 = [[-10.0, 1.0, -5.0]], [[3.0, 3.0, 1.0]]


@dataclass(frozen=True)
class Published:
    """Expected attributions of a network; ``expected`` None: Captum asserts the sum only."""

    net: Net
    method: str
    inputs: dict[str, Any]
    baselines: dict[str, Any]
    expected: dict[str, Any] | None
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return f"{self.net.name}-{self.method}"


def zeros(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: np.zeros_like(value, np.float32) for name, value in inputs.items()}


MULTI = {"x1": [[1.5, 2.0, 34.3]], "x2": [[3.0, 3.5, 23.2]]}
ONES = {"x": np.ones((2, 4), np.float32)}
REFERENCE = {"x": [[1.0, 2.0, 3.0, 9.0], [4.0, 8.0, 6.0, 7.0]]}

CAPTUM = [
    # test_integrated_gradients_basic.py: _assert_multi_variable (delta 0.05, 1500 steps there).
    *(
        Published(net, "integrated-gradients", {"x1": [3], "x2": [1]}, {}, expected, 0.05)
        for net in (BASIC_2, BASIC_3)
        for expected in ({"x1": [1.5], "x2": [-0.5]},)
    ),
    # _assert_univariable: min(x, 1), where all of the change is the one input's.
    *(
        Published(BASIC, method, {"x": [value]}, {}, {"x": [value]})
        for method in ("integrated-gradients", "deeplift")
        for value in (1.0, 0.0, -1.0)
    ),
    # _assert_multi_argument and _assert_multi_tensor_input: the sum is asserted.
    Published(MULTI_ARGS, "integrated-gradients", MULTI, {}, None, 0.05),
    Published(MULTI_TENSOR, "integrated-gradients", MULTI, {}, None, 0.05),
    # test_deeplift_basic.py: test_relu_deeplift_exact_match.
    Published(RELU_DEEPLIFT, "deeplift", {"x1": [1], "x2": [2]}, {}, {"x1": [2], "x2": [1]}, 1e-6),
    # test_tanh_deeplift: the sum.
    Published(TANH_DEEPLIFT, "deeplift", {"x1": [-1], "x2": [-2]}, {}, None),
    # test_relu_linear_deeplift, with its baseline (0, 0.0001): the sum; the first half is dead.
    Published(
        RELU_LINEAR,
        "deeplift",
        {"x1": X1, "x2": X2},
        {"x1": np.zeros((1, 3)), "x2": np.full((1, 3), 1e-4)},
        {"x1": [[0, 0, 0]], "x2": [[6 - 2e-4, 9 - 3e-4, 0]]},
    ),
    # test_lin_maxpool_lin_classification: a non-zero baseline whose maximum is elsewhere.
    Published(
        MAXPOOL_LINEAR,
        "deeplift",
        ONES,
        REFERENCE,
        {"x": [[0, 0, 0, -8], [0, -7, 0, 0]]},
        1e-4,
    ),
]


@pytest.mark.parametrize("case", CAPTUM, ids=str)
def test_captum(case: Published) -> None:
    baselines = {
        name: np.asarray(value, np.float32)
        for name, value in (case.baselines or zeros(case.inputs)).items()
    }
    found = explain(
        case.net.model,
        case.method,
        {**case.inputs, **{f"{name}_baseline": value for name, value in baselines.items()}},
        baseline="input",
    )
    if case.expected is not None:
        for name, value in case.expected.items():
            np.testing.assert_allclose(found[name], value, atol=case.tolerance, err_msg=name)
    inputs = {name: np.asarray(value, np.float32) for name, value in case.inputs.items()}
    change = numeric.run(case.net.model, inputs)["y"] - numeric.run(case.net.model, baselines)["y"]
    total = sum(value.sum() for value in found.values())
    np.testing.assert_allclose(total, change.sum(), atol=case.tolerance)


@pytest.mark.parametrize(
    ("net", "layer", "inputs", "baselines", "expected"),
    [
        # layer/test_layer_deeplift.py: test_relu_layer_deeplift, test_linear_layer_deeplift
        # and test_lin_maxpool_lin_classification.
        (RELU_LINEAR, "z", {"x1": X1, "x2": X2}, {}, [[0, 15]]),
        (RELU_LINEAR, "h", {"x1": X1, "x2": X2}, {}, [[0, 15]]),
        (MAXPOOL_LINEAR, "p", ONES, REFERENCE, [[[-8]], [[-7]]]),
    ],
)
def test_captum_layers(
    net: Net, layer: str, inputs: dict[str, Any], baselines: dict[str, Any], expected: list[Any]
) -> None:
    baselines = baselines or zeros(inputs)
    feeds = {**inputs, **{f"{name}_baseline": value for name, value in baselines.items()}}
    found = explain(net.model, "deeplift", feeds, inputs=[layer], baseline="input")
    np.testing.assert_allclose(found[layer], expected, atol=1e-5)


def captum_says(
    net: Net, method: str, inputs: Mapping[str, Array], baselines: Mapping[str, Array]
) -> dict[str, Array]:
    """Captum's attributions on its own torch network."""
    torch = pytest.importorskip("torch")
    attr = pytest.importorskip("captum.attr")
    models = pytest.importorskip("captum.testing.helpers.basic_models")
    module = getattr(models, net.name)().eval()
    args = tuple(torch.from_numpy(np.asarray(v, np.float32)) for v in inputs.values())
    base = tuple(torch.from_numpy(np.asarray(v, np.float32)) for v in baselines.values())
    extra = tuple(torch.from_numpy(v).repeat(len(args[0]), 1) for v in net.extra) or None
    target = 0 if method == "deeplift" and net in (RELU_LINEAR, MAXPOOL_LINEAR) else None
    given: dict[str, Any] = {"baselines": base, "target": target}
    given["additional_forward_args"] = extra
    if method == "integrated-gradients":
        engine = attr.IntegratedGradients(module)
        given.update(n_steps=50, method="gausslegendre", internal_batch_size=None)
    else:
        engine = attr.DeepLift(module)
    found = engine.attribute(args, **given)
    return {n: v.detach().numpy() for n, v in zip(inputs, found, strict=True)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("baseline", ["zero", "random"])
@pytest.mark.parametrize(
    ("net", "method", "shape"),
    [
        (BASIC, "integrated-gradients", (5,)),
        (BASIC_2, "integrated-gradients", (5,)),
        (BASIC_3, "integrated-gradients", (5,)),
        (MULTI_ARGS, "integrated-gradients", (5, 3)),
        (MULTI_TENSOR, "integrated-gradients", (5, 3)),
        (RELU_DEEPLIFT, "integrated-gradients", (5,)),
        (TANH_DEEPLIFT, "integrated-gradients", (5,)),
        (RELU_DEEPLIFT, "deeplift", (5,)),
        (TANH_DEEPLIFT, "deeplift", (5,)),
        (RELU_LINEAR, "deeplift", (5, 3)),
        (MAXPOOL_LINEAR, "deeplift", (5, 4)),
    ],
    ids=lambda value: value.name if isinstance(value, Net) else None,
)
def test_agrees_with_captum(net: Net, method: str, shape: tuple[int, ...], baseline: str) -> None:
    """Where Captum is right: functional ReLUs (BasicModel…) are left out for DeepLIFT.

    Captum's DeepLift rewrites modules, so it passes plain gradients through ``F.relu``.
    """
    rng = np.random.default_rng(3)
    names = [info.name for info in net.model.graph.input]
    inputs = {name: rng.normal(0, 2, shape).astype(np.float32) for name in names}
    drawn = {name: rng.normal(0, 2, shape).astype(np.float32) for name in names}
    baselines = drawn if baseline == "random" else zeros(inputs)
    feeds = {**inputs, **{f"{name}_baseline": value for name, value in baselines.items()}}
    found = explain(net.model, method, feeds, baseline="input")
    expected = captum_says(net, method, inputs, baselines)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# -- identities (Ancona et al. 2017, section 3) ----------------------------------------------------

SIGNED = ("gradient-x-input", "integrated-gradients", "epsilon-lrp", "deeplift")


def network(activation: str, biased: bool, seed: int = 0) -> ModelProto:
    """Two convolutions with an average pool between and two dense layers."""
    rng = np.random.default_rng(seed)
    scale = 0.3 if biased else 0.0
    weights = {
        "c1": rng.normal(0, 0.5, (4, 2, 3, 3)),
        "c1b": rng.normal(0, 1, 4) * scale,
        "c2": rng.normal(0, 0.4, (4, 4, 3, 3)),
        "c2b": rng.normal(0, 1, 4) * scale,
        "d1": rng.normal(0, 0.4, (16, 8)),
        "d1b": rng.normal(0, 1, 8) * scale,
        "d2": rng.normal(0, 0.5, (8, 3)),
        "d2b": rng.normal(0, 1, 3) * scale,
    }
    return text(
        f"""
        network (float[N, 2, 8, 8] x) => (float[N, 3] y)
        {{
            a = Conv <pads = [1, 1, 1, 1]> (x, c1, c1b)
            b = {activation}(a)
            c = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (b)
            d = Conv (c, c2, c2b)
            e = {activation}(d)
            f = Flatten(e)
            g = Gemm(f, d1, d1b)
            h = {activation}(g)
            y = Gemm(h, d2, d2b)
        }}
        """,
        weights,
    )


def all_methods(model: ModelProto, methods: tuple[str, ...]) -> dict[str, Array]:
    x = np.random.default_rng(1).normal(0, 1, (4, 2, 8, 8)).astype(np.float32)
    options: dict[str, dict[str, Any]] = {"epsilon-lrp": {"epsilon": 1e-9}}
    return {
        method: explain(model, method, {"x": x}, target=1, **options.get(method, {}))["x"]
        for method in methods
    }


def same(found: Mapping[str, Array]) -> None:
    first = next(iter(found.values()))
    assert np.abs(first).max() > 0.05
    for name, value in found.items():
        np.testing.assert_allclose(value, first, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("biased", [False, True])
def test_all_signed_methods_are_equal_on_a_linear_model(biased: bool) -> None:
    others = ("deep-shap", "expected-gradients", "occlusion")
    same(all_methods(network("Identity", biased), (*SIGNED, *others)))


@pytest.mark.parametrize("biased", [False, True])
def test_lrp_is_gradient_times_input_on_relu_networks(biased: bool) -> None:
    """Proposition: ε-LRP with only ReLUs is gradient × input, biases or not."""
    same(all_methods(network("Relu", biased), ("gradient-x-input", "epsilon-lrp")))


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Softsign"])
def test_lrp_is_deeplift_without_biases(activation: str) -> None:
    """ε-LRP is DeepLIFT with a zero baseline if there is no bias and f(0) = 0."""
    same(all_methods(network(activation, biased=False), ("deeplift", "epsilon-lrp")))


def test_lrp_of_sigmoid_networks_differs() -> None:
    """Without biases, too: the value at zero goes to what is multiplied by z."""
    methods = ("epsilon-lrp", "deeplift", "gradient-x-input")
    found = all_methods(network("Sigmoid", biased=False), methods)
    for other in methods[1:]:
        assert np.abs(found["epsilon-lrp"] - found[other]).max() > 0.05


def test_lrp_is_not_deeplift_with_biases() -> None:
    """The condition is needed: the identity above could not fail otherwise."""
    found = all_methods(network("Tanh", biased=True), ("deeplift", "epsilon-lrp"))
    assert np.abs(found["deeplift"] - found["epsilon-lrp"]).max() > 0.05


def test_saliency_is_the_size_of_the_gradient() -> None:
    found = all_methods(network("Tanh", biased=True), ("gradient", "saliency"))
    np.testing.assert_allclose(found["saliency"], np.abs(found["gradient"]), rtol=1e-6)
