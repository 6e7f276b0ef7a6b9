"""An evaluation as one HTML page that needs nothing else: no network, no font, no library.

Every text that comes from files or the user is escaped. Charts are SVG (charts.py), maps PNG
(pictures.py); ``data/report.css`` and ``data/report.js`` are put into the page, which reads the
same without the script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import PurePath
from typing import Any

from onnx_attrib.evaluation import exhibits, tables
from onnx_attrib.evaluation.charts import Line, line_chart, number, swatch
from onnx_attrib.evaluation.exhibits import Exhibit
from onnx_attrib.evaluation.tables import Column, stat

Results = Mapping[str, Any]

_UNITS = {"pixels": "pixels", "positions": "positions", "columns": "columns"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_CURVES = {
    "morf": (
        "Most relevant first",
        "A good method finds at once what the score rests on: the curve falls early and deep.",
    ),
    "lerf": (
        "Least relevant first",
        "A good method begins with what speaks against the score: the curve rises and stays high.",
    ),
}
_MEANINGS = {
    "completeness": "<b>Completeness</b>: how far the attributions of a sample are from summing to "
    "S(x) − S(x̄), relative to it{promised}.",
    "infidelity": "<b>Infidelity</b>: the mean squared difference between the summed attributions "
    "of random subsets, on their best scale, and the change of the explained score when these are "
    "removed.",
    "max_sensitivity": "<b>Max-sensitivity</b>: how much attributions change, at most, for inputs "
    "close by.",
    "seconds": "<b>Time</b>: of the compiled graph in ONNX Runtime, the forward pass included.",
}


def render(results: Results, gallery: Sequence[Exhibit] = ()) -> str:
    """The page. ``gallery``: what is shown of the samples in ``results["gallery"]``, in order."""
    page = _Page(results)
    sections = [
        page.header(),
        page.ranking(),
        page.curves(),
        page.sensitivity(),
        page.fidelity(),
        page.agreement(),
        page.sanity(),
        exhibits.section(results, gallery, page.styles),
        page.details(),
    ]
    data = resources.files("onnx_attrib") / "data"
    title = f"Attribution methods for {page.model}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{(data / 'report.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + f"\n<script>\n{(data / 'report.js').read_text(encoding='utf-8')}</script>\n"
        "</body>\n</html>\n"
    )


@dataclass
class _Page:
    results: Results
    styles: dict[str, int] = field(init=False)
    """Looks of each method, everywhere on the page."""

    def __post_init__(self) -> None:
        self.methods: Mapping[str, Any] = self.results["methods"]
        ranked = [row["label"] for row in self.results.get("ranking") or []]
        self.order = [label for label in ranked if label in self.methods]
        self.order += [label for label in self.methods if label not in self.order]
        self.styles = {label: place for place, label in enumerate(self.methods)}
        self.settings: Mapping[str, Any] = self.results["settings"]
        self.model = PurePath(str(self.results["model"].get("file") or "the model")).name
        self.output = str(self.results["model"].get("output"))
        self.unit = _UNITS.get(str(self.settings.get("features")), "features")

    # -- header --------------------------------------------------------------------------------

    def header(self) -> str:
        """What was evaluated, and what came out first."""
        model, data, settings = self.results["model"], self.results["data"], self.settings
        shape = "" if model.get("shape") is None else f" {_shape(model['shape'])}"
        files = ", ".join(PurePath(str(f)).name for f in data.get("files") or []) or "arrays"
        facts = [
            ("Model", self.model),
            ("Explained", self.output + self._target()),
            ("Attributed to", f"{model.get('input')}{shape}"),
            ("Data", f"{files}: {data.get('samples')} samples{_accuracy(data)}"),
            ("Features", f"{settings.get('count')} {self.unit}{_steps(settings)}"),
            ("Removed means", f"set to the baseline, {_baseline(settings.get('baseline'))}"),
        ]
        listed = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts
        )
        return (
            f"<header>\n<h1>Which method explains <span>{escape(self.model)}</span>?</h1>\n"
            f"{self._verdict()}<dl>{listed}</dl>\n</header>"
        )

    def _target(self) -> str:
        """The class that is explained; nothing where the output has one value a sample."""
        shown = self.results.get("gallery") or []
        if shown and all(about.get("target") is None for about in shown):
            return ""
        return f", {_target(self.settings.get('target'))}"

    def _verdict(self) -> str:
        gaps = [(row["label"], stat(row.get(self._measure()))) for row in self._rows()]
        known = [(label, *found) for label, found in gaps if found is not None]
        if not known:
            return ""
        first, mean, low, high = known[0]
        text = (
            f"By the {escape(self._measure())} between its two perturbation curves, "
            f"<strong>{escape(first)}</strong> explains this model best: "
            f"{number(mean, full=True)} ({_band(low, high)})."
        )
        close = [label for label, _, below, above in known[1:] if above >= low and below <= high]
        if close:
            text += (
                f" Its band overlaps that of {escape(_listed(close))}: the order among them is "
                "uncertain."
            )
        return f'<p class="verdict">{text}</p>\n'

    # -- ranking -------------------------------------------------------------------------------

    def _measure(self) -> str:
        return str((self.results.get("ranked_by") or {}).get("measure", "gap"))

    def _rows(self) -> list[Mapping[str, Any]]:
        rows = {row["label"]: row for row in self.results.get("ranking") or []}
        return [rows[label] for label in self.order if label in rows]

    def ranking(self) -> str:
        """Methods in order, with the measures of the curves."""
        rows = self._rows()
        if not rows:
            return ""
        control = (self.results.get("control") or {}).get("random")
        every = [*rows, *([{**_of_curves(control), "label": "random"}] if control else [])]
        columns = [
            Column("gap", "Gap", "LeRF − MoRF", "max", drawn=True),
            Column("morf", "MoRF area", "most relevant first", "min"),
            Column("lerf", "LeRF area", "least relevant first", "max"),
            Column("slope", "First slope", f"a {self.unit[:-1]}, MoRF", "min"),
            Column("sensitivity", "Sensitivity-n", "mean correlation", "max", places=2),
        ]
        why = str((self.results.get("ranked_by") or {}).get("why", "")).rstrip(".")
        if not why.startswith(self._measure()):
            why = ": ".join(filter(None, (self._measure(), why)))
        legend = (
            f"<p>Ranked by the {escape(why)}.</p>\n"
            '<p class="note">The gap is the area between a method\'s two curves below; areas are '
            "mean changes of the explained score over the course of the removal, and so have its "
            "unit. Bands in brackets hold the mean over samples with 95 % confidence. The best of "
            "each column is bold.</p>\n"
        )
        body = tables.table("Ranking of the methods", columns, every, self.styles, ranked=True)
        return f'<section id="ranking">\n<h2>Ranking</h2>\n{legend}{body}\n</section>'

    # -- charts --------------------------------------------------------------------------------

    def curves(self) -> str:
        """The score against how many features are removed."""
        figures = [self._curve(kind) for kind in _CURVES]
        if not any(figures):
            return ""
        return (
            '<section id="curves">\n<h2>Perturbation curves</h2>\n'
            f"<p>How the explained score changes when {self.unit} are removed in the order of "
            "their signed attribution. Bands: 95 % confidence of the mean over samples. The dashed "
            f'gray line removes in random order.</p>\n<div class="pair">{"".join(figures)}</div>\n'
            "</section>"
        )

    def _curve(self, kind: str) -> str:
        lines, values = [], []
        for label, style, source in self._sources():
            curve = (source.get("curves") or {}).get(kind)
            if curve:
                low, high = curve.get("low") or (), curve.get("high") or ()
                lines.append(Line(label, style, curve["removed"], curve["mean"], low, high))
                values.append(stat(curve.get("area")))
        heading, reading = _CURVES[kind]
        chart = line_chart(
            lines,
            name=kind,
            title=f"{heading}: change of {self.output} against {self.unit} removed",
            x_label=f"{self.unit} removed",
            y_label=f"change of {self.output}",
            limits=(0.0, 0.0),
        )
        shown = [
            (line, f"area {number(found[0], full=True)}" if found else "")
            for line, found in zip(lines, values, strict=True)
        ]
        up = sorted(
            zip(shown, values, strict=True),
            key=lambda pair: -pair[1][0] if pair[1] else math.inf,
        )
        return _figure(heading, reading, chart, [one for one, _ in up], lines) if lines else ""

    def sensitivity(self) -> str:
        """How well summed attributions tell the change of the score."""
        lines, means = [], []
        for label, style, source in self._sources():
            found = source.get("sensitivity")
            if found and any(v is not None for v in found["correlation"]):
                low, high = found.get("low") or (), found.get("high") or ()
                lines.append(Line(label, style, found["n"], found["correlation"], low, high))
                known = [v for v in found["correlation"] if v is not None]
                means.append(sum(known) / len(known))
        if not lines:
            return ""
        chart = line_chart(
            lines,
            name="sensitivity",
            title="Sensitivity-n: correlation against the size of the subset",
            x_label=f"n: {self.unit} in a subset",
            y_label="correlation",
            log_x=max(max(line.x) for line in lines) > 20,
            limits=(0.0, 1.0),
        )
        shown = sorted(zip(lines, means, strict=True), key=lambda pair: -pair[1])
        legend = [(line, f"mean {tables.decimal(mean)}") for line, mean in shown]
        figure = _figure("", "", chart, legend, lines)
        return (
            '<section id="sensitivity">\n<h2>Sensitivity-n</h2>\n'
            f"<p>Correlation of the summed attributions of n random {self.unit} with the change of "
            f"the explained score when they are removed: 1 if attributions tell exactly what "
            f'removing does, 0 if they tell nothing.</p>\n<div class="single">{figure}</div>\n'
            "</section>"
        )

    def sanity(self) -> str:
        """How alike the maps stay when layers are randomised."""
        found = {
            label: part
            for label in self.methods
            if (part := self.methods[label].get("sanity")) and part.get("layers")
        }
        if not found:
            return ""
        figures = []
        for key, heading in (("rank", "Rank correlation"), ("pearson", "Pearson's correlation")):
            lines = [
                Line(label, self.styles[label], list(range(len(part[key]))), part[key])
                for label, part in found.items()
                if part.get(key)
            ]
            if not lines:
                continue
            layers = next(iter(found.values()))["layers"]
            chart = line_chart(
                lines,
                name=f"sanity-{key}",
                title=f"{heading} with the map of the trained model",
                x_label="randomised down to this layer",
                y_label="correlation",
                steps=[str(layer) for layer in layers],
                limits=(0.0, 1.0),
            )
            shown = sorted(lines, key=lambda line: -(_last(line.y) or 0))
            legend = [(line, f"all layers {number(_last(line.y), 2)}") for line in shown]
            figures.append(_figure(heading, "", chart, legend, lines))
        return (
            '<section id="sanity">\n<h2>Randomisation check</h2>\n'
            "<p>Weights are replaced by random ones, layer after layer from the output down. What "
            "explains the model must change with it: a correlation that stays high belongs to a "
            "method that looks at the input rather than at the model.</p>\n"
            f'<div class="pair">{"".join(figures)}</div>\n</section>'
        )

    def _sources(self) -> list[tuple[str, int | None, Mapping[str, Any]]]:
        """Label, looks and results of each method, and of the control."""
        control = self.results.get("control") or {}
        found: list[tuple[str, int | None, Mapping[str, Any]]] = [
            (label, self.styles[label], part) for label, part in self.methods.items()
        ]
        return [*found, *((name, None, part) for name, part in control.items())]

    # -- tables --------------------------------------------------------------------------------

    def fidelity(self) -> str:
        """Completeness, infidelity, max-sensitivity and time."""
        columns = [
            Column("completeness", "Completeness", "residual, median", "min"),
            Column("worst", "Largest residual", "of all samples", "min"),
            Column("infidelity", "Infidelity", "mean squared error", "min"),
            Column("max_sensitivity", "Max-sensitivity", "relative change", "min"),
            Column("seconds", "Time", "milliseconds a sample", "min"),
        ]
        rows = [{"label": label, **_fidelity(self.methods[label])} for label in self.order]
        columns = [c for c in columns if any(stat(row.get(c.key)) for row in rows)]
        if not columns:
            return ""
        names = [
            label
            for label in self.order
            if (self.methods[label].get("completeness") or {}).get("promised")
        ]
        promised = f" (promised by {escape(', '.join(names))})" if names else ""
        shown = {column.key for column in columns}
        note = " ".join(text for key, text in _MEANINGS.items() if key in shown)
        note = f'<p class="note">{note.format(promised=promised)} Less is better.</p>\n'
        body = tables.table("Faithfulness, stability and time", columns, rows, self.styles)
        return (
            '<section id="fidelity">\n<h2>Faithfulness, stability and time</h2>\n'
            f"{note}{body}\n</section>"
        )

    def agreement(self) -> str:
        """How alike the methods are."""
        found = self.results.get("agreement") or {}
        labels = [str(label) for label in found.get("labels") or []]
        parts = [
            tables.matrix(heading, labels, found[key])
            for key, heading in (("pearson", "Pearson's correlation"), ("rank", "Rank correlation"))
            if labels and found.get(key)
        ]
        if not parts:
            return ""
        return (
            '<section id="agreement">\n<h2>Agreement between the methods</h2>\n'
            "<p>Correlation of two methods' attributions of a sample, averaged over samples.</p>\n"
            f'<div class="row">{"".join(parts)}</div>\n</section>'
        )

    def details(self) -> str:
        """All settings, and the options of each method."""
        rows = [(name, _plain(value)) for name, value in self.settings.items()]
        rows += [
            (label, " ".join([str(part.get("method")), _options(part.get("options") or {})]))
            for label, part in self.methods.items()
        ]
        rows.append(("model's SHA-256", str(self.results["model"].get("sha256"))))
        listed = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
            for name, text in rows
        )
        made = (
            f"Made by onnx-attrib {self.results.get('version', '')} with ONNX Runtime "
            f"{self.results.get('onnxruntime', '')}."
        )
        return (
            f"<footer>\n<details>\n<summary>All settings</summary>\n"
            f'<div class="scroll"><table class="plain"><tbody>{listed}</tbody></table></div>\n'
            f"</details>\n<p>{escape(made)}</p>\n</footer>"
        )


# -- parts -----------------------------------------------------------------------------------------


def _figure(
    heading: str,
    reading: str,
    chart: str,
    legend: Sequence[tuple[Line, str]],
    lines: Sequence[Line],
) -> str:
    """A chart with its legend; the script puts readings in the place of the legend's values."""
    places = {id(line): place for place, line in enumerate(lines)}
    items = "".join(
        f'<li data-line="{places[id(line)]}">{swatch(line.style)}<span>{escape(line.label)}</span>'
        f"<output>{escape(value)}</output></li>"
        for line, value in legend
    )
    head = f"<h3>{escape(heading)}</h3>" if heading else ""
    text = f"<p>{escape(reading)}</p>" if reading else ""
    return (
        f'<figure class="plot">{head}{text}{chart}'
        f'<figcaption><ul class="legend">{items}</ul><p class="at" aria-live="off"></p>'
        "</figcaption></figure>"
    )


