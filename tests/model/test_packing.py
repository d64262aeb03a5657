"""Bins within the budget, equally many everywhere, and rows that point at what they predict."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_models import EOS, SCORE_TOKEN, make_sequences

from laser_fast.model.packing import Packer, plan_bins, plan_shares
from laser_fast.records import Segment, TrainingSequence


def make_packer(*, budget=40, temperature=0.7, agree=lambda count: count):
    return Packer(
        budget=budget,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=temperature,
        device=torch.device("cpu"),
        agree=agree,
    )


def bins_of(lengths, **options):
    """Bins of sequences that share nothing: prompts of one token, each its own."""
    return plan_bins([(i,) for i in range(len(lengths))], [n - 1 for n in lengths], **options)


def test_plan_bins_of_the_docstring():
    a, b = (7, 8), (7, 8, 9)
    assert plan_bins([a, a, b], [2, 2, 1], budget=6) == [[0, 1], [2]]
    assert bins_of([5, 3, 4, 2], budget=8) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("at_least", [1, 4, 9, 60])
def test_bins_hold_every_sequence_once_within_the_budget(at_least):
    rng = random.Random(at_least)
    lengths = [rng.randint(1, 30) for _ in range(40)]
    asked = []

    def agree(count):
        asked.append(count)
        return max(count, at_least)

    bins = bins_of(lengths, budget=32, agree=agree)
    assert len(bins) == max(asked[0], at_least)
    assert len(asked) == 1
    assert sorted(index for members in bins for index in members) == list(range(40))
    assert max(sum(lengths[index] for index in members) for members in bins) <= 32
    assert sum(not members for members in bins) == max(at_least - 40, 0)  # no needless empty bin


def test_bins_waste_little():
    lengths = [random.Random(1).randint(1, 30) for _ in range(40)]
    # First-fit decreasing needs at most 11/9 of the optimum, plus one.
    assert len(bins_of(lengths, budget=64)) <= sum(lengths) / 64 * 11 / 9 + 2


def test_a_rank_without_sequences_keeps_step():
    assert bins_of([], budget=8) == [[]]
    assert bins_of([], budget=8, agree=lambda count: 3) == [[], [], []]


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"9 tokens exceeds .* 8; raise optim.tokens_per_micro"):
        bins_of([3, 9], budget=8)


@pytest.mark.parametrize("budget", [12, 20, 33, 200])
def test_a_bin_computes_a_prompt_once(budget):
    rng = random.Random(budget)
    prompts = [tuple(rng.choices(range(9), k=rng.randint(1, 6))) for _ in range(8)]
    owners = [rng.choice(prompts) for _ in range(50)]
    lengths = [rng.randint(0, 6) for _ in range(50)]
    bins = plan_bins(owners, lengths, budget=budget)
    assert sorted(index for members in bins for index in members) == list(range(50))
    loads = []
    for members in bins:
        once = {owners[index] for index in members}
        loads.append(sum(map(len, once)) + sum(lengths[index] for index in members))
    assert max(loads) <= budget
    # A group that fits is in one bin.
    for prompt in set(owners):
        own = [index for index, owner in enumerate(owners) if owner == prompt]
        if len(prompt) + sum(lengths[index] for index in own) <= budget:
            assert sum(bool({*members} & {*own}) for members in bins) == 1


@pytest.mark.parametrize(("num_ranks", "num_groups"), [(2, 2), (4, 5), (4, 9), (8, 9), (8, 3)])
def test_shares_are_balanced_in_computed_tokens(num_ranks, num_groups):
    rng = random.Random(num_groups)
    groups = [tuple(rng.choices(range(99), k=200)) for _ in range(num_groups)]
    prompts = [prompt for prompt in groups for _ in range(8)]
    lengths = [rng.randint(150, 300) for _ in prompts]
    shares = plan_shares(prompts, lengths, num_ranks=num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(prompts)))
    loads = [
        sum(lengths[i] for i in share) + 200 * len({prompts[i] for i in share}) for share in shares
    ]
    assert max(loads) <= 1.12 * sum(loads) / num_ranks
    if num_groups >= num_ranks:  # copies of prompts cost less than the balance gains
        assert max(loads) <= 1.25 * (sum(lengths) + 200 * num_groups) / num_ranks


def test_ranks_without_sequences_get_none():
    assert plan_shares([], [], num_ranks=2) == [[], []]
    assert plan_shares([(7,)], [3], num_ranks=3) == [[0], [], []]


def test_the_group_of_the_docstring():
    first = TrainingSequence(
        prompt_ids=(7, 8), completion_ids=(5, 2), rollout_logprobs=(-0.5, -0.25), score_at="eos"
    )
    second = replace(first, completion_ids=(6, 4), score_at=None, has_policy_rows=True)
    batch = make_packer().pack([first, second])
    assert batch.input_ids.tolist() == [7, 8, 5, 2, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert batch.segments == (Segment(4), Segment(1, 0, 2))
    assert batch.rows.tolist() == [1, 2, 1, 4, 3]
    assert batch.labels.tolist() == [5, 2, 6, 4, 5]


def test_a_score_of_the_last_row_needs_no_eos():
    first = TrainingSequence(
        prompt_ids=(7, 8), completion_ids=(5, 2), rollout_logprobs=(-0.5, -0.25), score_at="last"
    )
    only_eos = replace(first, completion_ids=(2,), rollout_logprobs=(-0.5,))
    batch = make_packer().pack([first, only_eos])
    assert batch.input_ids.tolist() == [7, 8, 5]
    assert batch.rows.tolist() == [1, 2, 1, 2, 1]
    assert batch.labels.tolist() == [5, 2, 2, 5, 5]
    assert batch.temperature[-2:].tolist() == [1.0, 1.0] and batch.temperature[0] != 1.0


def test_rows_that_train_nothing_are_not_read():
    sequence = make_sequences(1)[0]
    unread = replace(sequence, has_policy_rows=False)
    batch = make_packer().pack([unread, replace(unread, score_at=None)])
    assert len(batch.policy) == 0 and len(batch.score) == 1
    assert batch.rows.tolist() == [len(sequence.prompt_ids + sequence.response_ids) - 1]
    assert not replace(unread, score_at=None).has_rows


def test_rows_and_labels_of_the_docstring():
    sequence = TrainingSequence(
        prompt_ids=(7, 8),
        completion_ids=(5, 2),
        rollout_logprobs=(-0.5, -0.25),
        score_at="eos",
        advantage=1.5,
        token_weight=0.1,
        reward=1.0,
        score_weight=0.3,
    )
    batch = Packer(
        budget=4, score_token_id=9, score_at="eos", temperature=0.7, device=torch.device("cpu")
    ).pack([sequence])
    assert batch.input_ids.tolist() == [7, 8, 5, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [5, 2, 9]
    torch.testing.assert_close(batch.temperature, torch.tensor([0.7, 0.7, 1.0]))
    assert len(batch.policy) == 2
    assert batch.policy.advantages.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("group_size", [1, 4])
def test_unpacking_gives_the_sequences_back(group_size):
    sequences = make_sequences(20, group_size=group_size)
    packer = make_packer(budget=50)
    seen = []
    bins = packer.bins(sequences)
    for members, batch in zip(bins, packer.microbatches(sequences), strict=True):
        assert sum(s.length for s in batch.segments) == len(batch.input_ids) <= 50
        boundary, score = len(batch.policy), 0
        for place, index in enumerate(members):
            sequence = sequences[index]
            num_prompt = len(sequence.prompt_ids)
            own = batch.policy.sequence_ids == place
            rows, labels = batch.rows[:boundary][own], batch.labels[:boundary][own]
            assert tuple(labels.tolist()) == sequence.completion_ids
            # The row before each label holds the token before it, at its position.
            ids = (*sequence.prompt_ids, *sequence.completion_ids)
            assert tuple(batch.input_ids[rows].tolist()) == ids[num_prompt - 1 : -1]
            positions = list(range(num_prompt - 1, len(ids) - 1))
            assert batch.position_ids[rows].tolist() == positions
            start = rows[0] - num_prompt + 1
            assert tuple(batch.input_ids[start : rows[0] + 1].tolist()) == sequence.prompt_ids
            torch.testing.assert_close(
                batch.policy.rollout_logprobs[own], torch.tensor(sequence.rollout_logprobs)
            )
            for found, expected in (
                (batch.policy.advantages, sequence.advantage),
                (batch.policy.weights, sequence.token_weight),
            ):
                assert set(found[own].tolist()) == {torch.tensor(expected).item()}
            if sequence.score_at:
                row = batch.rows[boundary + score]
                assert batch.input_ids[row] == EOS and batch.position_ids[row] == len(ids) - 1
                assert batch.score.rewards[score] == sequence.reward
                assert batch.score.weights[score] == torch.tensor(sequence.score_weight)
                score += 1
            seen.append(index)
        assert score == len(batch.score.rewards) == len(batch.rows) - boundary
    assert sorted(seen) == list(range(20))


def test_score_rows_come_last_with_the_score_token_at_temperature_one():
    for batch in make_packer().microbatches(make_sequences(20)):
        boundary = len(batch.policy)
        assert len(batch.score.rewards) > 0
        assert (batch.labels[boundary:] == SCORE_TOKEN).all()
        assert (batch.labels[:boundary] != SCORE_TOKEN).all()
        assert (batch.temperature[boundary:] == 1.0).all()
        assert (batch.temperature[:boundary] == torch.tensor(0.7)).all()


def test_an_empty_bin_is_one_token_without_rows():
    batch = make_packer().pack([])
    assert batch.segments == (Segment(1),)
    assert len(batch.input_ids) == len(batch.position_ids) == 1
    for name in ("rows", "labels", "temperature", "policy", "score"):
        assert len(getattr(batch, name)) == 0, name


def test_microbatches_are_as_many_as_the_fullest_rank_has():
    batches = make_packer(agree=lambda count: count + 30).microbatches(make_sequences(4))
    assert len(batches) > 30
    assert sum(len(batch.rows) > 0 for batch in batches) == 4
