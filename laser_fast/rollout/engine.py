"""The engine protocol: what the trainer and the evaluation ask of a sampler, and who answers.

One call order per step: `sync` (new weights in), `generate` (any number of times), `sleep` (give
the device memory back to training). Engines take token ids and return token ids; text never
passes through them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from laser_fast.config_errors import RunError
from laser_fast.model.policy import Policy
from laser_fast.records import Completion, Group, Prompt, Sampling, SpecialTokens

if TYPE_CHECKING:  # models are sampled where pydantic is not installed
    from laser_fast.config import MeasureConfig

Logprobs = Sequence[Sequence[float]]  # by completion, then by token


class DisagreementError(RunError):
    """The engine does not hold the policy's weights; nothing it samples may be trained on."""


class Engine(Protocol):
    """A sampler of completions; what holds no weights of its own inherits all but `generate`."""

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, every state_dict name, and get ready to generate.

        Collective: every rank calls it and exhausts its iterator, since producing an item may
        all-gather. An engine that shares the policy's parameters leaves the iterator untouched.
        """
        return

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt, in the order of `prompts`.

        The score token and ids beyond the tokenizer's vocabulary are never sampled. A completion
        is finished iff its last id is one of the model's EOS ids.
        """

    def sleep(self) -> None:
        """Release the device memory that it holds, until the next `sync`."""
        return

    def close(self) -> None:
        """Stop the engine for good."""
        return


@runtime_checkable
class CopyingEngine(Engine, Protocol):
    """A sampler that holds a copy of the weights, so that every sync has to be proved."""

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of given ids under the engine's current weights, one list per completion."""


def check_agreement(
    engine_logprobs: Logprobs, policy_logprobs: Logprobs, *, max_disagreement: float = math.inf
) -> float:
    """Compare log-probs of the same tokens: the mean of |log p_engine - log p_policy|, in nats.

    Stale or half-loaded weights are the silent failure of RL trainers: rewards still come in,
    ratios still look plausible. The mean is about 1e-6 in float32 and 1e-2 in bfloat16 when the
    sync works, and tenths of a nat when one tensor is stale. It is 0 without tokens, infinite if
    any log-prob is not a number, and refused above `max_disagreement`. Other numbers of tokens are
    a ValueError.
    """
    gaps = [
        (math.inf if math.isnan(theirs - ours) else abs(theirs - ours), c, t)
        for c, tokens in enumerate(zip(engine_logprobs, policy_logprobs, strict=True))
        for t, (theirs, ours) in enumerate(zip(*tokens, strict=True))
    ]
    value = sum(gap for gap, _, _ in gaps) / max(1, len(gaps))
    if value <= max_disagreement:
        return value
    gap, c, t = max(gaps)
    raise DisagreementError(
        f"engine and policy disagree by {value:.3g} nats per token, more than "
        f"rollout.max_disagreement = {max_disagreement:g}; worst is token {t} of completion {c}: "
        f"{engine_logprobs[c][t]:.4f} in the engine, {policy_logprobs[c][t]:.4f} in the policy "
        f"({gap:.3g}); the engine's weights are stale or incomplete"
    )


def make_engine(config: MeasureConfig, policy: Policy | None, tokens: SpecialTokens) -> Engine:
    """The engine that `rollout.engine` names; only "hf" samples with the policy itself."""
    rollout, max_model_len = config.rollout, config.max_sequence_tokens
    if rollout.engine == "vllm":
        from laser_fast.rollout.vllm import VllmEngine

        model, dtype = config.model.path, config.model.compute_dtype
        return VllmEngine(model, rollout, tokens, max_model_len=max_model_len, dtype=dtype)
    if rollout.engine == "vllm_server":
        from laser_fast.rollout.vllm_server import VllmServerEngine

        return VllmServerEngine(rollout, tokens, max_model_len=max_model_len)
    from laser_fast.rollout.hf import HfEngine

    assert policy is not None
    unsharded, max_num_seqs = policy.unsharded, rollout.max_num_seqs
    return HfEngine(policy.hf, tokens, max_num_seqs=max_num_seqs, unsharded=unsharded)


def make_sampling(
    config: MeasureConfig, *draw: int | str, group_size: int, needs_score: bool
) -> Sampling:
    """How the completions of a draw are sampled; `draw` names it, as for `draw_seed`.

    The draw "eval", of an evaluation, may be sampled otherwise than training is.
    """
    rollout = config.rollout
    sampling = Sampling(
        group_size=group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        seed=draw_seed(config.seed, *draw),
        score_at=config.score.position if needs_score else None,
    )
    if draw[0] != "eval":
        return sampling
    return replace(
        sampling,
        temperature=rollout.eval_temperature or rollout.temperature,
        max_new_tokens=rollout.eval_max_new_tokens or rollout.max_new_tokens,
        top_p=rollout.eval_top_p,
        top_k=rollout.eval_top_k,
        min_p=rollout.eval_min_p,
    )


def draw_seed(*parts: int | str) -> int:
    """A 63-bit seed that names one draw, such as `draw_seed(seed, "train", step, attempt)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def completion_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Seed of one completion: neighbours in a group are consecutive, as in vLLM's own `n`."""
    return (draw_seed(seed, prompt_id) >> 1) + sample


def groups_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Group]:
    """Groups of equal size from the completions of all prompts, one prompt after the other."""
    size = len(completions) // max(1, len(prompts))
    return [
        Group(prompt=prompt, completions=tuple(completions[p * size : (p + 1) * size]))
        for p, prompt in enumerate(prompts)
    ]
