"""`laser-fast calibrate`: c_ref, the score token and beta from an untrained model's completions.

    c_ref = mean log pi(z | prompt, completion)           over finished completions
    beta >= 1 / (|c_ref| - 3)                             so that the target c_ref + 1/beta <= -3
    noise = beta std(log pi(z | ...))                     what a constant c_ref costs in score

All reserved tokens are read from the same rows in one packed forward; the proposal is the one
with the least noise at the beta of the rule. Completions of one prompt are alike, so the standard
error is that of prompt clusters.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laser_fast.algorithm.score import WARN_TARGET, check_score_target
from laser_fast.config import ConfigError, MeasureConfig, PromptConfig
from laser_fast.data.prompts import PromptSource
from laser_fast.data.rows import open_rows
from laser_fast.evaluation.benchmarks import Benchmark
from laser_fast.model.distributed import World, check_world, open_world
from laser_fast.model.logprobs import last_token_logprobs
from laser_fast.model.policy import build_policy, load_without_weights
from laser_fast.model.vocabulary import Vocabulary, reserved_tokens
from laser_fast.records import Prompt, ScorePosition
from laser_fast.rollout.engine import make_engine, make_sampling
from laser_fast.rollout.sync import sync_engine

# The paper's beta; with c_ref near -23 the rule by itself would allow half of it.
MIN_BETA = 0.1


class Spread(NamedTuple):
    """log pi(z) over completions."""

    num: int
    mean: float
    std: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One token with its spreads: over "all" completions first, then by template and by EOS."""

    token: str
    token_id: int
    spreads: dict[str, Spread]

    @property
    def ref_logprob(self) -> float:
        """c_ref."""
        return self.spreads["all"].mean

    @property
    def beta(self) -> float:
        """The rule's beta, which may be infinite."""
        return propose_beta(self.ref_logprob)

    def noise(self, beta: float) -> float:
        """Standard deviation of an untrained model's score."""
        return beta * self.spreads["all"].std if math.isfinite(beta) else math.inf

    def score(self, beta: float) -> dict[str, Any]:
        """What belongs into a configuration; a ConfigError if this beta cannot be trained."""
        if math.isfinite(self.ref_logprob) and not math.isfinite(beta):
            raise ConfigError(
                f"no beta keeps the target c_ref + 1/beta below {WARN_TARGET:g}: even {self.token} "
                f"has c_ref = {self.ref_logprob:.2f}; the score needs a token that the model never "
                "expects"
            )
        try:
            check_score_target(beta=beta, ref_logprob=self.ref_logprob)
        except ValueError as error:
            raise ConfigError(f"{self.token}: {error}") from None
        return {"token": self.token, "beta": beta, "ref_logprob": round(self.ref_logprob, 3)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Candidates from the least to the most noise, and how many completions were read."""

    candidates: list[Candidate]
    num_completions: int
    num_finished: int
    position: ScorePosition = "eos"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One completion; `logprobs`, one per candidate, is None if it did not end."""

    template: str
    prompt_id: str
    eos: str | None
    completion_ids: tuple[int, ...]
    logprobs: list[float] | None


def calibrate(
    config: MeasureConfig,
    data: Benchmark,
    *,
    token: str | None = None,
    prompts: int = 64,
    samples: int = 4,
    templates: Sequence[str] = (),
) -> Calibration | None:
    """Sample the model on the prompts of `data`; see `laser-fast calibrate --help`.

    With 0 `prompts`, on all. All ranks but the first return None. A ConfigError names what does not
    fit, or says that too few completions ended.
    """
    wordings = [
        PromptConfig.parse(config.data.model_dump() | {"template": text}, source="--template")
        for text in templates or (config.data.template,)
    ]
    with open_world(config.rollout.timeout_s) as world:
        check_world(config, world.size)
        model, vocabulary = load_without_weights(config, score_token=token)
        tokenizer, special = vocabulary.tokenizer, vocabulary.special
        tokens = reserved_tokens(tokenizer, special.eos_token_ids, num_rows=model.vocab_size)
        if token is not None:
            tokens = {token: special.score_token_id}
        rows = open_rows(data.source, split=config.data.eval_split)
        drawn: list[tuple[str, Prompt]] = []
        for wording in wordings:
            source = PromptSource(wording, tokenizer, rows, name="train", seed=config.seed)
            count = source.num_prompts if prompts == 0 else min(prompts, source.num_prompts)
            drawn.extend((wording.template, prompt) for prompt in source.at("", range(count)))
        own = drawn[world.rank :: world.size]
        readings = _measure(own, list(tokens.values()), config, vocabulary, samples, world)
    found = rank_candidates(readings, tokens) if world.is_main else None
    return found and replace(found, position=config.score.position)


def _measure(
    prompts: Sequence[tuple[str, Prompt]],
    token_ids: Sequence[int],
    config: MeasureConfig,
    vocabulary: Vocabulary,
    samples: int,
    world: World,
) -> list[Reading]:
    """All ranks' completions with the candidates' log-probs at their ends; `prompts` are ours."""
    sampling = make_sampling(config, "calibrate", group_size=samples, needs_score=False)
    policy = build_policy(config.model, world)
    with closing(make_engine(config, policy, vocabulary.special)) as engine:
        own = [prompt for _, prompt in prompts]
        sync_engine(engine, policy, own, config, world)
        groups = engine.generate(own, sampling)
    rows = [
        (template, prompt, completion)
        for (template, prompt), group in zip(prompts, groups, strict=True)
        for completion in group.completions
    ]
    ended = [(prompt.prompt_ids, c.completion_ids) for _, prompt, c in rows if c.is_finished]
    budget = config.optim.tokens_per_microbatch
    score_at = config.score.position
    read = last_token_logprobs(policy, ended, token_ids, world, score_at=score_at, budget=budget)
    found = iter(read.tolist())
    name = vocabulary.tokenizer.convert_ids_to_tokens
    readings = [
        Reading(
            template=template,
            prompt_id=prompt.prompt_id,
            eos=str(name(c.completion_ids[-1])) if c.is_finished else None,
            completion_ids=c.completion_ids,
            logprobs=next(found) if c.is_finished else None,
        )
        for template, prompt, c in rows
    ]
    return world.gather(readings)


def rank_candidates(rows: Sequence[Reading], tokens: Mapping[str, int]) -> Calibration:
    """Spread of every candidate over all completions, by template and by EOS token.

    `tokens` are the candidates with their ids, in the order of the rows' log-probs.
    """
    finished = [row for row in rows if row.logprobs is not None]
    if len({row.prompt_id for row in finished}) < 2:  # whose spread is the noise of the score
        raise ConfigError(
            f"{len(finished)} of {len(rows)} completions ended with an EOS token, and c_ref needs "
            "those of two prompts; take more, raise rollout.max_new_tokens or check the template"
        )
    groups: dict[str, list[int]] = {"all": list(range(len(finished)))}
    for i, row in enumerate(finished):
        groups.setdefault(f"template {row.template!r}", []).append(i)
        groups.setdefault(f"after {row.eos}", []).append(i)
    logprobs = np.array([row.logprobs for row in finished])  # [N, C]
    prompt_ids = np.array([row.prompt_id for row in finished])
    # A token that the model writes by itself is not free to carry a score.
    written = {token_id for row in rows for token_id in row.completion_ids}
    candidates = []
    for c, (token, token_id) in enumerate(tokens.items()):
        spreads = {
            name: spread(logprobs[members, c], prompt_ids[members])
            for name, members in groups.items()
            # With one template or one EOS token, that group is everything again.
            if name == "all" or len(members) < len(finished)
        }
        if token_id not in written:
            candidates.append(Candidate(token=token, token_id=token_id, spreads=spreads))
    if not candidates:
        raise ConfigError("every reserved token occurs in completions; name the score token")
    candidates.sort(key=lambda candidate: candidate.noise(candidate.beta))
    return Calibration(candidates=candidates, num_completions=len(rows), num_finished=len(finished))


def propose_beta(ref_logprob: float) -> float:
    """Smallest beta of the rule, in two digits, at least `MIN_BETA`; -11.7 gives 0.12."""
    margin = WARN_TARGET - ref_logprob
    if not 0 < margin < math.inf:
        return math.inf
    exponent = math.floor(math.log10(1 / margin)) - 1
    # Rounding would turn an exact 0.25 into 0.26 by the last bit of a float.
    digits = math.ceil(round(1 / margin / 10**exponent, 9))
    return max(round(digits * 10**exponent, 12), MIN_BETA)


def spread(logprobs: NDArray[np.float64], clusters: ArrayLike) -> Spread:
    """Mean, standard deviation and clustered standard error of log-probs [N].

    se^2 = P / (P - 1) sum_p (sum_{i in p} (x_i - mean))^2 / N^2 over P clusters; nan for one.
    """
    _, member_of = np.unique(clusters, return_inverse=True)
    sums = np.bincount(member_of, weights=logprobs - logprobs.mean())
    error = math.nan
    if len(sums) > 1:
        error = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(logprobs)
    return Spread(len(logprobs), float(logprobs.mean()), float(logprobs.std()), error)
