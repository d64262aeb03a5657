"""The results of bench/real_model.py: means over seeds, differences from GRPO, votes, curves.

Student's intervals are over the seeds: how another training would come out. Those of the votes are
of a bootstrap over problems, the same draws in every seed, so that each gain is a difference within
one seed and one problem: how other problems would come out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from bench import markdown
from bench.provenance import save
from bench.sandbox_study import Interval, interval, read_result
from laser_fast.evaluation import statistics
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.stopping import TOLERANCE, compare
from laser_fast.log.metrics import PALETTE
from laser_fast.log.run_folder import RunFolder
from laser_fast.log.samples import read_samples
from laser_fast.report import charts
from laser_fast.report.runs import Run, number, read_run

BASELINE, START = "grpo", "start"
LABELS = {
    START: "start of all runs",
    BASELINE: "GRPO",
    "laser": "LaSeR, score at the EOS",
    "laser-last": "LaSeR, score at the row that predicts the EOS",
    "laser-paper": "LaSeR, constant reference",
}
K = 8  # voters
GAINS = {
    f"weighted_gain@{K}": "weighted minus plain",
    f"posterior_gain@{K}": "posterior minus plain",
}
COLUMNS = {
    "accuracy": "accuracy",
    "f1": "F1 at .5",
    "f1_calibrated": "F1, calibrated threshold",
    "auroc": "AUROC",
    "auroc_within": "AUROC within problems",
    f"majority@{K}": f"maj@{K}",
    f"weighted_majority@{K}": f"weighted maj@{K}",
    f"posterior_majority@{K}": f"posterior maj@{K}",
    **GAINS,
    "samples_posterior": f"samples for maj@{K}, by posterior",
    "samples_agreement": f"samples for maj@{K}, by lead",
    "gsm8k": "GSM8K",
}
README = (
    "accuracy", "f1_calibrated", "auroc", "auroc_within", f"majority@{K}",
    f"posterior_majority@{K}", "samples_posterior", "gsm8k",
)  # fmt: skip
# Title, and the lines of a diagram over the steps: metric and dash.
PANELS = {
    "accuracy on the training prompts": {"reward/mean": "-"},
    "AUROC of the score within a step": {"score/auroc": "-"},
    "score if correct (solid), if incorrect (dashed)": {
        "score/mean_correct": "-",
        "score/mean_incorrect": "--",
    },
}


class Row(NamedTuple):
    """One run's numbers by the keys of COLUMNS; None where undefined."""

    method: str
    seed: int
    values: Mapping[str, float | None]


class Measured(NamedTuple):
    """A finished evaluation on held-out problems: its row, its size, and draws [R] of the gains."""

    row: Row
    num_prompts: int
    num_samples: int
    draws: Mapping[str, np.ndarray]


def read_evaluation(study: Path, method: str, seed: int) -> Measured | None:
    """What `evaluate` measured, None until its held-out part is finished."""
    held_out, gsm8k = (
        EvalFolder(study / "evaluations" / f"{method}_{seed}" / piece)
        for piece in ("held_out", "gsm8k")
    )
    if not held_out.report.exists():
        return None
    records = read_samples(held_out.samples("held_out"))
    # As the evaluation itself computed it; only the draws behind its intervals are not on disk. The
    # answers of the reward "gsm8k" are exact fractions, so equal ones are equal as text.
    options = statistics.ReportOptions(ks=(K,))
    report, draws = statistics.build_report(records, name="held_out", options=options)
    values = {name: entry["value"] for name, entry in report["metrics"].items()}
    values |= samples_needed(report["stopping"])
    if gsm8k.report.exists():
        values["gsm8k"] = gsm8k.read_report()["benchmarks"]["gsm8k"]["metrics"]["accuracy"]["value"]
    row = Row(method, seed, {key: number(values.get(key)) for key in COLUMNS})
    sizes = report["num_prompts"], report["samples_per_prompt"]
    return Measured(row, *sizes, {key: draws[key] for key in GAINS if key in draws})


