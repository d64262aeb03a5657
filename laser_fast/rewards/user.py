"""Reward "module:function": a function of the user's, called with a batch.

    def reward(completions: list[str], answers: list[str]) -> list[float]

One finite number per completion, in order; None says that this one could not be graded. Nothing
else is accepted: a list of another length would otherwise be broadcast over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from laser_fast.rewards.worker import resolve


class RewardError(RuntimeError):
    """The user's reward function is broken; the message names the function and the fault."""


def call(kind: str, completions: list[str], answers: list[str]) -> list[float | None]:
    """Call the function that `kind` names and check what it returns."""
    return check_rewards(resolve(kind)(completions, answers), len(completions), kind=kind)


def check_rewards(rewards: Any, num_completions: int, *, kind: str) -> list[float | None]:
    """Return `rewards` as plain floats, or say what is wrong with them."""
    name = f'reward function "{kind}"'
    if isinstance(rewards, (str, bytes, dict, set)) or not isinstance(rewards, Iterable):
        raise RewardError(
            f"{name}: expected a list of {num_completions} numbers, "
            f"got {type(rewards).__name__} {_short(rewards)}"
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
            f"{name}: expected a number, got {type(reward).__name__} {_short(reward)}"
        ) from None
    if not math.isfinite(number):
        raise RewardError(f"{name}: expected a finite number, got {number}")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
