"""Operators that entered ONNX after opset 21, written with those that were there before.

Definitions: the ONNX operator reference, opsets 23 to 26. Where its own function bodies are right
but slow or fragile (run-time shape arithmetic, rows that are masked as a whole), these are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, helper, numpy_helper

from onnx_attrib.ir import Dim
from onnx_attrib.writer import Call, Definition, Writer

_LAST = int(np.iinfo(np.int64).max)


def scalar(value: float, dtype: np.dtype[Any]) -> np.ndarray:
    return np.array(value, dtype)


def swish(w: Writer, c: Call) -> Sequence[str | None]:
    """z · σ(α · z)."""
    z, alpha = c.x(0), c.attr("alpha")
    inner = z if alpha == 1 else w.op.Mul(z, scalar(alpha, c.dtype()))
    return [w.op.Mul(z, w.op.Sigmoid(inner))]


def rms_normalization(w: Writer, c: Call) -> Sequence[str | None]:
    """x / √(mean of x² + ε) · scale, over the axes from ``axis``."""
    op, axis = w.op, c.attr("axis")
    first = axis if axis < 0 else axis - c.rank()
    dtype, stash = c.dtype(), c.attr("stash_type")
    inner = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
    x = c.x(0) if dtype == inner or stash != 1 else op.Cast(c.x(0), to=1)
    inner = inner if stash == 1 else dtype
    energy = op.ReduceMean(op.Mul(x, x), list(range(first, 0)), keepdims=1)
    root = op.Sqrt(op.Add(energy, scalar(c.attr("epsilon"), inner)))
    normal = op.Mul(x, op.Reciprocal(root))
    if inner != dtype:
        normal = op.CastLike(normal, c.x(0))
    return [op.Mul(normal, c.x(1))]


def cumulative_product(w: Writer, c: Call) -> Sequence[str | None]:
    """The product of the entries up to each, one step of a Scan an entry."""
    op, x, axis = w.op, c.x(0), c.value(1)
    if axis is None:
        x = op.Reshape(x, around(w, c))
    at, rank = (1, 3) if axis is None else (int(axis.reshape(())) % c.rank(), c.rank())
    start = op.ConstantOfShape(
        op.Shape(op.ReduceSum(x, [at], keepdims=0)),
        value=numpy_helper.from_array(np.ones(1, c.dtype())),
    )
    backwards = int(bool(c.attr("reverse")))
    _, y = op.Scan(
        start,
        x,
        outputs=2,
        body=product_step(w, c, rank - 1),
        num_scan_inputs=1,
        scan_input_axes=[at],
        scan_output_axes=[at],
        scan_input_directions=[backwards],
        scan_output_directions=[backwards],
    )
    return [y if axis is not None else op.Reshape(y, op.Shape(c.x(0)))]


def product_step(w: Writer, c: Call, rank: int) -> GraphProto:
    """Multiply the product by an entry; give out the product before or after."""
    kind = helper.np_dtype_to_tensor_dtype(c.dtype())
    product, entry, after, given = (w.fresh(name) for name in ("product", "x", "after", "y"))
    nodes = [
        helper.make_node("Mul", [product, entry], [after]),
        helper.make_node("Identity", [product if c.attr("exclusive") else after], [given]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name in (product, entry, after, given)
    ]
    return helper.make_graph(nodes, "product", tensors[:2], tensors[2:])


def around(w: Writer, c: Call) -> str:
    """The shape [before, along, after] an axis that is only known at run time."""
    op, shape = w.op, w.op.Shape(c.x(0))
    axis = op.Mod(op.Reshape(op.Cast(c.x(1), to=7), [1]), np.array(c.rank(), np.int64))
    before = op.ReduceProd(op.Slice(shape, [0], axis), keepdims=1)
    after = op.ReduceProd(op.Slice(shape, op.Add(axis, [1]), [_LAST]), keepdims=1)
    result: str = op.Concat(before, op.Gather(shape, axis), after, axis=0)
    return result


def tensor_scatter(w: Writer, c: Call) -> Sequence[str | None]:
    """The cache with ``update`` written from each sample's index on, along ``axis``."""
    op, rank = w.op, c.rank()
    axis = c.attr("axis") % rank
    update = c.x(1)
    count = op.Squeeze(op.Shape(update, start=axis, end=axis + 1), [0])
    steps = op.Range(np.array(0, np.int64), count, np.array(1, np.int64))
    index = op.Reshape(steps, [-1 if k == axis else 1 for k in range(rank)])
    if c.has(2):
        start = op.Reshape(op.Cast(c.x(2), to=7), [-1] + [1] * (rank - 1))
        index = op.Add(index, start)
    if c.attr("mode") == "circular":
        index = op.Mod(index, op.Shape(c.x(0), start=axis, end=axis + 1))
    index = op.Expand(index, op.Shape(update))
    return [op.ScatterElements(c.x(0), index, update, axis=axis)]


