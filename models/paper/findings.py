"""The paper's findings (a) to (e), and what it left open on the LSTM, from the panels' results.

A gap is area(LeRF) − area(MoRF): how much further the output falls when what speaks for it goes
first than when what speaks against it does; 0 for a random order. All are in units of the logit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Finding = dict[str, Any]

RELU = ("mnist_mlp_relu", "mnist_cnn_relu", "cifar10_cnn", "inception_v3", "imdb_mlp")
SATURATING = ("sigmoid", "softplus")
ROUNDING = 1e-3
TIE = 1e-3
"""Slopes this close, relatively, are equal."""
UNCONSERVED = "DeepLIFT, product=gradient"
HIGH = 0.9
"""What correlation counts as high."""
START, END = "<!-- findings -->", "<!-- end of findings -->"


def read(folder: Path, names: Iterable[str]) -> dict[str, Result]:
    """The results that are there, by panel."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {n: json.loads(p.read_text("utf8")) for n, p in paths.items() if p.exists()}


# -- what the findings compare ---------------------------------------------------------------------


def area(result: Result, label: str, order: str) -> float:
    return float(result["curves"][label][order]["area"]["mean"])


def gap(result: Result, label: str) -> float:
    return area(result, label, "lerf") - area(result, label, "morf")


def slope(result: Result, label: str) -> float:
    return float(result["curves"][label]["morf"]["slope"]["mean"])


def correlation(result: Result, one: str, other: str) -> float:
    labels = result["agreement"]["labels"]
    return float(result["agreement"]["pearson"][labels.index(one)][labels.index(other)])


def occlusion(result: Result) -> str:
    return next(label for label in result["curves"] if label.startswith("occlusion"))


def signed(result: Result) -> list[str]:
    """The methods that tell for from against."""
    return [label for label in result["curves"] if label not in ("saliency", "random")]


def compared(results: Mapping[str, Result]) -> dict[str, Result]:
    """The paper's panels: without the linear model."""
    return {name: result for name, result in results.items() if name != "mnist_linear"}


# -- the findings ----------------------------------------------------------------------------------


def a_equal(results: Mapping[str, Result]) -> Finding:
    found = {n: results[n]["lrp_against_gradient_x_input"] for n in RELU if n in results}
    exact = max(each["0"] for each in found.values())
    usual = max(each["0.0001"] for each in found.values())
    return {
        "finding": "(a) ε-LRP equals gradient × input on ReLU networks",
        "found": f"largest difference over the largest attribution, {len(found)} networks: "
        f"{exact:.2g} (ε = 0), {usual:.2g} (ε = 1e-4)",
        "holds": exact <= ROUNDING,
        "figures": found,
    }


def a_breaks(results: Mapping[str, Result]) -> Finding:
    figures = {}
    for name, result in results.items():
        if name.startswith("mnist_") and not name.endswith(("relu", "linear")):
            figures[name] = {
                "gap over DeepLIFT's": gap(result, "ε-LRP") / gap(result, "DeepLIFT"),
                "correlation with DeepLIFT": correlation(result, "ε-LRP", "DeepLIFT"),
            }
    broken = {n: f for n, f in figures.items() if n.endswith(SATURATING)}
    sound = {n: f for n, f in figures.items() if n not in broken}
    share = "gap over DeepLIFT's"
    return {
        "finding": "(a) ε-LRP breaks down with Sigmoid and Softplus (f(0) ≠ 0), not with Tanh",
        "found": "its gap over DeepLIFT's: "
        + ", ".join(f"{_short(n)} {f[share]:.2f}" for n, f in figures.items()),
        "holds": all(f[share] < 0.5 for f in broken.values())
        and all(f[share] > 0.5 for f in sound.values()),
        "figures": figures,
    }


def b(results: Mapping[str, Result]) -> Finding:
    pair = ("DeepLIFT", "integrated gradients")
    figures = {name: correlation(result, *pair) for name, result in compared(results).items()}
    others = {n: c for n, c in figures.items() if n != "imdb_lstm"}
    lowest = min(others, key=others.__getitem__)
    plain = correlation(results["imdb_lstm"], UNCONSERVED, "integrated gradients")
    return {
        "finding": "(b) DeepLIFT and integrated gradients correlate highly except on the LSTM",
        "found": f"{others[lowest]:.2f} ({_short(lowest)}) to {max(others.values()):.3f}; LSTM "
        f"{plain:.2f} with product=gradient, {figures['imdb_lstm']:.2f} with conserving products",
        "holds": others[lowest] >= HIGH > plain,
        "figures": {**figures, f"imdb_lstm, {UNCONSERVED}": plain},
    }


