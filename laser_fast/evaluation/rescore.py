"""From the samples in an evaluation's folder to scores and report; needs no model.

`laser-fast eval` ends with it, and `laser-fast rescore` is nothing else: other scores, grades or k
from samples that exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from laser_fast.algorithm.vote import Calibrated
from laser_fast.config import RewardConfig, ScoreConfig
from laser_fast.config_errors import ConfigError, apply_override
from laser_fast.evaluation.benchmarks import Graders, answer_of
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.settings import known_ref_logprob, read_score_settings, store_calibrated
from laser_fast.evaluation.statistics import ReportOptions, average, build_report
from laser_fast.log.jsonl import replace_text, to_text
from laser_fast.log.samples import (
    SampleRecord,
    group_by_prompt,
    mean_ref_logprob,
    read_samples,
    scored,
    write_samples,
)
from laser_fast.rewards import Grader


def finish_evaluation(folder: EvalFolder, options: ReportOptions, graders: Graders) -> EvalFolder:
    """Score all samples and write the report, which comes last and marks the end.

    Without a score in the folder's settings the recorded ones stay.
    """
    settings = folder.read_settings()
    samples = {name: read_samples(folder.samples(name)) for name in settings["benchmarks"]}
    content: dict[str, Any] = {}
    if score := settings["score"]:
        is_measured = score["ref_logprob"] == "auto"
        logprobs = [record.score_logprob for records in samples.values() for record in records]
        ref_logprob = mean_ref_logprob(logprobs) if is_measured else score["ref_logprob"]
        for name, records in samples.items():
            samples[name] = scored(records, beta=score["beta"], ref_logprob=ref_logprob)
            write_samples(folder.samples(name), samples[name])
        measured = {"ref_logprob": ref_logprob, "ref_logprob_is_measured": is_measured}
        content["score"] = {"token": None, **score, **measured}
    reports: dict[str, Any] = {}
    draws, same = [], graders.same_answer
    for name, records in samples.items():
        known, reading = settings["benchmarks"][name], options
        stored = settings.get("calibrated")
        if stored and stored["by"] != name:  # these problems did not choose it
            read_by = Calibrated(**{key: stored[key] for key in asdict(Calibrated())})
            reading = replace(options, calibrated=read_by)
        report, drawn = build_report(records, name=name, same_answer=same, options=reading)
        known = {key: known[key] for key in ("source", "reward", "num_dropped") if key in known}
        reports[name] = {**known, **settings["golds"].get(name, {}), **report}
        draws.append(drawn)
    content["benchmarks"] = reports
    if len(reports) > 1:
        content["average"] = average(list(reports.values()), draws)
    replace_text(folder.report, to_text(content))
    return folder


def rescore_evaluation(
    source: Path,
    out: Path,
    report: ReportOptions,
    *,
    beta: float | None = None,
    ref_logprob: str | None = None,
    reward: str | None = None,
    store: Path | None = None,
    overwrite: bool = False,
) -> EvalFolder:
    """Write a second evaluation folder `out` from the samples of a first, or one samples.jsonl.

    None keeps the beta, the c_ref (a number or "auto") and the rewards of the samples. `store` is
    the folder of the model, whose laser_fast.json gets what all problems say of its scores. A
    ConfigError names what does not fit, or says that the output is taken.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*/samples.jsonl"))
    if not paths:
        raise ConfigError(f"{source}: expected the folder of an evaluation or its samples.jsonl")
    root = paths[0].resolve().parent.parent
    if store is not None and len(paths) != 1:
        raise ConfigError(f"--store: name the samples.jsonl of one benchmark of {source}")
    if store is not None and not read_score_settings(store):
        raise ConfigError(f"--store {store}: expected the exported model that gave the samples")
    if out.resolve() == root:
        raise ConfigError(f"{out} is where the samples come from; name a new folder")
    begun = EvalFolder(root).read_settings()
    score = _choose_score(begun.get("score") or {}, beta, ref_logprob)
    field = "score_logprob" if score else "score"  # that the new scores are made of
    samples = {path.resolve().parent.name: _read(path, report, field) for path in paths}
    known = begun.get("benchmarks", {})
    changes = {} if reward is None else {"reward": reward, "format_gate": False}
    folder = EvalFolder(out)
    settings = {
        **begun,
        "rescored_from": str(source),
        "benchmarks": {
            name: {**known.get(name, {}), **changes, "source": str(path)}
            for name, path in zip(samples, paths, strict=True)
        },
        # What it said of the golds was the other reward's word.
        "golds": begun.get("golds", {}) if reward is None else {},
        "score": score,
    }
    if (store, beta, ref_logprob, reward) != (None,) * 4:
        settings["calibrated"] = None  # to be measured, or of other scores or rewards
    folder.prepare(settings, overwrite=overwrite)
    rewards = RewardConfig(kind=reward or "math")
    with Graders(rewards) as graders:
        for name, records in samples.items():
            if reward is not None:
                records = _regrade(records, reward, graders.of(rewards))
            write_samples(folder.samples(name), records)
        finish_evaluation(folder, report, graders)
    if store is not None:
        (name,), content = samples, folder.read_report()
        found = content["benchmarks"][name]["calibrated"]
        if not found or "score" not in content:
            raise ConfigError(f"--store: {source} has no scores of known beta and c_ref")
        store_calibrated(store, content["score"], Calibrated(**found), name)
    return folder


def _read(path: Path, options: ReportOptions, field: str) -> list[SampleRecord]:
    """The samples of a benchmark, whose finished ones have all of them a `field`, or none."""
    records = read_samples(path)
    given = [getattr(record, field) is not None for record in records if record.is_finished]
    if 0 < sum(given) < len(given):
        raise ConfigError(
            f"{path}: expected a {field} of all {len(given)} finished completions or of none, got "
            f"{sum(given)}; leave out the problems that lack one, or set all to null"
        )
    try:
        num_samples = len(group_by_prompt(records)[0])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    k = max(options.ks or (1,))
    if k > num_samples:
        raise ConfigError(f"--k {k}: {path} has {num_samples} samples per problem")
    return records


def _choose_score(
    before: Mapping[str, Any], beta: float | None, ref_logprob: str | None
) -> dict[str, Any] | None:
    """The score to compute, as in settings.json; None leaves the recorded ones."""
    values = {key: value for key, value in before.items() if value is not None}
    for key, value in (("beta", beta), ("ref_logprob", ref_logprob)):
        if value is not None:
            apply_override(values, f"{key}={value}")
    if not values:
        return None
    if not {"beta", "ref_logprob"} <= values.keys():
        raise ConfigError("these samples come without settings; give both --beta and --ref-logprob")
    chosen = ScoreConfig.parse(values, source="options")
    known_ref_logprob(chosen)  # is none that floats
    return chosen.model_dump(include=set(values))


def _regrade(records: Sequence[SampleRecord], kind: str, grader: Grader) -> list[SampleRecord]:
    """The records with the rewards and answers of another reward kind."""
    texts, golds, prompts = zip(*((r.text, r.gold, r.prompt) for r in records), strict=True)
    found = zip(records, grader.grade(texts, golds, prompts=prompts), strict=True)
    return [replace(r, reward=reward, answer=answer_of(kind)(r.text)) for r, reward in found]
