"""The engine that samples with the policy's own Hugging Face model.

Rows are left-padded and decoded together (static batching). A prompt is read once for its whole
group, and rows that have ended leave the batch. With the logits l [R, V] that follow what a row
has read, each step takes, by the Gumbel-max trick,

    choice   = argmax_v  l_v / T - log E_v,   E_v ~ Exp(1),  v not banned
    logprob  = log_softmax(l / T)[choice]                    (full distribution, ban or not)
    score    = log_softmax(l)[z_c]                           (of use where EOS was read last)

E comes from a generator of the completion's own, keyed by (seed, prompt_id, sample index): a
completion depends on weights, prompt and seed, never on its neighbours in the batch, the world
size or a resume.

The sampled EOS is read like any token, so the score costs exactly one extra decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from laser_fast.records import Completion, Group, Prompt, Sampling, SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers drawn at once per row: one call per row and step would cost more than the forward of a
# small model. A constant, since the length of a draw is part of the random stream.
_NOISE_BLOCK = 1024
# Rows leave the batch when at most this share of it is still open: each time copies the cache.
_SHRINK_BELOW = 0.75


class HfEngine:
    """Static-batch sampler on the policy's parameters; implements `rollout.engine.Engine`.

    Args:
        model: the causal LM inside the policy.
        tokens: the ids that end, are banned, or carry the score.
        max_num_seqs: completions decoded at once.
        unsharded: context in which the model's parameters are plain full tensors.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: SpecialTokens,
        *,
        max_num_seqs: int,
        unsharded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, got {max_num_seqs}")
        self.model = model
        self.tokens = tokens
        self.max_num_seqs = max_num_seqs
        self.unsharded = unsharded
        self._banned_ids = (
            tokens.score_token_id,
            *range(tokens.vocab_size, model.config.vocab_size),
        )

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Do nothing: the parameters are the policy's own, so `weights` is left untouched."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt, in the order of `prompts`.

        Raises:
            ValueError: an empty prompt.
        """
        for prompt in prompts:
            if not prompt.prompt_ids:
                raise ValueError(f"prompt {prompt.prompt_id}: expected at least one id, got none")
        # Neighbours of equal length need no padding.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p].prompt_ids))
        rows = [(p, sample) for p in order for sample in range(sampling.group_size)]
        completions: dict[tuple[int, int], Completion] = {}
        with self._ready():
            for start in range(0, len(rows), self.max_num_seqs):
                batch = rows[start : start + self.max_num_seqs]
                drawn = self._decode([(prompts[p], sample) for p, sample in batch], sampling)
                completions.update(zip(batch, drawn, strict=True))
        return [
            Group(
                prompt=prompt,
                completions=tuple(completions[p, g] for g in range(sampling.group_size)),
            )
            for p, prompt in enumerate(prompts)
        ]

    def sleep(self) -> None:
        """Do nothing: nothing is held between calls."""

    def close(self) -> None:
        """Do nothing: the model belongs to the policy."""

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Full parameters, evaluation mode, no gradients."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.unsharded():
                yield
        finally:
            self.model.train(was_training)

    def _decode(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Completion]:
        """Sample one completion for each (prompt, sample index)."""
        device = self.model.device
        context = self._read_prompts([prompt for prompt, _ in rows])
        noise = _Noise([_generator(sampling.seed, prompt, g, device) for prompt, g in rows])
        eos_token_ids = torch.tensor(self.tokens.eos_token_ids, device=device)
        banned_ids = torch.tensor(self._banned_ids, device=device)
        num_steps = sampling.max_new_tokens + sampling.needs_score
        completion_ids = torch.zeros(len(rows), num_steps, dtype=torch.int64, device=device)
        logprobs, scores = torch.zeros(2, len(rows), num_steps, device=device)
        row = torch.arange(len(rows), device=device)  # [R], the rows in the batch
        has_ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for step in range(num_steps):
            logits = context.logits
            if sampling.needs_score:
                scores[row, step] = logits[:, self.tokens.score_token_id] - logits.logsumexp(1)
            tempered = logits / sampling.temperature
            noisy = tempered - noise.step(row, tempered)
            noisy[:, banned_ids] = -torch.inf
            choice = noisy.argmax(1, keepdim=True)
            completion_ids[row, step] = choice[:, 0]
            logprobs[row, step] = tempered.gather(1, choice)[:, 0] - tempered.logsumexp(1)
            had_ended, has_ended = has_ended, has_ended | torch.isin(choice[:, 0], eos_token_ids)
            is_open = ~(had_ended if sampling.needs_score else has_ended)
            num_open = int(is_open.sum())
            if num_open == 0 or step + 1 == num_steps:
                break
            if num_open <= _SHRINK_BELOW * len(row):
                kept = is_open.nonzero()[:, 0]
                row, choice, has_ended = row[kept], choice[kept], has_ended[kept]
                context.select(kept)
            context.read(choice, torch.ones_like(choice, dtype=torch.bool))
        return self._cut(completion_ids, logprobs, scores, sampling)

    def _read_prompts(self, prompts: Sequence[Prompt]) -> _Context:
        """Every distinct prompt read once, then one row for each entry of `prompts`."""
        device = self.model.device
        distinct = list(dict.fromkeys(prompt.prompt_ids for prompt in prompts))
        place = {prompt_ids: i for i, prompt_ids in enumerate(distinct)}
        width = max(map(len, distinct))
        ids = [[self.tokens.pad_token_id] * (width - len(p)) + list(p) for p in distinct]
        padding = torch.tensor([width - len(p) for p in distinct], device=device)
        context = _Context(self.model)
        context.read(
            torch.tensor(ids, device=device),
            torch.arange(width, device=device) >= padding[:, None],
        )
        context.select(torch.tensor([place[p.prompt_ids] for p in prompts], device=device))
        return context

    def _cut(
        self,
        completion_ids: Tensor,  # [R, steps]
        logprobs: Tensor,
        scores: Tensor,
        sampling: Sampling,
    ) -> list[Completion]:
        """End every row at its first EOS, by position; whatever was decoded after it is noise."""
        completions = []
        for ids, values, score in zip(
            completion_ids[:, : sampling.max_new_tokens].tolist(),
            logprobs.tolist(),
            scores.tolist(),
            strict=True,
        ):
            end = next((t for t, i in enumerate(ids) if i in self.tokens.eos_token_ids), None)
            length = len(ids) if end is None else end + 1
            has_score = sampling.needs_score and end is not None
            completions.append(
                Completion(
                    completion_ids=tuple(ids[:length]),
                    rollout_logprobs=tuple(values[:length]),
                    finish_reason="length" if end is None else "stop",
                    score_logprob=score[length] if has_score else None,
                )
            )
        return completions


class _Context:
    """What the model has read of R rows, and the logits [R, V] in float32 that follow it."""

    logits: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask: Tensor | None = None  # [R, tokens read], False on padding

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Append tokens [R, n]; `mask` is False on padding."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or drop rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.logits = self.mask[rows], self.logits[rows]


class _Noise:
    """log E, minus which is Gumbel noise; each row draws from a generator of its own."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.num_steps = 0

    def step(self, rows: Tensor, like: Tensor) -> Tensor:
        """The next step's noise for `rows`, of the shape and kind of `like` [R, V]."""
        vocab = like.shape[1]
        block = max(1, _NOISE_BLOCK // vocab)
        if self.num_steps % block == 0:
            self.block = like.new_empty(len(self.generators), block, vocab)
            for row in rows.tolist():
                self.block[row].exponential_(generator=self.generators[row])
            # An exact 0 would become infinite and win against every token.
            self.block.clamp_(min=torch.finfo(like.dtype).tiny).log_()
        self.num_steps += 1
        return self.block[rows, (self.num_steps - 1) % block]


def _generator(seed: int, prompt: Prompt, sample: int, device: torch.device) -> torch.Generator:
    """The noise source of one completion."""
    # prompt_id comes last: the numbers before it cannot run into it.
    key = blake2b(f"{seed}/{sample}/{prompt.prompt_id}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    return generator.manual_seed(int.from_bytes(key, "big", signed=True))
