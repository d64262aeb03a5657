"""Ways to train the score, against GRPO, on the sandbox's tasks over several seeds.

    python -m bench.sandbox_study --seeds 0 1 2 --json FILE [section.key=value ...]
    python -m bench.sandbox_study --config sandbox_hard --methods GRPO "LaSeR, last, floating" ...
    python -m bench.sandbox_study --tune 1e-4 2e-4 ...  with the learning rate of each method
    python -m bench.sandbox_study --tune 1e-4 2e-4 --seeds           those trials alone
    python -m bench.sandbox_study --smoke               one step of everything

Every run is `torchrun -m laser_fast train configs/quickstart.toml` with a seed of its own; the
methods of one seed start from the same warm-started model and see the same prompts. Numbers are
those of the held-out problems after the last step. Intervals are Student's over the seeds, 95%:
they say how another seed would come out, not how other problems would. `--tune` tries each method
at each of its rates on a seed that is not reported and keeps the best, so that all methods have the
same budget: the most accurate one, of those that reach MIN_F1 if one does. Runs that are finished
are not repeated, so a study that was killed goes on; with `--jobs 2 --ranks 1` two run at a time.
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
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from bench import markdown
from bench.provenance import ROOT, header, save
from laser_fast.config import Config, all_keys, load_config
from laser_fast.log import jsonl
from laser_fast.log.run_folder import RunFolder
from laser_fast.sandbox.model import STEPS, make_sandbox_model

CONFIGS = ROOT / "configs"
_EOS, _LAST = ("score.position=eos",), ("score.position=last",)
_CONSTANT, _FLOATING = ("score.ref_logprob=auto",), ("score.ref_logprob=floating",)
METHODS = {
    "LaSeR": (*_EOS, *_CONSTANT),  # as in the paper
    "LaSeR without mixing": (*_EOS, *_CONSTANT, "advantage.score_coef=0.0"),
    "LaSeR, floating": (*_EOS, *_FLOATING),
    "LaSeR, last": (*_LAST, *_CONSTANT),
    "LaSeR, last, floating": (*_LAST, *_FLOATING),  # as in the configurations
    "LaSeR, half": (*_EOS, *_FLOATING, "score.max_grad_ratio=0.5"),
    "LaSeR, late": (*_LAST, *_FLOATING, "score.warmup_steps=40"),
    "LaSeR, policy-moment": (*_LAST, *_FLOATING),
    "LaSeR, two-moment": (*_LAST, *_FLOATING),
    "LaSeR, projected": (*_LAST, *_FLOATING),
    "LaSeR, centred": (*_LAST, *_FLOATING),
    "GRPO": (*_EOS, *_CONSTANT, "score.loss_coef=0.0", "advantage.score_coef=0.0"),
}
BASELINE = "GRPO"
DEFAULT = ("LaSeR", "LaSeR without mixing", BASELINE)
# What a score has to reach in a trial to count, and the seed of trials, which nothing reports.
MIN_F1, TUNING_SEED = 0.75, 100
# Those that are not in the trainer, by the last word of their name.
VARIANTS = ("policy-moment", "two-moment", "projected", "centred")
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "f1_calibrated": "F1, calibrated threshold",
    "auroc": "AUROC",
    "auroc_within": "AUROC within problems",
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
# Keys of files, which a run writes into its configuration as it finds them.
PLACES = ("output_dir", "model.path", "data.train", "data.eval")
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


class Trial(NamedTuple):
    """One run: a method from a seed, at a learning rate; None leaves the configuration's."""

    method: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """The folder's."""
        rate = "" if self.rate is None else f"_lr{self.rate:g}"
        return f"{self.method.lower().replace(',', '').replace(' ', '_')}_{self.seed}{rate}"


class Setting(NamedTuple):
    """Where all runs lie, and how they are made."""

    folder: Path
    config: Path
    overrides: Sequence[str]
    num_ranks: int
    num_jobs: int = 1
    warm_up_steps: int = STEPS

    def base(self, seed: int) -> Path:
        """The model that all runs of a seed start from; it knows the task of the configuration."""
        return self.folder / f"base_{load_config(self.config).model.path}_{seed}"


