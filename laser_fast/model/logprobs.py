"""Log-probs that the policy gives to held completions, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.records import Completion, Group, Microbatch, TrainingSequence
from laser_fast.training.objective import linear_logprobs


@torch.no_grad()
def read_rows(policy: Policy, batches: Sequence[Microbatch]) -> list[Tensor]:
    """Log-probs [N] of the labels of each microbatch; score rows last. Collective."""
    logprobs = [policy(batch, linear_logprobs(batch)) for batch in batches]
    # Without a backward nothing else would give the root's gathered parameters back.
    policy.reshard()
    return logprobs


def read_completions(
    policy: Policy, groups: Sequence[Group], packer: Packer
) -> list[tuple[list[float], float | None]]:
    """Token log-probs and score log-prob of every completion, flattened over `groups`.

    Token log-probs are at the packer's temperature, the score is at 1 and None for unfinished
    completions. Collective: every rank calls it, with any number of groups.
    """
    sequences = [_held(group, c) for group in groups for c in group.completions]
    results: list[tuple[list[float], float | None]] = [([], None)] * len(sequences)
    bins = packer.bins(sequences)
    batches = [packer.pack([sequences[index] for index in members]) for members in bins]
    for members, batch, logprobs in zip(bins, batches, read_rows(policy, batches), strict=True):
        tokens, scores = logprobs.split([batch.num_policy_rows, len(batch.rewards)])
        scores = iter(scores.tolist())
        lengths = [len(sequences[index].completion_ids) for index in members]
        for index, own in zip(members, tokens.split(lengths), strict=True):
            score = next(scores) if sequences[index].has_score_row else None
            results[index] = (own.tolist(), score)
    return results


def with_scores(policy: Policy, groups: Sequence[Group], packer: Packer) -> list[Group]:
    """The same groups with the score log-probs of a policy forward. Collective."""
    scores = iter(score for _, score in read_completions(policy, groups, packer))
    return [
        replace(
            group,
            completions=tuple(replace(c, score_logprob=next(scores)) for c in group.completions),
        )
        for group in groups
    ]


def _held(group: Group, completion: Completion) -> TrainingSequence:
    """A completion as a sequence that trains nothing."""
    return TrainingSequence(
        prompt_ids=group.prompt.prompt_ids,
        completion_ids=completion.completion_ids,
        rollout_logprobs=completion.rollout_logprobs,
        has_score_row=completion.is_finished,
        advantage=0.0,
        token_weight=0.0,
        reward=0.0,
        score_weight=0.0,
    )
