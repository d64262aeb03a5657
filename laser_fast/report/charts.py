"""Diagrams of runs and evaluations, as PNG files and as SVG in the page.

A diagram is a title and a function that draws into matplotlib's axes. In a comparison run A is
drawn solid, run B dashed and hollow.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from laser_fast.log import metrics
from laser_fast.log.metrics import METRICS, PANELS, STAGES, VOTES, Panel
from laser_fast.report.runs import Record, Run, number

Diagram = tuple[str, Callable[[Axes], None]]
Limits = tuple[float | None, float | None]
# Label, colour, (step, value), whether marks are drawn and no line, and the place of the run.
Curve = tuple[str, str, list[tuple[float, float]], bool, int]

_SOFT = "#656d76"
# More points than pixels only make the file large.
MAX_POINTS = 400


def svg(diagram: Diagram) -> tuple[str, str]:
    """The title of a diagram and its SVG, an element of a page with its text as text."""
    file = io.StringIO()
    # Ids depend on the content only, and differ between the figures of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": diagram[0]}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure([diagram], columns=1).savefig(file, format="svg", metadata=no_metadata)
    return diagram[0], file.getvalue()[file.getvalue().index("<svg") :]


def figure(diagrams: Sequence[Diagram], *, columns: int) -> Figure:
    """Diagrams in a grid, row by row."""
    rows = max(1, math.ceil(len(diagrams) / columns))
    drawn = Figure(figsize=(4.75 * columns, 3.6 * rows))
    grid = drawn.subplots(rows, columns, squeeze=False).flatten()
    # Fixed margins: matplotlib's layouts take longer than all the rest.
    left, bottom, top = 0.16 / columns, 0.14 / rows, 1 - 0.1 / rows
    drawn.subplots_adjust(left, bottom, 1 - 0.04 / columns, top, wspace=0.2, hspace=0.32)
    for axes in grid[len(diagrams) :]:
        axes.set_axis_off()
    for axes, (title, draw) in zip(grid, diagrams, strict=False):
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, edgecolor="none")
        axes.set_title(title, fontsize=11, loc="left")
    return drawn


def run_diagrams(runs: Sequence[Run]) -> list[Diagram]:
    """The panels that have data, and the time per stage of each run."""
    diagrams: list[Diagram] = [
        (panel.title, partial(draw_panel, panel=panel, curves=curves))
        for panel in PANELS
        if (curves := panel_curves(panel, runs))
    ]
    stages = [stage_times(run) for run in runs]
    # One scale, so that two runs compare.
    top = max((smooth(np.sum([*times.values()], 0)).max() for times in stages if times), default=0)
    for name, run, times in zip("AB", runs, stages, strict=False):
        title = f"seconds per stage ({name})" if len(runs) > 1 else "seconds per stage"
        if times:
            diagrams.append((title, partial(draw_stages, run=run, times=times, top=top)))
    return diagrams


def panel_curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """The metrics of a panel that the runs have: lines of the steps, then marks of evaluations."""
    curves = []
    for index, run in enumerate(runs):
        for is_marks, records in ((False, run.steps), (True, run.evaluations)):
            for metric in (metric for metric in METRICS if metric.panel == panel):
                key = metric.name if is_marks else metric.key
                known = [(record["step"], number(record.get(key))) for record in records]
                points = [(x, y) for x, y in known if y is not None and (y > 0 or not panel.is_log)]
                label = f"held out: {metric.label}" if is_marks else metric.label
                if points:
                    curves.append((label, metric.color, points, is_marks, index))
    return curves


def stage_times(run: Run) -> dict[str, NDArray[np.float64]]:
    """Seconds [S] of the stages with a colour and at least a hundredth of the time, and `other`."""
    times = {name: np.zeros(len(run.steps)) for name in (*STAGES, "other")}
    for index, record in enumerate(run.steps):
        for key in record:
            if key.startswith("time/"):
                name = key.removeprefix("time/")
                times[name if name in STAGES else "other"][index] += number(record[key]) or 0.0
    total = np.sum([*times.values()])
    for name in STAGES:
        if times[name].sum() < 0.01 * total:
            times["other"] += times.pop(name)
    return {name: values for name, values in times.items() if values.any()}


def draw_panel(axes: Axes, *, panel: Panel, curves: Sequence[Curve]) -> None:
    """Lines, smoothed over the faint raw values if those are of one run, and marks."""
    if panel.guide is not None:
        axes.axhline(panel.guide, color=_SOFT, linewidth=0.8, linestyle=":")
    is_comparison = any(run for *_, run in curves)
    for label, color, points, is_marks, run in curves:
        if label in axes.get_legend_handles_labels()[1]:
            label = ""  # runs share a colour and its label
        x, y = np.array(points, np.float64).T
        if is_marks or len(x) == 1:
            fill: Literal["none", "full"] = "none" if run else "full"
            axes.plot(x, y, "o", fillstyle=fill, color=color, label=label)
            continue
        if not is_comparison:
            axes.plot(*_thinned(x, y), color=color, linewidth=0.8, alpha=0.35)
        x, y = _thinned(x, smooth(y))
        dash = (0, (4, 2.5)) if run else "-"
        axes.plot(x, y, color=color, linewidth=1.8, linestyle=dash, label=label)
    low, high = axes.dataLim.intervaly
    if panel.is_log and high >= 10 * low:  # fewer decades read better on a linear axis
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_minor_formatter("{x:g}" if high < 1000 * low else "")
    _style(axes, "step")
    axes.set_ylim(*panel.limits)


def draw_stages(axes: Axes, *, run: Run, times: Mapping[str, NDArray[Any]], top: float) -> None:
    """The stages of `stage_times` on top of each other; the axis ends a little above `top`."""
    steps, total = np.array([record["step"] for record in run.steps]), np.sum([*times.values()])
    labels = [f"{k} {v.mean():.3g} s, {v.sum() / total:.0%}" for k, v in times.items()]
    layers = [_thinned(steps, smooth(values)) for values in times.values()]
    colors = [STAGES.get(name, metrics.GREY) for name in times]
    axes.stackplot(layers[0][0], [y for _, y in layers], colors=colors, labels=labels, linewidth=0)
    axes.margins(x=0)
    _style(axes, "step")
    axes.set_ylim(0, 1.04 * top)


def evaluation_diagrams(
    report: Record, samples: Sequence[Record], limits: Limits = (None, None)
) -> list[Diagram]:
    """What a benchmark's report and samples can be drawn as; `limits` are of the votes."""
    if "reliability" not in report:  # a mean over benchmarks
        return []
    votes = partial(draw_votes, report=report, limits=limits)
    diagrams: list[Diagram] = [("share of problems answered correctly", votes)]
    if report.get("stopping"):
        draw = partial(draw_stopping, report=report)
        diagrams.append(("share right against samples, stopping early", draw))
    if report["reliability"]:
        draw = partial(draw_reliability, report=report)
        diagrams.append(("reliability: share correct by stated probability", draw))
    if report["reliability"] and samples:
        draw = partial(draw_scores, samples=samples)
        diagrams.append(("score by correctness, density within the class", draw))
    return diagrams


