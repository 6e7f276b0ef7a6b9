"""y = f(z), element by element. A row gives f', and a closed secant where there is a better one.

Masks (Boolean derivatives) are read off the output where that is possible, which lets ONNX Runtime
keep the activation fused with the convolution before it. Definitions: the ONNX operator reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnx_attrib.ir import Graph, Node, Tensor
from onnx_attrib.rules.base import (
    Composite,
    Elementwise,
    Linear,
    Role,
    Site,
    add,
    gate,
    inverse,
    no_role,
    only,
)
from onnx_attrib.rules.rectifiers import clip_rectifies

Slope = Callable[[Site], Tensor]


def rectifier(s: Site) -> float:
    """A ReLU, or its kin: slope 1 for positive z."""
    return 1.0


def no_rectifier(s: Site) -> float:
    return 0.0


def always(s: Site) -> bool:
    return True


def never(s: Site) -> bool:
    return False


def row(
    op: str,
    derivative: Slope,
    *,
    secant: Callable[[Site], Tensor | None] | None = None,
    operand: int = 0,
    piecewise: bool = False,
    kinked: bool = False,
    partial: Callable[[Site], bool] = never,
    relu_like: Callable[[Site], float] = no_rectifier,
    broadcasts: bool = False,
    role: Callable[[Graph, Node], Role] = no_role,
) -> None:
    """Enter y = f(z) in one active operand."""
    add(
        Elementwise(
            op=op,
            derivative=derivative,
            secant=secant,
            operand=operand,
            piecewise=piecewise,
            kinked=kinked,
            partial=partial,
            relu_like=relu_like,
            broadcasts=broadcasts,
            role=role,
            covers=only(operand),
        )
    )


def ref(s: Site) -> Site:
    """The site at the baseline; secants are asked for only where there is one."""
    if s.reference is None:
        raise LookupError("a secant needs a reference")
    return s.reference


def number(s: Site, value: float) -> np.ndarray:
    """A scalar of the operand's dtype."""
    return np.array(value, s.graph.dtype(s.y))


def positive(s: Site) -> Tensor:
    """z > 0."""
    return s.op.Greater(s.x(), 0.0)


# -- powers, exponentials, trigonometry ------------------------------------------------------------
# Closed secants: (√z − √z̄)/Δz = 1/(√z + √z̄), (1/z − 1/z̄)/Δz = −1/(z·z̄), (z² − z̄²)/Δz = z + z̄.

row(
    "Sqrt",
    lambda s: s.op.Mul(s.op.Reciprocal(s.y), 0.5),
    secant=lambda s: steep_at_zero(s, s.op.Reciprocal(s.op.Add(s.y, ref(s).y))),
    partial=always,
)
row(
    "Reciprocal",
    lambda s: s.op.Neg(s.op.Mul(s.y, s.y)),
    secant=lambda s: s.op.Neg(s.op.Mul(s.y, ref(s).y)),
    partial=always,
    role=inverse,
)
row("Exp", lambda s: s.y, secant=lambda s: exponential_secant(s))


def exponential_secant(s: Site) -> Tensor:
    """(e^z − e^z̄) / Δz."""
    z, base = (unmasked(one, one.x()) for one in (s, ref(s)))
    return logarithmic_mean(s, s.y, ref(s).y, s.op.Sub(z, base))


def unmasked(s: Site, logits: Tensor) -> Tensor:
    """Logits with a number for −∞: the difference of two such is zero, not NaN."""
    narrow = s.graph.dtype(logits) == np.float16
    return s.op.Clip(logits, np.array(-6e4 if narrow else -1e30, s.graph.dtype(logits)))


def least(s: Site, tensor: Tensor) -> np.ndarray:
    """A number beside which only zero matters less."""
    narrow = s.graph.dtype(tensor) == np.float16
    return np.array(2.0**-14 if narrow else 1e-30, s.graph.dtype(tensor))


