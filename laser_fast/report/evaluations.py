"""What `laser-fast eval` has measured, as the report shows it; only its files are known here.

A folder counts as an evaluation when it holds settings.json and report.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from laser_fast.config import ConfigError
from laser_fast.log import jsonl
from laser_fast.log.run_folder import Record, number
from laser_fast.report.charts import RULES, Figure, evaluation_diagrams, svg_figure

# Metrics of the score and their labels; a base rate changes those with a corrected twin.
SCORE_LABELS = {
    "f1": "F1",
    "tpr": "TPR",
    "tnr": "TNR",
    "verification_accuracy": "accuracy of the verdict",
    "auroc": "AUROC",
    "auroc_within": "AUROC within problems",
    "ece": "ECE",
    "brier": "Brier",
    "aurc": "AURC",
    "risk@0.5": "risk at half coverage",
    "mean_correct": "score if correct",
    "mean_incorrect": "score if incorrect",
}
_CORRECTED = ("f1", "tpr", "tnr", "verification_accuracy", "ece", "brier")
SCORE_METRICS = {
    f"{key}{suffix}": label + note
    for key, label in SCORE_LABELS.items()
    for suffix, note in (("", ""), ("_corrected", ", prior corrected"))
    if not suffix or key in _CORRECTED
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A folder of `laser-fast eval`; `run` is the place of the run that it lies below."""

    name: str
    run: int | None
    facts: Sequence[str]
    report: Record
    samples: Mapping[str, Sequence[Record]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark in all evaluations that have it, each with its warnings and figures.

    The rows of a table are a label and, for every evaluation, {value, low, high} or {}.
    """

    title: str
    members: Sequence[tuple[Evaluation, Sequence[str], Sequence[Figure]]]
    tables: Mapping[str, Sequence[tuple[str, Sequence[Record]]]]


def find_evaluations(folder: Path, *, run: int) -> list[Evaluation]:
    """The finished evaluations below a run folder."""
    return [
        read_evaluation(path.parent, name=str(path.parent.relative_to(folder)), run=run)
        for path in sorted(folder.rglob("report.json"))
        if (path.parent / "settings.json").is_file()
    ]


def read_evaluation(folder: Path, *, name: str, run: int | None = None) -> Evaluation:
    """Read a folder of `laser-fast eval`.

    Raises:
        ConfigError: the folder holds no finished evaluation, or a file of it is broken.
    """
    for file in ("settings.json", "report.json"):
        if not (folder / file).is_file():
            raise ConfigError(
                f"{folder} holds no finished evaluation ({file} is missing); name the folder that "
                "laser-fast eval wrote"
            )
    report, settings = (jsonl.read_json(folder / f"{file}.json") for file in ("report", "settings"))
    if not isinstance(report.get("benchmarks"), dict):
        raise ConfigError(f"{folder / 'report.json'}: expected the key benchmarks")
    keys = ("model", "engine", "temperature", "seed")
    facts = [f"{key} {settings[key]}" for key in keys if key in settings]
    if score := report.get("score"):
        token = f"{score['token']}, " if score["token"] else ""
        facts.append(f"score {token}beta {score['beta']:g}, c_ref {score['ref_logprob']:.3f}")
    paths = {benchmark: folder / benchmark / "samples.jsonl" for benchmark in report["benchmarks"]}
    samples = {
        benchmark: [
            {key: sample.get(key) for key in ("score", "reward", "finish_reason")}
            for sample in jsonl.read_lines(path)
        ]
        for benchmark, path in paths.items()
        if path.is_file()
    }
    return Evaluation(name=name, run=run, facts=facts, report=report, samples=samples)


def compare_benchmarks(evaluations: Sequence[Evaluation]) -> list[Benchmark]:
    """Every benchmark, and the mean over them, as the evaluations that have it see it."""
    names = dict.fromkeys(name for one in evaluations for name in one.report["benchmarks"])
    benchmarks = []
    for name in names:
        known = [one for one in evaluations if name in one.report["benchmarks"]]
        reports = [one.report["benchmarks"][name] for one in known]
        limits = _vote_limits(reports)
        members = []
        for one, report in zip(known, reports, strict=True):
            diagrams = evaluation_diagrams(report, one.samples.get(name, ()), limits)
            figures = [svg_figure(*diagram) for diagram in diagrams]
            members.append((one, _warnings(report), figures))
        level = f"{reports[0]['interval']:.0%} bootstrap intervals over problems"
        title = f"{name}: {'; '.join([*sizes(reports), level])}"
        benchmarks.append(Benchmark(title, members, _tables(reports)))
    known = [one for one in evaluations if "average" in one.report]
    if known:
        tables = _tables([one.report["average"] for one in known])
        members = [(one, (), ()) for one in known]
        benchmarks.append(Benchmark("mean over benchmarks", members, tables))
    return benchmarks


def sizes(reports: Sequence[Record]) -> list[str]:
    """How much stands behind the numbers; one entry if it is the same everywhere."""
    found = {(report.get("num_prompts"), report.get("samples_per_prompt")) for report in reports}
    return [f"{p} problems, {n} completions each" for p, n in sorted(found, key=str) if p and n]


def _warnings(report: Record) -> list[str]:
    """What the numbers leave out or may get wrong."""
    counts = {
        "grades failed": report.get("num_failed_grades", 0),
        "over-long problems dropped": report.get("num_dropped", 0),
        "gold answers that the grader rejects": len(report.get("golds_rejected", ())),
        "gold answers that it cannot read": len(report.get("golds_unreadable", ())),
    }
    return [f"{count} {label}" for label, count in counts.items() if count]


def _tables(reports: Sequence[Record]) -> dict[str, list[tuple[str, list[Record]]]]:
    """Answers and self-verification, a column per report; rows without any number are left out."""
    ks = sorted({k for report in reports for k in report.get("ks", ()) if k > 1})
    answers = {"accuracy": "one completion"}
    answers |= {f"{rule}@{k}": label.replace(" k", f" {k}") for rule, label, _ in RULES for k in ks}
    answers |= {f"weighted_gain@{k}": f"weighted minus plain majority of {k}" for k in ks[-1:]}
    answers |= {"truncated": "truncated completions", "mean_length": "tokens per completion"}
    tables = {}
    for title, labels in (("correct answers", answers), ("self-verification", SCORE_METRICS)):
        rows = [
            (label, [report["metrics"].get(key, {}) for report in reports])
            for key, label in labels.items()
        ]
        tables[title] = [
            row for row in rows if any(cell.get("value") is not None for cell in row[1])
        ]
    return {title: rows for title, rows in tables.items() if rows}


def _vote_limits(reports: Sequence[Record]) -> tuple[float, float]:
    """One scale for the votes of all evaluations of a benchmark, so that they compare."""
    entries = [
        report["metrics"].get(f"{rule}@{k}", {})
        for report in reports
        for rule, _, _ in RULES
        for k in report["ks"]
    ]
    ends = [number(entry.get(end)) for entry in entries for end in ("low", "value", "high")]
    known = [end for end in ends if end is not None] or [0.0, 1.0]
    return min(known) - 0.02, max(known) + 0.02
