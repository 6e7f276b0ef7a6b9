"""What every method costs, on the networks of tests/zoo and the shipped CNN: BENCHMARKS.md.

    pip install -e '.[cpu]' torch onnxscript captum
    python models/benchmarks.py

exports the networks (``--models DIR`` keeps them), measures with ``onnx_attrib.bench`` on one
thread, and writes the tables beside this file. It takes about half an hour.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from captum.attr import DeepLift
from torch import nn

import onnx_attrib
from onnx_attrib.bench import Case, Row, bench
from onnx_attrib.cli.common import progress
from onnx_attrib.memory import memory_of
from onnx_attrib.profiling import profile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests import zoo  # noqa: E402
from tests.long_graphs import LONG  # noqa: E402

CNN = "mnist_cnn"
METHOD_MODELS = ("resnet18", CNN, "vit")
ZOO = ("resnet18", "resnet50", "vgg11", "mobilenet", "inception", "genomics", "encoder", "vit")
WINDOWS = {"resnet18": "3,8,8", CNN: "1,4,4", "vit": "3,8,8"}
LARGE = ("resnet18", "resnet50", "vgg11")
ROUNDS, LARGE_ROUNDS, HEAVY_ROUNDS, PROFILES, STEPS = 15, 5, 2, 3, 10
BATCHES = (1, 8)
LAYERS = frozenset("Conv ConvTranspose MatMul FusedMatMul Gemm FusedGemm".split())
BOUNDS = (16, 64, 256)
COUNTS = (2500, 10_000)

TEXT = """# Benchmarks

Made by `python models/benchmarks.py`; `onnx-attrib bench` measures the same for any model.

- Machine: {machine}; {versions}.
- One thread, float32, processor time (`--threads 1`, the column *cpu ms*): each session's time is
  divided by that of the source model's forward pass in the same round, and the median of {rounds}
  rounds is shown ({large} for {largest}), of {heavy} for methods of many sweeps (from `deep-shap`
  on, and integrated gradients). ONNX Runtime optimizes both graphs alike, at its default level.
- Memory is what one run needs on top of the loaded model at its peak, in a process of its own with
  ONNX Runtime's arena off. At batch 1 of small models it is some 100 KiB, and rough.
- The networks are those of `tests/zoo` (full-width ResNets at 3×64×64, `mobilenet` at half
  width; `vit` and `encoder` are small transformers) with random weights, which cost what trained
  ones cost, exported by PyTorch's dynamo exporter with an open batch; `mnist_cnn` is shipped.
  `--models DIR` keeps the exported files:

      python models/benchmarks.py --models DIR
      onnx-attrib bench DIR/resnet18.dynamo.onnx --method gradient --method deeplift --batch 1,8

## Every method

Times the forward pass, batch 1, target `argmax`, baseline zeros. The forward pass takes {forwards}.
Windows are {windows}, as large as their strides.

{methods}

## Gradient, DeepLIFT and integrated gradients

Times the forward pass at batch 1 and 8. DeepLIFT's baseline is fixed at compile time (zeros), or
given at run time (one for all samples), where the reference pass is part of the run. Integrated
gradients has {steps} steps, evaluated together; time grows in proportion to them.

{ratios}

What of this is layers: the time of convolutions and matrix products alone, in both halves, by
ONNX Runtime's profile, divided by the forward pass's in a profile of its own; the median of
{profiles} pairs. No spelling of the other operators brings a graph below it.

{layers}

## Memory

The peak of a run, divided by the sum of the forward pass's activations: all that its operators
compute, as ONNX Runtime fuses them, which a backward pass has to come back to. In brackets, divided
by the forward pass's own peak: that pass forgets each activation as soon as the next is there.

{memory}

Integrated gradients of 50 steps on 8 samples, with `--memory` and `--dim` of the batch 8: the chunk
that was chosen, the peak of a run, and times the forward pass; refused: one evaluation takes more.

