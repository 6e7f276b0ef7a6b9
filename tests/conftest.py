"""A summary of the operator tests: how many cases of each operator hold."""

from __future__ import annotations

import textwrap
from collections import Counter

import pytest


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
