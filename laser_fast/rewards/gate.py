r"""The format gate of the released LaSeR code (its `reward_score/__init__.py`).

A completion in the wrong format earns 0 before anyone looks at its answer. If the prompt asks
for `<answer>` and `</answer>`, the completion needs `</think>`, `<answer>` and `</answer>`, once
each and in this order, a boxed answer between the last two and nothing after them. Otherwise it
needs exactly one `\boxed{`.
"""

from __future__ import annotations

_TAGS = ("</think>", "<answer>", "</answer>")


def passes_gate(text: str, prompt: str = "") -> bool:
    """Whether the completion `text` has the format that `prompt` asks for."""
    if not ("<answer>" in prompt and "</answer>" in prompt):
        return text.count(r"\boxed{") == 1
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think, start, end = (text.index(tag) for tag in _TAGS)
    return (
        think < start < end
        and r"\boxed{" in text[start:end]
        and text.rstrip().endswith("</answer>")
    )