def samples_needed(stopping: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Mean samples until each rule is as good as the plain vote of K, less TOLERANCE.

    `stopping` is that of a report, whose plain votes may go on after K.
    """
    curves = {
        rule: np.array([curve["samples"], curve["accuracy"]]) for rule, curve in stopping.items()
    }
    curves["fixed"] = curves["fixed"][:, : K + 1]
    return compare(curves)


def own_rows(study: Path, runs: Iterable[tuple[str, int]]) -> list[Row]:
    """What finished runs measured themselves after training, and GRPO's before as the start's.

    Without posterior votes, whose rule has changed since: a run keeps no held-out samples.
    """
    columns = [key for key in COLUMNS if not key.startswith("posterior")]
    rows = []
    for method, seed in runs:
        result = read_result(study / f"{method}_{seed}")
        found = {method: result["after"]}
        if method == BASELINE:
            found[START] = result["before"]
        for name, report in found.items():
            values = dict.fromkeys(COLUMNS)
            values |= {key: report.get(key.removesuffix(f"@{K}")) for key in columns}
            rows.append(Row(name, seed, {key: number(value) for key, value in values.items()}))
    return rows


def differences(rows: Sequence[Row]) -> list[Row]:
    """Each run minus GRPO of its seed; those without that pair are left out."""
    base = {row.seed: row.values for row in rows if row.method == BASELINE}
    return [
        Row(method, seed, {
            key: None if value is None or base[seed][key] is None else value - base[seed][key]
            for key, value in values.items()
        })
        for method, seed, values in rows
        if seed in base and method not in (START, BASELINE)
    ]  # fmt: skip


def means(rows: Sequence[Row]) -> dict[str, dict[str, Interval]]:
    """Student's interval over the seeds of a method, undefined as soon as one value is."""
    by_method: dict[str, list[Row]] = {method: [] for method in LABELS}
    for row in rows:
        by_method[row.method].append(row)
    return {
        method: {key: interval([row.values[key] for row in found]) for key in COLUMNS}
        for method, found in by_method.items()
        if found
    }


def pooled_gains(measured: Sequence[Measured]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By method and gain of a vote: its mean over the seeds, and low and high of the bootstrap."""
    pooled: dict[str, dict[str, tuple[float, float, float]]] = {}
    for method in dict.fromkeys(one.row.method for one in measured):
        of_seeds = [one for one in measured if one.row.method == method]
        for key in GAINS:
            values = [one.row.values[key] for one in of_seeds]
            if None not in values:
                draws = np.mean([one.draws[key] for one in of_seeds], axis=0)
                low, high = statistics.interval(draws).tolist()
                pooled.setdefault(method, {})[key] = (float(np.mean(values)), low, high)
    return pooled


def write(
    study: Path, path: Path, methods: Sequence[str], seeds: Sequence[int], facts: dict[str, str]
) -> str:
    """Write `path` (JSON) with a .md and a .png beside it; returns what is in the .md."""
    wanted = [(method, seed) for method in methods for seed in seeds]
    trained = [
        (method, seed)
        for method, seed in wanted
        if RunFolder(study / f"{method}_{seed}").summary.exists()
    ]
    asked = [*((START, seed) for seed in seeds), *wanted]
    measured = [one for run in asked if (one := read_evaluation(study, *run))]
    if len(sizes := {(one.num_prompts, one.num_samples) for one in measured}) > 1:
        raise ValueError(
            f"report: expected evaluations of one size, got problems x samples {sorted(sizes)}; "
            f"remove those of another size from {study / 'evaluations'} and evaluate again"
        )
    for problems, samples in sizes:
        facts["evaluated with"] = f"--problems {problems} --samples {samples}"
    have = {one.row[:2] for one in measured}
    missing = {
        "not trained": [run for run in wanted if run not in trained],
        "not evaluated": [run for run in trained if run not in have],
        "start not evaluated": [] if (START, seeds[0]) in have else [(START, seeds[0])],
        "no GSM8K": [one.row[:2] for one in measured if one.row.values["gsm8k"] is None],
    }
    facts |= {
        f"missing, {what}": ", ".join(f"{method} {seed}" for method, seed in runs)
        for what, runs in missing.items()
        if runs
    }
    results = {run: read_result(study / "{}_{}".format(*run)) for run in trained}
    own = own_rows(study, trained)
    rows = [
        {"part": part, **row._asdict()}
        for part, found in (("evaluate", [one.row for one in measured]), ("own", own))
        for row in found
    ]
    rows += [
        {"part": "training", "method": method, "seed": seed, **result}
        for (method, seed), result in results.items()
    ]
    text = document(facts, measured, own, path.stem)
    save(path, facts, rows, text)
    runs = {
        LABELS[method]: [read_run(study / f"{m}_{seed}") for m, seed in trained if m == method]
        for method in methods
    }
    draw_curves(runs, path.with_suffix(".png"))
    return text


def document(
    facts: Mapping[str, str], measured: Sequence[Measured], own: Sequence[Row], name: str
) -> str:
    """The study as Markdown; ends with the table of the README."""
    lines = ["# SmolLM2-135M on word problems", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    if measured:
        rows = [one.row for one in measured]
        size = f"{measured[0].num_prompts} held-out problems, {measured[0].num_samples} completions"
        lines += [f"{size} each: mean over seeds and its 95% interval (Student).", ""]
        lines += [*_summary(rows), "", *_against_grpo(rows)]
        lines += [f"Gains of votes over maj@{K}: mean over seeds [95% of a bootstrap over "
                  "problems, the same draws in each seed].", ""]  # fmt: skip
        lines += [*_gain_table(pooled_gains(measured)), "", "Per seed:", "", *_per_seed(rows), ""]
    if own:
        lines += ["The runs' own evaluation after the last step, fewer problems, none of which are "
                  "among those above:", "", *_summary(own), "", *_against_grpo(own)]  # fmt: skip
        lines += ["Per seed:", "", *_per_seed(own), ""]
    lines += [
        "GRPO and the start do not train the score: what they say of it is of an untrained one, "
        "and where scores do not spread the votes with a score are plain ones. Where a vote may "
        "stop is read off the problems that it is measured on: its samples are a little too few.",
        "",
        f"![curves by method, thin lines are seeds]({name}.png)",
    ]
    if measured:
        lines += ["", "## For the README", "", *readme(measured, name)]
    return "\n".join(lines) + "\n"


def readme(measured: Sequence[Measured], name: str) -> list[str]:
    """The README's table, and what it says of every method against GRPO."""
    rows = [one.row for one in measured]
    seeds = len({row.seed for row in rows if row.method != START})
    file = f"bench/results/{name}.md"
    lines = [
        "What it does to a real model, SmolLM2-135M after a short supervised phase "
        "([bench/real_model.py](bench/real_model.py)):",
        f"{measured[0].num_prompts} held-out word problems, {measured[0].num_samples} completions "
        f"each; means over {seeds} seeds with 95% intervals, all runs from one",
        f"start; from [{file}]({file}).",
        "",
        *_summary(rows, README),
        "",
    ]
    gains, against = pooled_gains(measured), means(differences(rows))
    for method, found in means(rows).items():
        if method not in against:
            continue
        says = [f"accuracy {_cell(against[method]['accuracy'], '+')} against GRPO's"]
        for key, (value, low, high) in gains.get(method, {}).items():
            vote = GAINS[key].split()[0]
            says.append(f"{vote} votes {_range(value, low, high)} over maj@{K}")
        if not math.isnan((needed := found["samples_posterior"]).mean):
            says.append(
                f"votes that stop early are as good as maj@{K}, less {_short(f'{TOLERANCE}')}, "
                f"with {_cell(needed, key='samples_posterior')} samples, "
                f"{_short(f'{needed.mean / K:.2f}')} times as many"
            )
        lines.append(f"{LABELS[method]}: {'; '.join(says)}.")
    return lines


def draw_curves(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Metrics of the training steps by method, smoothed: seeds as thin lines, their mean thick."""
    panels = [(title, partial(_draw, runs=runs, keys=keys)) for title, keys in PANELS.items()]
    charts.figure(panels, columns=len(panels)).savefig(path, dpi=120)


def _draw(axes: Axes, *, runs: Mapping[str, Sequence[Run]], keys: Mapping[str, str]) -> None:
    for color, (label, of_seeds) in zip(PALETTE, runs.items(), strict=False):
        for key, dash in keys.items():
            lines = [line for run in of_seeds if (line := _line(run, key))]
            if not lines:
                continue
            for line in lines:
                axes.plot(*zip(*line.items(), strict=True), dash, color=color, lw=0.7, alpha=0.45)
            steps = sorted(set.intersection(*map(set, lines)))
            mean = [float(np.mean([line[step] for line in lines])) for step in steps]
            shown = label if key == next(iter(keys)) else ""
            axes.plot(steps, mean, dash, color=color, lw=2, label=shown)
    axes.set_xlabel("step")
    axes.grid(color="#eceff2")


def _line(run: Run, key: str) -> dict[int, float]:
    """The smoothed values of a metric by step, where it has any."""
    known = {step["step"]: y for step in run.steps if (y := number(step.get(key))) is not None}
    if not known:
        return {}
    smoothed = charts.smooth(np.array(list(known.values())))
    return dict(zip(known, smoothed.tolist(), strict=True))


def _summary(rows: Sequence[Row], columns: Iterable[str] = (), *, sign: str = "") -> list[str]:
    """Means by method; columns in which nothing is known are left out."""
    found = means(rows)
    shown = [key for key in columns or COLUMNS
             if any(not math.isnan(of[key].mean) for of in found.values())]  # fmt: skip
    seeds = {method: sum(row.method == method for row in rows) for method in found}
    cells = (
        [LABELS[method], seeds[method], *(_cell(of[key], sign, key) for key in shown)]
        for method, of in found.items()
    )
    return markdown.table(["", "seeds", *(COLUMNS[key] for key in shown)], cells)


def _against_grpo(rows: Sequence[Row]) -> list[str]:
    found = differences(rows)
    head = "Difference from GRPO of the same seed, mean over seeds and its 95% interval (Student):"
    return [head, "", *_summary(found, sign="+"), ""] if found else []


def _per_seed(rows: Sequence[Row]) -> list[str]:
    shown = [key for key in COLUMNS if any(row.values[key] is not None for row in rows)]
    cells = (
        [
            LABELS[row.method],
            row.seed,
            *(_cell(interval([row.values[key]]), "", key) for key in shown),
        ]
        for row in rows
    )
    return markdown.table(["", "seed", *(COLUMNS[key] for key in shown)], cells)


def _gain_table(gains: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> list[str]:
    cells = (
        [LABELS[method], *(_range(*found[key]) if key in found else "-" for key in GAINS)]
        for method, found in gains.items()
    )
    return markdown.table(["", *GAINS.values()], cells)


def _cell(found: Interval, sign: str = "", key: str = "") -> str:
    if math.isnan(found.mean):
        return "-"
    style = ".2f" if key.startswith("samples_") else ".3f"
    width = "" if math.isnan(found.half_width) else f" +- {found.half_width:{style}}"
    return _short(f"{found.mean:{sign}{style}}{width}")


def _range(value: float, low: float, high: float) -> str:
    return _short(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")


def _short(text: str) -> str:
    """Numbers below 1 as in the README, without their 0."""
    return re.sub(r"\b0\.", ".", text)
