r"""One notation for what models and data sets write in many ways, and numbers in it.

Characters become LaTeX (a root sign, a superscript, U+2212), spacing and styles go, `\frac12` gets
its braces, thousands are joined. Nothing here changes a value.
"""

import re
import unicodedata
from fractions import Fraction

_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"  # braces in braces, four deep
# Commands that only change how something looks, or show nothing.
_BARE = re.compile(
    rf"\\(?:(?:color|[hv]?phantom|tag|label|require)\*?\s*(?:\[[^\]]*\])?\s*{_GROUP}"
    r"|(?:(?:display|text|script|scriptscript)style|(?:normal|footnote|script)size|small|tiny"
    r"|[lL]arge|LARGE|[hH]uge|bf|rm|it|sf|tt|(?:math)?strut|nonumber|notag|[hv]fill?|noindent"
    r"|centering|(?:allow|line|page)break|newline)(?![a-zA-Z])"
    rf"|(?:(?:textcolor|colorbox|class|cssId|style|href)\s*(?:\[[^\]]*\])?|fcolorbox\s*{_GROUP})"
    rf"\s*{_GROUP}\s*({_GROUP})"
    r"|(?:math(?:bf|it|rm|normal|tt|ord|rel|bin)|boldsymbol|bm|pmb|bold|u(?:nder)?line|smash"
    rf"|ensuremath|bbox)(?![a-zA-Z])\s*(?:\[[^\]]*\])?\s*({_GROUP}|\\[a-zA-Z]+|[^\s{{}}\\]))"
)
_COUNTRY = "(?:US|AU?|CA?|NZ|HK|SG?)"  # whose dollar it is
_SYMBOLS: dict[str, str | int | None] = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    "\xd7": r"\times ", "\xb7": r"\cdot ", "\u22c5": r"\cdot ", "\xf7": r"\div ", "\xb1": r"\pm ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ",
    "\u221e": r"\infty ", "\u2205": r"\emptyset ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u2208": r"\in ", "\xb0": r"^\circ ", "\u2220": r"\angle ", "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}", "\u221a": r"\sqrt ", "\u2044": "/", "\u2215": "/", "\uff0c": ",",
    "\u2192": r"\to ", "\u21d2": r"\Rightarrow ", "\u2026": r"\ldots ", "\u2019": "'",
}  # fmt: skip


def _content(match: re.Match[str]) -> str:
    """What a match of `_BARE` shows, apart from a command or under the sign in front of it."""
    group, before = match[1] or match[2] or "", match.string[: match.start()][-20:]
    text = _BARE.sub(_content, group[1:-1] if group.startswith("{") else group)
    if text and before.endswith(("^", "_")):
        return f"{{{text}}}"
    return f" {text}" if re.search(r"\\[a-zA-Z]+$", before) else text


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!\s*|\\+\s*$", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace)(?![a-zA-Z])", " "),
        (r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\ "),
        (r"\\(?:[hv]space\*?\{[^{}]*\}|[hvm]?(?:kern|skip)\s*-?[\d.]+\s*[a-z]{2})", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
        (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"),
        (rf"\\(?:under|over)brace\s*({_GROUP})\s*(?:[_^]\s*(?:{_GROUP}|[^\s{{}}\\]))?", r"\1"),
        (rf"\\raisebox\s*{_GROUP}\s*(?:\[[^\]]*\]\s*)*({_GROUP})", r"\\text\1"),
        (r"\\operatorname\*?\s*\{\s*(?:((?:a(?:rc)?)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|gcd"
         r"|max|min)\s*\}|(?=[^{}]*\}))", lambda m: f"\\{m[1]} " if m[1] else r"\text{"),
        (r"\\(?:math(?:rm|sf)|(?:[mhf]|frame)box|emph|(?:text)?(?:rm|bf|it|sf|tt)"
         r"|text(?:up|sc|sl|normal)?)\s*\{", r"\\text{"),
        (r"\{\s*\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])\s*([^{}]*)\}", r"\\text{\1}"),
        (_BARE, _content),
        (r"[\^_]\{\s*\}|(?<![a-zA-Z\\])\{\s*\}", " "),
        (r"\\([gln]e)(?:q(?:slant)?)?(?![a-zA-Z])", r"\\\1 "),
        (r"\\([gl])t(?![a-zA-Z])", lambda m: {"g": ">", "l": "<"}[m[1]]),
        (r"\\(?:(lor|vee)|land|wedge)(?![a-zA-Z])", lambda m: " or " if m[1] else " and "),
        (r"\\(?:degree|textdegree)(?![a-zA-Z])", r"^\\circ "),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<![\^_a-zA-Z])\{([-+,])\}", r"\1"),
        (r"\\textdollar(?![a-zA-Z])|(?<![\w\\])(?:US|AU|CA|NZ|HK|SG)\$(?=\d)", r"\\$"),
        (rf"\\text\{{ *{_COUNTRY}? *(\\\$|[\xa3\xa5\u20ac\u20b9]) *\}}", r"\1"),
        (rf"(?:\\text\{{ *{_COUNTRY} *\}} *|(?<![\w\\]){_COUNTRY})(?=\\\$)|(?<=\\\$)US(?=\d)", ""),
        (r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}(\^\d)?\}", r"\\text{\1/\2\3}"),
        # A number is no text, and its unit is text of its own.
        (r"\\text\{\s*([-+]?[\d.,/: ]*\d)\.?\s*(?=(?:[^{}\d]|\^\s*\{?\d\}?)*\})", r"\1 \\text{"),
        (r"\\text\{\s*([,;]?)\s*\}", r"\1"),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}", lambda m: _repeating(*m.groups())),
        (r"(?<![\w.])(\d+) (\d+)/(\d+)(?![\w./])", r"\1\\frac{\2}{\3}"),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", ""),  # the marks of formulas
        (r"[^\S\n]+", " "),
    )
]  # fmt: skip
_COMMAND = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])(?:\s*\[[^\]]*\])?")
_ARGUMENT = re.compile(rf"\s*({_GROUP}|\\sqrt(?:\[[^\]]*\])?\s*{_GROUP}|\\[a-zA-Z]+|[^\s{{}}])")
_COMMAS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SPACES = re.compile(r"(?<![\w.,] )(?<![\w.,])\d{1,3}(?: \d{3})+(?! ?\d|,\d)")

DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_TIMES = r"\s*(?:\\times|\\cdot|\\ast|\*|x)\s*"
_EXPONENT = r"\^\s*(?:\{\s*(?P<braced>-?\d+)\s*\}|(?P<bare>-?\d+))"
NUMBER = re.compile(
    rf"(?:(?P<whole>\d+) +(?P<part>\d+/\d+)(?!\d*/)"
    rf"|(?P<numerator>{DIGITS})\s*/\s*(?P<denominator>{DIGITS})"
    rf"|(?:(?P<factor>{DIGITS}){_TIMES})?10\s*{_EXPONENT}"
    rf"|(?P<plain>{DIGITS})(?:[eE](?P<e>[-+]?\d+)(?![\w.]))?)"
)
# Longer exponents would take long to multiply out; Python reads no longer integers either.
_MAX_EXPONENT = 4000
_PLAIN_FRACTION = re.compile(rf"\\frac\{{\s*(-?{DIGITS})\s*\}}\{{\s*(-?{DIGITS})\s*\}}")


def plain_latex(text: str) -> str:
    """Return an answer in plain LaTeX: one form for each symbol, style, space and argument."""
    text = re.sub("[\xb2\xb3\xb9\u2070-\u207f]+", lambda m: f"^{{{_nfkc(m[0])}}}", text)
    text = re.sub("[\u2080-\u208e]+", lambda m: f"_{{{_nfkc(m[0])}}}", text)
    text = re.sub("[\xbc-\xbe\u2150-\u215e]", lambda m: rf"\frac{{{_nfkc(m[0])}}}", text)
    text = re.sub(r"(\\frac{\d+)\u2044", r"\1}{", text)
    text = re.sub("\u221a\\s*(\\d+(?:\\.\\d+)?)", r"\\sqrt{\1}", text)
    text = re.sub("[\uff01-\uff5e]", lambda m: _nfkc(m[0]), text)
    text = re.sub("[\u0391-\u03c9]", _greek, text)
    text = text.translate(str.maketrans(_SYMBOLS))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _with_braces(text).strip()


def join_thousands(text: str, *, commas: bool = True) -> str:
    """Join the digits of 1 234 567 and, with `commas`, of 1,234,567."""
    text = _SPACES.sub(lambda m: m[0].replace(" ", ""), text)
    return _COMMAS.sub(lambda m: m[0].replace(",", ""), text) if commas else text


def inline_fractions(text: str) -> str:
    r"""Write `2\frac{1}{2}` as 2 1/2, if both parts are numbers."""

    def inline(match: re.Match[str]) -> str:
        top, bottom = match[1], match[2]
        if bottom.startswith("-"):
            top, bottom = top.removeprefix("-") if top.startswith("-") else f"-{top}", bottom[1:]
        return f" {top}/{bottom} "

    return re.sub(r" +", " ", _PLAIN_FRACTION.sub(inline, text)).strip()


def read_number(text: str) -> Fraction | None:
    """Read a text that is one number (a fraction, mixed or scientific too), exactly, or None."""
    text = inline_fractions(text)
    sign = re.match(r"[-+]?\s*", text)
    assert sign is not None
    match = NUMBER.fullmatch(text, sign.end())
    value = None if match is None else value_of(match)
    return -value if value is not None and sign[0].startswith("-") else value


def value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `NUMBER`; None if it has none, or too many digits to compare."""
    try:
        if match["whole"]:
            part = Fraction(match["part"])
            return int(match["whole"]) + part if part < 1 else None
        if match["numerator"]:
            return Fraction(match["numerator"]) / Fraction(match["denominator"])
        exponent = int(match["braced"] or match["bare"] or match["e"] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return Fraction(match["plain"] or match["factor"] or 1) * Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):
        return None


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def _repeating(whole: str, start: str, period: str) -> str:
    """0.1666..., written with a line over the 6, as a fraction."""
    step = 10 ** len(start) * (10 ** len(period) - 1)
    value = int((whole + start) or "0") * (10 ** len(period) - 1) + int(period)
    return rf"\frac{{{value}}}{{{step}}}"


def _greek(match: re.Match[str]) -> str:
    words = unicodedata.name(match[0], "").lower().split()
    name = words[3] if words[:1] == ["greek"] and len(words) == 4 else ""
    return f"\\{name.title() if words[1] == 'capital' else name} " if name else match[0]


def _with_braces(text: str) -> str:
    r"""Give `\frac\pi2`, `\sqrt3` and `\binom52` the braces that TeX adds."""
    for command in reversed(list(_COMMAND.finditer(text))):  # an inner one stands to the right
        end, arguments = command.end(), ""
        for _ in range(1 if command[1] == "sqrt" else 2):
            argument = _ARGUMENT.match(text, end)
            if argument is None:
                break
            group = argument[1]
            arguments += group if group.startswith("{") else f"{{{group}}}"
            end = argument.end()
        text = text[: command.end()].rstrip() + arguments + text[end:]
    return text
