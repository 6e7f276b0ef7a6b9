"""What attribution costs: compiled models beside the forward pass that they explain.

Times are taken in rounds. A round runs every session once (a quick one as often as it takes to be
measured), in an order of its own; ratios are formed within a round, and their median is reported:
what else the machine does hits all sessions alike. Each is measured by the wall clock and by the
processor time of this process, which on one thread is the steadier of the two on a busy machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnx_attrib.compiler import Methods, chosen, prepare
from onnx_attrib.device import device_of
from onnx_attrib.draw import Drawer, drawer_for, fill
from onnx_attrib.errors import CompileError, ModelError, OptionError, suggest
from onnx_attrib.feeds import Array, Port, line
from onnx_attrib.job import Choice
from onnx_attrib.memory import activations_of, memory_of
from onnx_attrib.model_io import Source, load, save
from onnx_attrib.peer_export import Exported
from onnx_attrib.peers import PEERS, RANDOM, Captum, Unsuited
from onnx_attrib.profiling import Profile, profile
from onnx_attrib.recipe import Recipe
from onnx_attrib.session import (
    onnxruntime,
    open_session,
    ort_value,
    port_of,
    providers_for,
    run_session,
    session_options,
)

CPU = "CPUExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": "CUDAExecutionProvider"}
_SHORTEST = 5e-3
"""Seconds that a round spends on one session, or more."""

_KINDS = {kind.name: kind for kind in (Captum, Exported)}
Watch = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Quartiles:
    """Of the ratios of all rounds."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run (medians), and the ratio to another's within each round.

    ``cpu``: the processor time of this process, all threads together; None on other devices.
    """

    wall_ms: float
    cpu_ms: float | None
    wall_ratio: Quartiles
    cpu_ratio: Quartiles | None


@dataclass(frozen=True)
class PeerRow:
    """The same by another library. ``times.…_ratio`` is to the compiled model's time.

    ``difference``: max |peer's − ours| / max |ours|, None where numbers are drawn. ``problem``: why
    there are no times.
    """

    name: str
    times: Times | None = None
    difference: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """One session: of the source model (``method`` None), or of a compiled one.

    Ratios are to the source model's. ``nodes`` and ``file_bytes``: of the file; ``loaded_bytes``
    and ``run_bytes``: see :class:`onnx_attrib.memory.Memory`, None on other devices than the CPU.
    ``activation_bytes``: all that the source model computes in a run, of which ``run_bytes`` is
    ``activation_ratio``.
    """

    method: str | None
    options: Mapping[str, Any]
    nodes: int
    file_bytes: int
    compile_s: float | None
    times: Times
    samples_per_s: float
    loaded_bytes: int | None = None
    run_bytes: int | None = None
    run_ratio: float | None = None
    activation_bytes: int | None = None
    activation_ratio: float | None = None
    peer: PeerRow | None = None
    profile: Profile | None = None


@dataclass(frozen=True)
class Case:
    """One provider and batch: the source model's row first, then one for each method."""

    provider: str
    batch: int
    inputs: Mapping[str, tuple[int, ...]]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The case as plain JSON types."""
        found = asdict(self)
        return {**found, "inputs": {name: list(shape) for name, shape in self.inputs.items()}}


@dataclass(frozen=True)
class _File:
    """A model on disk: what is run, and what is said of it."""

    path: str
    choice: Choice | None
    nodes: int
    size: int
    seconds: float | None
    recipe: Recipe | None


@dataclass
class _Bench:
    """What all cases share."""

    source: ModelProto
    files: list[_File]
    ports: list[Port]
    given: Mapping[str, npt.ArrayLike]
    dims: Mapping[str, int]
    baseline: Any
    threads: int
    rounds: int
    warmup: int
    seed: int
    peer: Captum | None
    profiled: bool
    remembered: bool
    watch: Watch
    sessions: list[Any] = field(default_factory=list)


def bench(
    model: Source,
    method: Methods = "deeplift",
    *,
    inputs: Mapping[str, npt.ArrayLike] | None = None,
    dims: Mapping[str, int] | None = None,
    batches: Sequence[int] | None = None,
    providers: Sequence[str] = ("cpu",),
    threads: int = 1,
    rounds: int = 20,
    warmup: int = 3,
    seed: int = 0,
    baseline: Any = "zeros",
    target: Any = "argmax",
    against: str | None = None,
    module: Any = None,
    profiled: bool = False,
    remembered: bool = True,
    watch: Watch = nullcontext,
    **method_options: Any,
) -> list[Case]:
    """Measure a model's forward pass and each method's compiled graph.

    Args:
        model: a model that is not compiled.
        method: one or several, each compiled by itself.
        inputs: arrays by input name, repeated to fill a batch; the others are drawn.
        dims: sizes of open dimensions by name.
        batches: the batch sizes (default 1, or that of ``inputs``).
        providers: "cpu", "cuda", or ONNX Runtime's names.
        threads: that an operator (and torch) may use.
        rounds, warmup: how many; ``seed``: of the drawn inputs and orders.
        baseline, target: as for :func:`onnx_attrib.compile`; "input" feeds a baseline of zeros.
        against: "captum", to measure it on the same network and inputs, or "captum-export": what
            torch exports of Captum's attribution, in the same ONNX Runtime.
        module: that network as a torch module (default: converted by onnx2torch).
        profiled: also time operators, on the CPU.
        remembered: measure memory, on the CPU, which takes a process for each session.
        watch: is entered with a text around every step.
        **method_options: options of the methods.

    Returns:
        A case for each provider and batch.

    Raises:
        CompileError: the model or the torch module cannot be compiled or run; OptionError for
            what does not fit.
    """
    choices = chosen(method, method_options)
    named = [_provider(name) for name in providers]
    if profiled and set(named) != {CPU}:
        raise OptionError("operators are timed on the CPU: profile with provider cpu only")
    if against is not None and against not in PEERS:
        raise OptionError(f"cannot compare with '{against}': {suggest(against, PEERS)}")
    if target in ("input", "seed"):
        raise OptionError(f"target '{target}': choose argmax or an index to measure")
    source, _ = load(model)
    if Recipe.read(_metadata(source)) is not None:
        raise ModelError("the model is compiled already; give the model that it was compiled from")
    with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
        files = [_written(source, Path(folder) / "source.onnx", None, None)]
        for choice in choices:
            with watch(f"compiling {choice.method.name}"):
                files.append(_compiled(source, choice, baseline, target, Path(folder)))
        weights = {tensor.name for tensor in source.graph.initializer}
        session = _session(files[0], CPU, threads)
        ports = [port for port in map(port_of, session.get_inputs()) if port.name not in weights]
        peer = None if against is None else _KINDS[against](source, module, threads)
        held = _Bench(
            source,
            files,
            ports,
            dict(inputs or {}),
            dict(dims or {}),
            baseline,
            threads,
            rounds,
            warmup,
            seed,
            peer,
            profiled,
            remembered,
            watch,
        )
        found = []
        for name in named:
            with watch("loading"):
                held.sessions = [_session(file, name, threads) for file in files]
            for batch in batches or _batches(held.given):
                feeds = _feeds(held, session, batch)
                found.append(_case(held, name, batch, feeds))
        return found


def _metadata(model: ModelProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in model.metadata_props}


def _provider(name: str) -> str:
    found = PROVIDERS.get(name.lower(), name)
    return str(providers_for(onnxruntime(), [found])[0])


def _compiled(
    source: ModelProto, choice: Choice, baseline: Any, target: Any, folder: Path
) -> _File:
    start = time.perf_counter()
    name = choice.method.name
    job = prepare(source, {name: choice.options}, baseline=baseline, target=target)
    proto = job.graph.to_proto()
    seconds = time.perf_counter() - start
    return _written(proto, folder / f"{name}.onnx", choice, seconds)


def _written(model: ModelProto, path: Path, choice: Choice | None, seconds: float | None) -> _File:
    size = sum(file.stat().st_size for file in save(model, path))
    recipe = Recipe.read(_metadata(model))
    return _File(str(path), choice, len(model.graph.node), size, seconds, recipe)


def _session(file: _File, provider: str, threads: int) -> Any:
    ort = onnxruntime()
    name = "the model" if file.choice is None else f"the model for {file.choice.method.name}"
    wanted = [provider] if provider == CPU else [provider, CPU]
    options = session_options(ort, threads)
    session = open_session(ort, file.path, wanted, name, options=options)
    if session.get_providers()[0] != provider:
        raise CompileError(f"ONNX Runtime cannot start '{provider}' here: is its device there?")
    return session


# -- inputs ----------------------------------------------------------------------------------------


def _batches(given: Mapping[str, npt.ArrayLike]) -> list[int]:
    sizes = [np.shape(array)[0] for array in given.values() if np.ndim(array)]
    return sizes[:1] or [1]


def _feeds(held: _Bench, session: Any, batch: int) -> dict[str, Array]:
    """Inputs of this batch that the source model runs on."""
    for port in held.ports:
        first = port.shape[0] if port.shape and port.name not in held.given else batch
        if isinstance(first, int) and first != batch:
            raise OptionError(
                f"batch {batch} does not fit: the first axis of input '{port.name}' is {first}"
            )
    given = {name: _repeated(array, batch) for name, array in held.given.items()}

    def evaluate(feeds: dict[str, Array]) -> Array:
        values = _run(session, feeds)
        floats = [v.ravel() for v in values if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
        return np.concatenate([np.zeros(1), *floats])

    drawer: Drawer = drawer_for(held.source, held.ports, given, held.dims, evaluate, batch)
    return fill(held.ports, given, drawer, np.random.default_rng(held.seed))


def _repeated(value: npt.ArrayLike, batch: int) -> Array:
    array = np.asarray(value)
    return array[np.arange(batch) % len(array)] if array.ndim and len(array) else array


def _with_baselines(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds, with zeros for baselines that are given at run time."""
    found = dict(feeds)
    for port in map(port_of, session.get_inputs()):
        source = feeds.get(port.name.removesuffix("_baseline"))
        if port.name not in found and source is not None:
            found[port.name] = np.zeros((1, *source.shape[1:]), source.dtype)
    return found


