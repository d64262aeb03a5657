"""A run's newest checkpoint as an ordinary Hugging Face model folder."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict

from laser_fast.config import ConfigError, ModelConfig, load_config
from laser_fast.evaluation.settings import write_score_settings
from laser_fast.log.run_folder import RunFolder, moved_config
from laser_fast.model.distributed import World, open_world
from laser_fast.model.lora import merged, write_adapter
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import load_tokenizer
from laser_fast.model.weights import base_digest
from laser_fast.training.checkpoint import (
    check_digests,
    latest_checkpoint,
    load_trained,
    trainer_state,
)


def write_model(
    policy: Policy, config: ModelConfig, out: Path, world: World, *, adapter: bool = False
) -> None:
    """Write the policy and the tokenizer of its base model, whole or not at all. Collective.

    In the dtype that the base model was stored in; what was at `out` is replaced. Adapters are
    merged into the weights as they were trained with, in the compute dtype; or with `adapter` they
    are all that is written.
    """
    full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = state_dict.get_model_state_dict(policy.hf, options=full)
    if world.is_main:
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if adapter:
            write_adapter(found, policy.hf, partial)
        else:
            dtype = load_model_config(config).dtype or torch.float32
            weights = {k: t.to(dtype) for k, t in merged(found, policy.hf)}
            policy.hf.config.dtype = dtype
            policy.hf.save_pretrained(partial, state_dict=weights)
        load_tokenizer(config.path).save_pretrained(partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    world.barrier()


def export(run: Path, out: Path, *, adapter: bool = False) -> Path:
    """Write the policy of `run` to `out`, in the dtype that its base model was stored in.

    A score that was trained goes with it, as laser_fast.json. With `adapter` only the adapters are
    written, as a folder of peft. Returns the checkpoint; a ConfigError says that `run` is no run,
    has no checkpoint or no adapters, or that `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose a new folder for the exported model")
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder ({folder.config.name} is missing)")
    checkpoint = latest_checkpoint(run)
    config = moved_config(load_config(folder.config), run)
    model, score = config.model, config.score
    if adapter and not model.lora_rank:
        raise ConfigError(f"{run} trained no adapters (model.lora_rank = 0); export the model")
    load_tokenizer(model.path)  # a missing one is named before the model is loaded
    with open_world() as world:
        policy = build_policy(model, world)
        check_digests(checkpoint, base_digest(model, policy.hf.config))
        load_trained(checkpoint, policy)
        write_model(policy, model, out, world, adapter=adapter)
    if score.loss_coef > 0:
        ref_logprob = trainer_state(checkpoint)["ref_logprob"]
        settings = score.model_copy(update={"ref_logprob": ref_logprob})
        write_score_settings(out, settings)
    return checkpoint
