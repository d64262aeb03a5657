"""Do the engine and the policy hold the same weights? Compare log-probs of the same tokens.

    disagreement = mean over tokens of |log p_engine - log p_policy|            (nats)

Stale or half-loaded weights are the silent failure of RL trainers: rewards still come in, ratios
still look plausible. This number is about 1e-6 in float32 and 1e-2 in bfloat16 when the sync
works, and tenths of a nat when one tensor is stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Logprobs = Sequence[Sequence[float]]  # by completion, then by token


class DisagreementError(RuntimeError):
    """The engine does not hold the policy's weights; nothing it samples may be trained on."""


def disagreement(engine_logprobs: Logprobs, policy_logprobs: Logprobs) -> float:
    """Mean |engine - policy| over all tokens; 0 without tokens, infinite if any is not a number.

    Raises:
        ValueError: the two do not hold the same number of tokens.
    """
    engine_lengths = [len(tokens) for tokens in engine_logprobs]
    policy_lengths = [len(tokens) for tokens in policy_logprobs]
    if engine_lengths != policy_lengths:
        raise ValueError(
            f"disagreement: expected log-probs of the same tokens, got {engine_lengths} of the "
            f"engine and {policy_lengths} of the policy"
        )
    differences = [
        abs(ours - theirs)
        for engine, policy in zip(engine_logprobs, policy_logprobs, strict=True)
        for ours, theirs in zip(engine, policy, strict=True)
    ]
    if not differences:
        return 0.0
    mean = sum(differences) / len(differences)
    return math.inf if math.isnan(mean) else mean


def check_agreement(
    engine_logprobs: Logprobs, policy_logprobs: Logprobs, *, max_disagreement: float
) -> float:
    """Return the disagreement, or refuse one above `max_disagreement`.

    Raises:
        DisagreementError: with the mean, the worst token and what to look at.
    """
    value = disagreement(engine_logprobs, policy_logprobs)
    if value <= max_disagreement:
        return value
    gap, c, t = max(
        (math.inf if math.isnan(ours - theirs) else abs(ours - theirs), c, t)
        for c, (engine, policy) in enumerate(zip(engine_logprobs, policy_logprobs, strict=True))
        for t, (ours, theirs) in enumerate(zip(engine, policy, strict=True))
    )
    raise DisagreementError(
        f"engine and policy disagree by {value:.3g} nats per token, more than "
        f"rollout.max_disagreement = {max_disagreement:g}; worst is token {t} of completion {c}: "
        f"{engine_logprobs[c][t]:.4f} in the engine, {policy_logprobs[c][t]:.4f} in the policy "
        f"({gap:.3g}); the engine's weights are stale or incomplete"
    )
