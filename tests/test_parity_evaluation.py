"""Infidelity, max-sensitivity and curves against Captum's metrics on the same model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import onnx_attrib
from onnx_attrib.evaluation import fidelity
from onnx_attrib.evaluation.features import features_of
from onnx_attrib.evaluation.sensitivity import changes, subset_sizes, subset_sums, subsets

from .evaluation_models import Array, Slow, picture

torch: Any = pytest.importorskip("torch")
metrics: Any = pytest.importorskip("captum.metrics")
attr: Any = pytest.importorskip("captum.attr")

pytestmark = pytest.mark.slow
SIZE = (3, 6, 7)


class Twin(torch.nn.Module):
    """The picture model in torch, in float64."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from onnx.numpy_helper import to_array

        weights = {t.name: torch.tensor(to_array(t)) for t in model.graph.initializer}
        self.k, self.b, self.w = (weights[name].double() for name in ("k", "b", "w"))

    def forward(self, x: Any) -> Any:
        made = torch.relu(torch.nn.functional.conv2d(x, self.k, self.b, padding=1))
        return made.mean(dim=(2, 3)) @ self.w


@pytest.fixture
def case(rng: np.random.Generator) -> tuple[Any, Any, Array, Array]:
    torch.set_num_threads(1)
    model = picture(rng, SIZE)
    return (
        model,
        Twin(model),
        rng.normal(size=(4, *SIZE)).astype(np.float32),
        rng.integers(3, size=4),
    )


def test_infidelity(case: tuple[Any, Any, Array, Array], rng: np.random.Generator) -> None:
    model, twin, x, target = case
    features, baseline = features_of("pixels", SIZE), rng.normal(size=SIZE).astype(np.float32)
    sizes = subset_sizes(features.count)
    masks = subsets(rng, features.count, sizes, 8)
    entries = np.broadcast_to(features.spread(masks), (len(masks), *SIZE))
    y = Slow(model)
    a = rng.normal(size=x.shape)
    for scaled in (True, False):
        found = []
        for i, t in enumerate(target):

            def score(values: Array, t: int = int(t)) -> Array:
                return np.array([y({"x": v})[t] for v in values])

            whole = score(x[i : i + 1])[0]
            changed = changes(score, whole, x[i], baseline, masks, features)
            found.append(
                fidelity.infidelity(subset_sums(features.total(a)[i], masks), changed, scaled)
            )
        drawn = 0

        def perturb(inputs: Any, baselines: Any) -> tuple[Any, Any]:
            """Captum asks for all draws of all samples at once: the subsets, sample by sample."""
            nonlocal drawn
            each = len(inputs) // len(x)
            chosen = np.concatenate([entries[drawn : drawn + each]] * len(x))
            drawn += each
            gone = torch.tensor(chosen)
            return gone.double(), torch.where(gone, baselines, inputs)

        wanted = metrics.infidelity(
            twin,
            perturb,
            torch.tensor(x).double(),
            torch.tensor(a),
            baselines=torch.tensor(baseline).double()[None].expand(len(x), *SIZE),
            target=torch.tensor(target),
            n_perturb_samples=len(masks),
            normalize=scaled,
        )
        assert drawn == len(masks)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3)


def test_max_sensitivity(case: tuple[Any, Any, Array, Array]) -> None:
    model, twin, x, target = case
    seed, several, radius = 11, 6, 0.05
    found = onnx_attrib.evaluate(
        model, x, ["gradient-x-input"], labels=target, target="label", subsets=0, seed=seed,
        neighbours=several, radius=radius, layout="nchw", threads=1,
    ).results  # fmt: skip
    around = [
        fidelity.neighbours(np.random.default_rng([seed, 3, i]), one, radius, several)
        for i, one in enumerate(x)
    ]

    def perturb(inputs: Any, radius: float) -> tuple[Any]:
        assert len(inputs) == len(x) * several
        return (torch.tensor(np.concatenate(around)).double(),)

    wanted = metrics.sensitivity_max(
        attr.InputXGradient(twin).attribute,
        torch.tensor(x).double(),
        perturb_func=perturb,
        perturb_radius=radius,
        n_perturb_samples=several,
        target=torch.tensor(target),
    )
    told = found["methods"]["gradient-x-input"]["max_sensitivity"]["mean"]
    np.testing.assert_allclose(told, wanted.numpy().mean(), rtol=1e-3)


def test_curves(case: tuple[Any, Any, Array, Array]) -> None:
    """Every perturbed sample is made and evaluated in torch; the attributions are Captum's."""
    model, twin, x, target = case
    evaluation = onnx_attrib.evaluate(
        model, x, ["gradient-x-input"], labels=target, target="label", layout="nchw", threads=1
    )
    inputs, classes = torch.tensor(x).double(), torch.tensor(target)
    a = attr.InputXGradient(twin).attribute(inputs, target=classes).detach()
    a = a.sum(dim=1).reshape(len(x), -1)
    np.testing.assert_allclose(
        evaluation.attributions["gradient-x-input"], a.numpy(), rtol=1e-3, atol=1e-5
    )
    found = evaluation.results["methods"]["gradient-x-input"]["curves"]
    for order, falls in (("morf", True), ("lerf", False)):
        ranked = a.argsort(dim=1, descending=falls, stable=True)
        rows = []
        for k in range(a.shape[1] + 1):
            keep = torch.ones_like(a).scatter(1, ranked[:, :k], 0.0).reshape(len(x), 1, *SIZE[1:])
            with torch.no_grad():
                rows.append(twin(inputs * keep).gather(1, classes[:, None])[:, 0])
        wanted = (torch.stack(rows) - rows[0]).mean(dim=1)
        np.testing.assert_allclose(found[order]["mean"], wanted.numpy(), rtol=1e-3, atol=1e-4)
