"""What is attributed where nobody says what, and the source that the result names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

pytest.importorskip("onnxruntime")

import onnx_attrib
from onnx_attrib.compiler import prepare

from . import numeric

HEAD = "r = Reshape (v, flat) h = Tanh (r) y = MatMul (h, w)"


def classifier(kind: str, body: str) -> ModelProto:
    """An input of 4 x 3 numbers of some type, and two logits."""
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({kind}[N, 4, 3] image) => (float[N, 2] y)
        <float scale = {{0.1}}, uint8 point = {{7}}, int64[2] flat = {{0, -1}}, int64 nine = {{9}},
         float[2] off_on = {{0, 1}}> {{ {body} {HEAD} }}"""
    )
    columns = 108 if "OneHot" in body else 12
    w = np.random.default_rng(0).standard_normal((columns, 2)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    return model


@pytest.mark.parametrize(
    ("kind", "body", "attributed"),
    [
        ("uint8", "f = Cast <to = 1> (image) v = Mul (f, scale)", "f"),
        ("bool", "f = Cast <to = 1> (image) v = Mul (f, scale)", "f"),
        ("uint8", "t = Transpose <perm = [0, 2, 1]> (image) v = Cast <to = 1> (t)", "v"),
        ("int32", "t = Mul (image, image) v = Cast <to = 1> (t)", "v"),
        ("uint8", "v = DequantizeLinear (image, scale, point)", "v"),
        ("int64", "v = OneHot (image, nine, off_on)", "v"),
        (
            "int32",
            """s = Shape (image) n = ReduceProd <keepdims = 0> (s) d = Cast <to = 1> (n)
            f = Cast <to = 1> (image) v = Div (f, d)""",
            "f",
        ),
    ],
)
def test_what_an_integer_input_becomes(kind: str, body: str, attributed: str) -> None:
    model = classifier(kind, body)
    onnx.checker.check_model(model, full_check=True)
    job = prepare(model, "deeplift", baseline="input", target=0)
    (note,) = job.notes
    assert "'image'" in note
    assert f"'{attributed}'" in note
    compiled = job.graph.to_proto()
    numeric.check_graph(compiled, model)
    assert [info.name for info in compiled.graph.output] == ["y", f"{attributed}_attribution"]
    rng = np.random.default_rng(1)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(numeric.element_type(model.graph.input[0]))
    image, other = (rng.integers(0, 9, (2, 4, 3)).astype(dtype) for _ in range(2))
    found = numeric.run(compiled, {"image": image, "image_baseline": other})
    y, y_bar = (numeric.run(model, {"image": x})["y"][:, 0] for x in (image, other))
    total = found[f"{attributed}_attribution"].reshape(2, -1).sum(1)
    np.testing.assert_allclose(total, y - y_bar, rtol=1e-4, atol=1e-5)


def test_an_integer_input_is_refused_with_advice() -> None:
    model = classifier("uint8", "f = Cast <to = 1> (image) v = Mul (f, scale)")
    with pytest.raises(onnx_attrib.OptionError, match=r"'image' is uint8.*instead: 'f'"):
        onnx_attrib.compile(model, inputs=["image"])


def test_floats_come_first() -> None:
    """A model that also takes floats is attributed to these, as ever."""
    model = classifier("uint8", "f = Cast <to = 1> (image) p = Mul (f, scale) v = Add (p, x)")
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4, 3])
    model.graph.input.append(info)
    job = prepare(model, "gradient")
    assert job.scope.names == ["x"]
    assert job.notes == []


def test_digest_of_external_data(tmp_path: Path) -> None:
    """The file, then the data files: two models that differ in their weights only differ."""
    digests = []
    for scale in (1.0, 2.0):
        folder = tmp_path / str(scale)
        folder.mkdir()
        model = classifier("float", "v = Mul (image, scale)")
        (w,) = [t for t in model.graph.initializer if t.name == "w"]
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w) * np.float32(scale), "w"))
        options: dict[str, Any] = {"save_as_external_data": True, "size_threshold": 64}
        onnx.save_model(model, folder / "m.onnx", location="m.onnx.data", **options)
        compiled = onnx_attrib.compile(folder / "m.onnx", method="gradient")
        (found,) = [p.value for p in compiled.metadata_props if p.key.endswith("source_sha256")]
        written = (folder / "m.onnx").read_bytes() + (folder / "m.onnx.data").read_bytes()
        assert found == hashlib.sha256(written).hexdigest()
        digests.append(found)
    assert digests[0] != digests[1]
