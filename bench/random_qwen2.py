"""Qwen2 models with random weights, for benchmarks that need a model but no skill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM


class Sizes(NamedTuple):
    """What a Qwen2 is made of."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SMOKE = Sizes(64, 96, 2, 2, 2, 512)


def random_qwen2(sizes: Sizes, **options: Any) -> Qwen2ForCausalLM:
    """The same weights in every call; `options` are further ones of Qwen2Config."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        **options,
    )
    return Qwen2ForCausalLM(config)
