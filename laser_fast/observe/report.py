"""report.html: a whole run, or two in comparison, in one file that any browser opens.

Curves, time per stage, evaluations, samples with their scores and the resolved configuration. The
file loads nothing from anywhere; it is drawn anew from the run folder at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from laser_fast.config import ConfigError
from laser_fast.observe import jsonl
from laser_fast.observe.curves import PANELS, Panel
from laser_fast.observe.report_charts import Series, line_chart, stacked_chart
from laser_fast.observe.report_page import page
from laser_fast.observe.report_run import ReportRun, curve, number, read_run
from laser_fast.observe.report_tables import (
    config_section,
    evaluation_table,
    result_tiles,
    sample_table,
)

FILE_NAME = "report.html"

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")  # of curves.py, by colour class
_BLUE, _ORANGE, _GREEN, _RED = _COLORS
# What curves.png leaves out for want of room.
_MORE_PANELS = (
    Panel(
        title="verdicts of the score",
        lines={
            "score/tpr": ("correct accepted (TPR)", _GREEN),
            "score/tnr": ("incorrect rejected (TNR)", _RED),
        },
        points={"tpr": ("held out: TPR", _GREEN), "tnr": ("held out: TNR", _RED)},
        limits=(-0.03, 1.03),
        guide=0.5,
    ),
    Panel(title="entropy (nats per token)", lines={"loss/entropy": ("estimate", _BLUE)}),
    Panel(
        title="score coefficient alpha, after the gradient cap",
        lines={"score/coef": ("alpha", _ORANGE)},
        limits=(0.0, None),
    ),
    Panel(title="KL to the initial model (nats)", lines={"loss/kl": ("k3 estimate", _BLUE)}),
    Panel(title="learning rate", lines={"step/lr": ("learning rate", _BLUE)}, limits=(0.0, None)),
    Panel(
        title="peak memory (GB)",
        lines={"memory/peak_gb": ("rank 0", _BLUE)},
        limits=(0.0, None),
    ),
    Panel(
        title="failed grades per step",
        lines={"reward/failed": ("completions", _RED)},
        limits=(0.0, None),
    ),
)
# Colours of the stages that take time; the others share the last one.
_STAGES = ("rollout", "loss", "reward", "step", "sync", "score", "pack")
_OTHER_COLOR = 7


def write_report(run: str | Path, other: str | Path | None = None) -> Path:
    """Write RUN/report.html, over an older one; with `other` it compares the two runs.

    Raises:
        ConfigError: a folder that holds no run, or a broken file in it.
    """
    folders = [Path(run)] if other is None else [Path(run), Path(other)]
    if len(folders) == 2 and folders[0].resolve() == folders[1].resolve():
        raise ConfigError(f"{run} and {other} are the same run; name two different ones")
    path = folders[0] / FILE_NAME
    jsonl.replace_text(path, render_report([read_run(folder) for folder in folders]))
    return path


def render_report(runs: Sequence[ReportRun]) -> str:
    """The HTML text of one run, or of two in comparison."""
    charts = "".join(_draw(panel, runs) for panel in (*PANELS, *_MORE_PANELS))
    charts += "".join(_draw_stages(runs))
    sections = {
        "Curves": f'<div class="charts">{charts}</div>'
        if charts
        else '<p class="none">No step has been logged yet.</p>',
        "Evaluations on held-out problems": evaluation_table(runs),
        "Samples": sample_table(runs),
        "Configuration": config_section(runs),
    }
    title = " and ".join(run.name for run in runs)
    body = "".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections.items())
    return page(title, f"<header>{_header(runs)}</header>{result_tiles(runs)}{body}")


def _header(runs: Sequence[ReportRun]) -> str:
    parts = []
    for index, run in enumerate(runs):
        badge = f'<b class="run">{"AB"[index]}</b> ' if len(runs) > 1 else ""
        facts = " &middot; ".join(escape(fact) for fact in _facts(run))
        parts.append(f'<h1>{badge}{escape(run.name)}</h1><p class="facts">{facts}</p>')
    if len(runs) > 1:
        parts.append('<p class="note">A is drawn solid, B dashed and hollow.</p>')
    return "".join(parts)


def _facts(run: ReportRun) -> list[str]:
    facts = [run.method]
    facts += [str(run.config[key]) for key in ("model.path", "data.train") if key in run.config]
    facts.append(f"seed {run.config.get('seed', 0)}")
    planned = run.config.get("optim.steps", "?")
    facts.append(f"{len(run.steps)} of {planned} steps logged")
    seconds = number(run.summary.get("wall_seconds"))
    if seconds is not None:
        facts.append(f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h")
    return facts


def _draw(panel: Panel, runs: Sequence[ReportRun]) -> str:
    series = []
    for index, run in enumerate(runs):
        for kind, metrics, records in (
            ("line", panel.lines, run.steps),
            ("marks", panel.points or {}, run.evaluations),
        ):
            series += [
                Series(
                    label=label,
                    color=_COLORS.index(color),
                    points=curve(records, key, keep=lambda value: value > 0 or not panel.is_log),
                    run=index,
                    kind=kind,
                )
                for key, (label, color) in metrics.items()
            ]
    return line_chart(
        panel.title,
        series,
        limits=panel.limits,
        is_log=panel.is_log,
        guide=panel.guide,
        is_comparison=len(runs) > 1,
    )


def _draw_stages(runs: Sequence[ReportRun]) -> list[str]:
    """Seconds per stage, one stacked diagram per run on a common scale."""
    layers = [_stage_layers(run) for run in runs]
    tops = [
        max(
            (sum(values) for values in zip(*(_values(one) for one in stack), strict=True)),
            default=0,
        )
        for stack in layers
    ]
    titles = ["seconds per stage"]
    if len(runs) > 1:
        titles = [f"seconds per stage ({name})" for name in "AB"]
    return [
        stacked_chart(title, stack, top=max(tops))
        for title, stack in zip(titles, layers, strict=True)
    ]


def _stage_layers(run: ReportRun) -> list[Series]:
    """Stages with at least a hundredth of the time, largest first, and the rest as one."""
    steps = [record["step"] for record in run.steps]
    names = dict.fromkeys(key for record in run.steps for key in record if key.startswith("time/"))
    seconds = {
        key.removeprefix("time/"): [number(record.get(key)) or 0.0 for record in run.steps]
        for key in names
    }
    total = sum(map(sum, seconds.values()))
    if total == 0:
        return []
    shares = {name: sum(values) / total for name, values in seconds.items()}
    large = sorted(
        (name for name in shares if shares[name] >= 0.01), key=lambda name: -shares[name]
    )
    layers = [(name, seconds[name]) for name in large]
    small = [values for name, values in seconds.items() if name not in large]
    if small:
        layers.append(("other", [sum(column) for column in zip(*small, strict=True)]))
    return [
        Series(
            label=f"{name} {sum(values) / len(steps):.3g} s, {sum(values) / total:.0%}",
            color=_STAGES.index(name) if name in _STAGES else _OTHER_COLOR,
            points=list(zip(steps, values, strict=True)),
        )
        for name, values in layers
    ]


def _values(series: Series) -> list[float]:
    return [value for _, value in series.points]
