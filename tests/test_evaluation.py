"""Every measure of ``evaluate`` against the paper's formula, restated slowly on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_attrib
from onnx_attrib import OptionError
from onnx_attrib.evaluation import agreement, curves, fidelity, sanity, sensitivity
from onnx_attrib.evaluation.features import Features, features_of

from .evaluation_models import (
    Array,
    Slow,
    attributions,
    dense,
    linear,
    parts_of,
    picture,
    removed,
)

ORDERS = ("morf", "lerf")


def slow_curve(
    score: Any,
    x: Array,
    reference: Array,
    a: Array,
    parts: list[list[int]],
    at: list[int],
    up: bool,
) -> Array:
    """Ancona et al. 2017, Section 4, feature by feature."""
    relevance = [a.reshape(-1)[part].sum() for part in parts]
    order = sorted(range(len(parts)), key=lambda j: relevance[j] if up else -relevance[j])
    found = []
    for k in at:
        gone = [entry for j in order[:k] for entry in parts[j]]
        found.append(score(removed(x, reference, gone)) - score(x))
    return np.array(found)


# -- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "positions", "columns"])
def test_features_part_the_entries(kind: str, rng: np.random.Generator) -> None:
    shape = tuple(rng.integers(2, 5, size=3).tolist())
    features, parts = features_of(kind, shape), parts_of(kind, shape)
    a = rng.normal(size=(3, *shape))
    assert features.count == len(parts)
    wanted = [[row.reshape(-1)[part].sum() for part in parts] for row in a]
    np.testing.assert_allclose(features.total(a), wanted)
    x, reference = rng.normal(size=(2, *shape))
    masks = rng.random((6, features.count)) < 0.5
    for mask, found in zip(masks, features.without(x, reference, masks), strict=True):
        gone = [entry for part, out in zip(parts, mask, strict=True) if out for entry in part]
        np.testing.assert_array_equal(found, removed(x, reference, gone))
    mixed = np.where(rng.random(shape) < 0.7, x, reference)
    wanted = [(mixed.reshape(-1)[p] != reference.reshape(-1)[p]).any() for p in parts]
    np.testing.assert_array_equal(features.differ(mixed, reference), wanted)


def test_features_by_rank() -> None:
    kinds = {(3, 8, 8): "pixels", (9, 4): "positions", (7,): "columns", (2, 3, 4, 5): "columns"}
    assert {shape: features_of("auto", shape).kind for shape in kinds} == kinds
    assert features_of("pixels", (8, 9, 3), channels_last=True).grid == (8, 9)
    with pytest.raises(OptionError, match="no pixels"):
        features_of("pixels", (7,))
    with pytest.raises(OptionError, match="did you mean 'pixels'"):
        features_of("pixel", (3, 4, 5))


def test_a_map_of_one_channel_counts_for_all(rng: np.random.Generator) -> None:
    features = features_of("pixels", (3, 4, 5))
    a = rng.normal(size=(2, 1, 4, 5))
    np.testing.assert_allclose(features.total(a), a.reshape(2, -1))
    with pytest.raises(OptionError, match="shape"):
        features.total(rng.normal(size=(2, 1, 2, 2)))


# -- perturbation curves ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 1, 3, 50])
@pytest.mark.parametrize("kind", ["pixels", "columns", "positions"])
def test_curves(kind: str, step: int | None, rng: np.random.Generator) -> None:
    size = (2, int(rng.integers(3, 6)), int(rng.integers(3, 6)))
    model, baseline = picture(rng, size), round(float(rng.normal()), 3)
    x = rng.normal(size=(5, *size)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.float32(baseline)
    y = Slow(model)
    target = np.array([y({"x": one}).argmax() for one in x])
    found = onnx_attrib.evaluate(
        model, x, ["deeplift"], features=kind, step=step, baseline=baseline, subsets=0,
        layout="nchw", threads=1,
    ).results  # fmt: skip
    a = attributions(model, "deeplift", x, target, baseline=baseline)
    parts, reference = parts_of(kind, size), np.full(size, baseline, np.float32)
    at = list(range(0, len(parts), step or 1))
    at += [len(parts)] if at[-1] != len(parts) else []
    for order in ORDERS:
        wanted = np.stack(
            [
                slow_curve(
                    lambda v, t=t: y({"x": v})[t], x[i], reference, a[i], parts, at, order == "lerf"
                )
                for i, t in enumerate(target)
            ]
        )
        curve = found["methods"]["deeplift"]["curves"][order]
        assert curve["removed"] == at
        mean, error = wanted.mean(0), 1.96 * wanted.std(0, ddof=1) / np.sqrt(len(x))
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(curve["mean"], mean, **close)
        np.testing.assert_allclose(curve["low"], mean - error, **close)
        np.testing.assert_allclose(curve["high"], mean + error, **close)
        widths, heights = np.diff(at), (wanted[:, 1:] + wanted[:, :-1]) / 2
        area = [sum(w * h for w, h in zip(widths, row, strict=True)) / at[-1] for row in heights]
        np.testing.assert_allclose(curve["area"]["mean"], np.mean(area), **close)
        np.testing.assert_allclose(curve["slope"]["mean"], (wanted[:, 1] / at[1]).mean(), **close)
    row = found["ranking"][0]
    gap = row["lerf"]["mean"] - row["morf"]["mean"]
    np.testing.assert_allclose(row["gap"]["mean"], gap, rtol=1e-9, atol=1e-12)


def test_equal_attributions_keep_the_order_of_features() -> None:
    a = np.array([1.0, 0.0, 1.0, 0.0, -2.0])
    assert curves.falling(a).tolist() == [0, 2, 1, 3, 4]
    assert curves.rising(a).tolist() == [4, 1, 3, 0, 2]


def test_what_is_at_the_baseline_is_not_evaluated(rng: np.random.Generator) -> None:
    count, evaluated = 40, 0
    weights = rng.normal(size=count)

    def score(values: Array) -> Array:
        nonlocal evaluated
        evaluated += len(values)
        return values @ weights

    x = np.where(np.arange(count) < 7, rng.normal(size=count), 0.0)
    features = Features("columns", (count,), ())
    at, order = curves.removed_counts(count, 1), rng.permutation(count)
    found = curves.variations(score, float(x @ weights), x, np.zeros(count), order, at, features)
    wanted = [-(x[order[:k]] @ weights[order[:k]]) for k in at]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert evaluated == 7


def test_step_and_slope_of_many_features(rng: np.random.Generator) -> None:
    assert [curves.automatic_step(n) for n in (1, 100, 101, 784, 50176)] == [1, 1, 2, 8, 502]
    at = curves.removed_counts(784, 1)
    line = -0.25 * at[None].astype(float)
    np.testing.assert_allclose(curves.slopes(line, at, 784), [-0.25])
    bent = np.where(at < 8, 0, -8.0)[None]  # the first per cent are eight of 784
    np.testing.assert_allclose(curves.slopes(bent, at, 784), [-1.0])
    np.testing.assert_allclose(curves.areas(line, at), [-0.25 * 784 / 2])


def test_limit(rng: np.random.Generator) -> None:
    model, x = dense(rng, 9), rng.normal(size=(3, 9)).astype(np.float32)
    whole = onnx_attrib.evaluate(model, x, ["gradient"], subsets=0, neighbours=0, threads=1)
    part = onnx_attrib.evaluate(model, x, ["gradient"], subsets=0, neighbours=0, limit=4, threads=1)
    for order in ORDERS:
        a, b = (e.results["methods"]["gradient"]["curves"][order] for e in (whole, part))
        assert b["removed"] == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(b["mean"], a["mean"][:5])
    found = part.results["methods"]["gradient"]
    assert found["sensitivity"] is found["infidelity"] is found["max_sensitivity"] is None


# -- sensitivity-n and infidelity ------------------------------------------------------------------


def test_subsets_have_their_size_and_miss_no_feature(rng: np.random.Generator) -> None:
    sizes = sensitivity.subset_sizes(60)
    assert (sizes[0], sizes[-1]) == (1, 48)
    assert (np.diff(sizes) > 0).all()
    masks = sensitivity.subsets(rng, 60, sizes, 400).reshape(len(sizes), 400, 60)
    for n, drawn in zip(sizes, masks, strict=True):
        assert (drawn.sum(axis=1) == n).all()
        rate, expected = drawn.mean(axis=0), n / 60
        assert abs(rate - expected).max() < 6 * np.sqrt(expected * (1 - expected) / 400)
    assert sensitivity.subset_sizes(1).tolist() == [1]


@pytest.mark.parametrize("method", ["deeplift", "saliency"])
def test_sensitivity_and_infidelity(method: str, tmp_path: Path, rng: np.random.Generator) -> None:
    features = int(rng.integers(8, 14))
    model, baseline = dense(rng, features), rng.normal(size=features).astype(np.float32)
    x = rng.normal(size=(4, features)).astype(np.float32)
    x[:, 0] = baseline[0]
    target = rng.integers(4, size=4)
    found = onnx_attrib.evaluate(
        model, x, [method], labels=target, target="label", baseline=baseline, subsets=9,
        folder=tmp_path, threads=1,
    ).results["methods"][method]  # fmt: skip
    y = Slow(model)
    options = {} if method == "saliency" else {"baseline": baseline}
    a = attributions(model, method, x, target, **options)
    kept = np.load(tmp_path / "state" / "subsets-0.npz")
    masks = np.unpackbits(kept["packed"], axis=2, count=features).astype(bool)
    sizes = found["sensitivity"]["n"]
    for i, drawn in enumerate(masks):
        own = np.random.default_rng([0, 2, i])  # of each sample, by its number
        wanted = sensitivity.subsets(own, features, np.array(sizes), 9)
        np.testing.assert_array_equal(drawn, wanted)
    told, off = [], []
    for i, t in enumerate(target):
        sums, changes = [], []
        for mask in masks[i]:
            sums.append(a[i][mask].sum())
            changes.append(y({"x": x[i]})[t] - y({"x": np.where(mask, baseline, x[i])})[t])
        by_size = zip(
            np.split(np.array(sums), len(sizes)), np.split(np.array(changes), len(sizes)),
            strict=True,
        )  # fmt: skip
        told.append([np.corrcoef(s, c)[0, 1] for s, c in by_size])
        sums_, changes_ = np.array(sums), np.array(changes)
        beta = (sums_ * changes_).mean() / (sums_**2).mean()
        off.append(((beta * sums_ - changes_) ** 2).mean())
    np.testing.assert_allclose(
        found["sensitivity"]["correlation"], np.mean(told, axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found["infidelity"]["mean"], np.mean(off), rtol=1e-3, atol=1e-6)


def test_a_linear_model_is_accounted_for(rng: np.random.Generator) -> None:
    model, x = linear(rng, 12), rng.normal(size=(4, 12)).astype(np.float32)
    found = onnx_attrib.evaluate(model, x, ["gradient-x-input", "occlusion"], threads=1).results
    for one in found["methods"].values():
        np.testing.assert_allclose(one["sensitivity"]["correlation"], 1, atol=1e-4)
        assert one["infidelity"]["mean"] < 1e-9
        assert one["completeness"]["max"] < 1e-4
    assert np.min(found["agreement"]["rank"]) > 0.9999


def test_nothing_to_correlate_is_counted(rng: np.random.Generator) -> None:
    model, x = dense(rng, 6), rng.normal(size=(4, 6)).astype(np.float32)
    x[1] = 0.0  # at the baseline: no subset changes anything
    found = onnx_attrib.evaluate(model, x, ["deeplift"], subsets=20, threads=1).results
    told = found["methods"]["deeplift"]["sensitivity"]
    assert told["undefined"][0] == 1
    assert np.isfinite(told["correlation"]).all()


def test_a_random_order_tells_nothing(rng: np.random.Generator) -> None:
    model, x = linear(rng, 30), rng.normal(size=(40, 30)).astype(np.float32)
    found = onnx_attrib.evaluate(model, x, ["gradient-x-input"], neighbours=0, threads=1).results
    control = found["control"]["random"]
    assert np.abs(control["sensitivity"]["correlation"]).max() < 0.25
    # One order and its reverse: the curves of a linear model are mirrored around the straight line.
    morf, lerf = (np.array(control["curves"][order]["mean"]) for order in ORDERS)
    np.testing.assert_allclose(morf + lerf[::-1], morf[-1], atol=1e-4)
    assert found["ranking"][0]["gap"]["low"] > abs(
        control["curves"]["lerf"]["area"]["mean"] - control["curves"]["morf"]["area"]["mean"]
    )


# -- stability, completeness, agreement ------------------------------------------------------------


def test_max_sensitivity(rng: np.random.Generator) -> None:
    model, x = dense(rng, 8), rng.normal(size=(3, 8)).astype(np.float32)
    radius, seed = 0.1, int(rng.integers(100))
    found = onnx_attrib.evaluate(
        model, x, ["deeplift"], target=2, radius=radius, neighbours=4, seed=seed, subsets=0,
        threads=1,
    ).results["methods"]["deeplift"]["max_sensitivity"]  # fmt: skip
    wanted = []
    for i, one in enumerate(x):
        around = fidelity.neighbours(np.random.default_rng([seed, 3, i]), one, radius, 4)
        assert len(around) == 4
        assert (np.abs(around - one) <= radius * (1 + 1e-5)).all()
        a = attributions(model, "deeplift", one[None], np.array([2]))[0]
        b = attributions(model, "deeplift", around, np.array([2] * 4))
        wanted.append(max(np.linalg.norm(row - a) for row in b) / np.linalg.norm(a))
    np.testing.assert_allclose(found["mean"], np.mean(wanted), rtol=1e-3)


def test_completeness(rng: np.random.Generator) -> None:
    model, x = dense(rng, 8), rng.normal(size=(5, 8)).astype(np.float32)
    baseline = rng.normal(size=8).astype(np.float32)
    found = onnx_attrib.evaluate(
        model, x, ["deeplift", "gradient-x-input", "saliency"], target=1, baseline=baseline,
        subsets=0, neighbours=0, threads=1,
    ).results["methods"]  # fmt: skip
    assert found["deeplift"]["completeness"]["max"] < 1e-4
    assert found["deeplift"]["completeness"]["promised"]
    assert found["saliency"]["completeness"] is None
    y = Slow(model)
    a = attributions(model, "gradient-x-input", x, np.array([1] * 5))
    difference = np.array([y({"x": v})[1] - y({"x": baseline})[1] for v in x])
    off = np.abs(a.sum(axis=1) - difference)
    told = found["gradient-x-input"]["completeness"]
    assert not told["promised"]
    np.testing.assert_allclose(told["absolute"]["mean"], off.mean(), rtol=1e-3)
    np.testing.assert_allclose(told["median"], np.median(off / abs(difference)), rtol=1e-3)
    np.testing.assert_allclose(told["max"], np.max(off / abs(difference)), rtol=1e-3)


def slow_ranks(row: Array) -> Array:
    """The mean place that equal entries have in the sorted row."""
    ordered = sorted(row)
    return np.array([np.mean([k + 1 for k, v in enumerate(ordered) if v == x]) for x in row])


def test_agreement(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 5, size=(2, 6, 9)).astype(float)
    for row in a:
        np.testing.assert_allclose(agreement.ranks(row), slow_ranks(row))
    a[5] = 3.0  # constant: no correlation
    found = agreement.agreement([a, b])
    wanted = np.mean([np.corrcoef(p, q)[0, 1] for p, q in zip(a[:5], b[:5], strict=True)])
    ranked = [np.corrcoef(slow_ranks(a[i]), slow_ranks(b[i]))[0, 1] for i in range(5)]
    np.testing.assert_allclose(found["pearson"][0][1], wanted)
    np.testing.assert_allclose(found["rank"][0][1], np.mean(ranked))
    np.testing.assert_allclose(found["rank"][1][0], np.mean(ranked))
    np.testing.assert_allclose(np.diag(found["pearson"]), 1)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_correlation_of_any_scale(scale: float, rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 50))
    np.testing.assert_allclose(agreement.pearson(a * scale, b), np.corrcoef(a, b)[0, 1])
    assert np.isnan(agreement.pearson(np.full(50, 0.1 * scale), b))


# -- randomised weights ----------------------------------------------------------------------------


def test_layers_are_randomised_from_the_output_backwards(rng: np.random.Generator) -> None:
    from onnx.numpy_helper import to_array

    model = dense(rng, 60, hidden=50)
    before = {t.name: to_array(t) for t in model.graph.initializer}
    stages = list(sanity.randomised(model, 0))
    assert [name for name, _ in stages] == ["w2", "w1"]
    after = [{t.name: to_array(t) for t in stage.graph.initializer} for _, stage in stages]
    for name, where in (("w2", 0), ("w1", 1)):
        for k in range(2):
            assert np.array_equal(after[k][name], before[name]) == (k < where)
    np.testing.assert_array_equal(after[0]["w2"], after[1]["w2"])
    np.testing.assert_array_equal(after[1]["b1"], before["b1"])
    drawn, real = after[1]["w1"], before["w1"]
    assert abs(drawn.std() / real.std() - 1) < 0.1
    assert abs(drawn.mean() - real.mean()) < 0.1
    assert abs(np.corrcoef(drawn.ravel(), real.ravel())[0, 1]) < 0.1
    assert {t.name: to_array(t).tobytes() for t in model.graph.initializer} == {
        name: a.tobytes() for name, a in before.items()
    }


def test_sanity(rng: np.random.Generator) -> None:
    model, x = dense(rng, 40, hidden=30), rng.normal(size=(6, 40)).astype(np.float32)
    evaluation = onnx_attrib.evaluate(
        model, x, ["gradient"], target=1, sanity=True, subsets=0, neighbours=0, seed=7, threads=1
    )
    found = evaluation.results["methods"]["gradient"]["sanity"]
    assert found["layers"] == ["w2", "w1"]
    before = attributions(model, "gradient", x, np.array([1] * 6))
    for k, (_, stage) in enumerate(sanity.randomised(model, 7)):
        after = attributions(stage, "gradient", x, np.array([1] * 6))
        pairs = list(zip(before, after, strict=True))
        wanted = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
        ranked = np.mean([np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1] for a, b in pairs])
        np.testing.assert_allclose(found["pearson"][k], wanted, atol=1e-4)
        np.testing.assert_allclose(found["rank"][k], ranked, atol=1e-3)
    assert max(np.abs(found["rank"])) < 0.5
