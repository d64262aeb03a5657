"""The [P, G] tables of a step over all ranks, and what follows from them.

Every rank computes the same advantages and weights from the same tables, so nothing depends on
how prompts were shared out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laser_fast.algorithm.advantage import group_advantages, mix_advantages, overlong_penalty
from laser_fast.algorithm.loss import token_weights
from laser_fast.algorithm.score import SelfScore, class_weights
from laser_fast.config import Config
from laser_fast.model.distributed import World
from laser_fast.records import Group, TrainingSequence

# One group of so many, and at least one, shows how far policy and engine disagree. They are chosen
# by their place in the step, since those that train are not alike: their groups are the hard ones.
# Whole groups, because each computes its prompt.
PROBE_EVERY = 16


@dataclass(frozen=True, slots=True)
class StepTables:
    """What rollout and grader gave, [P, G] on the CPU; P counts the prompts of all ranks."""

    rewards: Tensor  # float32, the verifier's; 0 where grading failed
    totals: Tensor  # float32, with what further functions add
    is_graded: Tensor  # bool
    is_finished: Tensor  # bool
    lengths: Tensor  # int64, completion tokens
    logprobs: Tensor  # float32, the sampler's, summed over the tokens
    score_logprobs: Tensor  # float32; 0 where there is none
    # Of the P prompts: the data set, and the numbers of further functions for each completion.
    apart: list[tuple[str, tuple[dict[str, float | None], ...]]] = field(kw_only=True)

    @property
    def has_score_target(self) -> Tensor:
        """Completions that enter the score's MSE: finished and graded, [P, G] bool."""
        return self.is_finished & self.is_graded


def gather_tables(groups: Sequence[Group], world: World) -> StepTables:
    """Join all ranks' graded groups, in rank order, which is the order of the step's prompts."""
    group_size = len(groups[0].completions)
    rows = [
        (
            float(reward or 0.0),
            float(total or 0.0),
            reward is not None,
            completion.is_finished,
            len(completion.completion_ids),
            sum(completion.rollout_logprobs),
            completion.score_logprob or 0.0,
        )
        for group in groups
        for completion, reward, total in zip(
            group.completions, group.rewards, group.totals, strict=True
        )
    ]
    columns = zip(*world.gather(rows), strict=True)
    tables = (torch.tensor(column).reshape(-1, group_size) for column in columns)
    apart = world.gather([(group.prompt.source, group.extras) for group in groups])
    return StepTables(*tables, apart=apart)


def step_advantages(tables: StepTables, config: Config, score: SelfScore | None) -> Tensor:
    """Advantages of all completions, [P, G] float32; a `score` is mixed in. Failed grades get 0."""
    rewards = tables.totals
    if config.reward.overlong == "penalty":
        rewards = rewards + overlong_penalty(
            tables.lengths,
            max_new_tokens=config.rollout.max_new_tokens,
            buffer=config.reward.overlong_buffer,
        )
    advantages = group_advantages(rewards, is_valid=tables.is_graded, scale=config.advantage.scale)
    if score is not None:
        advantages = mix_advantages(
            advantages,
            score.of(tables.score_logprobs),
            tables.is_finished,
            tau=config.advantage.score_coef,
            min_std=config.advantage.score_min_std,
            is_valid=tables.is_graded,
            scale=config.advantage.scale,
        )
    return advantages


def step_weights(tables: StepTables, config: Config) -> tuple[Tensor, Tensor]:
    """Weights of tokens and of scores in the loss, both [P, G] float32 with their denominators.

    With several minibatches, prompt p goes to update p mod minibatches, whatever the world size;
    denominators and class balance are those of the update.
    """
    token, score = torch.zeros_like(tables.rewards), torch.zeros_like(tables.rewards)
    is_trained = tables.is_graded
    if config.reward.overlong == "mask":
        is_trained = is_trained & tables.is_finished
    for first in range(config.optim.minibatches):
        part = slice(first, None, config.optim.minibatches)
        token[part] = token_weights(
            tables.lengths[part].flatten(),
            is_trained[part].flatten(),
            aggregation=config.loss.aggregation,
            max_new_tokens=config.rollout.max_new_tokens,
        ).view_as(token[part])
        has_target = tables.has_score_target[part]
        balance = class_weights(
            tables.rewards[part], has_target, max_weight=config.score.max_class_weight
        )
        score[part] = balance / has_target.sum().clamp(min=1)
    return token, score


def training_sequences(
    groups: Sequence[Group], world: World, tables: StepTables, advantages: Tensor, config: Config
) -> list[TrainingSequence]:
    """The sequences of this rank, whose groups are its share of the rows of the tables.

    A completion whose tokens train nothing has no policy rows, unless it is a probe.
    """
    token_weight, score_weight = step_weights(tables, config)
    has_score_row = tables.has_score_target & (config.score.loss_coef > 0)
    is_probe = (torch.arange(len(advantages)) % PROBE_EVERY == 0)[:, None].expand_as(advantages)
    has_policy_rows = is_probe | (token_weight * advantages != 0)
    if config.loss.kl_coef > 0 or config.loss.entropy_coef > 0:
        has_policy_rows = torch.ones_like(has_policy_rows)
    return [
        TrainingSequence(
            prompt_ids=group.prompt.prompt_ids,
            completion_ids=completion.completion_ids,
            rollout_logprobs=completion.rollout_logprobs,
            score_at=config.score.position if has_score_row[p, g] else None,
            has_policy_rows=bool(has_policy_rows[p, g]),
            is_probe=bool(is_probe[p, g]),
            advantage=float(advantages[p, g]),
            token_weight=float(token_weight[p, g]),
            reward=float(tables.rewards[p, g]),
            score_weight=float(score_weight[p, g]),
        )
        for p, group in enumerate(groups, start=world.rank * len(groups))
        for g, completion in enumerate(group.completions)
    ]
