"""A checkpoint that is written while training goes on.

Of a copy of the state, a thread writes the files and their sums. It meets those of other ranks over
a process group of its own, since the main threads meet at the same time. What makes a checkpoint of
the files, its name, is the main threads', when a step ends and all ranks have written.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from laser_fast.model.distributed import World


class BackgroundWriter:
    """Takes one checkpoint at a time; every method is collective."""

    def __init__(self, world: World, timeout_s: float) -> None:
        self._world, self._timeout = world, timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Future, Callable] | None = None

    def start(self, state: dict[str, Any], write: Callable, complete: Callable) -> None:
        """Let a thread `write` a copy of the state; `complete` calls what returns its result."""
        assert self._pending is None
        group = self._group = self._group or dist.new_group(backend="gloo", timeout=self._timeout)
        # In plain memory: pinning it and streams of its own, torch's defaults, need a GPU.
        copy = DefaultStager(StagingOptions(*[False] * 4)).stage(state)
        future = Future[Any]()

        def run() -> None:
            try:
                if self._world.device.type == "cuda":
                    torch.cuda.set_device(self._world.device)  # a thread begins on the first one
                future.set_result(write(copy, group))
            except BaseException as error:
                future.set_exception(error)

        # A daemon keeps no rank alive that has failed, while it waits for the others'.
        threading.Thread(target=run, daemon=True).start()
        self._pending = future, complete

    def settle(self, *, wait: bool) -> None:
        """Complete what was started if every rank has written it; or `wait` for that."""
        if self._pending is None:
            return
        future, complete = self._pending
        if wait or not self._world.max(int(not future.done())):
            self._pending = None
            complete(future.result)
