"""Run by test_vllm_families.py in a process of its own: one engine after the other.

Engines of one process share vLLM's process groups, which go with the first that ends, so that all
stay. Prints one JSON line of all families.
"""

import functools
import json
import sys

import torch
from family_models import save_family
from torch.distributed.tensor import DTensor

from laser_fast.config import ConfigError, ModelConfig, RolloutConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import check_agreement
from laser_fast.rollout.vllm import VllmEngine, import_vllm

# The CPU attention has head dimensions of 32 and more.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = SpecialTokens(
    score_token_id=5,
    eos_token_ids=(2, *range(60, 97)),  # many, so that random models come to an end
    pad_token_id=0,
    vocab_size=97,
)
# Longer than the windows.
PROMPTS = [
    Prompt(prompt_id=str(i), text="", prompt_ids=tuple(range(10, 17 + i)), answer="")
    for i in range(3)
]


def main(folder, families, refused):
    vllm = import_vllm()
    vllm.LLM = functools.partial(vllm.LLM, num_gpu_blocks_override=64)  # else 1 GiB each
    engines, found = [], {}
    with open_world() as world:
        for family, (changes, lora_rank) in families.items():
            path = f"{folder}/{family}"
            save_family(path, family, **SIZES | changes)
            policy = build_policy(ModelConfig(path=path, lora_rank=lora_rank), world)
            engines.append(make_engine(path))
            found[family] = [measure(policy, engines[-1], number, world) for number in range(2)]
        messages = {}
        for family in refused:
            path = f"{folder}/refused-{family}"
            save_family(path, family, **SIZES)
            try:
                make_engine(path)
            except ConfigError as error:
                messages[family] = str(error)
    print(json.dumps([found, messages]))


def make_engine(path):
    rollout = RolloutConfig(engine="vllm", max_new_tokens=12, max_num_seqs=16)
    return VllmEngine(path, rollout, TOKENS, max_model_len=64)


@torch.no_grad()
def measure(policy, engine, number, world):
    """Move every weight, then sync: how far the engine is from the policy, at most, in nats."""
    torch.manual_seed(number)
    for parameter in policy.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        own.add_(torch.randn_like(own), alpha=0.1)
    packer = Packer(
        budget=256, score_token_id=5, score_at="eos", temperature=0.7, device=world.device
    )
    sampling = Sampling(group_size=6, temperature=0.7, max_new_tokens=12, seed=number)
    stale = None
    if number:
        groups = engine.generate(PROMPTS, sampling)
        read = [tokens for tokens, _ in policy_logprobs(policy, groups, packer)]
        stale = check_agreement(engine.token_logprobs(groups, temperature=0.7), read)

    engine.sync(policy.stream_weights(world.device))
    groups = engine.generate(PROMPTS, sampling)
    completions = [c for group in groups for c in group.completions]
    read = policy_logprobs(policy, groups, packer)
    tokens, scores = [], []
    for completion, (logprobs, score) in zip(completions, read, strict=True):
        pairs = zip(completion.rollout_logprobs, logprobs, strict=True)
        tokens += [abs(theirs - ours) for theirs, ours in pairs]
        if completion.is_finished:
            scores.append(abs(completion.score_logprob - score))
    return {
        "stale": stale,
        "tokens": max(tokens),
        "scores": max(scores, default=None),
        "num_tokens": len(tokens),
        "num_scores": len(scores),
    }


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
