"""What two ranks compute with 8-bit optimizer states, for tests/training/test_state_bits.py.

python state_ranks.py MODEL RUN OUT
"""

import sys
from pathlib import Path

import torch
import torchao.optim  # noqa: F401  # before the ranks are forked
from fork_ranks import run_ranks
from policy_ranks import SEQUENCES, backward, checkpoint_config, full_parameters

from laser_fast.config import ModelConfig, UpdateConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.policy import build_policy
from laser_fast.training.checkpoint import load_checkpoint, save_checkpoint
from laser_fast.training.update import apply_gradients, build_optimizer


def moments(optimizer):
    """This rank's moments, quantized ones by their parts."""
    found = []
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            local = state[name].to_local()
            is_quantized = hasattr(local, "codes")
            found += [local.codes, local.scale, local.qmap] if is_quantized else [local]
        found.append(state["step"])
    return found


def run(model, run_folder, out):
    """One rank: an update, a checkpoint, and an update after it, undisturbed and resumed."""
    config = ModelConfig(path=str(model))
    with open_world() as world, torch.compiler.set_stance("force_eager"):

        def build(bits):
            policy = build_policy(config, world)
            return policy, build_optimizer(policy, UpdateConfig(steps=9, state_bits=bits))

        def update(policy, optimizer, lr):
            backward(policy, world, SEQUENCES)
            apply_gradients(policy, optimizer, world, UpdateConfig(steps=9), lr=lr)
            return full_parameters(policy)

        found = {"32 bits": update(*build(32), 0.01)}
        policy, optimizer = build(8)
        found["8 bits"] = update(policy, optimizer, 0.01)
        assert any(moment.dtype == torch.uint8 for moment in moments(optimizer))
        keys = {"policy": policy, "optimizer": optimizer, "state": {}, "world": world}
        save_checkpoint(checkpoint_config(config, run_folder), 1, **keys)
        before = [moment.clone() for moment in moments(optimizer)]
        found["undisturbed"] = update(policy, optimizer, 0.02)
        policy, optimizer = build(8)
        path = run_folder / "checkpoints" / "step-000001"
        load_checkpoint(path, policy=policy, optimizer=optimizer)
        after = moments(optimizer)
        assert len(before) == len(after) and all(map(torch.equal, before, after))
        found["resumed"] = update(policy, optimizer, 0.02)
        if world.is_main:
            torch.save(found, out)


if __name__ == "__main__":
    run_ranks(2, run, *map(Path, sys.argv[1:]))
