r"""Reward "gsm8k": equal numbers.

The gold is the number after the last `####`, as the data set writes it, or a bare number. The
completion's number is looked for in its last \boxed{}, then after its last `####`, then anywhere,
the last one winning. `$`, thousands separators, a trailing dot and units do not matter;
`\frac{a}{b}` and `a/b` are fractions. Values are compared exactly, so 0.5 equals 1/2.
"""

import re
from fractions import Fraction

from laser_fast.rewards.boxed import extract_boxed

_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
# LaTeX thousands separators: 1{,}000, 1\,000, 1,\!000.
_SEPARATOR = re.compile(r"\{,\}|\\[,!]")
# A minus directly after a digit, letter or bracket subtracts ("12-15"); elsewhere it is a sign,
# also in front of a currency mark ("-$3").
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])-\s?)?(?:\\?\$\s?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:\s*/\s*(?P<denominator>[0-9]+))?"
)


def reward(text: str, answer: str) -> float:
    """Return 1.0 if the completion's number equals the gold's, else 0.0.

    A gold without a number is a ValueError; the grade is then unknown, not 0.
    """
    gold = last_number(answer.rpartition("####")[2])
    if gold is None:
        raise ValueError(f"the gold answer {answer[-80:]!r} holds no number")
    boxed = extract_boxed(text)
    final = text.rpartition("####")[2] if boxed is None else boxed
    return float(last_number(final) == gold)


def last_number(text: str) -> Fraction | None:
    """Return the last number in `text`, exactly, or None."""
    text = _FRACTION.sub(r" \1/\2 ", _SEPARATOR.sub(lambda m: "," if "," in m[0] else "", text))
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    try:
        value = Fraction(match["digits"].replace(",", "")) / int(match["denominator"] or 1)
    except (ValueError, ZeroDivisionError):
        # More digits than Python converts, or a division by zero: not a number we can compare.
        return None
    return -value if match["sign"] else value
