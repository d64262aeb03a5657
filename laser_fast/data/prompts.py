"""Prompts of a step: worded, tokenized, in an order that depends only on (seed, step).

The data set is an endless stream of epochs, each its own permutation drawn from (seed, epoch); of
several data sets each has one, and laser_fast/data/mix.py shares the steps out. With P =
`data.prompts_per_step`, step s takes its positions [s P, (s + 1) P), and each rank a contiguous
share of them. Round a = 1, 2, ... of r rounds of resampling takes the positions
[(s r + a - 1) P, (s r + a) P) of a second such stream, so that resampling, or none, skips no
prompt of the first. A step's prompts do not depend on what came before it, on the number of ranks
or on how often earlier steps resampled, and P may exceed the data set. Nothing has to be saved to
resume.

Wording and tokenizing happen once, into a memory-mapped Arrow file in the cache of `datasets`,
named by a hash of everything that goes into it and a hash of what came out; ranks and later runs
share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from filelock import FileLock

from laser_fast.config import ConfigError, DataConfig, WordingConfig
from laser_fast.config_errors import reading
from laser_fast.data.fields import (
    AUTO,
    Question,
    answer_text,
    fields_of,
    find_fields,
    kept,
    question_of,
)
from laser_fast.data.mix import PromptMix, short_names
from laser_fast.data.rows import RowSource, open_rows
from laser_fast.files import partial_name
from laser_fast.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Part of the cache's name: raise it when the same inputs give other prompts.
_FORMAT = 3
_BATCH = 1000
_SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "answer": pa.string(),
        "fields": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "num_tokens": pa.int32(),
    }
)
# The day that chat templates are told, which Llama's name where there is no clock: a run that is
# resumed tomorrow has the prompts of today.
_TODAY = date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_CHAT_FAILS = 'data.template = "chat": the tokenizer\'s chat template fails'
_PROBE = "Is 91 a prime?"

# Places, texts, answers and further fields of some rows.
_Worded = tuple[list[str], list[str], list[str], list[str]]

_log = logging.getLogger(__name__)


class PromptSource:
    """The prompts of one data set: `num_prompts`, and `num_dropped` longer rows that are left out.

    Rows keep their number in the file: prompt "train-17@2" is row 17 in epoch 2, and "@spare2" that
    of the second stream. The epoch is in the name because sampling noise is keyed by it: a prompt
    that comes again, even in the same step, is answered differently.

    `name` opens every prompt_id and names the order together with `seed`. A step has `per_step`
    prompts over all ranks. With a `limit` only the first prompts are taken. `asked` are the fields
    that a reward function asks for. `digest` names the texts, answers, fields and tokens of all
    rows. A ConfigError names what is wrong with the data set, or with the chat template.
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
        asked: Sequence[str] = (),
    ) -> None:
        self._name, self._seed, self._per_step = name, seed, per_step
        self._table, self.digest = _load(config, tokenizer, rows, asked)
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
        # A step may straddle two epochs of either stream.
        self._order = lru_cache(maxsize=4)(self._draw_order)

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
        stream, turn = ("", step) if attempt == 0 else ("spare", step * rounds + attempt - 1)
        start = turn * self._per_step + rank * share
        return self.at(stream, range(start, start + share))

    def at(self, stream: str, positions: Sequence[int]) -> list[Prompt]:
        """The prompts at positions of the stream "", the first, or "spare", of resampling."""
        places = [divmod(position, self.num_prompts) for position in positions]
        rows = [int(self._rows[self._order(stream, epoch)[index]]) for epoch, index in places]
        names = [f"{row}@{stream}{epoch}" for row, (epoch, _) in zip(rows, places, strict=True)]
        return self._fetch(rows, names)

    def all(self) -> list[Prompt]:
        """Return every prompt in the order of the file; meant for evaluation sets."""
        rows = self._rows.tolist()
        return self._fetch(rows, [str(row) for row in rows])

    def check_ids(self, num_rows: int) -> None:
        """Refuse prompts with tokens beyond the `num_rows` embeddings of the model."""
        largest = pa.compute.max(pa.compute.list_flatten(self._table.data.column("prompt_ids")))
        if largest.as_py() >= num_rows:
            raise ConfigError(
                f"the {self._name} prompts have tokens up to id {largest}, beyond the {num_rows} "
                "embeddings of the model; its tokenizer is of another model, or has gained tokens"
            )

    def _fetch(self, rows: list[int], names: list[str]) -> list[Prompt]:
        table = self._table[rows]
        columns = (table[name] for name in ("text", "prompt_ids", "answer", "fields"))
        return [
            Prompt(
                prompt_id=f"{self._name}-{name}",
                text=text,
                prompt_ids=tuple(ids),
                answer=gold,
                fields=fields,
            )
            for name, text, ids, gold, fields in zip(names, *columns, strict=True)
        ]

    def _draw_order(self, stream: str, epoch: int) -> torch.Tensor:
        """The permutation of an epoch, [num_prompts] int64."""
        name = f"{self._seed}/{self._name}/{stream}epoch {epoch}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))
        return torch.randperm(self.num_prompts, generator=generator)


