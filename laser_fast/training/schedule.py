"""What changes from step to step: schedules, warm-ups, and the cap of the score's gradient.

Schedules are pure functions of the step, so that a resumed run needs no scheduler state.

The MSE's gradient is coherent (one token, every finished completion): at alpha = 1 it starts at
seven times the policy gradient, at the cost of accuracy, and ends at about twice. So it is capped,

    alpha_t = alpha * min(1, max_ratio * |g_policy| / |g_score|)

with the norms over all parameters and g_score at the full alpha. Every MEASURE_EVERY steps, and in
each until there is a ratio, the two gradients are formed apart, in two backward passes; in between
the last ratio holds. (Norms of the hidden-state gradients, which are free, do not do: on the
sandbox their ratio is 0.7 times that of the parameters at first and 5 times at step 60.)
"""

import math
from dataclasses import dataclass

from laser_fast.config import Config, UpdateConfig

# One step in eight runs its forward and backward twice: 12% of the loss stage.
MEASURE_EVERY = 8
# A single measurement is off by about a third; two are averaged, and the first is taken as it is.
DECAY = 0.5


def learning_rate(step: int, config: UpdateConfig) -> float:
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


@dataclass(kw_only=True)
class GradientCap:
    """Scales alpha by the measured ratio of both gradient norms, which a checkpoint keeps."""

    loss_coef: float
    max_ratio: float
    ratio: float | None = None  # |g_score| at the full alpha over |g_policy|

    def is_due(self, score_step: int) -> bool:
        """Whether to measure in this step, counted from the first one with a score term."""
        is_time = self.ratio is None or score_step % MEASURE_EVERY == 0
        return self.max_ratio > 0 and self.loss_coef > 0 and is_time

    def measure(self, *, policy_norm: float, score_norm: float) -> None:
        """Take a measurement; `score_norm` is at the full alpha.

        Where either gradient is 0, or no finite number, there is nothing to compare, and the last
        ratio stays.
        """
        if 0 in (policy_norm, score_norm) or not math.isfinite(policy_norm + score_norm):
            return
        ratio = score_norm / policy_norm
        self.ratio = ratio if self.ratio is None else DECAY * self.ratio + (1 - DECAY) * ratio

    def coef(self) -> float:
        """The coefficient of the score term by the measurements so far."""
        if self.ratio is None or self.ratio <= self.max_ratio:
            return self.loss_coef
        return self.loss_coef * self.max_ratio / self.ratio
