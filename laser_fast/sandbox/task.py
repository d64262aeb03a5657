r"""The sandboxes: chains of arithmetic in two tasks, and a tokenizer of 33 tokens.

A problem is worked from left to right; letters label its steps:

    problem   7a*3b+4c^2=
    solution  a7*3=1b1+4=5c5^2=5\boxed{5}

A problem of "sandbox" has three or four operations `+` and `*` modulo 10 with operands 1 to 9, and
at most one rare power `^`. Power is hardly practised before training with rewards and frequent in
it, so that wrong answers, which self-verification needs, come about by themselves. What stays wrong
are powers that the model does not know, in all answers to a problem or in none.

"sandbox-hard" leaves errors that come and go within a problem: it has three to six operations `+`,
`-` and `*`, all well practised, but the warm-up's responses slip by one in every third step, as a
teacher in a hurry does, and go on from there.

The reward "sandbox" grades both.

About a tenth of all problems, chosen by a hash of their text, is held out: the split "eval" draws
only from it, everything else never.
"""

import json
import operator
import random
import re
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Split = Literal["train", "eval"]
NUM_ROWS: dict[Split, int] = {"train": 8192, "eval": 400}

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, *RESERVED_TOKENS)
_BOX_OPEN = "\\boxed{"
TOKENS = (*SPECIAL_TOKENS, *"0123456789+-*/^=abcdefgh}", _BOX_OPEN)

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "^": operator.pow}


class Task(NamedTuple):
    """What sets the problems of one task apart from another's."""

    symbols: str  # of operations, all as frequent
    lengths: tuple[int, ...]  # numbers of operations, all as frequent
    # Shares of the problems that contain a power, and of the warm-up's responses without any work.
    rare_warm_up: float
    rare: float
    answer_only: float
    slips: float  # share of the steps in the warm-up's later work whose result is one off


# Rows of the warm-up before the first slip. With slips from the first row on, a model has learnt no
# operation after 500 steps: 69% of its sums are wrong.
_SOUND_ROWS = 28_800

# By the words that name them in a configuration and on the command line.
TASKS = {
    "sandbox": Task("+*", (3, 4), rare_warm_up=0.06, rare=0.4, answer_only=0.45, slips=0.0),
    "sandbox-hard": Task(
        "+-*", (3, 4, 5, 6), rare_warm_up=0.0, rare=0.0, answer_only=0.0, slips=0.35
    ),
}


def rows(split: Split, *, seed: int, task: str = "sandbox") -> list[dict[str, str]]:
    """Distinct problems of a task as rows with the fields "problem" and "answer"."""
    problems = _problems(task, f"{split}/{seed}", held_out=split == "eval", rare=TASKS[task].rare)
    distinct: dict[str, str] = {}
    while len(distinct) < NUM_ROWS[split]:
        problem = next(problems)
        distinct[problem] = solve(problem)[1]
    return [{"problem": problem, "answer": answer} for problem, answer in distinct.items()]


def warm_up_rows(*, seed: int, task: str = "sandbox") -> Iterator[tuple[str, str]]:
    """Yield (problem, response) of a task without end; some responses show no work, or slip."""
    rng, traits = random.Random(f"{task}/responses/{seed}"), TASKS[task]

    def slip() -> int:
        return rng.choice((-1, 1)) if rng.random() < traits.slips else 0

    problems = _problems(task, f"warm-up/{seed}", held_out=False, rare=traits.rare_warm_up)
    for number, problem in enumerate(problems):
        errs = traits.slips > 0 and number >= _SOUND_ROWS
        work, answer = solve(problem, slip if errs else int)
        shown = "" if rng.random() < traits.answer_only else work
        yield problem, f"{shown}{_BOX_OPEN}{answer}}}"


def solve(problem: str, slip: Callable[[], int] = int) -> tuple[str, str]:
    """Work and answer: `solve("7a*3b+4c^2=")` is `("a7*3=1b1+4=5c5^2=5", "5")`.

    `slip()` is by how much a step errs, 0 by default; the next step goes on from what it found.
    """
    first, *steps = re.split("([a-h])", problem.removesuffix("="))
    work, value = "", int(first)
    for label, step in zip(steps[::2], steps[1::2], strict=True):
        before, value = value, (_OPERATIONS[step[0]](value, int(step[1:])) + slip()) % 10
        work += f"{label}{before}{step}={value}"
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


def _problems(task: str, key: str, *, held_out: bool, rare: float) -> Iterator[str]:
    """Yield problems of one class without end; `rare` is the share that contains a power."""
    rng = random.Random(f"{task}/{key}")
    operations, lengths, *_ = TASKS[task]
    while True:
        symbols = rng.choices(operations, k=rng.choice(lengths))
        if rng.random() < rare:
            symbols[rng.randrange(len(symbols))] = "^"
        pairs = zip("abcdefgh", symbols, strict=False)
        steps = "".join(f"{label}{symbol}{rng.randint(1, 9)}" for label, symbol in pairs)
        problem = f"{rng.randint(1, 9)}{steps}="
        if is_held_out(problem) == held_out:
            yield problem
