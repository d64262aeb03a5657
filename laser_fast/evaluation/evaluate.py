"""Accuracy, voting and self-verification of a policy on held-out prompts.

`collect` has the effects (sampling, grading) and runs on every rank with that rank's prompts;
`summarize` is pure and runs on the records of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from laser_fast.evaluation.samples import SampleRecord, rescore
from laser_fast.evaluation.summary import EvalReport, summarize
from laser_fast.records import Group, Prompt, Sampling
from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rollout.engine import Engine


class AnswerGrader(Protocol):
    """What grading needs; `laser_fast.rewards.Grader` is one."""

    def grade(
        self, texts: list[str], answers: list[str], *, prompts: list[str]
    ) -> list[float | None]:
        """Reward of each completion text against its gold answer, None if grading failed."""


def evaluate(
    prompts: Sequence[Prompt],
    *,
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    grader: AnswerGrader,
    sampling: Sampling,
    beta: float,
    ref_logprob: float,
    same_answer: Callable[[str, str], bool] | None = None,
) -> EvalReport:
    """Sample, grade, score and summarize in one process; see `collect` and `summarize`."""
    records = collect(
        prompts,
        engine=engine,
        decode=decode,
        grader=grader,
        sampling=sampling,
        beta=beta,
        ref_logprob=ref_logprob,
    )
    return summarize(records, same_answer=same_answer)


def collect(
    prompts: Sequence[Prompt],
    *,
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    grader: AnswerGrader,
    sampling: Sampling,
    beta: float,
    ref_logprob: float,
    extract: Callable[[str], str | None] = extract_boxed,
) -> list[SampleRecord]:
    """Sample `sampling.group_size` completions of each prompt, grade and score them.

    Args:
        prompts: this rank's share; may be empty.
        engine: holds the weights to evaluate.
        decode: completion ids, EOS included, to text.
        grader: rewards of texts against gold answers.
        sampling: `group_size` is the k of the report.
        beta: scale of the score.
        ref_logprob: c_ref of the score.
        extract: the answer of a text that enters the votes, the last boxed one by default.
    """
    groups = engine.generate(prompts, sampling)
    return to_records(
        groups, decode=decode, grader=grader, beta=beta, ref_logprob=ref_logprob, extract=extract
    )


def to_records(
    groups: Sequence[Group],
    *,
    decode: Callable[[Sequence[int]], str],
    grader: AnswerGrader,
    beta: float,
    ref_logprob: float,
    extract: Callable[[str], str | None] = extract_boxed,
) -> list[SampleRecord]:
    """Grade and score completions that are already sampled; arguments as in `collect`."""
    members = [
        (group.prompt, sample, completion)
        for group in groups
        for sample, completion in enumerate(group.completions)
    ]
    texts = [decode(completion.completion_ids) for _, _, completion in members]
    rewards = grader.grade(
        texts,
        [prompt.answer for prompt, _, _ in members],
        prompts=[prompt.text for prompt, _, _ in members],
    )
    records = [
        SampleRecord(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.text,
            gold=prompt.answer,
            text=text,
            answer=extract(text),
            reward=reward,
            score=None,
            score_logprob=completion.score_logprob,
            finish_reason=completion.finish_reason,
            num_tokens=len(completion.completion_ids),
        )
        for (prompt, sample, completion), text, reward in zip(members, texts, rewards, strict=True)
    ]
    return rescore(records, beta=beta, ref_logprob=ref_logprob)
