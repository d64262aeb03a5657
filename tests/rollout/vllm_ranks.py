"""Run under torchrun by test_vllm_ranks.py: FSDP2 shards and vLLM in the same processes.

Prints one JSON line on rank 0: per round the disagreement of both ranks and the draws.
"""

import json
import sys

import torch
import torch.distributed as dist

from laser_fast.config import ModelConfig, RolloutConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.policy import build_policy
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import check_agreement
from laser_fast.rollout.vllm import VllmEngine

TOKENS = SpecialTokens(score_token_id=7, eos_token_ids=(2, 3), pad_token_id=0, vocab_size=120)


def main(path, tensor_parallel):
    with open_world() as world:
        policy = build_policy(ModelConfig(path=path), world)
        engine = VllmEngine(
            path,
            RolloutConfig(engine="vllm", max_new_tokens=16, tensor_parallel=tensor_parallel),
            TOKENS,
            max_model_len=64,
        )
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.03)
        rounds = []
        for number in range(2):
            engine.sync(policy.stream_weights(world.device))
            # The ranks hold different numbers of prompts, of different lengths.
            prompts = [
                Prompt(prompt_id=f"{i}", text="", prompt_ids=tuple(range(10, 13 + i)), answer="")
                for i in ([0, 1, 2], [3])[world.rank]
            ]
            sampling = Sampling(group_size=4, temperature=1.0, max_new_tokens=16, seed=number)
            groups = engine.generate(prompts, sampling)
            given = engine.token_logprobs(groups, temperature=1.0)
            with policy.unsharded(), torch.no_grad():
                expected = [
                    read(policy.hf, g.prompt.prompt_ids, c.completion_ids)
                    for g in groups
                    for c in g.completions
                ]
            sampled = [c.rollout_logprobs for g in groups for c in g.completions]
            found = {
                "given": check_agreement(given, expected),
                "rollout": check_agreement(sampled, expected),
                "draws": {
                    g.prompt.prompt_id: [c.completion_ids for c in g.completions] for g in groups
                },
                "scores": sum(c.score_logprob is not None for g in groups for c in g.completions),
            }
            rounds.append(world.gather([found]))
            # Any update will do, as long as it moves every shard.
            for parameter in policy.parameters():
                parameter.grad = parameter.detach().sign()
            optimizer.step()
        engine.close()
        world.barrier()  # the process group outlives the engine
        if world.is_main:
            print(json.dumps(rounds))
    assert not dist.is_initialized()


def read(model, prompt_ids, completion_ids):
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    chosen = torch.tensor(completion_ids)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