def c(results: Mapping[str, Result]) -> Finding:
    figures, steepest = {}, []
    for name, result in compared(results).items():
        removing = occlusion(result)
        if removing != "occlusion-1":
            continue
        rest = {m: slope(result, m) for m in signed(result) if m != removing}
        best = min(rest, key=rest.__getitem__)
        own = slope(result, removing)
        figures[name] = {"occlusion": own, "steepest other": rest[best], "which": best}
        if own <= rest[best] + TIE * abs(own):
            steepest.append(name)
    missed = [_short(n) for n in figures if n not in steepest]
    return {
        "finding": "(c) occlusion-1 has the steepest start (MoRF, the first 1 % of the features)",
        "found": f"on {len(steepest)} of {len(figures)} panels (ties within 0.1 % count)"
        + (f"; not on {', '.join(missed)}" if missed else ""),
        "holds": not missed,
        "figures": figures,
    }


def d_linear(results: Mapping[str, Result]) -> Finding:
    return _coincide(
        results["mnist_linear"], "(d) the signed methods coincide on a linear model", 1
    )


def d_shallow(results: Mapping[str, Result]) -> Finding:
    return _coincide(results["imdb_mlp"], "(d) … and nearly on IMDB MLP", HIGH)


def _coincide(result: Result, text: str, limit: float) -> Finding:
    methods = signed(result)
    pairs = {
        f"{one}, {other}": correlation(result, one, other)
        for i, one in enumerate(methods)
        for other in methods[:i]
    }
    lowest = min(pairs, key=pairs.__getitem__)
    return {
        "finding": text,
        "found": f"smallest correlation of two: {pairs[lowest]:.5g} ({lowest})",
        "holds": pairs[lowest] >= limit - 1e-4,
        "figures": pairs,
    }


def e(results: Mapping[str, Result]) -> Finding:
    """Without signs, what goes last is what matters least, not what speaks against the output.

    ε-LRP is left out where it breaks down, (a).
    """
    figures, missed = {}, []
    for name, result in compared(results).items():
        broken = ("ε-LRP",) if name.endswith(SATURATING) else ()
        methods = [m for m in signed(result) if m not in broken]
        areas = {m: area(result, m, "lerf") for m in ["saliency", *methods]}
        figures[name] = areas
        missed += [f"{m} on {_short(name)}" for m in methods if areas[m] <= areas["saliency"]]
    count = sum(len(areas) - 1 for areas in figures.values())
    return {
        "finding": "(e) signs matter in LeRF: signed methods stay above saliency",
        "found": f"larger area in {count - len(missed)} of {count} cases"
        + (f"; not {', '.join(missed)}" if missed else ""),
        "holds": not missed,
        "figures": figures,
    }


def lstm(results: Mapping[str, Result]) -> Finding:
    result = results["imdb_lstm"]
    figures = {
        label: {
            "gap": gap(result, label),
            "slope": slope(result, label),
            "correlation with integrated gradients": correlation(
                result, label, "integrated gradients"
            ),
            "residual of the sum, mean": result["completeness"][label]["mean"],
            "residual of the sum, largest": result["completeness"][label]["max"],
        }
        for label in ("DeepLIFT", UNCONSERVED, "integrated gradients")
    }
    kept, plain, path = figures.values()
    return {
        "finding": "beyond the paper: on the LSTM, DeepLIFT is as good as integrated gradients "
        "once its products conserve",
        "found": "gap: " + ", ".join(f"{m} {f['gap']:.2f}" for m, f in figures.items()),
        "holds": plain["gap"] < 0.9 * min(kept["gap"], path["gap"])
        and kept["gap"] > 0.95 * path["gap"],
        "figures": figures,
    }


NEEDS: dict[Any, tuple[str, ...]] = {
    a_equal: RELU[:1],
    a_breaks: ("mnist_mlp_sigmoid",),
    b: ("imdb_lstm",),
    c: RELU[:1],
    d_linear: ("mnist_linear",),
    d_shallow: ("imdb_mlp",),
    e: RELU[:1],
    lstm: ("imdb_lstm",),
}


def of(results: Mapping[str, Result]) -> list[Finding]:
    """Every finding whose panels are there."""
    return [find(results) for find, names in NEEDS.items() if all(n in results for n in names)]


def table(found: Iterable[Finding]) -> str:
    lines = ["| The paper | Found here | |", "| --- | --- | --- |"]
    for finding in found:
        verdict = "holds" if finding["holds"] else "**contradicted**"
        lines.append(f"| {finding['finding']} | {finding['found']} | {verdict} |")
    return "\n".join(lines)


def write(results: Mapping[str, Result], path: Path, readme: Path) -> None:
    """findings.json, and the table between the marks of the README."""
    found = of(results)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf8")
    text = readme.read_text("utf8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{table(found)}\n\n{END}{after}", "utf8")


def _short(name: str) -> str:
    return name.replace("mnist_", "").replace("_", " ")