def logarithmic_mean(s: Site, a: Tensor, b: Tensor, step: Tensor) -> Tensor:
    """(a − b) / step for step = log a − log b: (a + b) · tanh(|step|/2) / |step|.

    No difference cancels in it, and next to zero it needs no other formula.
    """
    op = s.op
    size = op.Clip(op.Abs(step), least(s, step))
    return op.Mul(op.Add(a, b), op.Div(op.Tanh(op.Mul(size, 0.5)), size))


def steep_at_zero(s: Site, secant: Tensor) -> Tensor:
    """A secant of a root, with 0 for the infinite slope where neither point differs from zero."""
    size = s.op.Add(s.op.Abs(s.x()), s.op.Abs(ref(s).x()))
    return s.op.Where(s.op.Equal(size, 0.0), 0.0, secant)


def close_to_zero(slope: Slope) -> Slope:
    """A secant of a function that bends ever more towards zero: steps are measured by z itself."""

    def secant(s: Site) -> Tensor:
        op, base = s.op, ref(s)
        step = op.Sub(s.x(), base.x())
        far = op.Greater(op.Abs(step), op.Mul(op.Abs(s.x()), s.tolerance(step)))
        quotient = op.Div(op.Sub(s.y, base.y), step)
        return op.Where(far, quotient, s.midpoint(slope(s), slope(base)))

    return secant


def log_slope(s: Site) -> Tensor:
    """1 / z."""
    return s.op.Reciprocal(s.x())


row("Log", log_slope, secant=close_to_zero(log_slope), partial=always)
row("Abs", lambda s: s.op.Sign(s.x()), piecewise=True)
row(
    "Erf",
    lambda s: s.op.Mul(s.op.Exp(s.op.Neg(s.op.Mul(s.x(), s.x()))), 2 / math.sqrt(math.pi)),
)
row("Sin", lambda s: s.op.Cos(s.x()))
row("Cos", lambda s: s.op.Neg(s.op.Sin(s.x())))


row("Tan", lambda s: s.op.Add(s.op.Mul(s.y, s.y), 1.0), partial=always)
row("Sinh", lambda s: s.op.Cosh(s.x()))
row("Cosh", lambda s: s.op.Sinh(s.x()))


def inverse_slope(sign: int, constant: int, root: bool = True, factor: int = 1) -> Slope:
    """Slope of an inverse function: ``factor`` / (``sign`` · z² + ``constant``), or its root."""

    def slope(s: Site) -> Tensor:
        square = s.op.Mul(s.x(), s.x())
        inner = s.op.Add(square if sign > 0 else s.op.Neg(square), float(constant))
        result = s.op.Reciprocal(s.op.Sqrt(inner) if root else inner)
        return result if factor > 0 else s.op.Neg(result)

    return slope


row("Asin", inverse_slope(-1, 1), partial=always)
row("Acos", inverse_slope(-1, 1, factor=-1), partial=always)
row("Atan", inverse_slope(1, 1, root=False))
row("Asinh", inverse_slope(1, 1))
row("Acosh", inverse_slope(1, -1), partial=always)
row("Atanh", inverse_slope(-1, 1, root=False), partial=always)


def exponent(s: Site) -> float | None:
    """The exponent of a Pow, if it is one constant."""
    value = s.value(1)
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def power_slope(s: Site) -> Tensor:
    """c · z^(c−1)."""
    op, fixed = s.op, exponent(s)
    if fixed == 2:
        return op.Mul(s.x(), 2.0)
    if fixed is not None and fixed not in (0, 1):
        return op.Mul(op.Pow(s.x(), number(s, fixed - 1)), fixed)
    power = op.Cast(s.x(1), to=s.graph.dtype(s.x()))
    slope = op.Mul(power, op.Pow(s.x(), op.Sub(power, 1.0)))
    # Exponent 0: z^(−1) may not be finite, the slope is zero all the same. Exponent 1: z⁰ is one.
    return op.Where(op.Equal(power, 0.0), number(s, 0), slope)


def exponential_slope(s: Site) -> Tensor:
    """a^z · ln a, and zero where the base is."""
    op, base = s.op, s.x(0)
    return op.Mul(s.y, op.Log(op.Where(op.Greater(base, 0.0), base, number(s, 1))))


