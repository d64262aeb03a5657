"""Further reward functions beside the verifier: what they are given, and what they cannot break."""

import sys

import pytest
from text_groups import text_group

from laser_fast.config import ConfigError, RewardConfig
from laser_fast.rewards import Grader, RewardError, grade_groups

MODULE = """
import asyncio, ctypes, os

def length(completions, completion_ids):
    assert ["".join(map(chr, ids)) for ids in completion_ids] == completions
    return [len(c) - 3 for c in completions]  # any finite number

async def by_level(prompts, completions, level):
    await asyncio.sleep(0)
    return [n if p == "p" else None for p, n in zip(prompts, level)]

def of_tags(completions, tags, **kwargs):
    assert "level" not in kwargs
    return [float(len(t)) for t in tags]

def eventful(completions):
    if "hang" in completions: ctypes.PyDLL(None).sleep(1000)
    if "exit" in completions: os._exit(3)
    if "raise" in completions: raise KeyError("user's own")
    return [float("nan") if c == "nan" else 1.0 for c in completions]

def verify(completions, answers, level=0):
    return [float(c == a and level == 0) for c, a in zip(completions, answers)]

def of_one(completion):
    return 1.0
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extras")
    (folder / "extra_rewards.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def extra(**weights):
    return {f"extra_rewards:{name}": weight for name, weight in weights.items()}


def asked(grader):
    return [each.fields for each in (grader, *grader.extras.values())]


def decode(ids):
    return "".join(map(chr, ids))


def test_extras_add_to_the_total_and_leave_the_reward_alone():
    config = RewardConfig(kind="exact", extra=extra(length=0.1, by_level=-2.0))
    fields = '{"level": 0.25, "tags": ["a"]}'
    groups = [
        text_group("p", ["5", "66666"], "5", fields),
        text_group("q", ["7", "8888"], "7", fields),
    ]
    with Grader(config, trains_score=True) as grader:
        assert asked(grader) == [(), (), ("level",)]
        first, second = grade_groups(grader, groups, decode, with_extras=True)
        plain = grade_groups(grader, groups, decode)
    assert first.rewards == second.rewards == (1.0, 0.0)
    assert first.extras == (
        {"extra_rewards:length": -2.0, "extra_rewards:by_level": 0.25},
        {"extra_rewards:length": 2.0, "extra_rewards:by_level": 0.25},
    )
    assert first.totals == pytest.approx((1.0 - 0.2 - 0.5, 0.2 - 0.5))
    assert [said["extra_rewards:by_level"] for said in second.extras] == [None, None]
    assert second.totals == pytest.approx((1.0 - 0.2, 0.1))  # None counts as nothing
    # As evaluations grade: the verifier alone, which needs no fields of the others.
    assert [g.rewards for g in plain] == [(1.0, 0.0)] * 2 == [g.totals for g in plain]
    assert all(g.extras == ({}, {}) for g in plain)


def test_a_failed_verifier_has_no_total():
    config = RewardConfig(kind="extra_rewards:by_level", workers=1, extra=extra(length=1.0))
    with Grader(config) as grader:
        groups = [text_group("q", ["5"], "", '{"level": 1}')]
        [graded] = grade_groups(grader, groups, decode, with_extras=True)
    assert graded.rewards == graded.totals == (None,)
    assert graded.extras == ({"extra_rewards:length": -2.0},)


def test_every_function_gets_its_own_fields_only():
    config = RewardConfig(kind="extra_rewards:verify", extra=extra(by_level=1, of_tags=1))
    groups = [text_group("p", ["5", "6"], "5", '{"level": 3, "tags": ["a", "b"]}')]
    with Grader(config) as grader:
        assert asked(grader) == [(), ("level",), ("tags",)]
        [graded] = grade_groups(grader, groups, decode, with_extras=True)
    assert graded.rewards == (1.0, 0.0)
    assert [[*said.values()] for said in graded.extras] == [[3.0, 2.0], [3.0, 2.0]]
    assert graded.totals == (6.0, 5.0)


@pytest.mark.parametrize("event", ["hang", "exit"])
def test_a_lost_call_of_an_extra_costs_its_own_number_only(event, caplog):
    config = RewardConfig(
        kind="exact", timeout_s=2.0, batch_timeout_s=2.0, extra=extra(eventful=0.5, length=1.0)
    )
    with Grader(config) as grader:
        [graded] = grade_groups(
            grader, [text_group("p", ["5", event], "5")], decode, with_extras=True
        )
        assert graded.rewards == (1.0, 0.0)
        assert [[*said.values()] for said in graded.extras] == [[1.0, -2.0], [None, 1.0]]
        assert graded.totals == (-0.5, 1.0)
    assert 'function "extra_rewards:eventful": a call with 2 completions failed: the' in caplog.text
    assert '1 of 2 grades by "extra_rewards:eventful" failed: the' in caplog.text


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("raise", 'function "extra_rewards:eventful" raised KeyError'),
        ("nan", 'function "extra_rewards:eventful": reward 0: expected a finite number, got nan'),
    ],
)
def test_a_broken_extra_stops_with_its_name(event, message):
    with Grader(RewardConfig(kind="exact", extra=extra(eventful=0.5))) as grader:
        with pytest.raises(RewardError, match=message):
            grade_groups(grader, [text_group("p", [event], "5")], decode, with_extras=True)
        assert grade_groups(grader, [], decode, with_extras=True) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", 'reward.extra = "length": expected math, gsm8k, exact, sandbox or "module:f'),
        ("extra_rewards:none", 'reward.extra = "extra_rewards:none" cannot be loaded: Attribute'),
        ("no_such:f", 'reward.extra = "no_such:f" cannot be loaded: ModuleNotFoundError'),
        ("extra_rewards:of_one", 'reward.extra = "extra_rewards:of_one": it asks for completion;'),
    ],
)
def test_an_unusable_extra_is_refused_at_once(name, message):
    with pytest.raises(ConfigError, match=message):
        Grader(RewardConfig(kind="exact", extra={name: 1.0}))
