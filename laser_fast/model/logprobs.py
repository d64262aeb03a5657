"""What the policy says of given tokens: the one reader of log-probs, without gradients.

    log pi(z | ids) = l_z - logsumexp(l),   l the logits of the last id's hidden state

Everything is read from packed rows through the fused head, so that [tokens, vocabulary] logits
never exist. Each function is collective: every rank calls it, with any number of sequences.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laser_fast.model.distributed import World
from laser_fast.model.families import LmHead
from laser_fast.model.packing import Ids, Packer
from laser_fast.model.policy import Head, Policy, label_head
from laser_fast.records import Completion, Group, Microbatch, ScorePosition, TrainingSequence
from laser_kernels import linear_logprob


def label_logprobs(policy: Policy, batches: Sequence[Microbatch]) -> list[Tensor]:
    """Log-probs [N] of the labels of each microbatch; score rows last."""
    return list(_read(policy, batches, label_head))


def policy_logprobs(
    policy: Policy, groups: Sequence[Group], packer: Packer
) -> list[tuple[list[float], float | None]]:
    """Token log-probs and score log-prob of every completion, flattened over `groups`.

    Token log-probs are at the packer's temperature, the score is at 1 and None for unfinished
    completions.
    """
    sequences = [
        TrainingSequence(
            prompt_ids=group.prompt.prompt_ids,
            completion_ids=completion.completion_ids,
            rollout_logprobs=completion.rollout_logprobs,
            score_at=packer.score_at if completion.is_finished else None,
        )
        for group in groups
        for completion in group.completions
    ]
    results: list[tuple[list[float], float | None]] = [([], None)] * len(sequences)
    bins = packer.bins(sequences)
    batches = [packer.pack([sequences[index] for index in members]) for members in bins]
    found = label_logprobs(policy, batches)
    for members, batch, logprobs in zip(bins, batches, found, strict=True):
        tokens, score_rows = logprobs.split([len(batch.policy), len(batch.score)])
        scores = iter(score_rows.tolist())
        lengths = [len(sequences[index].completion_ids) for index in members]
        for index, own in zip(members, tokens.split(lengths), strict=True):
            score = next(scores) if sequences[index].score_at else None
            results[index] = (own.tolist(), score)
    return results


def with_scores(
    policy: Policy, groups: Sequence[Group], packer: Packer, world: World
) -> list[Group]:
    """The same groups with the score log-probs of a policy forward. Collective."""
    pairs = [(g.prompt.prompt_ids, c) for g in groups for c in g.completions if c.is_finished]
    ended = [(prompt_ids, completion.completion_ids) for prompt_ids, completion in pairs]
    token_ids, score_at = [packer.score_token_id], packer.score_at
    found = last_token_logprobs(
        policy, ended, token_ids, world, score_at=score_at, budget=packer.budget
    )
    scores = iter(found[:, 0].tolist())

    def scored(completion: Completion) -> Completion:
        if not completion.is_finished:
            return completion
        return replace(completion, score_logprob=next(scores))

    return [replace(g, completions=tuple(map(scored, g.completions))) for g in groups]


def last_token_logprobs(
    policy: Policy,
    sequences: Sequence[tuple[Ids, Ids]],
    token_ids: Sequence[int],
    world: World,
    *,
    score_at: ScorePosition,
    budget: int,
) -> Tensor:
    """Log-probs of each of C tokens at the end of each of N sequences, [N, C] float32 on the CPU.

    One row per sequence gives the first token, and the others by their logit differences:
    log pi(z) = log pi(z_0) + l_z - l_{z_0}. So a scan of all reserved tokens costs one forward.

    Args:
        policy: the model.
        sequences: prompts, and completions with their EOS; a prompt that repeats is computed once.
        token_ids: the C tokens.
        world: the ranks, which run as many forwards each.
        score_at: the row that is read.
        budget: tokens of one forward, which may exceed it for a single sequence.
    """
    rows = [
        TrainingSequence(
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            rollout_logprobs=(),
            score_at=score_at,
            has_policy_rows=False,
        )
        for prompt_ids, completion_ids in sequences
    ]
    result = torch.empty(len(rows), len(token_ids))
    packer = Packer(
        budget=max(budget, 1, *(len(prompt) + len(completion) for prompt, completion in sequences)),
        score_token_id=token_ids[0],
        score_at=score_at,
        device=world.device,
        agree=world.max,
    )

    def read(hidden_states: Tensor, head: LmHead) -> Tensor:
        labels = torch.full((len(hidden_states),), token_ids[0], device=hidden_states.device)
        first = linear_logprob(hidden_states, head.weight, labels, **head.at(1.0))
        logits = head.logits(hidden_states, list(token_ids))
        return first[:, None] + logits - logits[:, :1]

    bins = packer.bins(rows)
    batches = (packer.pack([rows[index] for index in members]) for members in bins)
    for members, found in zip(bins, _read(policy, batches, lambda batch: read), strict=True):
        result[members] = found.cpu()
    return result


def _read(
    policy: Policy, batches: Iterable[Microbatch], head_of: Callable[[Microbatch], Head[Tensor]]
) -> Iterator[Tensor]:
    """What the head function says of each microbatch."""
    for batch in batches:
        with torch.no_grad():
            yield policy(batch, head_of(batch))
    # Without a backward nothing else would give the root's gathered parameters back.
    policy.release()
