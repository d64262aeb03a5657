"""`laser-fast score`: self-scores of given (prompt, response) pairs.

A line of the input has `prompt` (text, worded by data.template) or `prompt_ids`, and `response`
(text) or `completion_ids`. Ids are taken as they are and are exact. Text is tokenized, which may
give other ids than those that were sampled, and ends with its first EOS or gets that of the chat
template.

A line of the output is the input's with `score_logprob`, `score` and `reason`. Where nothing can be
read, both numbers are null and `reason` says why; else it is null:

    empty      no token before the EOS
    truncated  `completion_ids` without an EOS at the end, or `finish_reason` "length"
    too long   more tokens than the model has positions
    no number  the token has no finite log-prob, as one whose logit is masked
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import ConfigError, MeasureConfig, PromptConfig
from laser_fast.config_errors import reading
from laser_fast.data.fields import question_of
from laser_fast.data.prompts import wording
from laser_fast.data.rows import Row, open_rows
from laser_fast.evaluation.settings import known_ref_logprob
from laser_fast.files import partial_name
from laser_fast.log.jsonl import to_line
from laser_fast.model.distributed import check_world, open_world
from laser_fast.model.families import position_limit
from laser_fast.model.logprobs import last_token_logprobs
from laser_fast.model.packing import Ids
from laser_fast.model.policy import build_policy, load_model_config
from laser_fast.model.vocabulary import Vocabulary, load_vocabulary, until_eos, written_eos

# Pairs that a rank packs together: enough for full microbatches, few enough to stream large files.
_CHUNK = 512


class _Pair(NamedTuple):
    """Prompt, and response with EOS, as ids; or the reason why there is nothing to read."""

    ids: tuple[Ids, Ids] = ((), ())
    reason: str | None = None


def score_pairs(
    config: MeasureConfig,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, int] | None:
    """Score every line of `source` and write `out`, whole or not at all.

    Returns how many lines were "scored", and how many were not, by reason; None on all ranks but
    the first. A ConfigError names what does not fit.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another file or --overwrite it")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out.parent}: no such folder; make it, or name another file")
    ref_logprob = float(known_ref_logprob(config.score, may_measure=False))
    if source.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{source}: expected a .jsonl or .json file")
    rows = open_rows(str(source), split="")
    unfinished = partial_name(out)
    counts: Counter[str] = Counter(scored=0)
    with open_world(config.rollout.timeout_s) as world:
        check_world(config, world.size)
        model, token = load_model_config(config.model), config.score.token
        vocabulary = load_vocabulary(config.model.path, score_token=token, model_config=model)
        token_id = vocabulary.special.score_token_id
        score = SelfScore(token_id=token_id, beta=config.score.beta, ref_logprob=ref_logprob)
        limits = (model.vocab_size, position_limit(model))
        read = partial(_read, data=config.data, vocabulary=vocabulary, limits=limits)
        # A bad line is found before the model is loaded.
        num_pairs = sum(1 for _ in map(read, rows.read({})))
        if not num_pairs:
            raise ConfigError(f"{source}: no pairs to score")
        policy, budget = build_policy(config.model, world), config.optim.tokens_per_microbatch
        lines = rows.read({})
        while chunk := list(islice(lines, _CHUNK * world.size)):
            pairs, done = [read(row) for row in chunk], counts.total()
            readable = [i for i, pair in enumerate(pairs) if pair.reason is None]
            # Neighbours often share a prompt.
            share = -(-len(readable) // world.size)
            own = readable[world.rank * share : (world.rank + 1) * share]
            sequences = [pairs[i].ids for i in own]
            found = last_token_logprobs(
                policy, sequences, [token_id], world, score_at=config.score.position, budget=budget
            )
            logprobs = dict(world.gather(list(zip(own, found[:, 0].tolist(), strict=True))))
            reasons = [
                pair.reason or (None if math.isfinite(logprobs[i]) else "no number")
                for i, pair in enumerate(pairs)
            ]
            if world.is_main:
                with open(unfinished, "a" if done else "w", encoding="utf-8") as file:
                    for i, ((_, row), reason) in enumerate(zip(chunk, reasons, strict=True)):
                        logprob = None if reason else logprobs[i]
                        value = None if logprob is None else score.of(logprob)
                        line = {"score_logprob": logprob, "score": value, "reason": reason}
                        file.write(to_line({**row, **line}))
            counts.update(reason or "scored" for reason in reasons)
            on_progress(source.name, counts.total(), num_pairs)
    if not world.is_main:
        return None
    unfinished.replace(out)
    return dict(counts)


def _read(row: Row, data: PromptConfig, vocabulary: Vocabulary, limits: tuple[int, int]) -> _Pair:
    """A row as ids; a ConfigError names file, line and field of what is missing or broken."""
    (place, fields), (num_ids, num_positions) = row, limits
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: expected an object, got {type(fields).__name__}")
    tokenizer, eos_token_ids = vocabulary.tokenizer, vocabulary.special.eos_token_ids
    if "prompt_ids" in fields:
        prompt = _ids(place, fields, "prompt_ids", num_ids)
    else:
        question = question_of(fields, {"prompt": "or prompt_ids"}, "prompt", place)
        worded, adds_bos = wording(data, tokenizer)(question), data.template != "chat"
        prompt = tuple(tokenizer(worded, add_special_tokens=adds_bos)["input_ids"])
    if not prompt:
        raise ConfigError(f"{place}: the prompt has no token")
    if "completion_ids" in fields:
        response = _ids(place, fields, "completion_ids", num_ids)
    else:
        text = fields.get("response")
        if not isinstance(text, str):
            raise ConfigError(
                f'{place}: expected a text "response" or "completion_ids", got {text!r:.60}'
            )
        with reading(f'{place}: field "response"'):  # which may be no Unicode
            response = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        response = until_eos(response, eos_token_ids, written_eos(tokenizer, eos_token_ids))
    if {*response} <= {*eos_token_ids}:
        return _Pair(reason="empty")
    if response[-1] not in eos_token_ids or fields.get("finish_reason") == "length":
        return _Pair(reason="truncated")
    if len(prompt) + len(response) > num_positions:
        return _Pair(reason="too long")
    return _Pair((prompt, response))


def _ids(place: str, fields: dict[str, Any], name: str, num_ids: int) -> Ids:
    ids = fields[name]
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < num_ids for i in ids):
        raise ConfigError(
            f'{place}: field "{name}": expected a list of ids below the {num_ids} of this model, '
            f"got {ids!r:.60}"
        )
    return tuple(ids)
