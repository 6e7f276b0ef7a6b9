"""Do attributions of a DNA network find the motifs? Makes genomics.json and two pictures.

    pip install '.[cpu,plot]' torch onnxscript
    python models/ground_truth/genomics.py --data FOLDER

A small CNN learns to tell sequences of 200 letters that the transcription factor Oct4 binds from
those that MafK binds (human ChIP-seq; janggu 0.10.2, GPL-3: downloaded into FOLDER, not committed).
Both have known motifs. On chromosomes that the network has not seen, every sequence that contains
its factor's motif is explained, whatever the network says of it, and positions ranked by their
attribution to the true class are compared with the motif's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from localization import Array, auroc, interval, precision
from onnx import ModelProto
from packages import download, explain, member

import onnx_attrib

HERE = Path(__file__).parent
PACKAGE = "janggu==0.10.2"
LETTERS = "ACGT"
SETS = {"train": ("sample.fa", "sample2.fa"), "test": ("sample_test.fa", "sample2_test.fa")}
"""Files of the package; Oct4 (class 1) before MafK (class 0)."""
HELD_OUT = ("chr1", "chr8")
EPOCHS, BATCH, SEEDS = 12, 64, (0, 1, 2)
REFERENCES = 20
"""Shuffled copies of each sequence that make up its background."""

MOTIFS: dict[int, tuple[tuple[str, int], ...]] = {
    1: (("CWTTGTYATGCAAAT", 3),),
    0: (("TGCTGASTCAGCA", 2), ("TGCTGACGTCAGCA", 2)),
}
"""By class: consensus and mismatches allowed. Oct4 binds the octamer ATGCAAAT, mostly beside Sox2
(CWTTGTY); MafK the Maf recognition elements, TGCTGA and its reverse complement around one or two
letters."""
CODES = {**{c: c for c in LETTERS}, "W": "AT", "S": "CG", "Y": "CT"}


# -- sequences -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """letters [N, 200] as numbers 0 to 3 (ACGT), labels [N] (1: Oct4), chromosomes [N]."""

    letters: Array
    labels: Array
    chromosomes: Array

    def __getitem__(self, chosen: Array) -> Sequences:
        return Sequences(self.letters[chosen], self.labels[chosen], self.chromosomes[chosen])

    def joined(self, other: Sequences) -> Sequences:
        return Sequences(
            np.concatenate([self.letters, other.letters]),
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.chromosomes, other.chromosomes]),
        )


def read(archive: Path, files: Sequence[str]) -> Sequences:
    """The sequences of an Oct4 and of a MafK file."""
    letters, labels, chromosomes = [], [], []
    for name, label in zip(files, (1, 0), strict=True):
        for entry in member(archive, f"resources/{name}").decode().split(">")[1:]:
            head, *lines = entry.split()
            letters.append([LETTERS.index(c) for c in "".join(lines).upper()])
            labels.append(label)
            chromosomes.append(head.split(":")[0])
    return Sequences(np.array(letters), np.array(labels), np.array(chromosomes))


def one_hot(letters: Array) -> Array:
    """[N, 4, L]"""
    return np.ascontiguousarray(np.eye(4, dtype=np.float32)[letters].transpose(0, 2, 1))


def hits(letters: Array, motifs: Sequence[tuple[str, int]]) -> Array:
    """Positions [L] within a match of a motif, on either strand, with few enough mismatches."""
    found = np.zeros(len(letters), bool)
    for consensus, mismatches in motifs:
        table = np.array([[letter in CODES[code] for letter in LETTERS] for code in consensus])
        # The other strand: complemented letters (ACGT reversed is TGCA), in reversed order.
        for strand in (table, table[::-1, ::-1]):
            windows = np.lib.stride_tricks.sliding_window_view(letters, len(strand))
            misses = (~strand[np.arange(len(strand)), windows]).sum(1)
            for start in np.flatnonzero(misses <= mismatches):
                found[start : start + len(strand)] = True
    return found


def shuffled(letters: Array, rng: np.random.Generator) -> Array:
    """A random sequence [L] with as many of each pair of neighbours as ``letters``.

    A random walk that uses every pair once (Altschul and Erickson 1985): the last departure of
    each letter is drawn until these lead to the sequence's last letter, the others are shuffled.
    """
    departures = [letters[1:][letters[:-1] == letter] for letter in range(4)]
    end = letters[-1]
    while True:
        orders = [rng.permutation(following) for following in departures]
        last = {i: order[-1] for i, order in enumerate(orders) if len(order) and i != end}
        if all(_arrives(start, last, end) for start in last):
            break
    walk, used = [letters[0]], [0] * 4
    for _ in range(len(letters) - 1):
        here = walk[-1]
        walk.append(orders[here][used[here]])
        used[here] += 1
    return np.array(walk)


def _arrives(letter: int, last: Mapping[int, int], end: int) -> bool:
    for _ in last:
        letter = last.get(letter, end)
    return bool(letter == end)


# -- the network -----------------------------------------------------------------------------------


def trained(data: Sequences, seed: int, epochs: int = EPOCHS) -> ModelProto:
    """Train the CNN and export it: sequence [N, 4, 200] → oct4, the logit of Oct4, [N, 1].

    No epochs leave it as it was initialised.
    """
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv1d(4, 48, 15, padding=7),
        nn.ReLU(),
        nn.MaxPool1d(4),
        nn.Dropout(0.2),
        nn.Conv1d(48, 48, 7, padding=3),
        nn.ReLU(),
        nn.MaxPool1d(4),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(48 * 12, 64),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(64, 1),
    )
    x = torch.from_numpy(one_hot(data.letters))
    y = torch.from_numpy(data.labels.astype(np.float32))[:, None]
    steps = -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    if epochs:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3e-3, epochs=epochs, steps_per_epoch=steps
        )
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            batch = x[rows]
            # Either strand shows the same site.
            other = torch.rand(len(rows)) < 0.5
            batch[other] = batch[other].flip(1, 2)
            loss = nn.functional.binary_cross_entropy_with_logits(network(batch), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network.eval(),
            (x[:2],),
            path,
            input_names=["sequence"],
            output_names=["oct4"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return onnx.load(path)


def logits(model: ModelProto, data: Sequences) -> Array:
    """Above zero: Oct4; [N]."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"sequence": one_hot(data.letters)})[0])[:, 0]


