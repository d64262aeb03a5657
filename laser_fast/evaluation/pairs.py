"""(prompt, response) pairs as ids, from text or from the ids themselves.

A row has `prompt` (text, worded by data.template) or `prompt_ids`, and `response` (text) or
`completion_ids`. Ids are taken as they are and are exact. Text is tokenized, which may give other
ids than those that were sampled, and ends with the tokenizer's EOS token. Nothing can be read of

    empty      pairs without a token before the EOS
    truncated  `completion_ids` without an EOS at the end, or `finish_reason` "length"
    too long   pairs with more tokens than the model has positions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laser_fast.config import ConfigError, DataConfig
from laser_fast.data.prompts import wording
from laser_fast.data.rows import Row
from laser_fast.training.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Pair:
    """Prompt, response and EOS as ids; or the reason why there is nothing to read."""

    ids: tuple[int, ...]
    reason: str | None = None


class PairReader:
    """Turns rows into ids.

    Args:
        data: `template` and `prompt_suffix` word the prompts that come as text.
        vocabulary: of the model.
        max_tokens: longest pair that can be read.
        num_ids: rows of the model's head.
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

    def read(self, row: Row) -> Pair:
        """The pair of one row.

        Raises:
            ConfigError: a missing or broken field; the message names file, line and field.
        """
        place, fields = row
        if not isinstance(fields, dict):
            raise ConfigError(f"{place}: expected an object, got {type(fields).__name__}")
        prompt_ids = self._prompt_ids(place, fields)
        completion_ids, is_finished = self._completion_ids(place, fields)
        if not [token_id for token_id in completion_ids if token_id not in self._eos_token_ids]:
            return Pair((), "empty")
        if not is_finished or fields.get("finish_reason") == "length":
            return Pair((), "truncated")
        ids = prompt_ids + completion_ids
        return Pair(ids) if len(ids) <= self._max_tokens else Pair((), "too long")

    def _prompt_ids(self, place: str, fields: dict[str, Any]) -> tuple[int, ...]:
        if "prompt_ids" in fields:
            ids = self._ids(place, fields, "prompt_ids")
        else:
            text = _text(place, fields, "prompt")
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

    def _completion_ids(self, place: str, fields: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
        """Ids with the EOS, and whether it is there."""
        if "completion_ids" in fields:
            ids = self._ids(place, fields, "completion_ids")
            return ids, ids[-1:] != () and ids[-1] in self._eos_token_ids
        text = _text(place, fields, "response")
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids or ids[-1] not in self._eos_token_ids:
            eos = self._tokenizer.eos_token_id
            ids += (self._eos_token_ids[0] if eos is None else eos,)
        return ids, True

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


def _text(place: str, fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        ids = "prompt_ids" if name == "prompt" else "completion_ids"
        raise ConfigError(
            f'{place}: expected the field "{name}" or "{ids}", the fields are {", ".join(fields)}'
        )
    if not isinstance(fields[name], str):
        raise ConfigError(
            f'{place}: field "{name}": expected text, got {type(fields[name]).__name__}'
        )
    return fields[name]
