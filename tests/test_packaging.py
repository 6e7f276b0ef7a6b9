"""The package as users install it: from a wheel, from an sdist, editable."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Forget how the running environment has the project installed, then look only at {site}.
PROBE = """
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
sys.path.insert(0, {site!r})
site.addsitedir({site!r})
import importlib.util, onnx_attrib, onnx_attrib.passes.differentiate, onnx_attrib.rules
assert importlib.util.find_spec("passes") is None, "a bare 'passes' is importable"
print(onnx_attrib.__version__, onnx_attrib.passes.__file__)
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def probe(site: Path, start: Path) -> tuple[str, Path]:
    """Version and passes' place, as a clean interpreter sees them through ``site``."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(site=str(site))],
        cwd=start,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, path = done.stdout.split(maxsplit=1)
    return version, Path(path.strip())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, so that building leaves no trace in the checkout."""
    target = tmp_path_factory.mktemp("source")
    names = ["pyproject.toml", "README.md", "LICENSE"]
    for folder in ("onnx_attrib", "passes"):
        names += [str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/**/*.py")]
    names += [str(path.relative_to(ROOT)) for path in ROOT.glob("onnx_attrib/data/*")]
    names.append("onnx_attrib/py.typed")
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    return target


def test_wheel(source: Path, tmp_path: Path) -> None:
    pip("wheel", "--no-deps", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "onnx_attrib/passes/differentiate.py" in names
    assert "onnx_attrib/py.typed" in names
    assert [name for name in names if name.startswith("onnx_attrib/data/kernels-")]
    assert {"onnx_attrib/data/report.css", "onnx_attrib/data/report.js"} <= set(names)
    assert not [name for name in names if name.startswith(("passes/", "tests/", "models/"))]
    pip("install", "--no-deps", "--target", tmp_path / "site", wheel)
    assert tmp_path in probe(tmp_path / "site", tmp_path)[1].parents


def test_sdist(source: Path, tmp_path: Path) -> None:
    code = "from setuptools import build_meta; build_meta.build_sdist(__import__('sys').argv[1])"
    pip("install", "--target", tmp_path / "tools", "setuptools>=77")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        env={"PYTHONPATH": str(tmp_path / "tools"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip("install", "--no-deps", "--target", tmp_path / "site", sdist)
    assert tmp_path in probe(tmp_path / "site", tmp_path)[1].parents


def test_editable(source: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", tmp_path / "site", "-e", source)
    assert probe(tmp_path / "site", tmp_path)[1] == source / "passes" / "__init__.py"
    # A change in the checkout is seen without another install.
    (source / "onnx_attrib" / "version.py").write_text('VERSION = "9.9.9+changed"\n')
    assert probe(tmp_path / "site", tmp_path)[0] == "9.9.9+changed"
