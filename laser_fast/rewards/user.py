"""Rewards "module:function": functions of the user's, called with a batch.

    def reward(completions: list[str], answers: list[str]) -> list[float]
    def reward(prompts, completions, answer, **kwargs) -> list[float]     # as TRL calls it
    async def reward(completions, level) -> list[float]                   # level: of the data

It gets what its parameters ask for by name: prompts, completions, their completion_ids, answers, or
answer, which is the same list, and any field of the data; `**kwargs` gets them all but the fields.
It may be async, as a judge behind a network is. It returns one finite number per completion, in
order; None says that this one could not be graded. Nothing else is accepted: a list of another
length would otherwise be broadcast over the batch.
"""

import asyncio
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from laser_fast.config_errors import RunError
from laser_fast.rewards.pool import resolve

_OFFERED = ("prompts", "completions", "answers", "answer", "completion_ids")
_runner = cache(asyncio.Runner)  # one event loop for all calls: a module's client stays with it


class RewardError(RunError):
    """The user's reward function is broken; the message names the function and the fault."""


def check_signature(kind: str) -> str | tuple[str, ...]:
    """The fields of the data that the function asks for; or what is wrong with its parameters."""
    asked, takes_all = _parameters(kind)
    fields = [p.name for p in asked if p.name not in _OFFERED and p.default is p.empty]
    by_place = [p.name for p in asked if p.kind is p.POSITIONAL_ONLY]
    if not by_place and (takes_all or any(p.name == "completions" for p in asked)):
        return tuple(fields)
    names = ", ".join(fields or by_place or [p.name for p in asked]) or "nothing"
    return (
        f"it asks for {names}; a reward function gets completions, and what else it asks for by "
        f"name among {', '.join(_OFFERED)} and the fields of the data"
    )


def call(
    kind: str,
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[str] | None,
    fields: Sequence[str] | None,
    ids: Sequence[Sequence[int]] | None,
) -> list[float | None]:
    """Call the function that `kind` names with the completions and answers of `pairs`.

    `fields` are those of the data, a JSON object for each completion; `ids` are the completions'.
    """
    completions, answers = map(list, zip(*pairs, strict=True))
    asked, takes_all = _parameters(kind)
    rows = [json.loads(row) for row in fields or ()]
    # Other functions may ask for further fields.
    own = {p.name for p in asked if p.default is p.empty} & {*(rows or [{}])[0]}
    offered: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in own}
    offered |= {"completions": completions, "answers": answers, "answer": answers}
    if prompts is not None:
        offered["prompts"] = list(prompts)
    if ids is not None:
        offered["completion_ids"] = [list(own_ids) for own_ids in ids]
    if missing := [p.name for p in asked if p.default is p.empty and p.name not in offered]:
        raise RewardError(
            f'reward function "{kind}" asks for {", ".join(missing)}, but here are only '
            f"{', '.join(offered)}; train and eval give it completion_ids and fields of the data"
        )
    names = offered if takes_all else {p.name for p in asked} & offered.keys()
    rewards = resolve(kind)(**{name: offered[name] for name in names})
    if inspect.iscoroutine(rewards):
        rewards = _runner().run(rewards)
    return check_rewards(rewards, len(pairs), kind=kind)


def _parameters(kind: str) -> tuple[list[inspect.Parameter], bool]:
    """The parameters of a function, and whether it takes any others by name."""
    try:
        found = list(inspect.signature(resolve(kind)).parameters.values())
    except ValueError:  # a builtin, which does not say
        found = []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
    return [p for p in found if p.kind not in several], takes_all


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
