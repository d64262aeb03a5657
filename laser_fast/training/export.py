"""A run's newest checkpoint as an ordinary Hugging Face model folder."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict

from laser_fast.config import ConfigError, ModelConfig, load_config
from laser_fast.evaluation.settings import write_score_settings
from laser_fast.log.run_folder import RunFolder, moved_config
from laser_fast.model.distributed import World, open_world
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import load_tokenizer
from laser_fast.training.checkpoint import latest_checkpoint, read_state


def write_model(policy: Policy, config: ModelConfig, out: Path, world: World) -> None:
    """Write the policy and the tokenizer of its base model, whole or not at all. Collective.

    In the dtype that the base model was stored in; what was at `out` is replaced.
    """
    full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = state_dict.get_model_state_dict(policy.hf, options=full)
    if world.is_main:
        dtype = load_model_config(config).dtype or torch.float32
        weights = {k: t.to(dtype) for k, t in found.items() if isinstance(t, Tensor)}
        policy.hf.config.dtype = dtype
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        policy.hf.save_pretrained(partial, state_dict=weights)
        load_tokenizer(config.path).save_pretrained(partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    world.barrier()


def export(run: Path, out: Path) -> Path:
    """Write the policy of `run` to `out`, in the dtype that its base model was stored in.

    A score that was trained goes with it, as laser_fast.json. Returns the checkpoint; a ConfigError
    says that `run` is no run or has no checkpoint, or that `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose a new folder for the exported model")
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder ({folder.config.name} is missing)")
    checkpoint = latest_checkpoint(run)
    config = moved_config(load_config(folder.config), run)
    model, score = config.model, config.score
    load_tokenizer(model.path)  # a missing one is named before the model is loaded
    with open_world() as world:
        policy = build_policy(model, world)
        state = {"model": state_dict.get_model_state_dict(policy)}
        read_state(checkpoint, state)
        state_dict.set_model_state_dict(policy, state["model"])
        write_model(policy, model, out, world)
    ref_logprob = json.loads((checkpoint / "trainer.json").read_text())["ref_logprob"]
    if score.loss_coef > 0:
        settings = score.model_copy(update={"ref_logprob": ref_logprob})
        write_score_settings(out, settings)
    return checkpoint
