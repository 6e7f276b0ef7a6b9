"""The gradient and what is read off it: gradient, saliency, gradient × input.

All three are the exact vector-Jacobian product ∂S/∂x; they differ in what is reported, of x's shape
[N, …]: ∂S/∂x (Baehrens et al. 2010), |∂S/∂x| (Simonyan et al. 2013, arXiv 1312.6034; some take the
largest over channels: ``--reduce channels=abs-max``), or x · ∂S/∂x (Shrikumar et al. 2016,
arXiv 1605.01713). The slope of a ReLU is 0 at 0, and a maximum sends all to its first winner.
"""

from onnx_attrib.methods.base import GRADIENT, Method

gradient = Method(
    name="gradient",
    summary="∂S/∂x: how fast the output changes with each input entry",
    g="f'(z)",
    paper="Baehrens et al. 2010, How to Explain Individual Classification Decisions",
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: m,
)

saliency = Method(
    name="saliency",
    summary="|∂S/∂x|: the size of the gradient",
    g="f'(z)",
    paper="Simonyan et al. 2013, Deep Inside Convolutional Networks (arXiv 1312.6034)",
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: op.Abs(m),
    signed=False,
)

gradient_x_input = Method(
    name="gradient-x-input",
    summary="x · ∂S/∂x: the first-order contribution of each input entry",
    g="f'(z)",
    paper="Shrikumar et al. 2016, Not Just a Black Box (arXiv 1605.01713)",
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: op.Mul(m, x),
)
