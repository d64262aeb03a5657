"""What a terminal shows of a run: a line per step, a progress bar, and a table at the end."""

import logging
import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

from laser_fast.log.metrics import METRICS, RUN, SUMMARY, Metric, shown_at

Report = Mapping[str, Any]  # of an evaluation, by the names in laser_fast.log.metrics

logger = logging.getLogger(__name__)


def step_line(
    step: int, num_steps: int, metrics: Mapping[str, Any], *, seconds_left: float = 0.0
) -> str:
    """One line of text; pairs such as score of correct/incorrect completions share a label.

    Example: `step  12/120  reward 0.531  score +0.62/+0.31  F1 0.74  1.9 s  0:03:23 left`.
    """
    shown = _columns((metric, metrics.get(metric.key)) for metric in METRICS)
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", *shown]
    if seconds := sum(metrics[key] or 0.0 for key in metrics if key.startswith("time/")):
        parts.append(f"{seconds:.1f} s")
    if seconds_left >= 1:
        parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)


def evaluation_line(step: int, report: Report) -> str:
    """The same of an evaluation after `step` steps."""
    shown = _columns((metric, report.get(metric.name)) for metric in shown_at(RUN))
    return f"evaluation after {step} steps: {'  '.join(shown)}"


def _columns(values: Iterable[tuple[Metric, float | None]]) -> list[str]:
    """The numbers with a place in the line; a label without any of its numbers is left out."""
    columns: dict[str, list[str]] = {}
    for metric, value in values:
        if metric.line:
            shown = "-" if value is None else f"{value:{metric.style}}"
            columns.setdefault(metric.line, []).append(shown)
    return [f"{label} {'/'.join(shown)}" for label, shown in columns.items() if {*shown} != {"-"}]


class StepConsole:
    """Step lines above a progress bar on a terminal, plain log lines anywhere else."""

    def __init__(self, num_steps: int, *, first_step: int = 0, console: Console | None = None):
        self._num_steps = num_steps
        console = console or Console()
        text, bar, share, _ = Progress.get_default_columns()  # the lines tell the time left
        columns = (text, bar, share, MofNCompleteColumn(), TimeElapsedColumn())
        # The pace is that of all steps but the first, evaluations and checkpoints included.
        self._bar = Progress(
            *columns, console=console, transient=True, speed_estimate_period=math.inf
        )
        self._bar.disable = not console.is_terminal
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step)
        self._bar.start()

    def show_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print the line of a finished step and move the bar."""
        self._bar.update(self._task, completed=step + 1)
        left = self._bar.tasks[0].time_remaining or 0.0
        self.show(step_line(step, self._num_steps, metrics, seconds_left=left))

    def show(self, text: str) -> None:
        """Print one line above the bar."""
        if self._bar.disable:
            logger.info("%s", text)
        else:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def summarize_run(
    before: Report, after: Report, *, steps: int, wall_seconds: float
) -> dict[str, Any]:
    """What summary.json holds; None where a run has no evaluation or a metric is undefined.

    A vote is named after the number of completions that vote, as `majority_at_8`.
    """
    summary: dict[str, Any] = {"steps": steps, "wall_seconds": wall_seconds}
    k = {**before, **after}.get("samples_per_prompt")
    for metric in shown_at(SUMMARY):
        values = before.get(metric.name), after.get(metric.name)
        name = "self_verification_f1" if metric.name == "f1" else metric.name
        if metric.stage != "vote":
            summary[f"{name}_before"], summary[f"{name}_after"] = values
        elif k is not None:
            summary[f"{name}_at_{k}"] = values[1]
    return summary


def print_summary(
    before: Report, after: Report, *, steps: int, seconds: float, console: Console | None = None
) -> None:
    """Print the results on held-out problems before and after training."""
    console = console or Console()
    if known := {**before, **after}:
        k = known.get("samples_per_prompt")
        title = f"{known.get('num_prompts')} held-out problems, {k} completions each"
        sides = (Column(name, justify="right") for name in ("before", "after"))
        table = Table("", *sides, title=title)
        for metric in shown_at(SUMMARY):
            values = (report.get(metric.name) for report in (before, after))
            cells = ("-" if value is None else f"{value:.3f}" for value in values)
            table.add_row(metric.at(k), *cells)
        console.print(table)
        if before and not before.get("uses_scores"):
            console.print(
                "Before training the scores say nothing, so the weighted vote is the plain one.",
                style="dim",
            )
    console.print(f"{steps} steps, {seconds:.0f} s", highlight=False)
