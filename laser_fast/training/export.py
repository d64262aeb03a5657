"""A run's checkpoint, or the run as it goes on, as an ordinary Hugging Face model folder."""

import copy
import logging
import shutil
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict

from laser_fast.config import Config, ConfigError, ModelConfig, ScoreConfig, load_config
from laser_fast.config_errors import RunError
from laser_fast.evaluation.settings import write_score_settings
from laser_fast.files import replacing
from laser_fast.log.console import evaluation_line
from laser_fast.log.jsonl import read_json, replace_text, to_text
from laser_fast.log.run_folder import RunFolder, moved_config, steps_in
from laser_fast.model.distributed import World, open_world
from laser_fast.model.lora import merged, write_adapter
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import find_eos_token_ids, load_tokenizer
from laser_fast.model.weights import base_digest
from laser_fast.stopping import is_asked
from laser_fast.training.best import standing
from laser_fast.training.checkpoint import (
    check_digests,
    latest_checkpoint,
    load_trained,
    trainer_state,
)
from laser_fast.training.hub import check_hub, upload
from laser_fast.training.schedule import is_due
from laser_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


def write_model(
    policy: Policy,
    config: ModelConfig,
    out: Path,
    world: World,
    *,
    adapter: bool = False,
    score: ScoreConfig | None = None,
) -> None:
    """Write the policy and the tokenizer of its base model, whole or not at all. Collective.

    In the dtype that the base model's config.json names, or float32; what was at `out` is replaced.
    Adapters are merged into the weights as they were trained with, in the compute dtype; or with
    `adapter` they are all that is written. A `score` that was trained goes with it, as
    laser_fast.json.
    """
    full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = state_dict.get_model_state_dict(policy.hf, options=full)

    def write() -> None:
        tokenizer = load_tokenizer(config.path)
        with replacing(out) as partial:
            if adapter:
                write_adapter(found, policy.hf, partial)
            else:
                dtype = load_model_config(config).dtype or torch.float32
                fixed = {name for name, _ in policy.hf.named_buffers()}  # which routers read so
                entries = merged(found, policy.hf)
                weights = {k: t if k in fixed else t.to(dtype) for k, t in entries}
                policy.hf.save_pretrained(partial, state_dict=weights)
                # What ended completions in training does so wherever the model is served. As JSON:
                # transformers saves no changed settings of which it only warned.
                ends = find_eos_token_ids(config.path, tokenizer, policy.hf.config)
                file = partial / "generation_config.json"
                replace_text(file, to_text(read_json(file) | {"eos_token_id": list(ends)}))
                stored = copy.deepcopy(policy.hf.config)  # transformers wrote that of the masters
                stored.dtype = dtype
                stored.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if score is not None and score.loss_coef > 0:
                write_score_settings(partial, score)

    world.on_main(write)


def export(
    run: Path, out: Path, *, adapter: bool = False, checkpoint: str = "latest", push: str = ""
) -> Path:
    """Write the policy of `run` to `out`, as `write_model` does.

    A score that was trained goes with it, as laser_fast.json. With `adapter` only the adapters are
    written, as a folder of peft. `checkpoint` is "latest", "best" by `checkpoint.best` of the run,
    or a step; `push` names a repository of the hub that gets the folder, too. Returns the
    checkpoint; a ConfigError says that `run` is no run, has no such checkpoint or no adapters, or
    that `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose a new folder for the exported model")
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder ({folder.config.name} is missing)")
    config = moved_config(load_config(folder.config), run)
    path = _find_checkpoint(config, checkpoint)
    model = config.model.model_copy(update={"replicas": 1})  # those of the run had its ranks
    if adapter and not model.lora_rank:
        raise ConfigError(f"{run} trained no adapters (model.lora_rank = 0); export the model")
    if push:
        check_hub(push)
    load_tokenizer(model.path)  # a missing one is named before the model is loaded
    score, known = config.score, {"ref_logprob": trainer_state(path).ref_logprob}
    if score.loss_coef > 0:
        score = ScoreConfig.parse(score.model_dump() | known, source=f"{path}/trainer.json")
    with open_world() as world:
        policy = build_policy(model, world)
        check_digests(path, base_digest(model, policy.hf.config))
        load_trained(path, policy)
        write_model(policy, model, out, world, adapter=adapter, score=score)
    if push and world.is_main and not upload(out, push, f"{path.name} of {run.name}"):
        raise RunError(f"{out} is written, but not uploaded; see the warning above")
    return path


def _find_checkpoint(config: Config, name: str) -> Path:
    run = Path(config.output_dir)
    if name == "latest":
        return latest_checkpoint(run)
    saved = {str(step): path for step, path in steps_in(RunFolder(run).checkpoints).items()}
    found = saved.get(str(standing(config).step) if name == "best" else name)
    if found is None:
        known = ", ".join(["latest", "best (with checkpoint.best)", *saved])
        raise ConfigError(f'{run} has no checkpoint "{name}"; choose among {known}')
    return found


class Exports:
    """What `checkpoint.export_every` and `checkpoint.hub_repo` ask for while a run goes on."""

    def __init__(self) -> None:
        self._upload = Thread()  # the last that began

    def write(self, trainer: Trainer, step: int, *, is_last: bool) -> None:
        """Write the model after `step` steps if it is due and not there, and sweep. Collective.

        Its upload begins in the background; while another goes on it is left out with a warning,
        but the last one waits, and begins again when a run that is through is resumed.
        """
        config, world = trainer.config, trainer.world
        every, repo = config.checkpoint.export_every, config.checkpoint.hub_repo
        folder = RunFolder(Path(config.output_dir))
        out = folder.exports / f"step-{step:06d}"
        if not is_due(step, every) and not (is_last and (every > 0 or repo)):
            return
        if not world.on_main(out.exists):
            score = config.score.model_copy(update={"ref_logprob": trainer.score.ref_logprob})
            write_model(trainer.policy, config.model, out, world, score=score)
            logger.info("exported %s", out)
        elif not is_last:
            return
        if is_last:
            self.finish(world)
        if not world.is_main:
            return
        if self._upload.is_alive():
            logger.warning("%s is not uploaded, since the upload before it goes on", out)
        elif repo:
            report = folder.reports().get(step)
            message = evaluation_line(step, report) if report else f"after {step} steps"
            given = (out, repo, message)
            self._upload = Thread(target=upload, args=given, name=out.name, daemon=True)
            self._upload.start()
        for old in list(steps_in(out.parent).values())[: -config.checkpoint.keep]:
            if not (self._upload.is_alive() and self._upload.name == old.name):
                shutil.rmtree(old)

    def finish(self, world: World) -> None:
        """Wait for the upload, unless asked to stop. Collective, in short ones: none times out."""
        while world.max(int(self._upload.is_alive() and not is_asked())):
            time.sleep(0.2)
        if self._upload.is_alive():
            logger.warning("stopped before %s was uploaded; --resume goes on", self._upload.name)
