"""Prompts of a step: worded, tokenized, in an order that depends only on (seed, step).

The data set is an endless stream of epochs, each its own permutation drawn from (seed, epoch).
With P = `data.prompts_per_step`, step s and attempt a of r rounds of resampling take

    positions [(s (r + 1) + a) P, (s (r + 1) + a + 1) P)

of that stream, and each rank a contiguous share of them. So a step's prompts do not depend on
what came before it, on the number of ranks or on how often earlier steps resampled, and P may
exceed the data set. Nothing has to be saved to resume.

Wording and tokenizing happen once, into a memory-mapped Arrow file in the cache of `datasets`,
named by a hash of everything that goes into it; ranks and later runs share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from laser_fast.config import ConfigError, DataConfig, WordingConfig
from laser_fast.data.rows import RowSource, answer_text, open_rows, question_text
from laser_fast.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Part of the cache's name: raise it when the same inputs give other prompts.
_FORMAT = 1
_BATCH = 1000
_FEATURES = datasets.Features(
    text=datasets.Value("string"),
    answer=datasets.Value("string"),
    prompt_ids=datasets.List(datasets.Value("int32")),
    num_tokens=datasets.Value("int32"),
)

_log = logging.getLogger(__name__)


class PromptSource:
    """The prompts of one data set: `num_prompts`, and `num_dropped` longer rows that are left out.

    Rows keep their number in the file: prompt "train-17@2" is row 17 in epoch 2. The epoch is in
    the name because sampling noise is keyed by it: a prompt that comes again, even in the same
    step, is answered differently.

    `name` opens every prompt_id and names the order together with `seed`. A step has `per_step`
    prompts over all ranks. With a `limit` only the first prompts are taken. A ConfigError names
    what is wrong with the data set, or a chat template that the tokenizer does not have.
    """

    def __init__(
        self,
        config: WordingConfig,
        tokenizer: Tokenizer,
        rows: RowSource,
        *,
        name: str,
        seed: int = 0,
        per_step: int = 1,
        limit: int = 0,
    ) -> None:
        self._name, self._seed, self._per_step = name, seed, per_step
        self._table = _load(config, tokenizer, rows)
        num_tokens = self._table.data.column("num_tokens").to_numpy()
        self._rows = np.flatnonzero(num_tokens <= config.max_prompt_tokens)
        self.num_dropped = len(num_tokens) - len(self._rows)
        if len(self._rows) == 0:
            raise ConfigError(
                f"{rows.name}: no prompt is left, all {len(num_tokens)} are longer than "
                f"data.max_prompt_tokens = {config.max_prompt_tokens} "
                f"(the shortest has {num_tokens.min()} tokens)"
            )
        self._rows = self._rows[: limit or None]
        # A step may straddle two epochs.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def num_prompts(self) -> int:
        """How many rows are left."""
        return len(self._rows)

    def drop_answers(self, are_long: Callable[[list[str]], list[bool]]) -> None:
        """Leave out the rows whose answers are too long, and count them as dropped."""
        answers = self._table.data.column("answer").to_pylist()
        answers = [answers[row] for row in self._rows]
        parts = range(0, len(answers), _BATCH)
        is_long = [long for i in parts for long in are_long(answers[i : i + _BATCH])]
        self._rows = self._rows[~np.array(is_long)]
        self.num_dropped += sum(is_long)

    def prompts(
        self, step: int, *, attempt: int = 0, rounds: int = 0, rank: int = 0, world_size: int = 1
    ) -> list[Prompt]:
        """Return this rank's contiguous share of the prompts of a step.

        Steps count from 0. `attempt` 0 gives the step's first prompts, i those of its i-th
        resampling, up to `rounds` = `rollout.resample_rounds`.
        """
        assert step >= 0 and 0 <= attempt <= rounds and 0 <= rank < world_size
        share, rest = divmod(self._per_step, world_size)
        assert rest == 0, f"{self._per_step} prompts do not divide over {world_size} ranks"
        start = (step * (rounds + 1) + attempt) * self._per_step + rank * share
        places = [divmod(i, self.num_prompts) for i in range(start, start + share)]
        rows = [int(self._rows[self._order(epoch)[index]]) for epoch, index in places]
        names = [f"{row}@{epoch}" for row, (epoch, _) in zip(rows, places, strict=True)]
        return self._fetch(rows, names)

    def all(self) -> list[Prompt]:
        """Return every prompt in the order of the file; meant for evaluation sets."""
        rows = self._rows.tolist()
        return self._fetch(rows, [str(row) for row in rows])

    def _fetch(self, rows: list[int], names: list[str]) -> list[Prompt]:
        table = self._table[rows]
        columns = zip(names, table["text"], table["prompt_ids"], table["answer"], strict=True)
        return [
            Prompt(prompt_id=f"{self._name}-{name}", text=text, prompt_ids=tuple(ids), answer=gold)
            for name, text, ids, gold in columns
        ]

    def _draw_order(self, epoch: int) -> torch.Tensor:
        """The permutation of an epoch, [num_prompts] int64."""
        name = f"{self._seed}/{self._name}/epoch {epoch}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))
        return torch.randperm(self.num_prompts, generator=generator)


def train_prompts(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> PromptSource:
    """The prompts that a run trains on."""
    rows = open_rows(config.train, split=config.train_split)
    per_step = config.prompts_per_step
    return PromptSource(config, tokenizer, rows, name="train", seed=seed, per_step=per_step)


def held_out_prompts(config: DataConfig, tokenizer: Tokenizer) -> PromptSource:
    """The prompts that a run is evaluated on, which may have fields of their own."""
    question = config.eval_prompt_field or config.prompt_field
    answer = config.eval_answer_field or config.answer_field
    own = config.model_copy(update={"prompt_field": question, "answer_field": answer})
    rows = open_rows(config.eval, split=config.eval_split)
    return PromptSource(own, tokenizer, rows, name="eval", limit=config.eval_limit)


def _load(config: WordingConfig, tokenizer: Tokenizer, rows: RowSource) -> datasets.Dataset:
    """The worded and tokenized rows of a data set, over-long ones included."""
    if config.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            'data.template = "chat", but the tokenizer has no chat template; set data.template to '
            "a text with {prompt} in it"
        )
    _log.info("%s: wording and tokenizing, unless the cache has it", rows.name)
    datasets.disable_progress_bars()  # a bar for each data set, on a screen that shows the run's
    try:
        return datasets.Dataset.from_generator(
            lambda: _tokenize(rows, config, tokenizer),
            features=_FEATURES,
            fingerprint=_fingerprint(rows, config, tokenizer),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def _tokenize(
    source: RowSource, config: WordingConfig, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield one record of `_FEATURES` per row."""
    question, answer, word = config.prompt_field, config.answer_field, wording(config, tokenizer)
    fields = {question: "data.prompt_field", answer: "data.answer_field"}
    rows = source.read(fields)
    is_empty = True
    while batch := list(islice(rows, _BATCH)):
        is_empty = False
        questions = [question_text(row, fields, question, place) for place, row in batch]
        answers = [answer_text(row, fields, answer, place) for place, row in batch]
        texts = [word(text + config.prompt_suffix) for text in questions]
        encoded = tokenizer(
            texts,
            # A chat template writes its special tokens itself.
            add_special_tokens=config.template != "chat",
            return_attention_mask=False,
            verbose=False,  # over-long prompts are counted and need no warning of their own
        )["input_ids"]
        for (place, _), text, gold, ids in zip(batch, texts, answers, encoded, strict=True):
            if not ids:
                raise ConfigError(f"{place}: the prompt {text!r:.60} has no token")
            yield {"text": text, "answer": gold, "prompt_ids": ids, "num_tokens": len(ids)}
    if is_empty:
        raise ConfigError(f"{source.name}: the data set has no rows")


def wording(config: WordingConfig, tokenizer: Tokenizer) -> Callable[[str], str]:
    """Return the function from a question to the text that the model reads."""
    if config.template != "chat":
        return lambda question: config.template.replace("{prompt}", question)
    return lambda question: str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    )


def _fingerprint(source: RowSource, config: WordingConfig, tokenizer: Tokenizer) -> str:
    """A name for everything that decides what `_tokenize` yields."""
    keys = [config.prompt_field, config.answer_field, config.prompt_suffix, config.template]
    chat_template = tokenizer.chat_template if config.template == "chat" else None
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [_FORMAT, source.identity, *keys, chat_template, vocabulary]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
