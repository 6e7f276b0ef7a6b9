"""``onnx-attrib bench``: what it measures of small models, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib import bench as measuring
from onnx_attrib import memory
from onnx_attrib.bench import bench
from onnx_attrib.memory import activations_of, memory_of
from onnx_attrib.profiling import _own_times, profile
from onnx_attrib.verify import verify

from .command import CNN, DIGIT, MLP, SMALL, fails, succeeds, write
from .marks import measures_memory

QUICK = ("--rounds", "2", "--warmup", "1")

WIDE = """
<ir_version: 8, opset_import: ["" : 17]>
wide (float[N, 1024, 64] x) => (float[N, 64] y) <float two = {2}>
{
  a = Mul (x, x)
  b = Add (a, x)
  c = Mul (b, x)
  y = ReduceMean <axes = [1], keepdims = 0> (c)
}
"""


@pytest.fixture(scope="module")
def found() -> Any:
    """The CNN at two batches, with an operator profile."""
    arguments = ("--method", "gradient", "--method", "integrated-gradients", "--option", "steps=4")
    text = succeeds("bench", CNN, *arguments, "--batch", "1,3", "--profile", "--json", *QUICK)
    return json.loads(text)


def test_settings_and_cases(found: Any) -> None:
    assert (found["threads"], found["rounds"], found["warmup"]) == (1, 2, 1)
    assert found["target"] == "argmax"
    assert found["onnxruntime"]
    (model,) = found["models"]
    assert [case["batch"] for case in model["cases"]] == [1, 3]
    assert [case["inputs"]["image"][0] for case in model["cases"]] == [1, 3]
    for case in model["cases"]:
        methods = [row["method"] for row in case["rows"]]
        assert methods == [None, "gradient", "integrated-gradients"]
        assert case["provider"] == "CPUExecutionProvider"
        assert case["rows"][2]["options"]["steps"] == 4


def test_every_row_is_complete_and_consistent(found: Any) -> None:
    for case in found["models"][0]["cases"]:
        forward = case["rows"][0]
        assert forward["compile_s"] is None
        assert forward["nodes"] == len(onnx.load(CNN).graph.node)
        for row in case["rows"]:
            times = row["times"]
            assert 0 < times["wall_ms"] < 1e5
            assert row["samples_per_s"] == pytest.approx(1e3 * case["batch"] / times["wall_ms"])
            for ratio in (times["wall_ratio"], times["cpu_ratio"]):
                assert ratio["low"] <= ratio["median"] <= ratio["high"]
            assert row["peer"] is None
            if row["run_bytes"] is not None:
                whole = forward["activation_bytes"]
                assert row["activation_ratio"] == row["run_bytes"] / whole
        assert forward["times"]["cpu_ratio"] == {"low": 1, "median": 1, "high": 1}
        for row in case["rows"][1:]:
            assert row["compile_s"] > 0
            assert row["nodes"] > forward["nodes"]
            assert row["file_bytes"] > forward["file_bytes"] > 1e6
            # The forward pass is part of it; the margin is for what else the machine does.
            assert row["times"]["cpu_ratio"]["median"] > 1


def test_the_profile_sums_to_the_run(found: Any) -> None:
    for case in found["models"][0]["cases"]:
        assert case["rows"][0]["profile"] is None
        for row in case["rows"][1:]:
            held = row["profile"]
            for half in ("forward", "backward"):
                mine = [o["ms"] for o in held["operators"] if o["half"] == half]
                assert sum(mine) == pytest.approx(held[f"{half}_ms"])
                assert min(mine) >= 0
            parts = held["forward_ms"] + held["backward_ms"] + held["between_ms"]
            assert parts == pytest.approx(held["run_ms"])
            assert held["between_ms"] >= 0
            slowest = [o["ms"] for o in held["operators"]]
            assert slowest == sorted(slowest, reverse=True)


def test_the_halves_hold_the_kernels_that_belong_there(found: Any) -> None:
    # Two convolutions forward, and theirs backward, however ONNX Runtime fuses them.
    counts: dict[str, float] = {}
    for operator in found["models"][0]["cases"][0]["rows"][1]["profile"]["operators"]:
        if "Conv" in operator["op"]:
            counts[operator["half"]] = counts.get(operator["half"], 0) + operator["count"]
    assert counts["forward"] == 2
    assert counts["backward"] >= 2


def test_a_loop_counts_what_its_body_does_not() -> None:
    def event(name: str, op: str, start: int, time: int) -> dict[str, Any]:
        return {"name": f"{name}_kernel_time", "ts": start, "dur": time, "args": {"op_name": op}}

    events = [
        event("f", "Conv", 0, 10),
        event("a", "Mul", 21, 30),
        event("b", "Loop", 55, 20),
        event("c", "Add", 56, 5),
        event("loop", "Loop", 20, 60),
        event("g", "Relu", 80, 1),
    ]
    assert sorted(_own_times(events, {"f", "g"})) == sorted(
        [
            ("forward", "Conv", 10),
            ("backward", "Loop", 60 - 30 - 20),
            ("backward", "Mul", 30),
            ("backward", "Loop", 20 - 5),
            ("backward", "Add", 5),
            ("forward", "Relu", 1),
        ]
    )


def test_all_that_the_outputs_need_is_forward(tmp_path: Path) -> None:
    """Compiled for a gradient of its first part, the whole model is still the forward half."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    two (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Tanh (x) z = Softplus (y) }
    """
    compiled = onnx_attrib.compile(onnx.parser.parse_model(text), "gradient", target=0)
    onnx.save(compiled, tmp_path / "two.onnx")
    feeds = {"x": np.ones((2, 4), np.float32)}
    halves = {
        o.op: o.half for o in profile(str(tmp_path / "two.onnx"), feeds, ["y", "z"]).operators
    }
    assert (halves["Tanh"], halves["Softplus"]) == ("forward", "forward")
    assert "backward" in halves.values()


@measures_memory
def test_memory_is_that_of_live_tensors(tmp_path: Path) -> None:
    """Of 8 samples each tensor of the model has 2 MiB: x · x and (x · x) + x, then the product."""
    path = write(WIDE, tmp_path / "wide.onnx")
    feeds = {"x": np.ones((8, 1024, 64), np.float32)}
    held = memory_of(str(path), feeds, 1)
    assert held is not None
    tensor = 8 * 1024 * 64 * 4
    assert 0.9 * tensor < held.run < 4.5 * tensor
    small = memory_of(str(path), {"x": feeds["x"][:1]}, 1)
    assert small is not None
    assert small.run < 0.5 * held.run


def test_where_memory_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what Linux tells, bench leaves the memory out and measures the rest."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    path = write(WIDE, tmp_path / "wide.onnx")
    assert memory_of(str(path), {"x": np.ones((1, 1024, 64), np.float32)}, 1) is None
    (case,) = bench(path, "gradient", rounds=1, warmup=1)
    assert [row.run_bytes for row in case.rows] == [None, None]
    assert [row.run_ratio for row in case.rows] == [None, None]
    assert all(row.times.wall_ms > 0 for row in case.rows)


def test_activations_are_all_that_is_computed(tmp_path: Path) -> None:
    """Three products and sums of 8 · 1024 · 64 floats, and the mean of 8 · 64."""
    feeds = {"x": np.ones((8, 1024, 64), np.float32)}
    found = activations_of(str(write(WIDE, tmp_path / "wide.onnx")), feeds, 1)
    assert found == 4 * (3 * 8 * 1024 * 64 + 8 * 64)
    # A view is not computed.
    text = WIDE.replace("float[N, 64] y", "float[8192, 64] y").replace(
        "y = ReduceMean <axes = [1], keepdims = 0> (c)", "y = Reshape (c, size)"
    )
    text = text.replace("<float two = {2}>", "<int64[2] size = {8192, 64}>")
    found = activations_of(str(write(text, tmp_path / "view.onnx")), feeds, 1)
    assert found == 4 * 3 * 8 * 1024 * 64


def test_times_are_taken_in_rounds_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are formed within a round: a load that grows from round to round cancels."""
    clock, order = [0.0], []

    def call(i: int, seconds: float) -> Any:
        def run() -> None:
            order.append(i)
            clock[0] += seconds * (1 + len(order) // 3)

        return run

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measuring.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(measuring, "_SHORTEST", 0.0)
    wall, _ = measuring._measured([call(0, 1.0), call(1, 2.0), call(2, 4.0)], 6, 1, 0)
    rounds = [order[k : k + 3] for k in range(3, len(order), 3)]
    assert len(rounds) == 6
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert wall[0, -1] > 2 * wall[0, 0]
    ratio = measuring._times(wall, wall, 2, 0, True).wall_ratio
    assert 2.5 < ratio.median < 5.5


def test_the_table(small: Path) -> None:
    text = succeeds("bench", small, MLP, "--method", "gradient", "--batch", "2", *QUICK)
    lines = text.splitlines()
    assert [line for line in lines if line.startswith(str(small))]
    assert [line for line in lines if line.startswith(str(MLP))]
    assert sum(line.split()[0] == "(forward)" for line in lines) == 2
    assert "batch 2" in lines[0]
    assert "1.00" in lines[2]


def test_the_table_with_a_profile(small: Path) -> None:
    text = succeeds("bench", small, "--method", "gradient", "--profile", *QUICK)
    assert "gradient, profiled: " in text
    table = text.partition("gradient, profiled: ")[2].splitlines()
    assert table[1].split() == ["half", "operator", "kernels", "ms", "share"]
    assert {line.split()[0] for line in table[2:]} >= {"backward"}
    assert 2 < len(table) <= 14


def test_inputs_fill_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    whole = measuring._case
    monkeypatch.setattr(
        measuring, "_case", lambda held, name, batch, feeds: seen.append(feeds) or None
    )
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    source = onnx.parser.parse_model(SMALL)
    bench(source, "gradient", inputs={"x": array})
    bench(source, "gradient", inputs={"x": array}, batches=[5])
    np.testing.assert_array_equal(seen[0]["x"], array)
    np.testing.assert_array_equal(seen[1]["x"], array[[0, 1, 0, 1, 0]])
    monkeypatch.setattr(measuring, "_case", whole)
    text = succeeds("bench", MLP, "--input", DIGIT, "--json", *QUICK)
    assert json.loads(text)["models"][0]["cases"][0]["inputs"] == {"image": [1, 1, 28, 28]}


def test_a_baseline_given_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[dict[str, Any]] = []
    monkeypatch.setattr(measuring, "memory_of", lambda path, feeds, threads: fed.append(feeds))
    for baseline in ("zeros", "input"):
        (case,) = bench(onnx.parser.parse_model(SMALL), baseline=baseline, rounds=1, batches=[4])
        assert case.inputs == {"x": (4, 3)}
        assert case.rows[1].run_bytes is None
    source, zeros, again, given = fed
    assert [*source] == [*zeros] == [*again] == ["x"]
    assert given["x_baseline"].shape == (1, 3)
    assert not given["x_baseline"].any()


def test_open_dimensions(tmp_path: Path) -> None:
    text = SMALL.replace("float[N, 3] x", "float[N, T, 3] x").replace("[N, 2]", "[N, T, 2]")
    path = write(text, tmp_path / "open.onnx")
    arguments = ("--method", "saliency", "--target", "0,0", "--json", *QUICK)
    found = json.loads(succeeds("bench", path, "--dim", "T=5", *arguments))
    assert found["models"][0]["cases"][0]["inputs"] == {"x": [1, 5, 3]}
    assert "no open dimension 'S'" in fails("bench", path, "--dim", "S=5", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--method", "gradeint"), "did you mean 'gradient'?", 2),
        (("--option", "steps=2"), "has no option 'steps'", 2),
        (("--batch", "0"), "'0' is not a whole number", 2),
        (("--batch", "1,x"), "'1,x' is not a whole number", 2),
        (("--provider", "tpu"), "no provider 'tpu'", 1),
        (("--target", "7"), "7", 1),
        (("--against", "shap"), "'shap'", 2),
        (("--module", "a:b"), "--against", 2),
        (("--against", "captum", "--module", "nothing"), "package.module:factory", 1),
        (("--against", "captum", "--module", "no_such_module:f"), "no_such_module", 1),
    ],
)
def test_refusals(small: Path, arguments: tuple[str, ...], said: str, code: int) -> None:
    text = fails("bench", small, *arguments, *QUICK, code=code)
    assert said in text
    if code == 1:
        assert len(text.strip().splitlines()) == 1


