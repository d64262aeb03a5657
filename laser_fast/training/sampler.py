"""The sampler's half of a step: prompt -> rollout -> reward, with proven weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.config import Config, ConfigError
from laser_fast.data.prompts import PromptSource
from laser_fast.model.distributed import World
from laser_fast.model.logprobs import read_completions, with_scores
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.model.vocabulary import Vocabulary
from laser_fast.records import Completion, Group, Prompt, Sampling
from laser_fast.rewards import Grader
from laser_fast.rollout.agreement import check_agreement
from laser_fast.rollout.ahead import RolloutAhead
from laser_fast.rollout.engine import Engine, draw_seed
from laser_fast.training.stages import Stages, is_due

Rewards = list[list[float | None]]  # by group, then by completion

# 256 completions put the standard error of c_ref, whose spread is .04 to 1.2 nats
# (reference measurements of the paper), at or below 0.08.
CALIBRATION_PROMPTS = 64
CALIBRATION_SAMPLES = 4
# Prompts per rank whose tokens prove a weight sync: one stale tensor moves every token.
HELD_PROMPTS = 4


@dataclass(kw_only=True)
class Sampler:
    """Samples and grades this rank's completions."""

    config: Config
    world: World
    stages: Stages
    vocabulary: Vocabulary
    prompts: PromptSource
    engine: Engine
    grader: Grader
    policy: Policy
    packer: Packer
    sync_disagreement: float = 0.0  # of the last weight sync, on this rank
    staleness: int = 0  # steps between the weights that sampled the last batch and its update
    _ahead: RolloutAhead = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = RolloutAhead(self.engine)

    def collect(self, step: int) -> tuple[list[Group], Rewards]:
        """Sample and grade this rank's groups of a step.

        Dynamic sampling (DAPO): a group whose rewards do not differ is replaced by one of a new
        prompt, at most `rollout.resample_rounds` times.

        With `rollout.steps_ahead` the groups were sampled while the last step trained, and those
        of the next step begin as soon as the engine holds the new weights.
        """
        rounds = self.config.rollout.resample_rounds
        groups: dict[int, Group] = {}
        rewards: dict[int, list[float | None]] = {}
        slots = list(range(self.config.data.prompts_per_step // self.world.size))
        for attempt in range(rounds + 1):
            with self.stages("prompt"):
                prompts = self._prompts(step, attempt)
            early = None
            if attempt == 0:
                with self.stages("rollout"):
                    early = self._ahead.take(step)
                    self.staleness = int(early is not None)
                with self.stages("sync"):
                    self.sync(prompts)
            with self.stages("rollout"):
                sampled = early
                if sampled is None:
                    sampling = self._train_sampling(step, attempt)
                    sampled = self.engine.generate([prompts[slot] for slot in slots], sampling)
                self._start_ahead(step + 1)
            with self.stages("reward"):
                graded = self.grade(sampled)
            groups |= zip(slots, sampled, strict=True)
            rewards |= zip(slots, graded, strict=True)
            slots = [slot for slot in slots if not _has_spread(rewards[slot])]
            if attempt == rounds or self.world.max(len(slots)) == 0:
                break
        self.engine.sleep()
        return [groups[slot] for slot in sorted(groups)], [rewards[s] for s in sorted(rewards)]

    def sync(self, prompts: Sequence[Prompt]) -> None:
        """Hand the policy's weights to the engine and prove that they arrived. Collective.

        A rollout in flight ends before its weights change. Engine and policy read the log-probs
        of the tokens of a few of this rank's `prompts`, which need no sampling.

        Raises:
            DisagreementError: above `rollout.max_disagreement`.
        """
        config = self.config.rollout
        if config.steps_ahead:
            self._ahead.drain()
            self.world.barrier()  # every rank's rollout, since they share the server
        self.engine.sync(self.policy.stream_weights(self.world.device))
        if config.engine == "hf":  # samples with the policy's own parameters
            return
        held = [_as_group(prompt) for prompt in prompts[:HELD_PROMPTS]]
        self.sync_disagreement = check_agreement(
            self.engine.token_logprobs(held, temperature=config.temperature),
            [tokens for tokens, _ in read_completions(self.policy, held, self.packer)],
            max_disagreement=config.max_disagreement,
        )

    def sampling(self, *draw: int | str, group_size: int, needs_score: bool) -> Sampling:
        """How the completions of the named draw are sampled."""
        config = self.config.rollout
        return Sampling(
            group_size=group_size,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=draw_seed(self.config.seed, *draw),
            needs_score=needs_score and config.score != "off",
        )

    def _prompts(self, step: int, attempt: int) -> list[Prompt]:
        return self.prompts.prompts(
            step,
            attempt=attempt,
            rounds=self.config.rollout.resample_rounds,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _train_sampling(self, step: int, attempt: int) -> Sampling:
        return self.sampling(
            "train",
            step,
            attempt,
            group_size=self.config.rollout.group_size,
            needs_score=self.config.score.loss_coef > 0,
        )

    def _start_ahead(self, step: int) -> None:
        """Begin with `step` from the weights just synced, unless it is the first of a resumed run.

        A run that resumes from a checkpoint can only sample anew, so the undisturbed one does too.
        Not so where a checkpoint is on no schedule, after a SIGTERM or the last of `optim.steps`
        that were raised since: there one step is fresher than in the undisturbed run.
        """
        config = self.config
        if (
            config.rollout.steps_ahead
            and step < config.optim.steps
            and not is_due(step, config.checkpoint.every)
        ):
            self._ahead.start(step, self._prompts(step, 0), self._train_sampling(step, 0))

    def grade(self, groups: Sequence[Group]) -> Rewards:
        """Rewards by group and completion; None where grading failed."""
        texts = [self.vocabulary.decode(c.completion_ids) for g in groups for c in g.completions]
        answers = [group.prompt.answer for group in groups for _ in group.completions]
        prompts = [group.prompt.text for group in groups for _ in group.completions]
        grades = iter(self.grader.grade(texts, answers, prompts=prompts))
        return [[next(grades) for _ in group.completions] for group in groups]

    def sample_scored(
        self, prompts: Sequence[Prompt], *draw: int | str, group_size: int
    ) -> list[Group]:
        """Groups outside of training, with scores whoever reads them; `sync` before. Collective."""
        sampling = self.sampling(*draw, group_size=group_size, needs_score=True)
        groups = self.engine.generate(prompts, sampling)
        self.engine.sleep()
        if self.config.rollout.score == "off":
            groups = with_scores(self.policy, groups, self.packer)
        return groups

    def measure_ref_logprob(self) -> float:
        """c_ref: mean log pi(z_c | x, y) of the untrained model. Collective.

        Over the finished completions of about CALIBRATION_PROMPTS prompts of step 0, the same
        ones on any number of ranks.
        """
        share = self.config.data.prompts_per_step // self.world.size
        stride = max(1, self.config.data.prompts_per_step // CALIBRATION_PROMPTS)
        prompts = self.prompts.prompts(0, rank=self.world.rank, world_size=self.world.size)
        chosen = [p for i, p in enumerate(prompts, self.world.rank * share) if i % stride == 0]
        self.sync(prompts)
        groups = self.sample_scored(chosen, "calibrate", group_size=CALIBRATION_SAMPLES)
        found = [c.score_logprob for g in groups for c in g.completions if c.is_finished]
        sums = self.world.sum(torch.tensor([sum(found), len(found)], dtype=torch.float32))
        if sums[1] == 0:
            raise ConfigError(
                'score.ref_logprob = "auto" found no finished completion to measure; raise '
                "rollout.max_new_tokens or give a number"
            )
        return float(sums[0] / sums[1])


def _as_group(prompt: Prompt) -> Group:
    """The prompt's own tokens as a completion of its first, to read their log-probs."""
    head, tail = prompt.prompt_ids[:1], prompt.prompt_ids[1:]
    held = Completion(
        completion_ids=tail, rollout_logprobs=(0.0,) * len(tail), finish_reason="length"
    )
    return Group(prompt=replace(prompt, prompt_ids=head), completions=(held,))


def _has_spread(rewards: list[float | None]) -> bool:
    values = torch.tensor([[0.0 if reward is None else reward for reward in rewards]])
    is_graded = torch.tensor([[reward is not None for reward in rewards]])
    return bool(has_reward_spread(values, is_graded))
