"""The memory that a run of a model needs, measured in a process of its own; its activations."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import Array
from onnx_attrib.session import onnxruntime, open_session, run_session, session_options

_RUNS = 2
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_VIEWS = frozenset("Flatten Identity Reshape Squeeze Unsqueeze".split())
"""Operators whose outputs ONNX Runtime keeps where their inputs are."""
# Freed memory goes back to the system at once: what is resident is what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Memory:
    """Bytes that are resident: ``loaded`` before the first run, ``run`` at its peak on top of it.

    The latter is what live tensors and the kernels' scratch take: ONNX Runtime's arena, which
    keeps freed memory, is off, and pages of code and files are not counted.
    """

    loaded: int
    run: int


def memory_of(path: str, feeds: Mapping[str, Array], threads: int) -> Memory | None:
    """Run the model in a fresh process, on the CPU; None but on Linux.

    Raises CompileError if the process fails.
    """
    if not (_STATUS.exists() and _RESET.exists()):
        return None
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from onnx_attrib.memory import _child; _child()"
    )
    with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((path, dict(feeds), threads)))
        done = subprocess.run(
            [sys.executable, "-c", code, str(task)],
            env={**os.environ, **_MALLOC},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CompileError(f"the memory of a run could not be measured: {said[:300]}")
    loaded, run = map(int, done.stdout.split())
    return Memory(loaded, run)


def activations_of(path: str, feeds: Mapping[str, Array], threads: int) -> int:
    """Bytes of all that the operators of one run compute, on the CPU: what a run that kept every
    activation would hold."""
    ort = onnxruntime()
    with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
        options = session_options(ort, threads)
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = open_session(ort, path, ["CPUExecutionProvider"], "it", options=options)
        run_session(session, [output.name for output in session.get_outputs()], feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    done = [event["args"] for event in events if event["cat"] == "Node"]
    return sum(
        int(arguments["output_size"])
        for arguments in done
        if arguments.get("output_size") and arguments["op_name"] not in _VIEWS
    )


def _child() -> None:
    """Load, run and print; the task is a file that :func:`memory_of` wrote."""
    path, feeds, threads = pickle.loads(Path(sys.argv[1]).read_bytes())
    options = session_options(onnxruntime(), threads)
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session = open_session(onnxruntime(), path, ["CPUExecutionProvider"], "it", options=options)
    names = [output.name for output in session.get_outputs()]
    ctypes.CDLL(None).malloc_trim(0)
    loaded, files = _resident("VmRSS"), _resident("RssFile")
    _RESET.write_text("5")  # the peak is that since now
    for _ in range(_RUNS):
        run_session(session, names, feeds)
    run = _resident("VmHWM") - loaded - (_resident("RssFile") - files)
    print(loaded, max(run, 0))


def _resident(key: str) -> int:
    for text in _STATUS.read_text().splitlines():
        if text.startswith(f"{key}:"):
            return int(text.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


__all__ = ["Memory", "activations_of", "memory_of"]
