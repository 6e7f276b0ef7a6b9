"""``onnx-attrib ops``, the kernel table, and what the compiler reports about conservation."""

from __future__ import annotations

import json

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto

from onnx_attrib import kernels, rules
from onnx_attrib.cli import main
from onnx_attrib.compiler import prepare
from onnx_attrib.errors import OptionError
from onnx_attrib.kernels import bound, compact, placement
from onnx_attrib.operators import KINDS, operators

# -- the table of operators ------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["ops", *arguments])


def test_every_operator_is_there() -> None:
    found = {(info.domain, info.name): info for info in operators()}
    schemas = {
        (s.domain, s.name)
        for s in onnx.defs.get_all_schemas_with_history()
        if (s.domain == "" and s.since_version <= 26) or s.domain == "ai.onnx.ml"
    }
    assert found.keys() == schemas
    # No row of the rule table is left out.
    rows = {(row.domain, row.op) for row in rules.table() if row.domain in ("", "ai.onnx.ml")}
    assert rows <= found.keys()
    assert {info.kind for info in found.values()} <= set(KINDS)
    for info in found.values():
        assert max(info.versions) <= 26 or info.domain
        assert (info.gradient == "none") == (info.kind == "no rule")


KIND = {
    "Conv": "bilinear",
    "Relu": "elementwise",
    "Sum": "linear",
    "Max": "max-like",
    "MaxPool": "max-like",
    "Softmax": "composite",
    "LSTM": "structured",
    "ArgMax": "barrier",
    "Constant": "barrier",
    "Attention": "lowered",
    "Upsample": "lowered",
    "SoftmaxCrossEntropyLoss": "lowered",
    "BitCast": "no rule",
    "ai.onnx.ml::Scaler": "linear",
    "ai.onnx.ml::TreeEnsembleRegressor": "no rule",
}


def test_classes() -> None:
    assert {name: info.kind for name, info in zip(KIND, operators(list(KIND)), strict=True)} == KIND


def test_what_a_row_says() -> None:
    where, div, quantize, trees, pool = operators(
        ["Where", "Div", "QuantizeLinear", "TreeEnsembleClassifier", "MaxPool"]
    )
    changes = "exact where the condition is the same at x and x̄, or an operand changes"
    assert where.conservation == changes
    assert div.classes == ("linear", "elementwise", "composite")
    assert quantize.gradient == "straight through"
    assert "occlusion" in trees.note
    assert pool.versions == (1, 8, 10, 11, 12, 22)
    assert (pool.gradient, pool.conservation, pool.cuda) == ("exact", "exact", "cuda")


def test_command() -> None:
    result = call()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-1].startswith(f"{len(operators())} operators: linear ")
    assert any(line.startswith("elementwise (") for line in lines)
    result = call("Conv", "relu", "ai.onnx::Gemm")
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "operator",
        "elementwise",
        "Relu",
        "bilinear",
        "Conv",
        "Gemm",
        "3",
    ]


def test_json() -> None:
    found = json.loads(call("--json").stdout)
    assert found["onnxruntime"] == kernels.VERSION
    assert sum(found["counts"].values()) == len(found["operators"])
    by_name = {info["name"]: info for info in found["operators"]}
    assert by_name["Tan"]["cuda"] == "cpu"
    assert by_name["Gather"]["conservation"].startswith("exact where the indices")


def test_unknown_names() -> None:
    result = call("Conv", "Reluu")
    assert result.exit_code == 2
    assert "did you mean 'Relu'?" in result.stderr
    with pytest.raises(OptionError, match="no operator 'Nonsense'"):
        operators(["Nonsense"])


# -- the kernel table ------------------------------------------------------------------------------

ON_CPU = """
MaxUnpool Col2Im LpPool GlobalLpPool AffineGrid BitShift BitwiseAnd Tan Atan Asin Acos Sinh Cosh
Asinh Acosh Atanh Mean Celu MeanVarianceNormalization Hardmax Det DFT STFT Unique Multinomial
MaxRoiPool SplitToSequence
"""
ON_CUDA = """
Conv ConvTranspose MatMul Gemm Einsum MaxPool AveragePool ScatterElements ScatterND GatherElements
Where Expand ReduceSum ReduceMax ReduceMean Relu Softmax LayerNormalization LSTM GRU Scan Loop If
"""


@pytest.mark.parametrize("op", ON_CPU.split())
def test_without_a_cuda_kernel(op: str) -> None:
    assert placement(op, "", 21) == "cpu"


@pytest.mark.parametrize("op", ON_CUDA.split())
def test_with_a_cuda_kernel(op: str) -> None:
    assert placement(op, "", 21) == "cuda"


def test_open_registrations_serve_their_own_version_only() -> None:
    for op in "MaxPool Dropout Elu Selu ThresholdedRelu InstanceNormalization EyeLike".split():
        assert placement(op, "", 21) == "cuda", op
        assert placement(op, "", 22) != "cuda", op
    # Closed ones serve all versions that they span.
    assert placement("Conv", "", 11, {"T": "tensor(float)"}) == "cuda"
    assert placement("RMSNormalization", "", 21) == "none"
    assert placement("Upsample", "", 21) == "none"


def test_types_decide() -> None:
    assert placement("Conv", "", 21, {"T": "float16"}) == "cuda"
    assert placement("Conv", "", 22, {"T": "tensor(bfloat16)"}) == "cuda"
    assert placement("MatMul", "", 21, {"T": "int64"}) == "cpu"
    assert placement("Cast", "", 21, bound("Cast", "", 21, ["float32"], ["int64"])) == "cuda"
    assert placement("Cast", "", 21, {"T1": "float32", "T2": "tensor(string)"}) == "cpu"
    assert placement("Where", "", 21, bound("Where", "", 21, ["bool", "bool", "bool"])) == "none"
    assert placement("GatherND", "", 21, bound("GatherND", "", 21, ["int32", "int64"])) == "cpu"
    one_hot = bound("OneHot", "", 21, ["float32", "float32", "float32"])
    assert placement("OneHot", "", 21, one_hot) == "cpu"
    assert bound("Sum", "", 13, ["float32"] * 3) == {"T": "float32"}


