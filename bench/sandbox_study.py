"""Ways to train the score, against GRPO, on the sandbox's tasks over several seeds.

    python -m bench.sandbox_study --seeds 0 1 2 --json FILE [section.key=value ...]
    python -m bench.sandbox_study --config sandbox_hard --methods GRPO "LaSeR, last, floating" ...
    python -m bench.sandbox_study --smoke               one step of everything

Every run is `torchrun -m laser_fast train configs/quickstart.toml` with a seed of its own; the
methods of one seed start from the same warm-started model and see the same prompts. Numbers are
those of the held-out problems after the last step. Intervals are Student's over the seeds, 95%:
they say how another seed would come out, not how other problems would. Runs that are finished are
not repeated, so a study that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from bench import markdown
from bench.provenance import ROOT, header, save
from laser_fast.config import load_config
from laser_fast.log import jsonl
from laser_fast.log.run_folder import RunFolder
from laser_fast.sandbox.model import STEPS, make_sandbox_model

CONFIGS = ROOT / "configs"
_FLOATING, _LAST = ("score.ref_logprob=floating",), ("score.position=last",)
METHODS = {
    "LaSeR": (),
    "LaSeR without mixing": ("advantage.score_coef=0.0",),
    "LaSeR, floating": _FLOATING,
    "LaSeR, last": _LAST,
    "LaSeR, last, floating": (*_LAST, *_FLOATING),
    "LaSeR, policy-moment": (*_LAST, *_FLOATING),
    "LaSeR, projected": (*_LAST, *_FLOATING),
    "LaSeR, centred": (*_LAST, *_FLOATING),
    "GRPO": ("score.loss_coef=0.0", "advantage.score_coef=0.0"),
}
BASELINE = "GRPO"
DEFAULT = ("LaSeR", "LaSeR without mixing", BASELINE)
# Those that are not in the trainer, by the last word of their name.
VARIANTS = ("policy-moment", "projected", "centred")
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "ece": "ECE",
    "ece_corrected": "ECE, prior corrected",
    "majority": "maj@k",
    "weighted_majority": "weighted maj@k",
}
SMOKE = (
    "score.ref_logprob=-12.0",  # this early a model finishes nothing that could be measured
    "optim.steps=1",
    "optim.warmup_steps=0",
    "data.prompts_per_step=4",
    "data.eval_limit=2",
    "data.eval_samples=2",
)
# Student's t at 97.5% for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95% interval; nan where undefined."""

    mean: float
    half_width: float


def interval(values: Sequence[float | None]) -> Interval:
    """Student's interval of a mean; undefined as soon as one value is.

    Example: `interval([1.0, 2.0, 3.0])` is (2.0, 4.303 / sqrt(3)).
    """
    if not values or None in values:
        return Interval(math.nan, math.nan)
    if len(values) == 1:
        return Interval(values[0], math.nan)
    return Interval(
        fmean(values), T_QUANTILES[len(values) - 2] * stdev(values) / len(values) ** 0.5
    )


def train_all(
    folder: Path,
    config: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    *,
    num_ranks: int,
    warm_up_steps: int = STEPS,
) -> list[dict[str, Any]]:
    """Train every method from every seed; one record per run, finished ones read again."""
    records = []
    for seed in seeds:
        base = folder / f"base_{seed}"
        if not (base / "model.safetensors").exists():
            print(f"seed {seed}: warm-starting the base model", flush=True)
            task = load_config(config).model.path
            make_sandbox_model(base, seed=seed, task=task, steps=warm_up_steps)
        for method in methods:
            run = folder / f"{method.lower().replace(',', '').replace(' ', '_')}_{seed}"
            changes = [f"seed={seed}", f"output_dir={run}", f"model.path={base}"]
            train(run, config, method, [*changes, *overrides], num_ranks=num_ranks)
            records.append({"method": method, "seed": seed, **read_result(run)})
            after = records[-1]["after"]
            print(f"seed {seed}: {method}: " + ", ".join(
                f"{label} {_number(after.get(key))}" for key, label in METRICS.items()
            ), flush=True)  # fmt: skip
    return records


