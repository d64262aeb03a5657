"""Prompts by pass rate: those that were too easy or too hard are left out once.

Where the share of correct completions of a prompt, when it was last answered, lies outside of
`data.pass_rate`, the prompt is passed over the next time that it comes up, in its next epoch, and
what follows moves up. A checkpoint holds the places in the streams and the prompts to pass over, 15
bytes each and one epoch's at most. All is the same on any number of ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from typing_extensions import TypedDict

from laser_fast.algorithm.score import is_correct
from laser_fast.config import DataConfig
from laser_fast.data.mix import PromptMix
from laser_fast.data.prompts import PromptSource
from laser_fast.records import Group, Prompt


class Progress(TypedDict):
    """What a checkpoint holds."""

    places: tuple[int, int]
    outside: list[str]


class Curriculum:
    """Takes the prompts of each step from a source; `state` is JSON and changes with `commit`."""

    def __init__(self, source: PromptSource | PromptMix, config: DataConfig) -> None:
        self._source, self._size, self._range = source, config.prompts_per_step, config.pass_rate
        self.state: Progress = {"places": (0, 0), "outside": []}

    def take(self, attempt: int) -> list[Prompt]:
        """The prompts of a step, over all ranks, or of a round of its resampling."""
        if attempt == 0:
            self._places, self._outside = [*self.state["places"]], {*self.state["outside"]}
        stream, taken = int(attempt > 0), list[Prompt]()
        while len(taken) < self._size:  # it ends, since a prompt is passed over once
            page, first = divmod(self._places[stream], self._size)
            found = self._source.prompts(page, attempt=stream, rounds=stream)
            for prompt in found[first:][: self._size - len(taken)]:
                self._places[stream] += 1
                if (row := _row(prompt)) in self._outside:
                    self._outside.remove(row)
                else:
                    taken.append(prompt)
        return taken

    def record(self, groups: Sequence[Group], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Take the graded groups of a rank; `gather` joins what is known of those of all."""
        low, high = self._range
        graded = [(_row(g.prompt), [r for r in g.rewards if r is not None]) for g in groups]
        for row, rewards in gather(graded):
            if rewards:
                is_inside = low <= float(is_correct(torch.tensor(rewards)).double().mean()) <= high
                (self._outside.discard if is_inside else self._outside.add)(row)

    def commit(self) -> None:
        """End a step."""
        first, spare = self._places
        self.state = {"places": (first, spare), "outside": sorted(self._outside)}


def _row(prompt: Prompt) -> str:
    """The prompt_id without the epoch."""
    return prompt.prompt_id.rpartition("@")[0]
