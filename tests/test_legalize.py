"""Operators without a CUDA kernel, spelled by others: the same numbers, and nothing left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_attrib
from onnx_attrib.errors import OptionError
from onnx_attrib.ir import Graph
from onnx_attrib.passes.legalize import legalize
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.placement import placed

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray[Any, Any]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Another stream for every case."""
    return np.random.default_rng(list(request.node.name.encode()))


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    return [np.asarray(y) for y in session.run(None, feeds)]


def legal(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model without what CUDA lacks, and the notes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph: Graph = normalize(copy)
    job: Any = SimpleNamespace(graph=graph, request=SimpleNamespace(provider="cuda"), notes=[])
    legalize(job)
    graph.sort()
    graph.nodes[:] = graph.prune(graph.nodes, graph.outputs)
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    return result, job.notes


def check(text: str, feeds: dict[str, Array], rtol: float = 3e-6, atol: float = 1e-6) -> None:
    """It was on the CPU, it is no more, and the numbers are the same."""
    source = parsed(text)
    assert placed(source).fallbacks, "CUDA has a kernel for this: the case shows nothing"
    result, notes = legal(source)
    assert not notes
    assert not placed(result).fallbacks, placed(result).fallbacks
    assert [o.name for o in result.graph.output] == [o.name for o in source.graph.output]
    for have, want in zip(run(result, feeds), run(source, feeds), strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=rtol, atol=atol)


# -- functions of one number: against float64, at the edges of the type ----------------------------

EXACT = {
    "Tan": (np.tan, [-4.0, -1.5, -1e-4, 0.0, 1e-20, 0.3, 1.2, 10.0]),
    "Sinh": (np.sinh, [-89.0, -88.9, -3.0, -1e-6, 0.0, 1e-20, 0.5, 20.0, 89.0, 200.0, -np.inf]),
    "Cosh": (np.cosh, [-89.0, -88.9, -3.0, -1e-6, 0.0, 1e-20, 0.5, 20.0, 89.0, 200.0, np.inf]),
    "Asinh": (np.arcsinh, [-1e30, -2e6, -9e5, -2.0, -1e-5, 0.0, 1e-20, 0.1, 7.0, 1e19, np.inf]),
    "Acosh": (np.arccosh, [1.0, 1.0 + 2.0**-20, 1.01, 1.5, 30.0, 9e5, 2e6, 1e30, np.inf, 0.5]),
    "Atanh": (np.arctanh, [-1.0, -0.9999, -0.5, -1e-5, 0.0, 1e-20, 0.1, 0.75, 0.99999, 1.0, 2.0]),
}


@pytest.mark.parametrize("op", EXACT)
@pytest.mark.parametrize("kind", ["float", "double", "float16"])
def test_functions(op: str, kind: str, rng: np.random.Generator) -> None:
    exact, edges = EXACT[op]
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
    drawn = rng.uniform(-1, 1, 40) + (2 if op == "Acosh" else 0)
    with np.errstate(all="ignore"):
        x = np.concatenate([edges, drawn]).astype(dtype)
        want = exact(x.astype(np.float64)).astype(dtype)
    text = f"g ({kind}[N] x) => ({kind}[N] y) {{ y = {op}(x) }}"
    result, notes = legal(parsed(text))
    assert not notes
    assert not placed(result).fallbacks
    (y,) = run(result, {"x": x})
    # e^88 of a rounded 88 is off by many units, in any runtime.
    rtol = {"float": 1e-5, "double": 1e-13, "float16": 4e-3}[kind]
    np.testing.assert_allclose(y, want, rtol=rtol, atol=0 if kind != "float16" else 1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 4.0])
def test_celu(alpha: float, rng: np.random.Generator) -> None:
    x = np.concatenate([rng.normal(0, 3, 50), [0, 1e30, -1e30]]).astype(np.float32)
    check(f"g (float[N] x) => (float[N] y) {{ y = Celu<alpha = {alpha}>(x) }}", {"x": x})


def test_mean(rng: np.random.Generator) -> None:
    feeds = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in (("a", (2, 3)), ("b", (3,)), ("c", (2, 1)))
    }
    check(
        "g (float[2, 3] a, float[3] b, float[2, 1] c) => (float[2, 3] y) { y = Mean(a, b, c) }",
        feeds,
    )
    check("g (float[2, 3] a) => (float[2, 3] y) { y = Mean(a) }", {"a": feeds["a"]})


