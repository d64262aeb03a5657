"""The grading workers of one evaluation, started when first asked for and shared by benchmarks."""

from __future__ import annotations

from laser_fast.config import RewardConfig
from laser_fast.rewards import Grader


class Graders:
    """One `Grader` per reward configuration; close it, or use it as a context.

    Args:
        reward: deadline and number of workers of the comparisons of answers.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self._votes = reward.model_copy(update={"kind": "math", "format_gate": False})
        self._open: dict[RewardConfig, Grader] = {}

    def of(self, config: RewardConfig) -> Grader:
        """The grader of a configuration."""
        if config not in self._open:
            self._open[config] = Grader(config)
        return self._open[config]

    def same_answer(self, first: str, second: str) -> bool:
        """Whether two answers are the same value, by math-verify whatever the reward is.

        Equality as text, which other kinds grade by, would split the votes for 1/2 and 0.5.
        """
        return self.of(self._votes).same_answer(first, second)

    def close(self) -> None:
        """End all workers."""
        for grader in self._open.values():
            grader.close()
        self._open.clear()

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
