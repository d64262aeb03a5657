"""The tokenizer of a model and the ids that the algorithm depends on."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from laser_fast.config_errors import ConfigError, reading
from laser_fast.records import SpecialTokens

# Some tokenizers keep their reserved tokens among the ordinary added ones.
_UNUSED = re.compile(r"reserved|unused", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer and the special ids of its model."""

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens

    def decode(self, completion_ids: Sequence[int]) -> str:
        """The completion's text, without special tokens."""
        text = self.tokenizer.decode(list(completion_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; a ConfigError says that there is none."""
    with reading(f'model.path: "{path}" has no usable tokenizer'):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("")  # what is wrong with its settings may show only now
        if len(tokenizer) < 2:  # what transformers makes of nothing
            raise ValueError("its files are missing; save the tokenizer there, too")
        return tokenizer


def load_vocabulary(
    path: str, *, score_token: str | None, model_config: PreTrainedConfig
) -> Vocabulary:
    """Load the tokenizer and resolve the special ids.

    Without a `score_token` the first of `reserved_tokens` stands in, for those who sample before
    they choose one. A ConfigError says that there is no tokenizer or EOS, or that the score token
    cannot serve; of an ordinary token, which is never sampled then, it warns.
    """
    tokenizer = load_tokenizer(path)
    vocab_size = _vocab_size(tokenizer, model_config)
    eos_token_ids = find_eos_token_ids(path, tokenizer, model_config)
    reserved = reserved_tokens(tokenizer, eos_token_ids, num_rows=model_config.vocab_size)
    suggestion = f", such as {' '.join([*reserved][:4])}" if reserved else ""
    if score_token is None:
        if not reserved:
            raise ConfigError(
                f'score.token: the tokenizer of "{path}" has no reserved token; name one that '
                "ordinary text never contains"
            )
        score_token = next(iter(reserved))
    score_token_id, problem = tokenizer.get_vocab().get(score_token), ""
    if score_token_id is None:
        problem = f'is not in the tokenizer of "{path}"; choose one of its special tokens'
    elif score_token_id in eos_token_ids:
        problem = f'ends completions of "{path}"; choose another special token'
    elif score_token_id >= model_config.vocab_size:
        problem = (
            f"has id {score_token_id}, beyond the {model_config.vocab_size} rows of the model's "
            "head; resize the embeddings or choose another token"
        )
    if score_token_id is None or problem:
        raise ConfigError(f'score.token: "{score_token}" {problem}{suggestion}')
    added = tokenizer.added_tokens_decoder.get(score_token_id)
    if not (added and added.special) and not _UNUSED.search(score_token):
        warnings.warn(
            f'score.token: "{score_token}" is an ordinary token, which completions can no longer '
            f"contain; if answers may need it, choose a special one{suggestion}",
            stacklevel=2,
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= model_config.vocab_size:
        raise ConfigError(
            f'model.path: the padding token "{tokenizer.pad_token}" of "{path}" has id {pad}, '
            f"beyond the {model_config.vocab_size} rows of the model's head; set pad_token in its "
            "tokenizer_config.json to a token that is there"
        )
    special = SpecialTokens(
        score_token_id=score_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=eos_token_ids[0] if pad is None else pad,
        vocab_size=vocab_size,
    )
    return Vocabulary(tokenizer, special)


def _vocab_size(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> int:
    """Ids beyond the head, as of tokens that were added later, cannot be sampled."""
    return min(max(tokenizer.get_vocab().values()) + 1, model_config.vocab_size)


def find_eos_token_ids(
    path: str, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig
) -> tuple[int, ...]:
    """Every id that the model, its generation defaults or its tokenizer call an end.

    Some tokenizer classes bring an EOS of their own, which may be beyond the model's head.
    """
    found: list[int] = []
    vocab_size = _vocab_size(tokenizer, model_config)
    for source, ids in (
        (GENERATION_CONFIG_NAME, _generation_defaults(path).get("eos_token_id")),
        ("config.json", model_config.eos_token_id),
        ("tokenizer", tokenizer.eos_token_id),
    ):
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is None:
                continue
            if type(token_id) is not int or token_id < 0:
                raise ConfigError(
                    f'model.path: the {source} of "{path}" has the EOS id {token_id!r}; expected a '
                    "number from 0, or a list of them"
                )
            if token_id >= model_config.vocab_size or token_id in found:
                continue
            if token_id >= vocab_size:
                raise ConfigError(
                    f'model.path: "{path}" ends completions with id {token_id}, which its '
                    f"tokenizer of {vocab_size} ids does not have; check that both belong together"
                )
            found.append(token_id)
    if not found:
        raise ConfigError(
            f'model.path: "{path}" declares no EOS token; set eos_token_id in its '
            "generation_config.json, since the score is read there"
        )
    return tuple(found)


def written_eos(tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> int:
    """Of several ends the one that the chat template names, or else the tokenizer's own.

    Gemma's and Phi's templates end a turn with another than that. Of some tokenizers it ends no
    completion; then it is the first of `eos_token_ids`.
    """
    template, name = str(tokenizer.chat_template or ""), tokenizer.convert_ids_to_tokens
    ends = [i for i in (tokenizer.eos_token_id, *eos_token_ids) if i in eos_token_ids]
    return next((i for i in ends if str(name(i)) in template), ends[0])


def until_eos(ids: Sequence[int], ends: tuple[int, ...], written: int) -> tuple[int, ...]:
    """A response up to its first EOS, behind which a rendered chat goes on, or with `written`."""
    found = [ids.index(end) for end in ends if end in ids]
    return (*ids[: min(found) + 1],) if found else (*ids, written)


def _generation_defaults(path: str) -> dict[str, Any]:
    """What generation_config.json says; the file is optional."""
    with reading(f'model.path: cannot read the {GENERATION_CONFIG_NAME} of "{path}"'):
        file = cached_file(
            path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False
        )
        values = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"expected an object, got {type(values).__name__}")
    return values


def reserved_tokens(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...], *, num_rows: int
) -> dict[str, int]:
    """Special tokens, with their ids, that could serve as the score token.

    Neither an end, padding nor a begin, not written by the chat template, and with one of the
    `num_rows` rows of the model's head.
    """
    taken = {*eos_token_ids, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template)  # of several, a dict
    return {
        token.content: token_id
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if (token.special or _UNUSED.search(token.content))
        and token_id not in taken
        and token_id < num_rows
        and token.content not in template
    }
