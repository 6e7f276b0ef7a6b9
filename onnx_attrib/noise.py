"""Random numbers inside the graph, the same on every execution provider and in every run.

Counter-based: entry i of draw d is a hash of (seed, stream, d, i) and of nothing else. The hash is
a keyed permutation of the numbers below a prime p: three rounds z → (z + k)³ mod p, the last
followed by one more key. All products stay below 2⁶³, so it needs only int64 Add, Mul and Mod. The
keys come from SHA-256 of the text "seed/stream/draw", eight bytes each.

Uniform numbers are z / p. Normal ones come in pairs from pairs of these (Box and Muller 1958):
√(−2 ln u₁)·cos 2πu₂ and √(−2 ln u₁)·sin 2πu₂ with u₁ = u[2j], u₂ = u[2j+1].
"""

from __future__ import annotations

import hashlib

import numpy as np

from onnx_attrib.ir import Graph, Tensor

PRIME = 2**31 - 69
"""The largest prime below 2³¹ modulo which cubing is a permutation."""
KEYS = 4
"""How many keys a draw has."""
_LOWEST, _HIGHEST = 2.0**-32, 1 - 2.0**-24


def keys(seed: int, stream: str, draws: int) -> np.ndarray:
    """The keys of draws 0, 1, …: int64 [draws, 4], uniform below ``PRIME``."""
    rows = []
    for draw in range(draws):
        digest = hashlib.sha256(f"{seed}/{stream}/{draw}".encode()).digest()
        words = (digest[i : i + 8] for i in range(0, 8 * KEYS, 8))
        rows.append([int.from_bytes(word, "big") % PRIME for word in words])
    return np.array(rows, np.int64).reshape(draws, KEYS)


def numbers(graph: Graph, keys: Tensor, count: Tensor) -> Tensor:
    """Whole numbers below ``PRIME``, int64 [draws, count], all different within a draw.

    ``keys``: [draws, 4]; ``count``: int64 [], less than ``PRIME``.
    """
    op = graph.op
    places = op.Range(graph.constant(0, np.int64), count, graph.constant(1, np.int64))
    columns = op.Split(keys, axis=1, num_outputs=KEYS, outputs=KEYS)
    z = op.Mod(op.Add(places, columns[0]), PRIME)
    for key in columns[1:]:
        square = op.Mod(op.Mul(z, z), PRIME)
        z = op.Mod(op.Add(op.Mul(square, z), key), PRIME)
    result: Tensor = z
    return result


def uniform(graph: Graph, keys: Tensor, count: Tensor) -> Tensor:
    """Uniform float32 in (0, 1), [draws, count], from the same as :func:`numbers`."""
    op, z = graph.op, numbers(graph, keys, count)
    fraction = op.Mul(op.Cast(z, to=np.dtype(np.float32)), 1 / PRIME)
    result: Tensor = op.Clip(fraction, _LOWEST, _HIGHEST)
    return result


def normal(graph: Graph, keys: Tensor, count: Tensor) -> Tensor:
    """Standard normal float32, [draws, count], from ``keys`` [draws, 4] and ``count`` int64 []."""
    op = graph.op
    even = op.Mul(op.Div(op.Add(count, 1), 2), 2)
    pairs = op.Reshape(uniform(graph, keys, even), [0, -1, 2])
    first, second = op.Split(pairs, axis=2, num_outputs=2, outputs=2)
    radius, angle = op.Sqrt(op.Mul(op.Log(first), -2.0)), op.Mul(second, 2 * np.pi)
    both = op.Concat(op.Mul(radius, op.Cos(angle)), op.Mul(radius, op.Sin(angle)), axis=2)
    flat = op.Reshape(both, [0, -1])
    result: Tensor = op.Slice(flat, [0], op.Reshape(count, [1]), [1])
    return result


__all__ = ["KEYS", "PRIME", "keys", "normal", "numbers", "uniform"]
