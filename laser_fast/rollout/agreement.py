"""Do the engine and the policy hold the same weights? Compare log-probs of the same tokens.

    disagreement = mean over tokens of |log p_engine - log p_policy|            (nats)

Stale or half-loaded weights are the silent failure of RL trainers: rewards still come in, ratios
still look plausible. This number is about 1e-6 in float32 and 1e-2 in bfloat16 when the sync
works, and tenths of a nat when one tensor is stale.
"""

import math
from collections.abc import Sequence

Logprobs = Sequence[Sequence[float]]  # by completion, then by token


class DisagreementError(RuntimeError):
    """The engine does not hold the policy's weights; nothing it samples may be trained on."""


def check_agreement(
    engine_logprobs: Logprobs, policy_logprobs: Logprobs, *, max_disagreement: float = math.inf
) -> float:
    """Return the disagreement, or refuse one above `max_disagreement` and name the worst token.

    It is 0 without tokens, and infinite if any log-prob is not a number.
    """
    lengths = [[len(tokens) for tokens in side] for side in (engine_logprobs, policy_logprobs)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"disagreement: expected log-probs of the same tokens, got {lengths[0]} of the engine "
            f"and {lengths[1]} of the policy"
        )
    gaps = [
        (math.inf if math.isnan(theirs - ours) else abs(theirs - ours), c, t)
        for c, tokens in enumerate(zip(engine_logprobs, policy_logprobs, strict=True))
        for t, (theirs, ours) in enumerate(zip(*tokens, strict=True))
    ]
    value = sum(gap for gap, _, _ in gaps) / max(1, len(gaps))
    if value <= max_disagreement:
        return value
    gap, c, t = max(gaps)
    raise DisagreementError(
        f"engine and policy disagree by {value:.3g} nats per token, more than "
        f"rollout.max_disagreement = {max_disagreement:g}; worst is token {t} of completion {c}: "
        f"{engine_logprobs[c][t]:.4f} in the engine, {policy_logprobs[c][t]:.4f} in the policy "
        f"({gap:.3g}); the engine's weights are stale or incomplete"
    )