def draw_votes(axes: Axes, *, report: Record, limits: Limits) -> None:
    """Accuracy of the voting rules against k, with their intervals as bands."""
    for metric in VOTES:
        entries = {k: report["metrics"].get(f"{metric.name}@{k}", {}) for k in report["ks"]}
        known = {k: entry for k, entry in entries.items() if number(entry.get("value")) is not None}
        # Scores that do not vote yet leave the rules that weight by them equal to the plain one.
        is_idle = metric.name.endswith("_majority") and not report["uses_scores"]
        if not known or is_idle:
            continue
        ks, color, parts = list(known), metric.color, ("low", "value", "high")
        low, value, high = np.array([[e[p] for p in parts] for e in known.values()], np.float64).T
        axes.fill_between(ks, low, high, color=color, alpha=0.14, linewidth=0)
        axes.plot(ks, value, "o-", color=color, linewidth=1.8, markersize=4, label=metric.label)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    _style(axes, "completions per problem, k")
    axes.set_xticks(report["ks"], [str(k) for k in report["ks"]])
    axes.set_ylim(*limits)


def draw_stopping(axes: Axes, *, report: Record) -> None:
    """Accuracy of votes that stop early against the samples that they take."""
    for metric in (metric for metric in METRICS if metric.name.startswith("samples_")):
        if curve := report["stopping"].get(metric.name.removeprefix("samples_")):
            needed = number(report["metrics"][metric.name]["value"])
            label = f"{metric.label}: {'-' if needed is None else format(needed, '.2f')}"
            axes.plot(curve["samples"], curve["accuracy"], ".-", color=metric.color, label=label)
    _style(axes, "mean samples per problem; named: what reaches the vote of all")


