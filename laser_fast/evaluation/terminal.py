"""What a person at the terminal sees of an evaluation: progress bars and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from laser_fast.algorithm.score import WARN_TARGET, check_score_target
from laser_fast.config import ConfigError
from laser_fast.report.evaluations import SCORE_LABELS

if TYPE_CHECKING:
    from laser_fast.evaluation.calibrate import Calibration, Spread
    from laser_fast.evaluation.rescore import Conclusion
    from laser_fast.evaluation.score_pairs import ScoreTotals

# Candidates in the table of a calibration; some tokenizers reserve hundreds.
_NUM_CANDIDATES = 8
_MAX_NOISE = 0.05
_SPREAD = ("c_ref", "std", "std error")
_VOTES = (
    ("pass", "pass"),
    ("majority", "majority"),
    ("weighted majority", "weighted_majority"),
    ("best of k", "best_of"),
)


@contextmanager
def progress_bar(*, is_shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A function (name, done, total) that moves one bar per name; on stderr, so output pipes."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        bars: dict[str, Any] = {}

        def move(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], completed=done, total=total)

        yield move


def print_conclusion(conclusion: Conclusion) -> None:
    """The tables of an evaluation, and where the rest is."""
    console = Console()
    print_report(conclusion.report, console)
    _say(console, f"report, samples and plots: {conclusion.folder.path}")


def print_totals(totals: ScoreTotals, out: Path) -> None:
    """One line about a scored file."""
    unscored = "".join(f", {count} {reason}" for reason, count in sorted(totals.unscored.items()))
    _say(Console(), f"{totals.num_scored} scored{unscored}: {out}")


def print_calibration(calibration: Calibration, *, beta: float | None = None) -> None:
    """Tables and warnings on stderr; on stdout only what belongs into a configuration.

    Raises:
        ConfigError: no token, or not this beta, leaves the target of a correct answer improbable.
    """
    console = Console(stderr=True)
    best = calibration.candidates[0]
    table = _table("token", "id", "n", *_SPREAD, "beta", "noise")
    for candidate in calibration.candidates[:_NUM_CANDIDATES]:
        cells = _spread_cells(candidate.spreads[0])
        ends = (f"{candidate.beta:g}", f"{candidate.noise:.3f}")
        table.add_row(escape(candidate.token), str(candidate.token_id), *cells, *ends)
    console.print(table)
    if len(best.spreads) > 1:
        table = _table(f"{escape(best.token)} by completion", "n", *_SPREAD)
        for part in best.spreads[1:]:
            table.add_row(escape(part.group), *_spread_cells(part))
        console.print(table)
    left_out = len(calibration.candidates) - _NUM_CANDIDATES
    if left_out > 0:
        _say(console, f"and {left_out} more with more noise")
    finished, total = calibration.num_finished, calibration.num_completions
    _say(console, f"{finished} of {total} completions ended with an EOS token")
    beta = best.beta if beta is None else beta
    if not math.isfinite(beta):
        raise ConfigError(
            f"no beta keeps the target c_ref + 1/beta below {WARN_TARGET:g}: even {best.token} "
            f"has c_ref = {best.ref_logprob:.2f}; the score needs a token that the model never "
            "expects"
        )
    try:
        check_score_target(beta=beta, ref_logprob=best.ref_logprob)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{best.token}: {error}") from None
    noise = beta * best.spreads[0].std
    if noise > _MAX_NOISE:
        text = (
            f"warning: beta * std = {noise:.3f} > {_MAX_NOISE}: a constant c_ref blurs the score "
            "by that much; choose a token with less spread, or one template"
        )
        _say(console, text, style="yellow")
    score = {"token": best.token, "beta": beta, "ref_logprob": round(best.ref_logprob, 3)}
    print(tomli_w.dumps({"score": score}), end="")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The content of an evaluation's report.json as tables."""
    score = report.get("score")
    if score:
        measured = ", measured on these completions" if score["ref_logprob_is_measured"] else ""
        beta, ref_logprob = f"beta {score['beta']:g}", f"c_ref {score['ref_logprob']:.3f}"
        _say(console, f"score {score['token']}: {beta}, {ref_logprob}{measured}")
    for name, benchmark in report["benchmarks"].items():
        _print_benchmark(name, benchmark, console)
    if "average" in report:
        metrics = report["average"]["metrics"]
        _say(console, "\nmean over benchmarks")
        _print_votes(report["average"], console)
        table = _table("", "value")
        for key, label in {"accuracy": "accuracy", **SCORE_LABELS}.items():
            if metrics.get(key, {}).get("value") is not None:
                table.add_row(label, _cell(metrics, key))
        console.print(table)


def _print_benchmark(name: str, report: Mapping[str, Any], console: Console) -> None:
    metrics, num_samples = report["metrics"], report["samples_per_prompt"]
    truncated = metrics.get("truncated", {}).get("value")
    share = "-" if truncated is None else f"{truncated:.1%}"
    _say(
        console,
        f"\n{name}: {report['num_prompts']} problems, {num_samples} completions each; "
        f"accuracy (avg@{num_samples}) {_cell(metrics, 'accuracy')}, {share} truncated, "
        f"{report['num_failed_grades']} grades failed",
    )
    _print_votes(report, console)
    if not report["reliability"]:
        return
    if report["uses_scores"]:
        largest = report["ks"][-1]
        gain = _cell(metrics, f"weighted_gain@{largest}")
        _say(console, f"weighted minus plain majority at k = {largest}: {gain}")
    else:
        spread = "-" if report["score_std"] is None else f"{report['score_std']:.3f}"
        _say(console, f"the scores spread by {spread} only: they do not weight votes yet")
    table = _table("self-verification", "score", f"at base rate {report['base_rate']:.3f}")
    for key, label in SCORE_LABELS.items():
        table.add_row(label, _cell(metrics, key), _cell(metrics, f"{key}_corrected"))
    console.print(table)


def _print_votes(report: Mapping[str, Any], console: Console) -> None:
    metrics, ks = report["metrics"], report["ks"]
    rules = [
        (label, key)
        for label, key in _VOTES
        if any(metrics.get(f"{key}@{k}", {}).get("value") is not None for k in ks)
    ]
    if not rules:
        return
    table = _table("k", *(label for label, _ in rules))
    for k in ks:
        table.add_row(str(k), *(_cell(metrics, f"{key}@{k}") for _, key in rules))
    console.print(table)


def _say(console: Console, text: str, **options: Any) -> None:
    """A line as it is: names in brackets are no markup, and long lines wrap by themselves."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, **options)


def _table(*columns: str) -> Table:
    """A table without rules, so that four intervals fit into 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _spread_cells(spread: Spread) -> tuple[str, ...]:
    numbers = (spread.mean, spread.std, spread.standard_error)
    return (str(spread.count), *(f"{number:.3f}" for number in numbers))


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    """A value with its interval, as `.509 (.463, .552)`; empty for what there is not."""
    if key not in metrics:
        return ""
    value, low, high = (metrics[key][part] for part in ("value", "low", "high"))
    if value is None:
        return "-"
    return _short(value) if low is None else f"{_short(value)} ({_short(low)}, {_short(high)})"


def _short(value: float) -> str:
    """Three decimals in four places: `.509`, `1.00`."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text[:-1]
