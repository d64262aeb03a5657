"""Save and load the whole state of a run with torch.distributed.checkpoint.

A checkpoint is a folder `checkpoints/step-000050` with one shard file per rank, `trainer.json`
(step, reference log-prob, gradient-cap state, digests of the data) and the resolved `config.toml`.
It is written under a temporary name and renamed when complete, so a folder of that name is always
whole. It can be loaded on another number of ranks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from laser_fast.config import ConfigError
from laser_fast.model.distributed import World
from laser_fast.model.policy import Policy


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    return sorted(found, key=lambda path: found[path])


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint; a ConfigError says that there is none."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ConfigError(f"{run / 'checkpoints'}: no complete checkpoint to resume from")
    return checkpoints[-1]


def save_checkpoint(
    run: Path,
    step: int,
    *,
    policy: Policy,
    optimizer: Optimizer,
    trainer_state: dict[str, Any],
    config_toml: str,
    keep: int,
    world: World,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. Collective."""
    final = run / "checkpoints" / f"step-{step:06d}"
    if final.exists():  # the last step may already be saved by its own schedule
        return final
    partial = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    dcp.save(_state(policy, optimizer), checkpoint_id=partial)
    if world.is_main:
        (partial / "trainer.json").write_text(json.dumps({"step": step, **trainer_state}))
        (partial / "config.toml").write_text(config_toml)
        partial.rename(final)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def load_checkpoint(path: Path, *, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Restore model and optimizer in place and return the trainer's state. Collective."""
    state = _state(policy, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=True),
    )
    return trainer_state(path)


def trainer_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as such, and the step."""
    return json.loads((path / "trainer.json").read_text())


def _state(policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Sharded state of model and optimizer; its tensors are theirs. Collective."""
    is_new = not optimizer.state
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    if is_new:
        # torch makes the missing moments by an update of zero gradients, which AdamW counts.
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": model_state, "optimizer": optimizer_state}
