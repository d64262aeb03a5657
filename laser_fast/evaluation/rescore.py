"""From the samples in an evaluation's folder to scores, report and plots; needs no model.

`laser-fast eval` ends with it, and `--rescore` is nothing else: other scores, grades or k from
samples that exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from laser_fast.config import ConfigError, RewardConfig
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.grading import Graders, answer_of
from laser_fast.evaluation.settings import Score
from laser_fast.evaluation.statistics import (
    DEFAULTS,
    Report,
    ReportOptions,
    SameAnswer,
    average,
    build_report,
)
from laser_fast.log.jsonl import read_json, replace_text, to_text
from laser_fast.log.samples import (
    SampleRecord,
    group_by_prompt,
    read_samples,
    rescore,
    write_samples,
)
from laser_fast.report.charts import evaluation_diagrams, save_png
from laser_fast.rewards import Grader


@dataclass(frozen=True, slots=True)
class Conclusion:
    """A finished evaluation: its folder and the content of report.json."""

    folder: EvalFolder
    report: dict[str, Any]


def conclude(
    folder: EvalFolder,
    about: Mapping[str, Mapping[str, Any]],
    *,
    score: Score | None,
    options: ReportOptions,
    same_answer: SameAnswer,
) -> Conclusion:
    """Score all samples, write report and plots; report.json comes last and marks the end.

    `about` holds what the report says of each benchmark besides its numbers. Without a `score` the
    recorded ones stay.
    """
    samples = {name: read_samples(folder.samples(name)) for name in about}
    content: dict[str, Any] = {}
    if score is not None:
        is_measured = score.ref_logprob == "auto"
        if is_measured:
            score = replace(score, ref_logprob=_mean_logprob(samples))
        for name, records in samples.items():
            samples[name] = rescore(records, beta=score.beta, ref_logprob=score.ref_logprob)
            write_samples(folder.samples(name), samples[name])
        content["score"] = {**asdict(score), "ref_logprob_is_measured": is_measured}
    reports: dict[str, Report] = {}
    draws = []
    for name, records in samples.items():
        report, drawn = build_report(records, name=name, same_answer=same_answer, options=options)
        reports[name] = {**about[name], **report}
        draws.append(drawn)
        diagrams = evaluation_diagrams(report, [asdict(record) for record in records])
        save_png(folder.plots(name), diagrams, columns=len(diagrams))
    content["benchmarks"] = reports
    if len(reports) > 1:
        content["average"] = average(list(reports.values()), draws)
    replace_text(folder.report, to_text(content))
    return Conclusion(folder, content)


def rescore_evaluation(
    source: Path,
    out: Path,
    *,
    beta: float | None = None,
    ref_logprob: str | None = None,
    reward: str | None = None,
    overwrite: bool = False,
    report: ReportOptions = DEFAULTS,
) -> Conclusion:
    """Write a second evaluation folder `out` from the samples of a first, or one samples.jsonl.

    None keeps the beta, the c_ref (a number or "auto") and the rewards of the samples.

    Raises:
        ConfigError: the source has no sound samples, the output is taken, or options do not fit.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*/samples.jsonl"))
    if not paths:
        raise ConfigError(
            f"--rescore {source}: expected the folder of an evaluation or its samples.jsonl"
        )
    root = paths[0].resolve().parent.parent
    if out.resolve() == root:
        raise ConfigError(f"--out {out} is where the samples come from; name a new folder")
    samples = {path.resolve().parent.name: _read(path, report) for path in paths}
    before = EvalFolder(root)
    begun = before.read_settings()
    score = _choose_score(begun.get("score") or {}, beta, ref_logprob)
    known = begun.get("benchmarks", {})
    changes = {} if reward is None else {"reward": reward, "format_gate": False}
    reports = read_json(before.report).get("benchmarks", {}) if before.report.is_file() else {}
    about = {
        name: {**_lasting(reports.get(name, {}), reward), "source": str(path)}
        for name, path in zip(samples, paths, strict=True)
    }
    folder = EvalFolder(out)
    settings = {
        **begun,
        "rescored_from": str(source),
        "benchmarks": {name: {**known.get(name, {}), **changes} for name in samples},
        "score": None if score is None else asdict(score),
    }
    folder.prepare(settings, overwrite=overwrite)
    rewards = RewardConfig(kind=reward or "math")
    with Graders(rewards) as graders:
        for name, records in samples.items():
            if reward is not None:
                records = _regrade(records, reward, graders.of(rewards))
            write_samples(folder.samples(name), records)
        return conclude(folder, about, score=score, options=report, same_answer=graders.same_answer)


def _mean_logprob(samples: Mapping[str, Sequence[SampleRecord]]) -> float:
    everything = [record for records in samples.values() for record in records]
    found = [record.score_logprob for record in everything if record.score_logprob is not None]
    if not found:
        raise ConfigError(
            "--ref-logprob auto found no finished completion to measure; raise "
            "rollout.max_new_tokens or give a number"
        )
    return fmean(found)


def _read(path: Path, options: ReportOptions) -> list[SampleRecord]:
    records = read_samples(path)
    try:
        num_samples = len(group_by_prompt(records)[0])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if max(options.ks or (1,)) > num_samples:
        raise ConfigError(f"--k {max(options.ks)}: {path} has {num_samples} samples per problem")
    return records


def _choose_score(
    before: Mapping[str, Any], beta: float | None, ref_logprob: str | None
) -> Score | None:
    """The score to compute; None leaves the recorded ones."""
    beta = before.get("beta") if beta is None else beta
    ref: float | str | None = before.get("ref_logprob") if ref_logprob is None else ref_logprob
    try:
        ref = ref if ref in (None, "auto") else float(ref)
    except ValueError:
        raise ConfigError(f'--ref-logprob: expected a number or "auto", got "{ref}"') from None
    if beta is None and ref is None:
        return None
    for name, value in (("--beta", beta), ("--ref-logprob", ref)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: expected a finite number, got {value}")
    if beta is None or ref is None:
        raise ConfigError("these samples come without settings; give both --beta and --ref-logprob")
    return Score(token=before.get("token"), beta=beta, ref_logprob=ref)


def _lasting(report: Mapping[str, Any], reward: str | None) -> dict[str, Any]:
    """What an earlier report says of the problems and still holds, be it with another reward."""
    keys = ["num_dropped"]
    if reward is None:
        keys += ["reward", "golds_rejected", "golds_unreadable"]
    known = {key: report[key] for key in keys if key in report}
    return known if reward is None else known | {"reward": reward}


def _regrade(records: Sequence[SampleRecord], kind: str, grader: Grader) -> list[SampleRecord]:
    """The records with the rewards and answers of another reward kind."""
    rewards = grader.grade(
        [record.text for record in records],
        [record.gold for record in records],
        prompts=[record.prompt for record in records],
    )
    return [
        replace(record, reward=reward, answer=answer_of(kind)(record.text))
        for record, reward in zip(records, rewards, strict=True)
    ]
