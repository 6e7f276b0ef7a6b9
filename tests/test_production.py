"""Explainer where it is used in earnest: devices, threads, shared sessions, large batches."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

import onnx_attrib
from onnx_attrib import CompileError, Explainer, OptionError, shared
from onnx_attrib.batches import ShortageError, in_parts, is_shortage
from onnx_attrib.capture import check_capturable, with_capture
from onnx_attrib.device import Captured
from onnx_attrib.model_io import save
from onnx_attrib.session import port_of

MODELS = Path(__file__).parent.parent / "models"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
CPU = ["CPUExecutionProvider"]
TANH = f"""{HEAD}
g (float[N, 3] x) => (float[N, 2] y)
<float[3, 2] w = {{1, -2, 0.5, 1, 2, -1}}> {{ h = MatMul (x, w)  y = Tanh (h) }}
"""


def compiled(text: str = TANH, method: str = "gradient", **options: Any) -> ModelProto:
    return onnx_attrib.compile(onnx.parser.parse_model(text), method, **options)


def values(array: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((7, 3)).astype(np.float32)


class Foreign:
    """A tensor that follows the DLPack protocol and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


# -- what stays where it is ------------------------------------------------------------------------


def test_ortvalues_in_and_out(x: np.ndarray) -> None:
    explain = Explainer(compiled(method="deeplift", baseline="input", delta=True), CPU)
    base = x[::-1] / 2
    targets = np.arange(7) % 2
    expected = explain(x, target=targets, baseline=base)
    held = values(x)
    result = explain(held, target=values(targets), baseline=values(base), outputs="ortvalue")
    assert result.inputs["x"] is held
    assert result.target is result.score is result.prediction is None
    pairs = [
        (result.attributions["x"], expected.attributions["x"]),
        (result.outputs["y"], expected.outputs["y"]),
        (result.delta, expected.delta),
        (result.by_method["deeplift"]["x"], expected.attributions["x"]),
    ]
    for value, array in pairs:
        assert isinstance(value, ort.OrtValue)
        np.testing.assert_array_equal(value.numpy(), array)
        np.testing.assert_array_equal(np.from_dlpack(value), array)
    back = explain(result.attributions["x"], target=values(targets), baseline={"x": base})
    np.testing.assert_array_equal(back.target, targets)
    np.testing.assert_array_equal(
        back.outputs["y"], explain(expected.attributions["x"], baseline=base).outputs["y"]
    )
    assert back.score is not None


def test_outputs_outlive_session_and_inputs(x: np.ndarray) -> None:
    explain = Explainer(compiled(), CPU)
    expected = explain(x, target=1).attributions["x"]
    result = explain(x.copy(), target=1, outputs="ortvalue")
    value = result.attributions["x"]
    view = np.from_dlpack(value)
    del explain, result, value
    gc.collect()
    np.testing.assert_array_equal(view, expected)


def test_a_seed_that_stays(x: np.ndarray) -> None:
    explain = Explainer(compiled(target="seed"), CPU)
    seed = x[:, :2].copy()
    result = explain(values(x), seed=values(seed))
    expected = explain(x, seed=seed)
    np.testing.assert_array_equal(result.attributions["x"], expected.attributions["x"])
    np.testing.assert_array_equal(result.score, expected.score)


