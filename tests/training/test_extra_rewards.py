"""Who reads the verifier's reward and who the total, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_config, make_group

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.model.distributed import World
from laser_fast.training.sampler import _has_spread
from laser_fast.training.step_metrics import table_metrics
from laser_fast.training.tables import (
    gather_tables,
    step_advantages,
    step_weights,
    training_sequences,
)


def with_extras(group, source, extras, weights):
    extras = tuple(
        dict(zip(extras, said, strict=True)) for said in zip(*extras.values(), strict=True)
    )
    totals = tuple(
        None if reward is None else reward + sum(weights[n] * (v or 0.0) for n, v in said.items())
        for reward, said in zip(group.rewards, extras, strict=True)
    )
    prompt = replace(group.prompt, source=source)
    return replace(group, prompt=prompt, totals=totals, extras=extras)


WEIGHTS = {"m:style": 0.5, "m:short": -1.0}
MEMBERS = [(2, True, -1.0), (3, True, -9.0), (4, True, -5.0)]
PLAIN = [
    make_group("a", MEMBERS, [1.0, 0.0, None]),
    make_group("b", MEMBERS, [0.0, 0.0, 0.0]),
    make_group("c", MEMBERS, [1.0, 0.0, 0.0]),
]
GROUPS = [
    with_extras(
        PLAIN[0], "x.jsonl", {"m:style": (1.0, 3.0, 5.0), "m:short": (None,) * 3}, WEIGHTS
    ),  # 1.5, 1.5, None
    with_extras(
        PLAIN[1], "y.jsonl", {"m:style": (0.0, None, 2.0), "m:short": (0.0, 1.0, 1.0)}, WEIGHTS
    ),  # 0, -1, 0
    with_extras(
        PLAIN[2], "x.jsonl", {"m:style": (0.0, 2.0, 1.0), "m:short": (0.0,) * 3}, WEIGHTS
    ),  # 1, 1, 0.5
]


@pytest.fixture
def tables(world):
    return gather_tables(GROUPS, world)


def test_advantages_and_spread_are_of_the_total(tables):
    third = 1 / math.sqrt(3)
    expected = torch.tensor([[0.0] * 3, [third, -2 * third, third], [third, third, -2 * third]])
    advantages = step_advantages(tables, make_config(), None)
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    assert has_reward_spread(tables.totals, tables.is_graded).tolist() == [False, True, True]
    # Dynamic sampling replaces the first group, and keeps the second, which the verifier would not.
    assert [_has_spread(group) for group in GROUPS] == [False, True, True]
    assert [_has_spread(group) for group in PLAIN] == [True, False, True]


def test_the_score_learns_the_verifier_alone(world, tables):
    plain = gather_tables(PLAIN, world)
    assert torch.equal(tables.rewards, plain.rewards)
    for found, expected in zip(
        step_weights(tables, make_config()), step_weights(plain, make_config()), strict=True
    ):
        assert torch.equal(found, expected)
    sequences = training_sequences(
        GROUPS, World(0, 1, torch.device("cpu")), tables, torch.ones(3, 3), make_config()
    )
    assert [s.reward for s in sequences] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_every_function_and_data_set_is_logged_apart(world, tables):
    metrics = table_metrics(tables, torch.zeros(3, 3))
    plain = table_metrics(gather_tables(PLAIN, world), torch.zeros(3, 3))
    further = {
        "reward/mean/x.jsonl": pytest.approx(2 / 5),
        "reward/mean/y.jsonl": 0.0,
        "reward/total": pytest.approx((3.0 - 1.0 + 2.5) / 8),
        "reward/extra/m:style": pytest.approx(14 / 8),
        "reward/extra_failed/m:style": pytest.approx(1 / 9),
        "reward/extra/m:short": pytest.approx(2 / 6),
        "reward/extra_failed/m:short": pytest.approx(3 / 9),
    }
    spread = {"advantage/zero_std_groups": pytest.approx(1 / 3)}
    assert metrics == plain | further | spread
    assert metrics["reward/mean"] == pytest.approx(2 / 8)
