r"""Answers in other forms: equations turned round, degrees, i, products, and small and big letters.

math-verify lowers every letter, adds 2(3), takes degrees for radians and i for any letter.
"""

import pytest
from answer_cases import answer_cases

from laser_fast.rewards import math

ANSWERS = [
    (r"\pi r^2", [r"r^2\pi"], [r"\pi R^2"]),
    ("R-r", ["-r+R"], ["r-R", "0"]),
    (r"\frac{M}{m+M}", [r"\frac{M}{M+m}"], [r"\frac{m}{m+M}", r"\frac{1}{2}"]),
    ("x_1+X_1", ["X_1+x_1"], ["2x_1"]),
    ("E=mc^2", ["E = c^2m"], ["E=mc^3"]),
    (r"\text{East}", ["east"], ["west"]),
    ("5", [], ["2(3)", "(2)(3)"]),
    ("6", ["2(3)", "(2)(3)"], []),
    ("1", [r"2(\frac{1}{2})"], []),
    ("3", [r"\log_2 8", r"\log_2(8)"], [r"\log_2 9", "8", "2 8"]),
    (r"30^\circ", [r"\theta = 30^\circ", r"\sin^{-1}(0.5) = 30^\circ"], []),
    (r"\frac14", [r"\sin^2(30^\circ)", r"\sin^{2}30^\circ"], []),
    (
        r"\frac12",
        [r"\sin 30^\circ", r"\sin{30^\circ}", r"\sin\left(30^\circ\right)", r"\cos 60^{\circ}"],
        [r"\sin 30", r"\sin 31^\circ"],
    ),
    (r"10\sin 40^\circ", [r"10\cos 50^\circ"], [r"10\sin 50^\circ"]),
    (r"2-\sqrt3", [r"\tan 15^\circ"], [r"\tan 16^\circ"]),
    (r"\frac{1+i}{2}", [r"\frac{1}{1-i}"], [r"\frac{1-i}{2}", r"\frac{1}{2}"]),
    (r"e^{i\pi/3}", [r"\frac12+\frac{\sqrt3}{2}i"], [r"\frac12-\frac{\sqrt3}{2}i"]),
    ("2i", ["(1+i)^2", r"\sqrt{-4}"], ["-2i", "2"]),
    (r"1 \pm i", ["1+i, 1-i"], ["1+2i, 1-2i"]),
    (r"\sum_{i=1}^{3} i", ["6"], ["7"]),
    (
        "y=2x+3",
        ["y-2x=3", "2y = 4x+6", "2x-y+3=0", "0=2x+3-y", "2x+3", "2x+3=y"],
        ["y+2x=3", "(y-2x-3)(x^2+1)=0", "2y=4x+3", "2x-y-3=0", "x=2y+3"],
    ),
    ("y-3=2x", ["y=2x+3"], ["y=2x-3"]),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", ["9x^2+4y^2=36"], ["4x^2+9y^2=36"]),
    ("x=5", ["5=x", "5"], ["5=y", "2x=10", "x=-5"]),
    ("42", [r"\text{approximately } 42", r"\text{about }42"], [r"\text{not about }42"]),
]


@pytest.mark.parametrize(("text", "gold", "expected"), answer_cases(ANSWERS))
def test_another_form_is_the_same_value(text, gold, expected):
    assert math.reward(rf"\boxed{{{text}}}", gold) == expected
