"""report.html: a whole run, or two in comparison, in one file that any browser opens.

With it come the folders of `laser-fast eval` that lie below a run or are named. The file loads
nothing from anywhere; every call draws it again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from laser_fast.config import ConfigError
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.terminal import print_evaluation
from laser_fast.log.jsonl import replace_text
from laser_fast.log.metrics import BENCHMARK, RUN, TILE, VOTES, shown_at
from laser_fast.log.run_folder import RunFolder
from laser_fast.report.charts import evaluation_diagrams, figure, run_diagrams, svg
from laser_fast.report.runs import MEAN, Evaluation, Record, Run, number, read_evaluations, read_run

# A page of thousands of long completions opens in no browser.
MAX_SAMPLES = 400
MAX_CHARACTERS = 6000

logger = logging.getLogger(__name__)


def write_run_files(folder: str | Path) -> dict[str, Path]:
    """Write curves.png and report.html of a run, however it ended; none for a run without steps."""
    run, files = read_run(folder), RunFolder(Path(folder))
    if not run.steps:
        return {}
    figure(run_diagrams([run]), columns=4).savefig(files.curves, dpi=100)
    return {"curves": files.curves, "report": write_report(folder)}


def draw_run(folder: Path) -> None:
    """Write these files and say where they are; or warn, as of a run that may have failed."""
    try:
        for name, path in write_run_files(folder).items():
            print(f"{name}: {path}")
    except (ConfigError, OSError) as error:  # it must not hide how the run itself ended
        logger.warning("the run could not be drawn: %s; try `laser-fast report %s`", error, folder)


def show_evaluation(folder: EvalFolder) -> None:
    """Draw the plots of an evaluation and print its tables."""
    write_evaluation_plots(folder.path)
    print_evaluation(folder)


def write_evaluation_plots(folder: Path) -> None:
    """Write NAME/plots.png for each benchmark of a finished evaluation."""
    (found,) = read_evaluations((), [folder])
    for name, samples in found.samples.items():
        diagrams = evaluation_diagrams(found.benchmarks[name], samples)
        figure(diagrams, columns=len(diagrams)).savefig(folder / name / "plots.png", dpi=100)


def write_report(
    run: str | Path, other: str | Path | None = None, evaluations: Sequence[str | Path] = ()
) -> Path:
    """Write RUN/report.html, over an older one; with `other` it compares the two runs.

    `evaluations` are folders of `laser-fast eval` that do not lie below the runs. A ConfigError
    says which folder holds no run or no finished evaluation, or which file in it is broken.
    """
    folders = [Path(run)] if other is None else [Path(run), Path(other)]
    if len(folders) == 2 and folders[0].resolve() == folders[1].resolve():
        raise ConfigError(f"{run} and {other} are the same run; name two different ones")
    runs = [read_run(folder) for folder in folders]
    found = read_evaluations(folders, [Path(path) for path in evaluations])
    path = folders[0] / "report.html"
    replace_text(path, render_report(runs, found))
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
    environment.filters |= {"text": _text, "number": number, "shorten": _shorten}
    records = [record for run in runs for record in run.evaluations]
    known = {key for record in records for key in record if number(record[key]) is not None}
    columns = [metric for metric in shown_at(RUN) if metric.name in known]
    html = environment.get_template("page.html.jinja").render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        tiles=[metric for metric in columns if metric.place >= TILE],
        figures=list(map(svg, run_diagrams(runs))),
        columns=columns,
        sizes=_sizes(records),
        evaluations=evaluations,
        benchmarks=_compare(evaluations),
        samples=_samples(runs),
    )
    # A model may write half a surrogate pair, which UTF-8 cannot hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def _compare(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Every benchmark, and the mean over them, as the evaluations that have it see it."""
    names = dict.fromkeys(name for one in evaluations for name in one.benchmarks)
    compared = []
    for name in sorted(names, key=lambda name: name == MEAN):
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
        about = {"name": name, "sizes": _sizes(reports), "level": reports[0].get("interval")}
        compared.append({**about, "members": members, "tables": _tables(reports)})
    return compared


def _sizes(reports: Sequence[Record]) -> list[str]:
    """How much stands behind the numbers; one entry if it is the same everywhere."""
    found = {(report.get("num_prompts"), report.get("samples_per_prompt")) for report in reports}
    return [f"{p} problems, {n} completions each" for p, n in sorted(found, key=str) if p and n]


def _tables(reports: Sequence[Record]) -> dict[str, list[tuple[str, list[Record]]]]:
    """By title, rows of a label and {value, low, high} or {} per report, some of them known."""
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


def _samples(runs: Sequence[Run]) -> list[tuple[int, Record]]:
    """Samples with the place of their run, evenly spread, first and last included."""
    rows = []
    for index, run in enumerate(runs):
        count = min(len(run.samples), MAX_SAMPLES // len(runs))
        places = np.linspace(0, len(run.samples) - 1, count).round().astype(int)
        rows += [(index, run.samples[place]) for place in places]
    return rows


def _shorten(value: object) -> str:
    """The text, of a very long one both ends: the answer is at the end."""
    text, half = "" if value is None else str(value), MAX_CHARACTERS // 2
    note = f"\n[... {len(text) - 2 * half} characters left out ...]\n"
    return text if len(text) <= 2 * half else text[:half] + note + text[-half:]


def _text(value: object, style: str = "") -> str:
    """A number as a reader wants it: shares to three places, large numbers to one."""
    if (found := number(value)) is None:
        return "-"
    return format(found, style or (".1f" if abs(found) >= 10 else ".3f"))
