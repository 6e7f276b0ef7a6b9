"""precision="fp16": the same interface, and nearly the same numbers."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib import Explainer, OptionError
from onnx_attrib.cli import main
from onnx_attrib.passes.precision import halve
from onnx_attrib.protos import subgraphs
from onnx_attrib.verify import verify

MODELS = Path(__file__).parent.parent / "models"
CPU = ["CPUExecutionProvider"]
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def model(text: str, **weights: np.ndarray) -> ModelProto:
    made = onnx.parser.parse_model(f"{HEAD} {text}")
    for name, array in weights.items():
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.checker.check_model(made, full_check=True)
    return made


def network(rng: np.random.Generator) -> ModelProto:
    """Conv → ReLU → residual Conv → GELU-like product → pooling → Dense → Sigmoid → Dense."""
    size = int(rng.integers(3, 7))
    return model(
        """g (float[N, 2, 9, 9] x) => (float[N, 4] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, k, kb)
            b = Relu (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, l)
            d = Add (b, c)
            s = Sigmoid (d)
            e = Mul (d, s)
            p = MaxPool <kernel_shape = [3, 3], strides = [3, 3]> (e)
            f = Flatten (p)
            h = Gemm <transB = 1> (f, m, mb)
            t = Tanh (h)
            y = Gemm (t, o, ob)
        }""",
        k=rng.normal(size=(size, 2, 3, 3)) / 4,
        kb=rng.normal(size=size) / 4,
        l=rng.normal(size=(size, size, 3, 3)) / 6,
        m=rng.normal(size=(5, size * 9)) / 6,
        mb=rng.normal(size=5),
        o=rng.normal(size=(5, 4)),
        ob=rng.normal(size=4),
    )


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from nodes_of(inner)


def kinds(made: ModelProto) -> dict[str, set[int]]:
    """The float types that each kind of node computes in, subgraphs included."""
    found: dict[str, set[int]] = {}

    def walk(graph: GraphProto, known: dict[str, int]) -> None:
        known = dict(known)
        known.update((t.name, t.data_type) for t in graph.initializer)
        for info in (*graph.input, *graph.value_info, *graph.output):
            known[info.name] = info.type.tensor_type.elem_type
        for node in graph.node:
            types = {known.get(name, 0) for name in (*node.input, *node.output) if name}
            types &= {TensorProto.FLOAT, TensorProto.FLOAT16}
            if node.op_type != "Cast":
                found.setdefault(node.op_type, set()).update(types)
            for inner in subgraphs(node):
                walk(inner, known)

    walk(onnx.shape_inference.infer_shapes(made).graph, {})
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient-x-input": {},
    "guided-backprop": {},
    "grad-cam": {},
    "epsilon-lrp": {},
    "lrp": {"composite": "epsilon-plus-flat"},
    "deeplift": {"delta": True},
    "integrated-gradients": {"steps": 9, "chunk": 2, "delta": True},
    "smoothgrad": {"samples": 6, "chunk": 4},
    "deep-shap": {"baseline": "input", "delta": True},
    "expected-gradients": {"samples": 8, "chunk": 4, "baseline": "input"},
    "occlusion": {"window": "2,3,3", "stride": "1,3,3"},
    "shapley-sampling": {"window": "2,3,3", "samples": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_close_to_float32(method: str, rng: np.random.Generator) -> None:
    source, options = network(rng), METHODS[method]
    full = Explainer(onnx_attrib.compile(source, method, **options), CPU)
    made = onnx_attrib.compile(source, method, precision="fp16", **options)
    onnx.checker.check_model(made, full_check=True)
    half = Explainer(made, CPU)
    x = rng.normal(size=(6, 2, 9, 9)).astype(np.float32)
    given = {"baseline": rng.normal(size=(3, 2, 9, 9))} if full.baselines else {}
    a, b = (e(x, target=[0, 1, 2, 3, -1, 2], **given) for e in (half, full))
    assert a.attributions["x"].dtype == np.float32
    assert relative(a.outputs["y"], b.outputs["y"]) < 3e-3
    # A ReLU or a pool turns where two numbers differ by less than float16 shows, and with it the
    # attribution of that sample, by as much as the path weighs: rare, so most samples have none.
    pairs = zip(a.attributions["x"], b.attributions["x"], strict=True)
    assert np.median([relative(*pair) for pair in pairs]) < 2e-2
    near = (
        np.abs(a.attributions["x"] - b.attributions["x"]) < 0.01 * np.abs(b.attributions["x"]).max()
    )
    assert near.mean() > 0.9
    if options.get("delta") and method != "integrated-gradients":
        sizes = np.abs(b.attributions["x"]).sum(axis=(1, 2, 3))
        assert (np.abs(a.delta) < 2e-3 * sizes).all()
    assert [port.dtype for port in half.inputs] == [port.dtype for port in full.inputs]


def test_what_is_computed_in_float16() -> None:
    made = onnx_attrib.compile(
        network(np.random.default_rng(1)), "deeplift", precision="fp16", baseline="input"
    )
    found = kinds(made)
    half, full = TensorProto.FLOAT16, {TensorProto.FLOAT}
    for op in ("Conv", "Add", "Gemm"):
        assert half in found[op], op
    for op in ("Div", "Sub", "Mul", "Sigmoid", "Tanh", "ReduceSum"):
        assert found.get(op, full) == full, op
    # The layer that the explained output comes from stays in float32.
    last = next(node for node in made.graph.node if "y" in node.output)
    assert (last.op_type, last.input[1]) == ("Gemm", "o")


def test_weights_take_half_the_space() -> None:
    for method in ("gradient", "deeplift", "integrated-gradients", "occlusion"):
        full = onnx_attrib.compile(MODELS / "mnist_cnn.onnx", method)
        half = onnx_attrib.compile(MODELS / "mnist_cnn.onnx", method, precision="fp16")
        assert half.ByteSize() < 0.6 * full.ByteSize(), method


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_multipliers_out_of_range(scale: float) -> None:
    """Gradients that float16 itself cannot hold, of rows of very different size."""
    rng = np.random.default_rng(3)
    source = model(
        """g (float[N, 6] x) => (float[N, 3] y)
        { a = MatMul (x, v) b = Tanh (a) c = MatMul (b, w) d = Tanh (c) y = Mul (d, s) }""",
        v=rng.normal(size=(6, 5)) / 3,
        w=rng.normal(size=(5, 3)) / 3,
        s=np.array([1.0, scale, -scale]),
    )
    x = rng.normal(size=(3, 6)).astype(np.float32)
    a, b = (
        Explainer(onnx_attrib.compile(source, "gradient", precision=p), CPU)(x, target=[0, 1, 2])
        for p in ("fp16", "keep")
    )
    for one, other in zip(a.attributions["x"], b.attributions["x"], strict=True):
        assert relative(one, other) < 5e-3
    assert np.isfinite(b.attributions["x"]).all()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_inputs_out_of_range(scale: float) -> None:
    rng = np.random.default_rng(4)
    source = model(
        """g (float[N, 3, 8] x) => (float[N, 2] y) <int64[1] axes = {2}>
        { n = Mul (x, one) a = Conv <pads = [1, 1]> (n, v, c) t = Mul (a, s) b = Tanh (t)
        m = ReduceMean <axes = [2], keepdims = 0> (b) y = MatMul (m, w) }""",
        one=np.ones(1),
        v=rng.normal(size=(4, 3, 3)),
        c=rng.normal(size=4) * scale,
        s=np.array([0.3 / scale]),
        w=rng.normal(size=(4, 2)),
    )
    x = (scale * rng.normal(size=(3, 3, 8))).astype(np.float32)
    a, b = (
        Explainer(onnx_attrib.compile(source, "deeplift", precision=p, delta=True), CPU)(x)
        for p in ("fp16", "keep")
    )
    assert relative(a.outputs["y"], b.outputs["y"]) < 3e-3
    assert relative(a.attributions["x"], b.attributions["x"]) < 1e-2


def test_weights_out_of_range_stay() -> None:
    source = model(
        """g (float[N, 2] x) => (float[N, 2] y)
        { a = MatMul (x, v) b = MatMul (a, w) y = MatMul (b, v) }""",
        v=np.eye(2),
        w=np.array([[1e6, 0], [0, 1]]),
    )
    made = onnx_attrib.compile(source, "gradient", precision="fp16", target=0)
    result = Explainer(made, CPU)([[1, 2]])
    np.testing.assert_allclose(result.attributions["x"], [[1e6, 0]])
    np.testing.assert_allclose(result.outputs["y"], [[1e6, 2]])


def test_transposed_weights_out_of_range_stay() -> None:
    source = model(
        """g (float[N, 2] x) => (float[N, 2] y)
        { t = Transpose (w) a = MatMul (x, v) h = Tanh (a) b = MatMul (h, t) y = MatMul (b, o) }""",
        v=np.eye(2),
        w=np.array([[1e6, 0], [0, 1]]),
        o=np.eye(2)[::-1],
    )
    x = np.array([[0.5, -0.25]], np.float32)
    for method in ("gradient", "deeplift"):
        made = onnx_attrib.compile(source, method, precision="fp16", target=1)
        full = Explainer(onnx_attrib.compile(source, method, target=1), CPU)(x)
        half = Explainer(made, CPU)(x)
        np.testing.assert_allclose(half.attributions["x"], full.attributions["x"], rtol=2e-3)


def test_attention() -> None:
    """Products of two variables: rows of one are scaled, and columns of the other."""
    rng = np.random.default_rng(5)
    source = model(
        """g (float[N, 5, 8] x) => (float[N, 3] y) {
            q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (q, kt)
            p = Softmax <axis = -1> (s)
            h = MatMul (p, v)
            r = Add (x, h)
            m = ReduceMean <axes = [1], keepdims = 0> (r)
            y = MatMul (m, wo)
        }""",
        **{name: rng.normal(size=(8, 8)) / 3 for name in ("wq", "wk", "wv")},
        wo=rng.normal(size=(8, 3)),
    )
    x = rng.normal(size=(4, 5, 8)).astype(np.float32)
    for method in ("gradient", "deeplift", "integrated-gradients"):
        full = Explainer(onnx_attrib.compile(source, method), CPU)(x, target=1)
        made = onnx_attrib.compile(source, method, precision="fp16")
        assert kinds(made)["Softmax"] == {TensorProto.FLOAT}
        assert TensorProto.FLOAT16 in kinds(made)["MatMul"]
        half = Explainer(made, CPU)(x, target=1)
        assert relative(half.attributions["x"], full.attributions["x"]) < 1e-2


def test_bodies_of_the_model() -> None:
    """Layers in a Loop of the model's own; two bodies may use the same names."""
    w = numpy_helper.from_array((np.eye(3) * 0.5 + 0.1).astype(np.float32), "w")

    def body(kind: str) -> GraphProto:
        number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
        flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
        state = helper.make_tensor_value_info("s", TensorProto.FLOAT, ["N", 3])
        end = helper.make_tensor_value_info("e", TensorProto.FLOAT, ["N", 3])
        out = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
        steps = [
            helper.make_node("Identity", ["c"], ["d"]),
            helper.make_node("MatMul", ["s", "w"], ["m"]),
            helper.make_node(kind, ["m"], ["r"]),
            helper.make_node("MatMul", ["r", "w"], ["n"]),
            helper.make_node("Add", ["n", "first"], ["e"]),
        ]
        return helper.make_graph(steps, "body", [number, flag, state], [out, end])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"]),
        helper.make_node("Loop", ["count", "", "first"], ["a"], body=body("Relu")),
        helper.make_node("Loop", ["count", "", "a"], ["b"], body=body("Tanh")),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    source = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
            [w, numpy_helper.from_array(np.array(3), "count")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    x = np.random.default_rng(6).normal(size=(4, 3)).astype(np.float32)
    for method in ("gradient", "deeplift"):
        full = Explainer(onnx_attrib.compile(source, method), CPU)(x, target=1)
        made = onnx_attrib.compile(source, method, precision="fp16")
        onnx.checker.check_model(made, full_check=True)
        half = Explainer(made, CPU)(x, target=1)
        assert relative(half.outputs["y"], full.outputs["y"]) < 3e-3
        assert relative(half.attributions["x"], full.attributions["x"]) < 1e-2


def test_nothing_to_halve() -> None:
    source = model("g (float[N, 3] x) => (float[N, 3] y) { y = Tanh (x) }")
    made = onnx_attrib.compile(source, "gradient", target=0)
    same = halve(made, [], "y")
    assert [node.op_type for node in same.graph.node] == [n.op_type for n in made.graph.node]
    ort.InferenceSession(same.SerializeToString(), providers=CPU)


def test_recipe_and_refusal() -> None:
    source = MODELS / "mnist_mlp.onnx"
    assert Explainer(onnx_attrib.compile(source, precision="fp16"), CPU).recipe.precision == "fp16"
    assert Explainer(onnx_attrib.compile(source), CPU).recipe.precision == "keep"
    with pytest.raises(OptionError, match="precision 'int8' is neither keep nor fp16"):
        onnx_attrib.compile(source, precision="int8")


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_verify(method: str) -> None:
    found = verify(MODELS / "mnist_cnn.onnx", method, precision="fp16", samples=2)
    assert found.ok, found


def test_the_command_reports_the_deviation(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    command = ["compile", str(MODELS / "mnist_mlp.onnx"), "--precision", "fp16", "-o", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "float16     attributions within" in done.output
    report = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
    assert report["precision"] == "fp16"
    assert 0 < report["deviation"]["outputs"] < 3e-3
    assert 0 < report["deviation"]["attributions"]["image_attribution"] < 0.2
    assert report["nodes"] == len(onnx.load(out).graph.node)
    plain = json.loads(CliRunner().invoke(main, [*command[:2], "-o", str(out), "--json"]).output)
    assert (plain["precision"], plain["deviation"]) == ("keep", None)


@pytest.mark.parametrize("method", ["gradient", "deeplift", "integrated-gradients", "occlusion"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_recurrent_networks(cell: str, method: str, rng: np.random.Generator) -> None:
    """In a process of its own: ONNX Runtime 1.31 crashes on some graphs of float16 around cells."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    width, hidden = (int(n) for n in rng.integers(2, 6, 2))
    source = model(
        f"""g (float[N, 6, {width}] x) => (float[N, 3] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] size = {{{hidden}}}> {{
            t = Transpose <perm = [1, 0, 2]> (x)
            b = Shape <start = 1, end = 2> (t)
            d = Concat <axis = 0> (one, b, size)
            z = ConstantOfShape (d)
            s, h = {cell} <hidden_size = {hidden}> (t, w, r, , , z)
            l = Squeeze (h, zero)
            y = MatMul (l, v)
        }}""",
        w=rng.normal(size=(1, gates * hidden, width)) / 2,
        r=rng.normal(size=(1, gates * hidden, hidden)) / 2,
        v=rng.normal(size=(hidden, 3)),
    )
    x = rng.normal(size=(5, 6, width)).astype(np.float32)
    full, half = (onnx_attrib.compile(source, method, precision=p) for p in ("keep", "fp16"))
    expected = Explainer(full, CPU)(x, target=1).attributions["x"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_explained, half.SerializeToString(), x).result()
    errors = [relative(*pair) for pair in zip(found, expected, strict=True)]
    assert np.median(errors) < 2e-2


def _explained(half: bytes, x: np.ndarray) -> np.ndarray:
    return Explainer(half, CPU)(x, target=1).attributions["x"]
