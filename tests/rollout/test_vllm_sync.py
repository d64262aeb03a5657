"""Weights into the real engine, and the agreement check on weights that did not arrive."""

import pytest
import torch

from laser_fast.records import Prompt, Sampling
from laser_fast.rollout.engine import DisagreementError, check_agreement
from laser_fast.rollout.vllm import VllmEngine

pytestmark = pytest.mark.vllm
SYNCED = 5e-3 if torch.cuda.is_available() else 1e-5  # a GPU may multiply in TF32
SAMPLING = Sampling(group_size=4, temperature=1.0, max_new_tokens=24, seed=0)
# Two full blocks of the prefix cache and a little more.
PROMPTS = [
    Prompt(prompt_id=str(i), text="", prompt_ids=tuple(range(10 + i, 80 + i)), answer="")
    for i in range(3)
]


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny):
    """The same architecture with different weights: the policy after many steps."""
    return type(tiny).make(tmp_path_factory.mktemp("other"), seed=1)


def given_disagreement(engine, policy, groups):
    return check_agreement(
        engine.token_logprobs(groups, temperature=1.0), policy.token_logprobs(groups)
    )


def rollout_disagreement(policy, groups):
    rollout = [c.rollout_logprobs for group in groups for c in group.completions]
    return check_agreement(rollout, policy.token_logprobs(groups))


def load_past_the_accounting(engine, weights):
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    engine._llm.reset_prefix_cache()


def test_a_sync_replaces_every_weight_and_forgets_cached_prefixes(engine, tiny, other):
    for policy in (tiny, other, tiny):
        engine.sync(policy.weights())
        groups = engine.generate(PROMPTS, SAMPLING)
        assert rollout_disagreement(policy, groups) < SYNCED
        assert given_disagreement(engine, policy, groups) < SYNCED


def test_untied_heads_sync_too(tmp_path, tiny):
    untied = type(tiny).make(tmp_path, seed=2, tied=False)
    engine = untied.engine()
    engine.sync(untied.weights())
    assert rollout_disagreement(untied, engine.generate(PROMPTS, SAMPLING)) < SYNCED
    engine.close()


@pytest.mark.parametrize(
    "skipped",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
        "lm_head.weight",  # tied to the embedding, but on a CPU since 0.29 packed apart
    ],
)
def test_the_agreement_check_catches_a_tensor_that_was_not_sent(engine, tiny, other, skipped):
    groups = engine.generate(PROMPTS, SAMPLING)
    # Norms start at one in both models: make sure that every tensor differs.
    weights = {name: w + 0.05 * torch.randn_like(w) for name, w in other.weights()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    policy = type(tiny)(other.path, type(other.model)(other.model.config).eval())
    policy.model.load_state_dict(weights)

    load_past_the_accounting(engine, weights.items())
    assert given_disagreement(engine, policy, groups) < SYNCED
    engine.sync(tiny.weights())
    load_past_the_accounting(engine, [item for item in weights.items() if item[0] != skipped])
    if skipped == "lm_head.weight" and given_disagreement(engine, policy, groups) < SYNCED:
        return  # one memory, as on a GPU: it came with the embedding
    with pytest.raises(DisagreementError, match="stale or incomplete"):
        check_agreement(
            engine.token_logprobs(groups, temperature=1.0),
            policy.token_logprobs(groups),
            max_disagreement=max(1e-3, SYNCED),
        )
    load_past_the_accounting(engine, weights.items())
    assert given_disagreement(engine, policy, groups) < SYNCED


def test_stale_cached_prefixes_show_in_the_rollout(engine, tiny, other):
    engine.generate(PROMPTS, SAMPLING)
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": other.weights()})
    assert rollout_disagreement(other, engine.generate(PROMPTS, SAMPLING)) > 0.1
    engine.sync(other.weights())
    assert rollout_disagreement(other, engine.generate(PROMPTS, SAMPLING)) < SYNCED


def test_missing_and_unknown_tensors_stop_the_sync_and_the_engine(engine, tiny):
    groups = engine.generate(PROMPTS, SAMPLING)
    weights = dict(tiny.weights())
    weights["model.extra"] = weights.pop("model.norm.weight")
    with pytest.raises(
        ValueError, match=r"missing: model\.norm\.weight; unknown or repeated: model\.extra"
    ):
        engine.sync(iter(weights.items()))
    for use in (
        lambda: engine.generate(PROMPTS, SAMPLING),
        lambda: engine.token_logprobs(groups, temperature=1.0),
    ):
        with pytest.raises(RuntimeError, match="call sync first"):
            use()
    engine.sync(tiny.weights())
    assert given_disagreement(engine, tiny, groups) < SYNCED


class WakesTooLate(VllmEngine):
    """Streams first and wakes the weights' memory afterwards."""

    def sync(self, weights):
        awake, self._is_asleep = self._is_asleep, False
        super().sync(weights)
        self._is_asleep = awake
        self._wake("weights")
        self._wake("kv_cache")
        self._is_asleep = False


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU sleeps for real")
@pytest.mark.parametrize("engine_class", [VllmEngine, WakesTooLate])
def test_the_agreement_check_catches_weights_streamed_before_the_wake_up(
    engine, tiny, monkeypatch, engine_class
):
    # The CPU worker cannot sleep. Level 2 drops the weights, and waking maps fresh memory: noise.
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    calls = []

    def wake_up(tags):
        calls.append(tags)
        if tags == ["weights"]:
            for parameter in worker.model_runner.model.parameters():
                torch.nn.init.normal_(parameter.data)

    monkeypatch.setattr(worker, "sleep", lambda level: calls.append(level))
    monkeypatch.setattr(worker, "wake_up", wake_up)
    monkeypatch.setattr(engine, "__class__", engine_class)
    groups = engine.generate(PROMPTS, SAMPLING)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        engine.sleep()
    with pytest.raises(RuntimeError, match="call sync first"):
        engine.generate(PROMPTS, SAMPLING)
    engine.sync(tiny.weights())
    if engine_class is VllmEngine:
        assert calls == [2, ["weights"], ["kv_cache"]]
        assert given_disagreement(engine, tiny, groups) < SYNCED
    else:
        with pytest.raises(DisagreementError):
            check_agreement(
                engine.token_logprobs(groups, temperature=1.0),
                tiny.token_logprobs(groups),
                max_disagreement=0.1,
            )
