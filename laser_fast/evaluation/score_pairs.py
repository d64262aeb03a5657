"""`laser-fast score`: self-scores of given (prompt, response) pairs; see pairs.py for the input.

A line of the output is the input's with `score_logprob`, `score` and `reason`. Where nothing can be
read, both numbers are null and `reason` is empty, truncated or too long; else `reason` is null.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from laser_fast.algorithm.score import self_reward_score
from laser_fast.config import Config, ConfigError
from laser_fast.data.rows import open_rows
from laser_fast.evaluation.conclude import Score
from laser_fast.evaluation.last_token import read_last_token
from laser_fast.evaluation.model import LoadedModel, open_model, open_vocabulary
from laser_fast.evaluation.pairs import Pair, PairReader
from laser_fast.evaluation.settings import ModelOptions, build_config, score_of
from laser_fast.observe.jsonl import to_line
from laser_fast.records import Completion, Group, Prompt
from laser_fast.training.distributed import World, open_world
from laser_fast.training.policy import load_model_config
from laser_fast.training.vocabulary import Vocabulary

# Pairs that are packed together: enough for full microbatches, few enough to stream large files.
_CHUNK = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTotals:
    """How many pairs were scored, and how many were not, by reason."""

    num_scored: int
    unscored: dict[str, int]


def score_pairs(
    model: ModelOptions,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> ScoreTotals | None:
    """Score every line of `source` and write `out`, whole or not at all.

    Returns:
        Counts; None on all ranks but the first.

    Raises:
        ConfigError: options, model or input do not fit, or `out` exists.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another file or --overwrite it")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out}: no such folder")
    config = build_config(model)
    score = score_of(config, model)
    if score.ref_logprob is None:
        raise ConfigError("--ref-logprob auto: pairs of unknown origin cannot measure c_ref")
    if source.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{source}: expected a .jsonl or .json file")
    rows = open_rows(str(source), split="")
    partial = out.with_name(f".{out.name}.partial")
    num_scored, unscored, done = 0, Counter(), 0
    with open_world() as world:
        # Any pair that the model has positions for is welcome.
        vocabulary = open_vocabulary(_with_lengths(config, 1))
        reader = _pair_reader(config, vocabulary)
        # A bad line is found before the model is loaded.
        lengths = [len(reader.read(row).ids) for row in rows.read({})]
        if not lengths:
            raise ConfigError(f"{source}: no pairs to score")
        config = _with_lengths(config, max(lengths))
        with open_model(config, vocabulary, world) as loaded:
            lines = rows.read({})
            while chunk := list(islice(lines, _CHUNK)):
                pairs = [reader.read(row) for row in chunk]
                advance = _advance(on_progress, source.name, done, len(lengths), world)
                logprobs = _read(pairs, loaded, vocabulary, config, world, advance)
                if world.is_main:
                    with open(partial, "a" if done else "w", encoding="utf-8") as file:
                        for (_, row), pair, logprob in zip(chunk, pairs, logprobs, strict=True):
                            file.write(to_line({**row, **_result(pair, logprob, score)}))
                done += len(chunk)
                num_scored += sum(pair.reason is None for pair in pairs)
                unscored.update(pair.reason for pair in pairs if pair.reason is not None)
        is_main = world.is_main
    if not is_main:
        return None
    os.replace(partial, out)
    return ScoreTotals(num_scored=num_scored, unscored=dict(unscored))


def _pair_reader(config: Config, vocabulary: Vocabulary) -> PairReader:
    model_config = load_model_config(config.model)
    positions = model_config.max_position_embeddings
    return PairReader(
        config.data,
        vocabulary,
        # vLLM wants the score token and one that nobody reads behind the pair.
        max_tokens=positions if config.rollout.engine == "hf" else positions - 2,
        num_ids=model_config.vocab_size,
    )


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


def _read(
    pairs: Sequence[Pair],
    loaded: LoadedModel,
    vocabulary: Vocabulary,
    config: Config,
    world: World,
    advance: Callable[[int], None],
) -> list[float | None]:
    """Score log-probs of all pairs, in order; the ranks share them. Collective."""
    readable = [i for i, pair in enumerate(pairs) if pair.reason is None]
    own = readable[world.rank :: world.size]
    sequences = [pairs[i].ids for i in own]
    token_id = vocabulary.score_token_id
    if config.rollout.engine == "hf":
        found = read_last_token(
            loaded.policy, sequences, loaded.packer, [token_id], on_progress=advance
        )[:, 0].tolist()
    else:
        held = [_as_group(ids, token_id) for ids in sequences]
        found = [value for (value,) in loaded.engine.token_logprobs(held, temperature=1.0)]
        advance(len(own))
    logprobs: list[float | None] = [None] * len(pairs)
    for i, value in world.gather(list(zip(own, found, strict=True))):
        logprobs[i] = value
    return logprobs


def _as_group(ids: tuple[int, ...], token_id: int) -> Group:
    """The score token as a completion of everything before it."""
    return Group(
        prompt=Prompt(prompt_id="", text="", prompt_ids=ids, answer=""),
        completions=(
            Completion(completion_ids=(token_id,), rollout_logprobs=(0.0,), finish_reason="length"),
        ),
    )


def _result(pair: Pair, logprob: float | None, score: Score) -> dict[str, float | str | None]:
    value = None
    if logprob is not None:
        value = self_reward_score(logprob, beta=score.beta, ref_logprob=score.ref_logprob)
    return {"score_logprob": logprob, "score": value, "reason": pair.reason}


def _advance(
    on_progress: Callable[[str, int, int], None], name: str, done: int, total: int, world: World
) -> Callable[[int], None]:
    """Progress within a chunk: what one rank has read stands for all."""
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count * world.size
        on_progress(name, min(done + read, total), total)

    return advance
