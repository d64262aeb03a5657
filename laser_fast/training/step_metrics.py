"""Metrics of one step, keyed by stage; sums over all ranks, so equal on every rank."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.algorithm.loss import is_clipped, kl_penalty
from laser_fast.algorithm.score import SelfScore, is_correct
from laser_fast.algorithm.verification import verify
from laser_fast.config import LossConfig
from laser_fast.log.timer import peak_memory_gb
from laser_fast.model.distributed import World
from laser_fast.model.flops import peak_flops, training_flop
from laser_fast.model.policy import Policy
from laser_fast.records import Microbatch, TrainingSequence
from laser_fast.training.objective import HeadResult, clipping, sampling_weights
from laser_fast.training.tables import StepTables


def table_metrics(tables: StepTables, advantages: Tensor) -> dict[str, float]:
    """Metrics of the [P, G] tables."""
    num_graded, correct = tables.is_graded.sum(), is_correct(tables.rewards)
    lengths, incorrect = tables.lengths.float(), tables.is_graded & ~correct
    can_teach = has_reward_spread(tables.totals, tables.is_graded)
    apart: dict[str, float] = {}
    for name in sorted({source for source, _ in tables.apart} - {""}):
        own = torch.tensor([source == name for source, _ in tables.apart])
        rewards, graded = tables.rewards[own], tables.is_graded[own]
        apart[f"reward/mean/{name}"] = float(rewards.sum() / graded.sum())
    said = [extras for _, of_group in tables.apart for extras in of_group]
    for name in said[0]:
        found = [value for extras in said if (value := extras[name]) is not None]
        apart[f"reward/extra/{name}"] = fmean(found) if found else math.nan
        apart[f"reward/extra_failed/{name}"] = 1 - len(found) / len(said)
        apart["reward/total"] = float(tables.totals.sum() / num_graded)
    return apart | {
        "rollout/mean_length": float(lengths.mean()),
        "rollout/mean_length_correct": float(lengths[correct].mean()),  # nan of none
        "rollout/mean_length_incorrect": float(lengths[incorrect].mean()),
        "rollout/truncated": float((~tables.is_finished).float().mean()),
        "rollout/tokens": float(tables.lengths.sum()),
        # -log pi of the sampled token estimates the entropy without bias, and without the logits.
        "loss/entropy": -float(tables.logprobs.sum() / tables.lengths.sum()),
        "reward/mean": float(tables.rewards.sum() / num_graded),  # nan, logged as null, of none
        "reward/failed": float((~tables.is_graded).sum()),
        "advantage/zero_std_groups": float((~can_teach).float().mean()),
        "advantage/mean_abs": float(advantages.abs().mean()),
    }


def pack_metrics(
    policy: Policy,
    sequences: Sequence[TrainingSequence],
    updates: Sequence[Sequence[Microbatch]],
    world: World,
) -> dict[str, float]:
    """What the packed step computes, over all ranks. Collective."""
    batches = [batch for update in updates for batch in update]
    counts = (
        sum(len(batch.input_ids) for batch in batches),
        sum(not sequence.has_rows for sequence in sequences),
        len(sequences),
        training_flop(policy, batches),
    )
    tokens, left_out, total, flop = world.sum(torch.tensor(counts, dtype=torch.float64)).tolist()
    return {"pack/tokens": tokens, "pack/left_out": left_out / total, "pack/flop": flop}


def update_speed(metrics: Mapping[str, float], world: World) -> dict[str, float]:
    """Speed and memory of the update, from the times of a finished step and `pack_metrics`."""
    seconds = metrics["time/loss"] + metrics["time/step"]
    found = {
        "memory/peak_gb": peak_memory_gb(world.device),
        "throughput/computed_per_s": metrics["pack/tokens"] / seconds,
    }
    if peak := peak_flops(world.device):
        found["throughput/mfu"] = metrics["pack/flop"] / seconds / peak / world.size
    return found


_SUMS = "policy score gaps probes clipped kl trained weights squares cut router routed".split()


class RowMetrics:
    """Sums over the head rows of all microbatches of a step."""

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        self._config = config
        self._sums = {key: torch.zeros((), dtype=torch.float64, device=device) for key in _SUMS}
        self._largest_ratio = torch.zeros(1, device=device)
        self._score_logprobs: list[Tensor] = []
        self._rewards: list[Tensor] = []

    def add(self, batch: Microbatch, result: HeadResult) -> None:
        """Add one microbatch after its forward; nothing here waits for the device."""
        policy = batch.policy
        logprobs, score_logprobs = result.logprobs.split([len(policy), len(batch.score)])
        old = logprobs if policy.old_logprobs is None else policy.old_logprobs
        clipped = is_clipped(logprobs, old, policy.advantages, **clipping(self._config, policy))
        sums = self._sums
        sums["policy"] += result.policy_loss
        sums["score"] += result.score_loss
        sums["router"] += result.router_loss
        sums["routed"] += batch.router_weight
        gaps = (old - policy.rollout_logprobs).abs()
        sums["gaps"] += torch.where(policy.is_probe, gaps, 0).sum()
        sums["probes"] += policy.is_probe.sum()
        # Whatever else is there: some rows that train nothing are probes.
        trains = policy.weights * policy.advantages != 0
        sums["clipped"] += (clipped & trains).sum()
        if (cap := self._config.tis_cap) > 0:
            found = sampling_weights(self._config, policy, old)
            ratios, weights = (each.where(trains, 0) for each in found)
            sums["trained"] += trains.sum()
            sums["weights"] += weights.sum()
            sums["squares"] += (weights * weights).sum()
            sums["cut"] += (ratios > cap).sum()
            self._largest_ratio = torch.cat([self._largest_ratio, ratios]).amax(0, keepdim=True)
        if policy.ref_logprobs is not None:
            sums["kl"] += kl_penalty(logprobs, policy.ref_logprobs).sum()
        self._score_logprobs.append(score_logprobs)
        self._rewards.append(batch.score.rewards)

    def disagreement(self, world: World) -> float:
        """Mean |policy - engine| log-prob so far, in nats. Collective."""
        total, probes = world.sum(torch.stack([self._sums["gaps"], self._sums["probes"]])).tolist()
        return total / max(probes, 1)

    def finish(
        self, world: World, num_tokens: float, *, epochs: int = 1, minibatches: int = 1
    ) -> dict[str, float]:
        """Metrics of the step over all ranks, whose completions have `num_tokens`. Collective.

        They are means over the passes, losses also over the updates of a pass. Of the importance
        weights, those of tokens that train count, nan of none; ess is the effective sample size as
        a share of n, (sum w)^2 / (n sum w^2).
        """
        totals = (world.sum(torch.stack(list(self._sums.values()))) / epochs).tolist()
        sums = dict(zip(self._sums, totals, strict=True))
        metrics = {
            "loss/policy": sums["policy"] / minibatches,
            "loss/score": sums["score"] / minibatches,
            "loss/clip_frac": sums["clipped"] / num_tokens,
            "rollout/disagreement": sums["gaps"] / max(sums["probes"], 1),
        }
        if self._config.kl_coef > 0:
            metrics["loss/kl"] = sums["kl"] / num_tokens
        if sums["routed"]:
            metrics["loss/router"] = sums["router"] / sums["routed"]
        if self._config.tis_cap > 0:
            trained, weights = sums["trained"] or math.nan, sums["weights"]
            metrics |= {
                "loss/importance_mean": weights / trained,
                "loss/importance_max": max(world.gather(self._largest_ratio.tolist())) or math.nan,
                "loss/importance_cut": sums["cut"] / trained,
                "loss/importance_ess": weights**2 / (trained * sums["squares"] or 1),
            }
        return metrics

    def score_metrics(self, world: World, tables: StepTables, score: SelfScore) -> dict[str, float]:
        """Self-verification of this step's completions, from the training forward. Collective.

        Truncated completions have no score row and count as predicted incorrect. Where a log-prob
        is no finite number, as in a step that is skipped, no metric is.
        """
        names = ("mean_correct", "mean_incorrect", "tpr", "tnr", "f1", "auroc")
        local = torch.stack([torch.cat(self._score_logprobs), torch.cat(self._rewards)], dim=1)
        rows = torch.tensor(world.gather(local.tolist())).reshape(-1, 2)
        if not rows.isfinite().all():
            return {f"score/{name}": math.nan for name in names}
        truncated = tables.rewards[tables.is_graded & ~tables.is_finished]
        scores = score.of(rows[:, 0])
        found = verify(
            torch.cat([scores, torch.zeros_like(truncated)]),
            is_correct(torch.cat([rows[:, 1], truncated])),
            is_finished=torch.arange(len(scores) + len(truncated)) < len(scores),
        )
        return {f"score/{name}": found[name] for name in names}
