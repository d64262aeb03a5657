"""The last-token self-score and its class balance (LaSeR, arXiv 2510.14943).

    r_s = beta (log pi(z_c | x, y) - c_ref)                                  (eq. 11)
    L   = 1 / (N_c + N_i) * sum_finished w (r_s - r_v)^2                     (eq. 14)
    w_c = (N_c + N_i) / (2 N_c),   w_i = (N_c + N_i) / (2 N_i)

z_c is one reserved token, read at the EOS position of a finished completion; r_v the verifier's
reward. A correct answer's target log-prob is c_ref + 1/beta: far below 0, so that the token stays
improbable and generation is not disturbed.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# beta log Z, the bias of leaving out the partition function, stays under about 0.05 * beta while
# the target is at most -3, and the closed form of eq. 8 stops making sense when it nears 0.
MAX_TARGET = -1.0
WARN_TARGET = -3.0

Logprobs = TypeVar("Logprobs", float, Tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfScore:
    """The score token z_c of a model, and how its log-probs become scores (eq. 11).

    `ref_logprob` is c_ref; it is nan where nobody reads a score, and every score is then undefined.
    """

    token_id: int
    beta: float
    ref_logprob: float

    def of(self, logprobs: Logprobs) -> Logprobs:
        """Scores r_s of log-probs of the score token, of any shape."""
        return self_reward_score(logprobs, beta=self.beta, ref_logprob=self.ref_logprob)


def self_reward_score(
    logprobs: Logprobs,  # any shape
    *,
    beta: float,
    ref_logprob: float,
) -> Logprobs:
    """Score of log-probs of the reserved token: beta (logprobs - ref_logprob), eq. 11.

    0 is the untrained model, 1 the target of a correct answer. Not clamped; votes and advantages
    clamp to [0, 1] where they use it.
    """
    return beta * (logprobs - ref_logprob)


def is_correct(rewards: Tensor) -> Tensor:
    """Which rewards count as correct for the class balance and the verification metrics."""
    return rewards > 0.5


def class_weights(
    rewards: Tensor,  # [P, G]
    is_finished: Tensor,  # [P, G] bool
    *,
    max_weight: float = float("inf"),
) -> Tensor:
    """Weights that give both classes the same total in the MSE (eq. 14).

    With N_c correct and N_i incorrect finished completions of the whole step: (N_c + N_i) / (2 N_c)
    for a correct one, (N_c + N_i) / (2 N_i) for an incorrect one, each clipped at `max_weight`;
    0 for unfinished completions. A class without members has no weight to give.

    Returns:
        [P, G] float32.
    """
    _check_same_shape("class_weights", rewards=rewards, is_finished=is_finished)
    correct = is_correct(rewards) & is_finished
    incorrect = ~is_correct(rewards) & is_finished
    total = is_finished.sum().float()
    weights = torch.zeros(rewards.shape, dtype=torch.float32, device=rewards.device)
    for members in (correct, incorrect):
        weight = total / (2 * members.sum()).clamp(min=1)
        weights = torch.where(members, weight.clamp(max=max_weight), weights)
    return weights


def score_loss(
    logprobs: Tensor,  # [N]
    rewards: Tensor,  # [N]
    weights: Tensor,  # [N]
    *,
    beta: float,
    ref_logprob: float,
) -> Tensor:
    """Terms w (r_s - r_v)^2 of the MSE, [N]; `weights` hold class weight and denominator.

    The score is not clamped here: a clamp would kill the gradient outside [0, 1].
    """
    return (
        weights * (self_reward_score(logprobs, beta=beta, ref_logprob=ref_logprob) - rewards) ** 2
    )


def check_score_target(*, beta: float, ref_logprob: float) -> None:
    """Refuse a beta whose target log-prob for a correct answer is no longer improbable.

    Raises:
        ValueError: if ref_logprob + 1/beta > -1; between -3 and -1 it warns. Also if beta is not
            positive or ref_logprob not finite, as for a token whose logit is masked.
    """
    if not beta > 0 or not math.isfinite(ref_logprob):
        raise ValueError(
            f"expected beta > 0 and a finite ref_logprob, got beta = {beta:g} and ref_logprob = "
            f"{ref_logprob:g}; choose a token that the untrained model can sample, though rarely"
        )
    target = ref_logprob + 1 / beta
    if target <= WARN_TARGET:
        return
    if ref_logprob < WARN_TARGET:
        # Rounded up, so that following the advice ends the complaint.
        smallest = math.ceil(1e3 / (WARN_TARGET - ref_logprob)) / 1e3
        remedy = f"choose beta >= {smallest:g}"
    else:
        remedy = "choose a token that the untrained model finds less probable"
    message = (
        f"the target log-prob of a correct answer, ref_logprob + 1/beta = {ref_logprob:g} + "
        f"1/{beta:g} = {target:.3g}, must stay well below 0; {remedy}"
    )
    if target > MAX_TARGET:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _check_same_shape(name: str, **tensors: Tensor) -> None:
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"{name}: expected tensors of one shape [P, G], got {shapes}")
