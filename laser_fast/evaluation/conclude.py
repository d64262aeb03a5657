"""From the samples in an evaluation's folder to scores, report and plots; needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.plots import draw_plots
from laser_fast.evaluation.report import Report, ReportOptions, average, build_report
from laser_fast.evaluation.samples import SampleRecord, read_samples, rescore, write_samples
from laser_fast.observe.jsonl import replace_text, to_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclusion:
    """A finished evaluation: its folder and the content of report.json."""

    folder: EvalFolder
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How score log-probs become scores.

    `ref_logprob` None takes the mean score log-prob of all finished samples: right for a model
    that never trained a score.
    """

    token: str | None
    beta: float
    ref_logprob: float | None

    def to_dict(self) -> dict[str, Any]:
        """As settings.json has it."""
        ref_logprob = "auto" if self.ref_logprob is None else self.ref_logprob
        return {"token": self.token, "beta": self.beta, "ref_logprob": ref_logprob}


def conclude(
    folder: EvalFolder,
    about: Mapping[str, Mapping[str, Any]],
    *,
    score: Score | None,
    options: ReportOptions,
    same_answer: Callable[[str, str], bool],
) -> Conclusion:
    """Score all samples, write report and plots; report.json comes last and marks the end.

    Args:
        folder: holds the samples of every benchmark.
        about: by benchmark, what its report says besides the numbers.
        score: how to score; None keeps the recorded scores.
        options: see `ReportOptions`.
        same_answer: equivalence of two answers in the votes.
    """
    samples = {name: read_samples(folder.samples(name)) for name in about}
    if score is not None:
        everything = [record for records in samples.values() for record in records]
        is_measured = score.ref_logprob is None
        ref_logprob = _mean_logprob(everything) if is_measured else score.ref_logprob
        score = replace(score, ref_logprob=ref_logprob)
        for name, records in samples.items():
            samples[name] = rescore(records, beta=score.beta, ref_logprob=ref_logprob)
            write_samples(folder.samples(name), samples[name])
    reports: dict[str, Report] = {}
    draws = []
    for name, records in samples.items():
        report, drawn = build_report(records, same_answer=same_answer, options=options)
        reports[name] = {**about[name], **report}
        draws.append(drawn)
        draw_plots(name, records, reports[name], folder.plots(name))
    content: dict[str, Any] = {"benchmarks": reports}
    if score is not None:
        content["score"] = {**score.to_dict(), "ref_logprob_is_measured": is_measured}
    if len(reports) > 1:
        content["average"] = average(list(reports.values()), draws)
    replace_text(folder.report, to_text(content))
    return Conclusion(folder=folder, report=content)


def _mean_logprob(records: Sequence[SampleRecord]) -> float:
    found = [record.score_logprob for record in records if record.score_logprob is not None]
    if not found:
        raise ConfigError(
            "--ref-logprob auto found no finished completion to measure; raise "
            "rollout.max_new_tokens or give a number"
        )
    return fmean(found)