def test_models_that_cannot_be_measured(compiled: Path, tmp_path: Path, small: Path) -> None:
    assert "compiled already" in fails("bench", compiled, *QUICK)
    assert "No such file" in fails("bench", tmp_path / "missing.onnx", *QUICK)
    fixed = write(SMALL.replace("[N,", "[2,"), tmp_path / "fixed.onnx")
    assert "first axis of input 'x' is 2" in fails("bench", fixed, *QUICK)
    assert "cpu only" in fails(
        "bench", small, "--profile", "--provider", "AzureExecutionProvider", *QUICK
    ) or not _has("AzureExecutionProvider")


def _has(provider: str) -> bool:
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


def test_peers_that_are_not_installed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("torch", "captum.attr"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, missing, None)
            if missing == "captum.attr":
                patched.setitem(sys.modules, "torch", sys)
            text = fails("bench", small, "--against", "captum", *QUICK)
        assert f"needs {missing.partition('.')[0]}" in text
        assert len(text.strip().splitlines()) == 1


def test_verify_draws_what_it_drew() -> None:
    """The drawing of inputs is shared with verify: unknown names fail alike."""
    with pytest.raises(onnx_attrib.OptionError, match="no input 'z'"):
        verify(onnx.parser.parse_model(SMALL), "gradient", inputs={"z": np.ones(3)})
    with pytest.raises(onnx_attrib.OptionError, match="no input 'z'"):
        bench(onnx.parser.parse_model(SMALL), "gradient", inputs={"z": np.ones((1, 3))})


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.conv, self.relu = nn.Conv2d(2, 4, 3), nn.ReLU()
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).flatten(1))

