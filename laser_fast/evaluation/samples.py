"""One evaluated completion as a record: all that the metrics need, without model or tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from laser_fast.algorithm.score import is_correct, self_reward_score
from laser_fast.config import ConfigError
from laser_fast.observe import jsonl
from laser_fast.records import FinishReason

_NUMBER = (int, float, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt_id": (str,),
    "sample": (int,),
    "prompt": (str,),
    "gold": (str,),
    "text": (str,),
    "answer": (str, type(None)),
    "reward": _NUMBER,
    "score": _NUMBER,
    "score_logprob": _NUMBER,
    "finish_reason": (str,),
    "num_tokens": (int,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    r"""One graded and scored completion of a held-out prompt.

    Example: the second of eight completions of "2+3=" is `SampleRecord(prompt_id="eval-17",
    sample=1, prompt="2+3=", gold="5", text="2+3 is \boxed{5}", answer="5", reward=1.0,
    score=0.8, score_logprob=-15.1, finish_reason="stop", num_tokens=9)`.

    `answer` is what votes, None if the completion gave none. `reward` is None if grading failed.
    `score` is 0 for an unfinished completion and None for a finished one that was not scored.
    """

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


def write_samples(path: str | Path, records: Iterable[SampleRecord]) -> None:
    """Write the records as JSON lines, whole or not at all; `read_samples` gives them back."""
    jsonl.write_lines(path, (asdict(record) for record in records))


def read_samples(path: str | Path) -> list[SampleRecord]:
    """Read what `write_samples` wrote.

    Raises:
        ConfigError: a line that is no such record; the message names file, line and field.
    """
    records = []
    for number, line in enumerate(jsonl.read_lines(path), 1):
        if line.keys() != _KINDS.keys():
            wrong = ", ".join(sorted(line.keys() ^ _KINDS.keys()))
            raise ConfigError(f"{path}, line {number}: missing or unknown field {wrong}")
        for name, kinds in _KINDS.items():
            if not isinstance(line[name], kinds) or isinstance(line[name], bool):
                raise ConfigError(f"{path}, line {number}: unexpected {name}: {line[name]!r:.60}")
        records.append(SampleRecord(**line))
    return records
