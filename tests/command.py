"""What the tests of the command line share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
from click.testing import CliRunner, Result

from onnx_attrib.cli import main

ROOT = Path(__file__).parent.parent
MLP = ROOT / "models" / "mnist_mlp.onnx"
CNN = ROOT / "models" / "mnist_cnn.onnx"
DIGIT = ROOT / "models" / "digits" / "3.png"

SMALL = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 3] x) => (float[N, 2] probs)
  <float[3, 2] w = {1, -2, 0.5, 1, 2, -1}>
{
  logits = MatMul (x, w)
  probs = Softmax <axis = 1> (logits)
}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fails(*arguments: str | Path, code: int = 1) -> str:
    """The one-message failure of a command: no traceback, nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def succeeds(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    code = "from onnx_attrib.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)
