"""Properties that hold for whatever hypothesis draws: packing, advantages, votes, configuration."""

# ruff: noqa: E402 (the packages come after the check for hypothesis)
import copy
import math
from collections import Counter
from operator import attrgetter

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

import tomli_w
from hypothesis import assume, given
from hypothesis import strategies as st

from laser_fast.algorithm.advantage import group_advantages, mix_advantages
from laser_fast.algorithm.vote import (
    Calibrated,
    PosteriorVote,
    answer_classes,
    best_at_k,
    majority_vote,
    pass_at_k,
    vote_at_k,
)
from laser_fast.config import Config, ConfigError, all_keys, dump_config, load_config
from laser_fast.model.packing import Packer, plan_bins, plan_shares
from laser_fast.records import TrainingSequence
from laser_fast.rewards import gsm8k
from laser_fast.rewards import math as math_reward

# The same examples everywhere: a failure in CI is one that a developer sees.
few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
SCORE_TOKEN, EOS = 99, 1

# Packing.

ids = st.lists(st.integers(2, 9), min_size=1, max_size=6).map(tuple)
prompts = st.lists(ids, min_size=1, max_size=4)


@st.composite
def sequences(draw):
    """Sequences of few prompts, so that some share one."""
    known = draw(prompts)
    found = []
    for _ in range(draw(st.integers(0, 12))):
        completion = draw(ids)
        score_at = draw(st.sampled_from(["eos", "last", None]))
        found.append(
            TrainingSequence(
                prompt_ids=draw(st.sampled_from(known)),
                completion_ids=completion[:-1] + (EOS,) if score_at else completion,
                rollout_logprobs=tuple(-float(i) for i in range(len(completion))),
                score_at=score_at,
                has_policy_rows=draw(st.booleans()) or score_at is None,
                advantage=draw(st.integers(-3, 3)),
                token_weight=0.5,
                reward=draw(st.sampled_from([0.0, 1.0])),
                score_weight=0.25,
            )
        )
    return found


def packer(budget):
    return Packer(
        budget=budget,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=0.5,
        device=torch.device("cpu"),
    )


def contexts(microbatch):
    """What every token sees, itself included, by the segments; its position must say how much."""
    tokens, seen, start = microbatch.input_ids.tolist(), [], 0
    for segment in microbatch.segments:
        prefix = tokens[segment.prefix_start : segment.prefix_start + segment.prefix_length]
        for end in range(start + 1, start + segment.length + 1):
            seen.append((*prefix, *tokens[start:end]))
        start += segment.length
    assert start == len(tokens)
    assert microbatch.position_ids.tolist() == [len(context) - 1 for context in seen]
    return seen


def rows(microbatches):
    """All rows of the head, as what each sees, is to predict and carries along."""
    found = Counter()
    for microbatch in microbatches:
        seen, policy, score = contexts(microbatch), microbatch.policy, microbatch.score
        heads = list(
            zip(
                [seen[row] for row in microbatch.rows.tolist()],
                microbatch.labels.tolist(),
                microbatch.temperature.tolist(),
                strict=True,
            )
        )
        columns = (policy.rollout_logprobs, policy.advantages, policy.weights)
        carried = [*zip(*(column.tolist() for column in columns), strict=True)]
        carried += zip(score.rewards.tolist(), score.weights.tolist(), strict=True)
        found.update(zip(heads, carried, strict=True))
    return found


@few
@given(sequences(), st.integers(12, 40))
def test_packed_rows_are_those_of_each_sequence_alone(drawn, budget):
    packed = packer(budget).microbatches(drawn)
    assert rows(packed) == rows(packer(budget).pack([one]) for one in drawn)
    for microbatch in packed:
        assert len(microbatch.input_ids) <= budget


@few
@given(sequences(), st.integers(12, 40), st.integers(1, 20))
def test_bins_hold_every_sequence_once_within_the_budget(drawn, budget, at_least):
    owners = [one.prompt_ids for one in drawn]
    lengths = [len(one.response_ids) for one in drawn]
    bins = plan_bins(owners, lengths, budget=budget, agree=lambda count: max(count, at_least))
    assert len(bins) >= at_least
    assert sorted(i for members in bins for i in members) == list(range(len(drawn)))
    for members in bins:
        known = sum(map(len, {owners[i] for i in members}))
        assert known + sum(lengths[i] for i in members) <= budget


