r"""Reward "math": the value in the last \boxed{}, by exact reading and math-verify.

Both sides are brought into one notation (laser_fast/rewards/notation.py) and lose their units,
which are compared by themselves; numbers are then compared exactly, and everything else is
math-verify's, with decimals as fractions and without its habit of dropping what it cannot read.

Who is to blame decides between 0 and None. No box, an empty box or a box that nobody can read is
the model's mistake: 0, and so is a comparison that fails if the gold can be compared with another
answer. Otherwise the exception leaves this file, and the grade becomes None. math-verify's habit of
returning False for an exception is off; its time limits are too: they are SIGALRM, which works in
no thread and interrupts no C code.

Deliberately not decided, so do not build on either outcome:
- a unit, base, currency or a.m. that only one side names (accepted: the question names it);
- a conversion (5 km for 5000 m, 15:00 for 3:00 p.m., 42 for 52_8 with a base on both sides);
- 1,234 in a list or point, which is also two values; a decimal comma;
- rounding (accepted from six decimals and six digits on, if the value has no finite decimals);
- a value twice in a list (1, 1 for 1); (1, 2) as point, open interval or list;
- the order of the letters of a product that spells a word, and the case of words and choices;
- a whole number before a fraction above 1 (2\frac{3}{2}), which TeX multiplies and a hand adds.
"""

import logging
import re
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from laser_fast import needs_train

with needs_train():
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, FiniteSet, Intersection, Interval, N, Rational, Tuple, Union
    from sympy.logic.boolalg import Boolean

from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rewards.notation import join_thousands, plain_latex, read_number
from laser_fast.rewards.units import agree, split_unit

# Its one warning asks for the deadline that our workers have.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Its units are single letters, too: it would read 6m as 6.
_NOTATION = replace(LatexExtractionConfig().normalization_config, units=False)
_READING = LatexExtractionConfig(normalization_config=_NOTATION)
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\d.])")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?")
_NAMED = re.compile(r"([A-Za-z](?:_\{?\w+\s*\}?)?'*(?:\([A-Za-z]\))?)\s*=\s*([^=]+)")
_LEAD = re.compile(
    r"^(?:\\text\{(?:[^{}]*(?:\bis|\bare|[:=])| *(?:about|approximately)) *\}|=|\\approx|\\sim)\s*"
)
_CONDITION = re.compile(r"^\\\{ *[A-Za-z] *(?:\||\\mid|:) *(.*)\\\}$")  # {x | x > 3}
_CONJUNCTION = re.compile(r"\b(?:or|(?P<both>and))\b")
# Digits that no rule has joined are two numbers, which math-verify would multiply.
_LOOSE_DIGITS = re.compile(r"(?<!_)\d +\d")
# It adds 2(3), as the mixed number of which it knows no other sign.
_PRODUCT = re.compile(r"(?<![\^_])(?<![\^_]\d)(?<=[\d)])\s*(?=\((?:\d+|\\frac\{\d+\}\{\d+\})\))")
_IMAGINARY = re.compile(r"(?<![a-zA-Z\\_])(?<!_\{)i(?![a-zA-Z])")
_DEGREES = re.compile(  # behind a function, which would take them for radians
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?\s*[({]?\s*)(\d+(?:\.\d+)?)"
    r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})"
)
_LETTER = re.compile(r"\\(?:text|mathbb)\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z])")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\d)")
_WORD = re.compile(r"\\text\{[^{}]*\}|[A-Za-z() .]+")


def reward(text: str, answer: str) -> float:
    r"""Return 1.0 if the last \boxed{} of the completion equals the gold `answer`, else 0.0.

    The gold may be LaTeX, a number, several values, or a solution that ends in a \boxed{}. One that
    holds nothing is a ValueError, or what math-verify raises.
    """
    guess = extract_boxed(text)
    if not guess:
        return 0.0
    gold = extract_boxed(answer) or answer.strip()
    if guess == gold:
        return 1.0
    if not gold:
        raise ValueError(f"math-verify finds no answer in the gold {answer[-80:]!r}")
    return float(_is_same(gold, guess))


