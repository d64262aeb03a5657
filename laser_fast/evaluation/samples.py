"""One evaluated completion as a record: all that the metrics need, without model or tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from laser_fast.algorithm.score import is_correct, self_reward_score
from laser_fast.config import ConfigError
from laser_fast.log import jsonl
from laser_fast.records import FinishReason, Group
from laser_fast.rewards import Grader
from laser_fast.rewards.boxed import extract_boxed


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    r"""One graded and scored completion of a held-out prompt.

    Example: the second of eight completions of "2+3=" is `SampleRecord(prompt_id="eval-17",
    sample=1, prompt="2+3=", gold="5", text="2+3 is \boxed{5}", answer="5", reward=1.0,
    score=0.8, score_logprob=-15.1, finish_reason="stop", num_tokens=9)`.

    `answer` is what votes, None if the completion gave none. `reward` is None if grading failed.
    `score` is 0 for an unfinished completion and None for a finished one that was not scored.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    prompt_id: str
    sample: int
    prompt: str
    gold: str
    text: str
    answer: str | None
    reward: float | None
    score: float | None
    score_logprob: float | None
    finish_reason: FinishReason
    num_tokens: int

    @property
    def is_finished(self) -> bool:
        """Whether the completion ended with EOS, so that it can have a score."""
        return self.finish_reason == "stop"

    @property
    def is_correct(self) -> bool:
        """Whether the verifier graded it correct; False if grading failed."""
        return self.reward is not None and bool(is_correct(self.reward))


def to_records(
    groups: Sequence[Group],
    *,
    decode: Callable[[Sequence[int]], str],
    grader: Grader,
    beta: float,
    ref_logprob: float,
    extract: Callable[[str], str | None] = extract_boxed,
) -> list[SampleRecord]:
    """Grade and score sampled completions.

    Args:
        groups: completions, of this rank alone; may be empty.
        decode: completion ids, EOS included, to text.
        grader: rewards of texts against gold answers.
        beta: scale of the score.
        ref_logprob: c_ref of the score.
        extract: the answer of a text that enters the votes, the last boxed one by default.
    """
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


def rescore(
    records: Iterable[SampleRecord], *, beta: float, ref_logprob: float
) -> list[SampleRecord]:
    """The records with scores beta (score_logprob - ref_logprob) (eq. 11), 0 where unfinished."""
    rescored = []
    for record in records:
        score = None if record.is_finished else 0.0
        if record.score_logprob is not None:
            score = self_reward_score(record.score_logprob, beta=beta, ref_logprob=ref_logprob)
        rescored.append(replace(record, score=score))
    return rescored


def group_by_prompt(records: Sequence[SampleRecord]) -> list[list[SampleRecord]]:
    """The k records of each prompt, samples in order, prompts in the order of their first record.

    Raises:
        ValueError: no records, a (prompt, sample) twice, or prompts with different k.
    """
    if not records:
        raise ValueError("group_by_prompt: expected at least one record, got none")
    problems: dict[str, dict[int, SampleRecord]] = {}
    for record in records:
        samples = problems.setdefault(record.prompt_id, {})
        if record.sample in samples:
            raise ValueError(
                f"group_by_prompt: sample {record.sample} of prompt {record.prompt_id} appears "
                "twice; gather every rank's records once and give each prompt its own id"
            )
        samples[record.sample] = record
    expected = len(problems[records[0].prompt_id])
    for prompt_id, samples in problems.items():
        if len(samples) != expected:
            raise ValueError(
                f"group_by_prompt: expected {expected} samples of every prompt, "
                f"got {len(samples)} of {prompt_id}"
            )
    return [[samples[index] for index in sorted(samples)] for samples in problems.values()]


def write_samples(path: str | Path, records: Iterable[SampleRecord]) -> None:
    """Write the records as JSON lines, whole or not at all; `read_samples` gives them back."""
    jsonl.write_lines(path, (asdict(record) for record in records))


def read_samples(path: str | Path) -> list[SampleRecord]:
    """Read what `write_samples` wrote.

    Raises:
        ConfigError: a line that is no such record; the message names file, line and field.
    """
    validate = TypeAdapter(SampleRecord).validate_python
    records = []
    for number, line in enumerate(jsonl.read_lines(path), 1):
        try:
            records.append(validate(line))
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise ConfigError(f"{path}, line {number}: {field}: {problem['msg']}") from None
    return records
