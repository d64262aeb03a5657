"""What two ranks compute with 4-bit weights, for tests/model/test_lora.py.

python qlora_ranks.py MODEL OUT
"""

import sys
from pathlib import Path

import bitsandbytes  # noqa: F401  # before the ranks are forked
import torch
from fork_ranks import run_ranks
from policy_ranks import SEQUENCES, adapt, backward, full, measure_checkpoint

from laser_fast.config import ModelConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.policy import build_policy

LAYOUTS = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True, "activation_offload": True},
    "offloaded": {"cpu_offload": True, "reshard_after_forward": False},
    "replicas": {"replicas": 2},
}


def run(model, out):
    """One rank."""
    found = {"gradients": {}}
    with open_world() as world:
        for name, keys in LAYOUTS.items():
            config = ModelConfig(
                path=str(model), lora_rank=3, lora_alpha=6.0, lora_4bit=True, **keys
            )
            policy = adapt(build_policy(config, world))
            backward(policy, world, SEQUENCES)
            named = policy.hf.named_parameters()
            found["gradients"][name] = {n: full(p.grad) for n, p in named if p.requires_grad}
            if not keys:
                found["stream"] = dict(policy.stream_weights(world.device))
                found["checkpoint"] = measure_checkpoint(config, world, out / "run")
        if world.is_main:
            torch.save(found, out / "out.pt")


if __name__ == "__main__":
    run_ranks(2, run, *map(Path, sys.argv[1:]))