def test_foreign_tensors_on_the_host(x: np.ndarray) -> None:
    explain = Explainer(compiled(method="deeplift", baseline="input"), CPU)
    wide = x.astype(np.float64)
    result = explain(Foreign(wide), target=Foreign(np.ones(7, int)), baseline=Foreign(wide[:1]))
    expected = explain(x, target=1, baseline=x[:1])
    np.testing.assert_array_equal(result.attributions["x"], expected.attributions["x"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3)), r"x is float64 \[2, 3\]; the model takes float32 \[N, 3\]"),
        (np.zeros((2, 4), np.float32), r"x is float32 \[2, 4\]"),
        (np.zeros(3, np.float32), r"x is float32 \[3\]"),
    ],
)
def test_residents_are_taken_as_they_are(given: np.ndarray, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Explainer(compiled(), CPU)(values(given))


def test_a_tensor_that_cannot_be_read(x: np.ndarray) -> None:
    class Far(Foreign):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **options: Any) -> Any:
            assert options == {"stream": 1}  # its producer's work must have come to an end
            raise RuntimeError("it is too far")

    with pytest.raises(OptionError, match="x cannot be read where it is: it is too far"):
        Explainer(compiled(), CPU)(Far(x))


def test_unknown_outputs(x: np.ndarray) -> None:
    with pytest.raises(OptionError, match="neither numpy nor ortvalue"):
        Explainer(compiled(), CPU)(x, outputs="torch")  # type: ignore[arg-type]


