"""The engine that samples with the policy's own Hugging Face model, by transformers' `generate`.

Rows are left-padded and decoded together (static batching). One logits processor sees every
step's raw logits l [B, V] and does all of the sampling, by the Gumbel-max trick:

    choice   = argmax_v  l_v / T - log E_v,   E_v ~ Exp(1),  v not banned
    logprob  = log_softmax(l / T)[choice]                    (full distribution, ban or not)
    score    = log_softmax(l)[z_c]                           (read where the input is EOS)

so greedy decoding of the processed logits is pure sampling. E comes from a generator of the
completion's own, keyed by (seed, prompt_id, sample index): a completion depends on weights,
prompt and seed, never on its neighbours in the batch, the world size or a resume.

The sampled EOS is fed back like any token, so the score costs exactly one extra decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from laser_fast.records import Completion, Group, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Noise is drawn for several steps at once: one call per row and step would cost more than the
# forward of a small model. A constant, since the block length is part of the random stream.
_NOISE_BLOCK = 1024
# Positions that go through the head at once in `token_logprobs`.
_HEAD_ROWS = 1024


class HfEngine:
    """Static-batch sampler on the policy's parameters; implements `rollout.engine.Engine`.

    Args:
        model: the causal LM inside the policy.
        score_token_id: z_c, read at the EOS position and never sampled.
        eos_token_ids: every id that ends a completion.
        vocab_size: the tokenizer's; ids from here on are padding of the head and never sampled.
        pad_token_id: fills short prompts; may equal an EOS id.
        max_num_seqs: completions decoded at once.
        unsharded: context in which the model's parameters are plain full tensors.

    Raises:
        ValueError: no EOS id, or ids outside the tokenizer's vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        score_token_id: int,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        pad_token_id: int,
        max_num_seqs: int,
        unsharded: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if not eos_token_ids:
            raise ValueError("eos_token_ids: expected at least one id, got none")
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, got {max_num_seqs}")
        rows = model.config.vocab_size
        for token_id in (score_token_id, *eos_token_ids):
            if not 0 <= token_id < min(vocab_size, rows):
                raise ValueError(
                    f"expected score and EOS ids below the vocabulary of {min(vocab_size, rows)}, "
                    f"got {token_id}; check that tokenizer and model belong together"
                )
        if score_token_id in eos_token_ids:
            raise ValueError(
                f"score_token_id {score_token_id} is an EOS id; choose a token that ends nothing"
            )
        self.model = model
        self.score_token_id = score_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.banned_ids = (score_token_id, *range(vocab_size, rows))
        self.pad_token_id = pad_token_id
        self.max_num_seqs = max_num_seqs
        self.unsharded = unsharded

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

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Teacher-forced log-probs of held completions, one list each, flattened over `groups`."""
        held = [
            (group.prompt.prompt_ids, completion.completion_ids)
            for group in groups
            for completion in group.completions
        ]
        order = sorted(range(len(held)), key=lambda i: sum(map(len, held[i])))
        logprobs: list[list[float]] = [[] for _ in held]
        with self._ready():
            for start in range(0, len(order), self.max_num_seqs):
                batch = order[start : start + self.max_num_seqs]
                found = self._force([held[i] for i in batch], temperature)
                for i, values in zip(batch, found, strict=True):
                    logprobs[i] = values
        return logprobs

    def sleep(self) -> None:
        """Do nothing: nothing is held between calls."""

    def close(self) -> None:
        """Do nothing: the model belongs to the policy."""

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Full parameters, evaluation mode, and no generation defaults of the model's own.

        `generate` fills whatever it is not told from `model.generation_config`: repetition
        penalties or a stop at EOS there would change the sampled distribution or skip the score.
        """
        was_training = self.model.training
        defaults = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        try:
            with torch.no_grad(), self.unsharded():
                yield
        finally:
            self.model.train(was_training)
            self.model.generation_config = defaults

    def _decode(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Completion]:
        device = self.model.device
        width = max(len(prompt.prompt_ids) for prompt, _ in rows)
        padding = [width - len(prompt.prompt_ids) for prompt, _ in rows]
        ids = [
            [self.pad_token_id] * num_pad + list(prompt.prompt_ids)
            for num_pad, (prompt, _) in zip(padding, rows, strict=True)
        ]
        input_ids = torch.tensor(ids, device=device)
        mask = torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]
        sampler = _GumbelSampler(
            temperature=sampling.temperature,
            banned_ids=torch.tensor(self.banned_ids, device=device),
            score_token_id=self.score_token_id if sampling.needs_score else None,
            generators=[
                _generator(sampling.seed, prompt.prompt_id, sample, device)
                for prompt, sample in rows
            ],
        )
        extra_steps = int(sampling.needs_score)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens + extra_steps,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList(
                [_AfterEos(self.eos_token_ids, extra_steps, len(rows), device)]
            ),
            pad_token_id=self.pad_token_id,
            synced_gpus=False,
        )
        return self._cut(output[:, width:], sampler, sampling)

    def _cut(
        self, drawn_ids: Tensor, sampler: _GumbelSampler, sampling: Sampling
    ) -> list[Completion]:
        """End every row at its first EOS, by position; what was decoded after it is noise."""
        ids = drawn_ids[:, : sampling.max_new_tokens].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        scores = torch.stack(sampler.scores, dim=1).tolist() if sampling.needs_score else None
        completions = []
        for b, row in enumerate(ids):
            end = next((t for t, i in enumerate(row) if i in self.eos_token_ids), None)
            length = len(row) if end is None else end + 1
            completions.append(
                Completion(
                    completion_ids=tuple(row[:length]),
                    rollout_logprobs=tuple(logprobs[b][:length]),
                    finish_reason="length" if end is None else "stop",
                    # The step after the EOS was the one that had it as its last input.
                    score_logprob=None if end is None or scores is None else scores[b][length],
                )
            )
        return completions

    def _force(
        self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], temperature: float
    ) -> list[list[float]]:
        """Log-probs of the completion in each (prompt_ids, completion_ids)."""
        device = self.model.device
        width = max(len(prompt_ids) + len(completion_ids) for prompt_ids, completion_ids in rows)
        # Padding on the right is seen by no earlier token, so it needs no mask.
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        is_read = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, (prompt_ids, completion_ids) in enumerate(rows):
            length = len(prompt_ids) + len(completion_ids)
            input_ids[b, :length] = torch.tensor(prompt_ids + completion_ids)
            is_read[b, len(prompt_ids) - 1 : length - 1] = True
        labels = torch.cat([torch.tensor(completion_ids) for _, completion_ids in rows]).to(device)
        body, head = self.model.get_decoder(), self.model.get_output_embeddings()
        hidden_states = body(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        hidden_states = hidden_states[is_read.to(device)]  # [N, D]
        pieces = []
        for start in range(0, len(labels), _HEAD_ROWS):
            piece = slice(start, start + _HEAD_ROWS)
            logits = head(hidden_states[piece]).float() / temperature
            chosen = logits.gather(1, labels[piece, None])[:, 0]
            pieces.append(chosen - logits.logsumexp(1))
        lengths = [len(completion_ids) for _, completion_ids in rows]
        return [part.tolist() for part in torch.cat(pieces).split(lengths)]


class _GumbelSampler(LogitsProcessor):
    """Turns raw logits [B, V] into scores whose argmax is a sample; keeps the log-probs.

    `logprobs` and `scores` hold one float32 [B] per step; `scores[t]` is log pi(z_c | prompt and
    the first t tokens) at temperature 1.
    """

    def __init__(
        self,
        *,
        temperature: float,
        banned_ids: Tensor,
        score_token_id: int | None,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.temperature = temperature
        self.banned_ids = banned_ids
        self.score_token_id = score_token_id
        self.generators = generators
        self.logprobs: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._noise: Iterator[Tensor] = iter(())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` are the raw logits in float32; the name is transformers'."""
        if self.score_token_id is not None:
            self.scores.append(scores[:, self.score_token_id] - scores.logsumexp(1))
        tempered = scores / self.temperature
        noisy = tempered - self._next_noise(tempered)
        noisy[:, self.banned_ids] = -torch.inf
        chosen = tempered.gather(1, noisy.argmax(1, keepdim=True))[:, 0]
        self.logprobs.append(chosen - tempered.logsumexp(1))
        return noisy

    def _next_noise(self, like: Tensor) -> Tensor:
        """Return log E [B, V] of this step; minus it is Gumbel noise."""
        noise = next(self._noise, None)
        if noise is None:
            self._noise = iter(self._draw_block(like))
            noise = next(self._noise)
        return noise

    def _draw_block(self, like: Tensor) -> Tensor:
        """The next steps' noise [steps, B, V]; each row is its own generator's stream."""
        num_rows, vocab = like.shape
        block = like.new_empty(num_rows, max(1, _NOISE_BLOCK // vocab), vocab)
        for row, generator in zip(block, self.generators, strict=True):
            row.exponential_(generator=generator)
        # An exact 0 would become +inf and win against every token.
        return block.clamp_(min=torch.finfo(block.dtype).tiny).log_().transpose(0, 1)


class _AfterEos(StoppingCriteria):
    """A row is done `extra_steps` (0 or 1) tokens after its first EOS."""

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        extra_steps: int,
        num_rows: int,
        device: torch.device,
    ) -> None:
        self.eos_token_ids = torch.tensor(eos_token_ids, device=device)
        self.extra_steps = extra_steps
        self.has_ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """Which rows [B] need no further token."""
        had_ended = self.has_ended
        self.has_ended = had_ended | torch.isin(input_ids[:, -1], self.eos_token_ids)
        return had_ended if self.extra_steps else self.has_ended


def _generator(seed: int, prompt_id: str, sample: int, device: torch.device) -> torch.Generator:
    """The noise source of one completion."""
    # prompt_id comes last: the numbers before it cannot run into it.
    key = blake2b(f"{seed}/{sample}/{prompt_id}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    return generator.manual_seed(int.from_bytes(key, "big", signed=True))
