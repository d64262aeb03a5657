"""A run from its configuration to its summary: build, evaluate, step, save, evaluate.

Everything that can be wrong with the input is found before the model is loaded.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import Config
from laser_fast.data.curriculum import Curriculum
from laser_fast.data.prompts import held_out_prompts, train_prompts
from laser_fast.evaluation.benchmarks import answer_of
from laser_fast.evaluation.statistics import summarize
from laser_fast.log.run_folder import resumed_config
from laser_fast.log.run_log import Log, RunLog
from laser_fast.log.samples import SampleRecord, scored, to_records
from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import World, stop_at_sigterm
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, build_policy, load_without_weights
from laser_fast.model.weights import base_digest
from laser_fast.records import Group, Prompt
from laser_fast.rewards.grader import Grader
from laser_fast.rollout.engine import make_engine
from laser_fast.rollout.vllm import import_vllm
from laser_fast.stopping import StopRun
from laser_fast.training.background import BackgroundWriter
from laser_fast.training.best import metric_of, standing
from laser_fast.training.checkpoint import (
    TrainerState,
    check_digests,
    check_run_folder,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    writing,
)
from laser_fast.training.export import Exports
from laser_fast.training.hub import check_hub
from laser_fast.training.sampler import Sampler
from laser_fast.training.schedule import GradientCap, is_due
from laser_fast.training.step_metrics import update_speed
from laser_fast.training.trainer import Trainer
from laser_fast.training.update import build_optimizer, import_adamw8bit

logger = logging.getLogger(__name__)


def check_start(config: Config, world: World, *, resume: bool | Literal["auto"]) -> bool:
    """`check_run_folder`, and refuse what would end or fail a run later. Collective."""
    metric_of(config)
    if config.checkpoint.hub_repo:
        world.on_main(partial(check_hub, config.checkpoint.hub_repo))
    resumes = check_run_folder(config, world, resume=resume)
    uses_server = config.rollout.engine == "vllm_server"
    if config.rollout.engine == "vllm" or (uses_server and world.device.type == "cuda"):
        import_vllm()
    if config.optim.state_bits == 8:
        import_adamw8bit()
    return resumes


def train(
    config: Config,
    *,
    world: World,
    resume: bool = False,
    on_end: Callable[[Path], None] = lambda folder: None,
) -> bool:
    """Train as configured, after `check_start`, or `resume` from the newest checkpoint. Collective.

    `on_end` is called with the run folder, on rank 0, when a run that has begun ends in any way. A
    ConfigError says that the configuration or its inputs cannot run; nothing was overwritten then.
    Returns whether the run is through; else SIGTERM stopped it, and it can be resumed.
    """
    started = time.monotonic()
    folder, checkpoint = Path(config.output_dir), None
    if resume:
        config = resumed_config(config)
        checkpoint = world.on_main(lambda: newest_checkpoint(folder))
    with writing(folder), ExitStack() as stack:
        sampler, reference, held_out = _build_sampler(config, world, stack, checkpoint)
        try:
            trainer, first_step, must_evaluate = _build_trainer(sampler, reference, checkpoint)
        except StopRun:
            logger.warning("stopped by SIGTERM before the first step; start it again")
            return False
        log = Log()
        if world.is_main:
            log = RunLog(folder, config, resume_step=first_step if resume else None)
            stack.callback(on_end, folder)
        stack.enter_context(log)
        completed, checkpoints, exports = first_step, config.checkpoint, Exports()
        writer = BackgroundWriter(world, config.rollout.timeout_s)
        try:
            while True:
                # Evaluate first: a run that dies in between repeats the step and its evaluation.
                if must_evaluate:
                    _evaluate(trainer, held_out, log, step=completed)
                if must_evaluate or completed == first_step:
                    writer.settle(wait=True)
                    found = world.on_main(partial(standing, config, completed))
                    if checkpoints.best and found.step:
                        said = f"best {checkpoints.best} so far: {found.value:.4g}"
                        logger.info("%s after %d steps", said, found.step)
                must_evaluate = False
                is_last = completed >= config.optim.steps or found.is_over
                if completed > 0:
                    if is_last or is_due(completed, checkpoints.every) or found.step == completed:
                        _save(trainer, completed, writer if checkpoints.asynchronous else None)
                    exports.write(trainer, completed, is_last=is_last)
                if found.is_over:
                    logger.info("no better one in %d evaluations: the run ends", found.num_since)
                if is_last:
                    break
                _run_step(trainer, log, completed)
                completed += 1
                must_evaluate = completed == config.optim.steps
                must_evaluate |= is_due(completed, config.data.eval_every)
                writer.settle(wait=False)
        except StopRun:
            writer.settle(wait=True)
            path = _save(trainer, completed, None, must_evaluate)
            logger.warning("stopped by SIGTERM; continue with --resume from %s", path)
            return False
        writer.settle(wait=True)
        log.finish(completed, wall_seconds=time.monotonic() - started)
        exports.finish(world)
        return True


def _build_sampler(
    config: Config, world: World, stack: ExitStack, checkpoint: Path | None
) -> tuple[Sampler, Policy | None, list[Prompt]]:
    """Check every input, then load the models; also this rank's held-out prompts."""
    grader = stack.enter_context(Grader(config.reward, trains_score=config.score.loss_coef > 0))
    with world.agreement():
        model_config, vocabulary = load_without_weights(config, score_token=config.score.token)
        tokenizer, asked = vocabulary.tokenizer, grader.fields
        every = dict.fromkeys(n for g in (grader, *grader.extras.values()) for n in g.fields)
        prompts = train_prompts(config.data, tokenizer, seed=config.seed, asked=[*every])
        prompts.check_ids(model_config.vocab_size)
        digests = {"data.train": prompts.digest, **base_digest(config.model, model_config)}
        held_out = list[Prompt]()
        if config.data.eval:
            source = held_out_prompts(config.data, tokenizer, asked=asked)
            source.check_ids(model_config.vocab_size)
            held_out = source.all()[world.rank :: world.size]
            digests["data.eval"] = source.digest
        if checkpoint is not None:
            check_digests(checkpoint, digests)
    if prompts.num_dropped:
        logger.info("dropped %d over-long prompts", prompts.num_dropped)
    uses_server = config.rollout.engine == "vllm_server"
    # A server that does not fit is found before the model is loaded.
    engine = make_engine(config, None, vocabulary.special) if uses_server else None
    policy, reference = build_policy(config.model, world), None
    if config.loss.kl_coef > 0 and config.model.lora_rank:
        reference = policy
    elif config.loss.kl_coef > 0:  # before the engine, which takes a share of what is left
        reference = build_policy(config.model, world, is_trained=False)
    engine = engine or make_engine(config, policy, vocabulary.special)
    stack.callback(engine.close)
    check_stop = stack.enter_context(stop_at_sigterm(world))
    packer = Packer(
        budget=config.optim.tokens_per_microbatch,
        score_token_id=vocabulary.special.score_token_id,
        score_at=config.score.position,
        temperature=config.rollout.temperature,
        device=world.device,
        agree=world.max,
    )
    sampler = Sampler(
        config=config,
        world=world,
        stage=StageTimer(world.device, after_stage=check_stop, on_stage=world.tell),
        vocabulary=vocabulary,
        prompts=prompts,
        engine=engine,
        grader=grader,
        policy=policy,
        packer=packer,
        curriculum=Curriculum(prompts, config.data) if config.data.skips_prompts else None,
        digests=digests,
    )
    return sampler, reference, held_out


