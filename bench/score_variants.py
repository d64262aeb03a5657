"""Ways to train the score beside the policy that the trainer does not have, tried on the sandbox.

    torchrun --nproc-per-node 2 -m bench.score_variants VARIANT train CONFIG [section.key=value ...]

    policy-moment   Adam's second moment from the policy term's gradient alone
    two-moment      each term has moments of its own, and the score's step is half as long
    projected       the score term's gradient without what opposes the policy term's (PCGrad,
                    arXiv 2001.06782, over all parameters at once)
    centred         half of the score's target is the reward less its group's mean plus the mean
                    score of the group, which trains the order inside a problem

The first three form both gradients apart in every step: twice the loss stage. `bench.sandbox_study`
runs them beside the trainer's own methods.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from laser_fast.__main__ import main as laser_fast
from laser_fast.records import Microbatch, TrainingSequence
from laser_fast.training import run, trainer, update
from laser_fast.training.objective import Objective
from laser_fast.training.step_metrics import RowMetrics
from laser_fast.training.trainer import Trainer

# Length of the score term's step beside the policy term's where each has moments of its own.
SCORE_STEP = 0.5
# Share of the target that is relative to the group.
CENTRED_SHARE = 0.5


class SplitAdamW(AdamW):
    """AdamW whose second moment follows the first of `grads_apart`, pairs set before each step."""

    grads_apart: Sequence[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of all parameters that have a gradient."""
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        for parameter, (grad, _) in zip(group["params"], self.grads_apart, strict=True):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            count = state["step"].item()
            scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**count))


class TwoMomentAdamW(AdamW):
    """The sum of two AdamW steps from `grads_apart`, pairs of gradients set before each step."""

    grads_apart: Sequence[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of all parameters; a term whose gradients were 0 so far moves nothing."""
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        for parameter, grads in zip(group["params"], self.grads_apart, strict=True):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(torch.stack(grads))
            state["step"] += 1
            count, grad = state["step"].item(), torch.stack(grads)
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
            policy, score = state["exp_avg"] / scale / (1 - beta1**count)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(policy + SCORE_STEP * score, alpha=group["lr"])


class ApartTrainer(Trainer):
    """Forms the gradients of both terms apart in every step with a score term."""

    def _backward(
        self, objective: Objective, batches: Sequence[Microbatch], rows: RowMetrics | None
    ) -> None:
        is_inner = rows is None or objective.score_coef == 0
        if is_inner:
            super()._backward(objective, batches, rows)
            return
        parameters = list(self.policy.parameters())
        super()._backward(replace(objective, score_coef=0.0), batches, rows)
        policy_grads = [parameter.grad for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        super()._backward(objective, [batch.score_only() for batch in batches], None)
        self.join(parameters, policy_grads)

    def _backward_apart(
        self, objective: Objective, batches: Sequence[Microbatch], rows: RowMetrics
    ) -> dict[str, float]:
        # The cap's measurement joins both itself; what it joined is taken apart again.
        parameters = list(self.policy.parameters())
        kept: list[Tensor | None] = []
        whole = Trainer._backward

        def keep_policy(objective: Objective, batches: Any, rows: RowMetrics | None) -> None:
            whole(self, objective, batches, rows)
            if not kept:
                kept.extend(p.grad.clone() for p in parameters if p.grad is not None)

        self._backward = keep_policy  # type: ignore[method-assign]
        try:
            norms = Trainer._backward_apart(self, objective, batches, rows)
        finally:
            del self._backward
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad.sub_(grad)
        self.join(parameters, kept)
        return norms

    @abstractmethod
    def join(self, parameters: Sequence[Tensor], policy_grads: Sequence[Tensor]) -> None:
        """Leave the joint gradient in the parameters, which hold the score term's."""


class Summed(ApartTrainer):
    """The optimizer is given both gradients, and scales them as it likes."""

    def join(self, parameters: Sequence[Tensor], policy_grads: Sequence[Tensor]) -> None:
        """Leave the sum, which norms are measured of."""
        self.optimizer.grads_apart = [
            (policy, parameter.grad.clone())
            for parameter, policy in zip(parameters, policy_grads, strict=True)
        ]
        for parameter, grad in zip(parameters, policy_grads, strict=True):
            parameter.grad.add_(grad)


class Projected(ApartTrainer):
    """The score term never works against the policy term."""

    def join(self, parameters: Sequence[Tensor], policy_grads: Sequence[Tensor]) -> None:
        """Add the score term's without its part along the policy term's, where that is negative."""
        pairs = [(p.grad, grad) for p, grad in zip(parameters, policy_grads, strict=True)]
        both = float(sum(_number((score * policy).sum()) for score, policy in pairs))
        square = float(sum(_number((policy * policy).sum()) for _, policy in pairs))
        share = 1.0 - min(both, 0.0) / square if square > 0 else 1.0
        for score, policy in pairs:
            score.add_(policy, alpha=share)


class Centred(Trainer):
    """Trains the order of the scores inside a group besides their level."""

    def step(self, step: int) -> Any:
        """The trainer's step with other targets."""

        def centred(groups: Any, world: Any, tables: Any, *rest: Any) -> list[TrainingSequence]:
            sequences = plain(groups, world, tables, *rest)
            mask = tables.has_score_target
            count = mask.sum(1, keepdim=True).clamp(min=1)
            gap = (self.score.of(tables.score_logprobs) - tables.rewards) * mask
            gap = (gap.sum(1, keepdim=True) / count).expand_as(tables.rewards)
            size = tables.rewards.shape[1]
            first = world.rank * (len(sequences) // size)
            own = gap[first : first + len(sequences) // size].flatten().tolist()
            return [
                replace(sequence, reward=sequence.reward + CENTRED_SHARE * shift)
                for sequence, shift in zip(sequences, own, strict=True)
            ]

        plain = trainer.training_sequences
        trainer.training_sequences = centred
        try:
            return super().step(step)
        finally:
            trainer.training_sequences = plain


def _number(value: Tensor) -> float:
    full = getattr(value, "full_tensor", None)
    return float(full() if full else value)


VARIANTS = {
    "policy-moment": Summed,
    "two-moment": Summed,
    "projected": Projected,
    "centred": Centred,
}
OPTIMIZERS = {"policy-moment": SplitAdamW, "two-moment": TwoMomentAdamW}


def main() -> None:
    """Put a variant in the trainer's place and run laser-fast with what follows its name."""
    name = sys.argv.pop(1)
    run.Trainer = VARIANTS[name]
    update.AdamW = OPTIMIZERS.get(name, AdamW)
    laser_fast()


if __name__ == "__main__":
    main()