def build():
    return Net().eval()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_captum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("captum")
    monkeypatch.chdir(tmp_path)
    for name, seed in (("drawn_network", 1), ("another_network", 2)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(NETWORK.replace("SEED", str(seed))))
    spec = importlib.util.spec_from_file_location("drawn", tmp_path / "drawn_network.py")
    assert spec is not None
    assert spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    torch.onnx.export(
        drawn.build(),
        (torch.randn(2, 2, 8, 8),),
        str(tmp_path / "net.onnx"),
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
    )
    methods = (
        *("gradient", "saliency", "gradient-x-input", "deconvnet", "guided-backprop", "deeplift"),
        *("integrated-gradients", "smoothgrad", "occlusion", "shapley-sampling", "lrp"),
    )
    arguments = [part for name in methods for part in ("--method", name)]
    arguments += ["--option", "smoothgrad.samples=3", "--option", "shapley-sampling.samples=1"]
    arguments += ["--option", "window=2,4,4", "--option", "stride=2,4,4", "--baseline", "0.25"]
    arguments += ["--against", "captum", "--module", "drawn_network:build", "--json", *QUICK]
    found = json.loads(succeeds("bench", "net.onnx", "--batch", "2", *arguments))
    rows = found["models"][0]["cases"][0]["rows"]
    for row in rows[1:]:
        peer = row["peer"]
        if row["method"] == "lrp":
            assert peer["times"] is None
            assert "not compared" in peer["problem"]
            continue
        assert peer["problem"] is None
        assert peer["times"]["cpu_ms"] > 0
        ours, theirs = row["times"]["cpu_ms"], peer["times"]["cpu_ms"]
        assert 0.2 < peer["times"]["cpu_ratio"]["median"] / (theirs / ours) < 5
        if row["method"] in ("smoothgrad", "shapley-sampling"):
            assert peer["difference"] is None
        else:
            assert peer["difference"] < 1e-4, row["method"]
    rest = ("--against", "captum", "--module")
    assert "another network" in fails("bench", "net.onnx", *rest, "another_network:build", *QUICK)
    assert "not a torch module" in fails("bench", "net.onnx", *rest, "json:JSONDecoder", *QUICK)
    text = succeeds("bench", "net.onnx", *rest, "drawn_network:build", *QUICK)
    assert "× ours" in text
    assert "differs by" in text


