"""What a person at the terminal sees of an evaluation: progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TaskID
from rich.table import Column, Table

from laser_fast.log.metrics import BENCHMARK, VOTES, shown_at

if TYPE_CHECKING:
    from laser_fast.evaluation.calibrate import Calibration
    from laser_fast.evaluation.folder import EvalFolder

# Candidates in the table of a calibration; some tokenizers reserve hundreds.
_NUM_CANDIDATES = 8
_MAX_NOISE = 0.05
_CORRECTED = "_corrected"  # ends the names of numbers after the class-prior correction
_CALIBRATED = "_calibrated"  # and at a threshold from other problems
_SPREAD = ("n", "c_ref", "std", "std error")


@contextmanager
def progress_bar(*, is_shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A function (name, done, total) that moves one bar per name; on stderr, so output pipes."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        bars: dict[str, TaskID] = {}

        def move(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], completed=done, total=total)

        yield move


def print_evaluation(folder: EvalFolder) -> None:
    """The tables of a finished evaluation, and where the rest is."""
    console = Console()
    print_report(folder.read_report(), console)
    _say(console, f"report, samples and plots: {folder.path}")


def print_totals(totals: Mapping[str, int], out: Path) -> None:
    """One line about a scored file."""
    _say(Console(), f"{', '.join(f'{n} {outcome}' for outcome, n in totals.items())}: {out}")


def print_calibration(calibration: Calibration, *, beta: float | None = None) -> None:
    """Tables and warnings on stderr; on stdout only what belongs into a configuration.

    A ConfigError says that no token, or not this beta, leaves a correct answer's target improbable.
    """
    console = Console(stderr=True)
    best, left_out = calibration.candidates[0], len(calibration.candidates) - _NUM_CANDIDATES
    rows = [
        (c.token, c.token_id, *c.spreads["all"], f"{c.beta:g}", c.noise(c.beta))
        for c in calibration.candidates[:_NUM_CANDIDATES]
    ]
    _print_table(console, ("token", "id", *_SPREAD, "beta", "noise"), rows)
    parts = [(name, *spread) for name, spread in best.spreads.items() if name != "all"]
    _print_table(console, (f"{best.token} by completion", *_SPREAD), parts)
    if left_out > 0:
        _say(console, f"and {left_out} more with more noise")
    finished, total = calibration.num_finished, calibration.num_completions
    _say(console, f"{finished} of {total} completions ended with an EOS token")
    score = best.score(best.beta if beta is None else beta)
    if (noise := best.noise(score["beta"])) > _MAX_NOISE:
        text = f"warning: beta * std = {noise:.3f} > {_MAX_NOISE}: a constant c_ref blurs the "
        text += "score by that much; choose a token with less spread, or one template"
        _say(console, text, style="yellow")
    print(tomli_w.dumps({"score": score | {"position": calibration.position}}), end="")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The content of an evaluation's report.json as tables."""
    if score := report.get("score"):
        measured = ", measured on these completions" if score["ref_logprob_is_measured"] else ""
        beta, ref_logprob = f"beta {score['beta']:g}", f"c_ref {score['ref_logprob']:.3f}"
        _say(console, f"score {score['token']}: {beta}, {ref_logprob}{measured}")
    for name, one in report["benchmarks"].items():
        truncated = one["metrics"].get("truncated", {}).get("value")
        _say(
            console,
            f"\n{name}: {one['num_prompts']} problems, {one['samples_per_prompt']} completions "
            f"each; accuracy (avg@{one['samples_per_prompt']}) {_cell(one, 'accuracy')}, "
            f"{'-' if truncated is None else format(truncated, '.1%')} truncated, "
            f"{one['num_failed_grades']} grades failed",
        )
        _print_metrics(one, console)
    if average := report.get("average"):
        _say(console, f"\nmean over benchmarks: accuracy {_cell(average, 'accuracy')}")
        _print_metrics(average, console)


def _print_metrics(report: Mapping[str, Any], console: Console) -> None:
    """Votes by k, and self-verification beside the same after the class-prior correction."""
    ks = report["ks"]
    rules = [rule for rule in VOTES if any(_cell(report, f"{rule.name}@{k}")[1:] for k in ks)]
    for some in (rules[:2], rules[2:]):  # those with scores for themselves
        rows = [(k, *(_cell(report, f"{rule.name}@{k}") for rule in some)) for k in ks if some]
        _print_table(console, ("k", *(rule.label for rule in some)), rows)
    gap = f"best_over_mean@{ks[-1]}"
    if (report["metrics"].get(gap, {}).get("high") or 0.0) < -1e-9:  # rounding at k = 1
        text = f"warning: best of {ks[-1]} by score is {_cell(report, gap)} off the mean accuracy: "
        _say(console, text + "it picks worse than chance", style="yellow")
    rows = [
        (metric.label, cell)
        for metric in shown_at(BENCHMARK)
        if metric.stage == "stop" and (cell := _cell(report, metric.name))[1:]
    ]
    _print_table(console, ("votes that stop early", "to reach the vote of all"), rows)
    rows = [
        (metric.label, cell, _cell(report, metric.name + _CORRECTED))
        for metric in shown_at(BENCHMARK)
        if metric.stage == "score" and not metric.name.endswith((_CORRECTED, _CALIBRATED))
        if (cell := _cell(report, metric.name))[1:]  # a number
    ]
    if rows and report.get("uses_scores"):
        gains = [f"{x} {_cell(report, f'{x}_gain@{ks[-1]}')}" for x in ("weighted", "posterior")]
        _say(console, f"minus plain majority at k = {ks[-1]}: {', '.join(gains)}")
    elif rows and "score_std" in report:
        spread = "-" if report["score_std"] is None else f"{report['score_std']:.3f}"
        _say(console, f"the scores spread by {spread} only: they do not weight votes yet")
    rate = f"at base rate {report['base_rate']:.3f}" if "base_rate" in report else "prior corrected"
    _print_table(console, ("self-verification", "score", rate), rows)
    if (cell := _cell(report, "f1_calibrated"))[1:]:
        rates = [f"{x.upper()} {_cell(report, x + _CALIBRATED)}" for x in ("tpr", "tnr")]
        by = report.get("calibrated_by", "other problems")
        _say(console, f"at the threshold of {by}: F1 {cell}, {', '.join(rates)}")


def _say(console: Console, text: str, **options: Any) -> None:
    """A line as it is: names in brackets are no markup, and long lines wrap by themselves."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, **options)


def _print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table without rules, so that four intervals fit into 80 columns; none without rows."""
    heads = (Column(escape(column), no_wrap=True) for column in columns)
    table = Table(*heads, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*(escape(f"{c:.3f}" if isinstance(c, float) else str(c)) for c in row))
    if rows:
        console.print(table)


def _cell(report: Mapping[str, Any], key: str) -> str:
    """A value with its interval, as `.509 (.463, .552)`; `-` if undefined, empty if not there."""
    entry = report["metrics"].get(key, {"value": ""})
    if not isinstance(entry["value"], float):
        return "-" if entry["value"] is None else ""
    value, *ends = [_short(entry[k]) for k in ("value", "low", "high") if entry[k] is not None]
    return f"{value} ({', '.join(ends)})" if ends else value


def _short(value: float) -> str:
    """Three decimals in four places: `.509`, `1.00`, `-.012`."""
    text = f"{value:.3f}".removeprefix("0").replace("-0.", "-.")
    return text[: 5 if value < 0 else 4]
