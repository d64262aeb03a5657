"""Weights into an engine, and the proof that they arrived."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from laser_fast.config import MeasureConfig
from laser_fast.model.distributed import World
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.records import Completion, Group, Prompt
from laser_fast.rollout.engine import CopyingEngine, Engine, check_agreement

# Prompts per rank whose tokens prove a sync: one stale tensor moves every token.
PROOF_PROMPTS = 4


def sync_engine(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Prompt],
    config: MeasureConfig,
    world: World,
    *,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Hand the policy's weights to an engine and prove that it holds them. Collective.

    Engine and policy read the log-probs of the tokens of a few of this rank's `prompts`, which need
    no sampling; the engine does so within `reading()`. Returns their mean distance in nats, 0 for
    an engine without a copy. Above `rollout.max_disagreement` it raises a DisagreementError.
    """
    engine.sync(policy.stream_weights(world.device))
    if not isinstance(engine, CopyingEngine):
        return 0.0
    prompts = prompts[:PROOF_PROMPTS]
    given = [_as_group(prompt) for prompt in prompts]
    with reading():
        read = engine.token_logprobs(given, temperature=config.rollout.temperature)
    packer = Packer(
        budget=max([config.optim.tokens_per_microbatch, *(len(p.prompt_ids) for p in prompts)]),
        temperature=config.rollout.temperature,
        device=world.device,
        agree=world.max,
    )
    own = [tokens for tokens, _ in policy_logprobs(policy, given, packer)]
    return check_agreement(read, own, max_disagreement=config.rollout.max_disagreement)


def _as_group(prompt: Prompt) -> Group:
    """The prompt's own tokens as a completion of its first, to read their log-probs."""
    first, rest = prompt.prompt_ids[:1], prompt.prompt_ids[1:]
    given = Completion(
        completion_ids=rest, rollout_logprobs=(0.0,) * len(rest), finish_reason="length"
    )
    return Group(prompt=replace(prompt, prompt_ids=first), completions=(given,))
