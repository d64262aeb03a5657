"""Group-relative advantages from rewards, and their mixture with self-scores.

    A_v = (r_v - mean_G r_v) / std_G r_v                                     (eq. 4)
    A   = (1 - tau) A_v + tau (r_s - mean_G r_s) / std_G r_s                 (eq. 15)

std is unbiased (G - 1); scale = "none" divides neither term by it. Equation numbers are those of
LaSeR, arXiv 2510.14943.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from laser_fast.algorithm.score import check_tables

Scale = Literal["std", "none"]


def group_advantages(
    rewards: Tensor,  # [P, G]
    *,
    is_valid: Tensor | None = None,  # [P, G] bool
    scale: Scale = "std",
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each completion within its group (eq. 4), [P, G] float32.

    `is_valid` leaves completions whose grading failed out of mean and std, and gives them 0. A
    group with fewer than two valid completions or without spread gets 0 throughout. `scale="none"`
    does not divide by the standard deviation (Dr.GRPO); `eps` is added to it.
    """
    _check_scale("group_advantages", scale)
    is_valid = torch.ones_like(rewards, dtype=torch.bool) if is_valid is None else is_valid
    check_tables("group_advantages", rewards=rewards, is_valid=is_valid)
    mean, std = _group_stats(rewards, is_valid)
    scaled = (rewards.float() - mean) / (std + eps if scale == "std" else 1.0)
    return torch.where(is_valid & has_reward_spread(rewards, is_valid)[:, None], scaled, 0.0)


def has_reward_spread(rewards: Tensor, is_valid: Tensor) -> Tensor:
    """Whether two valid completions of a group differ in reward, so that it can teach, [P] bool."""
    rewards = rewards.float()
    highest = rewards.masked_fill(~is_valid, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(~is_valid, torch.inf).amin(dim=1)
    return highest > lowest


def mix_advantages(
    advantages: Tensor,  # [P, G]
    scores: Tensor,  # [P, G]
    is_finished: Tensor,  # [P, G] bool
    *,
    tau: float,
    min_std: float,
    is_valid: Tensor | None = None,  # [P, G] bool
    scale: Scale = "std",
) -> Tensor:
    """Mix a share tau of score advantages into reward advantages (eq. 15), [P, G] float32.

    Scores are clamped to [0, 1] and are 0 for unfinished completions, which count in mean and
    std. A group whose score std is at or below `min_std` keeps `advantages`. `is_valid` leaves
    completions whose grading failed out of mean and std, and gives them 0. `scale` is that of
    `group_advantages`: "none" leaves the score's differences undivided, as it does the reward's.
    """
    _check_scale("mix_advantages", scale)
    check_tables("mix_advantages", advantages=advantages, scores=scores, is_finished=is_finished)
    advantages = advantages.float()
    scores = torch.where(is_finished, scores.float().clamp(0.0, 1.0), 0.0)
    is_valid = torch.ones_like(is_finished) if is_valid is None else is_valid
    mean, std = _group_stats(scores, is_valid)
    mixed = (1 - tau) * advantages + tau * (scores - mean) / (std if scale == "std" else 1.0)
    return torch.where(is_valid, torch.where(std > min_std, mixed, advantages), 0.0)


def overlong_penalty(lengths: Tensor, *, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft over-long penalty (arXiv 2503.14476 eq. 13), added to the reward; any shape.

    It is 0 up to max_new_tokens - buffer tokens, then falls linearly to -1 at max_new_tokens.
    """
    return ((max_new_tokens - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def _check_scale(name: str, scale: str) -> None:
    if scale not in get_args(Scale):
        raise ValueError(f'{name}: expected scale "std" or "none", got "{scale}"')


def _group_stats(values: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std over the valid members of each group, both [P, 1] float32."""
    values = torch.where(is_valid, values.float(), 0.0)
    count = is_valid.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(is_valid, (values - mean) ** 2, 0.0).sum(dim=1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
