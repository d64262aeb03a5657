r"""The final answer of a completion: the content of its last \boxed{}."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or an escaped character, which is no brace


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{}, stripped, or None without one.

    Braces are balanced, escaped ones (`\{`) do not count. The last box decides: if it never
    closes (a truncated completion) the answer is None, not the box before it.

    Example: `extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return None
