"""Completions of the kind gsm8k, by gold: texts that mean the same and texts that nearly do.

The kinds come from reports against other graders; bench/grader_rewrites.py counts them on data.
"""

import time

import pytest

from laser_fast.rewards import gsm8k

ANSWERS = [
    (
        "44",
        [
            r"\boxed{44 \text{ m}^2}",
            "#### 44\nAnd 3 more lines",
            "####\n44",
            "The answer is 44!",
            r"\boxed{44\%}",
            r"\boxed{44^\circ}",
            r"\boxed{44^{\circ}\text{C}}",
            "\\boxed{44\xb0}",
            r"\boxed{\text{\$}44}",
            r"\boxed{\$44.00}",
            r"\boxed{44\text{ dollars}}",
            r"\boxed{44 \text{ km/h}}",
            r"\boxed{44\ \mathrm{cm^3}}",
            "\\boxed{44 cm\xb2}",
            r"\boxed{44 \frac{\text{m}}{\text{s}^2}}",
            r"\boxed{x_1 = 44}",
            r"\boxed{\mathbf{44}}",
            r"\boxed{\text{44}}",
            r"\boxed{\textbf{44 apples}}",
            r"\boxed{44.}",
            r"\boxed{+44}",
            "**44**",
            "*44*",
            "`44`",
            "The answer is **$44**.",
            "So - 44 apples.",
            "The total:\n- 44 apples",
            "earns $44/hour.",
            "earns $44 per hour.",
            "#### 44 (out of 60)",
            "#### x = 44",
            "#### 10 + 34 = 44",
            "#### **44**",
            "#### 44%\n\nNote: 3 was ignored.",
            "#### 44<|im_end|>",
            r"\boxed{\frac{44}{1}}",
            r"\boxed{44\text{ apples and }}",
            "so\n\\boxed{\n44\n}",
            r"\boxed{44 \, \text{m}^{2}}",
            r"\boxed{44 m^2}",
            r"\boxed{44\text{ (rounded)}}",
            "it costs 44 USD",
            "it costs \u20ac44",
            "#### 44\n#### 44",
            "#### 44 ####",
            r"\boxed{44 \text{ miles}^2/\text{h}}",
            r"\boxed{44 \text{ m}^{3}\text{ of water}}",
            r"\boxed{44 \mathrm{~m}^2}",
            r"\boxed{44 \, cm^2}",
            r"\boxed{44\,\text{m}\cdot\text{s}^{-1}}",
            r"\boxed{44 \text{ CO}_2}",
            "So the total is 44 eggs.\n\n**Answer: 44**",
            "So the total is <<40+4=44>>44",
            "#### 44.00",
            r"\boxed{\text{44 km}}",
            r"\boxed{44 \, \text{m/s}^2}",
            r"\boxed{$44}",
            r"\boxed{\textbf{\$44}}",
            r"\boxed{\text{Rs. }44}",
        ],
        [
            r"\boxed{10^{9000000}}",
            r"\boxed{}",
            "44 apples\nso many \\boxed{}",
            r"\boxed{44",
            r"44 apples: \boxed{",
            r"\boxed{\frac{44}{0}}",
            "#### -44",
            r"\boxed{\frac{44}{x}}",
            r"\boxed{44^2}",
            r"\boxed{\log_{10} 44}",
            r"\boxed{x^{44}}",
        ],
    ),
    (
        "2",
        ["The answer is 44.\n\nStep 2."],
        [
            r"\boxed{44 \text{ m}^2}",
            r"\boxed{1\frac12}",
            r"\boxed{\frac12}",
            r"\boxed{2\pi}",
            r"\boxed{1,2}",
            r"\boxed{44 m^2}",
            r"\boxed{44^2}",
            r"\boxed{44 \div 2}",
        ],
    ),
    ("-5", ["#### \u22125", "\\boxed{\u20135}"], []),
    ("5", [], ["#### \u22125", r"\boxed{2^5}", r"\boxed{5!}", r"\boxed{5x}", r"\boxed{\pm 5}"]),
    (
        "1.5",
        [
            r"\boxed{1\frac12}",
            r"\boxed{1 1/2}",
            "\\boxed{1\xbd}",
            "Therefore, she has 1\xbd hours left.",
            "Therefore, she has 1.5 hours left.",
        ],
        [],
    ),
    (
        "0.5",
        [r"\boxed{\frac12}", "\\boxed{\xbd}"],
        [r"\boxed{1\frac12}", "The answer is 2 1/2 cups."],
    ),
    ("12", [], [r"\boxed{1\frac12}", r"\boxed{\frac12}"]),
    ("2.5", ["The answer is 2 1/2 cups."], []),
    (
        "1234",
        [
            r"\boxed{1 234}",
            r"\boxed{1\ 234}",
            r"\boxed{1~234}",
            r"\boxed{1\;234}",
            r"\boxed{1,\!234}",
            r"\boxed{1{,}234}",
            "#### 1,234.",
        ],
        [],
    ),
    ("234", [], [r"\boxed{1 234}"]),
    ("1234567", [r"\boxed{1\,234\,567}"], []),
    (
        "1500",
        [
            r"\boxed{1.5 \times 10^3}",
            r"\boxed{1.5 \cdot 10^{3}}",
            "\\boxed{1.5\xd710\xb3}",
            "1.5e3",
            "1.5 x 10^3",
            "It is 1.5 * 10^3 m.",
        ],
        [],
    ),
    (
        "3",
        ["it's the 3rd"],
        [
            r"\boxed{1.5 \times 10^3}",
            r"\boxed{10^3}",
            r"\boxed{3 + 4}",
            r"\boxed{3:00}",
            "that is 5 - 3",
            "that is 5 + 3",
            "that is 5 x 3",
            "that is 5*3",
            r"that is $5 \times 3$",
            r"\boxed{44 \text{ m}^{3}\text{ of water}}",
        ],
    ),
    ("10", [], [r"\boxed{1.5 \times 10^3}"]),
    ("1000", [r"\boxed{10^3}"], []),
    ("4", [], [r"\boxed{3+4}", "#### 44"]),
    (
        "7",
        [
            r"\boxed{3 + 4 = 7}",
            r"\[ 3 + 4 = 7 \]",
            r"$$\frac{14}{2} = 7$$",
            r"\begin{align*} x &= 7 \end{align*}",
            "Answer: $7$",
            r"x \approx 7",
            r"\Rightarrow 7",
            r"\boxed{7\text{ days}}",
            r"\boxed{\text{Total} = 7}",
            r"\boxed{7\;\text{hours}\;}",
            "\\boxed{\uff17}",
        ],
        [],
    ),
    ("52", [], [r"\boxed{52_8}"]),
    ("8", [], [r"\boxed{52_8}"]),
    ("16", [], [r"\boxed{\sqrt{16}}"]),
    ("0", [], [r"\boxed{3:00}", r"\boxed{1,00,000}"]),
    ("567", [], [r"\boxed{1.234.567}"]),
    ("-0.75", [r"\boxed{-\frac{3}{4}}", r"\boxed{\frac{-3}{4}}"], []),
    ("750", [r"\boxed{\dfrac{1,500}{2}}"], []),
    (
        "-44",
        [
            "profit = - 44",
            "profit: -44",
            "#### -44",
            "#### \ufe6344",
            r"\boxed{- 44}",
            r"\boxed{-\$44}",
            r"\boxed{\$-44}",
            r"\boxed{-44\text{ degrees}}",
        ],
        [r"\boxed{|{-44}|}"],
    ),
    ("-3", ["lost -$3", "lost $-3", "lost \u2212$3"], ["that is 5 - 3"]),
    ("15", ["from 12-15", "from 12\u201315"], []),
    ("45", [], ["at 3:45", r"\boxed{44 \text{ or } 45}", r"\boxed{44 and 45}"]),
    ("7000000", ["$7,000,000$."], []),
    ("7000", ["7,000 apples, or so."], []),
    ("1234.5", ["#### $1,234.50"], []),
    ("34", [], ["#### 10 + 34"]),
    (
        "0.75",
        [
            r"The final answer is $\frac{3}{4}$",
            r"The final answer is $\frac34$.",
            r"The final answer is $\boxed{\frac{9}{12}}$.",
        ],
        ["#### 3\xbe"],
    ),
    ("1/3", [r"0.\overline{3}"], []),
    ("6", [r"\boxed{6.0}"], [r"\boxed{6.0000001}", r"#### 2.5 \times 10^{6}"]),
    ("20", [r"\boxed{20\% \text{ off}}"], []),
    ("1234567.89", [r"\boxed{1,234,567.89}"], []),
    (
        "3.75",
        [
            r"\boxed{3\frac{3}{4}\text{ cups}}",
            r"\boxed{3 \dfrac{3}{4}}",
            "#### 3 3/4",
            "#### 3\xbe",
        ],
        [],
    ),
    ("2500000", ["#### 2.5 \xd7 10^6", r"#### 2.5 \times 10^{6}"], []),
    ("12000", ["#### 12 000"], []),
    ("12000.5", ["#### $12 000.50"], []),
    ("22", [], [r"\boxed{2(22)}"]),
    ("1", [], [r"\boxed{44:1}"]),
]


def _cases():
    for gold, right, wrong in ANSWERS:
        yield from ((text, gold, 1.0) for text in right)
        yield from ((text, gold, 0.0) for text in wrong)


@pytest.mark.parametrize(("text", "gold", "expected"), list(_cases()))
def test_answer(text, gold, expected):
    assert gsm8k.reward(text, gold) == expected


def test_long_prose_takes_time_that_grows_with_its_length():
    text = "She has 12 apples and 3 pears, so 12 + 3 = 15. " * 1064 + "So it is 44."
    start = time.perf_counter()
    assert gsm8k.reward(text, "44") == 1.0
    assert time.perf_counter() - start < 3  # it was half a minute