def train_all(setting: Setting, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Make every run; one record per trial, finished ones read again."""
    for seed in dict.fromkeys(trial.seed for trial in trials):
        base = setting.base(seed)
        if not (base / "model.safetensors").exists():
            print(f"seed {seed}: warm-starting the base model", flush=True)
            task = load_config(setting.config).model.path
            make_sandbox_model(base, seed=seed, task=task, steps=setting.warm_up_steps)

    def record(trial: Trial) -> dict[str, Any]:
        run = setting.folder / trial.name
        changes = [f"seed={trial.seed}", f"output_dir={run}"]
        changes += [f"model.path={setting.base(trial.seed)}", *setting.overrides]
        if trial.rate is not None:
            changes.append(f"optim.lr={trial.rate}")
        train(run, setting.config, trial.method, changes, num_ranks=setting.num_ranks)
        result = trial._asdict() | read_result(run)
        print(f"{trial.name}: " + ", ".join(
            f"{label} {_number(result['after'].get(key))}" for key, label in METRICS.items()
        ), flush=True)  # fmt: skip
        return result

    if setting.num_jobs == 1:
        return [record(trial) for trial in trials]
    with ThreadPoolExecutor(setting.num_jobs) as jobs:
        return list(jobs.map(record, trials))


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each method: the most accurate, of those whose F1 suffices if one's does."""

    def quality(record: Mapping[str, Any]) -> tuple[bool, float]:
        after = record["after"]
        has_score = record["method"] == BASELINE or (after["f1"] or 0.0) >= MIN_F1
        return has_score, after["accuracy"]

    methods = dict.fromkeys(record["method"] for record in records)
    return {
        method: max((r for r in records if r["method"] == method), key=quality)["rate"]
        for method in methods
    }


def train(
    run: Path, config: Path, method: str, overrides: Sequence[str], *, num_ranks: int
) -> None:
    """Start one run and wait for it; a finished run of the same configuration stays as it is."""
    folder, overrides = RunFolder(run), [*METHODS[method], *overrides]
    if folder.summary.exists():
        if not other_values(load_config(folder.config), load_config(config, overrides)):
            return
        sys.exit(f"{run} holds a finished run of another configuration; choose another --runs")
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m"]
    variant = method.rpartition(" ")[2]
    command += ["bench.score_variants", variant] if variant in VARIANTS else ["laser_fast"]
    command += ["train", str(config)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("w") as log:  # a rate has a dot
        result = subprocess.run([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        sys.exit(f"{run} failed with exit code {result.returncode}; see {log.name}")


def other_values(found: Config, wanted: Config) -> list[str]:
    """What a run has otherwise than wanted, as "key = value", wherever its files lie."""
    values = ((key, attrgetter(key)) for key in all_keys(Config) if key not in PLACES)
    return [f"{key} = {get(found)}" for key, get in values if get(found) != get(wanted)]


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


def document(
    facts: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The study as Markdown; `trials` are what the learning rates were chosen from."""
    title = f"# {facts.get('task', 'sandbox')} with "
    head = [f"- {key}: {value}" for key, value in facts.items()]
    if not records:
        methods = dict.fromkeys(trial["method"] for trial in trials)
        return "\n".join([title + "; ".join(methods), "", *head, *_tuning(trials)]) + "\n"
    summary = summarize(records)
    after = records[-1]["after"]
    seeds = sorted({record["seed"] for record in records})
    seconds = {
        method: fmean(record["wall_seconds"] for record in records if record["method"] == method)
        for method in summary["after"]
    }
    lines = [
        title + "; ".join(seconds),
        "",
        *head,
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
        *_tuning(trials),
    ]
    return "\n".join(lines) + "\n"


def _tuning(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    if not trials:
        return []
    chosen = best_rates(trials)
    columns = ("accuracy", "f1", "auroc", "auroc_within")
    cells = [
        [
            trial["method"],
            f"{trial['rate']:g}" + " (chosen)" * (trial["rate"] == chosen[trial["method"]]),
            *(_number(trial["after"].get(key)) for key in columns),
        ]
        for trial in trials
    ]
    return [
        "",
        f"Learning rates, tried on seed {TUNING_SEED}: the most accurate, of those with F1 of "
        f"{MIN_F1} or more if there is one.",
        "",
        *markdown.table(["", "rate", *(METRICS[key] for key in columns)], cells),
    ]


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
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tune", type=float, nargs="+", metavar="RATE", default=[])
    parser.add_argument("--ranks", type=int, default=2, help="processes of one run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sandbox_study")
    parser.add_argument("--smoke", action="store_true", help="one step of one seed, nothing kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes FILE's name as .md")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every run")
    # Overrides may follow --seeds, whose list would otherwise swallow them.
    arguments, rest = parser.parse_known_intermixed_args(argv)
    seeds = list(dict.fromkeys(arguments.seeds))
    if rest or len(seeds) > len(T_QUANTILES) + 1 or TUNING_SEED in seeds:
        parser.error(
            f"expected section.key=value and at most ten seeds, none {TUNING_SEED}, "
            f"got {rest or seeds}"
        )
    config, methods = CONFIGS / f"{arguments.config}.toml", [*arguments.methods]
    if BASELINE not in methods:
        parser.error(f"expected {BASELINE} among the methods, which the others are compared with")
    load_config(config, arguments.overrides)
    facts = {"op": "sandbox_study", "task": load_config(config).model.path}
    facts |= header(torch.device("cpu"))
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(Path(folder), config, SMOKE, num_ranks=1, warm_up_steps=1)
            records = train_all(setting, [Trial(method, 0) for method in methods])
        text = document(facts, records)
    else:
        folder, how = arguments.runs.resolve(), (arguments.ranks, arguments.jobs)
        setting = Setting(folder, config, arguments.overrides, *how)
        pairs = [(method, rate) for method in methods for rate in arguments.tune]
        trials = train_all(setting, [Trial(method, TUNING_SEED, rate) for method, rate in pairs])
        rates = best_rates(trials)
        runs = [Trial(method, seed, rates.get(method)) for seed in seeds for method in methods]
        records = train_all(setting, runs)
        text = document(facts, records, trials)
        records = [*trials, *records]
    print(text)
    if arguments.json:
        save(arguments.json, facts, records, text)


if __name__ == "__main__":
    main()
