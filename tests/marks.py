"""Marks that tests share."""

from __future__ import annotations

import sys

import pytest

measures_memory = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux tells what a run takes (/proc): elsewhere bench leaves memory out",
)
