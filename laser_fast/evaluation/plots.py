"""plots.png of one benchmark: accuracy against k, reliability, and scores by correctness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laser_fast.evaluation.metrics import THRESHOLD
from laser_fast.evaluation.report import Report
from laser_fast.evaluation.samples import SampleRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.45"
# Drawn in this order; the ring of the last leaves a coinciding square in sight.
_RING = {"marker": "o", "markersize": 10, "fillstyle": "none", "markeredgewidth": 1.8}
_RULES = (
    ("best_of", "best of k by score", _ORANGE, {"marker": "D", "markersize": 5}),
    ("majority", "majority", _BLUE, {"marker": "s", "markersize": 5}),
    ("weighted_majority", "score-weighted majority", _GREEN, _RING),
)
_NUM_BINS = 30


def draw_plots(name: str, records: Sequence[SampleRecord], report: Report, path: Path) -> None:
    """Draw what the report has: the first panel always, the others where there are scores."""
    # Drawing takes a second to import; nobody who only imports the evaluation need pay it.
    from matplotlib.figure import Figure

    scored = [r for r in records if r.is_finished and r.reward is not None and r.score is not None]
    num_panels = 3 if scored else 1
    figure = Figure(figsize=(5.6 * num_panels, 4.6), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    title = f"{report['num_prompts']} problems, {report['samples_per_prompt']} completions each"
    figure.suptitle(f"{name}: {title}", fontsize=12, x=0.01, ha="left")
    _draw_votes(panels[0], report)
    if scored:
        _draw_reliability(panels[1], report)
        _draw_scores(panels[2], scored, len(records))
    for axes in panels:
        axes.tick_params(labelsize=9)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8.5, frameon=False)
    figure.savefig(path, format="png", dpi=110)


def _draw_votes(axes: Axes, report: Report) -> None:
    """Accuracy of the three rules against k, with bootstrap bands, between avg@k and pass@k."""
    ks, metrics = report["ks"], report["metrics"]

    def curve(rule: str, part: str = "value") -> np.ndarray:
        found = [metrics.get(f"{rule}@{k}", {}).get(part) for k in ks]
        return np.array(found, np.float64)  # None is nan

    accuracy = metrics.get("accuracy", {}).get("value")
    if accuracy is not None:
        axes.axhline(accuracy, color=_GREY, linewidth=1, linestyle=":", label="one completion")
    axes.plot(ks, curve("pass"), color=_GREY, linewidth=1.2, linestyle="--", label="any of k")
    for rule, label, color, style in _RULES:
        is_plain = rule == "weighted_majority" and not report["uses_scores"]
        if is_plain or np.isnan(curve(rule)).all():
            continue
        axes.fill_between(ks, curve(rule, "low"), curve(rule, "high"), color=color, alpha=0.13)
        axes.plot(ks, curve(rule), color=color, linewidth=1.8, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    _name(axes, "accuracy against k", "completions per problem, k", "share of problems correct")


def _draw_reliability(axes: Axes, report: Report) -> None:
    """Share correct against stated probability, per bin; marker area follows the count."""
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    for reading, metric, label, color in (
        ("raw", "ece", "score", _BLUE),
        ("corrected", "ece_corrected", "after class-prior correction", _ORANGE),
    ):
        bins = report["reliability"][reading]
        x, y, count = (
            np.array([b[key] for b in bins]) for key in ("confidence", "accuracy", "count")
        )
        ece = report["metrics"][metric]["value"]
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.7)
        sizes = 12 + 500 * count / count.sum()
        axes.scatter(x, y, s=sizes, color=color, alpha=0.6, linewidths=0)
        axes.plot([], [], color=color, marker="o", label=f"{label} (ECE {ece:.3f})")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    _name(axes, "reliability", "probability of being correct, as stated", "share correct")


def _draw_scores(axes: Axes, scored: Sequence[SampleRecord], num_records: int) -> None:
    """Scores of finished completions, each class with area 1."""
    scores = np.array([record.score for record in scored])
    correct = np.array([record.is_correct for record in scored])
    # A few far outliers would squeeze everything else into one bin.
    low, high = np.percentile(scores, [0.5, 99.5])
    margin = max(0.05, 0.05 * (high - low))
    edges = np.linspace(min(low - margin, 0.0), max(high + margin, 1.0), _NUM_BINS + 1)
    for is_member, label, color in ((correct, "correct", _GREEN), (~correct, "incorrect", _RED)):
        if is_member.any():
            members = np.clip(scores[is_member], edges[0], edges[-1])
            label = f"{label} ({len(members)})"
            axes.hist(members, bins=edges, density=True, color=color, alpha=0.45, label=label)
    axes.axvline(THRESHOLD, color=_GREY, linewidth=1, linestyle="--", label="threshold")
    left_out = num_records - len(scored)
    suffix = f", {left_out} truncated or ungraded left out" if left_out else ""
    _name(axes, f"self-score by correctness{suffix}", "self-score", "density within the class")


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
