"""The random numbers inside the graph: the same everywhere, and random."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

ort = pytest.importorskip("onnxruntime")

from onnx_attrib import noise  # noqa: E402
from onnx_attrib.ir import Graph  # noqa: E402

Array = np.ndarray
PRIME = 2147483579


def restated(seed: int, stream: str, draws: int, count: int) -> Array:
    """The uniform numbers one by one, from the module's description, in Python's own integers."""
    result = np.empty((draws, count))
    for draw in range(draws):
        digest = hashlib.sha256(f"{seed}/{stream}/{draw}".encode()).digest()
        k = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") % PRIME for i in range(4)]
        for i in range(count):
            z = (i + k[0]) % PRIME
            for key in k[1:]:
                z = (z**3 + key) % PRIME
            result[draw, i] = min(max(z / PRIME, 2.0**-32), 1 - 2.0**-24)
    return result


def restated_normal(seed: int, stream: str, draws: int, count: int) -> Array:
    """Box and Muller's pairs of them."""
    u = restated(seed, stream, draws, count + count % 2)
    result = np.empty_like(u)
    for draw in range(draws):
        for j in range(0, u.shape[1], 2):
            radius = math.sqrt(-2 * math.log(u[draw, j]))
            result[draw, j] = radius * math.cos(2 * math.pi * u[draw, j + 1])
            result[draw, j + 1] = radius * math.sin(2 * math.pi * u[draw, j + 1])
    return result[:, :count]


def drawn(kind: str, seed: int, stream: str, draws: int, count: int) -> Array:
    """What a graph makes of them, in ONNX Runtime."""
    scalar = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    copy = helper.make_tensor_value_info("same", TensorProto.INT64, [])
    body = helper.make_graph([helper.make_node("Identity", ["count"], ["same"])], "g", [], [])
    body.input.append(scalar)
    body.output.append(copy)
    opset = [helper.make_opsetid("", 21)]
    graph = Graph(helper.make_model(body, opset_imports=opset, ir_version=10))
    table = graph.constant(noise.keys(seed, stream, draws))
    result = getattr(noise, kind)(graph, table, graph.inputs[0])
    graph.outputs[:] = [result]
    model = graph.to_proto()
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"count": np.array(count)})[0]


def kolmogorov(values: Array, distribution: Array) -> float:
    """√n times the largest gap between the empirical distribution and the given one."""
    order = np.argsort(values)
    below = np.arange(len(values)) / len(values)
    gap = np.abs(distribution[order] - below).max() + 1 / len(values)
    return float(gap * np.sqrt(len(values)))


def normal_distribution(z: Array) -> Array:
    return np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in z.ravel()]).reshape(z.shape)


def test_cubing_permutes() -> None:
    assert all(PRIME % k for k in range(2, int(PRIME**0.5) + 1))
    assert PRIME == noise.PRIME
    assert (PRIME - 1) % 3


@pytest.mark.parametrize(("draws", "count"), [(1, 1), (3, 8), (2, 31)])
@pytest.mark.parametrize("seed", [0, 7])
def test_restated(seed: int, draws: int, count: int) -> None:
    u = drawn("uniform", seed, "a", draws, count)
    np.testing.assert_allclose(u, restated(seed, "a", draws, count), rtol=1e-6)
    z = drawn("normal", seed, "a", draws, count)
    assert z.shape == (draws, count)
    np.testing.assert_allclose(z, restated_normal(seed, "a", draws, count), rtol=1e-5, atol=2e-6)


def test_an_entry_depends_on_its_place_only() -> None:
    """Neither on how many entries nor on how many draws there are."""
    many = drawn("normal", 3, "a", 5, 1001)
    np.testing.assert_array_equal(drawn("normal", 3, "a", 2, 40), many[:2, :40])


@pytest.mark.parametrize("seed", range(4))
def test_moments_and_distribution(seed: int) -> None:
    """Bounds of five standard errors; Kolmogorov's at a significance of 2e-5."""
    u = drawn("uniform", seed, "a", 20, 10_000).astype(np.float64)
    z = drawn("normal", seed, "a", 20, 10_000).astype(np.float64)
    n = u.size
    assert ((u > 0) & (u < 1)).all()
    assert np.isfinite(z).all()
    moments = (
        *((u - 0.5, *of) for of in ((1, 0, 1 / 12), (2, 1 / 12, 1 / 80), (3, 0, 1 / 448))),
        *((z, *of) for of in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105))),
    )
    for v, k, mean, square in moments:
        error = math.sqrt((square - mean**2) / n)
        assert abs(np.mean(v**k) - mean) < 5 * error, k
    assert kolmogorov(u.ravel(), u.ravel()) < 2.4
    assert max(kolmogorov(row, row) for row in u) < 2.4
    assert kolmogorov(z.ravel(), normal_distribution(z.ravel())) < 2.4
    # Tails: P(|z| > 3) = 0.0027.
    beyond = (np.abs(z) > 3).sum()
    assert abs(beyond - 0.0026998 * n) < 5 * math.sqrt(0.0027 * n)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_uncorrelated(kind: str) -> None:
    """Neighbours, draws, streams and seeds: no correlation beyond five standard errors."""
    draws, count = 40, 4096
    tables = [drawn(kind, s, name, draws, count) for s, name in ((0, "a"), (1, "a"), (0, "b"))]
    rows = np.concatenate(tables).astype(np.float64)
    rows = (rows - rows.mean()) / rows.std()
    between = (rows @ rows.T)[np.triu_indices(len(rows), 1)] / math.sqrt(count)
    assert np.abs(between).max() < 5.2
    assert abs(between.std() - 1) < 0.05
    for lag in (1, 2, 3, 4, 7, 16, 28, 64, 224, 784):
        product = rows[:, lag:] * rows[:, :-lag]
        assert abs(product.mean()) * math.sqrt(product.size) < 5, lag


def test_triples_fill_the_cube() -> None:
    """χ² of 16³ cells over triples of neighbours."""
    u = drawn("uniform", 0, "a", 100, 9999).reshape(-1, 3)
    cells = np.histogramdd(u, bins=(16, 16, 16), range=[(0, 1)] * 3)[0]
    mean = len(u) / cells.size
    chi = ((cells - mean) ** 2 / mean).sum()
    freedom = cells.size - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
