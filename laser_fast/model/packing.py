"""Sequences to microbatches: bins within a token budget, equally many on every rank.

Results never depend on the bins, because denominators are fixed before (algorithm.loss).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from laser_fast.records import Microbatch, PolicyRows, ScoreRows, TrainingSequence


def _alone(count: int) -> int:
    """The largest count over ranks, where there is one rank."""
    return count


def plan_bins(
    lengths: Sequence[int], *, budget: int, agree: Callable[[int], int] = _alone
) -> list[list[int]]:
    """Indices of the sequences of each microbatch.

    First-fit decreasing within `budget` tokens. `agree` returns the largest bin count of all
    ranks; a rank with fewer splits its fullest bins, so that every rank runs as many forwards and
    backwards, and leaves bins empty only when it has fewer sequences than that.

    Example: `plan_bins([5, 3, 4, 2], budget=8)` is `[[0, 1], [2, 3]]`.

    Raises:
        ValueError: a sequence is longer than the budget.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > budget:
            raise ValueError(
                f"a sequence of {length} tokens exceeds the microbatch budget of {budget}; raise "
                "optim.tokens_per_microbatch"
            )
        for place, load in enumerate(loads):
            if load + length <= budget:
                bins[place].append(index)
                loads[place] += length
                break
        else:
            bins.append([index])
            loads.append(length)
    _split_fullest(bins, agree(max(len(bins), 1)))
    return bins


def _split_fullest(bins: list[list[int]], count: int) -> None:
    """Grow to `count` bins by halving those with most sequences; halves stay within the budget."""
    while len(bins) < count:
        fullest = max(bins, key=len, default=[])
        half = len(fullest) // 2
        bins.append(fullest[len(fullest) - half :])
        del fullest[len(fullest) - half :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packer:
    """Turns sequences into microbatches for one vocabulary, device and token budget."""

    budget: int
    score_token_id: int
    temperature: float  # of sampling; score rows are read at 1
    device: torch.device
    agree: Callable[[int], int] = _alone

    def bins(self, sequences: Sequence[TrainingSequence]) -> list[list[int]]:
        """`plan_bins` of these sequences. Collective."""
        lengths = [sequence.num_tokens for sequence in sequences]
        return plan_bins(lengths, budget=self.budget, agree=self.agree)

    def microbatches(self, sequences: Sequence[TrainingSequence]) -> list[Microbatch]:
        """All sequences, one microbatch per bin. Collective."""
        bins = self.bins(sequences)
        return [self.pack([sequences[index] for index in members]) for members in bins]

    def pack(self, sequences: Sequence[TrainingSequence]) -> Microbatch:
        """Join the sequences of one bin.

        Row p predicts token p + 1, so a completion that follows n prompt tokens is read from rows
        n - 1 to its last token but one, and its score from the row of its last token, the EOS.
        An empty bin becomes one token without rows: the forward that keeps ranks in step.

        Example: prompt (7, 8), completion (5, 2), finished, score token 9: input (7, 8, 5, 2),
        rows (1, 2, 3), labels (5, 2, 9).
        """
        input_ids: list[int] = []
        policy_rows: list[int] = []
        score_rows: list[int] = []
        for sequence in sequences:
            first = len(input_ids) + len(sequence.prompt_ids) - 1
            policy_rows.extend(range(first, first + len(sequence.completion_ids)))
            if sequence.has_score_row:
                score_rows.append(first + len(sequence.completion_ids))
            input_ids.extend(sequence.prompt_ids)
            input_ids.extend(sequence.completion_ids)
        lengths = tuple(sequence.num_tokens for sequence in sequences)
        if not sequences:
            input_ids, lengths = [self.score_token_id], (1,)
        labels = [token for s in sequences for token in s.completion_ids]
        labels += [self.score_token_id] * len(score_rows)
        temperature = [self.temperature] * len(policy_rows) + [1.0] * len(score_rows)
        scored = [sequence for sequence in sequences if sequence.has_score_row]
        return Microbatch(
            input_ids=self._ids(input_ids),
            position_ids=self._ids([position for n in lengths for position in range(n)]),
            lengths=lengths,
            rows=self._ids(policy_rows + score_rows),
            labels=self._ids(labels),
            temperature=self._floats(temperature),
            policy=PolicyRows(
                sequence_ids=self._ids(
                    [i for i, s in enumerate(sequences) for _ in s.completion_ids]
                ),
                rollout_logprobs=self._floats([x for s in sequences for x in s.rollout_logprobs]),
                advantages=self._floats([s.advantage for s in sequences for _ in s.completion_ids]),
                weights=self._floats([s.token_weight for s in sequences for _ in s.completion_ids]),
            ),
            score=ScoreRows(
                rewards=self._floats([s.reward for s in scored]),
                weights=self._floats([s.score_weight for s in scored]),
            ),
        )

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _floats(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)
