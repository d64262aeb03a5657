"""Sizes of a model, counted from its config: no weights are read.

block = D (2 Dq + 2 Dkv) + 3 D F + 2 D     attention, gated MLP, two norms
        + biases and head norms, if the family has them
root  = V D + D                            embedding and last norm; the head is tied
        + V D                              or is not
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Counts of parameters and the widths that memory depends on."""

    num_layers: int
    hidden: int  # D
    mlp: int  # F
    vocab: int  # V
    query: int  # Dq, query heads times head dimension
    key: int  # Dkv, key-value heads times head dimension
    num_heads: int
    num_key_value_heads: int
    has_head_norms: bool  # of query and key (Qwen3)
    block: int  # parameters of one block
    root: int  # parameters outside the blocks

    @property
    def total(self) -> int:
        """All parameters."""
        return self.num_layers * self.block + self.root


def model_size(config: PretrainedConfig) -> ModelSize:
    """Count a model of a family that the policy supports (training.policy.SUPPORTED)."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * head_dim, key_value_heads * head_dim
    has_head_norms = config.model_type == "qwen3"
    block = hidden * (2 * query + 2 * key) + 3 * hidden * mlp + 2 * hidden
    # Qwen2 has biases on the three inputs of attention, the others on all four projections or none.
    if config.model_type == "qwen2":
        block += query + 2 * key
    elif config.attention_bias:
        block += query + 2 * key + hidden
    if getattr(config, "mlp_bias", False):
        block += 2 * mlp + hidden
    if has_head_norms:
        block += 2 * head_dim
    num_tables = 1 if config.tie_word_embeddings else 2
    return ModelSize(
        num_layers=config.num_hidden_layers,
        hidden=hidden,
        mlp=mlp,
        vocab=vocab,
        query=query,
        key=key,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        has_head_norms=has_head_norms,
        block=block,
        root=num_tables * vocab * hidden + hidden,
    )