# -- running ---------------------------------------------------------------------------------------


def _run(session: Any, feeds: Mapping[str, Array], names: Sequence[str] = ()) -> list[Any]:
    wanted = list(names) or [output.name for output in session.get_outputs()]
    try:
        return run_session(session, wanted, feeds)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise CompileError(f"ONNX Runtime failed to run the model: {line(error)}") from None


def _bound(session: Any, feeds: Mapping[str, Array]) -> Callable[[], None]:
    """A run with inputs and outputs on the session's device: nothing is copied to or from it."""
    device = device_of(session)
    binding = session.io_binding()
    kinds = onnxruntime().OrtValue
    for name, array in feeds.items():
        there = device[0] != "cpu"
        value = kinds.ortvalue_from_numpy(array, *device) if there else ort_value(array)
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, *device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _measured(
    calls: Sequence[Callable[[], Any]], rounds: int, warmup: int, seed: int
) -> tuple[Array, Array]:
    """Seconds of one run by the wall clock and by this process, [call, round] each."""
    repeats = [_repeats(call, warmup) for call in calls]
    wall, cpu = np.empty((2, len(calls), rounds))
    rng = np.random.default_rng(seed)
    for j in range(rounds):
        for i in rng.permutation(len(calls)):
            start, before = time.perf_counter(), time.process_time()
            for _ in range(repeats[i]):
                calls[i]()
            cpu[i, j] = (time.process_time() - before) / repeats[i]
            wall[i, j] = (time.perf_counter() - start) / repeats[i]
    return wall, cpu


