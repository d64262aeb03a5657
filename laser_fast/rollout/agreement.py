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
    """Mean |engine - policy| over all tokens; 0 without tokens, infinite if any is not a number."""
    gaps = _gaps(engine_logprobs, policy_logprobs)
    return sum(gap for gap, _, _ in gaps) / max(1, len(gaps))


def check_agreement(
    engine_logprobs: Logprobs, policy_logprobs: Logprobs, *, max_disagreement: float
) -> float:
    """Return the disagreement, or refuse one above `max_disagreement` and name the worst token."""
    value = disagreement(engine_logprobs, policy_logprobs)
    if value <= max_disagreement:
        return value
    gap, c, t = max(_gaps(engine_logprobs, policy_logprobs))
    raise DisagreementError(
        f"engine and policy disagree by {value:.3g} nats per token, more than "
        f"rollout.max_disagreement = {max_disagreement:g}; worst is token {t} of completion {c}: "
        f"{engine_logprobs[c][t]:.4f} in the engine, {policy_logprobs[c][t]:.4f} in the policy "
        f"({gap:.3g}); the engine's weights are stale or incomplete"
    )


def _gaps(engine_logprobs: Logprobs, policy_logprobs: Logprobs) -> list[tuple[float, int, int]]:
    """|engine - policy| of every token with its completion and its position."""
    lengths = [[len(tokens) for tokens in side] for side in (engine_logprobs, policy_logprobs)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"disagreement: expected log-probs of the same tokens, got {lengths[0]} of the engine "
            f"and {lengths[1]} of the policy"
        )
    return [
        (math.inf if math.isnan(ours - theirs) else abs(ours - theirs), c, t)
        for c, tokens in enumerate(zip(engine_logprobs, policy_logprobs, strict=True))
        for t, (ours, theirs) in enumerate(zip(*tokens, strict=True))
    ]