def power_definition(s: Site) -> Sequence[Tensor]:
    """a^b = exp(b · ln a), for a > 0."""
    op = s.op
    return [op.Exp(op.Mul(op.Cast(s.x(1), to=s.graph.dtype(s.x(0))), op.Log(s.x(0))))]


def power_difference(s: Site, i: int) -> Tensor:
    """a^b with both varying: each moves alone, before and after the other; the mean of both.

    Backward returns m · ½[(aᵇ − āᵇ) + (aᵇ̄ − āᵇ̄)] / Δa for the base, and alike for the exponent.
    Of the two ways, one may pass a point where the power is not finite (0 to a negative): then
    the other counts alone.
    """
    op, here, base = s.op, s, ref(s)
    power = [op.Cast(t.x(1), to=s.graph.dtype(s.x(0))) for t in (here, base)]
    turns = op.Pow(base.x(0), power[0]), op.Pow(here.x(0), power[1])
    if i == 0:
        ways = op.Sub(here.y, turns[0]), op.Sub(turns[1], base.y)
        step, slope = op.Sub(here.x(0), base.x(0)), power_slope
    else:
        ways = op.Sub(turns[0], base.y), op.Sub(here.y, turns[1])
        step, slope = op.Sub(*power), exponential_slope
    closed = [op.Or(op.IsNaN(turn), op.IsInf(turn)) for turn in turns]
    one_way = op.Where(closed[0], ways[1], ways[0])
    change = op.Where(op.Or(*closed), one_way, s.midpoint(*ways))
    # Towards zero a power bends ever more.
    bound = op.Mul(op.Abs(s.x(0)), s.tolerance(step)) if i == 0 else s.tolerance(step)
    far = op.Greater(op.Abs(step), bound)
    mean = s.midpoint(slope(here), slope(base))
    return op.Mul(s.m, op.Where(far, op.Div(change, step), mean))


def power_pull(s: Site, i: int) -> Tensor:
    return s.op.Mul(s.m, power_slope(s) if i == 0 else exponential_slope(s))


def power_secant(s: Site) -> Tensor:
    """z + z̄ for a square, else the quotient."""
    fixed = exponent(s)
    if fixed == 2:
        return s.op.Add(s.x(), ref(s).x())
    secant = close_to_zero(power_slope)(s)
    return secant if fixed is not None and fixed >= 1 else steep_at_zero(s, secant)


def power_role(graph: Graph, node: Node) -> Role:
    """A negative power is an inverse."""
    fixed = graph.value(node.inputs[1])
    return "scale" if fixed is not None and fixed.size and float(fixed.max()) < 0 else ""


def power_partial(s: Site) -> bool:
    """Only whole powers, from z⁰ on, are defined everywhere."""
    fixed = exponent(s)
    return fixed is None or fixed < 0 or not fixed.is_integer()


row(
    "Pow",
    power_slope,
    secant=power_secant,
    partial=power_partial,
    broadcasts=True,
    role=power_role,
)
row("Pow", exponential_slope, operand=1, broadcasts=True)
add(
    Composite(
        op="Pow",
        pull=power_pull,
        difference=power_difference,
        decompose=power_definition,
        broadcasts=True,
    )
)


# -- activations -----------------------------------------------------------------------------------


def relu_secant(s: Site) -> Tensor:
    """(y + ȳ) / (|z| + |z̄|): the difference quotient without a difference, and zero at 0/0.

    Both signs alike: 1 and 0 where z and z̄ agree, else the share of the positive one. (y is taken
    from z once more: the model's own would have to be kept for it beside z.)
    """
    op, base = s.op, ref(s)
    dtype = s.graph.dtype(s.y)
    # Of float32 in float64, too: onnxruntime leaves out sums with what is zero in float32.
    least = np.finfo(np.float16 if dtype == np.float16 else np.float32).tiny
    size = op.Add(op.Abs(s.x()), op.Add(op.Abs(base.x()), float(least)))
    return op.Div(op.Add(op.Clip(s.x(), 0.0), base.y), size)


