"""Fused LM-head kernels: log-probabilities, the last-token score and their gradients.

Hidden states [N, D] and the head weight [V, D] go in; log-probabilities, entropies, scores, losses
and gradients come out; the [N, V] logits never exist in memory. Depends on torch and triton only.
"""

from . import reference
from ._dispatch import last_impl
from .last_token import last_token_loss, last_token_score
from .linear_logprob import linear_logprob, linear_logprob_entropy
from .linear_logprob_loss import linear_logprob_loss

__all__ = [
    "last_impl",
    "last_token_loss",
    "last_token_score",
    "linear_logprob",
    "linear_logprob_entropy",
    "linear_logprob_loss",
    "reference",
]
