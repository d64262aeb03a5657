"""A run from its configuration to its summary: build, evaluate, step, save, evaluate.

Everything that can be wrong with the input is found before the model is loaded and before
anything but the sandbox's own base model is written.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from laser_fast.algorithm.score import check_score_target
from laser_fast.config import Config, ConfigError, dump_config
from laser_fast.data.prompts import PromptSource
from laser_fast.evaluation.statistics import summarize
from laser_fast.log.run_folder import RunFolder, open_run_folder
from laser_fast.log.run_log import Log as NullLog
from laser_fast.log.run_log import RunLog
from laser_fast.log.samples import to_records
from laser_fast.log.timer import StageTimer, peak_memory_gb
from laser_fast.model.distributed import StopRun, StopSignal, World, open_world
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import Vocabulary, load_vocabulary
from laser_fast.records import Prompt
from laser_fast.rewards import Grader
from laser_fast.rollout.engine import Engine
from laser_fast.rollout.hf import HfEngine
from laser_fast.rollout.vllm_setup import import_vllm
from laser_fast.sandbox.model import make_sandbox_model
from laser_fast.training.checkpoint import (
    checkpoint_step,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from laser_fast.training.grad_cap import GradientCap
from laser_fast.training.optimizer import build_optimizer
from laser_fast.training.sampler import Sampler
from laser_fast.training.stages import Stages, is_due
from laser_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False) -> None:
    """Train as configured; with `resume`, continue the run in `output_dir`.

    Raises:
        ConfigError: the configuration or its inputs cannot run; nothing was overwritten.
    """
    started = time.monotonic()
    folder = open_run_folder(config, resume=resume)
    with open_world() as world, ExitStack() as stack:
        if config.data.prompts_per_step % world.size:
            raise ConfigError(
                f"data.prompts_per_step = {config.data.prompts_per_step} does not divide over "
                f"{world.size} ranks; choose a multiple of {world.size}"
            )
        if world.size % config.rollout.tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel = {config.rollout.tensor_parallel} does not divide the "
                f"{world.size} ranks of the run; set it to 1 or start another number of ranks"
            )
        checkpoint = latest_checkpoint(folder.path) if resume else None
        world.barrier()  # every rank has seen the folder as it was
        trainer, held_out = _build(config, folder, world, resume=resume, stack=stack)
        first_step = 0
        if checkpoint is not None:
            first_step = checkpoint_step(checkpoint)
            trainer.load_state_dict(
                load_checkpoint(checkpoint, policy=trainer.policy, optimizer=trainer.optimizer)
            )
            logger.info("resumed from %s", checkpoint)
        _settle_ref_logprob(trainer)
        log = stack.enter_context(
            RunLog(config.output_dir, config, resume_step=first_step if resume else None)
            if world.is_main
            else NullLog()
        )
        completed = first_step
        try:
            if first_step == 0:
                _evaluate(trainer, held_out, log, step=0)
            for step in range(first_step, config.optim.steps):
                _run_step(trainer, log, step)
                completed = step + 1
                is_last = completed == config.optim.steps
                # Evaluate first: a run that dies in between repeats the step and its evaluation.
                if is_last or is_due(completed, config.data.eval_every):
                    _evaluate(trainer, held_out, log, step=completed)
                if is_last or is_due(completed, config.checkpoint.every):
                    _save(trainer, folder, completed)
        except StopRun:
            path = _save(trainer, folder, completed)
            logger.warning("stopped by SIGTERM; continue with --resume from %s", path)
            return
        log.finish(wall_seconds=time.monotonic() - started)


def resolve_model(config: Config) -> Config:
    """The configuration with the sandbox's name replaced by the model folder it stands for."""
    if config.model.path != "sandbox":
        return config
    path = str(Path(config.output_dir) / "base_model")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _build(
    config: Config, folder: RunFolder, world: World, *, resume: bool, stack: ExitStack
) -> tuple[Trainer, list[Prompt]]:
    """Check every input, then load the model; also the held-out prompts of this rank."""
    uses_server = config.rollout.engine == "vllm_server"
    if config.rollout.engine == "vllm" or (uses_server and world.device.type == "cuda"):
        import_vllm()  # missing or unsupported, it is named before minutes of loading
    if config.model.path == "sandbox" and not resume:
        base = folder.path / "base_model"
        logger.info("warm-starting the sandbox model in %s", base)
        make_sandbox_model(base, seed=config.seed, world=world)
    config = resolve_model(config)
    model_config = load_model_config(config.model)
    vocabulary = load_vocabulary(
        config.model.path, score_token=config.score.token, model_config=model_config
    )
    check_lengths(config, model_config.max_position_embeddings)
    tokenizer = vocabulary.tokenizer
    prompts = PromptSource(config.data, tokenizer, seed=config.seed, split="train")
    held_out: list[Prompt] = []
    if config.data.eval:
        source = PromptSource(config.data, tokenizer, seed=config.seed, split="eval")
        held_out = source.all()[world.rank :: world.size]
    if prompts.num_dropped:
        logger.info("dropped %d over-long prompts", prompts.num_dropped)
    grader = stack.enter_context(Grader(config.reward))

    # A server that does not fit is found before the model is loaded.
    engine = make_engine(config, None, vocabulary) if uses_server else None
    policy = build_policy(config.model, world)
    reference = None
    if config.loss.kl_coef > 0:
        reference = build_policy(config.model, world).requires_grad_(False)
    engine = engine or make_engine(config, policy, vocabulary)
    stack.callback(engine.close)
    stop = StopSignal(world)
    stack.callback(stop.restore)
    stages = Stages(StageTimer(world.device), stop)
    packer = Packer(
        budget=config.optim.tokens_per_microbatch,
        score_token_id=vocabulary.score_token_id,
        temperature=config.rollout.temperature,
        device=world.device,
        agree=world.max,
    )
    sampler = Sampler(
        config=config,
        world=world,
        stages=stages,
        vocabulary=vocabulary,
        prompts=prompts,
        engine=engine,
        grader=grader,
        policy=policy,
        packer=packer,
    )
    trainer = Trainer(
        config=config,
        world=world,
        stages=stages,
        sampler=sampler,
        packer=packer,
        policy=policy,
        reference=reference,
        optimizer=build_optimizer(policy, config.optim),
        cap=GradientCap(loss_coef=config.score.loss_coef, max_ratio=config.score.max_grad_ratio),
    )
    return trainer, held_out


