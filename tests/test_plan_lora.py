"""laser-fast plan with LoRA: frozen weights in the compute dtype, state for the adapters alone."""

from model_shapes import COUNTS_7B, QWEN_7B, qwen
from tiny_models import make_config, make_model_config

from laser_fast.config import ModelConfig
from laser_fast.plan import Plan
from laser_fast.plan.memory import count_adapters


def test_adapters_by_hand():
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    config = make_model_config("qwen2", **sizes, num_key_value_heads=2)
    assert count_adapters(config, ModelConfig(path="m")) == (0, 0)
    some = ModelConfig(path="m", lora_rank=8, lora_targets=["q_proj", "k_proj"])
    linear = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    assert count_adapters(config, some) == (8 * (64 + 64 + 64 + 32), linear)
    every = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)
    assert count_adapters(config, ModelConfig(path="m", lora_rank=2)) == (2 * every, linear)


def test_lora_of_7b_fits_a_card_that_full_training_does_not():
    def plan(lora_rank):
        config = make_config(
            model={"lora_rank": lora_rank, "gradient_checkpointing": True},
            data={"max_prompt_tokens": 512, "prompts_per_step": 8},
            rollout={"max_new_tokens": 512, "group_size": 4, "max_num_seqs": 8},
            optim={"tokens_per_microbatch": 1025},
        )
        adapters = count_adapters(qwen(QWEN_7B), config.model)
        return Plan(config, qwen(QWEN_7B), *COUNTS_7B, 1, 48.0, 256.0, *adapters)

    whole, lora = plan(0), plan(32)
    assert whole.misfits() and not lora.misfits()
    assert lora.terms["frozen weights"].bytes == 2 * lora.num_parameters
    assert lora.terms["optimizer"].bytes == 8 * 28 * lora.num_adapter_parameters
    assert whole.terms["optimizer"].bytes == 8 * whole.num_parameters
