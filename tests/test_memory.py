"""memory=MIB: as many evaluations at once as fit, estimated and then measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib import Explainer, OptionError
from onnx_attrib.cli import main
from onnx_attrib.compiler import prepare
from onnx_attrib.ir import Graph
from onnx_attrib.memory import memory_of
from onnx_attrib.passes.bound import _BESIDE, executed, peak

from .marks import measures_memory

CPU = ["CPUExecutionProvider"]
MIB = 2**20
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def cnn(size: int, width: int, depth: int) -> ModelProto:
    """Convolutions of one size: an activation of a sample takes 4 · width · size² bytes."""
    rng = np.random.default_rng(0)
    nodes, weights, last, channels = [], [], "x", 3
    for i in range(depth):
        w = rng.standard_normal((width, channels, 3, 3)) / np.sqrt(9 * channels)
        weights.append(numpy_helper.from_array(w.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        last, channels = f"t{i}", width
        nodes.append(helper.make_node(("Sigmoid", "Relu")[i % 2], [f"c{i}"], [last]))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


METHODS: dict[str, dict[str, Any]] = {
    "integrated-gradients": {"steps": 64},
    "smoothgrad": {"samples": 64},
    "expected-gradients": {"samples": 64},
    "deep-shap": {"baseline": np.zeros((64, 3, 64, 64), np.float32)},
    "occlusion": {"window": "3,8,8", "stride": "1,4,4"},
    "shapley-sampling": {"window": "3,16,16", "samples": 8},
}


def chunk_of(model: ModelProto) -> int:
    return int(Explainer(model, CPU).options["chunk"])


@measures_memory
@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_takes(method: str, tmp_path: Path) -> None:
    """Peaks of resident memory in a process of its own, for two bounds."""
    source, x = cnn(64, 16, 4), np.random.default_rng(1).random((1, 3, 64, 64), np.float32)
    chunks, taken = [], []
    for bound in (16, 64):
        made = onnx_attrib.compile(source, method, target=0, memory=bound, **METHODS[method])
        onnx.save(made, tmp_path / "m.onnx")
        measured = memory_of(str(tmp_path / "m.onnx"), {"x": x}, 1)
        assert measured is not None
        chunks.append(chunk_of(made))
        taken.append(measured.run / MIB)
        assert taken[-1] < bound
    assert 2.5 < chunks[1] / chunks[0] < 6
    assert taken[0] > 16 / 3
    assert taken[1] > 64 / 3


@measures_memory
@pytest.mark.parametrize("number", range(4))
def test_the_bound_holds(rng: np.random.Generator, number: int, tmp_path: Path) -> None:
    """Networks, batches and bounds as they come; the class is chosen, or S seeded."""
    size, width = (int(v) for v in rng.integers((24, 5), (80, 40)))
    source, batch = cnn(size, width, int(rng.integers(2, 6))), int(rng.integers(1, 7))
    method = ("integrated-gradients", "smoothgrad")[number % 2]
    options = {"steps": 100} if number % 2 == 0 else {"samples": 100}
    least = batch * size**2 * width * 4 * 12 / MIB
    bound = float(rng.uniform(least + 3, 3 * least + 6))
    made = onnx_attrib.compile(
        source, method, target="argmax", memory=bound, dims={"N": batch}, **options
    )
    onnx.save(made, tmp_path / "m.onnx")
    x = rng.random((batch, 3, size, size), np.float32)
    measured = memory_of(str(tmp_path / "m.onnx"), {"x": x}, 1)
    assert measured is not None
    assert measured.run / MIB < bound, (size, width, batch, chunk_of(made))


@pytest.mark.parametrize("method", ["integrated-gradients", "deep-shap", "occlusion"])
def test_the_result_is_the_same(method: str) -> None:
    source = cnn(8, 4, 2)
    options: dict[str, Any] = {
        "integrated-gradients": {"steps": 9},
        "deep-shap": {"baseline": np.random.default_rng(2).random((7, 3, 8, 8), np.float32)},
        "occlusion": {"window": "3,2,2"},
    }[method]
    x = np.random.default_rng(3).random((3, 3, 8, 8), np.float32)
    expected = Explainer(onnx_attrib.compile(source, method, **options), CPU)(x, target=1)
    for memory in (1.6, 1.7, 1000):
        made = onnx_attrib.compile(source, method, memory=memory, **options)
        found = Explainer(made, CPU)(x, target=1)
        np.testing.assert_allclose(
            found.attributions["x"], expected.attributions["x"], rtol=1e-4, atol=1e-7
        )


def test_the_batch_counts() -> None:
    source = cnn(32, 8, 3)
    one = onnx_attrib.compile(source, "smoothgrad", samples=1000, memory=8)
    four = onnx_attrib.compile(source, "smoothgrad", samples=1000, memory=8, dims={"N": 4})
    assert 3 <= chunk_of(one) / chunk_of(four) <= 5
    assert chunk_of(onnx_attrib.compile(source, "smoothgrad", samples=10, memory=9999)) == 10


@pytest.mark.parametrize("batch", ["N", "3"])
def test_one_evaluation_is_the_least(batch: str) -> None:
    """What cannot be kept is refused, whether evaluations can be stacked or not."""
    source = cnn(32, 8, 3)
    if batch != "N":
        source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = int(batch)
        source.graph.output[0].type.tensor_type.shape.dim[0].dim_value = int(batch)
    said = r"integrated-gradients takes about \d+ MiB for one evaluation of one sample, more than"
    with pytest.raises(OptionError, match=said):
        prepare(source, "integrated-gradients", memory=0.5)
    needed = onnx_attrib.compile(source, "integrated-gradients", memory=5)
    assert chunk_of(needed) >= 1


def test_several_methods_have_chunks_of_their_own() -> None:
    made = onnx_attrib.compile(
        cnn(32, 8, 3), {"integrated-gradients": {}, "occlusion": {}, "gradient": {}}, memory=3
    )
    options = Explainer(made, CPU).options
    assert options["integrated-gradients"]["chunk"] != 10
    assert options["occlusion"]["chunk"] > options["integrated-gradients"]["chunk"]


OPEN = f"""{HEAD} g (float[N, T] x) => (float[N, T] y) {{ h = Sin (x)  y = Tanh (h) }}"""


def test_open_dimensions() -> None:
    source = onnx.parser.parse_model(OPEN)

    def chunk(dims: Mapping[str, int]) -> int:
        return chunk_of(
            onnx_attrib.compile(
                source, "smoothgrad", target=0, memory=2.5, dims=dims, samples=10**5
            )
        )

    assert 9 < chunk({"T": 100}) / chunk({"T": 1000}) < 11
    with pytest.raises(OptionError, match=r"size of 'T': give it \(--dim T=SIZE\)"):
        chunk({})
    with pytest.raises(OptionError, match="no open dimension 'M'"):
        chunk({"M": 3, "T": 5})


def test_refused() -> None:
    source = cnn(8, 4, 2)
    with pytest.raises(OptionError, match=r"evaluate in chunks: .*occlusion"):
        onnx_attrib.compile(source, "deeplift", memory=10)
    with pytest.raises(OptionError, match="memory must be a number of MiB above 0"):
        onnx_attrib.compile(source, "occlusion", memory=0)


def test_command(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(OPEN), tmp_path / "m.onnx")
    command = ["compile", str(tmp_path / "m.onnx"), "--method", "smoothgrad", "--target", "0"]
    command += ["--memory", "2", "--json"]
    done = CliRunner().invoke(main, [*command, "--dim", "T=5000"])
    assert done.exit_code == 0, done.output
    assert 1 <= json.loads(done.output)["methods"]["smoothgrad"]["chunk"] <= 5
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "--dim T=SIZE" in done.output


def parsed(text: str) -> Graph:
    model = onnx.parser.parse_model(text.replace(": 17", ": 21"))
    return Graph(onnx.shape_inference.infer_shapes(model))


def twice(taken: int) -> tuple[int, int]:
    """At least and at most."""
    return _BESIDE + taken, _BESIDE + taken


def test_live_tensors() -> None:
    """Counted by hand, in tensors of [10, 4]: what is alive, a copy of an operand, three sums."""
    text = f"""{HEAD} g (float[N, 4] x, int64 i) => (float[N, 4] e) <int64[2] to = {{-1, 4}}> {{
        a = Exp (x)  b = Exp (a)  c = Add (a, b)  d = Reshape (c, to)  e = Exp (d) }}"""
    graph, sizes = parsed(text), {"N": 10}
    assert peak(graph, [], graph.nodes, graph.outputs, sizes) == twice((3 + 1 + 3) * 160)
    # What a step reads of what does not depend on it stays all the time: b, not a.
    hoisted = f"""{HEAD} g (float[N, 4] x, float[N, 4] i) => (float[N, 4] e) {{
        a = Exp (x)  b = Exp (a)  c = Add (b, i)  d = Exp (c)  f = Exp (d)  e = Mul (f, b) }}"""
    graph = parsed(hoisted)
    found = peak(graph, graph.nodes[:2], graph.nodes[2:], graph.outputs, sizes)
    assert found == twice((2 + 1 + 3 + 1) * 160)
    # Constants are there anyway; an activation goes where its convolution is.
    folding = f"""{HEAD} g (float[N, 1, 4] x) => (float[N, 1, 4] y) <float[1, 1, 1] w = {{2}}> {{
        v = Exp (w)  c = Conv (x, v)  r = Relu (c)  y = Exp (r) }}"""
    graph = parsed(folding)
    assert peak(graph, [], graph.nodes, graph.outputs, sizes) == twice((2 + 1 + 3) * 160)


def test_order_of_execution() -> None:
    """From the last node backwards, and of what a node reads first what stands last."""
    text = f"""{HEAD} g (float[N] x) => (float[N] e, float[N] f) {{
        a = Exp (x)  b = Exp (x)  c = Exp (a)  e = Add (c, b)  f = Exp (b) }}"""
    graph = parsed(text)
    assert [node.outputs[0].name for node in executed(graph, graph.nodes)] == list("bface")


def test_sums_of_convolutions() -> None:
    """A convolution that adds a sum itself waits for it; else all come before the first sum."""
    text = f"""{HEAD} g (float[N, 1, 4] x) => (float[N, 1, 4] y) <float[1, 1, 1] w = {{2}}> {{
        a = Exp (x)  b = Conv (a, w)  r = Add (b, a)  c = Conv (a, w)  s = Add (c, r)
        d = Conv (a, w)  t = Add (d, s)  y = Exp (t) }}"""
    graph = parsed(text)
    graph.stated = set("rst")
    # r, s, c, a at s, or r, a, b, c, d at r; a copy of an operand, three sums.
    expected = tuple(_BESIDE + (alive + 1 + 3) * 160 for alive in (4, 5))
    assert peak(graph, [], graph.nodes, graph.outputs, {"N": 10}) == expected
