"""Metrics of one step, keyed by stage; sums over all ranks, so equal on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_fast.algorithm.loss import is_clipped, kl_penalty
from laser_fast.algorithm.score import is_correct, self_reward_score
from laser_fast.algorithm.verification import verify
from laser_fast.config import LossConfig
from laser_fast.model.distributed import World
from laser_fast.records import Microbatch
from laser_fast.training.batch import Outcome
from laser_fast.training.objective import HeadResult


def outcome_metrics(outcome: Outcome, advantages: Tensor) -> dict[str, float]:
    """Metrics of the [P, G] tables."""
    num_graded = outcome.is_graded.sum().clamp(min=1)
    return {
        "rollout/mean_length": float(outcome.lengths.float().mean()),
        "rollout/truncated": float((~outcome.is_finished).float().mean()),
        "reward/mean": float(outcome.rewards.sum() / num_graded),
        "reward/failed": float((~outcome.is_graded).sum()),
        "advantage/zero_std_groups": float((~outcome.has_spread).float().mean()),
        "advantage/mean_abs": float(advantages.abs().mean()),
    }


class RowMetrics:
    """Sums over the head rows of all microbatches of a step."""

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        self._config = config
        self._sums = {
            key: torch.zeros((), dtype=torch.float64, device=device)
            for key in ("tokens", "policy", "score", "disagreement", "clipped", "entropy", "kl")
        }
        self._score_logprobs: list[Tensor] = []
        self._rewards: list[Tensor] = []

    def add(
        self,
        batch: Microbatch,
        result: HeadResult,
        old_logprobs: Tensor | None,  # [N_p]
        ref_logprobs: Tensor | None,  # [N_p]
    ) -> None:
        """Add one microbatch after its forward; nothing here waits for the device."""
        boundary = batch.num_policy_rows
        logprobs = result.logprobs[:boundary]
        old = logprobs if old_logprobs is None else old_logprobs
        clipped = is_clipped(
            logprobs,
            old,
            batch.advantages,
            kind=self._config.kind,
            clip_low=self._config.clip_low,
            clip_high=self._config.clip_high,
            sequence_ids=batch.sequence_ids,
        )
        sums = self._sums
        sums["tokens"] += boundary
        sums["policy"] += result.policy_loss
        sums["score"] += result.score_loss
        sums["disagreement"] += (old - batch.rollout_logprobs).abs().sum()
        sums["clipped"] += clipped.sum()
        # -log pi of the sampled token estimates the entropy without bias, and without the logits.
        sums["entropy"] -= batch.rollout_logprobs.sum()
        if ref_logprobs is not None:
            sums["kl"] += kl_penalty(logprobs, ref_logprobs).sum()
        self._score_logprobs.append(result.logprobs[boundary:])
        self._rewards.append(batch.rewards)

    def disagreement(self, world: World) -> float:
        """Mean |policy - engine| log-prob so far, in nats. Collective."""
        pair = torch.stack([self._sums["disagreement"], self._sums["tokens"]])
        total, tokens = world.sum(pair).tolist()
        return total / max(tokens, 1)

    def finish(self, world: World, *, has_reference: bool) -> dict[str, float]:
        """Metrics of the step over all ranks. Collective."""
        totals = world.sum(torch.stack(list(self._sums.values()))).tolist()
        sums = dict(zip(self._sums, totals, strict=True))
        tokens = max(sums["tokens"], 1)
        metrics = {
            "loss/policy": sums["policy"],
            "loss/score": sums["score"],
            "loss/clip_frac": sums["clipped"] / tokens,
            "loss/entropy": sums["entropy"] / tokens,
            "rollout/disagreement": sums["disagreement"] / tokens,
            "rollout/tokens": sums["tokens"],
        }
        if has_reference:
            metrics["loss/kl"] = sums["kl"] / tokens
        return metrics

    def score_metrics(
        self, world: World, outcome: Outcome, *, beta: float, ref_logprob: float
    ) -> dict[str, float]:
        """Self-verification of this step's completions, from the training forward. Collective.

        Truncated completions have no score row and count as predicted incorrect.
        """
        local = torch.stack([torch.cat(self._score_logprobs), torch.cat(self._rewards)], dim=1)
        rows = torch.tensor(world.gather(local.tolist())).reshape(-1, 2)
        truncated = outcome.rewards[outcome.is_graded & ~outcome.is_finished]
        scores = self_reward_score(rows[:, 0], beta=beta, ref_logprob=ref_logprob)
        found = verify(
            torch.cat([scores, torch.zeros_like(truncated)]),
            is_correct(torch.cat([rows[:, 1], truncated])),
            is_finished=torch.arange(len(scores) + len(truncated)) < len(scores),
        )
        names = ("mean_correct", "mean_incorrect", "tpr", "tnr", "f1", "auroc")
        return {f"score/{name}": found[name] for name in names}
