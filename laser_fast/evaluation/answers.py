r"""The answer of a text, by reward kind, and a look at gold answers before they are trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rewards.gsm8k import last_number

# Readable by every grader and nobody's answer.
_NOBODY = "-7919.25"


class _Grader(Protocol):
    def grade(self, texts: list[str], answers: list[str]) -> list[float | None]:
        """Rewards of texts against golds."""


def answer_of(kind: str) -> Callable[[str], str | None]:
    r"""The function from a completion to the answer that votes, as the reward `kind` reads it.

    Mostly the content of the last \boxed{}. "gsm8k" votes with the number as an exact fraction,
    "exact" with the whole text where there is no box.
    """
    return {"gsm8k": _number, "exact": _box_or_text}.get(kind, _box)


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldCheck:
    """Golds, as indices, with which something is wrong.

    `rejected` ones are not even equal to themselves: no answer can be right. `unreadable` ones
    match only the very same text: any other right answer fails to be graded and is dropped.
    """

    rejected: tuple[int, ...]
    unreadable: tuple[int, ...]


def check_golds(golds: Sequence[str], *, kind: str, grader: _Grader) -> GoldCheck:
    r"""Grade every gold, in a \boxed{}, against itself, and a wrong answer against every gold."""
    extract = answer_of(kind)
    boxed = [rf"\boxed{{{extract(gold) or gold.strip()}}}" for gold in golds]
    own = grader.grade(boxed, list(golds))
    wrong = grader.grade([rf"\boxed{{{_NOBODY}}}"] * len(golds), list(golds))
    return GoldCheck(
        rejected=tuple(i for i, reward in enumerate(own) if reward is None or reward <= 0.5),
        unreadable=tuple(i for i, reward in enumerate(wrong) if reward is None),
    )


def _box(text: str) -> str | None:
    return extract_boxed(text) or None


def _box_or_text(text: str) -> str | None:
    boxed = extract_boxed(text)
    return (text.strip() if boxed is None else boxed) or None


def _number(text: str) -> str | None:
    boxed = extract_boxed(text)
    number = last_number(text.rpartition("####")[2] if boxed is None else boxed)
    return None if number is None else str(number)
