r"""Answers in wrappers without content, with a country's currency, and as several relations.

`\overline` is no such wrapper: it marks repeating decimals.
"""

import pytest
from answer_cases import answer_cases

from laser_fast.rewards import gsm8k, math

FIVES = r"""
\color{red}5|\color{red}{5}|{\color{red}5}|{\color{red}{5}}|\color[rgb]{1,0,0}5
\textcolor{red}{5}|\textcolor[rgb]{1,0,0}{5}|\colorbox{yellow}{$5$}|\fcolorbox{red}{white}{5}
\require{color}\color{red}5|\underline{5}|\underline 5|\underline{\underline{5}}
\underline{\text{5}}|\uline{5}|\mathbf 5|\mathrm 5|\mathbf{\underline{5}}|\mathtt{5}|\texttt{5}
\textsc{5}|\emph{5}|\ensuremath{5}|\fbox{$5$}|\framebox{5}|\smash{5}|\pmb{5}|\bold{5}|\bf 5
{\bf 5}|\rm{5}|\scriptstyle 5|\normalsize 5|\small 5|\tiny{5}|\Large{\textbf{5}}|\phantom{-}5
5\phantom{0}|5\hphantom{00}|5\vphantom{\frac12}|\mathord{5}|5 \tag{1}|5 \tag*{$\square$}
5\label{eq:a}|5\nonumber|\hfill 5|5\hskip 1em|5\vspace{2mm}|\kern 1pt 5|\noindent 5|{}5|5{}|5_{}
5^{}|5\\|5\newline|\strut 5|\style{color:red}{5}
\bbox[5px,border:2px solid red]{5}|\href{http://a}{5}|US\$5|US$5|\text{US}\$5|\text{US\$}5|\$US5
USD 5|\text{USD}~5|Rs. 5|\text{Rs. }5|5 Rs|EUR 5|\text{\$}5|\textdollar 5|HK\$5|CA\$5|5\text{,}
\underbrace{5}_{n}|\overbrace{5}^{2}|\underbrace{5}|\raisebox{1ex}{5}|\raisebox{-.5ex}[0pt][0pt]{$5$}
""".strip().replace("\n", "|")


@pytest.mark.parametrize("text", FIVES.split("|"))
def test_five_is_five_whatever_it_is_wrapped_in(text):
    completion = rf"\boxed{{{text}}}"
    assert [math.reward(completion, gold) for gold in ("5", "6", r"\frac{1}{2}")] == [1.0, 0.0, 0.0]
    assert [gsm8k.reward(completion, f"#### {gold}") for gold in ("5", "2", "1")] == [1.0, 0.0, 0.0]


ANSWERS = [
    (
        "5",
        [r"\phantom{1}5", r"\text{\$5}"],
        [
            r"5\phantom{0}0",
            r"\underline{1}5",
            r"\color{5}",
            r"\tag{5}",
            r"6\tag{5}",
            r"\phantom{5}",
            r"\textcolor{5}{6}",
            r"\color{red}-5",
            r"\overline{5}",
            r"\color{red}",
        ],
    ),
    ("-5", [r"\color{red}-5", r"\color{red}{-}5", r"-\textcolor{blue}{5}", r"-US\$5"], []),
    (
        r"\frac{1}{3}",
        [
            r"0.\overline{3}",
            r"\frac{\color{red}1}{\color{blue}3}",
            r"\frac{\mathbf 1}{\mathbf 3}",
            r"\color{red}{\frac{1}{3}}",
            r"\underline{\frac13}",
            r"\textcolor{red}{\dfrac{1}{3}}",
        ],
        [r"0.\underline{3}"],
    ),
    (r"\sin(2)", [r"\operatorname{sin}(2)"], [r"\operatorname{cos}(2)"]),
    (r"\ln 2", [r"\operatorname*{ln} 2", r"\operatorname{ln}{2}"], [r"\operatorname{exp} 2"]),
    (r"\text{Yes}", [r"\operatorname{yes}"], [r"\operatorname{no}"]),
    ("11", [r"\underbrace{11}_{2}"], [r"\underbrace{1}_{1}", r"\raisebox{11ex}{2}", "2"]),
    ("52_8", [r"52_\mathbf{8}", r"\underline{52}_8"], [r"52_\mathbf{9}"]),
    ("x^{12}", [r"x^\mathbf{12}", r"x^{\color{red}12}"], [r"x^\mathbf{1}2"]),
    (
        r"2\pi x",
        [r"2\pi\mathbf{x}", r"2\color{red}\pi x", r"2\mathbf\pi x", r"{\bf 2}\pi x"],
        [r"2\mathbf{x}"],
    ),
    (
        r"\text{Yes}",
        [r"\underline{\text{Yes}}", r"\color{red}\text{Yes}", r"{\bf Yes}", r"\fbox{Yes}"],
        [r"\underline{\text{No}}"],
    ),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} \mathbf{1} \\ \underline{2} \end{pmatrix}"],
        [r"\begin{pmatrix} \mathbf{2} \\ \underline{1} \end{pmatrix}"],
    ),
    (
        r"\$5",
        [r"US\$5", "USD 5", r"\text{US\$}5", "US$5", r"\$5\text{ USD}"],
        [r"US\$6", "EUR 5", r"\text{EUR }5", "Rs 5", "\\text{\u20ac}5", "5 cents"],
    ),
    (
        r"(-\infty,-1)\cup(1,\infty)",
        [
            "x<-1, x>1",
            "x>1,x<-1",
            r"x<-1 \text{, } x>1",
            "x<-1; 1<x",
            "y<-1, y>1",
            r"x<-1 \lor x>1",
            r"\{x | x<-1, x>1\}",
        ],
        ["x<-1", "x<-1, x>2", r"x\le-1, x>1", "x<-1 and x>1", r"x<-1\land x>1", "x>-1, x<1"],
    ),
    ("x<-1, x>1", [r"(-\infty,-1)\cup(1,\infty)"], [r"(-\infty,-1]\cup(1,\infty)", "5"]),
    ("(1,3)", ["x>1, x<3", "1<x, x<3"], ["x<1, x>3", "x>1, x>3", "x>1 or x<3"]),
    (r"x \neq 2", ["x<2, x>2"], ["x=2"]),
    (r"(-\infty,-2]\cup[3,\infty)", [r"x \leq -2,\; x \geqslant 3"], ["x<-2, x>3"]),
    (r"(-\infty,0)\cup(1,2)", ["x<0, 1<x<2"], ["x<0, 1<x<3"]),
    (r"[1,2)\cup(2,3]", [r"1\le x\le 3, x\ne 2", r"1\le x<2, 2<x\le3"], []),
    ("x>0, y>0", ["y>0, x>0"], ["x>0", "x>0, y<0"]),
]


@pytest.mark.parametrize(("text", "gold", "expected"), answer_cases(ANSWERS))
def test_what_a_wrapper_shows_counts(text, gold, expected):
    assert math.reward(rf"\boxed{{{text}}}", gold) == expected