def _repeats(call: Callable[[], Any], warmup: int) -> int:
    """How often a round calls it; ``warmup`` calls go before."""
    seconds = 0.0
    for _ in range(max(warmup, 1)):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return max(1, round(_SHORTEST / max(seconds, 1e-6)))


def _times(wall: Array, cpu: Array, i: int, to: int, on_cpu: bool) -> Times:
    return Times(
        1e3 * float(np.median(wall[i])),
        1e3 * float(np.median(cpu[i])) if on_cpu else None,
        _quartiles(wall[i] / wall[to]),
        _quartiles(cpu[i] / cpu[to]) if on_cpu else None,
    )


def _quartiles(ratios: Array) -> Quartiles:
    return Quartiles(*(float(q) for q in np.percentile(ratios, (25, 50, 75))))


def _case(held: _Bench, provider: str, batch: int, feeds: dict[str, Array]) -> Case:
    filled = [_with_baselines(session, feeds) for session in held.sessions]
    peers = _peers(held, feeds, filled) if held.peer else {}
    compared = [i for i, (call, _) in peers.items() if call is not None]
    with held.watch(f"batch {batch}: running"):
        try:
            calls: list[Callable[[], Any]] = [
                _bound(session, values)
                for session, values in zip(held.sessions, filled, strict=True)
            ]
            calls += [call for call, _ in peers.values() if call is not None]
            wall, cpu = _measured(calls, held.rounds, held.warmup, held.seed)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise CompileError(f"ONNX Runtime failed to run the model: {line(error)}") from None
    rows: list[Row] = []
    for i, file in enumerate(held.files):
        row = _row(file, _times(wall, cpu, i, 0, provider == CPU), batch)
        if provider == CPU and held.remembered:
            row = _remembered(held, row, file, filled[i], rows[0] if rows else None)
        if held.profiled and file.choice is not None:
            own = [info.name for info in held.source.graph.output]
            with held.watch(f"batch {batch}: profiling {row.method}"):
                row = replace(row, profile=profile(file.path, filled[i], own, held.threads))
        if i in peers:
            peer = peers[i][1]
            if i in compared:
                place = len(held.files) + compared.index(i)
                peer = replace(peer, times=_times(wall, cpu, place, i, provider == CPU))
            row = replace(row, peer=peer)
        rows.append(row)
    return Case(provider, batch, {name: x.shape for name, x in feeds.items()}, tuple(rows))