@pytest.mark.slow
def test_torch(x: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    explain = Explainer(compiled(), CPU)
    expected = explain(x, target=0).attributions["x"]
    for tensor in (torch.from_numpy(x), torch.from_numpy(x).double()):
        result = explain(tensor, target=torch.zeros(7, dtype=torch.int64), outputs="ortvalue")
        np.testing.assert_array_equal(torch.from_dlpack(result.attributions["x"]), expected)
    with pytest.raises(OptionError, match="x is not an array"):
        explain(torch.from_numpy(x).requires_grad_())
    narrow = f"{HEAD} g (bfloat16[N, 3] x) => (bfloat16[N, 3] y) {{ y = Identity (x) }}"
    explain = Explainer(compiled(narrow), CPU)
    tensor = torch.from_numpy(x).bfloat16()
    result = explain(tensor, target=0, outputs="ortvalue")
    assert torch.equal(torch.from_dlpack(result.outputs["y"]), tensor)
    assert explain(tensor, target=0).outputs["y"].dtype.name == "bfloat16"


# -- sessions --------------------------------------------------------------------------------------


def test_sessions_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(compiled(), path)
    first, second = Explainer(path, CPU), Explainer(str(path), CPU)
    assert first._session is second._session
    assert Explainer(path, CPU, threads=1)._session is not first._session
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    own = Explainer(path, CPU, session_options=options)
    assert own._session is not first._session
    assert own._session.get_session_options().intra_op_num_threads == 1
    assert Explainer(onnx.load(path), CPU)._session is not first._session


def test_a_changed_file_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    save(compiled(), path)
    first = Explainer(path, CPU)
    save(compiled(method="saliency"), path)
    second = Explainer(path, CPU)
    assert (first.method, second.method) == ("gradient", "saliency")
    assert Explainer(path, CPU)._session is second._session
    # Weights beside the file, which stays the same when they change.
    monkeypatch.setattr("onnx_attrib.model_io.PROTOBUF_LIMIT", 10)
    path = tmp_path / "beside.onnx"
    save(onnx_attrib.compile(MODELS / "mnist_mlp.onnx", "gradient"), path)
    before = Explainer(path, CPU)
    assert Explainer(path, CPU)._session is before._session
    data = tmp_path / "beside.onnx.data"
    content = np.frombuffer(data.read_bytes(), np.float32) * 2
    status = path.stat()
    data.write_bytes(content.tobytes())
    os.utime(data, ns=(status.st_mtime_ns + 10**9, status.st_mtime_ns + 10**9))
    after = Explainer(path, CPU)
    assert after._session is not before._session
    image = np.ones((1, 1, 28, 28), np.float32)
    assert not np.array_equal(after(image).outputs["logits"], before(image).outputs["logits"])


def test_sessions_end_with_their_explainers(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(compiled(), path)
    explain = Explainer(path, CPU)
    alive = weakref.ref(explain._session)
    del explain
    gc.collect()
    assert alive() is None
    Explainer(path, CPU)


def test_few_sessions_are_remembered(tmp_path: Path) -> None:
    model, held = compiled(), []
    for i in range(shared._LIMIT + 3):
        save(model, tmp_path / f"{i}.onnx")
        held.append(Explainer(tmp_path / f"{i}.onnx", CPU))
    assert len(shared._slots) == shared._LIMIT
    assert Explainer(tmp_path / "0.onnx", CPU)._session is not held[0]._session
    assert Explainer(tmp_path / f"{i}.onnx", CPU)._session is held[-1]._session


def test_settings() -> None:
    model = compiled()
    options = ort.SessionOptions()
    with pytest.raises(OptionError, match="threads or session_options, not both"):
        Explainer(model, CPU, threads=1, session_options=options)
    for threads in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="threads must be a whole number"):
            Explainer(model, CPU, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="max_batch must be a whole number"):
        Explainer(model, CPU, max_batch=0)
    chosen = Explainer(model, [("CPUExecutionProvider", {"arena_extend_strategy": "1"})])
    assert chosen.providers == CPU
    assert Explainer(model, CPU, threads=1)._session.get_session_options().intra_op_num_threads == 1


def test_threads(tmp_path: Path, rng: np.random.Generator) -> None:
    """One explainer, and explainers of one file, from many threads, on batches of several sizes."""
    path = tmp_path / "m.onnx"
    save(compiled(method="integrated-gradients", steps=7, chunk=2), path)
    batches = [rng.standard_normal((n % 5 + 1, 3)).astype(np.float32) for n in range(60)]
    one = Explainer(path, CPU, threads=1)
    expected = [one(batch, target=0).attributions["x"] for batch in batches]
    barrier = threading.Barrier(6)

    def work(worker: int) -> list[np.ndarray]:
        barrier.wait()
        own = Explainer(path, CPU, threads=1, max_batch=2 if worker % 2 else None)
        found = []
        for batch in batches:
            given = values(batch) if worker % 3 == 0 else batch
            user = own if worker % 2 else one
            found.append(user(given, target=np.zeros(len(batch), int)).attributions["x"])
        return found

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(work, range(6)):
            for value, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


# -- large batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("rows", [1, 7])
def test_parts_of_a_batch(size: int, rows: int, x: np.ndarray) -> None:
    model = compiled(method="deeplift", baseline="input", delta=True)
    base = x[:rows] * 0.5
    targets = np.arange(7) % 2
    whole = Explainer(model, CPU)(x, target=targets, baseline=base)
    parts = Explainer(model, CPU, max_batch=size)(x, target=targets, baseline=base)
    for a, b in (
        (parts.attributions["x"], whole.attributions["x"]),
        (parts.outputs["y"], whole.outputs["y"]),
        (parts.delta, whole.delta),
        (parts.score, whole.score),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["deep-shap", "gradient"])
def test_parts_keep_backgrounds_and_targets(method: str, x: np.ndarray) -> None:
    options: dict[str, Any] = {"baseline": "input"} if method == "deep-shap" else {}
    model = compiled(method=method, targets="top2", **options)
    # A background of as many samples as the batch has.
    given = {"baseline": x[::-1] + 1} if options else {}
    whole = Explainer(model, CPU)(x, **given)
    parts = Explainer(model, CPU, max_batch=3)(x, **given)
    assert parts.attributions["x"].shape == (7, 2, 3)
    np.testing.assert_allclose(parts.attributions["x"], whole.attributions["x"], atol=1e-6)


def test_the_batch_behind_another_axis(x: np.ndarray) -> None:
    text = f"""{HEAD} g (float[3, N] x) => (float[N, 3] y) {{ t = Transpose (x)  y = Tanh (t) }}"""
    model = compiled(text)
    whole = Explainer(model, CPU)(x.T, target=1)
    parts = Explainer(model, CPU, max_batch=2)(x.T, target=1)
    np.testing.assert_array_equal(parts.attributions["x"], whole.attributions["x"])
    np.testing.assert_array_equal(parts.outputs["y"], whole.outputs["y"])


def test_an_empty_batch() -> None:
    result = Explainer(compiled(), CPU, max_batch=2)(np.zeros((0, 3)), target=np.zeros(0, int))
    assert result.attributions["x"].shape == (0, 3)


def test_outputs_without_a_batch(x: np.ndarray) -> None:
    text = f"""{HEAD} g (float[N, 3] x) => (float[N, 3] y, float[3] z)
    <float[3] w = {{1, 2, 3}}> {{ y = Tanh (x)  z = KIND }}"""
    fixed = Explainer(compiled(text.replace("KIND", "Identity (w)")), CPU, max_batch=2)(x)
    np.testing.assert_array_equal(fixed.outputs["z"], [1, 2, 3])
    model = compiled(text.replace("KIND", "ReduceMax <axes = [0], keepdims = 0> (x)"))
    with pytest.raises(OptionError, match="output 'z' has no batch axis"):
        Explainer(model, CPU, max_batch=2)(x)
    assert not Explainer(model, CPU).recipe.apart


MIXED = f"""{HEAD} g (float[N, 3] x) => (float[N, 3] y)
{{ m = ReduceMean <axes = [0], keepdims = 1> (x)  c = Sub (x, m)  y = Tanh (c) }}"""


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        (TANH, True),
        (MIXED, False),
        (TANH.replace("[N,", "[4,"), False),
        (TANH.replace("Tanh (h)", "Softmax <axis = 0> (h)"), False),
        (TANH.replace("Tanh (h)", "Softmax <axis = 1> (h)"), True),
    ],
)
def test_whether_samples_are_apart(text: str, apart: bool) -> None:
    assert Explainer(compiled(text), CPU).recipe.apart is apart