def same_answer(first: str, second: str) -> bool:
    """Whether two boxed answers are the same value; symmetric, unlike math-verify.

    Runs in the calling process without a deadline: `Grader.same_answer`, for votes, has one.
    """
    first, second = first.strip(), second.strip()
    try:
        return first == second or _is_same(first, second) or _is_same(second, first)
    except MemoryError:
        raise
    except Exception:
        # Model text on both sides, and sympy raises what it likes.
        return False


def _is_same(gold: str, guess: str) -> bool:
    # Commas may separate thousands or values: either reading may agree, but not a mix.
    return any(_agree(_plain(gold, commas), _plain(guess, commas)) for commas in (True, False))


def _plain(latex: str, commas: bool) -> str:
    text = plain_latex(latex).replace("\n", " ").lstrip(" ,;:").rstrip(" .,;:")
    text = re.sub(r"\\text\{ *(?:([eixyzn])|pi) *\}", lambda m: m[1] or r"\pi ", text)  # no units
    text = _CONDITION.sub(r"\1", _LEAD.sub("", text))
    text = re.sub(r"^\](?=.*,)", "(", re.sub(r"(?<=.)\[$", ")", text))  # ]3, 5[ is (3, 5)
    text = _DEGREES.sub(r"\1\\frac{\2\\pi}{180}", text)
    has_point = re.search(r"[(\[]|\\\{", text) is not None
    return join_thousands(text, commas=commas and not has_point)


def _agree(gold: str, guess: str) -> bool:
    """Whether two answers in plain LaTeX are the same value in units that may be the same."""
    named = gold, guess
    gold, guess = _without_name(gold, guess)
    gold, unit = split_unit(gold, has_letters=True)
    guess, other = split_unit(guess, has_letters=read_number(gold) is None)
    if not agree(unit, other) or gold.count("'") != guess.count("'"):  # math-verify drops primes
        return False
    if _SPACE.sub("", gold) == _SPACE.sub("", guess):
        return True
    clocks = [_CLOCK.fullmatch(text) for text in (gold, guess)]
    if any(clocks):
        return all(clocks) and len({tuple(map(int, t.split(":"))) for t in (gold, guess)}) == 1
    if r"\text" in gold + guess and _WORD.fullmatch(gold) and _WORD.fullmatch(guess):
        return len({re.sub(r"\\text|[^a-z0-9]", "", t.casefold()) for t in (gold, guess)}) == 1
    first, second = read_number(gold), read_number(guess)
    if first is None or second is None:
        forms = [(gold, guess)] + [named] * all("=" in text for text in named)  # y-2x=3 is y=2x+3
        return not _LOOSE_DIGITS.search(guess) and any(_verify(*form) for form in forms)
    # 5% is 0.05, and 5 where the question asks for percent; 5 is not 0.05%.
    percent, plain = (first, second) if "percent" in unit else (second, first)
    is_scaled = "percent" in unit ^ other and percent == 100 * plain
    return (first == second or is_scaled) or (
        _is_rounded(gold, Rational(second)) or _is_rounded(guess, Rational(first))
    )


def _without_name(gold: str, guess: str) -> tuple[str, str]:
    """Both without the same "x =", or one without its own."""
    first, second = _NAMED.fullmatch(gold), _NAMED.fullmatch(guess)
    if first and second and first[1] != second[1]:
        return gold, guess
    return first[2] if first else gold, second[2] if second else guess


def _verify(gold: str, guess: str) -> bool:
    """Whether math-verify finds the same value, and finds it without rounding it away."""
    gold, guess = _cased(gold, guess)
    golds = _parse(gold)
    try:
        guesses = _parse(guess)
        return (
            _equal(golds, guesses)
            or any(_is_rounded(gold, value) for value in guesses)
            or any(_is_rounded(guess, value) for value in golds)
        )
    except MemoryError:
        raise
    except Exception:
        # Anything may come out of a parser fed with what a model wrote; all of it means "wrong",
        # unless it is the gold that cannot be compared.
        _equal(golds, _parse("-7919"))
        return False


