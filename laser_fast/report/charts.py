"""Diagrams of a run and of an evaluation: in curves.png, and as inline SVG in the report.

Every `draw_...` returns what it drew, for the legend and for the script of the report. In a
comparison run A is drawn solid, run B dashed and hollow.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laser_fast.log.metrics import BLUE, COLORS, GREEN, GREY, ORANGE, PANELS, RED, STAGES, Panel
from laser_fast.log.run_folder import Record, Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEXT, _GRID, _FRAME = "#656d76", "#eceff2", "#d8dee4"
# The report's style sheet knows the colours by these names, for light and for dark.
_STYLE_NAMES = {color: f"c{i}" for i, color in enumerate(COLORS)}
_STYLE_NAMES |= {_TEXT: "soft", _GRID: "grid", _FRAME: "line"}
# More points than pixels only make the file large.
MAX_POINTS = 400
MAX_AREAS = 120
_NUM_BINS = 30
# The voting rules of an evaluation: name in its report, label, colour.
RULES = (
    ("pass", "any of k", GREY),
    ("best_of", "best of k by score", ORANGE),
    ("majority", "majority of k", BLUE),
    ("weighted_majority", "score-weighted majority of k", GREEN),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One metric of one run, as (x, value); `run` is 0 or 1."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "marks", "area"] = "line"
    run: int = 0


# Title, a `draw_...` and what it takes after the axes.
Diagram = tuple[str, Callable[..., Sequence[Curve]], *tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A diagram for the report; `data` is what its script shows where the pointer is."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str, str]]  # label, kind, name of the colour
    data: dict[str, Any]


def draw_curves(run: Run, path: Path) -> None:
    """Draw the panels that have data into a PNG, four in a row."""
    found = [(panel, panel_curves(panel, [run])) for panel in PANELS]
    save_png(path, [(p.title, draw_panel, p, curves) for p, curves in found if curves], columns=4)


def save_png(path: Path, diagrams: Sequence[Diagram], *, columns: int) -> None:
    """Draw diagrams into a PNG, row by row."""
    # Drawing takes a second to import; a run without curves need not pay it.
    from matplotlib.figure import Figure as Canvas

    rows = max(1, math.ceil(len(diagrams) / columns))
    canvas = Canvas(figsize=(4.75 * columns, 3.6 * rows))
    grid = canvas.subplots(rows, columns, squeeze=False).flatten()
    # Fixed margins: matplotlib's layouts take longer than all the rest.
    left, bottom, top = 0.14 / columns, 0.14 / rows, 1 - 0.1 / rows
    canvas.subplots_adjust(left, bottom, 1 - 0.04 / columns, top, wspace=0.17, hspace=0.32)
    for axes in grid[len(diagrams) :]:
        axes.set_axis_off()
    for axes, (title, draw, *data) in zip(grid, diagrams, strict=False):
        if draw(axes, *data):
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(title, fontsize=11, loc="left")
    canvas.savefig(path, format="png", dpi=100)


def svg_figure(title: str, draw: Callable[..., Sequence[Curve]], *data: Any) -> Figure:
    """What `draw(axes, *data)` draws; colours become variables of the page's style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    # Text as text; ids that depend on the content alone, and differ between the figures of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11}):
        canvas = Canvas(figsize=(6.1, 3.3), dpi=72)  # a unit of the SVG is 1/72 inch
        axes = canvas.add_axes((0.115, 0.18, 0.865, 0.79))
        curves = draw(axes, *data)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r"\n *", " ", svg)
    for color, name in _STYLE_NAMES.items():
        svg = svg.replace(color, f"var(--{name})")
    is_comparison = any(curve.run for curve in curves)
    series = [
        {
            "label": f"{'AB'[curve.run]}: {curve.label}" if is_comparison else curve.label,
            "color": _STYLE_NAMES[curve.color],
            "points": _positions(axes, curve),
        }
        for curve in curves
    ]
    # Runs share colours, so a metric is named once.
    keys = dict.fromkeys((curve.label, curve.kind, _STYLE_NAMES[curve.color]) for curve in curves)
    left, bottom, right, top = axes.bbox.extents
    box = [left, canvas.bbox.height - top, right, canvas.bbox.height - bottom]
    found = {"box": np.round(box, 1).tolist(), "series": series}
    return Figure(title=title, svg=svg, legend=list(keys), data=found)


def panel_curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """The metrics of a panel that the runs have."""
    curves = []
    for index, run in enumerate(runs):
        for kind, prefix, metrics, records in (
            ("line", "", panel.lines, run.steps),
            ("marks", "held out: ", panel.marks, run.evaluations),
        ):
            for key, (label, color) in metrics.items():
                known = [(record["step"], number(record.get(key))) for record in records]
                points = [(step, value) for step, value in known if value is not None]
                if panel.is_log:
                    points = [(step, value) for step, value in points if value > 0]
                if points:
                    names = {"label": prefix + label, "color": color, "kind": kind, "run": index}
                    curves.append(Curve(points=points, **names))
    return curves


