"""The few things that travel through a step, in the order in which they are made.

Shapes: P prompts, G completions of a prompt, B = P * G, T packed tokens, N head rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, tokenized.

    Example: `Prompt(prompt_id="train-17", text="2+3=", prompt_ids=(12, 4, 13, 9), answer="5")`.
    `prompt_id` is unique in its data set; sampling noise is keyed by it.
    """

    prompt_id: str
    text: str
    prompt_ids: tuple[int, ...]
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are drawn: pure sampling from the tempered distribution.

    `seed` names the draw: the same engine, weights, prompts and seed give the same completions.
    `needs_score` asks for the score log-prob of every finished completion.
    """

    group_size: int
    temperature: float
    max_new_tokens: int
    seed: int
    needs_score: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer.

    Example: ids `(5, 9, 2)` with EOS id 2, finish_reason "stop". The last id of a finished
    completion is an EOS id; a truncated one ("length") has none and therefore no score.

    `rollout_logprobs` are the sampler's log-probs of the chosen tokens, one per id, under the
    full distribution at the sampling temperature. `score_logprob` is log pi(z_c | x, y) read at
    the EOS position at temperature 1; None if unfinished or not asked for.
    """

    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    score_logprob: float | None = None

    def __post_init__(self) -> None:
        assert len(self.completion_ids) == len(self.rollout_logprobs)
        assert self.is_finished or self.score_logprob is None

    @property
    def is_finished(self) -> bool:
        """Whether the completion ended with EOS, so that a score exists."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt and its G completions; rewards and advantages are relative to the group.

    `rewards` holds one number per completion, None where grading failed; it is empty before the
    group is graded.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        assert not self.rewards or len(self.rewards) == len(self.completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSequence:
    """One completion with everything its training rows need; packing joins these.

    Example: prompt (7, 8), completion (5, 2), finished: the packed input is (7, 8, 5, 2); the
    head reads row 1 (label 5), row 2 (label 2) and row 3, the EOS row, with the score token as
    its label. Unfinished completions have no such row.

    `token_weight` already holds the global denominator of the aggregation, `score_weight` the
    class weight over the global number of finished completions; 0 trains nothing.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    has_score_row: bool
    advantage: float
    token_weight: float
    reward: float
    score_weight: float

    @property
    def num_tokens(self) -> int:
        """Packed length: the score row needs the EOS itself as an input token."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Packed sequences of one forward and backward, and the head rows to read from it.

    `rows` selects the N = N_p + N_s of T positions that carry a label: first the N_p rows that
    predict completion tokens, then the N_s score rows (the EOS positions); prompt rows never reach
    the head. `labels` is the score token and `temperature` 1 on score rows. Sequences of S are
    numbered in packing order.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarting at 0 with every sequence
    lengths: tuple[int, ...]  # S packed lengths, their sum is T
    rows: Tensor  # [N] int64
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N] float32
    sequence_ids: Tensor  # [N_p] int64
    rollout_logprobs: Tensor  # [N_p] float32
    advantages: Tensor  # [N_p] float32
    token_weight: Tensor  # [N_p] float32
    rewards: Tensor  # [N_s] float32
    score_weight: Tensor  # [N_s] float32

    @property
    def num_policy_rows(self) -> int:
        """N_p, where the score rows begin."""
        return len(self.advantages)
