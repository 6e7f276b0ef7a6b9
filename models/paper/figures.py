"""The pictures: MoRF and LeRF curves of every panel, drawn from the kept results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

Result = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind people tell apart, and a dash pattern for each.
STYLES: dict[str, tuple[str, str]] = {
    "random": ("#999999", "-"),
    "saliency": ("#000000", "--"),
    "gradient × input": ("#E69F00", "-"),
    "ε-LRP": ("#56B4E9", "--"),
    "ε-LRP, ε = 0.01": ("#56B4E9", ":"),
    "DeepLIFT": ("#0072B2", "-"),
    "DeepLIFT, product=gradient": ("#CC79A7", "-."),
    "integrated gradients": ("#009E73", "-."),
    "occlusion-1": ("#D55E00", ":"),
    "occlusion, patches": ("#D55E00", "--"),
}
ORDERS = {"morf": "most relevant first (MoRF)", "lerf": "least relevant first (LeRF)"}
FIGURES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mnist.png": tuple(
        tuple(
            f"mnist_{kind}_{activation}" for activation in ("relu", "tanh", "sigmoid", "softplus")
        )
        for kind in ("mlp", "cnn")
    ),
    "others.png": (("cifar10_cnn", "inception_v3", "imdb_mlp", "imdb_lstm"),),
}
LSTM = (
    "DeepLIFT",
    "DeepLIFT, product=gradient",
    "integrated gradients",
    "occlusion-1",
    "random",
)


def curve(axis: Any, result: Result, order: str, labels: Sequence[str], band: bool = False) -> None:
    """The mean variation of each method; with its 95 % band if asked for."""
    for label in labels:
        points = result["curves"][label][order]
        colour, dash = STYLES[label]
        width = 1.1 if label in ("random", "saliency") else 1.5
        axis.plot(points["removed"], points["mean"], dash, color=colour, lw=width, label=label)
        if band:
            axis.fill_between(
                points["removed"], points["low"], points["high"], color=colour, alpha=0.15, lw=0
            )
    axis.axhline(0, color="#cccccc", lw=0.6, zorder=0)
    axis.margins(x=0)
    axis.tick_params(labelsize=7)
    axis.set_title(result["title"], fontsize=8)
    noun = {"pixels": "pixels", "positions": "words"}[result["settings"]["features"]]
    axis.set_xlabel(f"{noun} removed, {ORDERS[order]}", fontsize=7)


def grid(rows: Sequence[Sequence[str]], results: Mapping[str, Result], path: Path) -> None:
    """For each row of panels a row of MoRF and one of LeRF curves, and one legend below."""
    columns = len(rows[0])
    size = (3.0 * columns, 2.3 * 2 * len(rows) + 0.5)
    figure, axes = plt.subplots(2 * len(rows), columns, figsize=size, squeeze=False, dpi=80)
    handles: dict[str, Any] = {}
    for i, names in enumerate(rows):
        for j, order in enumerate(ORDERS):
            axes[2 * i + j, 0].set_ylabel("change of the logit", fontsize=7)
            for axis, name in zip(axes[2 * i + j], names, strict=True):
                result = results[name]
                labels = [m for m in STYLES if m in result["curves"]]
                curve(axis, result, order, labels)
                handles.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [label for label in STYLES if label in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        ncols=-(-len(labels) // 2),
        fontsize=8,
        loc="lower center",
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.5 / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)
    print("wrote", path)


def lstm(result: Result, path: Path) -> None:
    """The step beyond the paper, with bands."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=80)
    for axis, order in zip(axes, ORDERS, strict=True):
        curve(axis, result, order, [m for m in LSTM if m in result["curves"]], band=True)
    axes[0].set_ylabel("change of the logit", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path)
    plt.close(figure)
    print("wrote", path)


def draw(results: Mapping[str, Result], folder: Path) -> None:
    """Every picture whose panels are all there."""
    for name, rows in FIGURES.items():
        if all(panel in results for row in rows for panel in row):
            grid(rows, results, folder / name)
    if "imdb_lstm" in results:
        lstm(results["imdb_lstm"], folder / "lstm.png")