def _cased(gold: str, guess: str) -> tuple[str, ...]:
    """Both with other letters for capitals beside their small ones, which it takes for the same."""
    if re.fullmatch(r"[A-Za-z]+,[A-Za-z]+", f"{gold},{guess}"):
        return gold, guess  # words, or the letter of a choice
    used = {match[1] or "" for match in _LETTER.finditer(f"{gold},{guess}")}
    free = sorted({*"abcdghjklmnpqrstuvwxyz"} - {letter.lower() for letter in used})
    big = sorted(letter for letter in used if letter.isupper() and letter.lower() in used)
    names = dict(zip(big, free, strict=False))
    return tuple(_LETTER.sub(lambda m: names.get(m[1], m[0]), text) for text in (gold, guess))


@lru_cache(maxsize=4096)
def _parse(latex: str) -> tuple[Any, ...]:
    """Return the readings of an answer: a sympy value and the text itself, if it has any."""
    exact = _DECIMAL.sub(lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", latex)
    if not re.search(r"\\(?:sum|prod)_", exact):  # whose index is i
        exact = _IMAGINARY.sub(" I ", exact)
    exact = _PRODUCT.sub(r"\\cdot ", exact)
    values = parse(f"\\boxed{{{exact}}}", [_READING], parsing_timeout=None, raise_on_error=True)
    parts = values[0].args if values and isinstance(values[0], FiniteSet) else ()
    if len(parts) > 1 and all(isinstance(part, Boolean) and not part.is_Equality for part in parts):
        if len(set().union(*(part.free_symbols for part in parts))) == 1:
            solved, conjunction = [part.as_set() for part in parts], _CONJUNCTION.search(latex)
            both = Intersection(*solved)
            # A comma is "and" where that leaves something.
            is_both = conjunction["both"] if conjunction else not both.is_empty
            values.append(both if is_both else Union(*solved))
    return tuple(values)


def _equal(gold: tuple[Any, ...], guess: tuple[Any, ...]) -> bool:
    """Whether any two readings agree; raises only if none does and one comparison failed."""
    failure = None
    for pair in product(gold, guess):
        try:
            is_equal = verify(
                *pair,
                numeric_precision=400,
                allow_set_relation_comp=True,
                timeout_seconds=None,
                raise_on_error=True,
            )
            if (is_equal and _is_close(*pair)) or _is_multiple(*pair):
                return True
        except MemoryError:
            raise
        except Exception as error:  # kept for later: another reading may still agree
            failure = error
    if failure is not None:
        raise failure
    return False


def _is_close(first: Any, second: Any) -> bool:
    """Whether constants, in sets too, agree relative to their size; math-verify subtracts."""
    if first == second:
        return True
    kinds = (FiniteSet, Union, Interval, Tuple)
    if isinstance(first, kinds) and isinstance(second, kinds):
        if isinstance(first, kinds[:2]) or isinstance(second, kinds[:2]):
            return all(any(_is_close(a, b) for b in second.args) for a in first.args)
        return all(map(_is_close, first.args, second.args))
    if not all(isinstance(value, Expr) and not value.free_symbols for value in (first, second)):
        return True
    a, b = N(first, 40), N(second, 40)
    return bool(abs(a - b) <= abs(a) * Rational(1, 10**30))


def _is_multiple(first: Any, second: Any) -> bool:
    """Whether one equation is the other one times a number, or turned round."""
    if not (isinstance(first, Eq) and isinstance(second, Eq)):
        return False
    ratio = ((first.lhs - first.rhs) / (second.lhs - second.rhs)).simplify()
    is_constant = len(first.free_symbols) > 1 and ratio.is_number and ratio.is_nonzero
    return ratio in (1, -1) or bool(is_constant)


def _is_rounded(decimal: str, value: Any) -> bool:
    """Whether `decimal` is a constant rounded to six or more decimals, if it has no finite form."""
    match = re.fullmatch(r"-?(\d*)\.(\d{6,})", decimal)
    if match is None or len((match[1] + match[2]).lstrip("0")) < 6:
        return False
    if not isinstance(value, Expr) or value.free_symbols:
        return False
    if value.is_Rational and 10**40 % value.q == 0:
        return False
    return bool(abs(N(value, 60) - Rational(decimal)) * 2 * 10 ** len(match[2]) <= 1)
