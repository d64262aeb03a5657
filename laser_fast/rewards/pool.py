"""Worker processes that can be killed: one call each, under a hard deadline.

A grader may hang in C code (a big integer power, a regular expression) or take its process down;
only the kill of a process is a deadline. So every call runs alone in a worker, a lost worker is
replaced, and no other call notices.

Workers are fresh interpreters: never a fork, because the parent has the threads of torch, gloo
and NCCL, and never a child of `multiprocessing` (nor of a pool built on it, such as pebble's),
because those import the caller's `__main__` again: a training script, with torch and all, or one
without a main guard, which would start over. One event loop in the calling thread watches all
pipes and deadlines; there are no helper threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Literal

# Imports of a user's module from a cold network disk take long; a grade never waits for this.
_START_DEADLINE_S = 300.0
_CLOSE_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a result: it missed its deadline, took its worker down, or raised."""

    reason: Literal["deadline", "crash", "error"]
    summary: str
    traceback: str = ""


_LATE = Failure("deadline", "the deadline passed")


class WorkerStartError(RuntimeError):
    """A worker could not import what it has to run."""


class WorkerPool:
    """Up to `num_workers` processes that run importable functions by name.

    Args:
        first_function: "module:function" that every worker imports before it takes calls.
        num_workers: one is started at once, the others with the first calls they are needed for.
        memory_limit: bytes of address space of a worker, or None.

    Raises:
        WorkerStartError: if the first worker cannot import `first_function`.
    """

    def __init__(
        self, first_function: str, *, num_workers: int, memory_limit: int | None = None
    ) -> None:
        self._start = (first_function, memory_limit)
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        # Runs at the end of the interpreter or of this object, whichever comes first.
        self._finalizer = weakref.finalize(self, _close_all, self._workers, os.getpid())
        self._workers.append(_Worker(*self._start))
        wait([self._workers[0].connection], timeout=_START_DEADLINE_S)
        self._workers[0].finish_start()

    def close(self) -> None:
        """End the workers; a closed pool runs nothing more."""
        self._finalizer()

    def run(
        self, function: str, calls: Sequence[tuple[Any, ...]], *, deadline_s: float
    ) -> list[Any]:
        """Call `function` once per tuple of arguments: results in order, a `Failure` for a loss.

        Raises:
            RuntimeError: if the pool is closed.
            WorkerStartError: if a further worker cannot start.
        """
        if not self._finalizer.alive:
            raise RuntimeError("this worker pool is closed")
        results: list[Any] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        with self._lock:
            try:
                while waiting or any(worker.is_busy for worker in self._workers):
                    self._hand_out(function, calls, waiting, deadline_s)
                    self._collect(results)
            except BaseException:
                # An interrupt or a failed start: a late reply would be taken for one of the next
                # run, and a worker that cannot start would fail that one too.
                for worker in [worker for worker in self._workers if not worker.is_idle]:
                    worker.kill()
                    self._workers.remove(worker)
                raise
        return results

    def _hand_out(
        self,
        function: str,
        calls: Sequence[tuple[Any, ...]],
        waiting: deque[int],
        deadline_s: float,
    ) -> None:
        """Give every idle worker a call; start further workers for calls still waiting."""
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not waiting:
                return
            try:
                worker.send(waiting[0], function, calls[waiting[0]], deadline_s)
            except OSError:  # it died between two calls, which says nothing about this one
                self._replace(worker)
            else:
                waiting.popleft()
        num_starting = sum(not worker.is_started for worker in self._workers)
        num_missing = min(self._num_workers - len(self._workers), len(waiting) - num_starting)
        self._workers.extend(_Worker(*self._start) for _ in range(num_missing))

    def _collect(self, results: list[Any]) -> None:
        """Wait for the first message or deadline and book what is there."""
        active = [worker for worker in self._workers if not worker.is_idle]
        nearest = min(worker.deadline for worker in active)
        ready = wait(
            [worker.connection for worker in active], timeout=max(nearest - time.monotonic(), 0.0)
        )
        now = time.monotonic()
        for worker in active:
            has_message, is_late = worker.connection in ready, worker.deadline <= now
            if not has_message and not is_late:
                continue
            if not worker.is_started:
                worker.finish_start()
                continue
            call = worker.call
            results[call] = worker.receive() if has_message else _LATE
            if isinstance(results[call], Failure) and results[call].reason != "error":
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(*self._start)


class _Worker:
    """One process and the call it works on, if any."""

    def __init__(self, first_function: str, memory_limit: int | None) -> None:
        self.connection, theirs = Pipe()
        arguments = f"{theirs.fileno()}, {first_function!r}, {memory_limit!r}"
        # The same import path as here, and last the current folder, for a user's reward module.
        code = (
            f"import sys; sys.path[:] = {[*sys.path, os.getcwd()]!r}; "
            f"from laser_fast.rewards.worker import main; main({arguments})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            # A group of its own: interrupts and SIGTERM are the trainer's business, and a kill
            # reaches what the worker itself has started.
            start_new_session=True,
            # sympy orders by hash in places; the same answer must earn the same reward in every run
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        self.is_started = False
        self.call: int | None = None
        self.deadline = time.monotonic() + _START_DEADLINE_S

    @property
    def is_busy(self) -> bool:
        return self.call is not None

    @property
    def is_idle(self) -> bool:
        return self.is_started and self.call is None

    def finish_start(self) -> None:
        """Read the message that says whether the first import worked."""
        try:
            if not self.connection.poll():
                raise WorkerStartError(f"it took longer than {_START_DEADLINE_S:g} s to import")
            status, summary, *_ = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerStartError(f"the worker ended with {self._exit_code()}") from None
        if status == "error":
            raise WorkerStartError(summary)
        self.is_started = True

    def send(self, call: int, function: str, arguments: tuple[Any, ...], deadline_s: float) -> None:
        self.connection.send((function, arguments, deadline_s))
        self.call = call
        self.deadline = time.monotonic() + deadline_s

    def receive(self) -> Any:
        """Return the result of the call, or the `Failure` that took its place."""
        self.call = None
        try:
            status, *content = self.connection.recv()
        except (EOFError, OSError):
            return Failure("crash", f"the worker ended with {self._exit_code()}")
        return Failure("error", *content) if status == "error" else content[0]

    def kill(self) -> None:
        """End the process and its children, now."""
        self.call = None
        self.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _exit_code(self) -> str:
        """What ended the process whose pipe has closed."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_CLOSE_GRACE_S)
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "its pipe closed"


def _close_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a fork of ours; the workers are not its own
        return
    for worker in workers:
        worker.connection.close()  # an idle worker takes this as its end
    end = time.monotonic() + _CLOSE_GRACE_S
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(end - time.monotonic(), 0.0))
        worker.kill()
    workers.clear()
