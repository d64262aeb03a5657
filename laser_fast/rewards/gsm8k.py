r"""Reward "gsm8k": equal numbers.

The gold is the number after the last `####`, as the data set writes it, or a bare number. The
completion's number is that of its last \boxed{}, then of the line after its last `####`, then the
last one anywhere. Currency, thousands separators and units do not matter; values are compared
exactly, so 0.5 equals 1/2.

A number is read whole or not at all: 2^5, 5!, 3 + 4, 1,2 or 3:00 are no numbers, and a box or a
`####` line holds one number, or says which it is by "=". Deliberately not decided: words behind a
number are units, also dozen and million, since that is how the data counts; two values of unlike
units (2 hours 30 minutes) are no number.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rewards.notation import (
    NUMBER,
    inline_fractions,
    join_thousands,
    plain_latex,
    value_of,
)

_OPAQUE = "\0"  # stands for mathematics that is no number
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\*\*(?=\d)", "^"),
        (r"\b(?:USD|EUR|GBP|INR|Rs\.?) ?(?=\d)", ""),
        (r"[*_]{2,}|`|\\?\$|[\xa2-\xa5\u20ac\u20b9]|\\(?:pounds|euro)(?![a-z])", ""),
        (r"(?<=[\w}])\s*\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\?[%#&]", " "),
        (r"(\\text\{[^{}]*[a-zA-Z][^{}]*\}|[a-zA-Z])\s*[\^_]\s*(?:\{[^{}]*\}|-?\w)", r"\1"),
        (r"\\text\{([^{}]*)\}", r" \1 "),
        (r"\\(?:times|cdot|ast|div)(?![a-zA-Z])", " * "),
        (r"\\(?:begin|end)\{[^{}]*\}|\\\\", "\n"),
        (r"\\(?:[Rr]ightarrow|[lL]ongrightarrow|implies|iff|to|therefore|approx|sim(?:eq)?|equiv"
         r"|[gl]e|in)(?![a-zA-Z])", " = "),
        (r"\\(?:l?dots|boxed)(?![a-zA-Z])", " "),
        (r"\\[a-zA-Z]+\s*(?:\[[^\]]*\])?(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})*", _OPAQUE),
        (r"[{}]", ""),
    )
]  # fmt: skip
_START = re.compile(r"(?<!\d')(?<!\d:)(?<![A-Za-z\d.,])\.?\d")
_CLUSTER = re.compile(r"[\d.,:]*\d")
_REMARK = re.compile(r"\([^()\d]*[a-zA-Z][^()]*\)[ .]*$")
# What makes a number behind or in front of it a part of something else.
_GOES_ON = re.compile(
    r"[.,:]\d| *(?:[\^_\0]|[*+/] *[\d(\\\0]|- ?[\d(]|- *\0|[xyznkKM](?!\w)|\(\d"
    r"|[-+*/] *[bcxyzn](?!\w)|[<>] *[a-z](?![\w>]))|'\d|[abei](?!\w|\.m)|[-+*/][ai](?!\w)"
)
_WENT_ON = re.compile(
    r"(?:[\^_/\0]|\d *[xX]|\d *\*|[\w)\0] *\+|[\d)\0] +-) *$|[\w)\0](?:\*| \* +)$"
    r"|(?<!\w)[bcnxyz] *- *$|(?:-|\0|(?<![a-zA-Z])[a-zA-Z])[(|] *$|\b(?:minus|negative) *$"
    r"|(?<![\w<>/])[a-z] *[<>] *$"
)
_SIGN = re.compile(r"([-+])( ?)$")


def reward(text: str, answer: str) -> float:
    """Return 1.0 if the completion's number equals the gold's, else 0.0.

    A gold without a number is a ValueError; the grade is then unknown, not 0.
    """
    gold = final_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer {answer[-80:]!r} holds no number")
    return float(final_number(text) == gold)


def final_number(text: str) -> Fraction | None:
    """Return the number that a text ends with, exactly, or None."""
    boxed = extract_boxed(text)
    _, mark, tail = text.rstrip("# \n").rpartition("####")
    if boxed is None and r"\boxed{" in text:
        return None  # it never closes, so nobody knows how it would go on
    if boxed is None and not mark:
        return [None, *_numbers(_readable(text))][-1]
    final = tail.strip().partition("\n")[0] if boxed is None else boxed
    final = _readable(_REMARK.sub("", final))
    parts = [part for part in re.split("=|<<|>>", final) if re.search(r"\d", part)]
    found = list(_numbers(parts[-1])) if parts else []
    return found[0] if len(found) == 1 and not re.search(r"\d!", parts[-1]) else None


def _readable(text: str) -> str:
    """A text without LaTeX, in which numbers stand as digits."""
    text = inline_fractions(join_thousands(plain_latex(text)))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _numbers(text: str) -> Iterator[Fraction | None]:
    """Every number in turn, None for one that is only a part of something."""
    position = 0
    while start := _START.search(text, position):
        cluster = _CLUSTER.match(text, start.start())
        number = NUMBER.match(text, start.start())
        assert cluster is not None and number is not None
        position = max(number.end(), cluster.end())
        # A bounded window: with the whole prefix, 50 kB of prose took half a minute.
        before, is_negative = _without_sign(text[max(0, start.start() - 64) : start.start()])
        is_part = _GOES_ON.match(text, number.end()) or _WENT_ON.search(before)
        value = None if is_part else value_of(number)
        yield -value if value is not None and is_negative else value


def _without_sign(before: str) -> tuple[str, bool]:
    """What stands in front of a number, without its sign, and whether that is a minus.

    In "12-15" and "5 - 3" it is none, nor after a word and a space ("so - 44") or in a list.
    """
    sign = _SIGN.search(before)
    head = before[: sign.start()] if sign else before
    last = head.rstrip(" ")[-1:]
    if sign is None or (last == "\n" and sign[2]):
        return head, False
    is_sign = last in ("", *"=([:,<>\n") or (
        not sign[2] and head.endswith(" ") and last not in (*"0123456789)", _OPAQUE)
    )
    return (head, sign[1] == "-") if is_sign else (before, False)
