"""One training step, as the nouns it passes through.

    prompt -> rollout -> reward -> score -> advantage -> pack -> loss -> step

`Trainer` holds what lives from step to step; laser_fast/training/run.py builds it, evaluates
and saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.config import Config, ConfigError
from laser_fast.data.prompts import PromptSource
from laser_fast.observe.timer import StageTimer
from laser_fast.records import Completion, Group, Microbatch, Prompt, Sampling
from laser_fast.records import Sequence as TrainingSequence
from laser_fast.rewards import Grader
from laser_fast.rollout.agreement import DisagreementError, check_agreement
from laser_fast.rollout.engine import Engine, draw_seed
from laser_fast.training.distributed import StopSignal, World
from laser_fast.training.grad_cap import GradientCap
from laser_fast.training.objective import Objective, joint_loss
from laser_fast.training.optimizer import learning_rate
from laser_fast.training.outcome import (
    gather_outcome,
    step_advantages,
    step_weights,
    training_sequences,
)
from laser_fast.training.packing import Packer
from laser_fast.training.policy import Policy
from laser_fast.training.reading import read_completions, read_rows, with_scores
from laser_fast.training.step_metrics import RowMetrics, outcome_metrics
from laser_fast.training.vocabulary import Vocabulary

Rewards = list[list[float | None]]  # by group, then by completion

# 256 completions put the standard error of c_ref, whose spread is .04 to 1.2 nats
# (reference measurements of the paper), at or below 0.08.
CALIBRATION_PROMPTS = 64
CALIBRATION_SAMPLES = 4
# Prompts per rank whose tokens prove a weight sync: one stale tensor moves every token.
HELD_PROMPTS = 4


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run, and the little state that a checkpoint holds besides them."""

    config: Config
    world: World
    vocabulary: Vocabulary
    prompts: PromptSource
    policy: Policy
    reference: Policy | None  # frozen initial policy of the KL penalty
    optimizer: Optimizer
    engine: Engine
    grader: Grader
    packer: Packer
    cap: GradientCap
    stop: StopSignal
    ref_logprob: float | None = None  # c_ref; None until measured
    sync_disagreement: float = 0.0  # of the last weight sync, on this rank
    timer: StageTimer = field(default_factory=StageTimer)

    def step(self, step: int) -> tuple[dict[str, float], list[Group], Rewards]:
        """Run step 0, 1, ...: metrics over all ranks, this rank's groups and their rewards."""
        config, scoring = self.config, self.config.score
        groups, rewards = self.collect(step)

        mixes_scores = config.advantage.score_coef > 0 and step >= (
            scoring.warmup_steps + config.advantage.score_warmup_steps
        )
        with self._stage("score"):
            if mixes_scores and config.rollout.score == "off":
                groups = with_scores(self.policy, groups, self.packer)
        with self._stage("advantage"):
            outcome = gather_outcome(groups, rewards, self.world)
            advantages = step_advantages(
                outcome, config, ref_logprob=self.ref_logprob, mixes_scores=mixes_scores
            )
        with self._stage("pack"):
            sequences = training_sequences(
                groups,
                self.world.rank * len(groups),
                outcome,
                advantages,
                step_weights(outcome, config),
                with_score_rows=scoring.loss_coef > 0,
            )
            updates = [self.packer.microbatches(part) for part in self._minibatches(sequences)]
        with self._stage("loss"):
            # One update per rollout: the old log-probs are the current ones, detached.
            old = self._read(self.policy if len(updates) > 1 else None, updates)
            ref = self._read(self.reference, updates)

        objective = Objective(
            loss=config.loss,
            beta=scoring.beta,
            ref_logprob=self.ref_logprob,
            score_coef=self.cap.coef() if step >= scoring.warmup_steps else 0.0,
        )
        lr = learning_rate(step, config.optim)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        rows = RowMetrics(config.loss, self.world.device)
        grad_norms = []
        for microbatches, old_logprobs, ref_logprobs in zip(updates, old, ref, strict=True):
            with self.timer("loss"):
                self._backward(objective, microbatches, old_logprobs, ref_logprobs, rows)
            self._check_rollout(step, rows.disagreement(self.world))
            with self.timer("step"):
                grad_norms.append(self._update(step))

        metrics = outcome_metrics(outcome, advantages)
        metrics |= rows.finish(self.world, has_reference=self.reference is not None)
        if scoring.loss_coef > 0:
            metrics |= rows.score_metrics(
                self.world, outcome, beta=scoring.beta, ref_logprob=self.ref_logprob
            )
        metrics |= self.cap.update(self.world, coef=objective.score_coef)
        metrics["score/coef"] = objective.score_coef
        metrics["step/grad_norm"] = sum(grad_norms) / len(grad_norms)
        metrics["step/lr"] = lr
        metrics["rollout/sync_disagreement"] = self.sync_disagreement
        return metrics, groups, rewards

    def collect(self, step: int) -> tuple[list[Group], Rewards]:
        """Sample and grade this rank's groups of a step.

        Dynamic sampling (DAPO): a group whose rewards do not differ is replaced by one of a new
        prompt, at most `rollout.resample_rounds` times.
        """
        rounds = self.config.rollout.resample_rounds
        groups: dict[int, Group] = {}
        rewards: dict[int, list[float | None]] = {}
        slots = list(range(self.config.data.prompts_per_step // self.world.size))
        for attempt in range(rounds + 1):
            with self._stage("prompt"):
                prompts = self.prompts.prompts(
                    step,
                    attempt=attempt,
                    rounds=rounds,
                    rank=self.world.rank,
                    world_size=self.world.size,
                )
            if attempt == 0:
                with self._stage("sync"):
                    self.sync(prompts)
            with self._stage("rollout"):
                sampling = self.sampling(
                    "train",
                    step,
                    attempt,
                    group_size=self.config.rollout.group_size,
                    needs_score=self.config.score.loss_coef > 0,
                )
                sampled = self.engine.generate([prompts[slot] for slot in slots], sampling)
            with self._stage("reward"):
                graded = self.grade(sampled)
            groups |= zip(slots, sampled, strict=True)
            rewards |= zip(slots, graded, strict=True)
            slots = [slot for slot in slots if not _has_spread(rewards[slot])]
            if attempt == rounds or self.world.max(len(slots)) == 0:
                break
        self.engine.sleep()
        return [groups[slot] for slot in sorted(groups)], [rewards[s] for s in sorted(rewards)]

    def sync(self, prompts: Sequence[Prompt]) -> None:
        """Hand the policy's weights to the engine and prove that they arrived. Collective.

        Engine and policy read the log-probs of the tokens of a few of this rank's `prompts`,
        which need no sampling.

        Raises:
            DisagreementError: above `rollout.max_disagreement`.
        """
        self.engine.sync(self.policy.stream_weights(self.world.device))
        config = self.config.rollout
        if config.engine == "hf":  # samples with the policy's own parameters
            return
        held = [_as_group(prompt) for prompt in prompts[:HELD_PROMPTS]]
        self.sync_disagreement = check_agreement(
            self.engine.token_logprobs(held, temperature=config.temperature),
            [tokens for tokens, _ in read_completions(self.policy, held, self.packer)],
            max_disagreement=config.max_disagreement,
        )

    def sampling(self, *draw: int | str, group_size: int, needs_score: bool) -> Sampling:
        """How the completions of the named draw are sampled."""
        config = self.config.rollout
        return Sampling(
            group_size=group_size,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=draw_seed(self.config.seed, *draw),
            needs_score=needs_score and config.score != "off",
        )

    def grade(self, groups: Sequence[Group]) -> Rewards:
        """Rewards by group and completion; None where grading failed."""
        texts = [self.vocabulary.decode(c.completion_ids) for g in groups for c in g.completions]
        answers = [group.prompt.answer for group in groups for _ in group.completions]
        prompts = [group.prompt.text for group in groups for _ in group.completions]
        grades = iter(self.grader.grade(texts, answers, prompts=prompts))
        return [[next(grades) for _ in group.completions] for group in groups]

    def measure_ref_logprob(self) -> float:
        """c_ref: mean log pi(z_c | x, y) of the untrained model. Collective.

        Over the finished completions of about CALIBRATION_PROMPTS prompts of step 0, the same
        ones on any number of ranks.
        """
        share = self.config.data.prompts_per_step // self.world.size
        stride = max(1, self.config.data.prompts_per_step // CALIBRATION_PROMPTS)
        prompts = self.prompts.prompts(0, rank=self.world.rank, world_size=self.world.size)
        chosen = [p for i, p in enumerate(prompts, self.world.rank * share) if i % stride == 0]
        self.sync(prompts)
        groups = self.engine.generate(
            chosen, self.sampling("calibrate", group_size=CALIBRATION_SAMPLES, needs_score=True)
        )
        self.engine.sleep()
        if self.config.rollout.score == "off":
            groups = with_scores(self.policy, groups, self.packer)
        found = [c.score_logprob for g in groups for c in g.completions if c.is_finished]
        sums = self.world.sum(torch.tensor([sum(found), len(found)], dtype=torch.float32))
        if sums[1] == 0:
            raise ConfigError(
                'score.ref_logprob = "auto" found no finished completion to measure; raise '
                "rollout.max_new_tokens or give a number"
            )
        return float(sums[0] / sums[1])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides model and optimizer."""
        return {"ref_logprob": self.ref_logprob, "cap": self.cap.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.ref_logprob = state["ref_logprob"]
        self.cap.load_state_dict(state["cap"])

    def _minibatches(self, sequences: list[TrainingSequence]) -> list[list[TrainingSequence]]:
        """Local sequences by optimizer update: prompt p of the step belongs to p mod count."""
        count = self.config.optim.minibatches
        size = self.config.rollout.group_size
        first = self.world.rank * (len(sequences) // size)
        parts: list[list[TrainingSequence]] = [[] for _ in range(count)]
        for index, sequence in enumerate(sequences):
            parts[(first + index // size) % count].append(sequence)
        return parts

    def _read(
        self, policy: Policy | None, updates: list[list[Microbatch]]
    ) -> list[list[Tensor | None]]:
        """Log-probs [N_p] of the policy rows of every microbatch; None without a policy."""
        if policy is None:
            return [[None] * len(microbatches) for microbatches in updates]
        return [
            [
                logprobs[: batch.num_policy_rows]
                for batch, logprobs in zip(
                    microbatches, read_rows(policy, microbatches), strict=True
                )
            ]
            for microbatches in updates
        ]

    def _backward(
        self,
        objective: Objective,
        microbatches: list[Microbatch],
        old: list[Tensor | None],
        ref: list[Tensor | None],
        rows: RowMetrics,
    ) -> None:
        """Accumulate the gradients of one update."""
        for batch, old_logprobs, ref_logprobs in zip(microbatches, old, ref, strict=True):
            head = joint_loss(
                objective,
                batch,
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                on_gradient=self.cap.observer(batch.num_policy_rows),
            )
            result = self.policy(batch, head)
            # FSDP2 averages gradients over ranks, but the denominators are already global.
            (result.loss * self.world.size).backward()
            rows.add(batch, result, old_logprobs, ref_logprobs)

    def _update(self, step: int) -> float:
        """Clip and apply the accumulated gradients; returns their norm before clipping."""
        norm = clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not norm < float("inf"):
            raise RuntimeError(
                f"step {step}: the gradient norm is {norm}; the run stops before the update, and "
                "the last checkpoint is intact"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check_rollout(self, step: int, disagreement: float) -> None:
        """Refuse to train on tokens that the engine sampled from other weights."""
        limit = self.config.rollout.max_disagreement
        if not disagreement <= limit:
            raise DisagreementError(
                f"step {step}: policy and engine disagree by {disagreement:.3g} nats per sampled "
                f"token, more than rollout.max_disagreement = {limit:g}; the engine's weights are "
                "stale or its numerics differ"
            )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage; after it, leave if any rank was asked to stop. Collective."""
        with self.timer(name):
            yield
        self.stop.check()


def _as_group(prompt: Prompt) -> Group:
    """The prompt's own tokens as a completion of its first, to read their log-probs."""
    head, tail = prompt.prompt_ids[:1], prompt.prompt_ids[1:]
    held = Completion(
        completion_ids=tail, rollout_logprobs=(0.0,) * len(tail), finish_reason="length"
    )
    return Group(prompt=replace(prompt, prompt_ids=head), completions=(held,))


def _has_spread(rewards: list[float | None]) -> bool:
    values = torch.tensor([[0.0 if reward is None else reward for reward in rewards]])
    is_graded = torch.tensor([[reward is not None for reward in rewards]])
    return bool(has_reward_spread(values, is_graded))
