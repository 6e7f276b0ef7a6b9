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
    text = s.attr("equation")
    # A layer that something was merged into has its bias behind the operands.
    return read(text, [s.rank(s.x(i)) for i in range(1 + text.count(","))])


def written(operands: Sequence[Letters], output: Letters) -> str:
    return f"{','.join(''.join(term) for term in operands)}->{''.join(output)}"


def einsum_pull(s: Site, i: int) -> Tensor:
    """Forward form Y = Σ Π of the operands, over the indices that Y lacks.

    Backward returns the sum of M times the other operands over the indices that operand i lacks;
    repeated along those that it alone has, and on the diagonal of those that it has twice.
    """
    op, eq, x = s.op, equation(s), s.x(i)
    term, ties = untied(eq, i)
    others = [trimmed(s, eq, k) for k in range(len(eq.operands)) if k != i]
    operands = [s.m, *(tensor for tensor, _ in others)]
    letters = [eq.output, *(group for _, group in others)]
    for axis, first in ties:
        operands.append(unit_matrix(s, x, axis))
        letters.append((first, term[axis]))
    found = {letter for group in letters for letter in group}
    found -= {term[axis] for axis in stretched(s, eq, i)}
    kept = tuple(letter for letter in term if letter in found)
    share = op.Einsum(*operands, equation=written(letters, kept))
    missing = [axis for axis, letter in enumerate(term) if letter not in found]
    if missing:
        share = op.Unsqueeze(share, missing) if kept else op.Reshape(share, [1] * len(term))
        share = op.Expand(share, sizes_at(s, x, missing))
    if not eq.spelled.intersection(found):
        return s.shaped(share, x)
    # What the ellipsis stands for may have been repeated at run time.
    sizes = dict(zip(term, s.shape(x) or (), strict=True))
    for letter, size in zip(eq.output, s.shape(s.y) or (), strict=True):
        if letter in eq.spelled & found:
            sizes[letter] = size
    share.shape = [sizes[letter] for letter in term]
    return unbroadcast(s, share, x, share)


def trimmed(s: Site, eq: Equation, k: int) -> tuple[Tensor, Letters]:
    """An operand without the axes along which it is repeated to meet the others."""
    axes = stretched(s, eq, k)
    if not axes:
        return s.x(k), eq.operands[k]
    letters = tuple(c for axis, c in enumerate(eq.operands[k]) if axis not in axes)
    return s.op.Squeeze(s.x(k), axes), letters


def stretched(s: Site, eq: Equation, k: int) -> list[int]:
    """Axes of size 1 whose index is longer in another operand, or may be."""
    sizes: dict[str, set[Dim]] = {}
    for other, term in enumerate(eq.operands):
        for letter, size in zip(term, s.shape(s.x(other)) or (), strict=True):
            sizes.setdefault(letter, set()).add(size)
    return [
        axis
        for axis, letter in enumerate(eq.operands[k])
        if (s.shape(s.x(k)) or ())[axis] == 1 and sizes[letter] != {1}
    ]


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


def pairwise(s: Site) -> Sequence[Tensor]:
    """The operands multiplied one after the other."""
    eq = equation(s)
    operands = [trimmed(s, eq, k) for k in range(len(eq.operands))]
    result, letters = operands[0]
    for k, (tensor, term) in enumerate(operands[1:], start=1):
        later = {letter for _, group in operands[k + 1 :] for letter in group} | set(eq.output)
        merged = tuple(dict.fromkeys((*letters, *term)))
        output = tuple(letter for letter in merged if letter in later)
        if k == len(operands) - 1:
            output = eq.output
        result = s.op.Einsum(result, tensor, equation=written((letters, term), output))
        letters = output
    return [result]


# Two that vary are exact at their midpoints, more are multiplied in pairs.
add(Bilinear(op="Einsum", pull=einsum_pull, covers=lambda active: len(active) <= 2, layer="dense"))
add(Composite(op="Einsum", pull=einsum_pull, decompose=pairwise))
