"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import AdamW

if TYPE_CHECKING:
    from laser_fast.config import OptimConfig
    from laser_fast.model.policy import Policy


def build_optimizer(policy: Policy, config: OptimConfig) -> AdamW:
    """AdamW over the sharded float32 masters."""
    return AdamW(
        policy.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then the schedule.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
