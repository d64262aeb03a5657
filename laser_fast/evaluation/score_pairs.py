"""`laser-fast score`: self-scores of given (prompt, response) pairs.

A line of the input has `prompt` (text, worded by data.template) or `prompt_ids`, and `response`
(text) or `completion_ids`. Ids are taken as they are and are exact. Text is tokenized, which may
give other ids than those that were sampled, and ends with the tokenizer's EOS token.

A line of the output is the input's with `score_logprob`, `score` and `reason`. Where nothing can be
read, both numbers are null and `reason` says why; else it is null:

    empty      no token before the EOS
    truncated  `completion_ids` without an EOS at the end, or `finish_reason` "length"
    too long   more tokens than the model has positions
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from laser_fast.algorithm.score import self_reward_score
from laser_fast.config import Config, ConfigError, DataConfig
from laser_fast.data.prompts import wording
from laser_fast.data.rows import Row, open_rows
from laser_fast.evaluation.model import make_packer, open_vocabulary, read_last_token
from laser_fast.evaluation.settings import Score, build_config, score_of
from laser_fast.log.jsonl import to_line
from laser_fast.model.distributed import World, open_world
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, build_policy, load_model_config
from laser_fast.model.vocabulary import Vocabulary

# Pairs that are packed together: enough for full microbatches, few enough to stream large files.
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class ScoreTotals:
    """How many pairs were scored, and how many were not, by reason."""

    num_scored: int
    unscored: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Prompt, response and EOS as ids; or the reason why there is nothing to read."""

    ids: tuple[int, ...]
    reason: str | None = None