def train_prompts(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, asked: Sequence[str] = ()
) -> PromptSource | PromptMix:
    """The prompts that a run trains on."""
    size = config.prompts_per_step

    def source(path: str, name: str) -> PromptSource:
        rows = kept(open_rows(path, split=config.train_split), config.where)
        return PromptSource(
            config, tokenizer, rows, name=name, seed=seed, per_step=size, asked=asked
        )

    if isinstance(config.train, str):
        return source(config.train, "train")
    named = zip(short_names([*config.train]), config.train.items(), strict=True)
    parts = {name: (source(path, name), weight) for name, (path, weight) in named}
    return PromptMix(parts, seed=seed, per_step=size)


def held_out_prompts(
    config: DataConfig, tokenizer: Tokenizer, *, asked: Sequence[str] = ()
) -> PromptSource:
    """The prompts that a run is evaluated on, which may have fields of their own."""
    question = config.eval_prompt_field or config.prompt_field
    answer = config.eval_answer_field or config.answer_field
    own = config.model_copy(update={"prompt_field": question, "answer_field": answer})
    rows = open_rows(config.eval, split=config.eval_split)
    return PromptSource(own, tokenizer, rows, name="eval", limit=config.eval_limit, asked=asked)


def _load(
    config: WordingConfig, tokenizer: Tokenizer, rows: RowSource, asked: Sequence[str]
) -> tuple[datasets.Dataset, str]:
    """The worded and tokenized rows of a data set, over-long ones included, and their digest."""
    if config.template == "chat" and _PROBE not in wording(config, tokenizer)(_PROBE):
        raise ConfigError(
            f"{_CHAT_FAILS}: it leaves the question out; set data.template to a text with "
            "{prompt} in it"
        )
    fields = find_fields(rows, config.prompt_field, config.answer_field)
    if AUTO in (config.prompt_field, config.answer_field):
        _log.info('%s: questions from "%s", answers from "%s"', rows.name, *fields)
        if fields[1] == "solution":  # which may be a text with the answer somewhere in it
            _log.warning("%s: the gold answers are whole solutions, if nothing else", rows.name)
        config = config.model_copy(update={"prompt_field": fields[0], "answer_field": fields[1]})
    _log.info("%s: wording and tokenizing, unless the cache has it", rows.name)
    name = _fingerprint(rows, config, tokenizer, asked)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "laser_fast"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not (found := list(folder.glob(f"{name}-*.arrow"))):
            found = [_write(folder / name, _tokenize(rows, config, tokenizer, asked))]
    table = datasets.Dataset.from_file(str(found[0]))
    if not len(table):
        raise ConfigError(f"{rows.name}: the data set has no rows")
    return table, found[0].stem.rpartition("-")[2]


def _write(path: Path, tables: Iterator[pa.Table]) -> Path:
    """Write tables into one Arrow file, whose name goes on with a hash of their content."""
    digest, partial = hashlib.blake2b(digest_size=16), partial_name(path)
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
            texts = [table[name].to_pylist() for name in ("text", "answer", "fields")]
            digest.update(json.dumps(texts).encode())
            for numbers in (table["num_tokens"], table["prompt_ids"].combine_chunks().flatten()):
                digest.update(numbers.to_numpy().tobytes())
    return partial.rename(path.with_name(f"{path.name}-{digest.hexdigest()}.arrow"))