# -- explaining ------------------------------------------------------------------------------------

Explain = Callable[[ModelProto, Sequences], Array]


def by(method: str, **options: Any) -> Explain:
    """Attributions of the logit, [N, 4, L]."""
    return lambda model, data: explain(model, one_hot(data.letters), method, **options)


def linearised(baseline: float) -> Explain:
    """(x − x̄) · gradient: what a baseline does for gradient × input."""

    def attribute(model: ModelProto, data: Sequences) -> Array:
        x = one_hot(data.letters)
        return (x - np.float32(baseline)) * explain(model, x, "gradient")

    return attribute


def shuffled_background(**options: Any) -> Explain:
    """DeepLIFT averaged over shuffled copies of each sequence (DeepSHAP)."""

    def attribute(model: ModelProto, data: Sequences) -> Array:
        compiled = onnx_attrib.compile(model, "deep-shap", baseline="input", **options)
        explainer = onnx_attrib.Explainer(compiled, threads=1)
        rng = np.random.default_rng(0)
        found = []
        for letters in data.letters:
            copies = one_hot(np.stack([shuffled(letters, rng) for _ in range(REFERENCES)]))
            result = explainer(one_hot(letters[None]), baseline=copies)
            found.append(result.attributions["sequence"][0])
        return np.stack(found)

    return attribute


METHODS: dict[str, Explain] = {
    "gradient × input": by("gradient-x-input"),
    "gradient × (x − ¼)": linearised(0.25),
    "integrated gradients, zeros": by("integrated-gradients"),
    "integrated gradients, ¼": by("integrated-gradients", baseline=0.25),
    "deeplift, zeros": by("deeplift"),
    "deeplift, ¼": by("deeplift", baseline=0.25),
    "deeplift, shuffled": shuffled_background(),
    "deeplift genomics rule, shuffled": shuffled_background(rule="genomics"),
    "occlusion, ¼": by("occlusion", baseline=0.25, window=(-1, 1)),
}
"""DeepLIFT and its rivals by x̄: zeros, ¼ for each letter, or 20 shuffled copies."""
MAIN, PLAIN = "deeplift, shuffled", "gradient × input"


def towards_truth(found: Array, data: Sequences) -> Array:
    """Attributions [N, 4, L] of the Oct4 logit as those of positions to the true class, [N, L]."""
    return found.sum(1) * np.where(data.labels, 1, -1)[:, None]


