"""``evaluate()``: methods judged on a model and its data."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attrib.evaluation import results as reported
from onnx_attrib.evaluation.contestants import (
    Contestant,
    Reference,
    Wanted,
    choices_of,
    compile_all,
    reference_of,
)
from onnx_attrib.evaluation.data import Data, Samples, samples_of
from onnx_attrib.evaluation.features import features_of
from onnx_attrib.evaluation.gallery import exhibits
from onnx_attrib.evaluation.scoring import Scoring
from onnx_attrib.evaluation.settings import (
    Target,
    check_counts,
    described,
    fingerprint,
    index_of,
    plan_of,
    read_baseline,
    shown_of,
    single,
)
from onnx_attrib.evaluation.store import Store
from onnx_attrib.evaluation.study import Progress, Study
from onnx_attrib.evaluation.subject import Subject
from onnx_attrib.feeds import Array
from onnx_attrib.images import Layout, geometry
from onnx_attrib.model_io import Source
from onnx_attrib.runtime import Explainer
from onnx_attrib.session import Provider
from onnx_attrib.whole import write_text


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    ``results``: everything as plain JSON types, the contents of results.json. ``attributions``: of
    each method by label, [N, F], summed over each feature. ``gallery``: what the report shows of
    the samples in ``results["gallery"]``.
    """

    results: dict[str, Any]
    attributions: dict[str, Array] = field(repr=False)
    gallery: list[Any] = field(default_factory=list, repr=False)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write results.json, three tables and report.html into a folder; returns the files."""
        from onnx_attrib.evaluation.report import render

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        texts = {
            "results.json": json.dumps(self.results, indent=1, allow_nan=False) + "\n",
            **reported.tables(self.results),
            "report.html": render(self.results, self.gallery),
        }
        for name, text in texts.items():
            write_text(place / name, text)
        return [place / name for name in texts]


def evaluate(
    model: Source | Subject,
    data: Data | Samples,
    methods: Wanted,
    *,
    labels: Any = None,
    inputs: str | Sequence[str] | None = None,
    output: str | None = None,
    features: str = "auto",
    baseline: Any = "zeros",
    target: Target = "predicted",
    step: int | None = None,
    limit: int | None = None,
    subsets: int = 50,
    neighbours: int = 5,
    radius: float | None = None,
    sanity: bool = False,
    gallery: int | Sequence[int] = 8,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    providers: Sequence[Provider] | None = None,
    layout: Layout | None = None,
) -> Evaluation:
    """Judge attribution methods on a model: perturbation curves, sensitivity-n, and more.

    Everything runs in ONNX Runtime. S is the explained output at the target, as in the compiled
    graphs; x̄ the baseline. The measures and their units are described where they are computed:
    :mod:`onnx_attrib.evaluation.curves`, ``sensitivity``, ``fidelity``, ``agreement``, ``sanity``.

    Args:
        model: a path, the bytes of an .onnx file, a ModelProto, or a Subject (a model with its
            tensors chosen).
        data: samples [N, …] of a model with one input, or arrays by input name; two or more.
        methods: names, or by label a name, (name, options) or options. A random order is always
            there as a control.
        labels: the class of each sample, [N]: for the accuracy, and for ``target="label"``.
        inputs: the one tensor to attribute to and to perturb, an input or an inner tensor (the
            model is cut there). Default: as :func:`onnx_attrib.compile` chooses. Others stay.
        output: the tensor to explain. Default: the first float output.
        features: what is removed as one: ``"pixels"``, ``"positions"``, ``"columns"``, or
            ``"auto"`` (:mod:`onnx_attrib.evaluation.features`).
        baseline: x̄ of the attributed tensor, for the methods and for what is removed: ``"zeros"``,
            a number, an array of a sample's shape, or the path of an .npy. An array [K, …] is a
            background for the methods that take one, and its mean x̄ for the rest.
        target: ``"predicted"`` (the largest entry of each sample's output), ``"label"``, a class,
            or a tuple of indices for outputs of rank > 2.
        step: how many features are removed at a time. Default: 1 up to 100 features, else so many
            that curves have about 100 points.
        limit: remove only so many features. Default: all.
        subsets: random subsets of each size for sensitivity-n and infidelity; 0: neither.
        neighbours: points around each of at most 10 samples for max-sensitivity; 0: without.
        radius: how far they may be in each entry. Default: 2 % of the range of the data.
        sanity: randomise the weights of the last layers, and compare attributions.
        gallery: how many samples the report shows, or which.
        seed: of all random numbers.
        folder: where results are written, and what is found on the way is kept: the same call
            goes on where it was interrupted.
        fresh: throw away what ``folder`` holds of an earlier run.
        progress: called with units of work done, their number, and what is being worked on.
        threads: how many threads an operator may use on the CPU. Default: ONNX Runtime's.
        providers: ONNX Runtime's execution providers. Default: CUDA if it is there, else CPU.
        layout: where pictures have their channels: ``"nchw"``, ``"nhwc"``, or None to tell by the
            sizes.

    Raises:
        OptionError: data, labels or settings that do not fit the model; a method it refuses.
        CompileError: ONNX Runtime failed.
    """
    choices = choices_of(methods)
    check_counts(step=step, limit=limit, subsets=(subsets, 0), neighbours=(neighbours, 0))
    if isinstance(model, Subject):
        subject = model
    else:
        subject = Subject(model, single(inputs), output, threads, providers)
    samples = samples_of(data, labels, subject.inputs)
    shown = shown_of(gallery, len(samples.names))
    scoring = Scoring(subject, samples.inputs, len(samples.names))
    scoring.choose(index_of(target, scoring, samples))
    form = geometry(subject.port.shape, layout) if len(subject.port.shape) == 4 else None
    last = form is not None and form.layout == "nhwc"
    parted = features_of(features, scoring.values.shape[1:], channels_last=last)
    given = reference_of(read_baseline(baseline), subject.name, parted.shape, scoring.values.dtype)
    plan = plan_of(parted.count, scoring.values, step, limit, subsets, neighbours, radius, seed)
    place = None if folder is None else Path(folder)
    study = Study(
        scoring,
        parted,
        given.mean,
        plan,
        Store(place),
        lambda file: Explainer(file, providers, threads=threads),
    )
    with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as scratch:
        make = partial(
            compile_all, name=subject.name, output=subject.output, reference=given, features=parted
        )
        contestants = list(make(choices, subject.source, folder=Path(scratch)))
        study.store.open(fingerprint(subject, scoring, parted, given, plan), fresh)
        found = study.run(contestants, make if sanity else None, progress)
    differences = {one.label: _differences(scoring, given, one) for one in contestants}
    results = {
        **described(samples, study, target, baseline, sanity),
        **reported.report(contestants, found, study, differences),
        "gallery": [_sample(i, samples, scoring) for i in shown],
    }
    evaluation = Evaluation(
        reported.finite(results),
        found.maps,
        exhibits(shown, samples, scoring, parted, found.maps, form),
    )
    if place is not None:
        evaluation.write(place)
    return evaluation


def _differences(scoring: Scoring, reference: Reference, one: Contestant) -> Array:
    """S(x) − S(x̄) of each sample; over a background, if the method has one, the mean S(x̄)."""
    background = one.choice.method.background and np.ndim(reference.background)
    rows = reference.background if background else reference.mean[None]
    shape = scoring.values.shape
    there = [scoring.score_at(np.broadcast_to(row, shape)) for row in rows]
    return scoring.scores - np.mean(there, axis=0)


def _sample(i: int, samples: Samples, scoring: Scoring) -> dict[str, Any]:
    index = None if scoring.index is None else np.atleast_1d(scoring.index[i]).tolist()
    return {
        "index": i,
        "name": samples.names[i],
        "target": index[0] if index is not None and len(index) == 1 else index,
        "label": None if samples.labels is None else int(samples.labels[i]),
        "score": float(scoring.scores[i]),
    }


__all__ = ["Evaluation", "evaluate"]