def _tokenize(
    source: RowSource, config: WordingConfig, tokenizer: Tokenizer, asked: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield tables of `_SCHEMA`."""
    question, answer, word = config.prompt_field, config.answer_field, wording(config, tokenizer)
    fields = {question: "data.prompt_field", answer: "data.answer_field"}
    fields = dict.fromkeys(asked, "which the reward function asks for") | fields
    rows, further = source.read(fields), json.JSONEncoder(default=str).encode

    def worded() -> Iterator[_Worded]:
        while batch := list(islice(rows, _BATCH)):
            yield (
                [place for place, _ in batch],
                [word(question_of(row, fields, question, place)) for place, row in batch],
                [answer_text(row, fields, answer, place) for place, row in batch],
                [further(fields_of(row, asked, place)) for place, row in batch],
            )

    def tokenized(part: _Worded) -> pa.Table:
        places, texts, answers, further = part
        encoded = tokenizer(
            texts,
            # A chat template writes its special tokens itself.
            add_special_tokens=config.template != "chat",
            return_attention_mask=False,
            verbose=False,  # over-long prompts are counted and need no warning of their own
        )["input_ids"]
        for place, text, ids in zip(places, texts, encoded, strict=True):
            if not ids:
                of = f"of {tokenizer.name_or_path}"
                raise ConfigError(f"{place}: the prompt {text!r:.60} has no token {of}")
        columns = [texts, answers, further, encoded, list(map(len, encoded))]
        return pa.table(columns, schema=_SCHEMA)

    # Tokenizers let the interpreter go: 100k rows take 2.2 s of wall time, and 2.8 s in one thread.
    yield from _one_ahead(tokenized, worded())


def _one_ahead(work: Callable[[_Worded], pa.Table], parts: Iterable[_Worded]) -> Iterator[pa.Table]:
    """Do the work in a thread, while the next part is prepared and the last one used."""
    with ThreadPoolExecutor(1) as thread:
        pending = deque[Future[pa.Table]]()
        for part in parts:
            pending.append(thread.submit(work, part))
            if len(pending) > 1:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def wording(config: WordingConfig, tokenizer: Tokenizer) -> Callable[[Question], str]:
    """Return the function from a question to the text that the model reads.

    The suffix goes to the end of the question, or of the last message. A chat template has no
    clock: where it asks for the date, it gets one that stays the same.
    """
    if config.template != "chat":

        def fill(question: Question) -> str:
            if not isinstance(question, str):
                raise ConfigError(
                    f"data.template = {config.template!r} words text, but {config.prompt_field} "
                    'holds messages; set data.template = "chat", with a model that has a template'
                )
            return config.template.replace("{prompt}", question + config.prompt_suffix)

        return fill
    if not tokenizer.chat_template:
        raise ConfigError(
            'data.template = "chat", but the tokenizer has no chat template; set data.template to '
            "a text with {prompt} in it"
        )
    with reading(_CHAT_FAILS):
        template = tokenizer.get_chat_template()
        template = _CLOCK.sub(lambda call: repr(_TODAY.strftime(call[2])), template)
        if re.search(r"strftime_now(?!\s+is\b)", template):
            raise ValueError("it computes the format of a date, which cannot be fixed")
    own = {"messages", "add_generation_prompt", "chat_template", "tokenize", "tools"}
    told: dict[str, Any] = config.chat_template_kwargs
    if unread := [name for name in told if name in own or name not in template]:
        raise ConfigError(
            f"data.chat_template_kwargs: the chat template reads no {', '.join(unread)}; leave it "
            "out, or check the spelling"
        )

    def word(question: Question) -> str:
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
        *history, last = asked
        if last["role"] == "assistant":
            raise ConfigError(
                "a prompt of messages ends with the assistant's, which is the answer to learn; end "
                f"it with the question: {last['content']!r:.60}"
            )
        chat: list[Any] = [*history, {**last, "content": last["content"] + config.prompt_suffix}]
        with reading(_CHAT_FAILS):
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=True, **told
            )
        return str(text)

    return word


def _fingerprint(
    source: RowSource, config: WordingConfig, tokenizer: Tokenizer, asked: Sequence[str]
) -> str:
    """A name for everything that decides what `_tokenize` yields."""
    keys = [config.prompt_field, config.answer_field, config.prompt_suffix, config.template]
    keys.append(json.dumps([config.chat_template_kwargs, *asked], sort_keys=True))
    versions = [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    parts = [_FORMAT, source.identity, *keys, *versions, str(_TODAY)]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16)
    with TemporaryDirectory() as folder:  # what a tokenizer saves is all that it is made of
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()
