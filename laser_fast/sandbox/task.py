r"""The sandbox: chains of arithmetic modulo 10, and a tokenizer of 33 tokens.

A problem is worked from left to right; letters label its steps:

    problem   7a*3b+4c^2=
    solution  a7*3=1b1+4=5c5^2=5\boxed{5}

It has three or four operations `+` and `*` with operands 1 to 9, and at most one rare power `^`.
Power is hardly practised before training with rewards and frequent in it, so that wrong answers,
which self-verification needs, come about by themselves. The reward "sandbox" grades.

About a tenth of all problems, chosen by a hash of their text, is held out: the split "eval" draws
only from it, everything else never.
"""

import json
import operator
import random
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Split = Literal["train", "eval"]
NUM_ROWS: dict[Split, int] = {"train": 8192, "eval": 400}

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, *RESERVED_TOKENS)
_BOX_OPEN = "\\boxed{"
TOKENS = (*SPECIAL_TOKENS, *"0123456789+-*/^=abcdefgh}", _BOX_OPEN)

_OPERATIONS = {"+": operator.add, "*": operator.mul, "^": operator.pow}
# Shares of the problems that contain a power, and of the warm-up's responses without any work.
_RARE_WARM_UP = 0.06
_RARE_TRAIN = 0.4
_ANSWER_ONLY = 0.45


def rows(split: Split, *, seed: int) -> list[dict[str, str]]:
    """Distinct problems as rows with the fields "problem" and "answer"; 40% contain a power."""
    problems = _problems(f"{split}/{seed}", held_out=split == "eval", rare=_RARE_TRAIN)
    distinct: dict[str, str] = {}
    while len(distinct) < NUM_ROWS[split]:
        problem = next(problems)
        distinct[problem] = solve(problem)[1]
    return [{"problem": problem, "answer": answer} for problem, answer in distinct.items()]


def warm_up_rows(*, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (problem, correct response) without end; 55% show their work, 6% contain a power."""
    rng = random.Random(f"sandbox/responses/{seed}")
    for problem in _problems(f"warm-up/{seed}", held_out=False, rare=_RARE_WARM_UP):
        work, answer = solve(problem)
        yield problem, ("" if rng.random() < _ANSWER_ONLY else work) + f"{_BOX_OPEN}{answer}}}"


def solve(problem: str) -> tuple[str, str]:
    """Work and answer: `solve("7a*3b+4c^2=")` is `("a7*3=1b1+4=5c5^2=5", "5")`."""
    work, value = "", int(problem[0])
    for label, symbol, operand in re.findall(r"([a-d])([+*^])(\d)", problem):
        before, value = value, _OPERATIONS[symbol](value, int(operand)) % 10
        work += f"{label}{before}{symbol}{operand}={value}"
    return work, str(value)


def make_tokenizer() -> Tokenizer:
    r"""One token per character, and `\boxed{` as one: `TOKENS`, in order of their ids.

    Nothing is put before the text, PAD is not EOS, characters outside the vocabulary are dropped.
    """
    # transformers reads the tokenizer of any Qwen2 model as Qwen2's own, byte-level BPE, whatever
    # the files say. Without merges that is one token per character; added tokens are found
    # before, which keeps `\boxed{` whole.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(_BOX_OPEN, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` loads it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(f"{folder}/tokenizer.json")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": None,
        "extra_special_tokens": list(RESERVED_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def is_held_out(problem: str) -> bool:
    """Whether the problem belongs to the tenth that only evaluation may see."""
    return blake2b(problem.encode(), digest_size=8).digest()[0] < 26


def _problems(key: str, *, held_out: bool, rare: float) -> Iterator[str]:
    """Yield problems of one class without end; `rare` is the share that contains a power."""
    rng = random.Random(f"sandbox/{key}")
    while True:
        symbols = rng.choices("+*", k=rng.choice((3, 4)))
        if rng.random() < rare:
            symbols[rng.randrange(len(symbols))] = "^"
        steps = "".join(f"{a}{s}{rng.randint(1, 9)}" for a, s in zip("abcd", symbols, strict=False))
        problem = f"{rng.randint(1, 9)}{steps}="
        if is_held_out(problem) == held_out:
            yield problem