@dataclass(frozen=True)
class Finding:
    """For each sequence, [N]: AUROC of motif positions, precision and enrichment of the top k."""

    auroc: Array
    precision: Array
    enrichment: Array

    @classmethod
    def of(cls, maps: Array, truth: Array) -> Finding:
        """Maps and truth [N, L]; k is the number of motif positions of each sequence."""
        rng = np.random.default_rng(0)
        pairs = list(zip(maps, truth, strict=True))
        top = np.array([precision(m, t, int(t.sum()), rng) for m, t in pairs])
        return cls(np.array([auroc(m, t) for m, t in pairs]), top, top / truth.mean(1))

    @classmethod
    def mean(cls, several: Sequence[Finding]) -> Finding:
        """The mean over networks, sequence by sequence."""
        return cls(*(np.mean([getattr(f, k) for f in several], 0) for k in KEYS))

    def summary(self) -> dict[str, Any]:
        return {key: interval(getattr(self, key)) for key in KEYS}


KEYS = ("auroc", "precision", "enrichment")


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Figures, and the median sequence of each class with its maps, for the pictures."""

    results: dict[str, Any]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Example:
    """One sequence's letters and motif positions [L], and its map [L] by method."""

    label: int
    letters: Array
    truth: Array
    maps: dict[str, Array]


def study(
    folder: Path, seeds: Sequence[int] = SEEDS, methods: Sequence[str] = tuple(METHODS)
) -> Study:
    """Train a network for each seed and compare the methods' maps with the motifs."""
    archive = download(PACKAGE, folder)
    sequences, test = (read(archive, SETS[name]) for name in ("train", "test"))
    held: Array = np.isin(sequences.chromosomes, HELD_OUT)
    train, held_out = sequences[~held], sequences[held]
    unseen = held_out.joined(test)
    truth = motif_positions(unseen)
    data, truth = unseen[truth.any(1)], truth[truth.any(1)]
    networks = [trained(train, seed) for seed in seeds]
    accuracy = {
        name: [round(float(((logits(m, part) > 0) == part.labels).mean()), 4) for m in networks]
        for name, part in (("train", train), ("held_out", held_out), ("test", test))
    }
    print("accuracy", accuracy)
    found: dict[str, Finding] = {}
    maps: dict[str, Array] = {}
    ranges: dict[str, list[float]] = {}
    for label in methods:
        several = [towards_truth(METHODS[label](network, data), data) for network in networks]
        findings = [Finding.of(values, truth) for values in several]
        found[label], maps[label] = Finding.mean(findings), several[0]
        ranges[label] = [round(float(f.auroc.mean()), 4) for f in findings]
        print(f"{label:35s}", *[f"{getattr(found[label], k).mean():.3f}" for k in KEYS])
    controls = _controls(train, data, truth, maps[MAIN])
    results = {
        "data": PACKAGE,
        "trained_on": len(train.labels),
        "held_out": {"chromosomes": list(HELD_OUT), "sequences": len(held_out.labels)},
        "test": len(test.labels),
        "accuracy": accuracy,
        "with_motif": {
            "sequences": len(data.labels),
            "oct4": int(data.labels.sum()),
            "part_of_positions": round(float(truth.mean()), 4),
        },
        "motif_found_in": _specificity(unseen),
        "methods": {
            label: {
                **finding.summary(),
                "auroc_by_class": {
                    name: round(float(finding.auroc[data.labels == y].mean()), 4)
                    for name, y in (("oct4", 1), ("mafk", 0))
                },
                "auroc_by_network": ranges[label],
                "auroc_minus_plain": interval(finding.auroc - found[PLAIN].auroc),
            }
            for label, finding in found.items()
        },
        "controls": {label: finding.summary() for label, finding in controls.items()},
    }
    return Study(results, tuple(_median(y, data, truth, maps, found[MAIN]) for y in (0, 1)))


def motif_positions(data: Sequences) -> Array:
    """Where each sequence holds its own factor's motif, [N, L]."""
    pairs = zip(data.letters, data.labels, strict=True)
    return np.stack([hits(letters, MOTIFS[label]) for letters, label in pairs])


def _specificity(data: Sequences) -> dict[str, dict[str, float]]:
    """The part of sequences that hold a factor's motif: its own, the other's, shuffled ones."""
    rng = np.random.default_rng(0)
    copies = [shuffled(letters, rng) for letters in data.letters]
    found = {}
    for name, label in (("oct4", 1), ("mafk", 0)):
        held = np.array([hits(letters, MOTIFS[label]).any() for letters in data.letters])
        by_chance = [hits(letters, MOTIFS[label]).any() for letters in copies]
        found[name] = {
            "own": round(float(held[data.labels == label].mean()), 4),
            "other": round(float(held[data.labels != label].mean()), 4),
            "shuffled": round(float(np.mean(by_chance)), 4),
        }
    return found


