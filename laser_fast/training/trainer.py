"""One training step, as the nouns it passes through.

    prompt -> sync -> rollout -> reward -> score -> advantage -> pack -> loss -> step

The first four are the sampler's (laser_fast/training/sampler.py). `Trainer` holds what lives from
step to step; laser_fast/training/run.py builds it, evaluates and saves.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from torch import Tensor
from torch.optim import Optimizer

from laser_fast.algorithm.score import SelfScore, check_reference, refit_reference
from laser_fast.log.run_folder import RunFolder
from laser_fast.model.logprobs import label_logprobs, with_scores
from laser_fast.model.packing import share_out, with_router_weights
from laser_fast.model.policy import Policy
from laser_fast.records import Group, Microbatch, TrainingSequence
from laser_fast.rewards import RewardError
from laser_fast.rollout.engine import DisagreementError
from laser_fast.training.bad_steps import BadSteps
from laser_fast.training.objective import Objective, joint_loss
from laser_fast.training.sampler import Sampler
from laser_fast.training.schedule import GradientCap, learning_rate, mixes_scores
from laser_fast.training.step_metrics import RowMetrics, pack_metrics, table_metrics
from laser_fast.training.tables import (
    gather_tables,
    step_advantages,
    step_weights,
    training_sequences,
)
from laser_fast.training.update import apply_gradients, gradient_norm

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run that a step needs; some are the sampler's, too."""

    sampler: Sampler
    reference: Policy | None  # whose model without adapters is the KL penalty's
    optimizer: Optimizer
    score: SelfScore
    cap: GradientCap

    def __post_init__(self) -> None:
        sampler = self.sampler
        self.config, self.world, self.stage = sampler.config, sampler.world, sampler.stage
        self.policy, self.packer = sampler.policy, sampler.packer
        folder, limit = RunFolder(Path(self.config.output_dir)), self.config.optim.max_bad_steps
        self.bad_steps = BadSteps(folder.bad_steps, limit, self.world.rank)

    def step(self, step: int) -> tuple[dict[str, float], list[Group]]:
        """Run step 0, 1, ...: metrics over all ranks, and this rank's graded groups."""
        config = self.config
        groups = self.sampler.sample(step)
        mixes = mixes_scores(step, config)
        trains_score = config.score.loss_coef > 0
        floats = trains_score and config.score.ref_logprob == "floating"
        checks = trains_score and step == 0 and isinstance(config.score.ref_logprob, float)
        with self.stage("score"):
            if (mixes or floats or checks) and config.rollout.score == "off":
                groups = with_scores(self.policy, groups, self.packer, self.world)
        with self.stage("advantage"):
            tables = gather_tables(groups, self.world)
            self._check_grades(step, tables.is_graded)
            if checks and self.world.is_main:
                check_reference(self.score, tables.score_logprobs, tables.is_finished)
            score = self.score
            if floats:
                weights = step_weights(tables, config)[1] / config.optim.minibatches
                score = refit_reference(score, tables.score_logprobs, tables.rewards, weights)
            advantages = step_advantages(tables, config, score if mixes else None)
        with self.stage("pack"):
            sequences = training_sequences(groups, self.world, tables, advantages, config)
            parts = [share_out(part, self.world) for part in self._minibatches(sequences)]
            updates = [self.packer.microbatches(part) for part in parts]
            updates = with_router_weights(updates, config.model.router_aux_loss_coef, self.world)
            per_pass, epochs = len(updates), config.optim.epochs
            metrics = pack_metrics(self.policy, sequences, updates * epochs, self.world)
        with self.stage("loss"):
            updates = self._with_logprobs(updates) * epochs

        score_step = step - config.score.warmup_steps
        objective = Objective(
            loss=config.loss, score=score, score_coef=self.cap.coef() if score_step >= 0 else 0.0
        )
        measures = objective.score_coef > 0 and self.cap.is_due(score_step)
        measures = measures and bool(tables.has_score_target.any())
        norms: dict[str, float] = {}
        lr = learning_rate(step, config.optim)
        rows = RowMetrics(config.loss, self.world.device)
        grad_norms: dict[int, float] = {}
        for number, batches in enumerate(updates):
            with self.stage.only("loss"):
                if measures and not grad_norms:
                    norms = self._backward_apart(objective, batches, rows)
                    objective = replace(objective, score_coef=self.cap.coef())
                else:
                    self._backward(objective, batches, rows)
            # With staleness an update lies between, which TIS corrects. A later pass has the same.
            if self.sampler.staleness == 0 and number < per_pass:
                self._check_rollout(step, rows.disagreement(self.world), tables.logprobs)
            if trains_score and number == per_pass - 1:  # later, the score knows these completions
                metrics |= rows.score_metrics(self.world, tables, score)
            with self.stage.only("step"):
                if tables.is_graded[number % per_pass :: per_pass].any():
                    grad_norms[number] = apply_gradients(
                        self.policy, self.optimizer, self.world, config.optim, lr=lr
                    )
                else:  # not even weight decay or momentum moves
                    self.optimizer.zero_grad(set_to_none=True)

        # A stop ends a step before its update; what lives from step to step changes after that.
        self.score = score
        self.bad_steps.record(step, grad_norms, parts * epochs)
        metrics |= table_metrics(tables, advantages)
        num_tokens = metrics["rollout/tokens"]
        metrics |= rows.finish(self.world, num_tokens, epochs=epochs, minibatches=per_pass)
        if trains_score:
            metrics["score/ref_logprob"] = score.ref_logprob
        metrics |= norms | {"score/coef": objective.score_coef, "step/lr": lr}
        metrics["step/grad_norm"] = fmean(grad_norms.values()) if grad_norms else math.nan
        metrics["rollout/sync_disagreement"] = self.sampler.sync_disagreement
        metrics["rollout/staleness"] = self.sampler.staleness
        return metrics, groups

    def _minibatches(self, sequences: list[TrainingSequence]) -> list[list[TrainingSequence]]:
        """Local sequences with rows by optimizer update: prompt p belongs to p mod count."""
        count = self.config.optim.minibatches
        size = self.config.rollout.group_size
        first = self.world.rank * (len(sequences) // size)
        parts: list[list[TrainingSequence]] = [[] for _ in range(count)]
        for index, sequence in enumerate(sequences):
            if sequence.has_rows:
                parts[(first + index // size) % count].append(sequence)
        return parts

    def _with_logprobs(self, updates: list[list[Microbatch]]) -> list[list[Microbatch]]:
        """The microbatches with the old and the reference log-probs that their loss needs.

        With one update per rollout the old log-probs are the current ones, detached. Further passes
        over the same microbatches keep both: ratios and KL grow from pass to pass, while the score
        is fitted to the same targets again.
        """
        if len(updates) * self.config.optim.epochs > 1:
            updates = [_read(self.policy, batches, "old_logprobs") for batches in updates]
        if self.reference is not None:
            with self.reference.without_adapters():
                updates = [_read(self.reference, batches, "ref_logprobs") for batches in updates]
        return updates

    def _backward(
        self, objective: Objective, batches: Sequence[Microbatch], rows: RowMetrics | None
    ) -> None:
        """Accumulate the gradients of one update; `rows` takes its metrics."""
        for batch in batches:
            result = self.policy(batch, joint_loss(objective, batch))
            self.policy.backward(result.loss, self.world, is_last=batch is batches[-1])
            if rows is not None:
                rows.add(batch, result)

    def _backward_apart(
        self, objective: Objective, batches: Sequence[Microbatch], rows: RowMetrics
    ) -> dict[str, float]:
        """The same with the gradients of both terms formed apart, measured and joined.

        Returns both norms for the log; the score's at the coefficient that now acts.
        """
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self._backward(replace(objective, score_coef=0.0), batches, rows)
        policy_norm = gradient_norm(self.policy)
        policy_grads = [parameter.grad for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        score_only = [batch.score_only() for batch in batches]
        self._backward(replace(objective, score_coef=self.cap.loss_coef), score_only, None)
        score_norm = gradient_norm(self.policy)
        self.cap.measure(policy_norm=policy_norm, score_norm=score_norm)
        share = self.cap.coef() / self.cap.loss_coef
        for parameter, grad in zip(parameters, policy_grads, strict=True):
            assert parameter.grad is not None and grad is not None
            parameter.grad.mul_(share).add_(grad)
        return {"loss/grad_norm": policy_norm, "score/grad_norm": share * score_norm}

    def _check_grades(self, step: int, is_graded: Tensor) -> None:
        """Refuse a step of which too many grades failed, and name one without any."""
        failed, limit = float((~is_graded).float().mean()), self.config.reward.max_failed
        if failed > limit:
            raise RewardError(
                f"step {step}: {failed:.0%} of the grades failed, more than reward.max_failed = "
                f"{limit:g}; see the warnings above, and --resume once the reward works"
            )
        if failed == 1:
            logger.warning("step %d: every grade failed, so there is no update", step)

    def _check_rollout(self, step: int, disagreement: float, sampled: Tensor) -> None:
        """Refuse to train on tokens that the engine sampled from other weights.

        Where only the policy's log-probs are no numbers, its gradient is none, and not applied.
        """
        limit = self.config.rollout.max_disagreement
        if not sampled.isfinite().all():
            disagreement = math.nan
        elif not math.isfinite(disagreement):
            return
        if not disagreement <= limit:
            raise DisagreementError(
                f"step {step}: policy and engine disagree by {disagreement:.3g} nats per sampled "
                f"token, more than rollout.max_disagreement = {limit:g}; the engine's weights are "
                "stale or its numerics differ"
            )


def _read(policy: Policy, batches: Sequence[Microbatch], name: str) -> list[Microbatch]:
    """The microbatches with a policy's log-probs of their policy rows under `name`."""
    found: list[Tensor] = label_logprobs(policy, batches)
    return [
        replace(batch, policy=replace(batch.policy, **{name: logprobs[: len(batch.policy)]}))
        for batch, logprobs in zip(batches, found, strict=True)
    ]
