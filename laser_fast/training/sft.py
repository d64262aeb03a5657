"""A supervised phase on (prompt, response) rows, as before a training with rewards.

    L = -1/N sum_i log pi(y_i | x, y_<i)        over the N tokens of all responses of a step

A response's last token is its EOS. N is a global count, so neither ranks nor packing change L. The
rows come in the order of (seed, step), as the prompts of a run do.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from laser_fast.config import ConfigError
from laser_fast.config_errors import RunError
from laser_fast.config_sft import SftConfig
from laser_fast.data.prompts import PromptSource
from laser_fast.data.rows import open_rows
from laser_fast.log.run_folder import resumed_config
from laser_fast.log.run_log import Log, RunLog
from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import World, stop_at_sigterm
from laser_fast.model.families import LmHead, position_limit
from laser_fast.model.packing import Ids, Packer, plan_shares, with_router_weights
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import find_eos_token_ids, load_tokenizer, until_eos, written_eos
from laser_fast.model.weights import base_digest
from laser_fast.records import Microbatch, TrainingSequence
from laser_fast.stopping import StopRun
from laser_fast.training.checkpoint import (
    check_digests,
    check_run_folder,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    writing,
)
from laser_fast.training.export import write_model
from laser_fast.training.schedule import is_due, learning_rate
from laser_fast.training.step_metrics import pack_metrics, update_speed
from laser_fast.training.update import apply_gradients, build_optimizer
from laser_kernels import linear_logprob_loss

logger = logging.getLogger(__name__)


def supervised_sequences(rows: Sequence[tuple[Ids, Ids]], world: World) -> list[TrainingSequence]:
    """This rank's share of a step's rows, given whole to every rank, weighted for the mean.

    A row is the ids of a prompt and of its response, whatever this ends with.
    """
    weight = 1 / sum(len(response) for _, response in rows)
    prompts, lengths = [prompt for prompt, _ in rows], [len(response) for _, response in rows]
    share = plan_shares(prompts, lengths, num_ranks=world.size)[world.rank]
    return [
        TrainingSequence(
            prompt_ids=rows[index][0],
            completion_ids=rows[index][1],
            rollout_logprobs=(0.0,) * lengths[index],
            score_at=None,
            token_weight=weight,
        )
        for index in share
    ]


def supervised_loss(policy: Policy, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """The part of L, scalar float32, that the sequences of a microbatch add, and its routers'."""

    def read(hidden_states: Tensor, head: LmHead) -> tuple[Tensor, Tensor]:
        def loss_fn(logprobs: Tensor, rows: slice) -> Tensor:
            return -(batch.policy.weights[rows] * logprobs).sum()

        arguments = (hidden_states, head.weight, batch.labels)
        return linear_logprob_loss(*arguments, loss_fn, **head.at(1.0)), head.router_loss

    return policy(batch, read)