POOLED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(6, 4, 3, 1, 1, 1, 2),
            nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, 1, 1),
        )
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))

def build():
    return Net().eval()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_what_torch_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced, exported gradient is the gradient: its operators are spelled right."""
    torch = pytest.importorskip("torch")
    for needed in ("captum", "onnxscript"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pooled_network.py").write_text(textwrap.dedent(POOLED))
    monkeypatch.syspath_prepend(str(tmp_path))
    network = importlib.import_module("pooled_network").build()
    torch.onnx.export(
        network,
        (torch.randn(2, 2, 11, 11),),
        str(tmp_path / "net.onnx"),
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
    )
    methods = ("gradient", "deeplift", "integrated-gradients", "lrp")
    arguments = [part for name in methods for part in ("--method", name)]
    arguments += ["--option", "steps=3", "--option", "maxpool=gradient", "--json", *QUICK]
    arguments += ["--against", "captum-export", "--module", "pooled_network:build"]
    found = json.loads(succeeds("bench", "net.onnx", "--batch", "2", *arguments))
    rows = found["models"][0]["cases"][0]["rows"]
    for row in rows[1:]:
        assert row["peer"]["name"] == "captum-export"
        if row["method"] == "lrp":
            assert "not compared" in row["peer"]["problem"]
        else:
            assert row["peer"]["problem"] is None
            assert row["peer"]["times"]["cpu_ms"] > 0
    assert rows[1]["peer"]["difference"] < 1e-5
    assert rows[3]["peer"]["difference"] < 1e-5