@few
@given(sequences(), st.integers(1, 5))
def test_shares_hold_every_sequence_once(drawn, num_ranks):
    owners = [one.prompt_ids for one in drawn]
    shares = plan_shares(owners, [len(one.response_ids) for one in drawn], num_ranks=num_ranks)
    assert len(shares) == num_ranks
    assert sorted(i for members in shares for i in members) == list(range(len(drawn)))


# Advantages.

# Multiples of 1/8: sums and differences of them are exact, so that equal stays equal.
number = st.integers(-40, 40).map(lambda n: n / 8)


@st.composite
def tables(draw):
    """Rewards, which of them are valid, and which completions are finished, each [P, G]."""
    shape = draw(st.integers(1, 4)), draw(st.integers(2, 6))

    def table(element, dtype):
        row = st.lists(element, min_size=shape[1], max_size=shape[1])
        return torch.tensor(draw(st.lists(row, min_size=shape[0], max_size=shape[0])), dtype=dtype)

    return table(number, torch.float32), *(table(st.booleans(), torch.bool) for _ in range(2))


scales = st.sampled_from(["std", "none"])


@few
@given(tables(), scales, number, st.randoms(use_true_random=False))
def test_advantages_are_relative_to_their_group(drawn, scale, shift, rng):
    rewards, is_valid, _ = drawn
    found = group_advantages(rewards, is_valid=is_valid, scale=scale)
    assert torch.all(found.isfinite()) and torch.all(found[~is_valid] == 0)
    assert found.sum(dim=1).abs().max() < 1e-4
    moved = group_advantages(rewards + shift, is_valid=is_valid, scale=scale)
    torch.testing.assert_close(moved, found, atol=1e-4, rtol=1e-4)
    order = rng.sample(range(rewards.shape[1]), rewards.shape[1])
    turned = group_advantages(rewards[:, order], is_valid=is_valid[:, order], scale=scale)
    torch.testing.assert_close(turned, found[:, order], atol=1e-5, rtol=1e-5)
    # More reward, more advantage.
    for row, valid, values in zip(rewards, is_valid, found, strict=True):
        ordered = sorted(zip(row[valid].tolist(), values[valid].tolist(), strict=True))
        assert all(a[1] <= b[1] + 1e-6 for a, b in zip(ordered, ordered[1:], strict=False))


@few
@given(tables(), tables(), st.floats(0, 1), scales)
def test_mixed_advantages_keep_a_mean_of_zero(drawn, other, tau, scale):
    rewards, is_valid, is_finished = drawn
    scores = other[0].flatten()[:1].expand_as(rewards) + rewards.flip(1) / 4
    own = group_advantages(rewards, is_valid=is_valid, scale=scale)
    options = {"min_std": 0.1, "is_valid": is_valid, "scale": scale}
    mixed = mix_advantages(own, scores, is_finished, tau=tau, **options)
    assert torch.all(mixed.isfinite()) and torch.all(mixed[~is_valid] == 0)
    assert mixed.sum(dim=1).abs().max() < 1e-3
    torch.testing.assert_close(mix_advantages(own, scores, is_finished, tau=0.0, **options), own)


# Votes.

answers = st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=10)
score = st.floats(-2, 3)


@few
@given(answers, st.data())
def test_a_vote_goes_to_the_most_weight_in_any_order(drawn, data):
    weights = data.draw(st.lists(number.map(abs), min_size=len(drawn), max_size=len(drawn)))
    total = Counter()
    for answer, weight in zip(drawn, weights, strict=True):
        total[answer] += weight
    del total[None]
    order = data.draw(st.permutations(range(len(drawn))))
    winner = majority_vote(drawn, weights)
    turned = majority_vote([drawn[i] for i in order], [weights[i] for i in order])
    assert (winner is None) == (not total) == (turned is None)
    if total:
        assert total[winner] == total[turned] == max(total.values())
        # A vote that outweighs all others wins.
        heavy = sum(weights) + 1
        assert majority_vote([*drawn, "z"], [*weights, heavy]) == "z"


@few
@given(answers, st.data())
def test_shares_at_k_are_shares(drawn, data):
    size = len(drawn)
    k = data.draw(st.integers(1, size))
    right = data.draw(st.sampled_from(["a", "b"]))
    is_correct = [answer == right for answer in drawn]
    scores = data.draw(st.lists(score, min_size=size, max_size=size))
    passed = [pass_at_k(is_correct, n) for n in range(1, size + 1)]
    assert passed == sorted(passed) and math.isclose(passed[0], sum(is_correct) / size)
    vote = vote_at_k(answer_classes(drawn), is_correct, k)
    best = best_at_k(scores, [True] * size, is_correct, k)
    for share in (vote, best):
        assert 0 <= share <= passed[k - 1] + 1e-9
    if k == 1:
        assert math.isclose(vote, passed[0]) and math.isclose(best, passed[0])


