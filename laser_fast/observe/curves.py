"""curves.png: a whole run on one page, drawn from metrics.jsonl and evaluations.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One diagram: metrics of the steps as lines, metrics of the evaluations as points.

    `lines` and `points` map a metric to its label and colour.
    """

    title: str
    lines: Mapping[str, tuple[str, str]]
    points: Mapping[str, tuple[str, str]] | None = None
    limits: tuple[float | None, float | None] = (None, None)
    is_log: bool = False
    guide: float | None = None


PANELS = (
    Panel(
        title="reward",
        lines={"reward/mean": ("training prompts", _BLUE)},
        points={
            "accuracy": ("held out: accuracy", _RED),
            "majority": ("held out: majority vote", _ORANGE),
            "weighted_majority": ("held out: weighted vote", _GREEN),
        },
    ),
    Panel(
        title="score by class",
        lines={
            "score/mean_correct": ("correct", _GREEN),
            "score/mean_incorrect": ("incorrect", _RED),
        },
        guide=0.5,
    ),
    Panel(
        title="self-verification",
        lines={"score/f1": ("F1", _BLUE), "score/auroc": ("AUROC", _ORANGE)},
        points={"f1": ("held out: F1", _BLUE), "auroc": ("held out: AUROC", _ORANGE)},
        limits=(-0.03, 1.03),
        guide=0.5,
    ),
    Panel(
        title="gradient norm",
        lines={
            "step/grad_norm": ("all parameters", _BLUE),
            "loss/grad_norm": ("policy term", _GREEN),
            "score/grad_norm": ("score term", _ORANGE),
        },
        is_log=True,
    ),
    Panel(
        title="disagreement of sampler and policy (nats)",
        lines={"rollout/disagreement": ("mean |difference| of log-probs", _BLUE)},
        is_log=True,
    ),
    Panel(
        title="completion length (tokens)",
        lines={"rollout/mean_length": ("mean", _BLUE)},
        points={"mean_length": ("held out", _RED)},
        limits=(0.0, None),
    ),
    Panel(
        title="loss",
        lines={"loss/policy": ("policy", _BLUE), "loss/score": ("score", _ORANGE)},
    ),
    Panel(
        title="shares",
        lines={
            "advantage/zero_std_groups": ("groups without reward spread", _BLUE),
            "rollout/truncated": ("truncated completions", _RED),
            "loss/clip_frac": ("clipped tokens", _ORANGE),
        },
        limits=(-0.03, 1.03),
    ),
    Panel(
        title="tokens per second",
        lines={"throughput/tokens_per_s": ("trained", _BLUE)},
        limits=(0.0, None),
    ),
)


def draw_curves(
    steps: Sequence[Mapping[str, Any]],
    evaluations: Mapping[int, Mapping[str, Any]],
    path: Path,
) -> None:
    """Draw the panels that have data, three in a row.

    Args:
        steps: records of metrics.jsonl, each with its `step`.
        evaluations: reports by the number of updates before them.
        path: the PNG to write.
    """
    # Drawing takes a second to import; a run without curves need not pay it.
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if _has_data(panel, steps)]
    num_rows = max(1, math.ceil(len(panels) / 3))
    figure = Figure(figsize=(15, 3.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, 3, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        _draw_panel(axes, panel, steps, evaluations)
    figure.savefig(path, format="png", dpi=110)


def smooth(values: ArrayLike, half_width: int) -> NDArray[np.float64]:
    """Centred moving average over 2 half_width + 1 values, over fewer near the ends."""
    values = np.asarray(values, np.float64)
    window = np.ones(min(2 * half_width + 1, 2 * len(values) - 1))
    sums, counts = (np.convolve(x, window, mode="full") for x in (values, np.ones_like(values)))
    middle = slice(len(window) // 2, len(window) // 2 + len(values))
    return sums[middle] / counts[middle]


def _draw_panel(
    axes: Axes,
    panel: Panel,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Mapping[int, Mapping[str, Any]],
) -> None:
    from matplotlib.ticker import LogFormatter

    if panel.guide is not None:
        axes.axhline(panel.guide, color="0.6", linewidth=0.8, linestyle="--")
    for key, (label, color) in panel.lines.items():
        known = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
        if panel.is_log:
            known = [(step, value) for step, value in known if value > 0]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        # A window of a twentieth of the run: noise goes, trends stay.
        dot = "." if len(y) == 1 else None
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(x, smooth(y, len(y) // 40), color=color, linewidth=1.8, label=label, marker=dot)
    for marker, (key, (label, color)) in zip("osD", (panel.points or {}).items(), strict=False):
        known = [(s, r[key]) for s, r in sorted(evaluations.items()) if r.get(key) is not None]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, marker, color=color, markersize=7, fillstyle="none", label=label)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.is_log:
        axes.set_yscale("log")
        # Plain numbers, and between the powers of ten only where the panel spans few of them.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.tick_params(which="minor", labelsize=8)
    axes.set_ylim(*panel.limits)
    axes.legend(fontsize=8, frameon=False)


def _has_data(panel: Panel, steps: Sequence[Mapping[str, Any]]) -> bool:
    return any(line.get(key) is not None for line in steps for key in panel.lines)