def score_pairs(
    model: str,
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> ScoreTotals | None:
    """Score every line of `source` and write `out`, whole or not at all.

    Returns:
        Counts; None on all ranks but the first.

    Raises:
        ConfigError: options, model or input do not fit, or `out` exists.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another file or --overwrite it")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out}: no such folder")
    settings = build_config(model, config=config, overrides=overrides)
    score = score_of(settings, may_measure=False)
    if source.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{source}: expected a .jsonl or .json file")
    rows = open_rows(str(source), split="")
    partial = out.with_name(f".{out.name}.partial")
    counts: Counter[str | None] = Counter()
    with open_world() as world:
        # Any pair that the model has positions for is welcome.
        vocabulary = open_vocabulary(_with_lengths(settings, 1))
        model_config = load_model_config(settings.model)
        read = _PairReader(
            settings.data,
            vocabulary,
            max_tokens=model_config.max_position_embeddings,
            num_ids=model_config.vocab_size,
        )
        # A bad line is found before the model is loaded.
        lengths = [len(read(row).ids) for row in rows.read({})]
        if not lengths:
            raise ConfigError(f"{source}: no pairs to score")
        settings = _with_lengths(settings, max(lengths))
        policy = build_policy(settings.model, world)
        packer = make_packer(settings, vocabulary, world)
        lines = rows.read({})
        while chunk := list(islice(lines, _CHUNK)):
            pairs, done = [read(row) for row in chunk], counts.total()

            def advance(count: int, done: int = done) -> None:
                on_progress(source.name, done + count, len(lengths))

            logprobs = _logprobs(pairs, policy, packer, vocabulary.score_token_id, world, advance)
            if world.is_main:
                with open(partial, "a" if done else "w", encoding="utf-8") as file:
                    for (_, row), pair, logprob in zip(chunk, pairs, logprobs, strict=True):
                        file.write(to_line({**row, **_result(pair, logprob, score)}))
            counts.update(pair.reason for pair in pairs)
            on_progress(source.name, counts.total(), len(lengths))
        is_main = world.is_main
    if not is_main:
        return None
    os.replace(partial, out)
    num_scored = counts.pop(None, 0)
    return ScoreTotals(num_scored, dict(counts))


def _with_lengths(config: Config, longest: int) -> Config:
    """The configuration for pairs of up to `longest` tokens."""
    longest = max(longest, 1)
    optim, data, rollout = config.optim, config.data, config.rollout
    budget = max(optim.tokens_per_microbatch, longest)
    return config.model_copy(
        update={
            "optim": optim.model_copy(update={"tokens_per_microbatch": budget}),
            "data": data.model_copy(update={"max_prompt_tokens": longest}),
            "rollout": rollout.model_copy(update={"max_new_tokens": 1}),
        }
    )


def _logprobs(
    pairs: Sequence[_Pair],
    policy: Policy,
    packer: Packer,
    token_id: int,
    world: World,
    advance: Callable[[int], None],
) -> list[float | None]:
    """Score log-probs of all pairs, in order; the ranks share them. Collective."""
    readable = [i for i, pair in enumerate(pairs) if pair.reason is None]
    own = readable[world.rank :: world.size]
    read = 0

    def on_progress(count: int) -> None:
        """What one rank has read stands for all."""
        nonlocal read
        read += count * world.size
        advance(min(read, len(pairs)))

    sequences = [pairs[i].ids for i in own]
    found = read_last_token(policy, sequences, packer, [token_id], on_progress=on_progress)
    logprobs: list[float | None] = [None] * len(pairs)
    for i, value in world.gather(list(zip(own, found[:, 0].tolist(), strict=True))):
        logprobs[i] = value
    return logprobs


def _result(pair: _Pair, logprob: float | None, score: Score) -> dict[str, float | str | None]:
    value = None
    if logprob is not None:
        value = self_reward_score(logprob, beta=score.beta, ref_logprob=score.ref_logprob)
    return {"score_logprob": logprob, "score": value, "reason": pair.reason}


class _PairReader:
    """Turns a row into ids; a ConfigError names file, line and field of what is missing or broken.

    `max_tokens` is the longest pair that can be read, `num_ids` the rows of the model's head.
    """

    def __init__(
        self, data: DataConfig, vocabulary: Vocabulary, *, max_tokens: int, num_ids: int
    ) -> None:
        self._data = data
        self._tokenizer = vocabulary.tokenizer
        self._eos_token_ids = vocabulary.eos_token_ids
        self._max_tokens = max_tokens
        self._num_ids = num_ids
        self._word = wording(data, self._tokenizer)

    def __call__(self, row: Row) -> _Pair:
        place, fields = row
        if not isinstance(fields, dict):
            raise ConfigError(f"{place}: expected an object, got {type(fields).__name__}")
        ids = self._prompt_ids(place, fields)
        completion_ids = self._completion_ids(place, fields)
        if set(completion_ids) <= set(self._eos_token_ids):
            return _Pair((), "empty")
        is_finished = completion_ids[-1] in self._eos_token_ids
        if not is_finished or fields.get("finish_reason") == "length":
            return _Pair((), "truncated")
        ids += completion_ids
        return _Pair(ids) if len(ids) <= self._max_tokens else _Pair((), "too long")

    def _prompt_ids(self, place: str, fields: dict[str, Any]) -> tuple[int, ...]:
        if "prompt_ids" in fields:
            ids = self._ids(place, fields, "prompt_ids")
        else:
            text = _text(place, fields, "prompt", "prompt_ids")
            is_chat = self._data.template == "chat"
            if is_chat and not self._tokenizer.chat_template:
                raise ConfigError(
                    f'{place}: data.template = "chat", but the tokenizer has no chat template; '
                    "give prompt_ids, or set data.template={prompt} for prompts already worded"
                )
            worded = self._word(text + self._data.prompt_suffix)
            ids = tuple(self._tokenizer(worded, add_special_tokens=not is_chat)["input_ids"])
        if not ids:
            raise ConfigError(f"{place}: the prompt has no token")
        return ids

    def _completion_ids(self, place: str, fields: dict[str, Any]) -> tuple[int, ...]:
        if "completion_ids" in fields:
            return self._ids(place, fields, "completion_ids")
        text = _text(place, fields, "response", "completion_ids")
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids or ids[-1] not in self._eos_token_ids:
            eos = self._tokenizer.eos_token_id
            ids += (self._eos_token_ids[0] if eos is None else eos,)
        return ids

    def _ids(self, place: str, fields: dict[str, Any], name: str) -> tuple[int, ...]:
        ids = fields[name]
        if not isinstance(ids, list) or not all(type(token_id) is int for token_id in ids):
            raise ConfigError(f'{place}: field "{name}": expected a list of token ids')
        if any(not 0 <= token_id < self._num_ids for token_id in ids):
            raise ConfigError(
                f'{place}: field "{name}": expected ids below {self._num_ids}, got {max(ids)} at '
                "the most; they are of another tokenizer"
            )
        return tuple(ids)


def _text(place: str, fields: dict[str, Any], name: str, ids: str) -> str:
    if name not in fields:
        raise ConfigError(
            f'{place}: expected the field "{name}" or "{ids}", the fields are {", ".join(fields)}'
        )
    if not isinstance(fields[name], str):
        raise ConfigError(
            f'{place}: field "{name}": expected text, got {type(fields[name]).__name__}'
        )
    return fields[name]
