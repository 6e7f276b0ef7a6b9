"""Runs of ``evaluate``: kinds of models and data, going on after an interruption, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnx_attrib
from onnx_attrib import Explainer, OptionError
from onnx_attrib.evaluation.study import Study

from .evaluation_models import (
    Slow,
    attributions,
    built,
    dense,
    parts_of,
    picture,
    removed,
    tokens,
)

# -- kinds of models -------------------------------------------------------------------------------


def test_an_embedding_is_cut_out(rng: np.random.Generator) -> None:
    length = int(rng.integers(4, 8))
    model = tokens(rng, length)
    ids = rng.integers(11, size=(4, length))
    mask = np.ones((4, length), np.float32)
    mask[:, -1] = 0.5
    data = {"ids": ids, "mask": mask}
    evaluation = onnx_attrib.evaluate(
        model, data, ["deeplift"], inputs="embedded", target=1, threads=1
    )
    found = evaluation.results
    assert (found["settings"]["features"], found["settings"]["count"]) == ("positions", length)
    explain = Explainer(onnx_attrib.compile(model, "deeplift", inputs="embedded"))
    a = explain(data, target=1).attributions["embedded"].sum(axis=2)
    np.testing.assert_allclose(evaluation.attributions["deeplift"], a, rtol=1e-4, atol=1e-6)
    table, w1, w2 = (
        np.frombuffer(t.raw_data, np.float32).reshape(t.dims).astype(np.float64)
        for t in model.graph.initializer[:3]
    )

    def score(i: int, gone: list[int]) -> float:
        embedded = table[ids[i]].copy()
        embedded[gone] = 0
        return float((np.tanh((np.tanh(embedded @ w1) * mask[i][:, None]).sum(0)) @ w2)[1])

    for order, sign in (("morf", -1), ("lerf", 1)):
        ranked = [np.argsort(sign * row, kind="stable") for row in a]
        wanted = np.mean(
            [
                [score(i, list(ranked[i][:k])) - score(i, []) for k in range(length + 1)]
                for i in range(4)
            ],
            axis=0,
        )
        curve = found["methods"]["deeplift"]["curves"][order]["mean"]
        np.testing.assert_allclose(curve, wanted, atol=1e-4)


def test_one_of_several_inputs_is_chosen(rng: np.random.Generator) -> None:
    shape = (TensorProto.FLOAT, ["N", 4])
    nodes = [helper.make_node("Mul", ["a", "b"], ["y"])]
    model = built(nodes, {}, {"a": shape, "b": shape}, {"y": ["N", 4]})
    data = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in ("a", "b")}
    with pytest.raises(OptionError, match="choose a or b"):
        onnx_attrib.evaluate(model, data, ["deeplift"])
    with pytest.raises(OptionError, match="not 2"):
        onnx_attrib.evaluate(model, data, ["deeplift"], inputs=["a", "b"])
    evaluation = onnx_attrib.evaluate(
        model, data, ["gradient-x-input"], inputs=["b"], target=2, subsets=0, threads=1
    )
    wanted = np.where(np.arange(4) == 2, data["a"] * data["b"], 0)
    np.testing.assert_allclose(evaluation.attributions["gradient-x-input"], wanted, rtol=1e-6)
    told = {**data, "b": data["b"][:2]}
    with pytest.raises(OptionError, match=r"different numbers of samples \(a: 3, b: 2\)"):
        onnx_attrib.evaluate(model, told, ["deeplift"], inputs="a")


def test_a_fixed_batch_gives_the_same(rng: np.random.Generator) -> None:
    state = rng.bit_generator.state
    free = dense(rng, 6)
    for batch in (1, 3):
        rng.bit_generator.state = state
        fixed = dense(rng, 6, batch=batch)
        x = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
        names = ["deeplift", "occlusion"]
        a, b = (onnx_attrib.evaluate(m, x, names, threads=1).results for m in (free, fixed))
        for name in names:
            for key in ("curves", "sensitivity", "infidelity", "max_sensitivity"):
                one, other = (flat(found["methods"][name][key]) for found in (a, b))
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [np.nan if value is None else float(value)]


def test_channels_last(rng: np.random.Generator) -> None:
    state, size = rng.bit_generator.state, (3, 6, 5)
    first = picture(rng, size)
    rng.bit_generator.state = state
    last = picture(rng, size, last=True)
    x = np.random.default_rng(1).normal(size=(3, *size)).astype(np.float32)
    a = onnx_attrib.evaluate(first, x, ["deeplift"], threads=1).results
    b = onnx_attrib.evaluate(last, x.transpose(0, 2, 3, 1), ["deeplift"], threads=1).results
    assert b["settings"]["grid"] == [6, 5]
    one, other = (flat(found["methods"]["deeplift"]["curves"]) for found in (a, b))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_occlusion_takes_whole_features(rng: np.random.Generator) -> None:
    size = (3, 4, 4)
    model, x = picture(rng, size), rng.normal(size=(3, *size)).astype(np.float32)
    evaluation = onnx_attrib.evaluate(
        model, x, ["occlusion", "shapley-sampling"], target=0, threads=1
    )
    y, parts = Slow(model), parts_of("pixels", size)
    wanted = [
        [y({"x": v})[0] - y({"x": removed(v, np.zeros(size), part)})[0] for part in parts]
        for v in x
    ]
    np.testing.assert_allclose(evaluation.attributions["occlusion"], wanted, atol=1e-5)
    # Shapley values sum up, also those of whole pixels.
    assert evaluation.results["methods"]["shapley-sampling"]["completeness"]["max"] < 1e-3


def test_background(rng: np.random.Generator) -> None:
    model, x = dense(rng, 7), rng.normal(size=(4, 7)).astype(np.float32)
    background = rng.normal(size=(5, 7)).astype(np.float32)
    evaluation = onnx_attrib.evaluate(
        model, x, ["deep-shap", "deeplift"], target=1, baseline=background, subsets=0, threads=1
    )
    # Each sums to its own difference: from the mean of S over the background, or S at its mean.
    for one in evaluation.results["methods"].values():
        assert one["completeness"]["max"] < 1e-3
    target = np.array([1] * 4)
    for method, given in (("deep-shap", background), ("deeplift", background.mean(0))):
        a = attributions(model, method, x, target, baseline=given)
        np.testing.assert_allclose(evaluation.attributions[method], a, rtol=1e-3, atol=1e-5)


def test_one_value_a_sample_and_labels(rng: np.random.Generator) -> None:
    model, x = dense(rng, 6, classes=1), rng.normal(size=(4, 6)).astype(np.float32)
    found = onnx_attrib.evaluate(model, x, ["deeplift"], labels=[0, 1, 0, 1], threads=1).results
    assert found["data"]["accuracy"] is found["gallery"][0]["target"] is None
    model = dense(rng, 6)
    y = Slow(model)
    predicted = np.array([y({"x": v}).argmax() for v in x])
    labels = predicted.copy()
    labels[0] = (labels[0] + 1) % 4
    found = onnx_attrib.evaluate(
        model, x, ["deeplift"], labels=labels, target="label", gallery=[0, 2], threads=1
    ).results
    assert found["data"]["accuracy"] == 0.75
    assert [one["target"] for one in found["gallery"]] == [labels[0], labels[2]]
    np.testing.assert_allclose(
        [one["score"] for one in found["gallery"]],
        [y({"x": x[i]})[labels[i]] for i in (0, 2)],
        rtol=1e-4,
    )


def test_methods_by_label(rng: np.random.Generator) -> None:
    model, x = dense(rng, 6), rng.normal(size=(3, 6)).astype(np.float32)
    methods = {"few": ("integrated-gradients", {"steps": 2}), "deeplift": {}, "many": "deeplift"}
    evaluation = onnx_attrib.evaluate(model, x, methods, subsets=0, neighbours=0, threads=1)
    found = evaluation.results["methods"]
    assert list(found) == ["few", "deeplift", "many"]
    assert found["few"]["options"]["steps"] == 2
    np.testing.assert_array_equal(
        evaluation.attributions["deeplift"], evaluation.attributions["many"]
    )
    assert {row["label"] for row in evaluation.results["ranking"]} == set(methods)


# -- resuming --------------------------------------------------------------------------------------


def without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k != "seconds_per_sample"}
    return [without_time(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_evaluation_goes_on(
    after: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = dense(rng, 7), rng.normal(size=(25, 7)).astype(np.float32)

    def run(folder: Path, **changes: Any) -> Any:
        return onnx_attrib.evaluate(
            model, x, ["deeplift", "gradient"], folder=folder, sanity=True, threads=1, **changes
        ).results

    def stop(done: int, count: int, what: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", progress=stop)
    kept = {path.name for path in (tmp_path / "part" / "state").glob("*.npz")}
    assert len(kept) == after
    explained = []
    original = Study._explained

    def counted(self: Study, *arguments: Any) -> Any:
        explained.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(Study, "_explained", counted)
    again = run(tmp_path / "part")
    assert without_time(again) == without_time(whole)
    # Three chunks of subsets and of the control come before the methods' six.
    assert len(explained) == 6 - max(0, after - 6)
    assert without_time(run(tmp_path / "part")) == without_time(whole)
    assert len(explained) == 6 - max(0, after - 6)


def test_a_folder_of_something_else_is_told(tmp_path: Path, rng: np.random.Generator) -> None:
    model, x = dense(rng, 5), rng.normal(size=(3, 5)).astype(np.float32)
    run = {"folder": tmp_path, "threads": 1, "subsets": 5}
    first = onnx_attrib.evaluate(model, x, ["deeplift"], **run).results
    for changes, told in (
        ({"step": 2}, "step 1, now 2"),
        ({"seed": 4}, "seed 0, now 4"),
        ({"baseline": 1.0}, "another baseline"),
        ({"target": 1}, "another target"),
        ({"subsets": 6}, "subsets 5, now 6"),
    ):
        with pytest.raises(OptionError, match=f"something else .*{told}"):
            onnx_attrib.evaluate(model, x, ["deeplift"], **{**run, **changes})
    with pytest.raises(OptionError, match="another data"):
        onnx_attrib.evaluate(model, x + 1, ["deeplift"], **run)
    with pytest.raises(OptionError, match="another model"):
        onnx_attrib.evaluate(dense(rng, 5), x, ["deeplift"], **run)
    # More methods are no other evaluation; a method with other options is computed anew.
    both = onnx_attrib.evaluate(
        model, x, {"deeplift": {}, "few": ("integrated-gradients", {"steps": 3})}, **run
    ).results
    kept = without_time(first["methods"]["deeplift"])
    assert without_time(both["methods"]["deeplift"]) == kept
    many = {"few": ("integrated-gradients", {"steps": 60})}
    other = onnx_attrib.evaluate(model, x, many, **run).results
    assert other["methods"]["few"]["curves"] is not None
    assert other["methods"]["few"]["completeness"] != both["methods"]["few"]["completeness"]
    fresh = onnx_attrib.evaluate(model, x, ["deeplift"], fresh=True, step=2, **run).results
    assert fresh["settings"]["step"] == 2


def test_a_damaged_unit_is_computed_again(tmp_path: Path, rng: np.random.Generator) -> None:
    model, x = dense(rng, 5), rng.normal(size=(3, 5)).astype(np.float32)
    first = onnx_attrib.evaluate(model, x, ["deeplift"], folder=tmp_path, threads=1).results
    for path in (tmp_path / "state").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:40])
    again = onnx_attrib.evaluate(model, x, ["deeplift"], folder=tmp_path, threads=1).results
    assert without_time(again) == without_time(first)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": np.zeros((3, 4))}, r"x has shape \[3, 4\]; the model takes \[N, 5\]"),
        ({"data": np.full((3, 5), np.nan)}, "15 entries that are not finite .* sample 0"),
        ({"data": np.zeros((1, 5))}, "holds 1 sample: give two or more"),
        ({"data": {"z": np.zeros((3, 5))}}, "missing: x; unknown: z"),
        ({"data": np.array([["a"] * 5] * 3)}, "must be float32 numbers"),
        ({"labels": [0, 1, 9]}, "label 9 of sample 2 is out of range: .*4 classes"),
        ({"labels": [0, 1]}, r"labels have shape \[2\]; there are 3 samples"),
        ({"labels": [0.5, 1, 2]}, "labels must be whole numbers"),
        ({"target": 4}, "target 4 is out of range"),
        ({"target": "label"}, "needs labels"),
        ({"target": "top"}, "target 'top' is not one of"),
        ({"methods": ["deeplif"]}, "did you mean 'deeplift'"),
        ({"methods": ["random"]}, "no method was named"),
        ({"methods": {"random": "deeplift"}}, "choose another label"),
        ({"methods": ["grad-cam"]}, "method 'grad-cam' is refused"),
        ({"methods": {"a": ("deeplift", {"stepz": 1})}}, "has no option 'stepz'"),
        ({"baseline": np.zeros(4)}, r"baseline has shape \[4\]; a sample of 'x' has \[5\]"),
        ({"baseline": "nowhere.npy"}, "nor a file that exists"),
        ({"baseline": np.inf}, "not finite"),
        ({"step": 0}, "step must be a whole number from 1"),
        ({"subsets": -1}, "subsets must be a whole number from 0"),
        ({"radius": 0.0}, "radius must be a number above 0"),
        ({"gallery": [3]}, "no sample 3 to show"),
        ({"inputs": "z"}, "no tensor 'z'"),
        ({"providers": ["NoProvider"]}, "no provider 'NoProvider'"),
        ({"output": "z"}, "no tensor 'z'"),
        ({"features": "pixels"}, "no pixels"),
    ],
)
def test_mistakes_are_one_clear_line(
    changes: dict[str, Any], told: str, rng: np.random.Generator
) -> None:
    given = {"model": dense(rng, 5), "data": np.zeros((3, 5), np.float32), "methods": ["deeplift"]}
    with pytest.raises(OptionError, match=told) as caught:
        onnx_attrib.evaluate(**{**given, **changes}, threads=1)
    assert "\n" not in str(caught.value)


def test_a_map_of_another_size_names_its_method(rng: np.random.Generator) -> None:
    model, x = picture(rng, (2, 8, 9)), rng.normal(size=(2, 2, 8, 9)).astype(np.float32)
    pooled = {"cam": ("grad-cam", {"upsample": False, "layer": "small"})}
    model.graph.node.insert(
        2, helper.make_node("MaxPool", ["r"], ["small"], kernel_shape=[2, 2], strides=[2, 2])
    )
    model.graph.node[3].input[0] = "small"
    with pytest.raises(OptionError, match=r"method 'cam' does not fit: .*shape"):
        onnx_attrib.evaluate(model, x, pooled, layout="nchw", threads=1)
    onnx_attrib.evaluate(model, x, ["grad-cam"], layout="nchw", subsets=2, threads=1)
