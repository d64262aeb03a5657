"""The few things that travel through a step, in the order in which they are made.

Shapes: P prompts, G completions of a prompt, B = P * G, T packed tokens, N head rows.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor

FinishReason = Literal["stop", "length"]
ScorePosition = Literal["eos", "last"]
"""Whose row the score is read from: that of the EOS, or the last before, which predicts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """The token ids that the algorithm depends on, checked by `model.vocabulary.load_vocabulary`.

    `vocab_size` is the tokenizer's: rows of the head from there on are padding and never sampled.
    """

    score_token_id: int  # z_c: never sampled, read at the end of an answer
    eos_token_ids: tuple[int, ...]  # every id that ends a completion
    pad_token_id: int  # may equal an EOS id
    vocab_size: int

    def __post_init__(self) -> None:
        assert self.eos_token_ids and self.score_token_id not in self.eos_token_ids
        ids = (self.score_token_id, *self.eos_token_ids)
        assert all(0 <= token_id < self.vocab_size for token_id in ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, tokenized.

    Example: `Prompt(prompt_id="train-17", text="2+3=", prompt_ids=(12, 4, 13, 9), answer="5")`.
    `prompt_id` is unique in its data set; sampling noise is keyed by it. `fields` is a JSON object
    of what a reward function asks for besides. `source` names the data set where a run has several.
    """

    prompt_id: str
    text: str
    prompt_ids: tuple[int, ...]
    answer: str
    fields: str = "{}"
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are drawn: pure sampling from the tempered distribution.

    `seed` names the draw: the same engine, weights, prompts and seed give the same completions.
    `score_at` asks for the score log-prob of every finished completion, read there. `min_p`,
    `top_k` and `top_p` leave tokens out, in this order, and log-probs as they are.
    """

    group_size: int
    temperature: float
    max_new_tokens: int
    seed: int
    score_at: ScorePosition | None = "eos"
    top_p: float = 1.0
    top_k: int = 0  # all
    min_p: float = 0.0

    @property
    def num_steps(self) -> int:
        """Most decode steps of a completion: one after it if the score is read at its EOS."""
        return self.max_new_tokens + (self.score_at == "eos")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer.

    Example: ids `(5, 9, 2)` with EOS id 2, finish_reason "stop". The last id of a finished
    completion is an EOS id; a truncated one ("length") has none and therefore no score.

    `rollout_logprobs` are the sampler's log-probs of the chosen tokens, one per id, under the
    full distribution at the sampling temperature. `score_logprob` is log pi(z_c | x, y) at
    temperature 1, read where the sampling asked for it; None if unfinished or not asked for.
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

    `rewards` holds the verifier's number of each completion, None where grading failed; `totals`,
    which advantages read, the same with what further functions add, whose numbers are in `extras`,
    by name. All are empty before the group is graded.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...] = ()
    totals: tuple[float | None, ...] = ()
    extras: tuple[dict[str, float | None], ...] = ()

    def __post_init__(self) -> None:
        for numbers in (self.rewards, self.totals, self.extras):
            assert len(numbers) in (0, len(self.completions))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSequence:
    """One completion with everything its training rows need; packing joins these.

    Example: prompt (7, 8), completion (5, 2), finished, `score_at` "eos": the packed input is
    (7, 8, 5, 2); the head reads row 1 (label 5), row 2 (label 2) and row 3, the EOS row, with the
    score token as its label. With "last" the input is (7, 8, 5), and row 2 is read a second time
    for the score. Unfinished completions have no such row, and nothing reads policy rows that
    would train nothing.

    `token_weight` already holds the global denominator of the aggregation, `score_weight` the
    class weight over the global number of finished completions; 0 trains nothing.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    score_at: ScorePosition | None  # None: no score row
    has_policy_rows: bool = True
    is_probe: bool = False  # its tokens measure how far policy and engine disagree
    advantage: float = 0.0
    token_weight: float = 0.0
    reward: float = 0.0
    score_weight: float = 0.0

    @property
    def response_ids(self) -> tuple[int, ...]:
        """The completion's tokens that some row has to see: the EOS only for its own row."""
        return self.completion_ids if self.score_at == "eos" else self.completion_ids[:-1]

    @property
    def has_rows(self) -> bool:
        """Whether anything is read of it."""
        return self.has_policy_rows or self.score_at is not None


class Segment(NamedTuple):
    """Consecutive tokens of a microbatch: they see each other and a prefix, earlier tokens there.

    A group's first completion is in one segment with the prompt, the others continue the prompt.
    """

    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class _Rows:
    """Columns of equal length that are sliced together; a column may be absent."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: slice) -> Self:
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self)(**{k: None if c is None else c[rows] for k, c in columns.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRows(_Rows):
    """What the policy loss needs of the N_p rows that predict completion tokens.

    `old_logprobs` are those of the policy that the ratios refer to; None means the current one,
    as in the first update of a rollout. `ref_logprobs` are there for a KL penalty.
    """

    sequence_ids: Tensor  # [N_p] int64, in packing order
    rollout_logprobs: Tensor  # [N_p] float32
    advantages: Tensor  # [N_p] float32
    weights: Tensor  # [N_p] float32
    is_probe: Tensor  # [N_p] bool
    old_logprobs: Tensor | None = None  # [N_p] float32
    ref_logprobs: Tensor | None = None  # [N_p] float32


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows(_Rows):
    """What the score's MSE needs of the N_s rows that it is read from."""

    rewards: Tensor  # [N_s] float32
    weights: Tensor  # [N_s] float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Packed sequences of one forward and backward, and the head rows to read from it.

    Sequences with the same prompt share its tokens. `rows` selects the N = N_p + N_s of T positions
    that carry a label: first the N_p rows that predict completion tokens, then the N_s score rows.
    Of a prompt only the last row reaches the head, once for each completion.
    `labels` is the score token and `temperature` 1 on score rows.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64; those of a completion continue its prompt's
    segments: tuple[Segment, ...]  # in the order of the tokens
    rows: Tensor  # [N] int64
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N] float32
    policy: PolicyRows
    score: ScoreRows
    router_weight: float = 0.0  # of the routers' load-balancing loss over the T tokens; 0: none

    def score_only(self) -> Self:
        """The same tokens without the policy rows and the routers' loss."""
        own = slice(len(self.policy), None)
        read = {name: getattr(self, name)[own] for name in ("rows", "labels", "temperature")}
        return replace(self, policy=self.policy[slice(0)], router_weight=0.0, **read)

    def labelled(self, rows: slice) -> tuple[PolicyRows, ScoreRows]:
        """Those of the N head rows, by what they are for."""
        boundary = len(self.policy)
        return (
            self.policy[min(rows.start, boundary) : min(rows.stop, boundary)],
            self.score[max(rows.start - boundary, 0) : max(rows.stop - boundary, 0)],
        )
