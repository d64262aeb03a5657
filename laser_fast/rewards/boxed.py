r"""What a completion's text says: its boxed answer, its format, and the rewards of plain text."""

import re

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or an escaped character, which is no brace
_TAGS = ("</think>", "<answer>", "</answer>")


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


def exact(text: str, answer: str) -> float:
    r"""Reward "exact": 1.0 if the completion's answer equals `answer`, both stripped, else 0.0.

    The completion's answer is its last \boxed{}, or the whole text if it has no box.
    """
    boxed = extract_boxed(text)
    return float((text if boxed is None else boxed).strip() == answer.strip())


def sandbox(text: str, answer: str) -> float:
    r"""Reward "sandbox": 1.0 if one \boxed{} with `answer`, a number, ends the text, else 0.0."""
    has_one_box = text.count(r"\boxed{") == 1
    return float(has_one_box and text.endswith(rf"\boxed{{{answer}}}"))


def passes_gate(text: str, prompt: str = "") -> bool:
    r"""Whether a completion passes the format gate of the released LaSeR code.

    As in its `reward_score/__init__.py`: if the prompt asks for `<answer>` and `</answer>`, the
    completion needs `</think>`, `<answer>` and `</answer>`, once each and in this order, a boxed
    answer between the last two and nothing after them. Otherwise it needs exactly one `\boxed{`.
    """
    if not ("<answer>" in prompt and "</answer>" in prompt):
        return text.count(r"\boxed{") == 1
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think, start, end = (text.index(tag) for tag in _TAGS)
    has_box = r"\boxed{" in text[start:end]
    return think < start < end and has_box and text.rstrip().endswith("</answer>")