{bounds}

## Compiling

Seconds of processor time to compile models of many nodes (`tests/long_graphs.py`), from a model in
memory to a model in memory, and the nodes of the compiled model.

{compiling}

## Against Captum

Captum {captum} with PyTorch {torch} on the same networks and inputs in the same rounds, as modules,
with the class given to Captum (the compiled graph chooses it itself, and gives the outputs too).
Each cell: milliseconds here, Captum's, and Captum's divided by ours (above 1, ours is faster).
`differs` is the largest difference of the two attributions over the largest entry. `exported`:
Captum's call traced by torch (`make_fx`), exported by `torch.onnx.export` for the batch at hand,
and run in the same ONNX Runtime (`--against captum-export`).

{captum_table}

`Σ off` is how far DeepLIFT's attributions are from summing to S(x) − S(0), relative, the worst of
four samples: Captum's, then ours. Captum's DeepLIFT takes plain gradients through ReLU6, GELU,
attention and LayerNorm, and another rule for max-pools: the two are not the same numbers there.
"""


# -- networks --------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """A network of the zoo with a ReLU of its own at every place: Captum's DeepLIFT needs that."""
    module = zoo.build(name)
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            for i, child in enumerate(part):
                if isinstance(child, nn.ReLU):
                    part[i] = nn.ReLU()
    return module


def exported(name: str, folder: Path) -> Path:
    """The network as torch's dynamo exporter writes it, with an open batch."""
    if name == CNN:
        return HERE / f"{CNN}.onnx"
    path = folder / f"{name}.dynamo.onnx"
    if not path.exists():
        onnx.save(zoo.export(zoo.build(name), zoo.sample(name, 2, 0), "dynamo"), path)
    return path


def drawn(name: str, count: int) -> np.ndarray:
    """Random samples of a network's input."""
    shape = (1, 28, 28) if name == CNN else zoo.ZOO[name].shape
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def rounds(name: str) -> int:
    """How many, for methods of one sweep."""
    return LARGE_ROUNDS if name in LARGE else ROUNDS


# -- every method ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the first table. ``background``: how many samples the baseline has; ``windowed``:
    the method has windows, ``patterned``: it needs patterns."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    background: int = 0
    windowed: bool = False
    patterned: bool = False
    heavy: bool = False

    def __str__(self) -> str:
        said = [f"{key}={value}" for key, value in self.options.items()]
        said += [f"background of {self.background}"] * bool(self.background)
        return f"`{self.method}` {', '.join(said)}".rstrip()


ENTRIES = (
    *(Entry(name) for name in "gradient saliency gradient-x-input deconvnet".split()),
    *(Entry(name) for name in "guided-backprop grad-cam grad-cam++ layer-cam".split()),
    *(Entry(name) for name in "guided-grad-cam epsilon-lrp lrp".split()),
    Entry("lrp", {"composite": "epsilon-plus"}),
    Entry("deep-taylor"),
    Entry("pattern-net", patterned=True),
    Entry("pattern-attribution", patterned=True),
    Entry("deeplift"),
    Entry("deeplift", {"rule": "reveal-cancel"}),
    Entry("deep-shap", background=10, heavy=True),
    Entry("integrated-gradients", {"steps": 50}, heavy=True),
    Entry("expected-gradients", {"samples": 50}, background=10, heavy=True),
    Entry("smoothgrad", {"samples": 25}, heavy=True),
    Entry("occlusion", windowed=True, heavy=True),
    Entry("shapley-sampling", {"samples": 2}, windowed=True, heavy=True),
)