class Small:
    """A session with memory for a few samples only."""

    def __init__(self, session: Any, room: int) -> None:
        self._session, self._room, self.sizes = session, room, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: list[str], feeds: dict[str, np.ndarray], options: Any = None) -> Any:
        self.sizes.append(len(feeds["x"]))
        if self.sizes[-1] > self._room:
            raise RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for buffer of 99")
        return self._session.run(names, feeds, options)


def test_a_batch_is_halved_until_it_fits(x: np.ndarray) -> None:
    explain = Explainer(compiled(), CPU)
    expected = explain(x, target=1).attributions["x"]
    small = explain._runner.session = Small(explain._session, 2)
    np.testing.assert_array_equal(explain(x, target=1).attributions["x"], expected)
    assert small.sizes == [7, 4, 2, 2, 2, 1]
    small.sizes.clear()
    explain(x, target=1)
    assert small.sizes == [2, 2, 2, 1]  # what fits is known
    small._room = 0
    with pytest.raises(CompileError, match="Failed to allocate"):
        explain(x, target=1)


def test_samples_that_mix_are_not_torn_apart(x: np.ndarray) -> None:
    explain = Explainer(compiled(MIXED), CPU)
    explain._runner.session = Small(explain._session, 2)
    with pytest.raises(ShortageError, match="Failed to allocate"):
        explain(x, target=1)