def make_engine(config: Config, policy: Policy | None, vocabulary: Vocabulary) -> Engine:
    """The engine that the configuration names; "hf" alone samples with the policy itself."""
    ids = {
        "score_token_id": vocabulary.score_token_id,
        "eos_token_ids": vocabulary.eos_token_ids,
        "vocab_size": vocabulary.size,
    }
    if config.rollout.engine == "vllm":
        from laser_fast.rollout.vllm import VllmEngine

        return VllmEngine(
            config.model.path,
            config.rollout,
            **ids,
            max_model_len=max_positions(config),
            dtype=config.model.compute_dtype,
        )
    if config.rollout.engine == "vllm_server":
        from laser_fast.rollout.vllm_server import VllmServerEngine

        return VllmServerEngine(config.rollout, **ids, max_model_len=max_positions(config))
    assert policy is not None
    return HfEngine(
        policy.hf,
        **ids,
        pad_token_id=vocabulary.pad_token_id,
        max_num_seqs=config.rollout.max_num_seqs,
        unsharded=policy.unsharded,
    )


def max_positions(config: Config) -> int:
    """Longest sequence that an engine meets: prompt, completion and the score token."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens + 1


def check_lengths(config: Config, available: int) -> None:
    """Refuse lengths that the model's `available` positions cannot hold."""
    needed = max_positions(config)
    if needed > available:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens + 1 score position = {needed} "
            f"exceeds the {available} positions of the model; lower one of them"
        )


def _settle_ref_logprob(trainer: Trainer) -> None:
    """Take c_ref from the checkpoint, the configuration, or a measurement, in this order."""
    score = trainer.config.score
    trains_score = score.loss_coef > 0
    if trainer.ref_logprob is None and score.ref_logprob != "auto":
        trainer.ref_logprob = score.ref_logprob
    if trainer.ref_logprob is None and (trains_score or trainer.config.data.eval):
        trainer.ref_logprob = trainer.sampler.measure_ref_logprob()
        logger.info("measured score.ref_logprob = %.3f", trainer.ref_logprob)
    if trains_score:
        try:
            check_score_target(beta=score.beta, ref_logprob=trainer.ref_logprob)
        except ValueError as error:
            raise ConfigError(f"score.beta = {score.beta:g}: {error}") from None


def _run_step(trainer: Trainer, log: RunLog | NullLog, step: int) -> None:
    metrics, groups, rewards = trainer.step(step)
    times = trainer.stages.timer.pop()
    metrics |= times
    metrics["memory/peak_gb"] = peak_memory_gb(trainer.world.device)
    metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / sum(times.values())
    log.log_step(step, metrics)
    log.log_samples(
        step,
        groups,
        [reward for group in rewards for reward in group],
        decode=trainer.sampler.vocabulary.decode,
        ref_logprob=trainer.ref_logprob,
    )


def _evaluate(
    trainer: Trainer, held_out: list[Prompt], log: RunLog | NullLog, *, step: int
) -> None:
    """Evaluate on the held-out prompts; the draws are the same at every step. Collective."""
    config, sampler = trainer.config, trainer.sampler
    if not config.data.eval:
        return
    sampler.sync(held_out)
    records = to_records(
        sampler.sample_scored(held_out, "eval", group_size=config.data.eval_samples),
        decode=sampler.vocabulary.decode,
        grader=sampler.grader,
        beta=config.score.beta,
        ref_logprob=0.0 if trainer.ref_logprob is None else trainer.ref_logprob,
    )
    records = trainer.world.gather(records)
    if trainer.world.is_main:
        report = summarize(records, same_answer=sampler.grader.same_answer)
        log.log_evaluation(step, report)
    trainer.stages.timer.pop()  # evaluation is not part of any step


def _save(trainer: Trainer, folder: RunFolder, completed: int) -> Path:
    return save_checkpoint(
        folder.path,
        completed,
        policy=trainer.policy,
        optimizer=trainer.optimizer,
        trainer_state=trainer.state_dict(),
        config_toml=dump_config(trainer.config),
        keep=trainer.config.checkpoint.keep,
        world=trainer.world,
    )
