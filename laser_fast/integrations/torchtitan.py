"""laser_kernels in torchtitan's RL trainer, which gives them its head as to ChunkedLossWrapper."""

import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_fast import needs_host
from laser_fast.integrations import check_host, refuse

with needs_host("torchtitan", "pip install 'torchtitan>=0.3,<0.4'"):
    from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, compute_logprobs
    from torchtitan.experiments.rl.losses import DAPOLoss, dapo

from laser_kernels import linear_logprob_entropy

check_host(
    "torchtitan",
    "0.3",
    {
        compute_logprobs: "logits labels return_entropy",
        ChunkedLossWrapper.__call__: "self pred labels global_valid_tokens loss_inputs",
    },
)


class _Scored(NamedTuple):
    logprobs: Tensor  # [B, S] or [T] float32, 0 outside the loss
    entropy: Tensor


class LaserLossWrapper(ChunkedLossWrapper):
    """Log-probs and entropies of the loss's tokens in one op, then torchtitan's DAPO or GRPO loss.

    The op runs in the head's forward, where FSDP2 has its weight whole, and has chunks of its own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """torchtitan's, with one chunk."""

        num_chunks: int = 1

    def set_lm_head(self, lm_head: Any) -> None:
        """Take the head, which from now on gives log-probs in the place of logits."""
        refused = {
            f"a loss of type {type(self.loss_fn).__name__}": not isinstance(self.loss_fn, DAPOLoss),
            f"num_chunks={self.num_chunks}": self.num_chunks != 1,
            "a head with a bias": lm_head.bias is not None,
        }
        refuse("LaserLossWrapper", refused)
        super().set_lm_head(lm_head)
        lm_head.forward = types.MethodType(_head_forward, lm_head)

    def __call__(
        self,
        pred: Tensor,  # [B, S, D] or [T, D] hidden states
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, differentiable, and its metrics; arguments as ChunkedLossWrapper's."""
        is_scored = loss_inputs["loss_mask"] & (labels != IGNORE_INDEX)
        found = self.lm_head(pred, labels, is_scored)
        scored = _Scored(*(x.view(labels.shape) for x in found))
        return self.loss_fn(scored, labels, global_valid_tokens, **loss_inputs)


def _head_forward(
    self: torch.nn.Linear, hidden: Tensor, labels: Tensor, is_scored: Tensor
) -> tuple[Tensor, ...]:
    is_shard = len(self.weight) != self.out_features or hasattr(self.weight, "placements")
    refuse("LaserLossWrapper", {"tensor parallelism of the head": is_shard})
    rows = is_scored.flatten().nonzero().squeeze(1)
    found = linear_logprob_entropy(hidden.flatten(0, -2)[rows], self.weight, labels.flatten()[rows])
    zeros = hidden.new_zeros(labels.numel(), dtype=torch.float32)
    return tuple(zeros.index_copy(0, rows, x) for x in found)


def _compute_logprobs(logits: Any, labels: Tensor, *, return_entropy: bool = False) -> Any:
    if not isinstance(logits, _Scored):
        return compute_logprobs(logits, labels, return_entropy=return_entropy)
    return (logits.logprobs, logits.entropy.detach()) if return_entropy else logits.logprobs


dapo.compute_logprobs = _compute_logprobs
