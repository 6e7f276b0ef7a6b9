"""Marks that tests share."""

from __future__ import annotations

import sys

import pytest

# What bench does elsewhere is tested everywhere: test_where_memory_cannot_be_measured.
measures_memory = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux tells what a run takes (/proc): elsewhere bench leaves memory out",
)
