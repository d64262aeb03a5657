"""Reward "module:function": a function of the user's, called with a batch.

    def reward(completions: list[str], answers: list[str]) -> list[float]

One finite number per completion, in order; None says that this one could not be graded. Nothing
else is accepted: a list of another length would otherwise be broadcast over the batch.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from laser_fast.rewards.pool import resolve


class RewardError(RuntimeError):
    """The user's reward function is broken; the message names the function and the fault."""


def call(kind: str, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """Call the function that `kind` names with the completions and answers of `pairs`."""
    completions, answers = map(list, zip(*pairs, strict=True))
    return check_rewards(resolve(kind)(completions, answers), len(pairs), kind=kind)


def check_rewards(rewards: Any, num_completions: int, *, kind: str) -> list[float | None]:
    """Return `rewards` as plain floats, or say what is wrong with them."""
    name = f'reward function "{kind}"'
    if isinstance(rewards, (str, bytes, dict, set)) or not isinstance(rewards, Iterable):
        raise RewardError(
            f"{name}: expected a list of {num_completions} numbers, "
            f"got {type(rewards).__name__} {rewards!r:.80}"
        )
    rewards = list(rewards)
    if len(rewards) != num_completions:
        raise RewardError(
            f"{name}: got {len(rewards)} rewards for {num_completions} completions; "
            "return one number per completion"
        )
    return [_number(reward, f"{name}: reward {i}") for i, reward in enumerate(rewards)]


def _number(reward: Any, name: str) -> float | None:
    if reward is None:
        return None
    try:
        # float("1") would pass, but text is not a reward; __float__ admits numpy and torch scalars.
        number = reward.__float__()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise RewardError(
            f"{name}: expected a number, got {type(reward).__name__} {reward!r:.80}"
        ) from None
    if not math.isfinite(number):
        raise RewardError(f"{name}: expected a finite number, got {number}")
    return number