def cost(entry: Entry, name: str, folder: Path) -> tuple[Row, Row] | str:
    """The forward pass and the method; or why the method does not go with the network."""
    options = dict(entry.options)
    if entry.windowed:
        options["window"] = WINDOWS[name]
    if entry.windowed and entry.method == "occlusion":
        options["stride"] = WINDOWS[name]
    path = exported(name, folder)
    try:
        if entry.patterned:
            patterns = folder / f"{name}.patterns.npz"
            np.savez(patterns, **onnx_attrib.fit_patterns(path, drawn(name, 64)))
            options["patterns"] = str(patterns)
        (case,) = bench(
            path,
            {entry.method: options},
            baseline=drawn(name, entry.background) if entry.background else "zeros",
            rounds=HEAVY_ROUNDS if entry.heavy else rounds(name),
            warmup=1 if entry.heavy else 3,
            remembered=False,
            watch=progress,
        )
    except onnx_attrib.CompileError as error:
        return str(error)
    return case.rows[0], case.rows[1]


def method_table(folder: Path) -> tuple[str, str]:
    """The first table with its notes, and how long the forward passes take."""
    table, reasons, forwards = [["method", *METHOD_MODELS]], [], dict[str, float]()
    for entry in ENTRIES:
        cells = [str(entry)]
        for name in METHOD_MODELS:
            found = cost(entry, name, folder)
            if isinstance(found, str):
                reasons.append(f"- {entry} on {name}: {found.splitlines()[0]}")
                cells.append("—")
            else:
                forwards.setdefault(name, found[0].times.cpu_ms or 0.0)
                cells.append(ratio(found[1]))
        print(" | ".join(cells), flush=True)
        table.append(cells)
    shown = ", ".join(f"{number(ms)} ms ({name})" for name, ms in forwards.items())
    return "\n".join([*markdown(table), *([""] if reasons else []), *reasons]), shown


# -- the networks ----------------------------------------------------------------------------------


def measured(name: str, folder: Path) -> list[tuple[str, list[Case]]]:
    """Gradient, DeepLIFT and integrated gradients of one network, Captum beside them."""
    path, module = exported(name, folder), network(name)
    common: dict[str, Any] = {"batches": BATCHES, "watch": progress}
    quick = {**common, "rounds": rounds(name)}
    compared = {"against": "captum", "module": module}
    again = {"against": "captum-export", "module": module, "remembered": False}
    return [
        ("quick", bench(path, ["gradient", "deeplift"], **quick, **compared)),
        ("exported", bench(path, ["gradient", "deeplift"], **quick, **again)),
        ("given", bench(path, "deeplift", baseline="input", **quick)),
        (
            "heavy",
            bench(
                path,
                "integrated-gradients",
                steps=STEPS,
                **common,
                **compared,
                rounds=HEAVY_ROUNDS,
                warmup=1,
                remembered=False,
            ),
        ),
    ]


def network_tables(folder: Path) -> tuple[str, str, str]:
    """Ratios, memory, and the comparison with Captum."""
    heads = [f"{name} {batch}" for name in ("gradient", "deeplift") for batch in BATCHES]
    given = [f"deeplift, run-time baseline {batch}" for batch in BATCHES]
    averaged = [f"integrated-gradients {batch}" for batch in BATCHES]
    ratios = [["network", *heads, *given, *averaged]]
    memory = [["network", *heads, *given]]
    columns = ["gradient", "exported", "deeplift", "exported", "differs", "Σ off"]
    peers = [["network", "batch", *columns, f"IG, {STEPS} steps"]]
    problems: dict[str, None] = {}
    for name in ZOO:
        cases = dict(measured(name, folder))
        places = [("quick", 1), ("quick", 2), ("given", 1), ("heavy", 1)]
        rows = {place: [case.rows[place[1]] for case in cases[place[0]]] for place in places}
        ratios.append([name, *(ratio(row) for place in places for row in rows[place])])
        memory.append([name, *(held(row) for place in places[:3] for row in rows[place])])
        off = residuals(name, folder)
        for quick, other, heavy in zip(
            cases["quick"], cases["exported"], cases["heavy"], strict=True
        ):
            gradient, deeplift, averaged_row = quick.rows[1], quick.rows[2], heavy.rows[1]
            cells = [against(gradient), against(other.rows[1])]
            cells += [against(deeplift), against(other.rows[2]), differs(deeplift), off]
            peers.append([name, str(quick.batch), *cells, against(averaged_row)])
            for row in (gradient, deeplift, averaged_row, *other.rows[1:]):
                if row.peer is not None and row.peer.problem:
                    problems[f"- {row.method} on {name}: {row.peer.problem}"] = None
        print(" | ".join(ratios[-1]), flush=True)
        print(" | ".join(memory[-1]), flush=True)
        print("\n".join(" | ".join(line) for line in peers[-len(BATCHES) :]), flush=True)
    compared = [*markdown(peers), *([""] if problems else []), *problems]
    return "\n".join(markdown(ratios)), "\n".join(markdown(memory)), "\n".join(compared)


