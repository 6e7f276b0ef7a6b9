"""Where a compiled model's time goes: by operator, for its forward and its backward half.

The forward half is what the model's own outputs need; the rest is the backward half, with the
reference and whatever else the method computes. ONNX Runtime optimizes and fuses before it runs:
the halves are told apart in the graph that it runs, by what depends on what.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import onnx

from onnx_attrib.feeds import Array
from onnx_attrib.protos import captures_of
from onnx_attrib.session import onnxruntime, open_session, run_session, session_options

Half = Literal["forward", "backward"]
_SUFFIX = "_kernel_time"
_NESTING = ("Loop", "Scan", "If")
RUNS, WARMUP = 5, 2


@dataclass(frozen=True)
class Operator:
    """All kernels of one operator in one half: how many run, and for how long, in one run.

    A Loop's own time is what its body's kernels do not account for.
    """

    half: Half
    op: str
    count: float
    ms: float


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one run: of each half's kernels, and between them."""

    run_ms: float
    forward_ms: float
    backward_ms: float
    between_ms: float
    operators: tuple[Operator, ...]
    """The slowest first."""


def profile(
    path: str, feeds: Mapping[str, Array], own: Collection[str], threads: int = 1
) -> Profile:
    """Profile a compiled model on the CPU. ``own``: the source model's outputs.

    The folder of ``path`` must be writable.
    """
    ort, path = onnxruntime(), _named(path)
    with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
        options = session_options(ort, threads)
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
        session = open_session(
            ort, path, ["CPUExecutionProvider"], "the compiled model", options=options
        )
        names = [output.name for output in session.get_outputs()]
        for _ in range(WARMUP + RUNS):
            run_session(session, names, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return _summary(events, _forward(optimized.graph, own))


def _named(path: str) -> str:
    """A copy of the model, beside it, in which every node has a name: a kernel goes by it."""
    model = onnx.load(path, load_external_data=False)
    taken = {node.name for node in model.graph.node}
    for i, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(name for k in count() if (name := f"node{i}.{k}") not in taken)
    copy = f"{path}.named.onnx"
    onnx.save(model, copy)
    return copy


def _forward(graph: Any, own: Collection[str]) -> set[str]:
    """The names of the nodes that the model's own outputs need."""
    makers = {name: node for node in graph.node for name in node.output if name}
    found: set[str] = set()
    wanted = [name for name in own if name in makers]
    while wanted:
        node = makers[wanted.pop()]
        if node.name not in found:
            found.add(node.name)
            wanted += [name for name in (*node.input, *captures_of(node)) if name in makers]
    return found


def _summary(events: Sequence[Mapping[str, Any]], forward: Collection[str]) -> Profile:
    runs = [e for e in events if e["cat"] == "Session" and e["name"] == "model_run"][-RUNS:]
    start = min(run["ts"] for run in runs)
    kernels = [
        event
        for event in events
        if event["cat"] == "Node" and event["name"].endswith(_SUFFIX) and event["ts"] >= start
    ]
    times: dict[tuple[Half, str], list[float]] = {}
    for half, op, time in _own_times(kernels, forward):
        times.setdefault((half, op), []).append(time / 1000 / RUNS)
    operators = [
        Operator(half, op, len(found) / RUNS, sum(found)) for (half, op), found in times.items()
    ]
    total = sum(run["dur"] for run in runs) / 1000 / RUNS
    by_half = {
        half: sum(o.ms for o in operators if o.half == half) for half in ("forward", "backward")
    }
    return Profile(
        total,
        by_half["forward"],
        by_half["backward"],
        total - sum(by_half.values()),
        tuple(sorted(operators, key=lambda operator: -operator.ms)),
    )


def _own_times(
    kernels: Sequence[Mapping[str, Any]], forward: Collection[str]
) -> list[tuple[Half, str, float]]:
    """Half, operator and microseconds of every kernel, without those of the kernels inside it."""
    found: list[tuple[Half, str, float]] = []
    open_: list[tuple[int, float]] = []  # the Loops around: where in ``found``, and their end
    for event in sorted(kernels, key=lambda event: (event["ts"], -event["dur"])):
        start, time, op = event["ts"], float(event["dur"]), event["args"]["op_name"]
        while open_ and start >= open_[-1][1]:
            open_.pop()
        half: Half = "forward" if event["name"].removesuffix(_SUFFIX) in forward else "backward"
        if open_:
            outer, _ = open_[-1]
            half, name, rest = found[outer]
            found[outer] = half, name, rest - time
        found.append((half, op, time))
        if op in _NESTING:
            open_.append((len(found) - 1, start + time))
    return [(half, op, max(time, 0.0)) for half, op, time in found]


__all__ = ["Half", "Operator", "Profile", "profile"]
