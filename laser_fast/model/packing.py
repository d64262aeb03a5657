"""Sequences to microbatches: bins within a token budget, equally many on every rank.

Sequences with the same prompt share its tokens, as far as they are in one bin. Results never depend
on the bins, because denominators are fixed before (algorithm.loss).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from laser_fast.model.distributed import World
from laser_fast.records import (
    Microbatch,
    PolicyRows,
    ScorePosition,
    ScoreRows,
    Segment,
    TrainingSequence,
)

Ids = tuple[int, ...]


def plan_bins(
    prompts: Sequence[Ids],
    lengths: Sequence[int],
    *,
    budget: int,
    agree: Callable[[int], int] = int,
) -> list[list[int]]:
    """Indices of the sequences of each microbatch, from their prompts and response lengths.

    A bin computes a prompt once. Groups with one prompt are kept together, in parts where they
    exceed the budget, and parts are placed first-fit decreasing within `budget` tokens. `agree`
    returns the largest bin count of all ranks; a rank with fewer splits its fullest bins, so that
    every rank runs as many forwards and backwards, and leaves bins empty only when it has fewer
    sequences than that.

    Example: with the prompts a, a, b of 2, 2, 3 tokens, `plan_bins([a, a, b], [2, 2, 1], budget=6)`
    is `[[0, 1], [2]]`.

    Raises:
        ValueError: a sequence is longer than the budget.
    """
    groups = _by_prompt(prompts).items()
    parts = [part for prompt, own in groups for part in _parts(len(prompt), own, lengths, budget)]
    sizes = [len(prompts[part[0]]) + sum(lengths[i] for i in part) for part in parts]
    places = _first_fit(sizes, budget)
    bins = [[index for place in members for index in parts[place]] for members in places]
    _split_fullest(bins, agree(max(len(bins), 1)))
    return bins


def share_out(sequences: list[TrainingSequence], world: World) -> list[TrainingSequence]:
    """This rank's share of the sequences of all ranks: each computes about as many tokens.

    Collective; every rank finds the same shares.
    """
    if world.size == 1:
        return sequences
    everything = world.gather(sequences)
    prompts = [sequence.prompt_ids for sequence in everything]
    lengths = [len(sequence.response_ids) for sequence in everything]
    shares = plan_shares(prompts, lengths, num_ranks=world.size)
    return [everything[index] for index in shares[world.rank]]


def plan_shares(
    prompts: Sequence[Ids], lengths: Sequence[int], *, num_ranks: int
) -> list[list[int]]:
    """Indices of the sequences of each rank, such that the largest load is small.

    Groups go whole, in halves, quarters and so on, the largest part first, to the rank that then
    has least; the best of these plans counts. A rank computes a prompt once.
    """
    groups = _by_prompt(prompts)
    most = max(map(len, groups.values()), default=1)
    plans = []
    for power in range(most.bit_length()):
        parts = [
            (prompt, members[first :: min(2**power, len(members))])
            for prompt, members in groups.items()
            for first in range(min(2**power, len(members)))
        ]
        sizes = [sum(lengths[index] for index in part) for _, part in parts]
        loads, shares = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
        there: list[set[Ids]] = [set() for _ in range(num_ranks)]
        for place in sorted(range(len(parts)), key=lambda i: -len(parts[i][0]) - sizes[i]):
            (prompt, part), size = parts[place], sizes[place]
            after = [
                load + size + len(prompt) * (prompt not in known)
                for load, known in zip(loads, there, strict=True)
            ]
            rank = after.index(min(after))
            loads[rank] = after[rank]
            there[rank].add(prompt)
            shares[rank] += part
        plans.append((max(loads), power, shares))
    return min(plans)[2]


def with_router_weights(
    updates: list[list[Microbatch]], coef: float, world: World
) -> list[list[Microbatch]]:
    """Share `coef` out to an update's microbatches by tokens; fillers get none. Collective."""
    if coef == 0:
        return updates
    counts = [[len(b.input_ids) * (len(b.rows) > 0) for b in batches] for batches in updates]
    totals = world.sum(torch.tensor([*map(sum, counts)])).clamp(min=1).tolist()
    return [
        [replace(b, router_weight=coef * n / total) for b, n in zip(batches, own, strict=True)]
        for batches, own, total in zip(updates, counts, totals, strict=True)
    ]