def test_other_errors_are_not_shortages() -> None:
    assert is_shortage(MemoryError())
    assert is_shortage(RuntimeError("std::bad_alloc"))
    assert not is_shortage(RuntimeError("Got invalid dimensions for input: x"))

    def fails(feeds: dict[str, Any]) -> list[Any]:
        raise CompileError("something else")

    with pytest.raises(CompileError, match="something else"):
        in_parts(fails, {"x": np.zeros(4)}, {"x": 0}, [("y", 0)], 4, True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_batch_larger_than_memory() -> None:
    """ONNX Runtime's own failure, in a process that may not have more memory."""
    code = """if True:
        import resource, sys
        import numpy as np, onnx, onnxruntime, onnx_attrib
        text = '''<ir_version: 8, opset_import: ["" : 17]> g (float[N, 1] x) => (float[N, 1] y)
        <int64[2] wide = {1, 100000}, int64[1] axes = {1}>
        { e = Expand (x, wide)  t = Tanh (e)  y = ReduceMean <axes = [1]> (t) }'''
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena, options.log_severity_level = False, 4
        options.intra_op_num_threads = 1
        model = onnx_attrib.compile(onnx.parser.parse_model(text), "gradient")
        explain = onnx_attrib.Explainer(model, ["CPUExecutionProvider"], session_options=options)
        x = np.linspace(-1, 1, 400, dtype=np.float32)[:, None]
        explain(x[:2])
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + 2**27,) * 2)
        result = explain(x)
        np.testing.assert_allclose(result.outputs["y"], np.tanh(x), rtol=1e-3)
        np.testing.assert_allclose(result.attributions["x"], 1 - np.tanh(x) ** 2, rtol=1e-2)
        print(explain._runner.limit)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 400


# -- CUDA graphs -----------------------------------------------------------------------------------

STATIC = TANH.replace("[N,", "[7,")


def test_capture_needs_cuda() -> None:
    with pytest.raises(OptionError, match="needs CUDAExecutionProvider as the first provider"):
        Explainer(compiled(STATIC), CPU, cuda_graph=True)
    chosen = with_capture([("CUDAExecutionProvider", {"device_id": "1"}), *CPU])
    assert chosen == [
        ("CUDAExecutionProvider", {"device_id": "1", "enable_cuda_graph": "1"}),
        *CPU,
    ]
    assert with_capture(["CUDAExecutionProvider"])[0][1] == {"enable_cuda_graph": "1"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (compiled(), r"x float32 \[N, 3\] has no fixed shape"),
        (compiled(STATIC, "integrated-gradients", steps=9, chunk=1), "control flow: Loop .*chunk"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "bytes", "path"])
def test_models_that_cannot_be_captured(
    kind: str, model: ModelProto, message: str, tmp_path: Path
) -> None:
    save(model, tmp_path / "m.onnx")
    source: Any = {"model": model, "bytes": model.SerializeToString(), "path": tmp_path / "m.onnx"}
    session = ort.InferenceSession(model.SerializeToString(), providers=CPU)
    ports = [port_of(a) for a in (*session.get_inputs(), *session.get_outputs())]
    with pytest.raises(OptionError, match=message):
        check_capturable(source[kind], ports)


def test_fixed_places(x: np.ndarray) -> None:
    """The buffers that a CUDA graph reads and writes, here on the CPU and without a graph."""
    model = compiled(STATIC, delta=True, method="deeplift")
    explain, fixed = Explainer(model, CPU), Explainer(model, CPU)
    session = fixed._session
    ins, outs = session.get_inputs(), session.get_outputs()
    check_capturable(model, [port_of(a) for a in (*ins, *outs)])
    fixed._runner.captured = Captured(session, [*map(port_of, ins)], [*map(port_of, outs)])
    kept = []
    for scale in (1, 2, 3):
        batch, target = scale * x, np.full(7, scale % 2)
        expected = explain(batch, target=target)
        for given in (batch, values(batch)):
            result = fixed(given, target=target)
            np.testing.assert_array_equal(result.attributions["x"], expected.attributions["x"])
            np.testing.assert_array_equal(result.delta, expected.delta)
        value = fixed(batch, target=target, outputs="ortvalue").attributions["x"]
        kept.append((value, expected.attributions["x"]))
    for value, wanted in kept:  # later runs leave them alone
        np.testing.assert_array_equal(value.numpy(), wanted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: fixed(k * x, target=0).outputs["y"], range(1, 20)))
    for k, y in enumerate(found, start=1):
        np.testing.assert_array_equal(y, explain(k * x, target=0).outputs["y"])
