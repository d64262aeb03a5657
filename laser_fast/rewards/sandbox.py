r"""Reward "sandbox": the answer in one \boxed{} that ends the text.

The gold is one digit, as the problems of `laser_fast.sandbox.task` have it.
"""

from __future__ import annotations


def reward(text: str, answer: str) -> float:
    r"""Return 1.0 if `text` has exactly one \boxed{}, at its very end, with `answer`, else 0.0."""
    has_one_box = text.count(r"\boxed{") == 1
    return float(has_one_box and text.endswith(rf"\boxed{{{answer}}}"))