def _build_trainer(
    sampler: Sampler, reference: Policy | None, checkpoint: Path | None
) -> tuple[Trainer, int, bool]:
    """The trainer as it was at the checkpoint, the next step, and whether to evaluate before it."""
    config = sampler.config
    optimizer, state = build_optimizer(sampler.policy, config.optim), TrainerState(step=0)
    cap = GradientCap(loss_coef=config.score.loss_coef, max_ratio=config.score.max_grad_ratio)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, policy=sampler.policy, optimizer=optimizer)
        cap.ratio = state.cap.get("ratio")
        if sampler.curriculum and state.curriculum:
            sampler.curriculum.state = state.curriculum
        logger.info("resumed from %s", checkpoint)
    score = _settle_score(sampler, state.ref_logprob)
    trainer = Trainer(
        sampler=sampler, reference=reference, optimizer=optimizer, score=score, cap=cap
    )
    trainer.bad_steps.count = state.bad_steps
    return trainer, state.step, state.step == 0 or state.must_evaluate


def _settle_score(sampler: Sampler, saved: float | None) -> SelfScore:
    """The score with c_ref from the checkpoint, the configuration, or a measurement. Collective."""
    config = sampler.config.score
    if saved is not None:
        ref_logprob = saved
    elif isinstance(config.ref_logprob, float):
        ref_logprob = config.ref_logprob
    elif config.loss_coef > 0 or sampler.config.data.eval:
        ref_logprob = sampler.measure_ref_logprob()
        logger.info("measured score.ref_logprob = %.3f", ref_logprob)
        if config.ref_logprob == "floating":  # where scores that know nothing balance at 1/2
            ref_logprob -= 0.5 / config.beta
    else:
        ref_logprob = float("nan")  # nobody reads a score
    config.check_target(ref_logprob)
    token_id = sampler.vocabulary.special.score_token_id
    return SelfScore(token_id=token_id, beta=config.beta, ref_logprob=ref_logprob)


