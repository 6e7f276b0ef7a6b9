"""Products: linear in each operand while the others are held.

``pull`` reads the other operands from ``site.inputs``, so the same row serves the gradient (values
at x) and differences (values at the midpoint). Sums are here too: they are the linear companions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    Site,
    Unsupported,
    add,
    inverse,
    only,
)
from onnx_attrib.rules.elementwise import always, ref

# -- sums ------------------------------------------------------------------------------------------

add(Linear(op="Add", pull=lambda s, i: s.m, broadcasts=True, lazy=True))
add(Linear(op="Sum", pull=lambda s, i: s.m, broadcasts=True, lazy=True))
add(
    Linear(
        op="Sub",
        pull=lambda s, i: s.m if i == 0 else s.op.Neg(s.m),
        broadcasts=True,
        lazy=True,
    )
)
add(Linear(op="Neg", pull=lambda s, i: s.op.Neg(s.m), lazy=True, flow="scales"))
add(
    Linear(
        op="Mean",
        pull=lambda s, i: s.op.Mul(s.m, 1 / len(s.inputs)),
        broadcasts=True,
        lazy=True,
    )
)

# -- elementwise products --------------------------------------------------------------------------

add(
    Bilinear(
        op="Mul",
        pull=lambda s, i: s.op.Mul(s.m, s.x(1 - i)),
        flow="scales",
        broadcasts=True,
        lazy=True,
    )
)


def divide_pull(s: Site, i: int) -> Tensor:
    """Forward form y = a / b. Backward returns m / b and −m · y / b."""
    if s.discarded:
        inverse = inverse_or_zero(s)
        share = s.op.Mul(s.m, inverse)
        if i == 1:
            share = s.op.Neg(s.op.Mul(share, s.op.Mul(s.x(0), inverse)))
        return s.silenced(share)
    share = s.op.Div(s.m, s.x(1))
    return share if i == 0 else s.op.Neg(s.op.Mul(share, s.op.Div(s.x(0), s.x(1))))


def divide_definition(s: Site) -> list[Tensor]:
    """a · 1/b."""
    inverse = inverse_or_zero(s) if s.discarded else s.op.Reciprocal(s.x(1))
    return [s.op.Mul(s.x(0), inverse)]


def inverse_or_zero(s: Site) -> Tensor:
    """1 / b, and 0 for b = 0, so that a quotient that a Where discards conserves too."""
    return s.op.Where(s.op.Equal(s.x(1), 0.0), 0.0, s.op.Reciprocal(s.x(1)))


add(
    Linear(op="Div", pull=divide_pull, covers=only(0), broadcasts=True, lazy=True, flow="scales"),
)
add(
    Elementwise(
        op="Div",
        derivative=lambda s: s.op.Neg(s.op.Div(s.y, s.x(1))),
        # (c/z − c/z̄)/Δz = −c/(z·z̄)
        secant=lambda s: s.op.Neg(s.op.Div(s.y, ref(s).x(1))),
        operand=1,
        partial=always,
        covers=only(1),
        broadcasts=True,
        role=inverse,
    )
)
add(
    Composite(
        op="Div",
        pull=divide_pull,
        decompose=divide_definition,
        broadcasts=True,
    )
)

# -- matrix products -------------------------------------------------------------------------------


def swap_last(s: Site, tensor: Tensor) -> Tensor:
    """The matrix transpose over the last two axes."""
    order = list(range(s.rank(tensor)))
    order[-2:] = order[-1], order[-2]
    return s.op.Transpose(tensor, perm=order)


def matmul_pull(s: Site, i: int) -> Tensor:
    """Forward form Y[…, n, m] = A[…, n, k] · B[…, k, m], as numpy.matmul.

    Backward returns M · Bᵀ and Aᵀ · M, before broadcast batch axes are summed.
    """
    op, m, a, b = s.op, s.m, s.x(0), s.x(1)
    row_vector, column_vector = s.rank(a) == 1, s.rank(b) == 1
    if row_vector:
        a, m = op.Unsqueeze(a, [0]), op.Unsqueeze(m, [-1 if column_vector else -2])
    if column_vector:
        b, m = op.Unsqueeze(b, [1]), op.Unsqueeze(m, [-1])
    share = op.MatMul(m, swap_last(s, b)) if i == 0 else op.MatMul(swap_last(s, a), m)
    if i == 0 and row_vector:
        return op.Squeeze(share, [-2])
    if i == 1 and column_vector:
        return op.Squeeze(share, [-1])
    return share


add(Bilinear(op="MatMul", pull=matmul_pull, broadcasts=True, layer="dense"))


def gemm_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = α · A' · B' + β · C, with A' and B' optionally transposed.

    Backward returns α · M · B'ᵀ, α · A'ᵀ · M (transposed back) and β · M.
    """
    op, m, alpha, beta = s.op, s.m, s.attr("alpha"), s.attr("beta")
    if i == 2:
        return m if beta == 1 else op.Mul(m, beta)
    a_turned, b_turned = bool(s.attr("transA")), bool(s.attr("transB"))
    if i == 0:
        left, right, turned = m, s.x(1), (0, int(not b_turned))
        if a_turned:
            left, right, turned = s.x(1), m, (int(b_turned), 1)
    else:
        left, right, turned = s.x(0), m, (int(not a_turned), 0)
        if b_turned:
            left, right, turned = m, s.x(0), (1, int(a_turned))
    return op.Gemm(left, right, alpha=alpha, transA=turned[0], transB=turned[1])


add(Bilinear(op="Gemm", pull=gemm_pull, broadcasts=True, layer="dense", bias=2))

# -- determinants ----------------------------------------------------------------------------------

_LARGEST_DETERMINANT = 6


def determinant(s: Site) -> list[Tensor]:
    """Laplace expansion row by row: the minors of the last rows, for each choice of columns."""
    op, order = s.op, (s.shape(s.x()) or (None,))[-1]
    if not isinstance(order, int) or order > _LARGEST_DETERMINANT:
        most = _LARGEST_DETERMINANT
        raise Unsupported(f"a determinant of unknown size, or of more than {most} rows")
    entries = [split(s, row, order, axis=-1) for row in split(s, s.x(), order, axis=-2)]
    minors: dict[tuple[int, ...], Tensor] = {(k,): entry for k, entry in enumerate(entries[-1])}
    for size in range(2, order + 1):
        row, smaller = entries[order - size], minors
        minors = {}
        for columns in combinations(range(order), size):
            rest = [columns[:k] + columns[k + 1 :] for k in range(size)]
            terms = [op.Mul(row[c], smaller[r]) for c, r in zip(columns, rest, strict=True)]
            total = terms[0]
            for k, term in enumerate(terms[1:]):
                total = op.Add(total, term) if k % 2 else op.Sub(total, term)
            minors[columns] = total
    return [op.Squeeze(minors[tuple(range(order))], [-2, -1])]


def split(s: Site, tensor: Tensor, count: int, axis: int) -> Sequence[Tensor]:
    """The entries along an axis, each with the axis at size 1."""
    if count == 1:
        return [tensor]
    parts: Sequence[Tensor] = s.op.Split(tensor, axis=axis, num_outputs=count, outputs=count)
    return parts


add(Composite(op="Det", decompose=determinant))
