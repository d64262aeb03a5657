"""When things happen: schedules and warm-ups as pure functions of the step.

A resumed run therefore needs no scheduler state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laser_fast.config import Config, OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def mixes_scores(step: int, config: Config) -> bool:
    """Whether self-scores enter the advantages of a step: after both warm-ups."""
    warmup_steps = config.score.warmup_steps + config.advantage.score_warmup_steps
    return config.advantage.score_coef > 0 and step >= warmup_steps


def is_due(completed: int, every: int) -> bool:
    """Whether something that happens after every `every` steps happens now; 0: never."""
    return every > 0 and completed % every == 0
