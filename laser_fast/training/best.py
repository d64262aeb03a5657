"""Which checkpoint is the best by an evaluation, and when a run has looked for it long enough.

Both are read from what the run has written. A resumed run drops what comes again of it first, so it
decides as the undisturbed one, also by another number than it began with.
"""

from pathlib import Path
from typing import NamedTuple

from laser_fast.config import Config, ConfigError
from laser_fast.log.metrics import RUN, shown_at
from laser_fast.log.run_folder import RunFolder, steps_in

_LOWER_IS_BETTER = ("truncated", "mean_length", "mean_incorrect", "ece", "brier")


class Standing(NamedTuple):
    """The best step and its number; how many evaluations came after it, and whether they end it."""

    step: int | None = None
    value: float = float("nan")
    num_since: int = 0
    is_over: bool = False


def metric_of(config: Config) -> str:
    """The number of an evaluation that `checkpoint.best` names, or "" for none."""
    name = config.checkpoint.best.removeprefix("eval/")  # so the dashboards call it
    known = ["", *(metric.name for metric in shown_at(RUN))]
    if name not in known:
        names = ", ".join(known[1:])
        raise ConfigError(f'checkpoint.best = "{name}" is no number of an evaluation; use {names}')
    return name


def standing(config: Config, *unsaved: int) -> Standing:
    """Where a run stands with its checkpoints and others to come; the first of equals is the best.

    That of step 0 holds nothing trained, and a number that is undefined is no candidate.
    """
    metric, patience = metric_of(config), config.checkpoint.patience
    folder = RunFolder(Path(config.output_dir))
    reports = folder.reports() if metric else {}
    sign = -1 if metric.startswith(_LOWER_IS_BETTER) else 1
    steps = sorted(reports.keys() & {*steps_in(folder.checkpoints), *unsaved} - {0})
    found = {step: value for step in steps if (value := reports[step].get(metric)) is not None}
    best = max(found, key=lambda step: sign * found[step], default=None)
    since = sum(step > (best or 0) for step in reports)
    return Standing(best, found.get(best or 0, float("nan")), since, 0 < patience <= since)
