r"""Reward "math": math-verify on the content of the last \boxed{}.

Who is to blame decides between 0 and None. No box, an empty box or a box that math-verify cannot
parse is the model's mistake: 0. A gold that cannot be parsed, a comparison that raises, and (from
the pool) a deadline or a crash say nothing about the answer: the exception leaves this file, and
the grade becomes None. So math-verify's habit of returning False for an exception is off; its
time limits are too: they are SIGALRM, which works in no thread and interrupts no C code.
"""

import logging
from functools import lru_cache
from itertools import product
from typing import Any

from laser_fast import needs_train

with needs_train():
    from math_verify import parse, verify

from laser_fast.rewards.boxed import extract_boxed

# Its one warning asks for the deadline that our workers have.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def reward(text: str, answer: str) -> float:
    r"""Return 1.0 if the last \boxed{} of the completion equals the gold `answer`, else 0.0.

    The gold may be LaTeX, a number, several values, or a solution that ends in a \boxed{}. One that
    math-verify cannot read is a ValueError, or what math-verify itself raises.
    """
    guess = extract_boxed(text)
    if not guess:
        return 0.0
    gold = extract_boxed(answer) or answer.strip()
    if guess == gold:
        return 1.0
    gold_values = _parse(gold)
    if not gold_values:
        raise ValueError(f"math-verify finds no answer in the gold {answer[-80:]!r}")
    try:
        guess_values = _parse(guess)
    except MemoryError:
        raise
    except Exception:
        # Anything may come out of a parser fed with what a model wrote; all of it means "wrong".
        return 0.0
    return float(_equal(gold_values, guess_values))


def same_answer(first: str, second: str) -> bool:
    """Whether two boxed answers are the same value; symmetric, unlike math-verify.

    Runs in the calling process without a deadline: `Grader.same_answer`, for votes, has one.
    """
    first, second = first.strip(), second.strip()
    try:
        values = _parse(first), _parse(second)
        return first == second or _equal(*values) or _equal(*reversed(values))
    except MemoryError:
        raise
    except Exception:
        # As above: model text on both sides, and sympy raises what it likes.
        return False


@lru_cache(maxsize=4096)
def _parse(latex: str) -> tuple[Any, ...]:
    """Return the readings of an answer: a sympy value and the text itself, if it has any."""
    return tuple(parse(f"\\boxed{{{latex}}}", parsing_timeout=None, raise_on_error=True))


def _equal(gold: tuple[Any, ...], guess: tuple[Any, ...]) -> bool:
    """Whether any two readings agree; raises only if none does and one comparison failed."""
    failure = None
    for pair in product(gold, guess):
        try:
            if verify(*pair, timeout_seconds=None, raise_on_error=True):
                return True
        except MemoryError:
            raise
        except Exception as error:  # kept for later: another reading may still agree
            failure = error
    if failure is not None:
        raise failure
    return False
