"""Make the sandbox model: a small Qwen2, taught the task's form by a short supervised phase.

The labels of a row are its response, EOS and one <pad> after EOS. That last label gives the EOS
position a distribution like a pretrained model's: certain, with every reserved token equally
improbable, so that log pi(z_c | x, y) starts as nearly the same constant for all answers
(measured means for seeds 0, 1, 2: -11.5, -11.2, -11.5).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from laser_fast.data.sandbox import EOS_TOKEN, PAD_TOKEN, TOKENS, warm_up_rows, write_tokenizer
from laser_fast.training.attention import IMPLEMENTATIONS, attention_kwargs

logger = logging.getLogger(__name__)

STEPS = 350
_ROWS_PER_STEP = 96
_LR = 3e-3
_RAMP_STEPS = 20
_MIN_LR_RATIO = 0.05


def make_sandbox_model(
    folder: str | Path, *, seed: int, steps: int = STEPS, num_threads: int | None = None
) -> None:
    """Write a Hugging Face folder with the warm-started model and its tokenizer.

    A pure function of its arguments on one machine.

    Args:
        folder: made if missing.
        seed: names the initial weights and the problems.
        steps: fewer give a less capable model.
        num_threads: of torch meanwhile; by default every core, up to eight.
    """
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Beyond eight the matrices of one step are too small to share.
    num_threads = num_threads or min(len(os.sched_getaffinity(0)), 8)
    with _threads(num_threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model()
        _train(model, tokenizer, seed=seed, steps=steps)
    model.save_pretrained(folder)


def _new_model() -> Qwen2ForCausalLM:
    """0.53M parameters, almost all of them in two blocks."""
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKENS.index(EOS_TOKEN),
        pad_token_id=TOKENS.index(PAD_TOKEN),
        attn_implementation=IMPLEMENTATIONS["sdpa"],
    )
    return Qwen2ForCausalLM(config)


def _train(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    rows = warm_up_rows(seed=seed)
    model.train()
    for step in range(1, steps + 1):
        loss = _loss(model, _encode(tokenizer, list(islice(rows, _ROWS_PER_STEP))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            logger.info("sandbox model: warm start %d/%d, loss %.3f", step, steps, loss.item())


def _lr_factor(step: int, steps: int) -> float:
    """A linear ramp, then a cosine to 5%."""
    ramp = min(1.0, (step + 1) / _RAMP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return ramp * (_MIN_LR_RATIO + (1 - _MIN_LR_RATIO) * cosine)


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]]
) -> list[tuple[list[int], int]]:
    """Ids of prompt, response, EOS and <pad>, and how many of them are the prompt's."""
    problems = tokenizer([problem for problem, _ in rows])["input_ids"]
    responses = tokenizer([response + EOS_TOKEN + PAD_TOKEN for _, response in rows])["input_ids"]
    return [(p + r, len(p)) for p, r in zip(problems, responses, strict=True)]


def _loss(model: Qwen2ForCausalLM, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    """Mean cross-entropy of the labels; rows are packed, so nothing is computed on padding."""
    lengths = tuple(len(ids) - 1 for ids, _ in rows)
    input_ids = torch.tensor([i for ids, _ in rows for i in ids[:-1]])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.tensor([i for ids, _ in rows for i in ids[1:]])
    num_prompt = torch.tensor([n for _, n in rows]).repeat_interleave(torch.tensor(lengths))
    is_labelled = position_ids >= num_prompt - 1
    hidden_states = model.model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        use_cache=False,
        **attention_kwargs("sdpa", lengths, input_ids.device),
    ).last_hidden_state[0]
    return cross_entropy(model.lm_head(hidden_states[is_labelled]), labels[is_labelled])


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Torch's threads for the duration; launchers of several ranks start with one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