def _by_prompt(prompts: Sequence[Ids]) -> dict[Ids, list[int]]:
    groups: dict[Ids, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return groups


def _parts(
    prompt_length: int, members: Sequence[int], lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """A group in as few parts as fit into the budget, each with a copy of the prompt."""
    longest = prompt_length + max(lengths[index] for index in members)
    if longest > budget:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the microbatch budget of {budget}; raise "
            "optim.tokens_per_microbatch"
        )
    places = _first_fit([lengths[index] for index in members], budget - prompt_length)
    return [[members[place] for place in sorted(part)] for part in places]


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of the sizes, the largest first."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for place, load in enumerate(loads):
            if load + sizes[index] <= budget:
                bins[place].append(index)
                loads[place] += sizes[index]
                break
        else:
            bins.append([index])
            loads.append(sizes[index])
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
    device: torch.device
    agree: Callable[[int], int] = int  # the largest over ranks; of one rank its own
    score_token_id: int = 0  # where no row is a score's, an id like any other
    score_at: ScorePosition = "eos"
    temperature: float = 1.0  # of sampling; score rows are read at 1

    def bins(self, sequences: Sequence[TrainingSequence]) -> list[list[int]]:
        """`plan_bins` of these sequences. Collective."""
        prompts = [sequence.prompt_ids for sequence in sequences]
        lengths = [len(sequence.response_ids) for sequence in sequences]
        return plan_bins(prompts, lengths, budget=self.budget, agree=self.agree)

    def microbatches(self, sequences: Sequence[TrainingSequence]) -> list[Microbatch]:
        """All sequences, one microbatch per bin. Collective."""
        bins = self.bins(sequences)
        return [self.pack([sequences[index] for index in members]) for members in bins]

    def pack(self, sequences: Sequence[TrainingSequence]) -> Microbatch:
        """Join the sequences of one bin.

        Row p predicts the next token, so a completion is read from the row of the prompt's last
        token to that of its own last token but one, and its score from the last row that it has:
        that of the EOS, or the one before. An empty bin becomes one token without rows: the forward
        that keeps ranks in step.

        Example: prompt (7, 8), completions (5, 2), finished, and (6, 4), truncated; score token 9:
        input (7, 8, 5, 2, 6), rows (1, 2, 1, 4, 3), labels (5, 2, 6, 4, 9).
        """
        tokens = _Tokens()
        laid = [(sequence, tokens.add(sequence)) for sequence in sequences]
        if not sequences:
            tokens.add_segment((self.score_token_id,))
        read = [sequence for sequence in sequences if sequence.has_policy_rows]
        labels = [token for s in read for token in s.completion_ids]
        policy_rows = [
            row for s, rows in laid if s.has_policy_rows for row in rows[: len(s.completion_ids)]
        ]
        scored = [sequence for sequence in sequences if sequence.score_at]
        score_rows = [rows[-1] for s, rows in laid if s.score_at]
        labels += [self.score_token_id] * len(score_rows)
        temperature = [self.temperature] * len(policy_rows) + [1.0] * len(score_rows)
        return Microbatch(
            input_ids=self._ids(tokens.ids),
            position_ids=self._ids(tokens.positions),
            segments=tuple(tokens.segments),
            rows=self._ids(policy_rows + score_rows),
            labels=self._ids(labels),
            temperature=self._floats(temperature),
            policy=PolicyRows(
                sequence_ids=self._ids([i for i, s in enumerate(read) for _ in s.completion_ids]),
                rollout_logprobs=self._floats([x for s in read for x in s.rollout_logprobs]),
                advantages=self._floats([s.advantage for s in read for _ in s.completion_ids]),
                weights=self._floats([s.token_weight for s in read for _ in s.completion_ids]),
                is_probe=self._ids([s.is_probe for s in read for _ in s.completion_ids]).bool(),
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


@dataclass(slots=True)
class _Tokens:
    """The tokens of a microbatch as they are laid down."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    starts: dict[Ids, int] = field(default_factory=dict)  # of the prompts that are there

    def add(self, sequence: TrainingSequence) -> list[int]:
        """Lay a sequence down; returns the places of its prompt's last token and its response."""
        prompt, response = sequence.prompt_ids, sequence.response_ids
        start = self.starts.get(prompt)
        if start is None:
            start = self.starts[prompt] = len(self.ids)
            self.add_segment(prompt + response)
        elif response:
            self.add_segment(response, prefix_start=start, prefix_length=len(prompt))
        end = len(self.ids)
        return [start + len(prompt) - 1, *range(end - len(response), end)]

    def add_segment(self, ids: Ids, prefix_start: int = 0, prefix_length: int = 0) -> None:
        """Lay down tokens that continue a prefix."""
        self.ids += ids
        self.positions += range(prefix_length, prefix_length + len(ids))
        self.segments.append(Segment(len(ids), prefix_start, prefix_length))
