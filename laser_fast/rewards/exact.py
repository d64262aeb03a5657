r"""Reward "exact": the answer, letter by letter."""

from __future__ import annotations

from laser_fast.rewards.boxed import extract_boxed


def reward(text: str, answer: str) -> float:
    r"""Return 1.0 if the completion's answer equals `answer`, both stripped, else 0.0.

    The completion's answer is its last \boxed{}, or the whole text if it has no box.
    """
    boxed = extract_boxed(text)
    return float((text if boxed is None else boxed).strip() == answer.strip())