@few
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), score), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(1, 1e6),
    st.randoms(use_true_random=False),
)
def test_a_posterior_is_a_probability_in_any_order(drawn, base_rate, num_wrong, rng):
    calibrated = Calibrated(base_rate=base_rate, num_wrong=num_wrong)
    confidences = []
    for samples in (drawn, rng.sample(drawn, len(drawn))):
        vote = PosteriorVote(calibrated)
        for answer, own in samples:
            vote.add(answer, own)
            assert 0 <= vote.confidence <= 1
        vote.add(None, 1.0)
        vote.add("a", None)
        confidences.append(vote.confidence)
        assert vote.votes[vote.winner] == max(vote.votes.values())
    assert math.isclose(*confidences, rel_tol=1e-6, abs_tol=1e-12)
    before = vote.confidence
    for _ in range(3):  # evidence for the winner never lowers its posterior
        vote.add(vote.winner, 2.0)
        if calibrated.evidence(2.0) >= 0:
            assert vote.confidence >= before - 1e-9
            before = vote.confidence


# Configuration.

SMALLEST = {
    "output_dir": "runs/a",
    "model": {"path": "m"},
    "data": {"train": "t.jsonl"},
    "optim": {"steps": 100},
}
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = {
    "seed": st.integers(0, 2**63 - 1),
    "output_dir": text.filter(lambda t: t and not t.startswith("~")),
    "model.compile": st.booleans(),
    "data.template": text.map(lambda t: t + "{prompt}" + t),
    "data.prompt_suffix": text,
    "optim.lr": st.floats(1e-300, 1e300),
    "optim.weight_decay": st.floats(0, 1e300),
    "optim.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
    "score.ref_logprob": st.sampled_from(["auto", "floating", -20, -30.5]),
    "reward.range": st.tuples(st.integers(-5, 0), st.floats(0.1, 9)).map(list),
    "rollout.group_size": st.integers(2, 10**9),
    "log.tensorboard": st.booleans(),
}
chosen = st.fixed_dictionaries({}, optional=VALUES)


def as_override(key, value):
    return f"{key}={tomli_w.dumps({'x': value}, multiline_strings=False)[4:-1]}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(tomli_w.dumps(SMALLEST), encoding="utf-8")
    return path


@few
@given(drawn=chosen, rng=st.randoms(use_true_random=False))
def test_overrides_are_idempotent_and_a_dump_loads_again(file, drawn, rng):
    overrides = [as_override(*item) for item in drawn.items()]
    config = load_config(file, overrides)
    assert load_config(file, overrides * 2) == config
    assert load_config(file, rng.sample(overrides, len(overrides))) == config
    for key, value in drawn.items():
        found = attrgetter(key)(config)
        assert (list(found) if isinstance(value, list) else found) == value
    dumped = file.with_name("dumped.toml")
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@few
@given(st.sampled_from(sorted(all_keys(Config))) | text, json_value)
def test_any_value_is_taken_or_refused_in_one_sentence(key, value):
    data = copy.deepcopy(SMALLEST)
    *sections, last = key.split(".")
    section = data
    for name in sections:
        section = section.setdefault(name, {})
        assume(isinstance(section, dict))
    section[last] = value
    try:
        Config.parse(data, source="run.toml")
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


# Graders.

LATEX = st.lists(
    st.sampled_from(
        r"\frac \sqrt \text \color \underline \boxed \left( \right) { } ^ _ , . - + = < > $ \$ %"
        r" 1 23 x \pi \infty \overline \phantom \, or and US m \{ \} [ ] ( ) : / ! \\ & ~".split()
    )
    | st.characters(),
    max_size=12,
).map("".join)


@few
@given(LATEX, st.sampled_from(["5", r"\frac{1}{2}", "(1, 2)"]))
def test_what_a_model_writes_is_graded(latex, gold):
    completion = rf"\boxed{{{latex}}}"
    assert math_reward.reward(completion, gold) in (0.0, 1.0)
    assert gsm8k.reward(completion, "#### 5") in (0.0, 1.0)
