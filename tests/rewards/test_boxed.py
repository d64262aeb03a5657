import pytest

from laser_fast.rewards.boxed import extract_boxed, passes_gate


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} units", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{8}}", "8"),
        # Escaped braces are not braces: this box closes only at the last one.
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed{1} and then \boxed{\frac{2}{3", None),
        (r"\boxed 5", None),
        (r"\boxed{ends in a backslash\ "[:-1], None),
    ],
)
def test_extract_boxed(text, content):
    assert extract_boxed(text) == content


TAGS = "Think, then write <answer> </answer>."


@pytest.mark.parametrize(
    ("text", "prompt", "passes"),
    [
        (r"\boxed{1}", "", True),
        ("1", "", False),
        (r"\boxed{1} \boxed{1}", "", False),
        (r"x </think> <answer> \boxed{1} </answer>", TAGS, True),
        (r"x </think> <answer> \boxed{1} </answer>" + "\n", TAGS, True),
        (r"x </think> <answer> \boxed{1} </answer> done", TAGS, False),
        (r"x </think> <answer> 1 </answer>", TAGS, False),
        (r"x \boxed{1} </think> <answer> 1 </answer>", TAGS, False),
        (r"x <answer> \boxed{1} </answer> </think>", TAGS, False),
        (r"x </think> </think> <answer> \boxed{1} </answer>", TAGS, False),
        (r"x <answer> \boxed{1} </answer>", TAGS, False),
        (r"\boxed{1}", TAGS, False),
    ],
)
def test_format_gate(text, prompt, passes):
    assert passes_gate(text, prompt) is passes