def rotary_embedding(w: Writer, c: Call) -> Sequence[str | None]:
    """Pairs of entries of each head, turned by the angle of the token's position."""
    op, flat = w.op, c.rank() == 3
    x = c.x(0)
    heads = (
        op.Reshape(x, [0, 0, c.attr("num_heads"), -1])
        if flat
        else op.Transpose(x, perm=[0, 2, 1, 3])
    )
    turned, rest, size = heads, None, c.attr("rotary_embedding_dim")
    if size:
        turned = op.Slice(heads, [0], [size], [3])
        rest = op.Slice(heads, [size], [_LAST], [3])
    cos, sin = (
        op.Unsqueeze(op.Gather(c.x(i), c.x(3), axis=0) if c.has(3) else c.x(i), [2]) for i in (1, 2)
    )
    if c.attr("interleaved"):
        pairs = op.Split(op.Reshape(turned, [0, 0, 0, -1, 2]), axis=4, num_outputs=2, outputs=2)
        left, right = (op.Squeeze(part, [4]) for part in pairs)
    else:
        left, right = op.Split(turned, axis=3, num_outputs=2, outputs=2)
    real = op.Sub(op.Mul(left, cos), op.Mul(right, sin))
    imaginary = op.Add(op.Mul(left, sin), op.Mul(right, cos))
    if c.attr("interleaved"):
        parts = [op.Unsqueeze(part, [4]) for part in (real, imaginary)]
        result = op.Reshape(op.Concat(*parts, axis=4), [0, 0, 0, -1])
    else:
        result = op.Concat(real, imaginary, axis=3)
    if rest is not None:
        result = op.Concat(result, rest, axis=3)
    return [op.Reshape(result, [0, 0, -1]) if flat else op.Transpose(result, perm=[0, 2, 1, 3])]


# -- attention -------------------------------------------------------------------------------------


def attention(w: Writer, c: Call) -> Sequence[str | None]:
    """softmax(q · kᵀ · scale, capped, + bias) · v, with zero where all keys are masked.

    Returns Y, the present key and value, and one of four stages of the scores.
    """
    op, flat, dtype = w.op, c.rank() == 3, c.dtype()
    q, k, v = c.x(0), c.x(1), c.x(2)
    if flat:
        counts = [c.attr(f"{name}_num_heads") for name in ("q", "kv", "kv")]
        q, k, v = (split_heads(w, t, count) for t, count in zip((q, k, v), counts, strict=True))
    if c.has(4):
        k, v = op.Concat(c.x(4), k, axis=2), op.Concat(c.x(5), v, axis=2)
    present = (k, v)
    k, v = shared_heads(w, c, q, k), shared_heads(w, c, q, v)

    scores = op.MatMul(scaled(w, c, q), op.Transpose(k, perm=[0, 1, 3, 2]))
    stages = [scores]
    if c.attr("softcap"):
        cap = scalar(c.attr("softcap"), dtype)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    stages.append(scores)
    bias, dead = attention_bias(w, c, q, k)
    if bias is not None:
        scores = op.Add(scores, bias)
    stages.append(scores)
    if dead is not None:
        # Rows without a key count as equal scores, and their probabilities as zero.
        scores = op.Where(dead, scalar(0, dtype), scores)
    precision = c.attr("softmax_precision")
    if precision:
        scores = op.Cast(scores, to=precision)
    weights = op.Softmax(scores, axis=-1)
    if precision:
        weights = op.CastLike(weights, c.x(0))
    if dead is not None:
        weights = op.Where(dead, scalar(0, dtype), weights)
    stages.append(weights)
    y = op.MatMul(weights, v)
    if flat:
        y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
    return [y, *present, stages[c.attr("qk_matmul_output_mode")]]


def split_heads(w: Writer, tensor: Any, count: int) -> str:
    """[N, S, H · D] as [N, H, S, D]."""
    result: str = w.op.Transpose(w.op.Reshape(tensor, [0, 0, count, -1]), perm=[0, 2, 1, 3])
    return result


def head_counts(c: Call) -> tuple[Dim, Dim]:
    """How many heads the queries have, and the keys."""
    if c.rank() == 3:
        return c.attr("q_num_heads"), c.attr("kv_num_heads")
    return (c.shape(0) or (None,) * 4)[1], (c.shape(1) or (None,) * 4)[1]


