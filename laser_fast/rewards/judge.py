"""Judges behind a network as reward functions: each answer is judged once, a few at a time."""

import asyncio
import hashlib
import inspect
import json
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

from laser_fast.rewards.user import check_rewards

_Async = Callable[..., Awaitable[Any]]
_COLUMNS = {"prompt": "prompts", "completion": "completions"}  # any other name is that of both
_log = logging.getLogger(__name__)


def cached_judge(
    path: str | Path, *, concurrency: int = 8, version: str = ""
) -> Callable[[_Async], _Async]:
    """Make a reward function of an async function that judges one completion.

    This one asks by name for completion, prompt, answer and fields of the data, and returns a
    finite number or None. An exception counts as None, with a warning. The numbers are kept in the
    SQLite file `path`, which processes may share and a power failure may break, by function,
    `version` and what it was given; None is not. A process makes at most `concurrency` at once.

    Example: `@cached_judge("judge.sqlite")` above `async def style(completion, prompt): ...`.
    """
    if concurrency < 1:
        raise ValueError(f"cached_judge: expected a concurrency of at least 1, got {concurrency}")

    def decorate(judge: _Async) -> _Async:
        about = f"{judge.__module__}:{judge.__qualname__}"
        if not inspect.iscoroutinefunction(judge):
            raise ValueError(f"cached_judge: expected an async function, got {about}")
        given = inspect.signature(judge).parameters.values()
        own = {_COLUMNS.get(p.name, p.name): p for p in given if p.kind is not p.VAR_KEYWORD}

        @wraps(judge)
        async def reward(**columns: list[Any]) -> list[float | None]:
            names = [own[name].name for name in columns]
            limit, failures = asyncio.Semaphore(concurrency), list[Exception]()
            locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

            async def ask(*values: Any) -> float | None:
                row = dict(zip(names, values, strict=True))
                text = json.dumps([about, version, row], sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest()
                async with locks[key], limit:  # the same in one batch waits for the first
                    for [kept] in cache.execute("SELECT number FROM judged WHERE key = ?", [key]):
                        return float(kept)
                    try:
                        said = await judge(**row)
                    except Exception as error:
                        failures.append(error)
                        return None
                    [number] = check_rewards([said], 1, kind=about)
                    if number is not None:
                        cache.execute("INSERT OR REPLACE INTO judged VALUES (?, ?)", [key, number])
                    return number

            # Without transactions: a number is kept though a later call may meet the deadline. To
            # wait for the disk would take 20 to 70 ms for each, and 0.5 ms are enough without.
            with closing(sqlite3.connect(path, timeout=60.0, isolation_level=None)) as cache:
                cache.execute("PRAGMA synchronous = OFF")
                cache.execute("CREATE TABLE IF NOT EXISTS judged (key PRIMARY KEY, number)")
                numbers = await asyncio.gather(*map(ask, *columns.values()))
            if failures:
                _log.warning("%s: %d calls failed: %r", about, len(failures), failures[0])
            return numbers

        asked = [parameter.replace(name=name) for name, parameter in own.items()]
        vars(reward)["__signature__"] = inspect.Signature(asked)
        return reward

    return decorate