def _row(file: _File, times: Times, batch: int) -> Row:
    method = None if file.choice is None else file.choice.method.name
    options = {} if file.choice is None else dict(file.choice.options)
    speed = 1e3 * batch / times.wall_ms
    return Row(method, options, file.nodes, file.size, file.seconds, times, speed)


def _remembered(
    held: _Bench, row: Row, file: _File, feeds: Mapping[str, Array], forward: Row | None
) -> Row:
    """The row with the memory of a run, as far as the system tells."""
    with held.watch(f"measuring the memory of {row.method or 'the model'}"):
        memory = memory_of(file.path, feeds, held.threads)
    if memory is None:
        return row
    if forward is None:
        whole, below = activations_of(file.path, feeds, held.threads), memory.run
    else:
        whole, below = forward.activation_bytes or 0, forward.run_bytes or 0
    return replace(
        row,
        loaded_bytes=memory.loaded,
        run_bytes=memory.run,
        run_ratio=memory.run / below if below else None,
        activation_bytes=whole,
        activation_ratio=memory.run / whole if whole else None,
    )


def _peers(
    held: _Bench, feeds: dict[str, Array], filled: Sequence[Mapping[str, Array]]
) -> dict[int, tuple[Callable[[], Any] | None, PeerRow]]:
    """What Captum has for each compiled model, by its place, and how far its numbers are off."""
    assert held.peer is not None
    found: dict[int, tuple[Callable[[], Any] | None, PeerRow]] = {}
    baseline = 0.0 if isinstance(held.baseline, str) else held.baseline
    for i, (file, session) in enumerate(zip(held.files, held.sessions, strict=True)):
        if file.choice is None or file.recipe is None:
            continue
        recipe, method = file.recipe, file.choice.method.name
        names = [recipe.attribution(tensor, method) for tensor in recipe.inputs]
        y, *ours = _run(session, filled[i], [recipe.output, *names])
        if i == 1:
            held.peer.check(feeds, y)
        target = _classes(y, recipe.target)
        try:
            with held.watch(f"preparing {held.peer.name}'s {method}"):
                call = held.peer.call(file.choice, feeds, recipe.inputs, target, baseline)
                theirs = call()
        except Unsuited as reason:
            found[i] = None, PeerRow(held.peer.name, problem=str(reason))
            continue
        difference = None if method in RANDOM else _difference(theirs, ours)
        found[i] = call, PeerRow(held.peer.name, difference=difference)
    return found


def _classes(y: Array, target: Any) -> Array | None:
    """The class of each sample, for a peer; None for outputs with one value a sample."""
    if y.ndim == 1:
        return None
    if y.ndim != 2:
        raise OptionError(
            f"captum is compared on outputs [N, C]; the explained one has {y.ndim} axes"
        )
    if isinstance(target, str):
        return np.asarray(y.argmax(axis=1))
    return np.full(len(y), np.ravel(target)[0])


def _difference(theirs: Sequence[Array], ours: Sequence[Array]) -> float:
    gap = max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(theirs, ours, strict=True))
    return gap / (max(float(np.abs(b).max(initial=0.0)) for b in ours) or 1.0)


__all__ = ["PROVIDERS", "Case", "PeerRow", "Quartiles", "Row", "Times", "bench"]
