"""A model ready to be measured, and how it rates tokens behind given sequences.

    log pi(z | ids) = h . w_z - logsumexp(W h),   h the hidden state of the last id

One fused-head row per sequence gives the first token, and the others by their logit differences:
log pi(z) = log pi(z_0) + h . (w_z - w_{z_0}). So a scan of all reserved tokens costs one forward,
and [tokens, vocabulary] logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from laser_fast.config import Config
from laser_fast.model.distributed import World
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, load_model_config
from laser_fast.model.vocabulary import Vocabulary, load_vocabulary
from laser_fast.records import TrainingSequence
from laser_fast.rollout.engine import Engine
from laser_fast.training.run import check_lengths, make_engine
from laser_kernels import linear_logprob


def open_vocabulary(config: Config, *, has_token: bool = True) -> Vocabulary:
    """The tokenizer and special ids, after a look at the model's configuration alone.

    Without `has_token` any reserved token stands in for `score.token`.

    Raises:
        ConfigError: the model or its tokenizer cannot be measured, or the lengths do not fit.
    """
    model_config = load_model_config(config.model)
    check_lengths(config, model_config.max_position_embeddings)
    return load_vocabulary(
        config.model.path,
        score_token=config.score.token if has_token else None,
        model_config=model_config,
    )


@contextmanager
def open_engine(
    config: Config, policy: Policy, vocabulary: Vocabulary, world: World
) -> Iterator[Engine]:
    """The sampler that the configuration names, holding the policy's weights. Collective."""
    engine = make_engine(config, policy, vocabulary)
    try:
        engine.sync(policy.stream_weights(world.device))
        yield engine
    finally:
        engine.close()


def make_packer(config: Config, vocabulary: Vocabulary, world: World) -> Packer:
    """A packer for `read_last_token`."""
    return Packer(
        budget=config.optim.tokens_per_microbatch,
        score_token_id=vocabulary.score_token_id,
        temperature=1.0,
        device=world.device,
        agree=world.max,
    )


@torch.no_grad()
def read_last_token(
    policy: Policy,
    sequences: Sequence[tuple[int, ...]],
    packer: Packer,
    token_ids: Sequence[int],
    *,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Log-probs of each of C tokens after each of N sequences.

    Args:
        policy: the model.
        sequences: ids, prompt, completion and its EOS; none empty or above the packer's budget.
        packer: its budget bounds one forward; its own score token is not read.
        token_ids: the C tokens.
        on_progress: told the number of sequences of every finished forward.

    Returns:
        [N, C] float32 on the CPU. Collective: every rank calls it, with any number of sequences.
    """
    held = [_last_row(ids) for ids in sequences]
    result = torch.empty(len(held), len(token_ids))

    def head(hidden_states: Tensor, weight: Tensor) -> Tensor:
        labels = torch.full((len(hidden_states),), token_ids[0], device=hidden_states.device)
        first = linear_logprob(hidden_states, weight, labels)
        logits = hidden_states.float() @ weight[list(token_ids)].float().T
        return first[:, None] + logits - logits[:, :1]

    for members in packer.bins(held):
        batch = packer.pack([held[index] for index in members])
        result[members] = policy(batch, head).cpu()
        on_progress(len(members))
    # Without a backward nothing else would give the root's gathered parameters back.
    policy.reshard()
    return result


def _last_row(ids: tuple[int, ...]) -> TrainingSequence:
    """A sequence whose last id is the only row that reaches the head."""
    return TrainingSequence(
        prompt_ids=ids,
        completion_ids=(),
        rollout_logprobs=(),
        has_score_row=True,
        advantage=0.0,
        token_weight=0.0,
        reward=0.0,
        score_weight=0.0,
    )
