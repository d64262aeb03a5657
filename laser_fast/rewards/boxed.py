r"""The final answer of a completion: the content of its last \boxed{}."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{}, stripped, or None without one.

    Braces are balanced, escaped ones (`\{`) do not count. The last box decides: if it never
    closes (a truncated completion) the answer is None, not the box before it.

    Example: `extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    start = None
    for match in _BOXED.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # the escaped character is not a brace of ours
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None