class SftTrainer:
    """What lives from step to step of a supervised phase. Every method is collective."""

    def __init__(self, config: SftConfig, world: World, stage: StageTimer) -> None:
        """Check every input, then load the model."""
        self.config, self.world, self.stage = config, world, stage
        model_config = load_model_config(config.model)
        self._tokenizer = load_tokenizer(config.model.path)
        self._ends = find_eos_token_ids(config.model.path, self._tokenizer, model_config)
        self._eos = written_eos(self._tokenizer, self._ends)
        self.rows = self._open_rows(position_limit(model_config), model_config.vocab_size)
        budget = config.optim.tokens_per_microbatch
        self.packer = Packer(budget=budget, device=world.device, agree=world.max)
        self.policy = build_policy(config.model, world)
        self.optimizer = build_optimizer(self.policy, config.optim)
        base = base_digest(config.model, self.policy.hf.config)
        self.digests = {"data.train": self.rows.digest, **base}

    def _open_rows(self, positions: int, vocab_size: int) -> PromptSource:
        """The rows that fit a model; a ConfigError says what it cannot be trained on."""
        data = self.config.data
        if (longest := self.config.max_sequence_tokens) > positions:
            raise ConfigError(
                f"data.max_prompt_tokens + data.max_response_tokens = {longest} exceeds the "
                f"{positions} positions of the model; lower one of them"
            )
        rows = PromptSource(
            data,
            self._tokenizer,
            open_rows(data.train, split=data.train_split),
            name="train",
            seed=self.config.seed,
            per_step=data.rows_per_step,
        )
        rows.check_ids(vocab_size)
        limit = data.max_response_tokens

        def are_long(responses: list[str]) -> list[bool]:
            found = self._encode(responses)
            if (largest := max(map(max, found))) >= vocab_size:
                raise ConfigError(
                    f"{data.train}: a response has the token {largest}, beyond the "
                    f"{vocab_size} of the model; its tokenizer is of another model"
                )
            return [len(ids) > limit for ids in found]

        rows.drop_answers(are_long)
        if rows.num_prompts == 0:
            raise ConfigError(
                f"{data.train}: no row is left, all responses are longer than "
                f"data.max_response_tokens = {limit}; raise it"
            )
        if rows.num_dropped:
            logger.info("dropped %d rows with over-long prompts or responses", rows.num_dropped)
        return rows

    def _encode(self, responses: list[str]) -> list[Ids]:
        """Ids of responses with their EOS, which the texts of some data sets have already."""
        found = self._tokenizer(responses, add_special_tokens=False, verbose=False)["input_ids"]
        return [until_eos(ids, self._ends, self._eos) for ids in found]

    def step(self, step: int) -> dict[str, float]:
        """Run step 0, 1, ... and return its metrics over all ranks."""
        with self.stage("pack"):
            prompts = self.rows.prompts(step)
            responses = self._encode([prompt.answer for prompt in prompts])
            pairs = [(p.prompt_ids, ids) for p, ids in zip(prompts, responses, strict=True)]
            sequences = supervised_sequences(pairs, self.world)
            coef = self.config.model.router_aux_loss_coef
            updates = [self.packer.microbatches(sequences)]
            [batches] = updates = with_router_weights(updates, coef, self.world)
            metrics = pack_metrics(self.policy, sequences, updates, self.world)
        losses = torch.zeros(2, device=self.world.device)
        with self.stage("loss"):
            for batch in batches:
                part, balance = supervised_loss(self.policy, batch)
                self.policy.backward(part + balance, self.world, is_last=batch is batches[-1])
                losses += torch.stack([part, balance.to(part)]).detach()
        with self.stage.only("step"):
            metrics["step/lr"] = lr = learning_rate(step, self.config.optim)
            norm = apply_gradients(
                self.policy, self.optimizer, self.world, self.config.optim, lr=lr
            )
        if math.isnan(norm):
            raise RunError(
                f"step {step}: the gradient norm is not finite; the last checkpoint is intact; "
                "lower optim.lr, or look for damaged rows"
            )
        metrics["step/grad_norm"] = norm
        metrics["loss/response"], balance = self.world.sum(losses).tolist()
        if coef:
            metrics["loss/router"] = balance / coef
        metrics |= self.stage.pop()
        return metrics | update_speed(metrics, self.world)

    def resume(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; returns how many steps it has."""
        check_digests(checkpoint, self.digests)
        state = load_checkpoint(checkpoint, policy=self.policy, optimizer=self.optimizer)
        logger.info("resumed from %s", checkpoint)
        return state.step

    def save(self, completed: int) -> Path:
        """Write a checkpoint after so many steps."""
        return save_checkpoint(
            self.config,
            completed,
            policy=self.policy,
            optimizer=self.optimizer,
            state={"digests": self.digests},
            world=self.world,
        )


def sft(
    config: SftConfig,
    *,
    world: World,
    resume: bool | Literal["auto"] = False,
    on_end: Callable[[Path], None] = lambda folder: None,
) -> bool:
    """Train as configured, or `resume`, and write OUTPUT_DIR/model. Collective; see `run.train`."""
    started = time.monotonic()
    folder, checkpoint = Path(config.output_dir), None
    resumes = check_run_folder(config, world, resume=resume)
    if resumes:
        config = resumed_config(config)
        checkpoint = world.on_main(lambda: newest_checkpoint(folder))
    with writing(folder), ExitStack() as stack:
        check_stop = stack.enter_context(stop_at_sigterm(world))
        trainer = SftTrainer(config, world, StageTimer(world.device, after_stage=check_stop))
        completed = trainer.resume(checkpoint) if checkpoint else 0
        log = Log()
        if world.is_main:
            log = RunLog(folder, config, resume_step=completed if resumes else None)
            stack.callback(on_end, folder)
        stack.enter_context(log)
        try:
            while completed < config.optim.steps:
                log.log_step(completed, trainer.step(completed))
                completed += 1
                if is_due(completed, config.checkpoint.every) or completed == config.optim.steps:
                    trainer.save(completed)
        except StopRun:
            path = trainer.save(completed)
            logger.warning("stopped by SIGTERM; continue with --resume from %s", path)
            return False
        write_model(trainer.policy, config.model, folder / "model", world)
        log.finish(completed, wall_seconds=time.monotonic() - started)
        return True