row(
    "Relu",
    lambda s: s.op.Greater(s.y, 0.0),
    secant=relu_secant,
    piecewise=True,
    relu_like=rectifier,
)
row(
    "LeakyRelu",
    lambda s: s.op.Where(positive(s), number(s, 1), number(s, s.attr("alpha"))),
    piecewise=True,
    relu_like=rectifier,
)
row(
    "ThresholdedRelu",
    lambda s: s.op.Greater(s.x(), s.attr("alpha")),
    piecewise=True,
    relu_like=rectifier,
)
row("Sigmoid", lambda s: s.op.Mul(s.y, s.op.Sub(1.0, s.y)), role=gate)
row("Tanh", lambda s: s.op.Sub(1.0, s.op.Mul(s.y, s.y)))
row("Softplus", lambda s: s.op.Sigmoid(s.x()))


def softsign_slope(s: Site) -> Tensor:
    """1 / (1 + |z|)²."""
    r = s.op.Reciprocal(s.op.Add(s.op.Abs(s.x()), 1.0))
    return s.op.Mul(r, r)


row("Softsign", softsign_slope, kinked=True)


def exponential_unit(alpha: Callable[[Site], float], scale: Callable[[Site], float]) -> Slope:
    """Slope of scale · (z if z > 0 else α(e^z − 1)): below zero it is y + scale · α."""

    def slope(s: Site) -> Tensor:
        gamma = scale(s)
        return s.op.Where(positive(s), number(s, gamma), s.op.Add(s.y, gamma * alpha(s)))

    return slope


row(
    "Elu",
    exponential_unit(lambda s: s.attr("alpha"), lambda s: 1.0),
    kinked=True,
    relu_like=rectifier,
)
row(
    "Selu",
    exponential_unit(lambda s: s.attr("alpha"), lambda s: s.attr("gamma")),
    kinked=True,
    relu_like=lambda s: float(s.attr("gamma")),
)


row("Shrink", lambda s: s.op.Greater(s.op.Abs(s.x()), s.attr("lambd")), piecewise=True)


def celu_slope(s: Site) -> Tensor:
    """1, and e^(z/α) = 1 + y/α below zero."""
    below = s.op.Add(s.op.Mul(s.y, 1 / s.attr("alpha")), 1.0)
    return s.op.Where(positive(s), number(s, 1), below)


row("Celu", celu_slope, kinked=True, relu_like=rectifier)


def hard_sigmoid_slope(s: Site) -> Tensor:
    op = s.op
    inside = op.And(op.Greater(s.y, 0.0), op.Less(s.y, 1.0))
    return op.Where(inside, number(s, s.attr("alpha")), number(s, 0))


row("HardSigmoid", hard_sigmoid_slope, piecewise=True, role=gate)


def hard_swish_slope(s: Site) -> Tensor:
    """z · clip(z/6 + 1/2, 0, 1): z/3 + 1/2 between −3 and 3, one above, zero below."""
    op, z = s.op, s.x()
    inside = op.Less(op.Abs(z), 3.0)
    outside = op.Where(op.Greater(z, 0.0), number(s, 1), number(s, 0))
    return op.Where(inside, op.Add(op.Mul(z, 1 / 3), 0.5), outside)


row("HardSwish", hard_swish_slope, kinked=True)


def mish_slope(s: Site) -> Tensor:
    """z · tanh(softplus z): t + z · (1 − t²) · σ(z)."""
    op, z = s.op, s.x()
    t = op.Tanh(op.Softplus(z))
    return op.Add(t, op.Mul(op.Mul(z, op.Sub(1.0, op.Mul(t, t))), op.Sigmoid(z)))


row("Mish", mish_slope)


