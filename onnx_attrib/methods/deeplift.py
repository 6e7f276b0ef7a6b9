"""DeepLIFT, conserving on every architecture.

Multipliers m with Σ m·(x − x̄) = S(x) − S(x̄), exactly: every operator class conserves. The
attribution m·(x − x̄) has x's shape [N, …], and x̄ one sample or N.

- elementwise: (f(z) − f(z̄)) / (z − z̄), and f' where the denominator vanishes;
- products: each factor's gradient with the other at its midpoint, or at x (``product=gradient``);
- maxima: with c = max(y, ȳ), (c − ȳ) to the winner at x and (y − c) to the winner at x̄, each
  over its own Δz; or everything to the winner at x (``maxpool=gradient``, the paper's);
- everything else through its definition.

Shrikumar et al. 2017 (arXiv 1704.02685) define the Rescale rule (§3.5.2) and leave products and
pooling open. Captum, SHAP and the original library pass plain gradients there, and so do not sum
to the difference on gated, normalised or pooled networks.

``rule`` says what nonlinearities follow: the Rescale rule above, RevealCancel
(:mod:`onnx_attrib.methods.reveal_cancel`), or one after convolutions and the other elsewhere.
``genomics`` is what the original library calls DeepLIFT_GenomicsDefault: Rescale where a
convolution feeds the nonlinearity, with no layer between, else RevealCancel. ``genomics-converse``
has them the other way round.
"""

from onnx_attrib.methods.base import (
    Method,
    Option,
    Options,
    Table,
    conserving,
    inside,
    vjp,
    winner_takes_all,
)
from onnx_attrib.methods.difference import conserve, midpoint, rescale
from onnx_attrib.methods.reveal_cancel import (
    RevealCancel,
    Where,
    after_convolutions,
    after_others,
    everywhere,
)
from onnx_attrib.rules.base import (
    Bilinear,
    Composite,
    Elementwise,
    Linear,
    MaxLike,
    Structured,
)

REVEALED: dict[str, Where] = {
    "reveal-cancel": everywhere,
    "genomics": after_others,
    "genomics-converse": after_convolutions,
}
"""Where each rule is RevealCancel and not Rescale."""


def _table(options: Options) -> Table:
    plain: Table = {
        Linear: vjp,
        Bilinear: midpoint if options["product"] == "midpoint" else vjp,
        Elementwise: rescale,
        MaxLike: conserve if options["maxpool"] == "conserve" else winner_takes_all,
        Composite: conserving,
        Structured: inside,
    }
    where = REVEALED.get(options["rule"])
    return plain if where is None else RevealCancel(plain, where).table()


deeplift = Method(
    name="deeplift",
    summary="(x − x̄) · multiplier, summing exactly to S(x) − S(x̄): DeepLIFT",
    g="(f(z) − f(z̄)) / (z − z̄)",
    paper="Shrikumar et al. 2017, Learning Important Features (arXiv 1704.02685)",
    table=_table,
    attribution=lambda op, m, x, reference: op.Mul(m, op.Sub(x, reference)),
    options=(
        Option(
            "rule",
            "rescale",
            "nonlinearities: Rescale, RevealCancel, or (genomics) RevealCancel except after "
            "convolutions, or (genomics-converse) only there",
            ("rescale", *REVEALED),
        ),
        Option(
            "maxpool",
            "conserve",
            "maxima: split between the winners at x and x̄, or all to the winner at x",
            ("conserve", "gradient"),
        ),
        Option(
            "product",
            "midpoint",
            "products of variables: the other factor at its midpoint, or at x",
            ("midpoint", "gradient"),
        ),
    ),
    needs_reference=True,
    compares=True,
    complete=True,
    clusters="regions",
)
