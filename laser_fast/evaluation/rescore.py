"""`laser-fast eval --rescore`: other scores, grades or k from samples that exist; no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError, RewardConfig
from laser_fast.evaluation.answers import answer_of
from laser_fast.evaluation.conclude import Conclusion, Score, conclude
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.graders import Graders
from laser_fast.evaluation.report import ReportOptions
from laser_fast.evaluation.samples import SampleRecord, read_samples, write_samples
from laser_fast.evaluation.settings import read_ref_logprob
from laser_fast.evaluation.summary import group_by_prompt
from laser_fast.rewards import Grader

Samples = dict[str, list[SampleRecord]]  # by benchmark


@dataclass(frozen=True, kw_only=True, slots=True)
class RescoreOptions:
    """What changes; None keeps what the samples were made with."""

    source: Path  # folder of an evaluation, or one samples.jsonl
    out: Path
    beta: float | None = None
    ref_logprob: str | None = None  # a number or "auto"
    reward: str | None = None
    timeout_s: float = 10.0
    overwrite: bool = False
    report: ReportOptions = ReportOptions()


def rescore_evaluation(options: RescoreOptions) -> Conclusion:
    """Write a second evaluation folder from the samples of a first.

    Raises:
        ConfigError: the source has no sound samples, the output is taken, or options do not fit.
    """
    paths, before = _find_samples(options.source)
    if options.out.resolve() in [path.parent.parent.resolve() for path in paths.values()]:
        raise ConfigError(f"--out {options.out} is where the samples come from; name a new folder")
    samples = {name: _read(path, options.report) for name, path in paths.items()}
    score = _choose_score(before.get("score"), options)
    known = before.get("benchmarks", {})
    changes = {} if options.reward is None else {"reward": options.reward}
    about = {name: {"source": str(paths[name]), **changes} for name in samples}
    folder = EvalFolder(options.out)
    folder.prepare(
        {
            **before,
            "rescored_from": str(options.source),
            "benchmarks": {name: {**known.get(name, {}), **changes} for name in samples},
            "score": None if score is None else score.to_dict(),
        },
        overwrite=options.overwrite,
    )
    reward = RewardConfig(kind=options.reward or "math", timeout_s=options.timeout_s)
    with Graders(reward) as graders:
        for name, records in samples.items():
            if options.reward is not None:
                records = _regrade(records, reward.kind, graders.of(reward))
            folder.samples(name).parent.mkdir(exist_ok=True)
            write_samples(folder.samples(name), records)
        return conclude(
            folder,
            about,
            score=score,
            options=options.report,
            same_answer=graders.same_answer,
        )


def _find_samples(source: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The samples by benchmark, and the settings beside them if there are any."""
    if source.is_file():
        root, paths = source.resolve().parent.parent, [source]
    else:
        root, paths = source, sorted(source.glob("*/samples.jsonl"))
    if not paths:
        raise ConfigError(
            f"--rescore {source}: expected the folder of an evaluation or its samples.jsonl"
        )
    settings = EvalFolder(root).settings
    before = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    return {path.resolve().parent.name: path for path in paths}, before


def _read(path: Path, options: ReportOptions) -> list[SampleRecord]:
    records = read_samples(path)
    try:
        num_samples = len(group_by_prompt(records)[0])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if max(options.ks or (1,)) > num_samples:
        raise ConfigError(f"--k {max(options.ks)}: {path} has {num_samples} samples per problem")
    return records


def _choose_score(before: dict[str, Any] | None, options: RescoreOptions) -> Score | None:
    """The score to compute; None leaves the recorded ones."""
    before = before or {}
    beta = before.get("beta") if options.beta is None else options.beta
    ref_logprob = before.get("ref_logprob")
    if options.ref_logprob is not None:
        ref_logprob = read_ref_logprob(options.ref_logprob)
    if beta is None and ref_logprob is None:
        return None
    if beta is None or ref_logprob is None:
        raise ConfigError("these samples come without settings; give both --beta and --ref-logprob")
    return Score(
        token=before.get("token"),
        beta=beta,
        ref_logprob=None if ref_logprob == "auto" else ref_logprob,
    )


def _regrade(records: Sequence[SampleRecord], kind: str, grader: Grader) -> list[SampleRecord]:
    """The records with the rewards and answers of another reward kind."""
    extract = answer_of(kind)
    rewards = grader.grade(
        [record.text for record in records],
        [record.gold for record in records],
        prompts=[record.prompt for record in records],
    )
    return [
        replace(record, reward=reward, answer=extract(record.text))
        for record, reward in zip(records, rewards, strict=True)
    ]
