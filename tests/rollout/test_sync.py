"""What an engine with a copy of the weights has to prove, wherever it samples."""

import math

import pytest
from tiny_models import SCORE_TOKEN, make_config

from laser_fast.config import ModelConfig
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.records import Prompt
from laser_fast.rollout.engine import CopyingEngine, DisagreementError, Engine
from laser_fast.rollout.sync import PROOF_PROMPTS, sync_engine

PROMPTS = [
    Prompt(prompt_id=str(i), text="", prompt_ids=tuple(range(3, 5 + i)), answer="")
    for i in range(PROOF_PROMPTS + 1)
]


class Copy(CopyingEngine):
    """An engine whose log-probs are the policy's, and `error` more."""

    def __init__(self, policy, world, error):
        self.policy, self.world, self.error, self.synced, self.asked = policy, world, error, 0, []

    def sync(self, weights):
        self.synced = len(list(weights))

    def token_logprobs(self, groups, *, temperature):
        self.asked = groups
        packer = Packer(
            budget=99,
            score_token_id=SCORE_TOKEN,
            score_at="eos",
            temperature=temperature,
            device=self.world.device,
        )
        found = policy_logprobs(self.policy, groups, packer)
        return [[logprob + self.error for logprob in tokens] for tokens, _ in found]


@pytest.fixture(scope="module")
def policy(world, model_folders):
    return build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)


def test_a_copy_is_compared_on_the_tokens_of_a_few_prompts(policy, world):
    config = make_config(rollout={"temperature": 0.7, "max_disagreement": 0.2})
    engine = Copy(policy, world, error=0.1)
    assert sync_engine(engine, policy, PROMPTS, config, world) == pytest.approx(0.1, abs=1e-5)
    assert engine.synced > 3
    given = [
        (group.prompt.prompt_ids, group.completions[0].completion_ids) for group in engine.asked
    ]
    assert [first + rest for first, rest in given] == [p.prompt_ids for p in PROMPTS[:-1]]
    for error in (0.3, math.nan):
        with pytest.raises(DisagreementError, match="weights are stale or incomplete"):
            sync_engine(Copy(policy, world, error), policy, PROMPTS, config, world)


def test_a_rank_without_prompts_and_an_engine_without_a_copy_prove_nothing(policy, world):
    config = make_config()
    assert sync_engine(Copy(policy, world, error=9.0), policy, [], config, world) == 0.0

    class Shared(Engine):
        pass

    assert sync_engine(Shared(), policy, PROMPTS, config, world) == 0.0


def test_prompts_longer_than_a_microbatch_are_read_whole(policy, world):
    sizes = {"optim": {"tokens_per_microbatch": 20}, "data": {"max_prompt_tokens": 8}}
    long = [Prompt(prompt_id="l", text="", prompt_ids=tuple(range(3, 33)), answer="")]
    engine = Copy(policy, world, error=0.0)
    assert sync_engine(engine, policy, long, make_config(**sizes), world) == pytest.approx(0.0)
