"""Run by test_trl_vllm.py in a process of its own: TRL's GRPO with the score, sampled by vLLM.

    python trl_on_vllm.py MODEL

prints what each step logged, and whether every completion's end is an EOS or the limit.
"""

import functools
import json
import sys

import trl_runs
from trl.generation import vllm_generation

from bench.grpo_step import reload_weights
from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer

# What TRL leaves to vLLM, which would choose bfloat16.
vllm_generation.LLM = functools.partial(
    vllm_generation.LLM, dtype="float32", enforce_eager=True, block_size=32
)
vllm_generation.VLLMGeneration.sync_weights = reload_weights


def main(folder):
    seen = []

    def verifier(completion_ids, **_):
        seen.extend(completion_ids)
        return trl_runs.odd_sum(completion_ids)

    trainer = trl_runs.make_trainer(
        LaserGRPOTrainer,
        LaserConfig,
        folder,
        reward=verifier,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_steps=3,
        learning_rate=1e-3,
        temperature=0.7,
    )
    trainer.train()
    trainer.vllm_generation.llm.llm_engine.engine_core._finalizer.detach()
    limit = trainer.max_completion_length
    are_whole = [ids[-1] == trl_runs.EOS or len(ids) == limit for ids in seen]
    num_ended = sum(ids[-1] == trl_runs.EOS for ids in seen)
    found = {"steps": trl_runs.losses(trainer), "whole": all(are_whole), "ended": num_ended}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
