"""When things happen: the named stages of a step, where a run may stop, and schedules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import StopSignal


@dataclass(frozen=True, slots=True)
class Stages:
    """Runs stages that leave the policy as it is, so that a stop after one loses only the step."""

    timer: StageTimer
    stop: StopSignal

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stage; after it, leave if any rank was asked to stop. Collective."""
        with self.timer(name):
            yield
        self.stop.check()


def is_due(completed: int, every: int) -> bool:
    """Whether something that happens after every `every` steps happens now; 0: never."""
    return every > 0 and completed % every == 0
