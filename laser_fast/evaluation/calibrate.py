"""`laser-fast calibrate`: c_ref, the score token and beta from an untrained model's completions.

    c_ref = mean log pi(z | prompt, completion, EOS)      over finished completions
    beta >= 1 / (|c_ref| - 3)                             so that the target c_ref + 1/beta <= -3
    noise = beta std(log pi(z | ...))                     what a constant c_ref costs in score

All reserved tokens are read from the same EOS rows in one packed forward; the proposal is the one
with the least noise at the beta of the rule. Completions of one prompt are alike, so the standard
error is that of prompt clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laser_fast.algorithm.score import WARN_TARGET
from laser_fast.config import Config, ConfigError
from laser_fast.data.prompts import PromptSource
from laser_fast.evaluation.benchmarks import find_benchmark
from laser_fast.evaluation.model import (
    make_packer,
    open_engine,
    open_vocabulary,
    read_last_token,
)
from laser_fast.evaluation.settings import build_config, refuse_overrides
from laser_fast.model.distributed import World, open_world
from laser_fast.model.policy import build_policy, load_model_config
from laser_fast.model.vocabulary import Vocabulary, reserved_tokens
from laser_fast.records import Prompt, Sampling
from laser_fast.rollout.engine import draw_seed

# The paper's beta; with c_ref near -23 the rule alone would allow half of it.
MIN_BETA = 0.1
_GIVEN_ELSEWHERE = {
    "score.token": "say --token",
    "score.beta": "say --beta",
    "score.ref_logprob": "it is what calibrate measures",
    "data.prompts_per_step": "say --prompts",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """log pi(z) over completions: of all, of one template, or of one EOS token."""

    group: str
    count: int
    mean: float
    std: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One token with its spreads, "all" first."""

    token: str
    token_id: int
    spreads: tuple[Spread, ...]

    @property
    def ref_logprob(self) -> float:
        """c_ref."""
        return self.spreads[0].mean

    @property
    def beta(self) -> float:
        """The rule's beta, rounded up to two digits and not below the paper's; inf: impossible."""
        return propose_beta(self.ref_logprob)

    @property
    def noise(self) -> float:
        """Standard deviation of an untrained model's score at that beta."""
        return self.beta * self.spreads[0].std if math.isfinite(self.beta) else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Candidates from the least to the most noise, and how many completions were read."""

    candidates: tuple[Candidate, ...]
    num_completions: int
    num_finished: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One completion; `logprobs`, one per candidate, is None if it did not end."""

    template: str
    prompt_id: str
    eos: str | None
    completion_ids: tuple[int, ...]
    logprobs: list[float] | None


def calibrate(
    model: str,
    data: str,
    *,
    token: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    data_dir: Path | None = None,
    prompts: int = 64,
    samples: int = 4,
    templates: Sequence[str] = (),
) -> Calibration | None:
    """Sample `model` on the prompts of `data`; see `laser-fast calibrate --help`.

    Returns:
        The ranked candidates; None on all ranks but the first.

    Raises:
        ConfigError: options, data or model do not fit, or no completion ended.
    """
    refuse_overrides(overrides, _GIVEN_ELSEWHERE)
    if token is not None:
        overrides = [f"score.token={token}", *overrides]
    benchmark = find_benchmark(data, data_dir=data_dir)
    settings = build_config(model, benchmark, config=config, overrides=overrides)
    with open_world() as world:
        vocabulary = open_vocabulary(settings, has_token=token is not None)
        tokens = {token: vocabulary.score_token_id}
        if token is None:
            num_rows = load_model_config(settings.model).vocab_size
            eos_token_ids = vocabulary.eos_token_ids
            tokens = reserved_tokens(vocabulary.tokenizer, eos_token_ids, num_rows=num_rows)
        drawn = [
            (template, prompt)
            for template in tuple(templates) or (settings.data.template,)
            for prompt in _prompts(settings, template, vocabulary, prompts)
        ]
        rows = _measure(drawn, list(tokens.values()), settings, vocabulary, samples, world)
        is_main = world.is_main
    return rank_candidates(rows, tokens) if is_main else None


def _prompts(config: Config, template: str, vocabulary: Vocabulary, count: int) -> list[Prompt]:
    if template != "chat" and "{prompt}" not in template:
        raise ConfigError(f"--template {template!r}: put {{prompt}} into it, or say chat")
    data = config.data.model_copy(update={"template": template, "prompts_per_step": count})
    source = PromptSource(data, vocabulary.tokenizer, seed=config.seed, split="train")
    # A small file would give its prompts again, as if they were others.
    return source.prompts(0)[: source.num_prompts]


