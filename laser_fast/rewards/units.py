r"""What a math answer says besides its value: unit, currency, base, a.m. or p.m."""

import re
from math import prod

from laser_fast.rewards.notation import read_number

_SAME = """cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre
in inch inches|ft foot feet|mi mile|yd yard|kg kilogram kilo|g gram|mg milligram|lb pound gbp
oz ounce|s sec second|min minute|h hr hour|day|week|month|year yr|l liter litre
ml milliliter millilitre|gal gallon|degree deg|radian rad|dollar usd buck|cent|euro eur|rupee rs inr
percent pct|am|pm|square sq squared|cubic cu cubed|newton n|joule j|watt w|volt v|kelvin k|celsius c
fahrenheit f|hertz hz|ampere a|pascal pa|mega|milli|acre|hectare|dozen
hundred|thousand|million|billion|trillion|/ per"""
_NAMES = {name: group.split()[0] for group in re.split(r"[|\n]", _SAME) for name in group.split()}
_MEASURES = frozenset(_NAMES.values())
# Words that say more than a unit does, without a plural's s: 10 or more, 10 theta, 10 squared.
_CLAIMS = frozenset(
    """or not than least most power sqrt sin co tan log ln exp alpha beta gamma delta epsilon
    theta lambda mu pi rho sigma tau phi psi omega""".split()
)
_MULTIPLIERS = {"dozen": 12, "hundred": 100}
_MULTIPLIERS |= {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BASES = "two three four five six seven eight nine ten eleven twelve"
_BASE_NUMBERS = {name: str(base) for base, name in enumerate(_BASES.split(), start=2)}
_SIGNS = {r"\$": "dollar", "\xa3": "pound", r"\pounds": "pound", "\u20ac": "euro", r"\euro": "euro"}

_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_TEXT_TAIL = re.compile(
    rf"(?:\s*(?:\\text\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{_POWER}|\\?%|\xa2|\^\s*(?:\\circ|\{{\s*\\circ\s*\}})"
    r"|(?<=\})/))+$"
)
_WORD_TAIL = re.compile(rf"(?:\s+|(?<![\\A-Za-z]))[A-Za-z][A-Za-z.]*(?:[ /]+[A-Za-z.]+)*{_POWER}$")
_CURRENCY = re.compile(
    r"^([-+]?)\s*(\\\$|\\pounds|\\euro|[\xa3\xa5\u20ac\u20b9]"
    r"|(?:\\text\{ *)?(?:USD|EUR|GBP|INR|Rs\b\.?) *\}?)\s*(?=[-+\d.\\])"
)
_BASE = re.compile(r"\(?([\dA-Fa-f.]*\d[\dA-Fa-f.]*)\)?\s*_\s*(?:\{(.*)\}|(\d)|(\\text\{.*\}))$")


def split_unit(text: str, *, has_letters: bool) -> tuple[str, frozenset[str]]:
    """Split plain LaTeX into a value and the words of its unit, in one spelling.

    Where letters may be variables (`has_letters`), bare words are a unit only behind a space and
    if they are known measures of two letters or more, or words of four. A multiplier goes into the
    value: 5 million dollars are 5000000 and dollar.
    """
    if match := _BASE.fullmatch(text):
        return match[1].upper(), frozenset(_words(f"base {match[2] or match[3] or match[4]}"))
    words: list[str] = []
    if match := _CURRENCY.match(text):
        words += _words(_SIGNS.get(match[2], match[2]))
        text = match[1] + text[match.end() :]
    if (match := _TEXT_TAIL.search(text)) and match.start() > 0:
        text, words = text[: match.start()], words + _words(match[0])
    if (match := _WORD_TAIL.search(text)) and text[: match.start()]:
        tail, found = match[0].strip(), _words(match[0])
        is_known = _MEASURES.issuperset({*found} - {"unit"}) and len(tail) > 1
        is_unit = match[0] != tail and (is_known or min(map(len, tail.split())) > 3)
        if read_number(text[: match.start()]) is None:
            is_unit = is_unit and is_known
        elif not has_letters:
            is_unit = is_known or len(tail) > 2 or tail in "msghlL"
        if is_unit:
            text, words = text[: match.start()], words + found
    text = text.strip()
    factors = [_MULTIPLIERS[word] for word in words if word in _MULTIPLIERS]
    if factors and "/" not in words and (value := read_number(text)) is not None:
        text, words = str(value * prod(factors)), [w for w in words if w not in _MULTIPLIERS]
    if {"am", "pm"} & set(words) and re.fullmatch(r"\d\d?", text):
        text += ":00"
    return text, frozenset(() if "unit" in words else words)


def agree(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether two units may be the same: one says nothing, or they differ in no measure."""
    if _CLAIMS & (first ^ second):
        return False
    if not first or not second:
        return True
    differing = first ^ second
    is_measure = differing & _MEASURES or any(word.startswith("base ") for word in differing)
    return not is_measure and (first <= second or second <= first)


def _words(text: str) -> list[str]:
    r"""The words of a unit: km/h is km, / and h; \text{cm}^2 is cm and square."""
    for sign, name in (("\\circ", "degree"), ("%", "percent"), ("\xa2", "cent")):
        text = text.replace(sign, f" {name} ")
    text = re.sub(r"\\text|[.{}]", " ", text)
    text = re.sub(r"\bM(?=(?:Wh?|V|Hz|J|N|A|Pa)\b)", "mega ", text)
    text = re.sub(r"\bm(?=(?:Wh?|V|Hz|J|N|A|Pa)\b)", "milli ", text)
    text = re.sub(r"\^ *2", " square ", re.sub(r"\^ *3", " cubic ", text)).casefold()
    text = re.sub(r"\b([ap]) m\b", r"\1m", text.replace("mph", "mi/h").replace("kph", "km/h"))
    text = re.sub(r"^\s*(?:squared|cubed)\b", " power ", re.sub(r"\bor so\b", " ", text))
    text, words = re.sub(r"(?:base +)+", "base ", text), []
    for word in re.findall(r"base +\w+|[a-z]+|/", text):
        word = _NAMES.get(word) or _NAMES.get(word.removesuffix("s")) or word.removesuffix("s")
        if word.startswith("base "):
            base = word.split()[1]
            word = f"base {_BASE_NUMBERS.get(base, base)}"
        words.append(word)
    return words
