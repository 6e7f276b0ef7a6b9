"""Einsum: sums of products of entries, of any number of operands.

Equations are read into tuples of letters, one an axis, with the ellipsis spelled out. An index that
an operand repeats (a diagonal) counts as two that a unit matrix ties together, so that everything
is linear in each operand.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_attrib.ir import Dim, Tensor
from onnx_attrib.rules.base import Bilinear, Composite, Site, Unsupported, add
from onnx_attrib.rules.broadcast import unbroadcast

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Equation:
    """The letters of each operand's axes and of the output's; ``spelled``: from an ellipsis."""

    operands: tuple[Letters, ...]
    output: Letters
    spelled: frozenset[str]

    def fresh(self, count: int) -> list[str]:
        """Letters that do not occur."""
        used = {letter for term in (*self.operands, self.output) for letter in term}
        free = [letter for letter in string.ascii_letters if letter not in used]
        if len(free) < count:
            raise Unsupported("the equation uses up all letters")
        return free[:count]


def read(text: str, ranks: Sequence[int]) -> Equation:
    """Parse an equation; without an arrow, letters that occur once are kept, in their order."""
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in text]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    spelled = free[: max(hidden)]
    operands = tuple(
        tuple(term.replace("...", "".join(spelled[len(spelled) - count :])))
        for term, count in zip(terms, hidden, strict=True)
    )
    if arrow:
        output = tuple(right.replace("...", "".join(spelled)))
    else:
        once = [c for c in sorted(set(left) - set(",.")) if left.count(c) == 1]
        output = (*spelled, *once)
    return Equation(operands, output, frozenset(spelled))


def equation(s: Site) -> Equation:
    return read(s.attr("equation"), [s.rank(s.x(i)) for i in range(len(s.inputs))])


def written(operands: Sequence[Letters], output: Letters) -> str:
    return f"{','.join(''.join(term) for term in operands)}->{''.join(output)}"


def einsum_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = Σ Π of the operands, over the indices that Y lacks.

    Backward returns the sum of M times the other operands over the indices that operand i lacks;
    repeated along those that it alone has, and on the diagonal of those that it has twice.
    """
    op, eq, x = s.op, equation(s), s.x(i)
    term, ties = untied(eq, i)
    others = [k for k in range(len(s.inputs)) if k != i]
    operands = [s.m, *(s.x(k) for k in others)]
    letters = [eq.output, *(eq.operands[k] for k in others)]
    for axis, first in ties:
        operands.append(unit_matrix(s, x, axis))
        letters.append((first, term[axis]))
    found = {letter for group in letters for letter in group}
    kept = tuple(letter for letter in term if letter in found)
    share = op.Einsum(*operands, equation=written(letters, kept))
    missing = [axis for axis, letter in enumerate(term) if letter not in found]
    if missing:
        share = op.Unsqueeze(share, missing) if kept else op.Reshape(share, [1] * len(term))
        share = op.Expand(share, sizes_at(s, x, missing))
    share.shape = [entry_size(s, eq, i, axis) for axis in range(len(term))]
    return unbroadcast(s, share, x, share)


def sizes_at(s: Site, x: Tensor, axes: Sequence[int]) -> Tensor:
    """The shape of ``x`` with 1 for all axes but these."""
    shape = s.shape(x) or ()
    known = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    if all(isinstance(size, int) for size in known):
        return s.graph.constant(known, np.int64)
    chosen = np.isin(np.arange(len(shape)), axes)
    result: Tensor = s.op.Where(chosen, s.op.Shape(x), np.ones(1, np.int64))
    return result


def untied(eq: Equation, i: int) -> tuple[Letters, list[tuple[int, str]]]:
    """Operand i's letters, all different, and (axis, first letter) of each repetition."""
    term, ties = list(eq.operands[i]), []
    fresh = iter(eq.fresh(len(term) - len(set(term))))
    for axis, letter in enumerate(eq.operands[i]):
        if letter in term[:axis]:
            term[axis] = next(fresh)
            ties.append((axis, letter))
    return tuple(term), ties


def unit_matrix(s: Site, x: Tensor, axis: int) -> Tensor:
    """The unit matrix of the size of an axis."""
    size, dtype = (s.shape(x) or ())[axis], s.graph.dtype(x)
    if isinstance(size, int):
        return s.graph.constant(np.eye(size), dtype)
    shape = s.op.Expand(s.op.Shape(x, start=axis, end=axis + 1), [2])
    zeros = s.op.ConstantOfShape(shape, value=np.zeros(1, dtype))
    result: Tensor = s.op.EyeLike(zeros)
    return result


def entry_size(s: Site, eq: Equation, i: int, axis: int) -> Dim:
    """The size of an index over all operands: an axis of size 1 may be broadcast to it."""
    own, letter = (s.shape(s.x(i)) or ())[axis], eq.operands[i][axis]
    if own != 1 and letter not in eq.spelled:
        return own
    sizes = {
        (s.shape(s.x(k)) or ())[at]
        for k, term in enumerate(eq.operands)
        for at, other in enumerate(term)
        if other == letter
    }
    sizes -= {1}
    return 1 if not sizes else sizes.pop() if len(sizes) == 1 else None


def pairwise(s: Site) -> Sequence[Tensor]:
    """The operands multiplied one after the other."""
    eq = equation(s)
    result, letters = s.x(0), eq.operands[0]
    for k in range(1, len(s.inputs)):
        later = {letter for term in (*eq.operands[k + 1 :], eq.output) for letter in term}
        merged = tuple(dict.fromkeys((*letters, *eq.operands[k])))
        output = tuple(letter for letter in merged if letter in later)
        if k == len(s.inputs) - 1:
            output = eq.output
        text = written((letters, eq.operands[k]), output)
        result, letters = s.op.Einsum(result, s.x(k), equation=text), output
    return [result]


# Two that vary are exact at their midpoints, more are multiplied in pairs.
add(Bilinear(op="Einsum", pull=einsum_pull, covers=lambda active: len(active) <= 2))
add(Composite(op="Einsum", pull=einsum_pull, decompose=pairwise))
