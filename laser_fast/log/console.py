"""What a person at the terminal sees of a run: a line per step, a progress bar, a table at the end.

Reports are the flat dicts of `laser_fast.evaluation.statistics.summarize`: this layer is
below the evaluation and knows only its keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

Report = Mapping[str, Any]

logger = logging.getLogger(__name__)

# Label, metrics that share it, and their format; metrics that a step does not have are left out.
_COLUMNS = (
    ("reward", ("reward/mean",), ".3f"),
    ("score", ("score/mean_correct", "score/mean_incorrect"), "+.2f"),
    ("F1", ("score/f1",), ".2f"),
    ("AUROC", ("score/auroc",), ".2f"),
    ("loss", ("loss/policy", "loss/score"), "+.4f"),
    ("grad", ("step/grad_norm",), ".2f"),
    ("disagreement", ("rollout/disagreement",), ".1e"),
    ("tokens", ("rollout/mean_length",), ".0f"),
    ("tok/s", ("throughput/tokens_per_s",), ".0f"),
)


def step_line(step: int, num_steps: int, metrics: Mapping[str, Any]) -> str:
    """One line of text; pairs such as score of correct/incorrect completions share a label.

    Example: `step  12/120  reward 0.531  score +0.62/+0.31  F1 0.74  grad 0.52  1.9 s`.
    """
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    for label, keys, style in _COLUMNS:
        values = [metrics.get(key) for key in keys]
        if any(value is not None for value in values):
            shown = "/".join("-" if value is None else f"{value:{style}}" for value in values)
            parts.append(f"{label} {shown}")
    seconds = [value for key, value in metrics.items() if key.startswith("time/") and value]
    if seconds:
        parts.append(f"{sum(seconds):.1f} s")
    return "  ".join(parts)


class StepConsole:
    """Step lines above a progress bar on a terminal, plain log lines anywhere else."""

    def __init__(self, num_steps: int, *, first_step: int = 0, console: Console | None = None):
        self._num_steps = num_steps
        self._progress: Progress | None = None
        console = console or Console()
        if console.is_terminal:
            columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("train", total=num_steps, completed=first_step)
            self._progress.start()

    def show_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print the line of a finished step and move the bar."""
        self.show(step_line(step, self._num_steps, metrics))
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1)

    def show(self, text: str) -> None:
        """Print one line above the bar."""
        if self._progress is None:
            logger.info("%s", text)
        else:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()


def summarize_run(
    before: Report | None, after: Report | None, *, steps: int, wall_seconds: float
) -> dict[str, Any]:
    """What summary.json holds; None where a run has no evaluation or a metric is undefined.

    `majority_at_<k>` is named after the number of completions that vote.
    """
    before, after = before or {}, after or {}
    k = after.get("samples_per_prompt", before.get("samples_per_prompt"))
    summary = {
        "steps": steps,
        "wall_seconds": wall_seconds,
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "self_verification_f1_before": before.get("f1"),
        "self_verification_f1_after": after.get("f1"),
        "auroc_before": before.get("auroc"),
        "auroc_after": after.get("auroc"),
        "tpr_after": after.get("tpr"),
        "tnr_after": after.get("tnr"),
        "ece_after": after.get("ece"),
    }
    if k is not None:
        summary[f"majority_at_{k}"] = after.get("majority")
        summary[f"weighted_majority_at_{k}"] = after.get("weighted_majority")
    return summary


def print_summary(
    before: Report | None,
    after: Report | None,
    summary: Mapping[str, Any],
    *,
    curves: Path | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the held-out results before and after training, and where to see more."""
    console = console or Console()
    if before or after:
        console.print(_result_table(before or {}, after or {}))
        if before and not before.get("uses_scores"):
            console.print(
                "Before training the scores say nothing, so the weighted vote is the plain one.",
                style="dim",
            )
    console.print(f"{summary['steps']} steps, {summary['wall_seconds']:.0f} s", highlight=False)
    for name, path in (("curves", curves), ("report", report)):
        if path is not None:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def _result_table(before: Report, after: Report) -> Table:
    k = after.get("samples_per_prompt", before.get("samples_per_prompt"))
    num_prompts = after.get("num_prompts", before.get("num_prompts"))
    table = Table(title=f"{num_prompts} held-out problems, {k} completions each")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for label, key in (
        (f"accuracy (avg@{k})", "accuracy"),
        ("self-verification F1", "f1"),
        ("  correct accepted (TPR)", "tpr"),
        ("  incorrect rejected (TNR)", "tnr"),
        ("AUROC", "auroc"),
        (f"maj@{k}", "majority"),
        (f"score-weighted maj@{k}", "weighted_majority"),
        (f"best of {k} by score", "best_of"),
        ("calibration error", "ece"),
        ("  prior corrected", "ece_corrected"),
    ):
        table.add_row(label, _number(before.get(key)), _number(after.get(key)))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
