"""Log-probs at the sampling temperature, from a vLLM that reports them at temperature 1.

    log_softmax(l / T)[y] = log_softmax(l)[y] / T + c,   c = logsumexp(l) / T - logsumexp(l / T)

on raw logits l; c depends only on the row. vLLM's own "processed" log-probs are tempered too, but
after bans and forced tokens, so they are not those of the distribution that is trained. A logits
processor in the same process sees l and hands c to the request's `Tempering`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tempering:
    """Collects c of every token of one completion, drawn at `temperature`."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._corrections: dict[int, tuple[Tensor, int]] = {}

    def __deepcopy__(self, memo: dict) -> Tempering:
        return self  # vLLM copies sampling parameters; the collector is shared with the caller

    def add(self, position: int, corrections: Tensor, row: int) -> None:
        """Note c of the token at `position`; stays on the device until it is read."""
        self._corrections[position] = (corrections, row)

    def apply(self, logprobs: Sequence[float]) -> list[float]:
        """Tempered log-probs of the completion's tokens from those of temperature 1."""
        found = [self._corrections[t] for t in range(len(logprobs))]
        corrections = torch.stack([c[row] for c, row in found]).tolist() if found else []
        return [p / self.temperature + c for p, c in zip(logprobs, corrections, strict=True)]


def collect(logits: Tensor, drawn: dict[int, tuple[Tempering, int]]) -> None:
    """Hand c to the requests that want it: by row of `logits` [B, V], collector and position."""
    by_temperature: dict[float, list[int]] = {}
    for row in sorted(drawn):
        by_temperature.setdefault(drawn[row][0].temperature, []).append(row)
    for temperature, rows in by_temperature.items():
        raw = logits[row_index(rows, logits)]
        corrections = raw.logsumexp(1) / temperature - (raw / temperature).logsumexp(1)
        for place, row in enumerate(rows):
            tempering, position = drawn[row]
            tempering.add(position, corrections, place)


def row_index(rows: list[int], logits: Tensor) -> Tensor | slice:
    """Ascending rows as an index; all of them as a slice, which needs no copy to the device."""
    if len(rows) == len(logits):
        return slice(None)
    return torch.tensor(rows, device=logits.device)
