"""Bins within the budget, equally many everywhere, and rows that point at what they predict."""

import random

import pytest
import torch
from tiny_models import EOS, SCORE_TOKEN, make_sequences

from laser_fast.model.packing import Packer, plan_bins
from laser_fast.records import TrainingSequence


def make_packer(*, budget=40, temperature=0.7, agree=lambda count: count):
    return Packer(
        budget=budget,
        score_token_id=SCORE_TOKEN,
        temperature=temperature,
        device=torch.device("cpu"),
        agree=agree,
    )


def test_plan_bins_of_the_docstring():
    assert plan_bins([5, 3, 4, 2], budget=8) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("at_least", [1, 4, 9, 60])
def test_bins_hold_every_sequence_once_within_the_budget(at_least):
    rng = random.Random(at_least)
    lengths = [rng.randint(1, 30) for _ in range(40)]
    asked = []

    def agree(count):
        asked.append(count)
        return max(count, at_least)

    bins = plan_bins(lengths, budget=32, agree=agree)
    assert len(bins) == max(asked[0], at_least)
    assert len(asked) == 1
    assert sorted(index for members in bins for index in members) == list(range(40))
    assert max(sum(lengths[index] for index in members) for members in bins) <= 32
    assert sum(not members for members in bins) == max(at_least - 40, 0)  # no needless empty bin


def test_bins_waste_little():
    lengths = [random.Random(1).randint(1, 30) for _ in range(40)]
    # First-fit decreasing needs at most 11/9 of the optimum, plus one.
    assert len(plan_bins(lengths, budget=64)) <= sum(lengths) / 64 * 11 / 9 + 2


def test_a_rank_without_sequences_keeps_step():
    assert plan_bins([], budget=8) == [[]]
    assert plan_bins([], budget=8, agree=lambda count: 3) == [[], [], []]


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"9 tokens exceeds .* 8; raise optim.tokens_per_micro"):
        plan_bins([3, 9], budget=8)


def test_rows_and_labels_of_the_docstring():
    sequence = TrainingSequence(
        prompt_ids=(7, 8),
        completion_ids=(5, 2),
        rollout_logprobs=(-0.5, -0.25),
        has_score_row=True,
        advantage=1.5,
        token_weight=0.1,
        reward=1.0,
        score_weight=0.3,
    )
    batch = Packer(budget=4, score_token_id=9, temperature=0.7, device=torch.device("cpu")).pack(
        [sequence]
    )
    assert batch.input_ids.tolist() == [7, 8, 5, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [5, 2, 9]
    torch.testing.assert_close(batch.temperature, torch.tensor([0.7, 0.7, 1.0]))
    assert len(batch.policy) == 2
    assert batch.policy.advantages.tolist() == [1.5, 1.5]


def test_unpacking_gives_the_sequences_back():
    sequences = make_sequences(20)
    packer = make_packer(budget=40)
    seen = []
    bins = packer.bins(sequences)
    for members, batch in zip(bins, packer.microbatches(sequences), strict=True):
        assert sum(batch.lengths) == len(batch.input_ids) == len(batch.position_ids) <= 40
        boundary, start, score = len(batch.policy), 0, 0
        for place, (index, length) in enumerate(zip(members, batch.lengths, strict=True)):
            sequence = sequences[index]
            num_prompt = len(sequence.prompt_ids)
            ids = tuple(batch.input_ids[start : start + length].tolist())
            assert ids == sequence.prompt_ids + sequence.completion_ids
            assert batch.position_ids[start : start + length].tolist() == list(range(length))

            own = batch.policy.sequence_ids == place
            rows, labels = batch.rows[:boundary][own], batch.labels[:boundary][own]
            assert rows.tolist() == list(range(start + num_prompt - 1, start + length - 1))
            assert tuple(labels.tolist()) == sequence.completion_ids
            assert torch.equal(batch.input_ids[rows + 1], labels)  # row p predicts token p + 1
            torch.testing.assert_close(
                batch.policy.rollout_logprobs[own], torch.tensor(sequence.rollout_logprobs)
            )
            assert set(batch.policy.advantages[own].tolist()) == {
                torch.tensor(sequence.advantage).item()
            }
            assert set(batch.policy.weights[own].tolist()) == {
                torch.tensor(sequence.token_weight).item()
            }
            if sequence.has_score_row:
                row = boundary + score
                assert batch.rows[row] == start + length - 1
                assert batch.input_ids[batch.rows[row]] == EOS
                assert batch.score.rewards[score] == sequence.reward
                assert batch.score.weights[score] == torch.tensor(sequence.score_weight)
                score += 1
            seen.append(index)
            start += length
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
    assert batch.lengths == (1,)
    assert len(batch.input_ids) == len(batch.position_ids) == 1
    for name in ("rows", "labels", "temperature", "policy", "score"):
        assert len(getattr(batch, name)) == 0, name


def test_microbatches_are_as_many_as_the_fullest_rank_has():
    batches = make_packer(agree=lambda count: count + 30).microbatches(make_sequences(4))
    assert len(batches) > 30
    assert sum(len(batch.rows) > 0 for batch in batches) == 4
