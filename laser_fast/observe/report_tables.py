"""Tables of the report: results, evaluations, samples and configuration. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from laser_fast.observe.report_run import Record, ReportRun, number

# What is shown of every evaluation, with the text of its column.
EVALUATION_COLUMNS = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "weighted_majority": "weighted vote",
    "best_of": "best by score",
    "f1": "F1",
    "tpr": "TPR",
    "tnr": "TNR",
    "auroc": "AUROC",
    "ece": "ECE",
    "ece_corrected": "ECE, prior corrected",
    "brier": "Brier",
    "mean_correct": "score if correct",
    "mean_incorrect": "score if incorrect",
    "truncated": "truncated",
    "mean_length": "tokens",
}
_TILES = ("accuracy", "majority", "weighted_majority", "f1", "auroc", "ece_corrected")
# A page of thousands of long completions opens in no browser.
MAX_SAMPLES = 400
MAX_CHARACTERS = 6000


def result_tiles(runs: Sequence[ReportRun]) -> str:
    """The first and the last evaluation of each run, one tile for each main metric."""
    tiles = []
    for key in _TILES:
        lines = []
        for index, run in enumerate(runs):
            known = [number(report.get(key)) for report in run.evaluations]
            if any(value is not None for value in known):
                first, last = (_text(value) for value in (known[0], known[-1]))
                change = f"<small>{first} &rarr;</small> {last}" if len(known) > 1 else last
                lines.append(f"<p>{_badge(index, runs)}{change}</p>")
        if lines:
            title = escape(EVALUATION_COLUMNS[key])
            tiles.append(f'<div class="tile"><h3>{title}</h3>{"".join(lines)}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def evaluation_table(runs: Sequence[ReportRun]) -> str:
    """One row per evaluation, its step being the number of updates before it."""
    columns = [
        key
        for key in EVALUATION_COLUMNS
        if any(number(report.get(key)) is not None for run in runs for report in run.evaluations)
    ]
    rows = [
        f"<tr><td>{_badge(index, runs)}{report['step']:g}</td>"
        + "".join(f"<td>{_text(number(report.get(key)))}</td>" for key in columns)
        + "</tr>"
        for index, run in enumerate(runs)
        for report in run.evaluations
    ]
    if not rows:
        return '<p class="none">No evaluation so far.</p>'
    head = "".join(f"<th>{escape(EVALUATION_COLUMNS[key])}</th>" for key in columns)
    sizes = {
        f"{report['num_prompts']} problems, {report['samples_per_prompt']} completions each"
        for run in runs
        for report in run.evaluations
        if "num_prompts" in report and "samples_per_prompt" in report
    }
    note = f'<p class="note">{escape("; ".join(sorted(sizes)))}</p>' if sizes else ""
    return (
        f'{note}<div class="wide"><table class="numbers"><thead><tr><th>after step</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def sample_table(runs: Sequence[ReportRun]) -> str:
    """Completions with reward and score; the page's script searches and sorts them."""
    shown = [
        (index, sample)
        for index, run in enumerate(runs)
        for sample in _spread(run.samples, MAX_SAMPLES // len(runs))
    ]
    if not shown:
        return '<p class="none">No samples were written.</p>'
    total = sum(len(run.samples) for run in runs)
    note = f"{len(shown)} of {total}, evenly spread over the run. " if len(shown) < total else ""
    columns = ("step", "prompt", "completion", "reward", "score", "ended by")
    head = "".join(
        f'<th aria-sort="none"><button type="button">{name}</button></th>' for name in columns
    )
    rows = "".join(_sample_row(index, runs, sample) for index, sample in shown)
    return (
        f'<p class="note">{note}Click a column to sort. A score is marked where score &gt; 0.5 and '
        "reward agree (green) or do not (red).</p>"
        '<label class="search">Search <input type="search" placeholder="prompt or completion">'
        '</label> <span class="count"></span>'
        f'<div class="wide"><table class="samples"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def config_section(runs: Sequence[ReportRun]) -> str:
    """The resolved configuration of each run, and what differs between two."""
    parts = []
    if len(runs) == 2:
        parts.append(_config_differences(runs[0].config, runs[1].config))
    for index, run in enumerate(runs):
        parts.append(
            f"<details><summary>{_badge(index, runs)}{escape(run.name)}/config.toml</summary>"
            f"<pre>{_clean(run.config_text)}</pre></details>"
        )
    return "".join(parts)


def _config_differences(first: Mapping[str, object], second: Mapping[str, object]) -> str:
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if not keys:
        return '<p class="note">Both runs have the same configuration.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(
            f"<td><code>{escape(repr(values[key])) if key in values else '-'}</code></td>"
            for values in (first, second)
        )
        + "</tr>"
        for key in keys
    )
    return (
        '<table class="differences"><thead><tr><th>key</th><th>A</th><th>B</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _sample_row(index: int, runs: Sequence[ReportRun], sample: Record) -> str:
    step, reward, score = (number(sample.get(key)) for key in ("step", "reward", "score"))
    verdict = ""
    if reward is not None and score is not None:
        verdict = "agrees" if (score > 0.5) == (reward > 0.5) else "differs"
    return (
        f'<tr><td data-v="{_order(step)}">{_badge(index, runs)}{_text(step, "g")}</td>'
        f"<td><pre>{_shortened(sample.get('prompt'))}</pre></td>"
        f"<td><pre>{_shortened(sample.get('completion'))}</pre></td>"
        f'<td data-v="{_order(reward)}">{_text(reward, "g")}</td>'
        f'<td data-v="{_order(score)}" class="{verdict}">{_text(score)}</td>'
        f"<td>{_clean(sample.get('finish_reason', '-'))}</td></tr>"
    )


def _shortened(value: object) -> str:
    """The text, of a very long one both ends: the answer is at the end."""
    text = "" if value is None else str(value)
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        cut = f"\n[... {len(text) - 2 * half} characters left out ...]\n"
        text = text[:half] + cut + text[-half:]
    return _clean(text)


def _clean(value: object) -> str:
    """Escaped text that UTF-8 can hold: a model may write half a surrogate pair."""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _spread(samples: Sequence[Record], count: int) -> list[Record]:
    if len(samples) <= count:
        return list(samples)
    last = len(samples) - 1
    return [samples[round(i * last / (count - 1))] for i in range(count)]


def _badge(index: int, runs: Sequence[ReportRun]) -> str:
    """A or B in front of what belongs to one of two runs."""
    return f'<b class="run">{"AB"[index]}</b> ' if len(runs) > 1 else ""


def _order(value: float | None) -> str:
    """What a column is sorted by; nothing comes last."""
    return "" if value is None else repr(value)


def _text(value: float | None, style: str = "") -> str:
    """A number as a reader wants it: shares to three places, counts to one."""
    if value is None:
        return "-"
    return format(value, style or (".1f" if abs(value) >= 10 else ".3f"))
