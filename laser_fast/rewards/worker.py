"""The inside of a worker process: take calls, run each one, send what came of it.

Messages from the parent are `(function name, arguments of each call, deadline in seconds)`; every
call has a reply, `("done", value)` or `("error", summary, traceback)`. The end of the pipe is the
end of the worker.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

# The parent kills a worker at its deadline; this later one is for a parent that is gone.
_ORPHAN_GRACE_S = 10.0


@cache
def resolve(name: str) -> Callable[..., Any]:
    """Import the function that "module:function" names."""
    module_name, _, function_name = name.partition(":")
    function = importlib.import_module(module_name)
    for part in function_name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{function_name} is {type(function).__name__}, not a function")
    return function


def main(file_descriptor: int, first_function: str, memory_limit: int | None) -> None:
    """Serve calls until the parent closes the pipe; the first reply says whether we can start."""
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    connection = Connection(file_descriptor)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
    try:
        connection.send(_attempt(_load, first_function))
        while True:
            name, calls, deadline_s = connection.recv()
            end, armed = deadline_s + _ORPHAN_GRACE_S, float("-inf")
            for arguments in calls:
                if time.monotonic() > armed + 1.0:  # to arm it takes as long as a quick grade
                    # A C thread without the GIL: it ends even a process stuck in a big power.
                    faulthandler.dump_traceback_later(end, exit=True, file=nowhere)
                    armed = time.monotonic()
                connection.send(_attempt(_call, name, *arguments))
            faulthandler.cancel_dump_traceback_later()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _load(name: str) -> None:
    resolve(name)


def _call(name: str, *arguments: Any) -> Any:
    return resolve(name)(*arguments)


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    try:
        return ("done", function(*arguments))
    except BaseException as error:  # also SystemExit: a grader must not end its worker
        return ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
