"""What `laser-fast eval` has measured, as tables and plots; only its files are known here.

A folder counts as an evaluation when it holds settings.json and report.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.log import jsonl
from laser_fast.log.metrics import BENCHMARK, VOTES, shown_at
from laser_fast.report.charts import evaluation_diagrams, figure, svg
from laser_fast.report.runs import Record, number

_MEAN = "mean over benchmarks"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A folder of `laser-fast eval`; `run` is the place of the run that it lies below."""

    name: str
    run: int | None
    settings: Record
    score: Record | None
    benchmarks: Mapping[str, Record]  # reports, and the mean over them
    samples: Mapping[str, Sequence[Record]]


def read_evaluations(runs: Sequence[Path], named: Sequence[Path]) -> list[Evaluation]:
    """The finished evaluations below the folders of runs, and those that are named."""
    places: list[tuple[Path, str, int | None]] = [
        (path.parent, str(path.parent.relative_to(folder)), index)
        for index, folder in enumerate(runs)
        for path in sorted(folder.rglob("report.json"))
        if (path.parent / "settings.json").is_file()
    ]
    places += [(path, str(path), None) for path in named]
    return [_read(*place) for place in places]


def _read(folder: Path, name: str, run: int | None) -> Evaluation:
    """One folder of `laser-fast eval`; a ConfigError says what is missing or broken."""
    for file in ("settings.json", "report.json"):
        if not (folder / file).is_file():
            raise ConfigError(
                f"{folder} holds no finished evaluation ({file} is missing); name the folder that "
                "laser-fast eval wrote"
            )
    report, settings = (jsonl.read_json(folder / f"{file}.json") for file in ("report", "settings"))
    if not isinstance(report.get("benchmarks"), dict):
        raise ConfigError(f"{folder / 'report.json'}: expected the key benchmarks")
    benchmarks, keys = report["benchmarks"], ("score", "reward", "finish_reason")
    samples = {
        benchmark: [{key: line.get(key) for key in keys} for line in jsonl.read_lines(path)]
        for benchmark in benchmarks
        if (path := folder / benchmark / "samples.jsonl").is_file()
    }
    if "average" in report:
        benchmarks = {**benchmarks, _MEAN: report["average"]}
    return Evaluation(name, run, settings, report.get("score"), benchmarks, samples)


def save_plots(folder: Path) -> None:
    """Draw NAME/plots.png for each benchmark of a finished evaluation."""
    (found,) = read_evaluations((), [folder])
    for name, samples in found.samples.items():
        diagrams = evaluation_diagrams(found.benchmarks[name], samples)
        figure(diagrams, columns=len(diagrams)).savefig(folder / name / "plots.png", dpi=100)


def compare_benchmarks(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Every benchmark, and the mean over them, as the evaluations that have it see it.

    The members are (evaluation, report, figures).
    """
    names = dict.fromkeys(name for one in evaluations for name in one.benchmarks)
    compared = []
    for name in sorted(names, key=lambda name: name == _MEAN):
        known = [one for one in evaluations if name in one.benchmarks]
        reports = [one.benchmarks[name] for one in known]
        # One scale for the votes of all members, so that they compare.
        keys = [f"{rule.name}@{k}" for rule in VOTES for report in reports for k in report["ks"]]
        entries = [report["metrics"].get(key, {}) for report in reports for key in keys]
        ends = [entry[end] for entry in entries for end in entry if number(entry[end]) is not None]
        limits = min(ends, default=0.02) - 0.02, max(ends, default=0.98) + 0.02
        members = []
        for one, report in zip(known, reports, strict=True):
            diagrams = evaluation_diagrams(report, one.samples.get(name, ()), limits)
            members.append((one, report, list(map(svg, diagrams))))
        about = {"name": name, "sizes": sizes(reports), "level": reports[0].get("interval")}
        compared.append({**about, "members": members, "tables": _tables(reports)})
    return compared


def sizes(reports: Sequence[Record]) -> list[str]:
    """How much stands behind the numbers; one entry if it is the same everywhere."""
    found = {(report.get("num_prompts"), report.get("samples_per_prompt")) for report in reports}
    return [f"{p} problems, {n} completions each" for p, n in sorted(found, key=str) if p and n]


def _tables(reports: Sequence[Record]) -> dict[str, list[tuple[str, list[Record]]]]:
    """Answers and self-verification, rows of a label and {value, low, high} or {} per report.

    Rows without any number are left out.
    """
    ks = sorted({k for report in reports for k in report.get("ks", ()) if k > 1})
    tables: dict[str, list[tuple[str, list[Record]]]] = {}
    for metric in shown_at(BENCHMARK):
        rows = {metric.name: metric.label}
        if "@k" in metric.label:
            voters = ks if metric in VOTES else ks[-1:]
            rows = {f"{metric.name}@{k}": metric.at(k) for k in voters}
        title = "self-verification" if metric.stage == "score" else "correct answers"
        for key, label in rows.items():
            cells = [report["metrics"].get(key, {}) for report in reports]
            if any(cell.get("value") is not None for cell in cells):
                tables.setdefault(title, []).append((label, cells))
    return tables
