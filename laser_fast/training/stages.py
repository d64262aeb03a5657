"""The named stages of a step: timed, and the places where a run may stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from laser_fast.observe.timer import StageTimer
from laser_fast.training.distributed import StopSignal


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
