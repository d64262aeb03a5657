"""The result of a run: summary.json and the table at the end.

Reports are the flat dicts of `laser_fast.evaluation.evaluate.EvalReport.to_dict`: this layer is
below the evaluation and knows only its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]


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
