"""What a person at the terminal sees of a run: one line per step, and a progress bar."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

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
