"""report.html: a whole run, or two in comparison, in one file that any browser opens.

Curves, time per stage, evaluations, samples with their scores and the resolved configuration; with
them the folders of `laser-fast eval` that lie below a run or are named. The file loads nothing from
anywhere; it is drawn anew at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from laser_fast.config import ConfigError
from laser_fast.log import jsonl
from laser_fast.log.metrics import PANELS
from laser_fast.log.run_folder import Run, number, read_run
from laser_fast.report.charts import (
    Figure,
    draw_panel,
    draw_stages,
    panel_curves,
    stage_curves,
    svg_figure,
)
from laser_fast.report.evaluations import (
    SCORE_METRICS,
    Evaluation,
    compare_benchmarks,
    find_evaluations,
    read_evaluation,
    sizes,
)

FILE_NAME = "report.html"
TEMPLATE = "page.html.jinja"

# What is shown of every evaluation during the run, with the text of its column.
_COLUMNS = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "weighted_majority": "weighted vote",
    "best_of": "best by score",
    **SCORE_METRICS,
    "truncated": "truncated",
    "mean_length": "tokens",
}
_TILES = ("accuracy", "majority", "weighted_majority", "f1", "auroc", "ece_corrected")
# A page of thousands of long completions opens in no browser.
MAX_SAMPLES = 400
MAX_CHARACTERS = 6000


def write_report(
    run: str | Path, other: str | Path | None = None, evaluations: Sequence[str | Path] = ()
) -> Path:
    """Write RUN/report.html, over an older one; with `other` it compares the two runs.

    Args:
        run: the folder of a run.
        other: the folder of another one.
        evaluations: folders of `laser-fast eval` that do not lie below the runs.

    Raises:
        ConfigError: a folder that holds no run or no finished evaluation, or a broken file in it.
    """
    folders = [Path(run)] if other is None else [Path(run), Path(other)]
    if len(folders) == 2 and folders[0].resolve() == folders[1].resolve():
        raise ConfigError(f"{run} and {other} are the same run; name two different ones")
    runs = [read_run(folder) for folder in folders]
    found = [
        evaluation
        for index, folder in enumerate(folders)
        for evaluation in find_evaluations(folder, run=index)
    ]
    found += [read_evaluation(path, name=str(path)) for path in map(Path, evaluations)]
    path = folders[0] / FILE_NAME
    jsonl.replace_text(path, render_report(runs, found))
    return path


def render_report(runs: Sequence[Run], evaluations: Sequence[Evaluation] = ()) -> str:
    """The HTML text of one run, or of two in comparison."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: "" if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = _text
    records = [record for run in runs for record in run.evaluations]
    html = environment.get_template(TEMPLATE).render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        facts=[_facts(run) for run in runs],
        tiles=_tiles(runs),
        figures=_run_figures(runs),
        columns={
            key: label
            for key, label in _COLUMNS.items()
            if any(number(record.get(key)) is not None for record in records)
        },
        sizes=sizes(records),
        evaluations=evaluations,
        benchmarks=compare_benchmarks(evaluations),
        samples=_samples(runs),
        differences=_differences(runs),
    )
    # A model may write half a surrogate pair, which UTF-8 cannot hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def _facts(run: Run) -> list[str]:
    facts = [run.method]
    facts += [str(run.config[key]) for key in ("model.path", "data.train") if key in run.config]
    facts.append(f"seed {run.config.get('seed', 0)}")
    facts.append(f"{len(run.steps)} of {run.config.get('optim.steps', '?')} steps logged")
    seconds = number(run.summary.get("wall_seconds"))
    if seconds is not None:
        facts.append(f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h")
    return facts


def _run_figures(runs: Sequence[Run]) -> list[Figure]:
    figures = [
        svg_figure(panel.title, draw_panel, panel, curves)
        for panel in PANELS
        if (curves := panel_curves(panel, runs))
    ]
    stages = [stage_curves(run) for run in runs]
    # One scale, so that two runs compare.
    heights = [
        sum(value for _, value in column)
        for curves in stages
        for column in zip(*(curve.points for curve in curves), strict=True)
    ]
    for index, curves in enumerate(stages):
        if curves:
            title = "seconds per stage" + (f" ({'AB'[index]})" if len(runs) > 1 else "")
            figures.append(svg_figure(title, draw_stages, curves, max(heights)))
    return figures


def _tiles(runs: Sequence[Run]) -> dict[str, list[tuple[int, list[float | None]]]]:
    """By label, the first and the last value of each run that has the metric."""
    tiles: dict[str, list[tuple[int, list[float | None]]]] = {}
    for key in _TILES:
        for index, run in enumerate(runs):
            values = [number(record.get(key)) for record in run.evaluations]
            if any(value is not None for value in values):
                ends = values if len(values) == 1 else [values[0], values[-1]]
                tiles.setdefault(_COLUMNS[key], []).append((index, ends))
    return tiles


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The configuration keys with different values, and the values; empty for one run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {
        key: [repr(run.config[key]) if key in run.config else "-" for run in runs] for key in keys
    }
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the table of samples; `agrees` is whether score > 0.5 says what the reward says.

    A run with more than its share of them gives evenly spread ones, first and last included.
    """
    rows = []
    for index, run in enumerate(runs):
        count = min(len(run.samples), MAX_SAMPLES // len(runs))
        for place in np.linspace(0, len(run.samples) - 1, count).round().astype(int):
            sample = run.samples[place]
            step, reward, score = (number(sample.get(key)) for key in ("step", "reward", "score"))
            is_judged = reward is not None and score is not None
            rows.append(
                {
                    "run": index,
                    "step": step,
                    "prompt": _shortened(sample.get("prompt")),
                    "completion": _shortened(sample.get("completion")),
                    "reward": reward,
                    "score": score,
                    "agrees": (score > 0.5) == (reward > 0.5) if is_judged else None,
                    "finish_reason": sample.get("finish_reason", "-"),
                }
            )
    return rows


def _shortened(value: object) -> str:
    """The text, of a very long one both ends: the answer is at the end."""
    text = "" if value is None else str(value)
    left_out = len(text) - MAX_CHARACTERS
    if left_out <= 0:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _text(value: object, style: str = "") -> str:
    """A number as a reader wants it: shares to three places, large numbers to one."""
    found = number(value)
    if found is None:
        return "-"
    return format(found, style or (".1f" if abs(found) >= 10 else ".3f"))
