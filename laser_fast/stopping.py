"""How long work learns that its run was asked to stop (SIGTERM), in places without collectives.

Sampling and grading call `poll` between their pieces; a stage that it leaves ends with a check that
all ranks share (log.timer). Without a run that listens, nothing happens.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from typing import Any

POLL_S = 1.0

_listeners: list[Callable[[], bool]] = []


class StopRun(Exception):  # noqa: N818 (control flow, not an error)
    """A rank was asked to stop (SIGTERM); the loop saves and leaves."""


@contextmanager
def listening(is_asked: Callable[[], bool]) -> Iterator[None]:
    """Let `poll` ask this within."""
    _listeners.append(is_asked)
    try:
        yield
    finally:
        _listeners.remove(is_asked)


def is_asked() -> bool:
    """Whether to stop; only the main thread is asked, which meets the other ranks afterwards."""
    on_main = threading.current_thread() is threading.main_thread()
    return on_main and any(listener() for listener in _listeners)


def poll() -> None:
    """Raise `StopRun` if the run was asked to stop."""
    if is_asked():
        raise StopRun


def poll_until_done(futures: Iterable[Future[Any]]) -> None:
    """Wait for all, or for the first error, which is raised; poll meanwhile."""
    pending = set(futures)
    while pending:
        poll()
        done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
        for future in done:
            future.result()