def stage_curves(run: Run) -> list[Curve]:
    """Seconds of the stages with at least a hundredth of the time, largest first, and the rest."""
    names = dict.fromkeys(key for record in run.steps for key in record if key.startswith("time/"))
    seconds = {
        name.removeprefix("time/"): np.array([number(step.get(name)) or 0.0 for step in run.steps])
        for name in names
    }
    total = sum(values.sum() for values in seconds.values())
    if total == 0:
        return []
    large = {name: values for name, values in seconds.items() if values.sum() >= 0.01 * total}
    layers = dict(sorted(large.items(), key=lambda item: -item[1].sum()))
    if len(large) < len(seconds):
        layers["other"] = sum(values for name, values in seconds.items() if name not in large)
    # Means over neighbouring steps where there are many.
    parts = np.array_split(np.arange(len(run.steps)), min(len(run.steps), MAX_AREAS))
    steps = [np.mean([run.steps[i]["step"] for i in part]) for part in parts]
    return [
        Curve(
            label=f"{name} {values.mean():.3g} s, {values.sum() / total:.0%}",
            color=STAGES.get(name, GREY),
            points=[(step, values[part].mean()) for step, part in zip(steps, parts, strict=True)],
            kind="area",
        )
        for name, values in layers.items()
    ]


def draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> Sequence[Curve]:
    """Lines, smoothed over the faint raw values if those are of one run, and marks."""
    if panel.guide is not None:
        axes.axhline(panel.guide, color=_TEXT, linewidth=0.8, linestyle=":")
    is_comparison = any(curve.run for curve in curves)
    for curve in curves:
        x, y = np.array(curve.points, np.float64).T
        if curve.kind == "marks" or len(x) == 1:
            fill = "none" if curve.run else "full"
            axes.plot(x, y, "o", color=curve.color, fillstyle=fill, label=curve.label)
            continue
        if not is_comparison:
            axes.plot(*_thinned(x, y), color=curve.color, linewidth=0.8, alpha=0.35)
        # A window of a twentieth of the run: noise goes, trends stay.
        line = _thinned(x, smooth(y, len(y) // 40))
        dashes = (0, (4, 2.5)) if curve.run else "-"
        axes.plot(*line, color=curve.color, linewidth=1.8, linestyle=dashes, label=curve.label)
    if panel.is_log:
        _scale_log(axes, curves)
    _style(axes, "step")
    low, high = panel.limits
    if low == 0 and high is None:
        high = 1.06 * max(value for curve in curves for _, value in curve.points) or 1.0
    axes.set_ylim(low, high)
    return curves


def draw_stages(axes: Axes, curves: Sequence[Curve], top: float) -> Sequence[Curve]:
    """The stages of `stage_curves` on top of each other; the axis ends a little above `top`."""
    values = [[value for _, value in curve.points] for curve in curves]
    colors = [curve.color for curve in curves]
    axes.stackplot([step for step, _ in curves[0].points], values, colors=colors, linewidth=0)
    axes.margins(x=0)
    _style(axes, "step")
    axes.set_ylim(0, 1.04 * top)
    return curves


def evaluation_diagrams(
    report: Record,
    samples: Sequence[Record],
    limits: tuple[float | None, float | None] = (None, None),
) -> list[Diagram]:
    """What a benchmark's report and samples can be drawn as; `limits` are of the votes."""
    diagrams: list[Diagram] = [
        ("share of problems answered correctly", draw_votes, report, limits),
    ]
    if report["reliability"]:
        title = "reliability: share correct by stated probability"
        diagrams.append((title, draw_reliability, report))
        if samples:
            title = "score by correctness, density within the class"
            diagrams.append((title, draw_scores, samples))
    return diagrams


def draw_votes(
    axes: Axes, report: Record, limits: tuple[float | None, float | None]
) -> Sequence[Curve]:
    """Accuracy of the voting rules against k, with their intervals as bands."""
    curves = []
    for rule, label, color in RULES:
        entries = [(k, report["metrics"].get(f"{rule}@{k}", {})) for k in report["ks"]]
        known = [(k, entry) for k, entry in entries if number(entry.get("value")) is not None]
        # Scores that do not vote yet leave the weighted rule equal to the plain one.
        if not known or (rule == "weighted_majority" and not report["uses_scores"]):
            continue
        ks = [k for k, _ in known]
        low, value, high = (
            np.array([entry[part] for _, entry in known], np.float64)
            for part in ("low", "value", "high")
        )
        axes.fill_between(ks, low, high, color=color, alpha=0.14, linewidth=0)
        axes.plot(ks, value, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        points = list(zip(ks, value.tolist(), strict=True))
        curves.append(Curve(label=label, color=color, points=points))
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    _style(axes, "completions per problem, k")
    axes.set_xticks(report["ks"], [str(k) for k in report["ks"]])
    axes.set_ylim(*limits)
    return curves


def draw_reliability(axes: Axes, report: Record) -> Sequence[Curve]:
    """Share correct against stated probability, per bin; the area of a mark is its share."""
    axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=0.8, linestyle=":")
    curves = []
    for reading, metric, label, color in (
        ("raw", "ece", "score", BLUE),
        ("corrected", "ece_corrected", "after class-prior correction", ORANGE),
    ):
        bins = report["reliability"].get(reading, [])
        x, y, count = (
            np.array([b[key] for b in bins]) for key in ("confidence", "accuracy", "count")
        )
        ece = number(report["metrics"][metric]["value"])
        label = f"{label}, ECE {'-' if ece is None else format(ece, '.3f')}"
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.7, label=label)
        axes.scatter(x, y, s=12 + 500 * count / count.sum(), color=color, alpha=0.6, linewidths=0)
        curves.append(Curve(label=label, color=color, points=list(zip(x, y, strict=True))))
    _style(axes, "probability of being correct, as stated")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return curves


def draw_scores(axes: Axes, samples: Sequence[Record]) -> Sequence[Curve]:
    """Scores of finished, graded completions, each class with area 1."""
    known = [
        (number(sample["score"]), sample["reward"] > 0.5)
        for sample in samples
        if sample["finish_reason"] == "stop"
        and number(sample["score"]) is not None
        and number(sample["reward"]) is not None
    ]
    scores, correct = np.array([s for s, _ in known]), np.array([c for _, c in known], bool)
    # A few far outliers would squeeze everything else into one bin.
    low, high = np.percentile(scores, [0.5, 99.5]) if known else (0.0, 1.0)
    edges = np.linspace(min(low - 0.05, 0.0), max(high + 0.05, 1.0), _NUM_BINS + 1)
    curves = []
    for is_member, name, color in ((correct, "correct", GREEN), (~correct, "incorrect", RED)):
        members = np.clip(scores[is_member], edges[0], edges[-1])
        if not len(members):
            continue
        heights, _ = np.histogram(members, edges, density=True)
        points = list(zip((edges[:-1] + edges[1:]) / 2, heights, strict=True))
        label = f"{name} ({len(members)})"
        axes.stairs(heights, edges, fill=True, color=color, alpha=0.45, label=label)
        curves.append(Curve(label=label, color=color, points=points, kind="area"))
    axes.axvline(0.5, color=_TEXT, linewidth=0.8, linestyle=":")
    _style(axes, "score")
    axes.set_ylim(bottom=0)
    return curves


def smooth(values: ArrayLike, half_width: int) -> NDArray[np.float64]:
    """Centred moving average over 2 half_width + 1 values, over fewer near the ends."""
    values = np.asarray(values, np.float64)
    window = np.ones(min(2 * half_width + 1, 2 * len(values) - 1))
    sums, counts = (np.convolve(x, window, mode="full") for x in (values, np.ones_like(values)))
    middle = slice(len(window) // 2, len(window) // 2 + len(values))
    return sums[middle] / counts[middle]


def _style(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FRAME)
    axes.set_xlabel(label, color=_TEXT)
    if label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(_tick)
    axes.tick_params(which="both", length=0, colors=_TEXT)
    axes.tick_params(axis="x", pad=8)  # clear of the lowest label of the y axis


def _scale_log(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis for values of several decades; fewer read better on a linear one."""
    values = [value for curve in curves for _, value in curve.points]
    if max(values) < 10 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(_tick if max(values) < 1000 * min(values) else "")
    axes.yaxis.get_minor_locator().set_params(subs=(2, 5))


def _tick(value: float, _: object = None) -> str:
    """`0.25`, `12000`, `3e-7`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `MAX_POINTS` of them, evenly spread, first and last included."""
    kept = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int)
    return x[kept], y[kept]


def _positions(axes: Axes, curve: Curve) -> list[list[float]]:
    """Where the points lie across the SVG, and what they are."""
    x, y = _thinned(*np.array(curve.points, np.float64).T)
    across = axes.transData.transform(np.stack([x, y], axis=1))[:, 0]
    return [
        [round(at, 1), float(f"{step:.6g}"), float(f"{value:.4g}")]
        for at, step, value in zip(across.tolist(), x, y, strict=True)
    ]
