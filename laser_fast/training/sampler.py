"""The sampler's half of a step: prompt -> sync -> rollout -> reward, with proven weights."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.config import Config
from laser_fast.data.curriculum import Curriculum
from laser_fast.data.mix import PromptMix
from laser_fast.data.prompts import PromptSource
from laser_fast.log.samples import mean_ref_logprob
from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import World
from laser_fast.model.logprobs import with_scores
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.model.vocabulary import Vocabulary
from laser_fast.records import Group, Prompt, Sampling
from laser_fast.rewards.grader import Grader, grade_groups
from laser_fast.rollout.engine import Engine, make_sampling
from laser_fast.rollout.sync import sync_engine
from laser_fast.stopping import poll_until_done
from laser_fast.training.schedule import is_due

# 256 completions put the standard error of c_ref, whose spread is .04 to 1.2 nats
# (reference measurements of the paper), at or below 0.08.
CALIBRATION_PROMPTS = 64
CALIBRATION_SAMPLES = 4


class RolloutAhead:
    """Samples the next step's completions while this step trains; at most one rollout in flight.

        policy    | update t-1 | sync t | train on the batch of t ........ | sync t+1 | train on t+1
        engine                          | sample t+1 from the weights of t |          | sample t+2

    It runs in a thread of its own, so `generate` must not be collective: HTTP to a server is fine,
    an engine that shares the training's devices or process group is not. `drain` comes before new
    weights; the next `drain` or `take` raises the rollout's error.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout-ahead")
        self._in_flight: tuple[int, Future[list[Group]]] | None = None

    def start(self, step: int, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Begin to sample the completions of `step` from the engine's current weights."""
        assert self._in_flight is None, "the rollout in flight was not taken"
        self._in_flight = step, self._pool.submit(self._engine.generate, prompts, sampling)

    def drain(self) -> None:
        """Wait until nothing is in flight; the groups stay to be taken."""
        if self._in_flight is not None:
            poll_until_done([self._in_flight[1]])

    def take(self, step: int) -> list[Group] | None:
        """Wait for the groups of `step`; None if nothing was started."""
        if self._in_flight is None:
            return None
        of_step, groups = self._in_flight
        assert of_step == step
        poll_until_done([groups])
        self._in_flight = None
        return groups.result()


@dataclass(kw_only=True)
class Sampler:
    """Samples and grades this rank's completions. Every method is collective."""

    config: Config
    world: World
    stage: StageTimer
    vocabulary: Vocabulary
    prompts: PromptSource | PromptMix
    engine: Engine
    grader: Grader
    policy: Policy
    packer: Packer
    curriculum: Curriculum | None = None
    sync_disagreement: float = 0.0  # of the last weight sync, on this rank
    staleness: int = 0  # steps between the weights that sampled the last batch and its update
    digests: dict[str, str] = field(default_factory=dict)  # of the data, by its key
    _ahead: RolloutAhead = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = RolloutAhead(self.engine)

    def sample(self, step: int) -> list[Group]:
        """Sample and grade this rank's groups of a step."""
        ahead = self.config.rollout.steps_ahead > 0
        groups = self._sample_ahead(step) if ahead else self._sample_now(step)
        self.engine.sleep()
        return groups

    def _sample_now(self, step: int) -> list[Group]:
        """Sample from the current weights, and dynamically (DAPO).

        A group whose rewards do not differ is replaced by one of a new prompt, at most
        `rollout.resample_rounds` times.
        """
        rounds = self.config.rollout.resample_rounds
        groups: dict[int, Group] = {}
        slots = list(range(self.config.data.prompts_per_step // self.world.size))
        for attempt in range(rounds + 1):
            with self.stage("prompt"):
                prompts = self._prompts(step, attempt)
            if attempt == 0:
                with self.stage("sync"):
                    self.sync(prompts)
            with self.stage("rollout"):
                sampling = self._train_sampling(step, attempt)
                sampled = self.engine.generate([prompts[slot] for slot in slots], sampling)
            graded = self.grade(sampled, with_extras=True)
            if self.curriculum:
                self.curriculum.record(graded, self.world.gather)
            groups |= zip(slots, graded, strict=True)
            slots = [slot for slot in slots if not _has_spread(groups[slot])]
            if attempt == rounds or self.world.max(len(slots)) == 0:
                break
        return [groups[slot] for slot in sorted(groups)]

    def _sample_ahead(self, step: int) -> list[Group]:
        """Take the groups that were sampled during the last step, and begin with the next ones.

        The next rollout starts as soon as the engine holds the new weights.
        """
        with self.stage("prompt"):
            prompts = self._prompts(step)
        with self.stage("rollout"):
            groups = self._ahead.take(step)
            self.staleness = int(groups is not None)
        with self.stage("sync"):
            self.sync(prompts)
        with self.stage("rollout"):
            if groups is None:
                groups = self.engine.generate(prompts, self._train_sampling(step))
            if self._may_start(step + 1):
                self._ahead.start(step + 1, self._prompts(step + 1), self._train_sampling(step + 1))
        return self.grade(groups, with_extras=True)

    def _may_start(self, step: int) -> bool:
        """Whether `step` may be sampled from weights that are one update old.

        A resumed run samples its first step from the weights of its checkpoint, so a run that is
        not interrupted does the same after every scheduled checkpoint. The two differ by one
        fresher step if a checkpoint was not scheduled: after a SIGTERM, or at the end of a run
        whose `optim.steps` was raised later.
        """
        config = self.config
        if config.checkpoint.best and is_due(step, config.data.eval_every):
            return False  # what comes before the step may be the best, and saved
        return step < config.optim.steps and not is_due(step, config.checkpoint.every)

    def sync(self, prompts: Sequence[Prompt]) -> None:
        """`sync_engine` with some of this rank's `prompts`, when no rollout is in flight."""
        if self.config.rollout.steps_ahead:
            with self.stage("rollout"):  # at its end every rank's has, since they share the server
                self._ahead.drain()
            self.world.barrier()
        self.sync_disagreement = sync_engine(
            self.engine,
            self.policy,
            prompts,
            self.config,
            self.world,
            # At its end all ranks meet: one may have left it, asked to stop.
            reading=partial(self.stage, "sync"),
        )

    def grade(self, groups: Sequence[Group], *, with_extras: bool = False) -> list[Group]:
        """The groups with their rewards; None where grading failed."""
        with self.stage("reward"):
            decode = self.vocabulary.decode
            return grade_groups(self.grader, groups, decode, with_extras=with_extras)

    def sample_scored(
        self, prompts: Sequence[Prompt], draw: Literal["calibrate", "eval"], *, group_size: int
    ) -> list[Group]:
        """Groups outside of training, with scores by engine or policy; call `sync` before."""
        is_off = self.config.rollout.score == "off"
        sampling = make_sampling(self.config, draw, group_size=group_size, needs_score=not is_off)
        with self.stage("rollout"):
            groups = self.engine.generate(prompts, sampling)
        self.engine.sleep()
        if is_off:
            groups = with_scores(self.policy, groups, self.packer, self.world)
        return groups

    def measure_ref_logprob(self) -> float:
        """c_ref: mean log pi(z_c | x, y) of the untrained model.

        Over the finished completions of about CALIBRATION_PROMPTS prompts of step 0, the same
        ones on any number of ranks.
        """
        share = self.config.data.prompts_per_step // self.world.size
        stride = max(1, self.config.data.prompts_per_step // CALIBRATION_PROMPTS)
        prompts = self._prompts(0)
        chosen = [p for i, p in enumerate(prompts, self.world.rank * share) if i % stride == 0]
        self.sync(prompts)
        groups = self.sample_scored(chosen, "calibrate", group_size=CALIBRATION_SAMPLES)
        self.stage.pop()  # of no step
        logprobs = [c.score_logprob for group in groups for c in group.completions]
        return mean_ref_logprob(self.world.gather(logprobs))

    def _prompts(self, step: int, attempt: int = 0) -> list[Prompt]:
        world, rounds = self.world, self.config.rollout.resample_rounds
        if self.curriculum:
            share = self.config.data.prompts_per_step // world.size
            return self.curriculum.take(attempt)[world.rank * share :][:share]
        return self.prompts.prompts(
            step, attempt=attempt, rounds=rounds, rank=world.rank, world_size=world.size
        )

    def _train_sampling(self, step: int, attempt: int = 0) -> Sampling:
        config, size = self.config, self.config.rollout.group_size
        scores = config.score.loss_coef > 0 and config.rollout.score != "off"
        return make_sampling(config, "train", step, attempt, group_size=size, needs_score=scores)


def _has_spread(group: Group) -> bool:
    rewards = torch.tensor([[reward or 0.0 for reward in group.totals]])
    is_graded = torch.tensor([[reward is not None for reward in group.totals]])
    return bool(has_reward_spread(rewards, is_graded))