def layer_table(folder: Path) -> str:
    """How long the layers of compiled graphs take, in times all of the forward pass."""
    methods = ("gradient", "deeplift")
    heads = [f"{method} {batch}" for method in methods for batch in BATCHES]
    table = [["network", *heads]]
    for name in ZOO:
        model, cells = onnx.load(exported(name, folder)), [name]
        own = [output.name for output in model.graph.output]
        with tempfile.TemporaryDirectory() as temporary:
            source = str(Path(temporary) / "source.onnx")
            onnx.save(model, source)
            for method in methods:
                compiled = str(Path(temporary) / f"{method}.onnx")
                onnx.save(onnx_attrib.compile(model, method, target="argmax"), compiled)
                for batch in BATCHES:
                    feeds, found = {"x": drawn(name, batch)}, []
                    for _ in range(PROFILES):
                        forward = profile(source, feeds, own).forward_ms
                        taken = profile(compiled, feeds, own).operators
                        found.append(sum(o.ms for o in taken if o.op in LAYERS) / forward)
                    cells.append(number(float(np.median(found))))
        print(" | ".join(cells), flush=True)
        table.append(cells)
    return "\n".join(markdown(table))


def bound_table(folder: Path) -> str:
    """Integrated gradients of 50 steps within bounds on memory."""
    table = [["network", *(f"{bound} MiB" for bound in BOUNDS)]]
    for name in ("resnet18", "resnet50", "vgg11", "vit"):
        path = exported(name, folder)
        symbol = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
        cells = [name]
        for bound in BOUNDS:
            try:
                compiled = onnx_attrib.compile(
                    path, "integrated-gradients", memory=bound, dims={symbol: 8}, target="argmax"
                )
            except onnx_attrib.OptionError:
                cells.append("refused")
                continue
            chunk = onnx_attrib.Explainer(compiled).options["chunk"]
            taken, times = bounded(path, compiled, {"x": drawn(name, 8)})
            cells.append(f"{chunk}: {number(taken)} MiB, {number(times)}")
        print(" | ".join(cells), flush=True)
        table.append(cells)
    return "\n".join(markdown(table))


