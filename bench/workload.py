"""The training steps of the benchmarks: a model's shape and its packed microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.random_qwen2 import Sizes, random_qwen2
from laser_fast.model.attention import IMPLEMENTATIONS
from laser_fast.model.packing import Packer
from laser_fast.records import Microbatch, TrainingSequence

SCORE_TOKEN = 2


@dataclass(frozen=True)
class Workload:
    """A model's shape and a step's data."""

    name: str
    sizes: Sizes
    num_sequences: int
    prompt_tokens: tuple[int, int]  # range of lengths
    completion_tokens: tuple[int, int]
    budget: int  # tokens of a microbatch


QUICKSTART = Workload(
    "quickstart",
    Sizes(128, 512, 2, 4, 4, 33),
    num_sequences=256,
    prompt_tokens=(10, 13),
    completion_tokens=(20, 36),
    budget=8192,
)
QWEN_1_5B = Workload(
    "qwen2.5-1.5b",
    Sizes(1536, 8960, 28, 12, 2, 151936),
    num_sequences=16,
    prompt_tokens=(128, 128),
    completion_tokens=(896, 896),
    # Two microbatches: the activations and the plain logits of all 16384 tokens, counted together,
    # would not fit a card of 80 GB.
    budget=8192,
)


def make_model(workload: Workload, device: torch.device) -> PreTrainedModel:
    """Random weights; bfloat16 on a GPU, float32 elsewhere."""
    attention = IMPLEMENTATIONS["sdpa"]
    with device:
        model = random_qwen2(
            workload.sizes, tie_word_embeddings=True, attn_implementation=attention
        )
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).train()


def load_model(folder: str, device: torch.device) -> tuple[Workload, PreTrainedModel]:
    """A real model with a workload of its sizes: short word problems and their solutions."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=IMPLEMENTATIONS["sdpa"]
    )
    config = model.config
    sizes = Sizes(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
    )
    workload = Workload(
        Path(folder).name,
        sizes,
        num_sequences=16,
        prompt_tokens=(40, 50),
        completion_tokens=(15, 30),
        budget=2048,
    )
    return workload, model.to(device).train()


def make_microbatches(workload: Workload, device: torch.device) -> list[Microbatch]:
    """Random completions that have finished, with advantages and rewards of both kinds."""
    rng = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (1,), generator=rng))
        vocabulary = workload.sizes.vocabulary
        return tuple(torch.randint(3, vocabulary, (length,), generator=rng).tolist())

    sequences = []
    for index in range(workload.num_sequences):
        completion = ids(*workload.completion_tokens)
        sequences.append(
            TrainingSequence(
                prompt_ids=ids(*workload.prompt_tokens),
                completion_ids=completion,
                rollout_logprobs=(-3.0,) * len(completion),
                score_at="eos",
                advantage=1.0 - index % 3,
                token_weight=1 / (workload.num_sequences * len(completion)),
                reward=float(index % 2),
                score_weight=1 / workload.num_sequences,
            )
        )
    return make_packer(workload, device).microbatches(sequences)


def make_packer(workload: Workload, device: torch.device) -> Packer:
    """Packs at the workload's budget, at temperature 1."""
    return Packer(
        budget=workload.budget,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=1.0,
        device=device,
    )
