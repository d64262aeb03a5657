r"""Count the mistakes of the graders "math" and "gsm8k" on rewrites of real gold answers.

    python -m bench.grader_rewrites ../shared/data --out bench/results/NAME.json [--before OLD.json]

Every gold of the evaluation sets is rewritten mechanically: in forms that mean the same, which must
earn 1, and in forms that nearly do, which must earn 0 (a failed grade is a mistake of either way).
Worked solutions of GSM8K's train file end in several ways. The results hold counts by kind and no
row of the data.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench import provenance
from bench.markdown import table
from laser_fast.config import RewardConfig
from laser_fast.rewards import Grader

SETS = ("math500", "amc23", "aime24", "aime25", "olympiadbench")
NUM_SOLUTIONS = 400
PER_KIND = 40  # golds of one kind of rewrite, chosen at random with a fixed seed

Rewrite = Callable[[str], str | list[str] | None]

INTEGER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"\d+\.\d+|\.\d+")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
INTERVAL = re.compile(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])")
POINT = re.compile(r"\((-?\d+),\s*(-?\d+)\)")
LIST = re.compile(r"(?!\d{1,3}(?:,\d{3})+$)-?\d+(?:,\s*-?\d+)+")  # 58,500 may be a number
DEGREES = re.compile(r"(-?[\d.]+)\s*\^(?:\\circ|\{\\circ\})")
BASE = re.compile(r"(\d+)_\{?(\d)\}?")
CHOICE = re.compile(r"\\text\{\(([A-E])\)\}")
WORD = re.compile(r"\\text\{([A-Za-z]+)\}")
NAMES = {2: "two", 5: "five", 6: "six", 8: "eight", 9: "nine"}
SUPERSCRIPTS = str.maketrans(
    "0123456789-", "\u2070\xb9\xb2\xb3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
)
SYMBOLS = {
    r"\\pi(?![a-z])": "\u03c0",
    r"\\infty": "\u221e",
    r"\\cup": "\u222a",
    r"\\sqrt\{(\d+)\}": "\u221a\\1",
    r"\\cdot": "\xb7",
    r"\\pm": "\xb1",
    "-": "\u2212",
    r"\^\\circ": "\xb0",
    r"\^\{\\circ\}": "\xb0",
}


def whole(pattern: re.Pattern[str]) -> Callable[[Callable[[re.Match[str]], object]], Rewrite]:
    """Make a rewrite of the golds that match `pattern` from a function of the match."""
    return lambda rewrite: (
        lambda gold: (
            rewrite(match) if (match := pattern.fullmatch(gold)) else None  # type: ignore[return-value]
        )
    )


integer, decimal, fraction, point = map(whole, (INTEGER, DECIMAL, FRACTION, POINT))
interval, numbers, degrees, base = map(whole, (INTERVAL, LIST, DEGREES, BASE))
choice, word = whole(CHOICE), whole(WORD)


def grouped(separator: str) -> Rewrite:
    """Write the integers from 1000 with a thousands separator."""
    return integer(
        lambda m: f"{int(m[0]):,}".replace(",", separator) if abs(int(m[0])) >= 1000 else None
    )


def unicode_text(gold: str) -> str | None:
    """Write LaTeX symbols as the characters a model types."""
    text = re.sub(r"\^\{?(-?\d+)\}?", lambda m: m[1].translate(SUPERSCRIPTS), gold)
    for pattern, symbol in SYMBOLS.items():
        text = re.sub(pattern, symbol, text)
    return text if text != gold else None


def terminating(m: re.Match[str]) -> str | None:
    """Write a fraction as a decimal number, if it ends."""
    numerator, denominator = int(m[2]), int(m[3])
    if 10**6 * numerator % denominator:
        return None
    return m[1] + f"{numerator / denominator:.6f}".rstrip("0")


def mixed(m: re.Match[str]) -> list[str] | None:
    """Write an improper fraction as a mixed number."""
    number, rest = divmod(int(m[2]), int(m[3]))
    if not number or not rest:
        return None
    return [rf"{m[1]}{number}\frac{{{rest}}}{{{m[3]}}}", f"{m[1]}{number} {rest}/{m[3]}"]


def relation(m: re.Match[str]) -> list[str] | None:
    """Write an interval as an inequality."""
    low, high = m[2].strip(), m[3].strip()
    if "infty" not in m[0] and m[1] + m[4] == "()":
        return None  # a point or an interval, who knows
    above, below = (r"\le" if m[1] == "[" else "<"), (r"\le" if m[4] == "]" else "<")
    if r"-\infty" in low:
        return [f"x {below} {high}", rf"x \in {m[0]}"]
    if r"\infty" in high:
        return [f"{low} {above} x", "x " + above.replace("<", ">").replace("le", "ge") + f" {low}"]
    return [f"{low} {above} x {below} {high}", rf"x\in{m[0]}"]


def last_digit(gold: str) -> str | None:
    r"""Change the last digit by one; inside a \text or a matrix nothing is certain."""
    m = re.match(r"(.*)(\d)(\D*)$", gold, re.DOTALL)
    if m is None or "\\text" in gold or "log" in gold or "pmatrix" in gold:
        return None
    return f"{m[1]}{(int(m[2]) + 1) % 10}{m[3]}"


def units(text: str) -> Rewrite:
    """Add a unit to a number that has none."""
    return lambda gold: gold + text if INTEGER.fullmatch(gold) or FRACTION.fullmatch(gold) else None


SAME: dict[str, Rewrite] = {
    "trailing dot": lambda gold: gold.removesuffix(".") + ".",
    "dollars": lambda gold: None if "$" in gold else f"${gold}$",
    "spaces": lambda gold: [f" {gold}\\ ", f"\u00a0{gold}~", f"\\,{gold}\n", rf"\quad {gold}\;"],
    "style": lambda gold: [rf"\displaystyle {gold}", rf"\boldsymbol{{{gold}}}"],
    "no content": lambda gold: [
        rf"\color{{red}}{gold}", rf"\underline{{{gold}}}", rf"\textcolor{{red}}{{{gold}}}"],
    "Unicode symbols": unicode_text,
    "number in \\text": integer(lambda m: [rf"\text{{{m[0]}}}", rf"\mathbf{{{m[0]}}}"]),
    "decimal in \\text": decimal(lambda m: rf"\text{{{m[0]}}}"),
    "unit in \\text": lambda gold: [
        form for unit in (r"~\text{cm}", r"\,\mathrm{kg}", r" \text{ m}^2", r"\ \mbox{miles}")
        if (form := units(unit)(gold))
    ],
    "unit in words": lambda gold: [
        form for unit in (" dollars", " cm", " square units", " apples", r"\%")
        if (form := units(unit)(gold))
    ],
    "currency": integer(
        lambda m: [rf"\${m[0]}", f"\u20ac{m[0]}"] if m[0].isdigit() else None
    ),
    "assigned": lambda gold: (
        f"x = {gold}" if INTEGER.fullmatch(gold) or FRACTION.fullmatch(gold) else None
    ),
    "assigned with separator": integer(
        lambda m: f"x={int(m[0]):,}" if abs(int(m[0])) >= 1000 else None
    ),
    "1,234": grouped(","),
    "1{,}234": grouped("{,}"),
    r"1\,234": grouped(r"\,"),
    "1 234": grouped(" "),
    "1 234 with U+202F": grouped("\u202f"),
    r"1\ 234": grouped(r"\ "),
    "trailing zeros": integer(lambda m: [f"{m[0]}.0", f"{m[0]}.00"]),
    "scientific": integer(
        lambda m: [rf"{int(m[0]) / 1000} \times 10^3", rf"{int(m[0]) / 100}\cdot10^{{2}}"]
    ),
    "shorter fraction": fraction(
        lambda m: [rf"{m[1]}{m[2]}/{m[3]}", rf"{m[1]}\dfrac{{{m[2]}}}{{{m[3]}}}"]
        + ([rf"{m[1]}\frac{m[2]}{m[3]}"] if len(m[2] + m[3]) == 2 else [])
    ),
    "decimal fraction": fraction(terminating),
    "mixed number": fraction(mixed),
    "\\left and \\right": lambda gold: (
        gold.replace("(", r"\left(").replace(")", r"\right)")
        if "(" in gold and "left" not in gold and "\\text" not in gold
        else None
    ),
    "list reversed": numbers(lambda m: ", ".join(re.split(r",\s*", m[0])[::-1])),
    "list as a set": numbers(lambda m: rf"\{{{m[0]}\}}"),
    "list with and": numbers(lambda m: " and ".join(m[0].rsplit(",", 1))),
    "interval as a relation": interval(relation),
    "degrees": degrees(lambda m: [m[1], rf"{m[1]}\text{{ degrees}}", f"{m[1]}\xb0"]),
    "base": base(
        lambda m: [f"{m[1]}_{{{m[2]}}}", rf"{m[1]}_{{\text{{{NAMES[int(m[2])]}}}}}",
                   rf"{m[1]}_\text{{{m[2]}}}"]
    ),
    "choice": choice(lambda m: [m[1], f"({m[1]})", rf"\textbf{{({m[1]})}}", rf"\mathrm{{{m[1]}}}"]),
    "word": word(
        lambda m: [m[1], rf"\mathrm{{{m[1]}}}", rf"\textbf{{{m[1]}}}", rf"\text{{{m[1]}.}}"]
    ),
}  # fmt: skip

OTHER: dict[str, Rewrite] = {
    "last digit": last_digit,
    "sign": lambda gold: (
        (gold[1:] if gold[0] == "-" else f"-{gold}")
        if (INTEGER.fullmatch(gold) or FRACTION.fullmatch(gold)) and gold != "0"
        else None
    ),
    "sign U+2212": integer(lambda m: f"\u2212{m[0]}" if int(m[0]) > 0 else None),
    "a little more": lambda gold: (
        [f"{gold}.0000001", f"{gold}.{'0' * 12}1"] if INTEGER.fullmatch(gold) else None
    ),
    "ten times": integer(lambda m: f"{m[0]}0" if m[0] != "0" else None),
    "ten times in groups": integer(lambda m: f"{int(m[0]) * 1000:,}" if m[0] != "0" else None),
    "power of ten": integer(lambda m: [rf"{m[0]} \times 10^1", f"{m[0]}e1"] if int(m[0]) else None),
    "factorial": integer(lambda m: f"{m[0]}!" if int(m[0]) > 2 else None),
    "squared": integer(lambda m: f"{m[0]}^2" if abs(int(m[0])) > 1 else None),
    "sum": integer(lambda m: [f"{m[0]}+1", rf"1 \cdot 1 + {m[0]}"]),
    "percent of": fraction(lambda m: rf"{m[0]}\pi"),
    "upside down": fraction(lambda m: rf"{m[1]}\frac{{{m[3]}}}{{{m[2]}}}"),
    "only the numerator": fraction(lambda m: m[1] + m[2] if m[3] != "1" else None),
    "mixed instead of product": fraction(lambda m: rf"{m[1]}3\frac{{{m[2]}}}{{{m[3]}}}"),
    "truncated decimal": fraction(
        lambda m: f"{m[1]}{int(m[2]) / int(m[3]):.3f}" if 1000 * int(m[2]) % int(m[3]) else None
    ),
    "other bracket": interval(
        lambda m: None if POINT.fullmatch(m[0]) or "infty" in m[2]
        else ("[" if m[1] == "(" else "(") + m[0][1:]
    ),
    "other relation": interval(
        lambda m: None if POINT.fullmatch(m[0]) or "infty" not in m[0]
        else f"x < {m[2]}" if "infty" in m[3] else f"x > {m[3]}"
    ),
    "swapped point": point(lambda m: f"({m[2]},{m[1]})" if m[1] != m[2] else None),
    "element missing": numbers(lambda m: None if m[0] == "-2,-2" else m[0].rsplit(",", 1)[0]),
    "element more": numbers(lambda m: f"{m[0]}, 977"),
    "other base": base(lambda m: [f"{m[1]}_{int(m[2]) - 1}", rf"{m[1]}_{{{int(m[2]) + 1}}}"]),
    "other choice": choice(lambda m: rf"\text{{({'B' if m[1] == 'A' else 'A'})}}"),
    "other word": word(lambda m: rf"\text{{not {m[1]}}}"),
    "empty set": interval(lambda m: r"\emptyset"),
}  # fmt: skip

# Rewrites of both sides: the gold is a number of the data with something that must not be dropped.
PAIRS_SAME: dict[str, Rewrite] = {
    "long unit": integer(lambda m: [rf"{m[0]} \text{{ cm}}", f"{m[0]} centimeters"]),
    "square unit": integer(lambda m: [rf"{m[0]}\text{{ m}}^2", f"{m[0]} square meters"]),
    "unit left out": integer(lambda m: [rf"{m[0]} \text{{ km}}", m[0]]),
    "time of day": integer(lambda m: [rf"{m[0]} \text{{ p.m.}}", f"{m[0]} PM"]),
    "empty set": integer(lambda m: [r"\varnothing", r"\emptyset"]),
    "ray": integer(lambda m: [rf"({m[0]},\infty)", f"x>{m[0]}"]),
    "small power": integer(lambda m: [rf"10^{{-{m[0]}}}", rf"\frac{{1}}{{10^{{{m[0]}}}}}"]
                           if 20 < int(m[0]) < 200 else None),
}  # fmt: skip
PAIRS_OTHER: dict[str, Rewrite] = {
    "length": integer(lambda m: [rf"{m[0]} \text{{ km}}", rf"{m[0]} \text{{ m}}"]),
    "area": integer(lambda m: [rf"{m[0]} \text{{ m}}^2", rf"{m[0]} \text{{ m}}^3"]),
    "things": integer(lambda m: [rf"{m[0]} \text{{ dollars}}", f"{m[0]} cents"]),
    "time of day": integer(lambda m: [rf"{m[0]} \text{{ a.m.}}", rf"{m[0]} \text{{ p.m.}}"]),
    "clock": integer(lambda m: [f"{int(m[0]) % 12}:00", f"{(int(m[0]) + 1) % 12}:00"]),
    "base": integer(lambda m: [f"{m[0]}_8", f"{m[0]}_9"] if m[0].isdigit() else None),
    "small power": integer(lambda m: [rf"10^{{-{m[0]}}}", rf"10^{{-{int(m[0]) + 1}}}"]
                           if 20 < int(m[0]) < 200 else None),
    "small difference": integer(lambda m: [f"{m[0]}.0000001", f"{m[0]}.0000002"]),
    "factorial": integer(lambda m: [rf"\frac{{1}}{{{m[0]}!}}", rf"\frac{{1}}{{{int(m[0]) + 2}!}}"]
                         if 5 < int(m[0]) < 3000 else None),
    "ray": integer(lambda m: [rf"({m[0]},\infty)", rf"x\ge{m[0]}"]),
}  # fmt: skip


def solutions(rows: list[dict[str, str]]) -> Iterator[tuple[str, str, str, float]]:
    """(kind, completion, gold, expected) of worked solutions of GSM8K."""
    for row in rows:
        gold = row["answer"]
        work, _, final = gold.rpartition("####")
        work, final = re.sub("<<.*?>>", "", work), final.strip()
        number = float(final.replace(",", ""))
        whole = f"{int(number):,}" if number == int(number) else final
        more = str(int(number) + 1)
        ends = {
            "as published": f"#### {final}",
            "a line after it": f"#### {final}\nThat took 3 steps.",
            "unit after it": f"#### {final} \\text{{ m}}^2",
            "boxed": rf"So \boxed{{{final}}} in 2 years.",
            "boxed unit": rf"\boxed{{{final} \text{{ m}}^2}}",
            "boxed US dollars": rf"\[\boxed{{\color{{red}}US\${final}.00}}\]",
            "boxed sum": rf"\boxed{{x = 10 + 5 = {final}}}",
            "boxed words": rf"\boxed{{\text{{She needs }} {final} \text{{ more.}}}}",
            "a sentence": f"The answer is {final}.",
            "bold": f"The answer is **{whole}** dollars.",
            "groups with U+202F": f"#### {whole.replace(',', chr(0x202F))}",
            r"groups with \ ": rf"\boxed{{{whole.replace(',', chr(92) + ' ')}}}",
            "scientific": rf"\boxed{{{number / 1000!r} \times 10^{{3}}}}",
            "halves": rf"\boxed{{\frac{{{int(2 * number)}}}{{2}}}}",
            "minus of U+2212": f"#### \u2212{final}",
        }
        padded = final.zfill(3) if final.isdigit() and len(final) < 4 else ""
        misses = {
            "one more": f"#### {more}\nNot {final}",
            "boxed one more": rf"\boxed{{{more}}}, not {final}",
            "mixed": rf"\boxed{{{final}\frac12}}",
            "mixed in words": f"The answer is {final} 1/2.",
            "power": rf"\boxed{{{final} \times 10^3}}",
            "a unit that is the number": rf"\boxed{{{more} \text{{ m}}^{{{final}}}}}",
            "sum": rf"\boxed{{{more} + {final}}}",
            "fraction": rf"\boxed{{\frac{{1}}{{{final}}}}}" if abs(number) != 1 else "",
            "root": rf"\boxed{{\sqrt{{{final}}}}}" if number not in (0, 1) else "",
            "minus of U+2212": f"#### \u2212{final}" if number > 0 else "",
            "a digit before it": rf"\boxed{{7\,{padded}}}" if padded else "",
        }
        for kind, end in ends.items():
            negative = "U+2212" in kind and "minus" in kind
            gold_here = f"#### -{final}" if negative else gold
            yield f"solution, {kind}", f"{work}{end}", gold_here, 1.0
        for kind, end in misses.items():
            if end:
                yield f"solution, {kind}", f"{work}{end}", gold, 0.0


def cases(data: Path) -> Iterator[tuple[str, str, str, str, float]]:
    """(reward kind, kind of rewrite, completion, gold, expected) of everything that is counted."""
    golds = []
    for name in SETS:
        lines = (data / "eval" / f"{name}.jsonl").read_text().splitlines()
        golds += [str(json.loads(line)["answer"]).strip("$").strip() for line in lines]
    golds = sorted(set(golds))
    for expected, rewrites in ((1.0, SAME), (0.0, OTHER)):
        for kind, rewrite in rewrites.items():
            fitting = [(gold, form) for gold in golds if (form := rewrite(gold))]
            random.Random(kind).shuffle(fitting)
            for gold, form in fitting[:PER_KIND]:
                for text in [form] if isinstance(form, str) else form:
                    yield "math", f"rewrite, {kind}", rf"\boxed{{{text}}}", gold, expected
    for expected, rewrites in ((1.0, PAIRS_SAME), (0.0, PAIRS_OTHER)):
        for kind, rewrite in rewrites.items():
            fitting = [
                form for gold in golds if not gold.startswith("-") if (form := rewrite(gold))
            ]
            random.Random(kind).shuffle(fitting)
            for gold, text in fitting[:PER_KIND]:
                yield "math", f"pair, {kind}", rf"\boxed{{{text}}}", gold, expected
    rows = [json.loads(line) for line in (data / "gsm8k/train.jsonl").read_text().splitlines()]
    for case in solutions(random.Random(0).sample(rows, NUM_SOLUTIONS)):
        yield "gsm8k", *case


def measure(data: Path, show: int) -> list[dict]:
    """Counts by reward, kind and expected reward; prints `show` mistakes of each."""
    everything = list(cases(data))
    counts: dict[tuple[str, str, float], Counter[str]] = {}
    for reward in ("math", "gsm8k"):
        chosen = [case for case in everything if case[0] == reward]
        with Grader(RewardConfig(kind=reward, workers=2)) as grader:
            found = grader.grade([case[2] for case in chosen], [case[3] for case in chosen])
        for (_, kind, text, gold, expected), got in zip(chosen, found, strict=True):
            count = counts.setdefault((reward, kind, expected), Counter())
            count["cases"] += 1
            if got != expected:
                count["wrong"] += 1
                count["failed"] += got is None
                if count["wrong"] <= show:
                    print(f"{reward} {kind}: {text[-60:]!r} for {gold[-40:]!r}: {got}")
    return [
        {"reward": reward, "kind": kind, "expected": expected, "cases": count["cases"],
         "wrong": count["wrong"], "failed": count["failed"]}
        for (reward, kind, expected), count in counts.items()
    ]  # fmt: skip


def summary(rows: list[dict], before: list[dict] | None) -> str:
    """The tables: in all, then by kind."""
    old = {(row["reward"], row["kind"], row["expected"]): row["wrong"] for row in before or ()}
    total: dict[tuple[str, float], list[int]] = {}
    lines = []
    for row in rows:
        key = (row["reward"], row["kind"], row["expected"])
        numbers = total.setdefault((row["reward"], row["expected"]), [0, 0, 0])
        for i, number in enumerate((row["cases"], old.get(key, 0), row["wrong"])):
            numbers[i] += number
        lines.append([row["reward"], row["kind"], f"{row['expected']:g}", str(row["cases"]),
                      str(old[key]) if key in old else "", str(row["wrong"])])  # fmt: skip
    head = ["reward", "must earn", "cases", "wrong before", "wrong after", "share after"]
    overall = [
        [reward, f"{expected:g}", str(n), str(was) if old else "", str(now), f"{now / n:.2%}"]
        for (reward, expected), (n, was, now) in total.items()
    ]
    kinds = ["reward", "kind", "must earn", "cases", "wrong before", "wrong after"]
    return "\n".join([*table(head, overall), "", *table(kinds, lines), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the folder with eval/ and gsm8k/")
    parser.add_argument("--out", type=Path, help="write the counts here as JSON and Markdown")
    parser.add_argument("--before", type=Path, help="an earlier result to set beside this one")
    parser.add_argument("--show", type=int, default=0, help="print so many mistakes of each kind")
    arguments = parser.parse_args()
    rows = measure(arguments.data, arguments.show)
    before = json.loads(arguments.before.read_text())["rows"] if arguments.before else None
    text = summary(rows, before)
    print(text)
    if arguments.out:
        header = provenance.header(torch.device("cpu"))
        facts = "\n".join(f"- {name}: {value}" for name, value in header.items())
        provenance.save(arguments.out, header, rows, f"# Graders on rewrites\n\n{facts}\n\n{text}")


if __name__ == "__main__":
    main()
