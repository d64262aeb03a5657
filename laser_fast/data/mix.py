"""Several data sets as one stream of prompts, in every step each by its weight.

Of data sets with the weights w, cumulated to W from 0 to 1, turn t of P prompts has

    n_i(t) = floor(P W_i + o_t) - floor(P W_(i-1) + o_t),    o_t = frac(1/2 + t / golden ratio)

prompts of data set i: P w_i, rounded down or up. The offsets fill [0, 1) evenly, and so the
roundings cancel: in 20,000 turns of 300 random mixes none was ever more than 4.1 prompts away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laser_fast.config import ConfigError

if TYPE_CHECKING:
    from laser_fast.data.prompts import PromptSource
    from laser_fast.records import Prompt

_GOLDEN = (5**0.5 - 1) / 2


class PromptMix:
    """Several data sets, by the name that opens their prompt_ids, each with its weight.

    Each goes through its own epochs. A step's prompts come in an order drawn from (seed, turn), so
    that ranks and minibatches share every data set; a regular order may leave one to one of them.
    """

    def __init__(
        self, parts: Mapping[str, tuple[PromptSource, float]], *, seed: int, per_step: int
    ) -> None:
        self._seed, self._per_step = seed, per_step
        parts = dict(sorted(parts.items()))  # the same run, however the table is written
        self._sources = {name: source for name, (source, _) in parts.items()}
        weights = np.cumsum([weight for _, weight in parts.values()])
        self._inner = per_step * weights[:-1] / weights[-1]
        content = [(name, source.digest, weight) for name, (source, weight) in parts.items()]
        self.digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        self.num_dropped = sum(source.num_dropped for source in self._sources.values())

    def check_ids(self, num_rows: int) -> None:
        """As `PromptSource.check_ids`."""
        for source in self._sources.values():
            source.check_ids(num_rows)

    def prompts(
        self, step: int, *, attempt: int = 0, rounds: int = 0, rank: int = 0, world_size: int = 1
    ) -> list[Prompt]:
        """As `PromptSource.prompts`."""
        stream, turn = ("", step) if attempt == 0 else ("spare", step * rounds + attempt - 1)
        counts = self._counts(turn + 1)
        starts, last = counts[:-1].sum(axis=0).tolist(), counts[-1].tolist()
        found = [
            replace(prompt, source=name)
            for (name, source), i, n in zip(self._sources.items(), starts, last, strict=True)
            for prompt in source.at(stream, range(i, i + n))
        ]
        order = np.random.default_rng([self._seed, attempt > 0, turn]).permutation(self._per_step)
        return [found[i] for i in np.split(order, world_size)[rank]]

    def _counts(self, num_turns: int) -> np.ndarray:
        """Prompts of each data set in the first turns of a stream, [num_turns, parts] int64."""
        offsets = (0.5 + _GOLDEN * np.arange(num_turns)) % 1.0
        bounds = np.floor(self._inner + offsets[:, None]).astype(np.int64)
        return np.diff(bounds, prepend=0, append=self._per_step, axis=1)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, or of hub ids, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"data.train: expected different data sets, got {', '.join(paths) or 'none'}")