def test_compacting() -> None:
    entry = {"domain": "", "op": "A", "prov": "CUDAExecutionProvider", "ver": [1, 2**31 - 1]}
    listed = [
        {**entry, "tc": {"T": ["tensor(float)"], "I": ["tensor(int64)"]}},
        {**entry, "tc": {"T": ["tensor(double)"], "I": ["tensor(int64)"]}},
        {**entry, "tc": {"T": ["tensor(double)"], "I": ["tensor(int32)"]}},
        {**entry, "ver": [1, 6], "tc": {"T": ["seq(tensor(float))"]}},
        {**entry, "prov": "TensorrtExecutionProvider", "tc": {}},
    ]
    table = compact(listed, "9", {})
    rows = table["kernels"][""]["A"]["CUDA"]
    assert [(first, last) for first, last, _ in rows] == [(1, 6), (1, None), (1, None)]
    spelled = [{k: table["sets"][i] for k, i in types.items()} for _, _, types in rows]
    # Float and double are one row; double with int32 indices is another, not float with them.
    assert {"T": ["double", "float"], "I": ["int64"]} in spelled
    assert {"T": ["double"], "I": ["int32"]} in spelled
    assert {"T": ["seq(float)"]} in spelled


# -- the compiler's report -------------------------------------------------------------------------


def notes(text: str, method: str = "deeplift") -> list[str]:
    model: ModelProto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    return prepare(model, method).notes


LED = """
led (float[N, 4] x) => (float[N, 4] y) <float zero = {0}, int64[1] last = {-1}>
{
  c = Greater (x, zero)
  s = Sigmoid (x)
  t = ReduceSum (s, last)
  picked = Where (c, t, x)
  place = ArgMax <axis = 1> (x)
  best = GatherElements <axis = 1> (picked, place)
  y = Add (picked, best)
}
"""


def test_conditions_and_indices_are_named() -> None:
    where, gather = notes(LED)
    assert "Where 'picked': exact where the condition is the same" in where
    assert "GatherElements 'best': exact where the indices are the same" in gather
    assert "depends on what is attributed" in where
    assert notes(LED, "gradient") == []
    assert notes(LED, "integrated-gradients") == []


def test_clusters_and_fixed_indices_are_not() -> None:
    # An exponential unit spelled with Where is one nonlinearity; shapes are the same at x and x̄.
    assert not notes(
        """
    unit (float[N, 4] x) => (float[N, 3, 4] y)
      <float zero = {0}, float one = {1}, int64[2] index = {0, 2}, int64[1] three = {3}>
    {
      c = Greater (x, zero)
      e = Exp (x)
      b = Sub (e, one)
      u = Where (c, x, b)
      g = Gather <axis = 1> (u, index)
      size = Shape (x)
      batch = Slice (size, first, second)
      wanted = Concat <axis = 0> (batch, three, four)
      w = Unsqueeze (u, second)
      y = Expand (w, wanted)
    }
    """.replace(
            "three = {3}",
            "three = {3}, int64[1] four = {4}, int64[1] first = {0}, int64[1] second = {1}",
        )
    )


def test_steps_beside_the_way_are_named() -> None:
    (note,) = notes("""
    votes (float[N, 4] x) => (float[N, 1] y) <float zero = {0}, int64[1] last = {-1}>
    {
      c = Greater (x, zero)
      vote = Cast <to = 1> (c)
      count = ReduceSum (vote, last)
      total = ReduceSum (x, last)
      y = Add (count, total)
    }
    """)
    assert note.startswith("'count' into Add 'y': depends on what is attributed by steps only")


STEPPED = """
stepped (float[N, 4] x) => (float[N, 4] y) <int64 count = {{3}}, bool go = {{1}}>
{{
  y = Loop (count, go, x) <body = step (int64 i, bool on, float[N, 4] s) =>
    (bool still, float[N, 4] after)
  {{
    still = Identity (on)
    zero = Constant <value_float = 0.0> ()
    axis = Constant <value_int = 1> ()
    {inner}
  }}>
}}
"""


def test_subgraphs_are_read() -> None:
    led = "c = Less (s, zero)  h = Neg (s)  after = Where (c, h, s)"
    assert "Where 'after'" in notes(STEPPED.format(inner=led))[0]
    # The number of the step is the same at x and x̄.
    counted = "g = Gather <axis = 1> (s, i)  u = Unsqueeze (g, axis)  after = Mul (s, u)"
    assert notes(STEPPED.format(inner=counted)) == []
    powers = "two = Constant <value_float = 2.0> ()  after = Pow (s, two)"
    assert notes(STEPPED.format(inner=powers)) == []


def test_steps_counted_by_shapes_are_the_same() -> None:
    assert not notes("""
    counted (float[N, T, 4] x) => (float[N, 4] y)
      <bool go = {1}, int64 axis = {1}, int64[1] first = {0}>
    {
      sizes = Shape (x)
      count = Gather (sizes, axis)
      start = ReduceMax <axes = [1], keepdims = 0> (x)
      y = Loop (count, go, start) <body = step (int64 i, bool on, float[N, 4] s) =>
        (bool still, float[N, 4] after)
      {
        still = Identity (on)
        entry = Gather <axis = 1> (x, i)
        after = Mul (s, entry)
      }>
    }
    """)
