"""Seconds per stage and peak memory."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from laser_fast.stopping import StopRun


class StageTimer:
    """Accumulates the wall time of the stages of a step.

    A stage inside another one counts only for itself, so the stages add up to the step. Example:
    after `with timer("rollout"): ...`, `timer.pop()` is `{"time/rollout": 3.1}`.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        after_stage: Callable[[], None] = lambda: None,
        on_stage: Callable[[str], None] = lambda stage: None,  # told of every begin and end
    ):
        """On a CUDA device each stage waits for its kernels, so that their time is its own."""
        self._device, self._after_stage, self._on_stage = device, after_stage, on_stage
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stages: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage, then call `after_stage`: stopped there, a run loses only the step.

        A rank that leaves the stage by `StopRun` meets the others there, too.
        """
        try:
            with self.only(stage):
                yield
        except StopRun:
            self._after_stage()
            raise
        self._after_stage()

    @contextmanager
    def only(self, stage: str) -> Iterator[None]:
        """Time a stage without calling `after_stage`."""
        self._charge()
        self._stages.append(stage)
        self._on_stage(stage)
        try:
            yield
        finally:
            self._charge()
            self._stages.pop()
        self._on_stage(f"after {stage}")

    def pop(self) -> dict[str, float]:
        """Seconds per stage as metrics `time/<stage>`, and start over."""
        metrics = {f"time/{stage}": seconds for stage, seconds in self._seconds.items()}
        self._seconds.clear()
        return metrics

    def _charge(self) -> None:
        """Give the time since the last change of stage to the stage that was running."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stages:
            self._seconds[self._stages[-1]] += now - self._since
        self._since = now


def peak_memory_gb(device: torch.device | None = None) -> float:
    """Peak memory in 1e9 bytes: of CUDA tensors since the last call, or else of this process."""
    if device is not None and device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