def _controls(train: Sequences, data: Sequences, truth: Array, maps: Array) -> dict[str, Finding]:
    """What is found where there is nothing to find: random maps, the main method's maps against
    the motifs of another sequence of the class (peaks lie in the middle), an untrained network."""
    rng = np.random.default_rng(0)
    others = np.empty(len(truth), int)
    for label in (0, 1):
        rows = np.flatnonzero(data.labels == label)
        others[rows] = np.roll(rows, 1)
    untrained = METHODS[MAIN](trained(train, SEEDS[0], epochs=0), data)
    return {
        "random": Finding.of(rng.random(truth.shape), truth),
        "another sequence's motif": Finding.of(maps, truth[others]),
        "untrained network": Finding.of(towards_truth(untrained, data), truth),
    }


def _median(
    label: int, data: Sequences, truth: Array, maps: Mapping[str, Array], finding: Finding
) -> Example:
    """The sequence of a class that the main method does middling on."""
    rows = np.flatnonzero(data.labels == label)
    row = rows[np.argsort(finding.auroc[rows])[len(rows) // 2]]
    shown = {name: maps[name][row] for name in (PLAIN, MAIN)}
    return Example(label, data.letters[row], truth[row], shown)


# -- pictures --------------------------------------------------------------------------------------

COLOURS = {"A": "#009e73", "C": "#0072b2", "G": "#e69f00", "T": "#d55e00"}
WINDOW = 80


def draw_examples(examples: Sequence[Example], path: Path) -> None:
    """Letters as high as their attribution, the motif shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.0 * 2 * len(examples)), dpi=110, layout="constrained")
    axes = figure.subplots(2 * len(examples), 1)
    rows = [(example, name) for example in examples for name in example.maps]
    for axis, (example, name) in zip(axes, rows, strict=True):
        places = np.flatnonzero(example.truth)
        middle = int(places.mean())
        start = min(max(middle - WINDOW // 2, 0), len(example.truth) - WINDOW)
        for place in places:
            axis.axvspan(place - 0.5, place + 0.5, color="#dddddd", linewidth=0)
        for at in range(start, start + WINDOW):
            _letter(axis, LETTERS[example.letters[at]], at, float(example.maps[name][at]))
        part = example.maps[name][start : start + WINDOW]
        margin = 0.1 * (part.max() - part.min())
        axis.set_ylim(min(part.min(), 0) - margin, part.max() + margin)
        axis.set_xlim(start - 0.5, start + WINDOW - 0.5)
        axis.axhline(0, color="black", linewidth=0.5)
        factor = "Oct4" if example.label else "MafK"
        area = auroc(example.maps[name], example.truth)
        axis.set_title(f"{factor}: {name} (AUROC {area:.2f})", fontsize=9, loc="left")
        axis.set_ylabel(f"attribution\nto {factor}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("position in the sequence (shaded: the motif's match)", fontsize=8)
    figure.savefig(path)


def _letter(axis: Any, letter: str, at: int, height: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    glyph = TextPath((0, 0), letter, size=1)
    box = glyph.get_extents()
    place = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
    shape = place.translate(at - 0.45, 0).transform_path(glyph)
    axis.add_patch(PathPatch(shape, color=COLOURS[letter], linewidth=0))


def draw_methods(results: Mapping[str, Any], path: Path) -> None:
    """AUROC and precision of every method and control, with their 95 % intervals."""
    from matplotlib.figure import Figure

    entries = {**results["methods"], **results["controls"]}
    figure = Figure(figsize=(9, 0.6 + 0.3 * len(entries)), dpi=110, layout="constrained")
    titles = {"auroc": "AUROC of motif positions", "precision": "top k in the motif"}
    chance = {"auroc": 0.5, "precision": results["with_motif"]["part_of_positions"]}
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for row, (label, entry) in enumerate(entries.items()):
            colour = "#999999" if label in results["controls"] else "#0072b2"
            middle, low, high = (entry[key][k] for k in ("mean", "low", "high"))
            axis.plot([low, high], [row, row], color=colour, linewidth=2)
            axis.plot(middle, row, "o", color=colour, markersize=5)
        axis.axvline(chance[key], color="black", linewidth=0.7, linestyle=":")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_yticks(range(len(entries)), list(entries))
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where the package is kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = study(arguments.data)
    text = json.dumps(done.results, indent=1, ensure_ascii=False)
    (arguments.out / "genomics.json").write_text(text + "\n", encoding="utf-8")
    draw_methods(done.results, arguments.out / "genomics.png")
    draw_examples(done.examples, arguments.out / "genomics_example.png")


if __name__ == "__main__":
    main()
