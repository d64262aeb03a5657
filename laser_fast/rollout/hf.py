"""The engine that samples with the policy's own Hugging Face model.

Rows are left-padded and decoded together. With the logits l [R, V] that follow what a row has
read, each step takes, by the Gumbel-max trick,

    choice   = argmax_v  l_v / T - log E_v,   E_v ~ Exp(1),  v not banned
    logprob  = log_softmax(l / T)[choice]                    (full distribution, ban or not)

and, for the score at temperature 1,

    score    = log_softmax(l)[z_c]

in the step that draws the EOS, or in one more that reads it, where z_c is the choice as it is with
vLLM's logits processor.

E comes from a generator of the completion's own, keyed by (seed, prompt_id, sample index): a
completion depends on weights, prompt and seed, never on its neighbours in the batch, the world
size or a resume.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor

from laser_fast import needs_train

with needs_train():
    from transformers import DynamicCache, PreTrainedModel

from laser_fast.records import Completion, Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import Engine, groups_of
from laser_fast.rollout.score_request import parse_completion
from laser_fast.stopping import poll

# Numbers drawn at once per row: one call per row and step would cost more than the forward of a
# small model. A constant, since the length of a draw is part of the random stream.
_NOISE_BLOCK = 1024
# Rows leave the batch when at most this share of it is still open: each time copies the cache.
_SHRINK_BELOW = 0.75


class HfEngine(Engine):
    """Static-batch sampler on the policy's own parameters, so that a sync has nothing to do."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: SpecialTokens,
        *,
        max_num_seqs: int,  # completions decoded at once
        # A context in which the model's parameters are plain full tensors.
        unsharded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.max_num_seqs = max_num_seqs
        self.unsharded = unsharded
        padding_ids = range(tokens.vocab_size, model.config.vocab_size)
        self._banned_ids = (tokens.score_token_id, *padding_ids)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample the completions of each prompt."""
        # Neighbours of equal length need no padding.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p].prompt_ids))
        rows = [(prompts[p], sample) for p in order for sample in range(sampling.group_size)]
        drawn: list[Completion] = []
        was_training = self.model.training
        self.model.eval()
        try:
            with self.unsharded():
                for start in range(0, len(rows), self.max_num_seqs):
                    drawn += self._decode(rows[start : start + self.max_num_seqs], sampling)
        finally:
            self.model.train(was_training)
        groups = dict(zip(order, groups_of([prompts[p] for p in order], drawn), strict=True))
        return [groups[p] for p in range(len(prompts))]

    def _decode(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Completion]:
        """Sample one completion for each (prompt, sample index)."""
        device = self.model.device
        context = self._read_prompts([prompt for prompt, _ in rows])
        noise = _Noise(sampling.seed, rows, device)
        eos_token_ids = torch.tensor(self.tokens.eos_token_ids, device=device)
        banned_ids = torch.tensor(self._banned_ids, device=device)
        score_token_id = self.tokens.score_token_id
        reads_eos = sampling.score_at == "eos"
        num_steps = sampling.num_steps
        completion_ids = torch.zeros(len(rows), num_steps, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(rows), num_steps, device=device)
        scores = torch.zeros_like(logprobs)
        row = torch.arange(len(rows), device=device)  # [R], the rows in the batch
        has_ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for step in range(num_steps):
            poll()
            logits = context.logits
            tempered = logits / sampling.temperature
            allowed = truncate(tempered.index_fill(1, banned_ids, -torch.inf), sampling)
            choice = allowed.sub_(noise.step(row, tempered)).argmax(1)
            logprob = tempered.gather(1, choice[:, None])[:, 0] - tempered.logsumexp(1)
            if sampling.score_at:
                scores[row, step] = logits[:, score_token_id] - logits.logsumexp(1)
                choice = choice.where(~has_ended, score_token_id)
            completion_ids[row, step], logprobs[row, step] = choice, logprob
            had_ended, has_ended = has_ended, has_ended | torch.isin(choice, eos_token_ids)
            is_open = ~(had_ended if reads_eos else has_ended)
            num_open = int(is_open.sum())
            if num_open == 0 or step + 1 == num_steps:
                break
            if num_open <= _SHRINK_BELOW * len(row):
                kept = is_open.nonzero()[:, 0]
                row, choice, has_ended = row[kept], choice[kept], has_ended[kept]
                context.select(kept)
            context.read(choice[:, None], has_ended.new_ones(len(row), 1))
        drawn = zip(completion_ids.tolist(), logprobs.tolist(), scores.tolist(), strict=True)
        return [parse_completion(*columns, self.tokens, sampling) for columns in drawn]

    def _read_prompts(self, prompts: Sequence[Prompt]) -> _Context:
        """Every distinct prompt read once, then one row for each entry of `prompts`."""
        device = self.model.device
        place = {ids: i for i, ids in enumerate(dict.fromkeys(p.prompt_ids for p in prompts))}
        width = max(map(len, place))
        ids = [[self.tokens.pad_token_id] * (width - len(p)) + list(p) for p in place]
        is_read = [[False] * (width - len(p)) + [True] * len(p) for p in place]
        context = _Context(self.model, len(place))
        context.read(torch.tensor(ids, device=device), torch.tensor(is_read, device=device))
        context.select(torch.tensor([place[p.prompt_ids] for p in prompts], device=device))
        return context


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [R, V] without the tokens that a sampling leaves out, as vLLM does."""
    if sampling.min_p > 0:
        least = logits.amax(1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_k > 0:
        largest = logits.topk(min(sampling.top_k, logits.shape[1])).values
        logits = logits.masked_fill(logits < largest[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=1, descending=True)
        shares = ordered.softmax(1)
        is_left_out = shares.cumsum(1) - shares >= sampling.top_p  # by those before it
        ordered = ordered.masked_fill(is_left_out, -torch.inf)
        logits = torch.empty_like(logits).scatter_(1, places, ordered)
    return logits


class _Context:
    """What the model has read of R rows, and the logits [R, V] in float32 that follow it."""

    logits: Tensor

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.empty(num_rows, 0, dtype=torch.bool, device=model.device)
        # Older versions of transformers, and patched models, call the cache by its old name.
        is_new = "cache" in inspect.signature(model.forward).parameters
        self.cache_name = "cache" if is_new else "past_key_values"

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Append tokens [R, n]; the mask is False on padding."""
        self.mask = torch.cat([self.mask, mask], dim=1)
        position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.logits = output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or drop rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.logits = self.mask[rows], self.logits[rows]


class _Noise:
    """log E, minus which is Gumbel noise; each row draws from a generator of its own."""

    def __init__(self, seed: int, rows: Sequence[tuple[Prompt, int]], device: torch.device) -> None:
        self.generators = []
        for prompt, sample in rows:
            # prompt_id comes last: the numbers before it cannot run into it.
            key = blake2b(f"{seed}/{sample}/{prompt.prompt_id}".encode(), digest_size=8).digest()
            generator = torch.Generator(device)
            self.generators.append(generator.manual_seed(int.from_bytes(key, "big", signed=True)))
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
