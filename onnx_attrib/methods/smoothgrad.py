"""SmoothGrad: any gradient method averaged over noisy copies of the input.

mean_j a(x + σε_j) over ``samples`` draws of standard normal ε (Smilkov et al. 2017, arXiv
1706.03825), where a is what the method ``of`` reports, of x's shape [N, …], and σ is ``noise`` ×
(max x − min x) of each sample. ``power=2`` averages the squares a² (SmoothGrad², Hooker et al.
2019, arXiv 1806.10758), ``power=variance`` gives mean a² − (mean a)² (VarGrad, Adebayo et al. 2018,
arXiv 1810.03292; divided by the number of draws, as Captum does, not by one less). Captum's
``stdevs`` is σ itself, and each sample of a batch has other noise there.

The noise is drawn inside the graph (:mod:`onnx_attrib.noise`). It depends on seed, draw, input and
the entry's place within its sample: all samples of a batch have the same ε, so that a sample's
attribution does not depend on its batch. The class that is predicted (target −1) is that of x.
Options of the method ``of`` can be given beside its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from onnx_attrib.methods.base import Draws, Method, Noise, Option, Options


def _draws(options: Options) -> Draws:
    samples = options["samples"]
    return Draws(
        options["chunk"],
        weights=(1 / samples,) * samples,
        noise=Noise(options["noise"], relative=True, seed=options["seed"]),
        moment=_MOMENTS[options["power"]],
    )


_MOMENTS: dict[str, Literal["mean", "square", "variance"]] = {
    "1": "mean",
    "2": "square",
    "variance": "variance",
}


def smoothgrad(methods: Sequence[Method]) -> Method:
    """The method, of any of ``methods`` that come to their attribution in one sweep at x."""
    known = {m.name: m for m in methods if _single(m)}
    options = (
        Option("of", "gradient", "the method that is averaged", tuple(known)),
        Option("samples", 25, "number of noisy copies", minimum=1),
        Option("noise", 0.15, "σ of the noise, relative to max x − min x", minimum=0.0),
        Option(
            "power", "1", "mean, mean of squares (2), or variance over the copies", tuple(_MOMENTS)
        ),
        Option("seed", 0, "chooses the noise: the same seed gives the same result"),
        Option(
            "chunk",
            5,
            "copies evaluated together; of larger batches fewer (not on CUDA)",
            minimum=1,
        ),
    )

    def variant(given: Options) -> Method:
        averaged = known[given["of"]]
        return replace(
            averaged,
            name="smoothgrad",
            summary=base.summary,
            paper=base.paper,
            options=(*options, *averaged.options),
            signed=lambda given: given["power"] == "1" and averaged.is_signed(given),
            draws=_draws,
        )

    base = replace(
        known["gradient"],
        name="smoothgrad",
        summary="gradients (or another method's attributions) averaged over noisy copies of x",
        g="that of the method averaged",
        paper="Smilkov et al. 2017, SmoothGrad: removing noise by adding noise (arXiv 1706.03825)",
        options=options,
        signed=lambda given: given["power"] == "1" and known[given["of"]].is_signed(given),
        draws=_draws,
        variant=variant,
    )
    return base


def _single(method: Method) -> bool:
    """Whether one sweep at x is all that it needs."""
    several = method.draws or method.map or method.needs_reference
    return method.differentiates and not several
