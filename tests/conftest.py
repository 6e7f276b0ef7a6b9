"""What the command line's tests run on, and how many cases of each operator hold."""

from __future__ import annotations

import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from .command import MLP, SMALL, succeeds, write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="another number, other random cases (each test draws from its own stream)",
    )


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test: the same in every run with the same --seed."""
    name = zlib.crc32(request.node.nodeid.encode())
    return np.random.default_rng([request.config.getoption("--seed"), name])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in a folder of its own; no temporary file may be left there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped perceptron, compiled for DeepLIFT."""
    path = tmp_path_factory.mktemp("compiled") / "mlp.onnx"
    succeeds("compile", MLP, "-o", path, "--delta")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model of two layers with probabilities as output."""
    return write(SMALL, tmp_path / "small.onnx")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if "operator" in properties:
                counts.setdefault(str(properties["operator"]), Counter())[outcome] += 1
    if not counts:
        return
    terminalreporter.section("ONNX node cases by operator (held / run)")
    parts = [f"{name} {count['passed']}/{count.total()}" for name, count in sorted(counts.items())]
    for line in textwrap.wrap(", ".join(parts), 98, break_long_words=False):
        terminalreporter.write_line(line)