def gelu_slope(s: Site) -> Tensor:
    """Φ(z) + z · φ(z), or the derivative of the tanh approximation."""
    op, z = s.op, s.x()
    if s.attr("approximate") == "tanh":
        k = math.sqrt(2 / math.pi)
        square = op.Mul(z, z)
        t = op.Tanh(op.Mul(op.Mul(z, op.Add(op.Mul(square, 0.044715), 1.0)), k))
        inner = op.Mul(op.Add(op.Mul(square, 3 * 0.044715), 1.0), k)
        outer = op.Mul(op.Mul(z, op.Sub(1.0, op.Mul(t, t))), inner)
        return op.Mul(op.Add(op.Add(t, 1.0), outer), 0.5)
    # With t = z/√2: z · φ(z) = t · exp(−ln √π − t²), one operator less.
    t = op.Mul(z, math.sqrt(0.5))
    cdf = op.HardSigmoid(op.Erf(t), alpha=0.5, beta=0.5)
    density = op.Exp(op.Sub(-math.log(math.pi) / 2, op.Mul(t, t)))
    return op.Add(cdf, op.Mul(t, density))


row("Gelu", gelu_slope)


# -- with a second operand -------------------------------------------------------------------------


def clip_slope(s: Site) -> Tensor:
    """Inside the bounds, read off the output so that a convolution before it stays fused."""
    op, bounds = s.op, []
    if s.optional(1) is not None:
        bounds.append(op.Greater(s.y, s.x(1)))
    if s.optional(2) is not None:
        bounds.append(op.Less(s.y, s.x(2)))
    if not bounds:
        return op.Equal(s.y, s.y)
    return bounds[0] if len(bounds) == 1 else op.And(*bounds)


def clip_definition(s: Site) -> Sequence[Tensor]:
    """min(max(z, low), high)."""
    y = s.x()
    if s.optional(1) is not None:
        y = s.op.Max(y, s.x(1))
    if s.optional(2) is not None:
        y = s.op.Min(y, s.x(2))
    return [y]


row("Clip", clip_slope, piecewise=True, relu_like=clip_rectifies)
add(Composite(op="Clip", decompose=clip_definition))

row(
    "PRelu",
    lambda s: s.op.Where(positive(s), number(s, 1), s.x(1)),
    piecewise=True,
    relu_like=rectifier,
    broadcasts=True,
)
add(
    Linear(
        op="PRelu",
        pull=lambda s, i: s.op.Mul(s.m, s.op.Min(s.x(), number(s, 0))),
        covers=only(1),
        broadcasts=True,
        flow="scales",
    )
)
add(
    Composite(
        op="PRelu",
        # relu(z) + slope · min(z, 0)
        decompose=lambda s: [
            s.op.Add(s.op.Relu(s.x()), s.op.Mul(s.x(1), s.op.Min(s.x(), number(s, 0))))
        ],
    )
)


# -- remainders ------------------------------------------------------------------------------------


def remainder_slope(s: Site) -> Tensor:
    """With y = a − n · b for a whole n: −n = (y − a) / b."""
    return s.op.Div(s.op.Sub(s.y, s.x(0)), s.x(1))


def remainder_pull(s: Site, i: int) -> Tensor:
    """Forward form y = a − n · b. Backward returns m and −n · m."""
    return s.m if i == 0 else s.op.Mul(s.m, remainder_slope(s))


def remainder_difference(s: Site, i: int) -> Tensor:
    """Forward form y = a − n · b. Backward returns m · Δy/Δ, first a moving and then b."""
    op, base, whole = s.op, ref(s), s.attr("fmod")
    between = op.Mod(base.x(0), s.x(1), fmod=whole)
    change = op.Sub(s.y, between) if i == 0 else op.Sub(between, base.y)
    step = op.Sub(s.x(i), base.x(i))
    slope = number(s, 1) if i == 0 else remainder_slope(s)
    return op.Mul(s.m, op.Where(op.Equal(step, 0.0), slope, op.Div(change, step)))


def remainder_definition(s: Site) -> Sequence[Tensor]:
    """a − b · trunc(a / b)."""
    op, quotient = s.op, s.op.Div(s.x(0), s.x(1))
    whole = op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient)))
    return [op.Sub(s.x(0), op.Mul(s.x(1), whole))]


row("Mod", lambda s: s.op.Equal(s.y, s.y), piecewise=True, broadcasts=True)
row("Mod", remainder_slope, operand=1, piecewise=True, broadcasts=True)
add(
    Composite(
        op="Mod",
        pull=remainder_pull,
        difference=remainder_difference,
        decompose=remainder_definition,
        broadcasts=True,
    )
)
