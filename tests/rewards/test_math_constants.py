"""Constants that differ by little, alone and inside of intervals, sets and tuples."""

import pytest
from answer_cases import answer_cases

from laser_fast.rewards import math

# Gold, right answers, wrong answers.
ANSWERS = [
    ("0", [], [r"\frac{1}{1000!}", "e^{-100}"]),
    (r"\frac{1}{1000!}", [], ["0"]),
    ("1-10^{-21}", [], ["1-10^{-20}"]),
    (r"\sqrt{2}", [], [r"\sqrt{2}+10^{-20}"]),
    (r"\pi \cdot 10^{-71}", [], [r"\pi \cdot 10^{-70}"]),
    ("10^{-71}x", [], ["10^{-70}x"]),
    (r"\{10^{-71}, 1\}", [], [r"\{10^{-70}, 1\}"]),
    ("(0, 10^{-71})", [], ["(0, 10^{-70})"]),
    (r"(0,\frac{1}{2006!})", [r"(0, \frac{1}{2006!})"], [r"(0,\frac{1}{2004!})"]),
    (r"[0,\frac{1}{2006!}]", [], [r"[0,\frac{1}{2004!}]"]),
    (r"(1,2,\frac{1}{2006!})", [], [r"(1,2,\frac{1}{2004!})"]),
    (r"\{0,\frac{1}{2006!}\}", [r"\{\frac{1}{2006!},0\}"], [r"\{0,\frac{1}{2004!}\}"]),
    (r"[0,\frac{1}{2006!}]\cup[1,2]", [], [r"[0,\frac{1}{2004!}]\cup[1,2]"]),
    (r"\frac{x}{2006!}", [], [r"\frac{x}{2004!}"]),
]


@pytest.mark.parametrize(("text", "gold", "expected"), answer_cases(ANSWERS))
def test_answer(text, gold, expected):
    assert math.reward(rf"\boxed{{{text}}}", gold) == expected
