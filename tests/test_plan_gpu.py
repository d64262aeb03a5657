"""The plan's terms and its peak against what CUDA's allocator hands out for a real model's shape.

Needs neither pydantic nor a data set, so that `bench/gpu_check.sh` runs it on a bare GPU machine.
"""

from types import SimpleNamespace

import pytest
import torch
from model_shapes import QWEN_1_5B, qwen
from transformers import AutoModelForCausalLM

from laser_fast.model.attention import IMPLEMENTATIONS
from laser_fast.model.distributed import open_world
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, shard
from laser_fast.plan.memory import RESERVE_GB, Plan, count_parameters
from laser_fast.records import TrainingSequence
from laser_fast.training.update import IS_FUSED
from laser_kernels import linear_logprob_loss

pytestmark = pytest.mark.gpu

TOKENS = 4096
# Below the rounded gradients, so that they and not the chunk of logits make the head's term.
WORKSPACE_MB = 256


def _config(*, gradient_checkpointing):
    """The part of a configuration that a plan reads."""
    return SimpleNamespace(
        model=SimpleNamespace(
            attention="varlen",
            compute_dtype="bfloat16",
            gradient_checkpointing=gradient_checkpointing,
            activation_offload=False,
            cpu_offload=False,
            reshard_after_forward=True,
            replicas=1,
        ),
        data=SimpleNamespace(prompts_per_step=1),
        rollout=SimpleNamespace(engine="hf", group_size=4, max_num_seqs=4, tensor_parallel=1),
        max_sequence_tokens=17,
        loss=SimpleNamespace(kl_coef=0.0),
        optim=SimpleNamespace(tokens_per_microbatch=TOKENS, state_bits=32),
    )


def _batch(device):
    """Four completions that fill the microbatch, so that all but a few tokens are head rows."""
    length = TOKENS // 4 - 1
    sequence = TrainingSequence(
        prompt_ids=(3,),
        completion_ids=tuple(range(10, 10 + length)),
        rollout_logprobs=(-1.0,) * length,
        score_at="eos",
        advantage=1.0,
        token_weight=1.0 / TOKENS,
        reward=1.0,
        score_weight=1.0,
    )
    packer = Packer(budget=TOKENS, score_token_id=9, score_at="eos", temperature=1.0, device=device)
    return packer.pack([sequence] * 4)


def _measure(plan):
    """Bytes of each term, and of the peak of a whole step, after a first step that warms up."""
    config, device = plan.config, torch.device("cuda")
    root = plan.num_root_parameters
    allocated, largest = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    reset = torch.cuda.reset_peak_memory_stats
    nothing, found = allocated(), {}
    with open_world() as world:
        with device:
            hf = AutoModelForCausalLM.from_config(
                plan.model,
                dtype=torch.float32,
                attn_implementation=IMPLEMENTATIONS[config.model.attention],
            )
        policy = Policy(hf, compute_dtype=torch.bfloat16).train()
        if config.model.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        shard(policy, config.model, world)
        found["parameters"] = allocated() - nothing
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=IS_FUSED or None)
        batch = _batch(device)

        def read(hidden_states, head):
            # The root is gathered, the blocks are not any more.
            bodys = allocated() - before - hidden_states.nbytes
            found["activations"] = bodys - head.weight.element_size() * root
            reset()
            start = allocated() - hidden_states.nbytes
            loss = linear_logprob_loss(
                hidden_states, head.weight, batch.labels, lambda logprobs, rows: logprobs.sum()
            )
            found["head"] = largest() - start
            return loss

        for _ in range(2):  # the second step finds the optimizer's moments
            clean = allocated()
            for _ in range(2):  # the second microbatch finds gradients
                before = allocated()
                loss = policy(batch, read)
                peaks = [largest()]  # since the head began; the body before it holds less
                reset()
                loss.backward()
                peaks.append(largest())
                del loss
            found["gradients"] = allocated() - clean
            before = allocated()
            reset()
            optimizer.step()
            found.setdefault("optimizer", allocated() - before)
            found["peak"] = max(*peaks, largest()) - nothing
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_allocates_what_the_plan_says(monkeypatch, gradient_checkpointing):
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", str(WORKSPACE_MB))
    config = _config(gradient_checkpointing=gradient_checkpointing)
    counts = count_parameters(qwen(QWEN_1_5B))
    plan = Plan(config, qwen(QWEN_1_5B), *counts, 1, memory_gb=80.0, workspace_mb=WORKSPACE_MB)
    found = _measure(plan)
    torch.cuda.empty_cache()
    expected = {name: term.bytes for name, term in plan.terms.items()}
    training = ("head and loss", "backward of the blocks", "end of backward", "optimizer step")
    expected["peak"] = (max(plan.peaks[name] for name in training) - RESERVE_GB) * 1e9
    off = {
        name: f"{measured / 1e9:.2f} GB measured, {expected[name] / 1e9:.2f} planned"
        for name, measured in found.items()
        if abs(measured - expected[name]) > 0.1 * expected[name]
    }
    assert not off, off
