"""laser-fast plan with LoRA: frozen weights in the compute dtype, state for the adapters alone."""

from model_shapes import COUNTS_7B, QWEN_7B, qwen
from tiny_models import make_config, make_model_config

from laser_fast.config import ModelConfig
from laser_fast.plan import Plan, advise
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


def plan_of_7b(memory_gb, **keys):
    config = make_config(
        model={"gradient_checkpointing": True, **keys},
        data={"max_prompt_tokens": 512, "prompts_per_step": 8},
        rollout={"max_new_tokens": 512, "group_size": 4, "max_num_seqs": 8},
        optim={"tokens_per_microbatch": 1025},
    )
    adapters = count_adapters(qwen(QWEN_7B), config.model)
    return Plan(config, qwen(QWEN_7B), *COUNTS_7B, 1, memory_gb, 256.0, *adapters)


def test_lora_of_7b_fits_a_card_that_full_training_does_not():
    whole, lora = plan_of_7b(48.0), plan_of_7b(48.0, lora_rank=32)
    assert whole.misfits() and not lora.misfits()
    assert lora.terms["frozen weights"].bytes == 2 * lora.num_parameters
    assert lora.terms["4-bit weights"].bytes == 0
    assert lora.terms["optimizer"].bytes == 8 * 28 * lora.num_adapter_parameters
    assert whole.terms["optimizer"].bytes == 8 * whole.num_parameters


def test_four_bits_of_7b_fit_a_card_that_lora_does_not():
    lora = plan_of_7b(18.0, lora_rank=32)
    found = plan_of_7b(18.0, lora_rank=32, lora_4bit=True)
    q = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    rest = COUNTS_7B[0] - 28 * q
    assert found.terms["4-bit weights"].bytes == 28 * q * (0.5 + 1 / 64 + 1 / 4096)
    assert found.terms["frozen weights"].bytes == 2 * rest
    root = COUNTS_7B[0] - 28 * COUNTS_7B[1]
    assert found.terms["gathered weights"].bytes == 2 * (root + 2 * (COUNTS_7B[1] - q) + q)
    assert found.terms["gathered policy"].bytes == 2 * (rest + q)
    offloaded = plan_of_7b(18.0, lora_rank=32, lora_4bit=True, cpu_offload=True)
    assert offloaded.terms["4-bit weights"] == found.terms["4-bit weights"]
    assert offloaded.terms["frozen weights"].bytes == 0
    assert offloaded.host_gb == 1e-9 * (16 * found.num_trained + 2 * rest)
    assert lora.misfits() and not found.misfits()
    assert "model.lora_4bit=true" in advise(lora)[0]
    # From full training, too; not where adapters and weights in host memory are enough.
    assert {"model.lora_rank=32", "model.lora_4bit=true"} <= set(advise(plan_of_7b(18.0))[0])
    assert "model.lora_4bit=true" not in advise(plan_of_7b(28.0))[0]
