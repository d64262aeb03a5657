r"""The sandbox: chains of arithmetic modulo 10, a verifier, and a tokenizer of 33 tokens.

A problem is worked from left to right; letters label its steps:

    problem   7a*3b+4c^2=
    solution  a7*3=1b1+4=5c5^2=5\boxed{5}

Three or four operations `+` and `*` with operands 1 to 9, and at most one rare power `^`. Power
is hardly practised before training with rewards and frequent in it, so that wrong answers, which
self-verification needs, come about by themselves.

About a tenth of all problems, chosen by a hash of their text, is held out: the split "eval" draws
only from it, everything else never.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

NUM_TRAIN_ROWS = 8192
NUM_EVAL_ROWS = 400

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, *RESERVED_TOKENS)
_BOX_OPEN = "\\boxed{"
TOKENS = (*SPECIAL_TOKENS, *"0123456789+-*/^=abcdefgh}", _BOX_OPEN)

_STEP_LABELS = "abcd"
_RARE_WARM_UP = 0.06
_RARE_TRAIN = 0.4
_ANSWER_ONLY = 0.45
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Chain:
    """One problem: a first value and its operations.

    Example: `Chain(7, (("*", 3), ("+", 4), ("^", 2)))` is `7a*3b+4c^2=` with answer 5.
    """

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def problem(self) -> str:
        """The text that the model is given."""
        steps = zip(_STEP_LABELS, self.operations, strict=False)
        return str(self.first) + "".join(f"{a}{op}{b}" for a, (op, b) in steps) + "="

    @property
    def values(self) -> list[int]:
        """The running value modulo 10, `first` included."""
        values = [self.first]
        for operator, operand in self.operations:
            values.append(_apply(operator, values[-1], operand))
        return values

    @property
    def answer(self) -> str:
        """The last running value."""
        return str(self.values[-1])

    @property
    def boxed_answer(self) -> str:
        r"""The whole response of one who shows no work: `\boxed{5}`."""
        return f"{_BOX_OPEN}{self.answer}}}"

    @property
    def solution(self) -> str:
        """Every step with its running values, then the boxed answer."""
        values = self.values
        steps = zip(_STEP_LABELS, self.operations, values, values[1:], strict=False)
        work = "".join(f"{a}{x}{op}{b}={y}" for a, (op, b), x, y in steps)
        return work + self.boxed_answer

    @property
    def is_held_out(self) -> bool:
        """Whether the problem belongs to the tenth that only evaluation may see."""
        return blake2b(self.problem.encode(), digest_size=8).digest()[0] < 26


def rows(split: Literal["train", "eval"], *, seed: int) -> list[dict[str, str]]:
    """Distinct problems as rows with the fields "problem" and "answer".

    "train" has 8192 rows, "eval" 400 of the held-out class; a power occurs in 40% of both.
    """
    num_rows = {"train": NUM_TRAIN_ROWS, "eval": NUM_EVAL_ROWS}[split]
    draws = _chains(f"{split}/{seed}", held_out=split == "eval", rare=_RARE_TRAIN)
    distinct: dict[str, str] = {}
    while len(distinct) < num_rows:
        chain = next(draws)
        distinct[chain.problem] = chain.answer
    return [{"problem": problem, "answer": answer} for problem, answer in distinct.items()]


def warm_up_rows(*, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (problem, correct response) without end, to imitate before training with rewards.

    55% show their work, the others give only the answer; a power occurs in 6%.
    """
    rng = random.Random(f"sandbox/responses/{seed}")
    for chain in _chains(f"warm-up/{seed}", held_out=False, rare=_RARE_WARM_UP):
        is_bare = rng.random() < _ANSWER_ONLY
        yield chain.problem, chain.boxed_answer if is_bare else chain.solution


def reward(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    r"""1 for a text with exactly one `\boxed{}`, at its very end, that holds the answer; else 0.

    The texts are decoded without special tokens.

    Raises:
        ValueError: not as many answers as completions.
    """
    if len(completions) != len(answers):
        raise ValueError(
            f"reward: expected one answer per completion, got {len(answers)} answers for "
            f"{len(completions)} completions"
        )
    return [
        float(_is_correct(text, answer)) for text, answer in zip(completions, answers, strict=True)
    ]


def write_tokenizer(folder: str | Path) -> None:
    r"""Write a character-level tokenizer that `AutoTokenizer.from_pretrained(folder)` loads.

    33 tokens: `TOKENS`, in order of their ids. `\boxed{` is one token, nothing is put before the
    text, PAD is not EOS. Characters outside the vocabulary are dropped.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # transformers reads the tokenizer of any Qwen2 model as Qwen2's own, byte-level BPE, whatever
    # the files say. Without merges that is one token per character; added tokens are found
    # before, which keeps `\boxed{` whole.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(_BOX_OPEN, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": None,
        "extra_special_tokens": list(RESERVED_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _chains(key: str, *, held_out: bool, rare: float) -> Iterator[Chain]:
    """Yield problems of one class without end; `rare` is the share that contains a power."""
    rng = random.Random(f"sandbox/{key}")
    while True:
        operators = rng.choices("+*", k=rng.choice((3, 4)))
        if rng.random() < rare:
            operators[rng.randrange(len(operators))] = "^"
        operations = tuple((operator, rng.randint(1, 9)) for operator in operators)
        chain = Chain(rng.randint(1, 9), operations)
        if chain.is_held_out == held_out:
            yield chain


def _apply(operator: str, value: int, operand: int) -> int:
    if operator == "+":
        return (value + operand) % 10
    if operator == "*":
        return value * operand % 10
    assert operator == "^"
    return pow(value, operand, 10)


def _is_correct(text: str, answer: str) -> bool:
    boxes = list(_BOXED.finditer(text))
    return (
        text.count(_BOX_OPEN) == len(boxes) == 1
        and boxes[0].end() == len(text)
        and boxes[0].group(1) == answer
    )