def draw_reliability(axes: Axes, *, report: Record) -> None:
    """Share correct against stated probability, per bin; the area of a mark is its share."""
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8, linestyle=":")
    for reading, metric, label, color in (
        ("raw", "ece", "score", metrics.BLUE),
        ("corrected", "ece_corrected", "after class-prior correction", metrics.ORANGE),
    ):
        bins, parts = report["reliability"].get(reading, []), ("confidence", "accuracy", "count")
        x, y, count = np.array([[b[part] for part in parts] for b in bins]).reshape(-1, 3).T
        ece = number(report["metrics"][metric]["value"])
        label = f"{label}, ECE {'-' if ece is None else format(ece, '.3f')}"
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.7, label=label)
        axes.scatter(x, y, s=12 + 500 * count / count.sum(), color=color, alpha=0.6, linewidths=0)
    _style(axes, "probability of being correct, as stated")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def draw_scores(axes: Axes, *, samples: Sequence[Record]) -> None:
    """Scores of finished, graded completions, each class with area 1."""
    finished = [sample for sample in samples if sample["finish_reason"] == "stop"]
    pairs = [(number(sample["score"]), number(sample["reward"])) for sample in finished]
    scores, rewards = np.array([pair for pair in pairs if None not in pair]).reshape(-1, 2).T
    # A few far outliers would squeeze everything else into one bin.
    low, high = np.percentile(scores, [0.5, 99.5]) if len(scores) else (0.0, 1.0)
    edges = np.linspace(min(low - 0.05, 0.0), max(high + 0.05, 1.0), 31)
    for name, color in (("correct", metrics.GREEN), ("incorrect", metrics.RED)):
        members = scores[(rewards > 0.5) == (name == "correct")]
        if len(members):
            heights, _ = np.histogram(members.clip(edges[0], edges[-1]), edges, density=True)
            label = f"{name} ({len(members)})"
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.45, label=label)
    axes.axvline(0.5, color=_SOFT, linewidth=0.8, linestyle=":")
    _style(axes, "score")
    axes.set_ylim(bottom=0)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a twentieth of the values: noise goes, trends stay."""
    window = np.ones(2 * (len(values) // 40) + 1)
    sums, counts = (np.convolve(x, window, "same") for x in (values, np.ones_like(values)))
    return sums / counts


def _thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `MAX_POINTS` of them, evenly spread, first and last included."""
    kept = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int)
    return x[kept], y[kept]


def _style(axes: Axes, label: str) -> None:
    axes.grid(color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d8dee4")
    axes.set_xlabel(label, color=_SOFT)
    if label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(which="both", length=0, colors=_SOFT, labelsize=9)
    axes.tick_params(axis="x", pad=8)  # clear of the lowest label of the y axis
