"""Methods against a background of K samples: DeepSHAP and expected gradients.

The first axis of their baseline is K: an array [K, …] of the input's shape behind it, or given at
run time. Zeros or a number is a background of one. Attributions have the input's shape [N, …].

**DeepSHAP** (Lundberg & Lee 2017, arXiv 1705.07874; SHAP's DeepExplainer): the mean of DeepLIFT's
attributions with each sample of the background as the reference. It sums to S(x) − mean S(x̄_k),
exactly, because DeepLIFT conserves here; SHAP's own and Captum's do not where DeepLIFT does not
(:mod:`onnx_attrib.methods.deeplift`).

**Expected gradients** (Erion et al. 2021, arXiv 1906.10670): integrated gradients in expectation
over the background, E[(x − x̄)·∇S(x̄ + α(x − x̄))], estimated from ``samples`` draws of a sample x̄ of
the background and an α, both uniform. Draws are the same in every run and for all samples of a
batch (Captum draws anew for each); ``seed`` chooses them. The sum S(x) − E S(x̄) is reached in
expectation only: the error falls like 1/√samples. With ``noise`` σ every draw has x + σε, with
standard normal ε, in place of x (in x − x̄ too): GradientSHAP, with Captum's ``stdevs`` σ, the
standard deviation itself.
"""

from dataclasses import replace

from onnx_attrib.methods.base import GRADIENT, Draws, Method, Noise, Option, Options
from onnx_attrib.methods.deeplift import deeplift
from onnx_attrib.noise import PRIME, keys

CHUNK = Option(
    "chunk", 10, "draws evaluated together; of larger batches fewer (not on CUDA)", minimum=1
)

deep_shap = replace(
    deeplift,
    name="deep-shap",
    summary="DeepLIFT averaged over a background, summing exactly to S(x) − mean S(x̄)",
    paper="Lundberg & Lee 2017, A Unified Approach to Interpreting (arXiv 1705.07874)",
    options=(*deeplift.options, CHUNK),
    background=True,
    draws=lambda options: Draws(options["chunk"]),
)


def _expected(options: Options) -> Draws:
    samples, seed, size = options["samples"], options["seed"], options["noise"]
    places, rows, *_ = keys(seed, "path", samples).T
    return Draws(
        options["chunk"],
        weights=(1 / samples,) * samples,
        alphas=tuple((places + 0.5) / PRIME),
        rows=tuple(int(row) for row in rows),
        noise=Noise(size, relative=False, seed=seed) if size else None,
    )


expected_gradients = Method(
    name="expected-gradients",
    summary="(x − x̄) · gradient between x and x̄, averaged over random x̄ of a background",
    g="f'(z), averaged over random points between x and a background",
    paper="Erion et al. 2021, Improving Performance with Attribution Priors (arXiv 1906.10670)",
    table=lambda options: GRADIENT,
    attribution=lambda op, m, x, reference: op.Mul(m, op.Sub(x, reference)),
    options=(
        Option("samples", 50, "number of draws of x̄ and of a point between x̄ and x", minimum=1),
        Option("seed", 0, "chooses the draws: the same seed gives the same result"),
        Option(
            "noise", 0.0, "standard deviation of Gaussian noise on x: GradientSHAP", minimum=0.0
        ),
        CHUNK,
    ),
    needs_reference=True,
    background=True,
    draws=_expected,
)
