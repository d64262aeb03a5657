"""Group-relative advantages from rewards, and their mixture with self-scores.

    A_v = (r_v - mean_G r_v) / std_G r_v                                     (eq. 4)
    A   = (1 - tau) A_v + tau (r_s - mean_G r_s) / std_G r_s                 (eq. 15)

std is unbiased (G - 1). Equation numbers are those of LaSeR, arXiv 2510.14943.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,  # [P, G]
    *,
    is_valid: Tensor | None = None,  # [P, G] bool
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each completion within its group (eq. 4), [P, G] float32.

    `is_valid` leaves out completions whose grading failed: they enter neither mean nor std and
    get 0. A group with fewer than two valid completions or without spread gets 0 throughout.
    `scale="none"` does not divide by the standard deviation (Dr.GRPO); `eps` is added to it.
    """
    if rewards.ndim != 2:
        raise ValueError(f"group_advantages: expected rewards [P, G], got {tuple(rewards.shape)}")
    if scale not in ("std", "none"):
        raise ValueError(f'group_advantages: expected scale "std" or "none", got "{scale}"')
    if is_valid is None:
        is_valid = torch.ones_like(rewards, dtype=torch.bool)
    if is_valid.shape != rewards.shape:
        raise ValueError(
            f"group_advantages: expected is_valid {tuple(rewards.shape)} like rewards, "
            f"got {tuple(is_valid.shape)}"
        )
    mean, std = _group_stats(rewards, is_valid)
    has_spread = has_reward_spread(rewards, is_valid)[:, None]
    centered = rewards.float() - mean
    scaled = centered / (std + eps) if scale == "std" else centered
    return torch.where(is_valid & has_spread, scaled, 0.0)


def has_reward_spread(rewards: Tensor, is_valid: Tensor) -> Tensor:
    """Whether a group has two valid completions of different reward, [P] bool.

    Groups without it teach the policy nothing; dynamic sampling replaces them.
    """
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
) -> Tensor:
    """Mix a share tau of score advantages into reward advantages (eq. 15), [P, G] float32.

    Scores are clamped to [0, 1] and are 0 for unfinished completions, which count in mean and
    std. A group whose score std is at or below `min_std` keeps `advantages`. `is_valid` leaves
    completions whose grading failed out of mean and std, and gives them 0.
    """
    if not advantages.shape == scores.shape == is_finished.shape or advantages.ndim != 2:
        raise ValueError(
            "mix_advantages: expected advantages, scores and is_finished of one shape [P, G], got "
            f"{tuple(advantages.shape)}, {tuple(scores.shape)}, {tuple(is_finished.shape)}"
        )
    advantages = advantages.float()
    scores = torch.where(is_finished, scores.float().clamp(0.0, 1.0), 0.0)
    if is_valid is None:
        is_valid = torch.ones_like(is_finished)
    mean, std = _group_stats(scores, is_valid)
    mixed = (1 - tau) * advantages + tau * (scores - mean) / std
    return torch.where(is_valid, torch.where(std > min_std, mixed, advantages), 0.0)


def overlong_penalty(
    lengths: Tensor,  # [P, G]
    *,
    max_new_tokens: int,
    buffer: int,
) -> Tensor:
    """DAPO's soft over-long penalty (arXiv 2503.14476 eq. 13), added to the reward.

    0 up to max_new_tokens - buffer tokens, then falling linearly to -1 at max_new_tokens.
    """
    return ((max_new_tokens - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def _group_stats(values: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std over the valid members of each group, both [P, 1] float32."""
    values = torch.where(is_valid, values.float(), 0.0)
    count = is_valid.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(is_valid, (values - mean) ** 2, 0.0).sum(dim=1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
