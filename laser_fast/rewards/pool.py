"""Worker processes that can be killed: one call at a time, each under a hard deadline.

A grader may hang in C code (a big integer power, a regular expression) or take its process down;
only the kill of a process is a deadline. A lost worker is replaced, and no other call notices.

Workers are fresh interpreters: never a fork, because the parent has the threads of torch, gloo
and NCCL, and never a child of `multiprocessing` (nor of a pool built on it, such as pebble's),
because those import the caller's `__main__` again: a training script, with torch and all, or one
without a main guard, which would start over. The end of its pipe ends a worker.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from operator import attrgetter
from typing import Any, Literal

from laser_fast.stopping import POLL_S, poll

# Imports of a user's module from a cold network disk take long; a grade never waits for this.
_START_DEADLINE_S = 300.0
_CLOSE_GRACE_S = 2.0
# The parent kills a worker at its deadline; a later one is for a parent that is gone.
_ORPHAN_GRACE_S = 10.0
# What a worker is busy with until its first import is done; calls count from 0.
_START = -1

Arguments = tuple[Any, ...]


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

    Each imports "module:function" `first_function` before it takes calls. One is started at once,
    the others with the first calls that need them. `memory_limit` is in bytes of address space.
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
        while any(worker.call == _START for worker in self._workers):
            self._collect({})

    def close(self) -> None:
        """End the workers; a closed pool runs nothing more."""
        self._finalizer()

    def run(self, function: str, calls: Sequence[Arguments], *, deadline_s: float) -> list[Any]:
        """Call `function` once per tuple of arguments: results in order, a `Failure` for a loss."""
        if not self._finalizer.alive:
            raise RuntimeError("this worker pool is closed")
        results: dict[int | None, Any] = {}  # by the number of the call
        waiting = deque(range(len(calls)))
        with self._lock:
            try:
                while waiting or any(worker.call not in (None, _START) for worker in self._workers):
                    self._hand_out(function, calls, waiting, deadline_s)
                    self._collect(results)
            except BaseException:
                # An interrupt or a failed start: a late reply would be taken for one of the next
                # run, and a worker that cannot start would fail that one too.
                for worker in [worker for worker in self._workers if worker.call is not None]:
                    worker.kill()
                    self._workers.remove(worker)
                raise
        return [results[call] for call in range(len(calls))]

    def _hand_out(
        self, function: str, calls: Sequence[Arguments], waiting: deque[int], deadline_s: float
    ) -> None:
        """Give every idle worker a call; start further workers for calls still waiting."""
        for worker in [worker for worker in self._workers if worker.call is None]:
            if not waiting:
                return
            call = waiting.popleft()
            try:
                worker.send(function, call, calls[call], deadline_s)
            except OSError:  # it died between two calls, which says nothing about this one
                waiting.appendleft(call)
                self._replace(worker)
        num_starting = sum(worker.call == _START for worker in self._workers)
        num_missing = min(self._num_workers - len(self._workers), len(waiting) - num_starting)
        self._workers.extend(_Worker(*self._start) for _ in range(num_missing))

    def _collect(self, results: dict[int | None, Any]) -> None:
        """Wait for the first message or deadline and book what is there."""
        active = {w.connection: w for w in self._workers if w.call is not None}
        nearest = min(worker.deadline for worker in active.values())
        poll()
        ready = wait(list(active), timeout=min(max(nearest - time.monotonic(), 0.0), POLL_S))
        now = time.monotonic()
        for connection, worker in active.items():
            if connection not in ready and now < worker.deadline:
                continue
            outcome = worker.receive() if connection in ready else _LATE
            is_failure = isinstance(outcome, Failure)
            if worker.call == _START and is_failure:
                late = f"it took longer than {_START_DEADLINE_S:g} s to import"
                raise WorkerStartError(late if outcome is _LATE else outcome.summary)
            results[worker.call], worker.call = outcome, None
            if is_failure and outcome.reason != "error":
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(*self._start)


class _Worker:
    """One process and the number of the call that it works on, None if it is idle."""

    def __init__(self, first_function: str, memory_limit: int | None) -> None:
        ours, theirs = Pipe()
        self.connection: Connection = ours
        arguments = f"{theirs.fileno()}, {first_function!r}, {memory_limit!r}"
        # The same import path as here, and last the current folder, for a user's reward module.
        code = (
            f"import sys; sys.path[:] = {[*sys.path, os.getcwd()]!r}; "
            f"from laser_fast.rewards.pool import serve; serve({arguments})"
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
        self.call: int | None = _START
        self.deadline = time.monotonic() + _START_DEADLINE_S

    def send(self, function: str, call: int, arguments: Arguments, deadline_s: float) -> None:
        """Hand over a call by its number."""
        # First: an interrupt in between must find it busy.
        self.call, self.deadline = call, time.monotonic() + deadline_s
        self.connection.send((function, arguments, deadline_s))

    def receive(self) -> Any:
        """The result of the call, or the `Failure` that took its place."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return Failure("crash", f"the worker ended with {self._exit_code()}")

    def kill(self) -> None:
        """End the process and its children, now."""
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


def serve(file_descriptor: int, first_function: str, memory_limit: int | None) -> None:
    """Be a worker: say whether the first function imports, then answer calls."""
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    connection = Connection(file_descriptor)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(_answer(first_function, None))
        while True:
            function, arguments, deadline_s = connection.recv()
            # A C thread without the GIL: it ends even a process stuck in a big power.
            faulthandler.dump_traceback_later(deadline_s + _ORPHAN_GRACE_S, exit=True, file=nowhere)
            connection.send(_answer(function, arguments))
            faulthandler.cancel_dump_traceback_later()


def _answer(name: str, arguments: Arguments | None) -> Any:
    """What a function returns, or its exception as a `Failure`; None for arguments imports it."""
    try:
        function = resolve(name)
        return None if arguments is None else function(*arguments)
    except BaseException as error:  # also SystemExit: a grader must not end its worker
        return Failure("error", f"{type(error).__name__}: {error}", traceback.format_exc())


@cache
def resolve(name: str) -> Callable[..., Any]:
    """Import the function that "module:function" names."""
    module, _, path = name.partition(":")
    function = attrgetter(path)(importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function