# -- one case an operator --------------------------------------------------------------------------

X = "float[2, 4, 5, 6] x"
CASES = {
    "MaxUnpool": (
        f"g ({X}) => (float[2, 4, 5, 6] y) <int64[4] s = {{2, 4, 5, 6}}> "
        "{ p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) "
        "y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(p, i, s) }",
        {"x": (2, 4, 5, 6)},
    ),
    "MaxUnpool, inferred": (
        "g (float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y) "
        "{ p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) "
        "y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(p, i) }",
        {"x": (2, 4, 6, 6)},
    ),
    "Col2Im": (
        "g (float[N, 18, 9] x) => (float[N, 3, 5, 6] y) <int64[2] s = {5, 6}, int64[2] b = {2, 3}>"
        "{ y = Col2Im<strides = [2, 1], pads = [1, 0, 0, 1], dilations = [1, 2]>(x, s, b) }",
        {"x": (2, 18, 9)},
    ),
    "LpPool": (
        f"g ({X}) => (float[2, 4, P, Q] y) {{ y = LpPool<kernel_shape = [3, 2], strides = [2, 1], "
        "pads = [1, 0, 0, 1], p = 3>(x) }",
        {"x": (2, 4, 5, 6)},
    ),
    "LpPool of unknown size": (
        "g (float[N, 4, H, W] x) => (float[N, 4, P, Q] y) "
        '{ y = LpPool<kernel_shape = [2, 2], auto_pad = "SAME_UPPER", strides = [2, 2]>(x) }',
        {"x": (2, 4, 5, 6)},
    ),
    "GlobalLpPool": (
        f"g ({X}) => (float[2, 4, 1, 1] y) {{ y = GlobalLpPool<p = 2>(x) }}",
        {"x": (2, 4, 5, 6)},
    ),
    "AffineGrid": (
        "g (float[N, 2, 3] x) => (float[N, 4, 5, 2] y) <int64[4] s = {2, 3, 4, 5}> "
        "{ y = AffineGrid(x, s) }",
        {"x": (2, 2, 3)},
    ),
    "AffineGrid in space": (
        "g (float[2, 3, 4] x) => (float[2, 3, 4, 5, 3] y) <int64[5] s = {2, 3, 3, 4, 5}> "
        "{ y = AffineGrid<align_corners = 1>(x, s) }",
        {"x": (2, 3, 4)},
    ),
    "MeanVarianceNormalization": (
        f"g ({X}) => (float[2, 4, 5, 6] y) {{ y = MeanVarianceNormalization(x) }}",
        {"x": (2, 4, 5, 6)},
    ),
    "Hardmax": (
        f"g ({X}) => (float[2, 4, 5, 6] y) {{ y = Hardmax<axis = 1>(x) }}",
        {"x": (2, 4, 5, 6)},
    ),
    "Hardmax of unknown size": (
        "g (float[N, M] x) => (float[N, M] y) { y = Hardmax(x) }",
        {"x": (3, 7)},
    ),
    "ConvTranspose with uneven pads": (
        f"g ({X}, float[4, 3, 3, 2] w, float[6] b) => (float[2, 6, P, Q] y) {{ y = ConvTranspose"
        "<strides = [2, 3], pads = [0, 1, 2, 0], group = 2, output_padding = [1, 0]>(x, w, b) }",
        {"x": (2, 4, 5, 6), "w": (4, 3, 3, 2), "b": (6,)},
    ),
    "ConvTranspose with less padding than output padding": (
        f"g ({X}, float[4, 3, 3, 3] w) => (float[2, 3, P, Q] y) {{ y = ConvTranspose"
        "<strides = [3, 2], pads = [1, 1, 0, 0], output_padding = [2, 1], dilations = [1, 2]>"
        "(x, w) }",
        {"x": (2, 4, 5, 6), "w": (4, 3, 3, 3)},
    ),
    "ConvTranspose with auto_pad": (
        "g (float[N, 4, H, W] x, float[4, 3, 4, 3] w) => (float[N, 3, P, Q] y) "
        '{ y = ConvTranspose<strides = [2, 2], auto_pad = "SAME_LOWER">(x, w) }',
        {"x": (2, 4, 5, 6), "w": (4, 3, 4, 3)},
    ),
    "ArgMax": (
        f"g ({X}) => (int64[2, 4, 6] y) "
        "{ z = Round(x) y = ArgMax<axis = 2, keepdims = 0, select_last_index = 1>(z) }",
        {"x": (2, 4, 5, 6)},
    ),
    "ArgMin of unknown size": (
        "g (float[N, M] x) => (int64[N, 1] y) "
        "{ z = Round(x) y = ArgMin<axis = -1, select_last_index = 1>(z) }",
        {"x": (3, 40)},
    ),
    "DFT": (
        "g (float[2, 9, 3, 1] x) => (float[2, 5, 3, 2] y) <int64 axis = {1}> "
        "{ y = DFT<onesided = 1>(x, , axis) }",
        {"x": (2, 9, 3, 1)},
    ),
    "DFT, longer and back": (
        "g (float[2, 9, 2] x) => (float[2, 12, 2] y) <int64 axis = {-2}, int64 n = {12}> "
        "{ y = DFT<inverse = 1>(x, n, axis) }",
        {"x": (2, 9, 2)},
    ),
    "STFT": (
        "g (float[2, 40, 1] x) => (float[2, F, 5, 2] y) <int64 step = {3}, "
        "float[8] w = {0.1, 0.4, 0.7, 1, 1, 0.8, 0.3, 0.2}> { y = STFT(x, step, w) }",
        {"x": (2, 40, 1)},
    ),
    "Det": ("g (float[5, 3, 3] x) => (float[5] y) { y = Det(x) }", {"x": (5, 3, 3)}),
    "LSTM with peepholes and clip": (
        "g (float[5, 2, 3] x, float[2, 16, 3] w, float[2, 16, 4] r, float[2, 32] b, "
        "float[2, 2, 4] h, float[2, 2, 4] c, float[2, 12] p) => "
        "(float[5, 2, 2, 4] y, float[2, 2, 4] yh, float[2, 2, 4] yc) "
        "<int32[2] lengths = {5, 3}> { y, yh, yc = LSTM<hidden_size = 4, clip = 0.7, "
        'direction = "bidirectional">(x, w, r, b, lengths, h, c, p) }',
        {
            "x": (5, 2, 3),
            "w": (2, 16, 3),
            "r": (2, 16, 4),
            "b": (2, 32),
            "h": (2, 2, 4),
            "c": (2, 2, 4),
            "p": (2, 12),
        },
    ),
    "GRU": (
        "g (float[5, 2, 3] x, float[1, 12, 3] w, float[1, 12, 4] r) => (float[5, 1, 2, 4] y) "
        '{ y = GRU<hidden_size = 4, direction = "reverse">(x, w, r) }',
        {"x": (5, 2, 3), "w": (1, 12, 3), "r": (1, 12, 4)},
    ),
    "RNN": (
        "g (float[5, N, 3] x, float[1, 4, 3] w, float[1, 4, 4] r) => (float[1, N, 4] yh) "
        '{ y, yh = RNN<hidden_size = 4, activations = ["Relu"]>(x, w, r) }',
        {"x": (5, 2, 3), "w": (1, 4, 3), "r": (1, 4, 4)},
    ),
    "OneHot": (
        "g (float[2, 3] x) => (float[2, 5, 3] y) <float depth = {5.0}, float[2] v = {-1.0, 2.5}> "
        "{ i = Round(x) y = OneHot<axis = 1>(i, depth, v) }",
        {"x": (2, 3)},
    ),
    "GatherND of int32": (
        "g (float[3, 4] x) => (int32[2, 4] y) <int64[2, 1] i = {2, 0}> "
        "{ z = Cast<to = 6>(x) y = GatherND(z, i) }",
        {"x": (3, 4)},
    ),
    "Pad of int32": (
        "g (float[3, 4] x) => (int32[5, 6] y) <int64[4] p = {1, 0, 1, 2}, int32 v = {7}> "
        "{ z = Cast<to = 6>(x) y = Pad(z, p, v) }",
        {"x": (3, 4)},
    ),
    "Where of int8": (
        "g (float[3, 4] x) => (int8[3, 4] y) <int8 v = {7}, float zero = {0}> "
        "{ c = Greater(x, zero) z = Cast<to = 3>(x) y = Where(c, z, v) }",
        {"x": (3, 4)},
    ),
    "Less of uint8": (
        "g (float[3, 4] x) => (bool[3, 4] y) <uint8 v = {2}> "
        "{ a = Abs(x) z = Cast<to = 2>(a) y = Less(z, v) }",
        {"x": (3, 4)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, rng: np.random.Generator) -> None:
    text, shapes = CASES[name]
    feeds = {k: rng.normal(0, 2, shape).astype(np.float32) for k, shape in shapes.items()}
    check(text, feeds, rtol=1e-5, atol=2e-5 if "DFT" in name or name == "STFT" else 3e-6)


@pytest.mark.parametrize("op", ["Atan", "Asin", "BitwiseAnd"])
def test_the_rest_is_named(op: str) -> None:
    kind, second = ("int32", ", x") if op == "BitwiseAnd" else ("float", "")
    text = f"g ({kind}[N] x) => ({kind}[N] y) {{ [rest] y = {op}(x{second}) }}"
    result, notes = legal(parsed(text))
    assert [node.op_type for node in result.graph.node] == [op]
    assert notes == [f"runs on the CPU, for want of a CUDA kernel: {op} 'rest'"]


# -- whole models ----------------------------------------------------------------------------------

MODEL = """g (float[N, 3, 4] x) => (float[N, 5] y)
<float[4, 5] w = {0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.6, -0.5, 0.3, 0.1,
                  -0.1, 0.4, 0.2, -0.3, 0.5, 0.7, -0.6, 0.1, 0.2, -0.2}, int64[1] one = {1}>
{ t = Tan(x)  c = Celu<alpha = 0.5>(t)  m = Mean(c, x)  s = ReduceSum<keepdims = 0>(m, one)
  a = Sinh(s)  y = MatMul(a, w) }"""


@pytest.mark.parametrize("method", ["gradient", "integrated-gradients", "deeplift", "occlusion"])
def test_compiled_models(method: str, rng: np.random.Generator) -> None:
    """The model's own part and what the sweep makes of it, in loops too."""
    kwargs: dict[str, Any] = {"method": method, "target": "argmax"}
    portable = onnx_attrib.compile(parsed(MODEL), **kwargs)
    cuda = onnx_attrib.compile(parsed(MODEL), provider="cuda", **kwargs)
    onnx.checker.check_model(cuda, full_check=True)
    assert placed(portable).fallbacks
    assert placed(cuda).on_cuda, [*placed(cuda).fallbacks, *placed(cuda).copies]
    x = {"x": rng.uniform(-0.6, 0.6, (3, 3, 4)).astype(np.float32)}
    assert [o.name for o in cuda.graph.output] == [o.name for o in portable.graph.output]
    for have, want in zip(run(cuda, x), run(portable, x), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


def test_branches(rng: np.random.Generator) -> None:
    """Subgraphs of the model are rewritten, whichever way they go; capturing ones too."""
    model = parsed(
        """g (bool which, float[3, 4] x) => (float[3, 4] y)
        { h = Relu(x)
          y = If<then_branch = yes () => (float[3, 4] a) { a = Tan(h) },
                 else_branch = no () => (float[3, 4] b) { b = Exp(h) }>(which) }"""
    )
    result, notes = legal(model)
    assert not notes
    assert not placed(result).fallbacks
    for which in (True, False):
        feeds = {"which": np.array(which), "x": rng.normal(size=(3, 4)).astype(np.float32)}
        for have, want in zip(run(result, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-5)


def test_portable_leaves_the_model_alone() -> None:
    compiled = onnx_attrib.compile(parsed(MODEL), "gradient")
    assert {"Tan", "Celu", "Mean"} <= {node.op_type for node in compiled.graph.node}
    with pytest.raises(OptionError, match="neither portable nor cuda"):
        onnx_attrib.compile(parsed(MODEL), "gradient", provider="tensorrt")