def _of_curves(part: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of a control's curves, as a row of the ranking has them."""
    curves = part.get("curves") or {}
    morf, lerf = curves.get("morf") or {}, curves.get("lerf") or {}
    known = [v for v in (part.get("sensitivity") or {}).get("correlation") or [] if v is not None]
    above, below = stat(lerf.get("area")), stat(morf.get("area"))
    return {
        "gap": above[0] - below[0] if above and below else None,
        "morf": morf.get("area"),
        "lerf": lerf.get("area"),
        "slope": morf.get("slope"),
        "sensitivity": sum(known) / len(known) if known else None,
    }


def _fidelity(part: Mapping[str, Any]) -> dict[str, Any]:
    complete = part.get("completeness") or {}
    seconds = part.get("seconds_per_sample")
    return {
        "completeness": complete.get("median"),
        "worst": complete.get("max"),
        "infidelity": part.get("infidelity"),
        "max_sensitivity": part.get("max_sensitivity"),
        "seconds": None if seconds is None else seconds * 1000,
    }


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _band(low: float, high: float) -> str:
    return f"95 % band {number(low, full=True)} to {number(high, full=True)}"


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _target(target: Any) -> str:
    if target in ("predicted", "argmax", None, -1):
        return "the predicted class"
    if target == "label":
        return "the class of the label"
    return f"class {target}" if isinstance(target, int) else f"target {target}"


def _steps(settings: Mapping[str, Any]) -> str:
    """How many features are removed, and how many at a time, where that is not all or one."""
    limit, step = settings.get("limit"), settings.get("step")
    parts = []
    if limit is not None and limit != settings.get("count"):
        parts.append(f", of which {limit} are removed")
    if step is not None and step != 1:
        parts.append(f", {step} at a time")
    return "".join(parts)


def _baseline(baseline: Any) -> str:
    return number(baseline, 4) if isinstance(baseline, int | float) else _plain(baseline)


def _accuracy(data: Mapping[str, Any]) -> str:
    found = data.get("accuracy")
    return "" if found is None else f", of which the model classifies {number(100 * found)} % right"


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in options.items())


def _plain(value: Any) -> str:
    """A setting for people: short, and the same for what JSON cannot hold."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:299]}…"


__all__ = ["Exhibit", "render"]