def _measure(
    prompts: Sequence[tuple[str, Prompt]],
    token_ids: Sequence[int],
    config: Config,
    vocabulary: Vocabulary,
    samples: int,
    world: World,
) -> list[Reading]:
    """The completions of all ranks with the log-probs of the candidates after the EOS."""
    own = prompts[world.rank :: world.size]
    sampling = Sampling(
        group_size=samples,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=draw_seed(config.seed, "calibrate"),
        needs_score=False,
    )
    policy, packer = build_policy(config.model, world), make_packer(config, vocabulary, world)
    with open_engine(config, policy, vocabulary, world) as engine:
        groups = engine.generate([prompt for _, prompt in own], sampling)
    drawn = [
        (template, group.prompt, completion)
        for (template, _), group in zip(own, groups, strict=True)
        for completion in group.completions
    ]
    ended = [
        prompt.prompt_ids + completion.completion_ids
        for _, prompt, completion in drawn
        if completion.is_finished
    ]
    found = iter(read_last_token(policy, ended, packer, token_ids).tolist())
    name = vocabulary.tokenizer.convert_ids_to_tokens
    rows = [
        Reading(
            template=template,
            prompt_id=prompt.prompt_id,
            eos=name(completion.completion_ids[-1]) if completion.is_finished else None,
            completion_ids=completion.completion_ids,
            logprobs=next(found) if completion.is_finished else None,
        )
        for template, prompt, completion in drawn
    ]
    return world.gather(rows)


def rank_candidates(rows: Sequence[Reading], tokens: Mapping[str, int]) -> Calibration:
    """Spread of every candidate over all completions, by template and by EOS token.

    Args:
        rows: completions with the log-probs of all candidates.
        tokens: the candidates with their ids, in the order of the log-probs.

    Raises:
        ConfigError: no completion ended, or the model writes every candidate by itself.
    """
    finished = [row for row in rows if row.logprobs is not None]
    if not finished:
        raise ConfigError(
            f"none of {len(rows)} completions ended with an EOS token, which c_ref needs; raise "
            "rollout.max_new_tokens, or check the template"
        )
    groups: dict[str, list[int]] = {"all": list(range(len(finished)))}
    for i, row in enumerate(finished):
        groups.setdefault(f"template {row.template!r}", []).append(i)
        groups.setdefault(f"after {row.eos}", []).append(i)
    # With one template or one EOS token, that group is everything again.
    groups = {
        name: members
        for name, members in groups.items()
        if name == "all" or len(members) < len(finished)
    }
    logprobs = np.array([row.logprobs for row in finished])  # [N, C]
    # A token that the model writes by itself is not free to carry a score.
    written = {token_id for row in rows for token_id in row.completion_ids}
    candidates = [
        Candidate(
            token=token,
            token_id=token_id,
            spreads=tuple(
                spread(name, logprobs[members, c], [finished[i].prompt_id for i in members])
                for name, members in groups.items()
            ),
        )
        for c, (token, token_id) in enumerate(tokens.items())
        if token_id not in written
    ]
    if not candidates:
        raise ConfigError("every reserved token occurs in completions; name one with --token")
    return Calibration(
        candidates=tuple(sorted(candidates, key=lambda candidate: candidate.noise)),
        num_completions=len(rows),
        num_finished=len(finished),
    )


def propose_beta(ref_logprob: float) -> float:
    """Smallest beta of the rule, rounded up to two digits, at least `MIN_BETA`.

    Example: -11.7 gives 0.12 (1 / 8.7 = 0.115), -23.1 gives 0.1, -3 and above inf.
    """
    margin = WARN_TARGET - ref_logprob
    if margin <= 0:
        return math.inf
    exponent = math.floor(math.log10(1 / margin)) - 1
    # Rounding would turn an exact 0.25 into 0.26 by the last bit of a float.
    digits = math.ceil(round(1 / margin / 10**exponent, 9))
    return max(round(digits * 10**exponent, 12), MIN_BETA)


def spread(group: str, logprobs: NDArray[np.float64], clusters: Sequence[str]) -> Spread:
    """Mean, standard deviation and clustered standard error of log-probs [N].

    se^2 = P / (P - 1) sum_p (sum_{i in p} (x_i - mean))^2 / N^2 over P clusters; nan for one.
    """
    _, member_of = np.unique(clusters, return_inverse=True)
    sums = np.bincount(member_of, weights=logprobs - logprobs.mean())
    error = math.nan
    if len(sums) > 1:
        error = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(logprobs)
    return Spread(
        group=group,
        count=len(logprobs),
        mean=float(logprobs.mean()),
        std=float(logprobs.std()),
        standard_error=error,
    )
