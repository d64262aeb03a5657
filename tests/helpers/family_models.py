"""A tiny random model of every family of laser_fast/model/families.py."""

import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = tiny_models.SIZES | {"head_dim": 8, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
FAMILIES = {
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, **WINDOWS},
    "gemma3_text": {"query_pre_attn_scalar": 8, **WINDOWS},
    "glm4": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "mistral": {"sliding_window": 4},
    "olmo2": {},
    "olmo3": WINDOWS,
    "phi3": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def save_family(folder, family, **changes):
    """Write a random model; `changes` are keys of its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
