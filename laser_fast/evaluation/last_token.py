"""Log-probs of reserved tokens after the last token of given sequences, in packed forwards.

    log pi(z | ids) = h . w_z - logsumexp(W h),   h the hidden state of the last id

One fused-head row per sequence gives the first token, and the others by their logit differences:
log pi(z) = log pi(z_0) + h . (w_z - w_{z_0}). So a scan of all reserved tokens costs one forward,
and [tokens, vocabulary] logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laser_fast.records import Sequence as TrainingSequence
from laser_fast.training.packing import Packer
from laser_fast.training.policy import Policy
from laser_kernels import linear_logprob


@torch.no_grad()
def read_last_token(
    policy: Policy,
    sequences: Sequence[tuple[int, ...]],
    packer: Packer,
    token_ids: Sequence[int],
    *,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Log-probs of each of C tokens after each of N sequences.

    Args:
        policy: the model.
        sequences: ids, prompt, completion and its EOS; none empty or above the packer's budget.
        packer: its budget bounds one forward; its own score token is not read.
        token_ids: the C tokens.
        on_progress: told the number of sequences of every finished forward.

    Returns:
        [N, C] float32 on the CPU. Collective: every rank calls it, with any number of sequences.
    """
    held = [_last_row(ids) for ids in sequences]
    result = torch.empty(len(held), len(token_ids))

    def head(hidden_states: Tensor, weight: Tensor) -> Tensor:
        labels = torch.full((len(hidden_states),), token_ids[0], device=hidden_states.device)
        first = linear_logprob(hidden_states, weight, labels)
        rows = weight[list(token_ids)].float()
        logits = hidden_states.float() @ rows.T
        return first[:, None] + logits - logits[:, :1]

    for members in packer.bins(held):
        batch = packer.pack([held[index] for index in members])
        result[members] = policy(batch, head).cpu()
        on_progress(len(members))
    # Without a backward nothing else would give the root's gathered parameters back.
    policy.reshard()
    return result


def _last_row(ids: tuple[int, ...]) -> TrainingSequence:
    """A sequence whose last id is the only row that reaches the head."""
    return TrainingSequence(
        prompt_ids=ids,
        completion_ids=(),
        rollout_logprobs=(),
        has_score_row=True,
        advantage=0.0,
        token_weight=0.0,
        reward=0.0,
        score_weight=0.0,
    )
