"""Prompts by their pass rate: those that were too easy or too hard are left out once.

The pass rate of a prompt is the share of correct ones among its graded completions, when it was
last answered. Where it lies outside of [low, high] = `data.pass_rate`, the prompt is passed over
the next time that it comes up, in its next epoch, and answered again the time after. What follows
moves up, so that every step is full. Places in the streams and prompts to pass over are therefore
part of a checkpoint, with some 15 bytes for each such prompt: of all of one epoch at most. They
are the same on any number of ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from laser_fast.algorithm.score import is_correct
from laser_fast.config import DataConfig
from laser_fast.data.prompts import PromptSource
from laser_fast.records import Group, Prompt


@dataclass(kw_only=True)
class Curriculum:
    """Takes the prompts of each step from a source; what a step changes counts from `commit` on."""

    source: PromptSource
    per_step: int  # prompts over all ranks
    pass_rate: tuple[float, float]
    _places: list[int] = field(default_factory=lambda: [0, 0])  # in both streams of the source
    _outside: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a step, from where the last `commit` was."""
        self._next, self._passed_over = list(self._places), set(self._outside)

    def take(self, attempt: int) -> list[Prompt]:
        """The prompts of a step, over all ranks; those of a resampling are from the second stream.

        It ends, since a prompt is passed over once.
        """
        stream, taken = int(attempt > 0), list[Prompt]()
        while len(taken) < self.per_step:
            page, first = divmod(self._next[stream], self.per_step)
            for prompt in self.source.prompts(page, attempt=stream, rounds=stream)[first:]:
                self._next[stream] += 1
                row = _row(prompt.prompt_id)
                if row in self._passed_over:
                    self._passed_over.remove(row)
                    continue
                taken.append(prompt)
                if len(taken) == self.per_step:
                    break
        return taken

    def record(self, pass_rates: Iterable[tuple[str, float]]) -> None:
        """Take the pass rates of all ranks, by prompt_id."""
        low, high = self.pass_rate
        for prompt_id, rate in pass_rates:
            if low <= rate <= high:
                self._passed_over.discard(_row(prompt_id))
            else:
                self._passed_over.add(_row(prompt_id))

    def commit(self) -> None:
        """End a step."""
        self._places, self._outside = self._next, self._passed_over

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as JSON."""
        return {"places": self._places, "outside": sorted(self._outside)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._places, self._outside = state["places"], set(state["outside"])


def make_curriculum(config: DataConfig, source: PromptSource) -> Curriculum | None:
    """The curriculum of a run; None where every pass rate is inside."""
    if config.pass_rate == (0.0, 1.0):
        return None
    return Curriculum(source=source, per_step=config.prompts_per_step, pass_rate=config.pass_rate)


def pass_rates(groups: Sequence[Group]) -> list[tuple[str, float]]:
    """The prompt_id and the pass rate of each group that has a grade."""
    graded = {g.prompt.prompt_id: [r for r in g.rewards if r is not None] for g in groups}
    return [
        (prompt_id, float(is_correct(torch.tensor(rewards)).float().mean()))
        for prompt_id, rewards in graded.items()
        if rewards
    ]


def _row(prompt_id: str) -> str:
    """The name of a prompt without that of the epoch."""
    return prompt_id.rpartition("@")[0]
