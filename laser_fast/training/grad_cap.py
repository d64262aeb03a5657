"""Cap of the score term's gradient relative to the policy term's.

The MSE's gradient is coherent (one token, every finished completion) and starts at several times
the policy gradient, at the cost of accuracy. The fused head forms the hidden-state gradient of
both kinds of rows, so their norms are free:

    alpha_t = alpha * min(1, max_ratio * |g_policy| / |g_score|)

with g_score taken at the full alpha and both norms averaged over past steps, because those of
this step are known only after its backward. The first step with a score term is uncapped and
bounded by optim.max_grad_norm alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laser_fast.training.distributed import World

# Norms of single steps jump by a factor of two; the mean over about five steps does not.
DECAY = 0.8


class GradientCap:
    """Measures both gradient norms and scales alpha by their running ratio."""

    def __init__(self, *, loss_coef: float, max_ratio: float) -> None:
        self.loss_coef = loss_coef
        self.max_ratio = max_ratio
        self._policy_square = 0.0
        self._score_square = 0.0  # at the full alpha
        self._sums: Tensor | None = None

    def coef(self) -> float:
        """Coefficient of the score term in the coming step."""
        if self.max_ratio == 0 or self._score_square == 0:
            return self.loss_coef
        ratio = math.sqrt(self._policy_square / self._score_square)
        return self.loss_coef * min(1.0, self.max_ratio * ratio)

    def observer(self, num_policy_rows: int) -> Callable[[Tensor], None]:
        """A hook that adds the hidden-state gradient [N, D] of one microbatch."""

        def observe(grad: Tensor) -> None:
            parts = grad[:num_policy_rows], grad[num_policy_rows:]
            squares = torch.stack([part.float().square().sum() for part in parts])
            self._sums = squares if self._sums is None else self._sums + squares

        return observe

    def update(self, world: World, *, coef: float) -> dict[str, float]:
        """Close the step that ran with `coef`; returns both norms for the log."""
        sums = torch.zeros(2) if self._sums is None else self._sums
        # The backward ran on the loss times the world size (training.trainer).
        policy, score = (world.sum(sums) / world.size**2).tolist()
        self._sums = None
        if coef > 0 and score > 0:
            full = score * (self.loss_coef / coef) ** 2
            first = self._score_square == 0
            self._policy_square = _average(self._policy_square, policy, first)
            self._score_square = _average(self._score_square, full, first)
        return {
            "score/head_grad_norm": math.sqrt(score),
            "loss/head_grad_norm": math.sqrt(policy),
        }

    def state_dict(self) -> dict[str, float]:
        """The running squares, for an exact resume."""
        return {"policy_square": self._policy_square, "score_square": self._score_square}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from saved running squares."""
        self._policy_square = state["policy_square"]
        self._score_square = state["score_square"]


def _average(old: float, new: float, first: bool) -> float:
    return new if first else DECAY * old + (1 - DECAY) * new
