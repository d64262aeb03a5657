"""Shapes of real models, as their config.json has them, for plans that need no weights."""

from transformers import Qwen2Config

_QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "max_position_embeddings": 131072,
    "use_sliding_window": False,
    "bos_token_id": None,
}
QWEN_1_5B = _QWEN | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_7B = _QWEN | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
COUNTS_7B = (7_615_616_512, 233_057_792, 1_089_998_336)  # its model card rounds the first to 7.61B


def qwen(shape):
    """The configuration of a shape."""
    return Qwen2Config(**shape)
