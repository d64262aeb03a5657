"""report.html: a whole run, or two in comparison, in one file that any browser opens.

Curves, time per stage, evaluations, samples with their scores and the resolved configuration; with
them the folders of `laser-fast eval` that lie below a run or are named. The file loads nothing from
anywhere; every call draws it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from laser_fast.config import ConfigError
from laser_fast.log.jsonl import replace_text
from laser_fast.log.metrics import RUN, TILE, shown_at
from laser_fast.log.run_folder import RunFolder
from laser_fast.report.charts import figure, run_diagrams, svg
from laser_fast.report.evaluations import Evaluation, compare_benchmarks, read_evaluations, sizes
from laser_fast.report.runs import Record, Run, number, read_run

FILE_NAME = "report.html"
TEMPLATE = "page.html.jinja"

# A page of thousands of long completions opens in no browser.
MAX_SAMPLES = 400
MAX_CHARACTERS = 6000


def write_run_files(folder: str | Path) -> dict[str, Path]:
    """Write curves.png and report.html of a run, however it ended; none for a run without steps."""
    run, files = read_run(folder), RunFolder(Path(folder))
    if not run.steps:
        return {}
    figure(run_diagrams([run]), columns=4).savefig(files.curves, dpi=100)
    return {"curves": files.curves, "report": write_report(folder)}


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
    path = folders[0] / FILE_NAME
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
    columns = [
        metric
        for metric in shown_at(RUN)
        if any(number(record.get(metric.name)) is not None for record in records)
    ]
    html = environment.get_template(TEMPLATE).render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        tiles=[metric for metric in columns if metric.place >= TILE],
        figures=list(map(svg, run_diagrams(runs))),
        columns=columns,
        sizes=sizes(records),
        evaluations=evaluations,
        benchmarks=compare_benchmarks(evaluations),
        samples=_samples(runs),
    )
    # A model may write half a surrogate pair, which UTF-8 cannot hold.
    return html.encode("utf-8", "replace").decode("utf-8")


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
    text = "" if value is None else str(value)
    left_out, half = len(text) - MAX_CHARACTERS, MAX_CHARACTERS // 2
    if left_out <= 0:
        return text
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _text(value: object, style: str = "") -> str:
    """A number as a reader wants it: shares to three places, large numbers to one."""
    found = number(value)
    if found is None:
        return "-"
    return format(found, style or (".1f" if abs(found) >= 10 else ".3f"))