def bounded(
    source: Path, compiled: onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> tuple[float | None, float]:
    """The MiB that a run of the compiled model takes, and its time in forward passes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary) / "compiled.onnx")
        onnx.save(compiled, path)
        taken = memory_of(path, feeds, 1)
        sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for model in (str(source), path)
        ]
        seconds = np.empty((HEAVY_ROUNDS + 1, 2))
        for row in seconds:
            for i, session in enumerate(sessions):
                start = time.process_time()
                session.run(None, feeds)
                row[i] = time.process_time() - start
    # (The first round warms up.)
    times = float(np.median(seconds[1:, 1] / seconds[1:, 0]))
    return (taken.run / 2**20 if taken else None), times


def compile_table() -> str:
    """Seconds, and nodes, by model and method."""
    methods = ("gradient", "deeplift", "integrated-gradients", "lrp")
    table = [["model", "nodes", *methods]]
    for name, build in LONG.items():
        for count in COUNTS:
            source = build(count)
            cells = [name, str(len(source.graph.node))]
            for method in methods:
                start = time.process_time()
                compiled = onnx_attrib.compile(source, method, target=0)
                seconds = time.process_time() - start
                cells.append(f"{number(seconds)} ({len(compiled.graph.node)})")
            print(" | ".join(cells), flush=True)
            table.append(cells)
    return "\n".join(markdown(table))


def residuals(name: str, folder: Path) -> str:
    """|Σ attribution − (S(x) − S(0))| / |S(x) − S(0)| of DeepLIFT, the worst of four samples."""
    module, x = network(name), torch.from_numpy(drawn(name, 4))
    with torch.no_grad():
        y = module(x)
        target = y.argmax(1)
        delta = (y - module(0 * x)).gather(1, target[:, None])[:, 0].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = DeepLift(module).attribute(x, 0 * x, target=target).detach().numpy()
    compiled = onnx_attrib.compile(exported(name, folder), "deeplift", target="argmax")
    ours = onnx_attrib.Explainer(compiled)(x.numpy()).attributions["x"]
    sums = [a.reshape(4, -1).sum(axis=1) for a in (theirs, ours)]
    return " / ".join(f"{np.abs((total - delta) / delta).max():.0e}" for total in sums)


def against(row: Row) -> str:
    peer = row.peer
    if peer is None or peer.times is None or peer.times.cpu_ratio is None:
        return "—"
    ours, theirs = number(row.times.cpu_ms), number(peer.times.cpu_ms)
    return f"{ours} / {theirs}: **{number(peer.times.cpu_ratio.median)}**"


def differs(row: Row) -> str:
    known = row.peer is not None and row.peer.difference is not None
    return f"{row.peer.difference:.0e}" if known and row.peer else "—"


# -- text ------------------------------------------------------------------------------------------


def ratio(row: Row) -> str:
    return number(row.times.cpu_ratio.median if row.times.cpu_ratio else None)


def held(row: Row) -> str:
    return f"{number(row.activation_ratio)} ({number(row.run_ratio)})"


def number(value: float | None) -> str:
    """Two or three digits."""
    if value is None:
        return "—"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = table
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rest)]


def machine() -> str:
    """The processor as the system calls it, and its vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    flags = known.get("flags", "").split()
    widest = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "")
    parts = [known.get("model name", platform.processor()), f"{os.cpu_count()} cores", widest]
    return ", ".join([platform.machine(), *filter(None, parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure, and write BENCHMARKS.md.")
    parser.add_argument("--models", type=Path, help="where the exported networks are kept")
    parser.add_argument("--out", type=Path, default=HERE / "BENCHMARKS.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ratios, memory, captum_table = network_tables(folder)
        methods, forwards = method_table(folder)
        layers = layer_table(folder)
        bounds = bound_table(folder)
    compiling = compile_table()
    packages = ("onnxruntime", "onnx", "numpy")
    said = [f"onnx-attrib {onnx_attrib.__version__}", f"Python {platform.python_version()}"]
    text = TEXT.format(
        machine=machine(),
        versions=", ".join([*said, *(f"{name} {version(name)}" for name in packages)]),
        rounds=ROUNDS,
        large=LARGE_ROUNDS,
        largest=", ".join(LARGE),
        heavy=HEAVY_ROUNDS,
        profiles=PROFILES,
        steps=STEPS,
        forwards=forwards,
        windows=", ".join(f"{window} ({name})" for name, window in WINDOWS.items()),
        methods=methods,
        ratios=ratios,
        layers=layers,
        memory=memory,
        bounds=bounds,
        compiling=compiling,
        captum=version("captum"),
        torch=version("torch").partition("+")[0],
        captum_table=captum_table,
    )
    given.out.write_text(text, encoding="utf-8")
    print("wrote", given.out)


if __name__ == "__main__":
    main()