def train(
    run: Path, config: Path, method: str, overrides: Sequence[str], *, num_ranks: int
) -> None:
    """Start one run and wait for it; a finished run of the same configuration stays as it is."""
    folder, overrides = RunFolder(run), [*METHODS[method], *overrides]
    if folder.summary.exists():
        if load_config(folder.config) == load_config(config, overrides):
            return
        sys.exit(f"{run} holds a finished run of another configuration; choose another --runs")
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m"]
    variant = method.rpartition(" ")[2]
    command += ["bench.score_variants", variant] if variant in VARIANTS else ["laser_fast"]
    command += ["train", str(config)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("w") as log:
        result = subprocess.run([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        sys.exit(f"{run} failed with exit code {result.returncode}; see {log.name}")


def read_result(run: Path) -> dict[str, Any]:
    """The evaluations before and after training, and the time that it took."""
    folder = RunFolder(run)
    reports = sorted(jsonl.read_lines(folder.evaluations), key=lambda report: report["step"])
    seconds = json.loads(folder.summary.read_text(encoding="utf-8"))["wall_seconds"]
    return {"before": reports[0], "after": reports[-1], "wall_seconds": seconds}


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Interval]]]:
    """Means over the seeds: `after`, `before` training, and `gain` over GRPO, paired by seed.

    Each maps a method to its intervals by metric; all methods of a seed start from one model, so
    `before` has one row.
    """
    runs = {(record["method"], record["seed"]): record for record in records}
    methods = list(dict.fromkeys(method for method, _ in runs))
    seeds = sorted({seed for _, seed in runs})

    def values(method: str, key: str, when: str = "after") -> list[float | None]:
        return [runs[method, seed][when].get(key) for seed in seeds]

    def gains(method: str, key: str) -> list[float | None]:
        pairs = zip(values(method, key), values(BASELINE, key), strict=True)
        return [None if None in pair else pair[0] - pair[1] for pair in pairs]

    return {
        "before": {
            "before training": {key: interval(values(BASELINE, key, "before")) for key in METRICS}
        },
        "after": {
            method: {key: interval(values(method, key)) for key in METRICS} for method in methods
        },
        "gain": {
            method: {key: interval(gains(method, key)) for key in METRICS}
            for method in methods
            if method != BASELINE
        },
    }


def document(facts: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    """The study as Markdown."""
    summary = summarize(records)
    after = records[-1]["after"]
    seeds = sorted({record["seed"] for record in records})
    seconds = {
        method: fmean(record["wall_seconds"] for record in records if record["method"] == method)
        for method in summary["after"]
    }
    *others, last = seconds
    lines = [
        f"# The sandbox task with {', '.join(others)} and {last}",
        "",
        *[f"- {key}: {value}" for key, value in facts.items()],
        f"- seeds: {', '.join(map(str, seeds))}",
        f"- seconds per run: {', '.join(f'{m} {value:.0f}' for m, value in seconds.items())}",
        "",
        f"{after['num_prompts']} held-out problems, k = {after['samples_per_prompt']} completions "
        f"each, after {after['step']} steps: mean over seeds and its 95% interval (Student).",
        "",
        *_table({**summary["before"], **summary["after"]}),
        "",
        "Difference from GRPO of the same seed, which started from the same model:",
        "",
        *_table(summary["gain"], sign="+"),
        "",
        "GRPO does not train the score: its F1, AUROC and ECE are those of an untrained one, and "
        "where scores do not spread the weighted vote is the plain one.",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, Mapping[str, Interval]], *, sign: str = "") -> list[str]:
    cells: Iterable[list[str]] = (
        [name, *(_cell(found[key], sign) for key in METRICS)] for name, found in rows.items()
    )
    return markdown.table(["", *METRICS.values()], cells)


def _cell(found: Interval, sign: str) -> str:
    mean, half_width = found
    if math.isnan(mean):
        return "-"
    width = "" if math.isnan(half_width) else f" +- {half_width:.3f}"
    return f"{mean:{sign}.3f}{width}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="quickstart", help="file of configs/, without .toml")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT), choices=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2, help="processes of one run")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sandbox_study")
    parser.add_argument("--smoke", action="store_true", help="one step of one seed, nothing kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes FILE's name as .md")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every run")
    # Overrides may follow --seeds, whose list would otherwise swallow them.
    arguments, rest = parser.parse_known_intermixed_args(argv)
    seeds = list(dict.fromkeys(arguments.seeds))
    if rest or len(seeds) > len(T_QUANTILES) + 1:
        parser.error(f"expected section.key=value and at most ten seeds, got {rest or seeds}")
    config, methods = CONFIGS / f"{arguments.config}.toml", [*arguments.methods]
    if BASELINE not in methods:
        parser.error(f"expected {BASELINE} among the methods, which the others are compared with")
    load_config(config, arguments.overrides)
    facts = {"op": "sandbox_study"} | header(torch.device("cpu"))
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            where = (Path(folder), config, methods, [0], SMOKE)
            records = train_all(*where, num_ranks=1, warm_up_steps=1)
    else:
        where = (arguments.runs.resolve(), config, methods, seeds, arguments.overrides)
        records = train_all(*where, num_ranks=arguments.ranks)
    text = document(facts, records)
    print(text)
    if arguments.json:
        save(arguments.json, facts, records, text)


if __name__ == "__main__":
    main()
