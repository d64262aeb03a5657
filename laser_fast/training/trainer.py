"""One training step, as the nouns it passes through.

    prompt -> rollout -> reward -> score -> advantage -> pack -> loss -> step

The first three are the sampler's (laser_fast/training/sampler.py). `Trainer` holds what lives
from step to step; laser_fast/training/run.py builds it, evaluates and saves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from laser_fast.config import Config
from laser_fast.model.distributed import World
from laser_fast.model.logprobs import read_rows, with_scores
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.records import Group, Microbatch, TrainingSequence
from laser_fast.rollout.agreement import DisagreementError
from laser_fast.training.batch import (
    gather_outcome,
    step_advantages,
    step_weights,
    training_sequences,
)
from laser_fast.training.grad_cap import GradientCap
from laser_fast.training.objective import Objective, joint_loss
from laser_fast.training.optimizer import learning_rate
from laser_fast.training.sampler import Rewards, Sampler
from laser_fast.training.stages import Stages
from laser_fast.training.step_metrics import RowMetrics, outcome_metrics

# A microbatch with the old and the reference log-probs of its policy rows, where they are needed.
Batch = tuple[Microbatch, Tensor | None, Tensor | None]


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run, and the little state that a checkpoint holds besides them."""

    config: Config
    world: World
    stages: Stages
    sampler: Sampler
    packer: Packer
    policy: Policy
    reference: Policy | None  # frozen initial policy of the KL penalty
    optimizer: Optimizer
    cap: GradientCap
    ref_logprob: float | None = None  # c_ref; None until measured

    def step(self, step: int) -> tuple[dict[str, float], list[Group], Rewards]:
        """Run step 0, 1, ...: metrics over all ranks, this rank's groups and their rewards."""
        config, scoring = self.config, self.config.score
        groups, rewards = self.sampler.collect(step)

        mixes_scores = config.advantage.score_coef > 0 and step >= (
            scoring.warmup_steps + config.advantage.score_warmup_steps
        )
        with self.stages("score"):
            if mixes_scores and config.rollout.score == "off":
                groups = with_scores(self.policy, groups, self.packer)
        with self.stages("advantage"):
            outcome = gather_outcome(groups, rewards, self.world)
            advantages = step_advantages(
                outcome, config, ref_logprob=self.ref_logprob, mixes_scores=mixes_scores
            )
        with self.stages("pack"):
            sequences = training_sequences(
                groups,
                self.world.rank * len(groups),
                outcome,
                advantages,
                step_weights(outcome, config),
                with_score_rows=scoring.loss_coef > 0,
            )
            updates = [self.packer.microbatches(part) for part in self._minibatches(sequences)]
        with self.stages("loss"):
            # One update per rollout: the old log-probs are the current ones, detached.
            old = self._read(self.policy if len(updates) > 1 else None, updates)
            ref = self._read(self.reference, updates)

        objective = Objective(
            loss=config.loss,
            beta=scoring.beta,
            ref_logprob=self.ref_logprob,
            score_coef=self.cap.coef() if step >= scoring.warmup_steps else 0.0,
        )
        measures = objective.score_coef > 0 and self.cap.is_due(step - scoring.warmup_steps)
        norms: dict[str, float] = {}
        lr = learning_rate(step, config.optim)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        rows = RowMetrics(config.loss, self.world.device)
        grad_norms = []
        for microbatches, old_logprobs, ref_logprobs in zip(updates, old, ref, strict=True):
            with self.stages.timer("loss"):
                batches = list(zip(microbatches, old_logprobs, ref_logprobs, strict=True))
                if measures and not grad_norms:
                    norms = self._backward_apart(objective, batches, rows)
                    objective = replace(objective, score_coef=self.cap.coef())
                else:
                    self._backward(objective, batches, rows)
            if self.sampler.staleness == 0:  # else an update lies between, which TIS corrects
                self._check_rollout(step, rows.disagreement(self.world))
            with self.stages.timer("step"):
                grad_norms.append(self._update(step))

        metrics = outcome_metrics(outcome, advantages)
        metrics |= rows.finish(self.world, has_reference=self.reference is not None)
        if scoring.loss_coef > 0:
            metrics |= rows.score_metrics(
                self.world, outcome, beta=scoring.beta, ref_logprob=self.ref_logprob
            )
        metrics |= norms
        metrics["score/coef"] = objective.score_coef
        metrics["step/grad_norm"] = sum(grad_norms) / len(grad_norms)
        metrics["step/lr"] = lr
        metrics["rollout/sync_disagreement"] = self.sampler.sync_disagreement
        metrics["rollout/staleness"] = self.sampler.staleness
        return metrics, groups, rewards

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
        batches: list[Batch],
        rows: RowMetrics | None,
    ) -> None:
        """Accumulate the gradients of one update; `rows` takes its metrics."""
        for batch, old_logprobs, ref_logprobs in batches:
            head = joint_loss(
                objective, batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs
            )
            result = self.policy(batch, head)
            # FSDP2 averages gradients over ranks, but the denominators are already global.
            (result.loss * self.world.size).backward()
            if rows is not None:
                rows.add(batch, result, old_logprobs, ref_logprobs)

    def _backward_apart(
        self, objective: Objective, batches: list[Batch], rows: RowMetrics
    ) -> dict[str, float]:
        """The same with the gradients of both terms formed apart, measured and joined.

        Returns:
            Both norms for the log; the score's at the coefficient that now acts.
        """
        parameters = list(self.policy.parameters())
        self._backward(replace(objective, score_coef=0.0), batches, rows)
        policy_norm = self._grad_norm()
        policy_grads = [parameter.grad for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        score_only = [
            (replace(batch, token_weight=torch.zeros_like(batch.token_weight)), *rest)
            for batch, *rest in batches
        ]
        self._backward(replace(objective, score_coef=self.cap.loss_coef), score_only, None)
        score_norm = self._grad_norm()
        self.cap.measure(policy_norm=policy_norm, score_norm=score_norm)
        share = self.cap.coef() / self.cap.loss_coef
        for parameter, grad in zip(parameters, policy_grads, strict=True):
            parameter.grad.mul_(share).add_(grad)
        return {"loss/grad_norm": policy_norm, "score/grad_norm": share * score_norm}

    def _grad_norm(self) -> float:
        """Norm of the accumulated gradients over all parameters. Collective."""
        norm = get_total_norm([parameter.grad for parameter in self.policy.parameters()])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _update(self, step: int) -> float:
        """Clip and apply the accumulated gradients; returns their norm before clipping."""
        norm = self._grad_norm()
        if not norm < float("inf"):
            raise RuntimeError(
                f"step {step}: the gradient norm is {norm}; the run stops before the update, and "
                "the last checkpoint is intact"
            )
        clip_grads_with_norm_(
            self.policy.parameters(), self.config.optim.max_grad_norm, torch.tensor(norm)
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