def shared_heads(w: Writer, c: Call, q: Any, tensor: Any) -> Any:
    """Keys or values [N, H, S, D], each head repeated for the queries that share it."""
    op, (queries, keys) = w.op, head_counts(c)
    if queries == keys and queries is not None:
        return tensor
    if isinstance(queries, int) and isinstance(keys, int):
        wanted: Any = [queries]
        repeat: Any = [1, 1, queries // keys, 1, 1]
    else:
        wanted = op.Shape(q, start=1, end=2)
        shared = op.Div(wanted, op.Shape(tensor, start=1, end=2))
        repeat = op.Concat([1, 1], shared, [1, 1], axis=0)
    expanded = op.Expand(op.Unsqueeze(tensor, [2]), repeat)
    shape = op.Concat([0], wanted, op.Shape(tensor, start=2), axis=0)
    return op.Reshape(expanded, shape)


def scaled(w: Writer, c: Call, q: Any) -> str:
    """Queries times the scale, 1/√(head size) by default."""
    op, dtype, factor = w.op, c.dtype(), c.attr("scale")
    size = (c.shape() or (None,))[-1]
    if factor is None and isinstance(size, int):
        heads = c.attr("q_num_heads") if c.rank() == 3 else 1
        factor = math.sqrt(heads / size)
    if factor is None:
        root = op.Sqrt(op.CastLike(op.Shape(q, start=3, end=4), c.x(0)))
        divided: str = op.Div(q, root)
        return divided
    result: str = op.Mul(q, scalar(factor, dtype))
    return result


def attention_bias(w: Writer, c: Call, q: Any, k: str) -> tuple[str | None, str | None]:
    """What is added to the scores, and which rows have no key at all; None for none."""
    op, dtype = w.op, c.dtype()
    conditions = positions_allowed(w, c, q, k)
    certain = c.attr("is_causal") and len(conditions) == 1 and not c.has(6)
    mask = full_length(w, c, k) if c.has(3) else None
    if mask is not None and c.dtype(3) == np.bool_:
        conditions.append(mask)
        mask = None
    elif mask is None and not conditions:
        return None, None
    # As ONNX Runtime has it: the lowest number excludes, and does not become NaN in a difference.
    lowest = scalar(np.finfo(np.float32 if dtype.kind != "f" else dtype).min, dtype)
    bias = mask
    if conditions:
        allowed = conditions[0]
        for condition in conditions[1:]:
            allowed = op.And(allowed, condition)
        bias = op.Where(allowed, scalar(0, dtype) if mask is None else mask, lowest)
    if certain and not c.has(3):
        return bias, None
    best = op.ReduceMax(bias, [-1], keepdims=1)
    return bias, op.LessOrEqual(best, lowest)


def positions_allowed(w: Writer, c: Call, q: Any, k: str) -> list[str]:
    """Conditions on the positions of query and key: causal, window, filled part of a cache."""
    op, zero, one = w.op, np.array(0, np.int64), np.array(1, np.int64)
    left, right = (c.attr(f"{side}_window_size") for side in ("left", "right"))
    bounds = [side for side in (left, right) if side is not None and side >= 0]
    if not (c.attr("is_causal") or bounds or c.has(6)):
        return []
    total = op.Squeeze(op.Shape(k, start=2, end=3), [0])
    key = op.Unsqueeze(op.Range(zero, total, one), [0])
    filled = op.Reshape(c.x(6), [-1, 1, 1, 1]) if c.has(6) else None
    result = [] if filled is None else [op.Less(key, filled)]
    if not (c.attr("is_causal") or bounds):
        return result
    count = op.Shape(q, start=2, end=3)
    query = op.Unsqueeze(op.Range(zero, op.Squeeze(count, [0]), one), [1])
    if c.has(4):
        query = op.Add(query, op.Shape(c.x(4), start=2, end=3))
    elif filled is not None:
        query = op.Add(query, op.Sub(filled, count))
    if c.attr("is_causal"):
        result.append(op.LessOrEqual(key, query))
    if left is not None and left >= 0:
        result.append(op.GreaterOrEqual(key, op.Sub(query, [left])))
    if right is not None and right >= 0:
        result.append(op.LessOrEqual(key, op.Add(query, [right])))
    return result


def full_length(w: Writer, c: Call, k: str) -> str:
    """The mask, padded with what excludes to the number of keys."""
    op, mask, dtype = w.op, c.x(3), c.dtype(3)
    assert mask is not None
    if keys_known(c) == (c.shape(3) or (None,))[-1] and keys_known(c) is not None:
        return mask
    missing = op.Sub(op.Shape(k, start=2, end=3), op.Shape(mask, start=-1))
    filler = np.zeros((), dtype) if dtype == np.bool_ else scalar(-np.inf, dtype)
    padded: str = op.Pad(mask, op.Concat([0], missing, axis=0), filler, [-1])
    return padded


def keys_known(c: Call) -> Dim:
    """The number of keys, past ones included, as a number or a symbol."""
    incoming = (c.shape(1) or (None, None))[-2]
    if not c.has(4):
        return incoming
    past = (c.shape(4) or (None, None))[-2]
    return past + incoming if isinstance(past, int) and isinstance(incoming, int) else None


DEFINITIONS: dict[str, Definition] = {
    "Attention": attention,
    "CumProd": cumulative_product,
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Swish": swish,
    "TensorScatter": tensor_scatter,
}
"""By operator. BitCast is missing: nothing at opset 21 reads a number's bits."""
