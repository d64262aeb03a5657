r"""Word problems made from templates, in the style of GSM8K, with worked responses.

    Ann has 17 pens. She buys 25 more and then gives 13 away. How many pens does she have now?
    17 + 25 = 42. 42 - 13 = 29. \boxed{29}

Each takes two or three operations of arithmetic, so that a small model which knows the way still
slips. About a tenth of all problems, chosen by a hash of their text, is held out: the split "eval"
draws only from it, everything else never.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import blake2b

NAMES = "Ann Ben Clara David Emma Felix Grace Henry Irene Jack".split()
THINGS = "apples books coins marbles pens stamps stickers shells".split()
# Share of the responses that give only the answer: one source of errors that a score can see.
ANSWER_ONLY = 0.25

Step = tuple[int, str, int]  # left operand, operation, right operand
Problem = tuple[str, list[Step]]


def problems(key: str, *, held_out: bool) -> Iterator[Problem]:
    """Yield problems of one class without end, each with the steps of its solution."""
    rng = random.Random(f"word problems/{key}")
    while True:
        question, steps = rng.choice(_KINDS)(rng, *rng.sample(NAMES, 2), rng.choice(THINGS))
        if is_held_out(question) == held_out:
            yield question, steps


def is_held_out(question: str) -> bool:
    """Whether the problem belongs to the tenth that only evaluation may see."""
    return blake2b(question.encode(), digest_size=8).digest()[0] < 26


def rows(split: str, count: int) -> list[dict[str, str]]:
    """Distinct problems of a split with the fields "problem" and "answer"."""
    distinct: dict[str, str] = {}
    for question, steps in problems(split, held_out=split == "eval"):
        if len(distinct) == count:
            break
        distinct[question] = work(steps)[1]
    return [{"problem": problem, "answer": answer} for problem, answer in distinct.items()]


def responses(count: int) -> Iterator[dict[str, str]]:
    """Yield rows of a supervised phase, which never holds a held-out problem."""
    rng = random.Random("word problems/responses")
    for (question, steps), _ in zip(problems("sft", held_out=False), range(count), strict=False):
        text, answer = work(steps)
        shown = "" if rng.random() < ANSWER_ONLY else f"{text} "
        yield {"problem": question, "response": f"{shown}\\boxed{{{answer}}}"}


def work(steps: list[Step]) -> tuple[str, str]:
    """The written steps and the answer: `work([(2, "+", 3)])` is `("2 + 3 = 5.", "5")`."""
    results = [_apply(*step) for step in steps]
    text = " ".join(f"{a} {o} {b} = {c}." for (a, o, b), c in zip(steps, results, strict=True))
    return text, str(results[-1])


def _apply(left: int, operation: str, right: int) -> int:
    if operation == "/":
        assert left % right == 0
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def _buy_and_give(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    a, b = rng.randint(12, 60), rng.randint(12, 60)
    c = rng.randint(5, a + b - 5)
    return (
        f"{name} has {a} {thing} and buys {b} more. Then {name} gives {c} of them to {other}. "
        f"How many {thing} does {name} have left?",
        [(a, "+", b), (a + b, "-", c)],
    )


def _boxes_and_more(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    a, b, c = rng.randint(3, 9), rng.randint(4, 12), rng.randint(5, 40)
    return (
        f"{name} has {a} boxes with {b} {thing} in each, and {other} brings {c} more {thing}. "
        f"How many {thing} do they have together?",
        [(a, "*", b), (a * b, "+", c)],
    )


def _boxes_and_less(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    a, b = rng.randint(3, 9), rng.randint(4, 12)
    c = rng.randint(3, a * b - 2)
    return (
        f"{name} fills {a} boxes with {b} {thing} each and gives {c} {thing} to {other}. "
        f"How many {thing} does {name} keep?",
        [(a, "*", b), (a * b, "-", c)],
    )


def _two_prices(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    return (
        f"{name} buys {a} {thing} for {b} dollars each and {c} cards for {d} dollars each. "
        "How many dollars is that in total?",
        [(a, "*", b), (c, "*", d), (a * b, "+", c * d)],
    )


def _times_as_many(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    a, b, c = rng.randint(4, 20), rng.randint(3, 15), rng.randint(2, 5)
    return (
        f"{name} has {a} {thing} and finds {b} more. {other} has {c} times as many {thing} as "
        f"{name} has now. How many {thing} do they have together?",
        [(a, "+", b), (a + b, "*", c), (a + b, "+", (a + b) * c)],
    )


def _shared_out(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    bags, each = rng.randint(3, 9), rng.randint(4, 12)
    total = bags * each
    a = rng.randint(2, total - 2)
    return (
        f"{name} has {a} {thing} and {other} has {total - a} {thing}. They put all of them into "
        f"{bags} bags, equally many in each. How many {thing} are in one bag?",
        [(a, "+", total - a), (total, "/", bags)],
    )


_KINDS = (
    _buy_and_give, _boxes_and_more, _boxes_and_less, _two_prices, _times_as_many, _shared_out,
)  # fmt: skip
