"""The engine protocol: what the trainer and the evaluation ask of a sampler.

One call order per step: `sync` (new weights in), `generate` (any number of times), `sleep` (give
the device memory back to training). Engines take token ids and return token ids; text never
passes through them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from laser_fast.records import Group, Prompt, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """A sampler of completions with proven weights."""

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, every state_dict name, and get ready to generate.

        Collective: every rank calls it and exhausts its iterator, since producing an item may
        all-gather. An engine that shares the policy's parameters leaves the iterator untouched.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt, in the order of `prompts`.

        The score token and ids beyond the tokenizer's vocabulary are never sampled. A completion
        is finished iff its last id is one of the model's EOS ids.
        """

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of held completion ids under the engine's current weights.

        Returns one list per completion, flattened over `groups`. The agreement check compares
        them with the policy's own.
        """

    def sleep(self) -> None:
        """Release device memory until the next `sync`."""

    def close(self) -> None:
        """Stop the engine for good."""


def draw_seed(*parts: int | str) -> int:
    """A 63-bit seed that names one draw, such as `draw_seed(seed, "train", step, attempt)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
