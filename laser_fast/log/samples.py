"""One completion as a line of samples.jsonl, in the folder of a run and of an evaluation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from laser_fast.algorithm.score import is_correct, self_reward_score
from laser_fast.config import ConfigError
from laser_fast.log import jsonl
from laser_fast.records import FinishReason, Group


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    r"""One graded and scored completion: all that metrics need, without model or tokenizer.

    Example: the second of eight completions of "2+3=" is `SampleRecord(prompt_id="eval-17",
    sample=1, prompt="2+3=", gold="5", text="2+3 is \boxed{5}", answer="5", reward=1.0,
    score=0.8, score_logprob=-15.1, finish_reason="stop", num_tokens=9)`.

    `answer` is what votes, None if the completion gave none. `reward` is None if grading failed.
    `score` is 0 for an unfinished completion and None for a finished one that was not scored.
    `step` is the training step that sampled it, None in an evaluation. `total` is the reward with
    what further functions add, whose numbers are `extras`; None without such functions.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: int | None = None
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
    total: float | None = None
    extras: dict[str, float | None] | None = None

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
    extract: Callable[[str], str | None],
    step: int | None = None,
    limit: int | None = None,
) -> list[SampleRecord]:
    """Graded groups as records not scored yet, or `limit` of their completions, evenly spread.

    `extract` finds the answer of a text that enters the votes.
    """
    members = [(group, i) for group in groups for i in range(len(group.completions))]
    if limit is not None:
        count = min(limit, len(members))
        members = [members[index * len(members) // count] for index in range(count)]
    records = []
    for group, i in members:
        completion, text = group.completions[i], decode(group.completions[i].completion_ids)
        extras = group.extras[i] if group.extras else None
        record = SampleRecord(
            step=step,
            prompt_id=group.prompt.prompt_id,
            sample=i,
            prompt=group.prompt.text,
            gold=group.prompt.answer,
            text=text,
            answer=extract(text),
            reward=group.rewards[i],
            score=None if completion.is_finished else 0.0,
            score_logprob=completion.score_logprob,
            finish_reason=completion.finish_reason,
            num_tokens=len(completion.completion_ids),
            total=group.totals[i] if extras else None,
            extras=extras or None,
        )
        records.append(record)
    return records


def scored(
    records: Iterable[SampleRecord], *, beta: float, ref_logprob: float
) -> list[SampleRecord]:
    """The records with the scores of their log-probs (eq. 11); an undefined one is None."""
    found = []
    for record in records:
        score = None if record.is_finished else 0.0
        if record.score_logprob is not None:
            value = self_reward_score(record.score_logprob, beta=beta, ref_logprob=ref_logprob)
            score = value if math.isfinite(value) else None
        found.append(replace(record, score=score))
    return found


def mean_ref_logprob(logprobs: Iterable[float | None]) -> float:
    """What `score.ref_logprob = "auto"` means: their mean, without the unfinished (None)."""
    found = [logprob for logprob in logprobs if logprob is not None]
    if not found:
        raise ConfigError(
            'score.ref_logprob = "auto" (--ref-logprob auto) found no finished completion to '
            "measure; raise rollout.max_new_tokens or give a number"
        )
    return fmean(found)


def group_by_prompt(records: Sequence[SampleRecord]) -> list[list[SampleRecord]]:
    """The k records of each prompt, samples in order, prompts in the order of their first record.

    A ValueError says that there are none, a sample appears twice, or prompts differ in k.
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
    k = len(problems[records[0].prompt_id])
    for prompt_id, samples in problems.items():
        if len(samples) != k:
            raise ValueError(
                f"group_by_prompt: expected {k} samples of every prompt, got {len(samples)} of "
                f"{prompt_id}"
            )
    return [[samples[index] for index in sorted(samples)] for samples in problems.values()]


def to_line(record: SampleRecord) -> str:
    """One record as one line of JSON, without what is None where it need not be there."""
    fields, optional = asdict(record).items(), {"step", "total", "extras"}
    return jsonl.to_line({k: v for k, v in fields if v is not None or k not in optional})


def write_samples(path: str | Path, records: Iterable[SampleRecord]) -> None:
    """Write a file whole or not at all; `read_samples` gives the records back."""
    jsonl.replace_text(path, "".join(map(to_line, records)))


def read_samples(path: str | Path) -> list[SampleRecord]:
    """Read samples.jsonl; a line that is no such record is a ConfigError."""
    try:
        return TypeAdapter(list[SampleRecord]).validate_python(jsonl.read_lines(path))
    except ValidationError as error:
        problem = error.errors()[0]
        index, *field = problem["loc"]
        place = f"{path}, line {int(index) + 1}: {'.'.join(map(str, field))}"
        raise ConfigError(f"{place}: {problem['msg']}") from None