def _run_step(trainer: Trainer, log: Log, step: int) -> None:
    metrics, groups = trainer.step(step)
    if trainer.sampler.curriculum:
        trainer.sampler.curriculum.commit()
    times = trainer.stage.pop()
    metrics |= times
    metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / sum(times.values())
    metrics |= update_speed(metrics, trainer.world)
    log.log_step(step, metrics)
    if trainer.world.is_main:
        count = trainer.config.log.samples_per_step
        log.log_samples(_records(trainer, groups, step=step, limit=count))


def _records(
    trainer: Trainer, groups: Sequence[Group], *, step: int | None = None, limit: int | None = None
) -> list[SampleRecord]:
    records = to_records(
        groups,
        decode=trainer.sampler.vocabulary.decode,
        extract=answer_of(trainer.config.reward.kind),
        step=step,
        limit=limit,
    )
    return scored(records, beta=trainer.score.beta, ref_logprob=trainer.score.ref_logprob)


def _evaluate(trainer: Trainer, held_out: Sequence[Prompt], log: Log, *, step: int) -> None:
    """Evaluate on the held-out prompts; the draws are the same at every step. Collective."""
    config, sampler = trainer.config, trainer.sampler
    if not config.data.eval:
        return
    sampler.sync(held_out)
    groups = sampler.sample_scored(held_out, "eval", group_size=config.data.eval_samples)
    records = trainer.world.gather_on_main(_records(trainer, sampler.grade(groups)))
    with trainer.stage("reward"):  # equal answers are found in the graders
        if trainer.world.is_main:
            log.log_evaluation(step, summarize(records, same_answer=sampler.grader.same_answer))
    trainer.stage.pop()  # evaluation is not part of any step


def _save(
    trainer: Trainer, completed: int, writer: BackgroundWriter | None, must_evaluate: bool = False
) -> Path:
    ref_logprob, curriculum = trainer.score.ref_logprob, trainer.sampler.curriculum
    return save_checkpoint(
        trainer.config,
        completed,
        policy=trainer.policy,
        optimizer=trainer.optimizer,
        state={
            "ref_logprob": None if math.isnan(ref_logprob) else ref_logprob,  # JSON has no nan
            "cap": {"ratio": trainer.cap.ratio},
            "digests": trainer.sampler.digests,
            "bad_steps": trainer.bad_steps.count,
            "must_evaluate": must_evaluate,
            "curriculum": curriculum and curriculum.state,
        },
        world=trainer.world,
        writer=writer,
    )
