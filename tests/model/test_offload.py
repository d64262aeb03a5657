"""Small memory: activations on the host, blocks that stay gathered, a reference without masters."""

from contextlib import nullcontext

import pytest
import torch
from policy_ranks import LARGEST, SEQUENCES, backward, full
from torch.autograd.graph import save_on_cpu

from laser_fast.config import ModelConfig
from laser_fast.model.logprobs import label_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy

CHECKPOINTING = {"gradient_checkpointing": True}
ADAPTERS = {"lora_rank": 3, "lora_alpha": 6.0}


def build(world, folders, **keys):
    return build_policy(ModelConfig(path=str(folders / "qwen2-untied"), **keys), world)


def gradients(policy, world):
    """Of every trained parameter, from groups that share their prompts, in several microbatches."""
    backward(policy, world, SEQUENCES, budget=LARGEST)
    named = policy.hf.named_parameters()
    return {name: full(p.grad) for name, p in named if p.requires_grad}


@pytest.mark.parametrize("keys", [{}, CHECKPOINTING, ADAPTERS, CHECKPOINTING | ADAPTERS])
def test_offloaded_activations_change_no_bit(world, model_folders, keys):
    expected = gradients(build(world, model_folders, **keys), world)
    found = gradients(build(world, model_folders, **keys, activation_offload=True), world)
    assert found.keys() == expected.keys() and found
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


@pytest.fixture
def packed(monkeypatch):
    """What save_on_cpu took to the host."""
    taken = []

    def init(self, pin_memory=False, device_type="cuda"):
        original(self, pin_memory, device_type)
        pack = self.pack_hook
        self.pack_hook = lambda tensor: taken.append(tensor) or pack(tensor)

    original = save_on_cpu.__init__
    monkeypatch.setattr(save_on_cpu, "__init__", init)
    return taken


def batch_of(device):
    packer = Packer(
        budget=9 * LARGEST, score_token_id=5, score_at="eos", temperature=1.0, device=device
    )
    return packer.pack(SEQUENCES)


@pytest.mark.parametrize("keys", [{}, ADAPTERS])
def test_only_activations_leave_and_none_of_the_blocks_stays(world, model_folders, packed, keys):
    policy = build(world, model_folders, **keys, activation_offload=True)
    assert_only_activations_leave(policy, packed, at_least=10)


def assert_only_activations_leave(policy, packed, *, at_least):
    """Of each block so many large tensors or more, and no weight."""
    batch = batch_of(torch.device("cpu"))
    weights = {tuple(p.shape) for p in policy.hf.parameters() if p.ndim == 2}
    policy(batch, lambda hidden_states, head: hidden_states.sum() + head.weight.sum()).backward()
    T = len(batch.input_ids)
    gathered = {tuple(t.shape) for t in packed} | {tuple(t.shape[::-1]) for t in packed}
    assert T > 97 and not weights & gathered
    assert packed and max(t.numel() for t in packed) >= T * 48  # the MLP's
    large = [t for t in packed if t.numel() >= T * 32]
    assert len(large) > at_least * len(policy.hf.model.layers)


@pytest.mark.slow
def test_compiled_blocks_leave_their_activations_too(world, model_folders, packed, monkeypatch):
    # Traced and differentiated as always; only no C++ is made of them, which takes minutes.
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_block(m, backend="aot_eager"))
    policy = build(world, model_folders, compile=True, activation_offload=True)
    assert_only_activations_leave(policy, packed, at_least=8)
    found = {name: full(p.grad) for name, p in policy.hf.named_parameters()}
    policy.zero_grad()
    policy.saving, count = nullcontext, len(packed)
    batch = batch_of(world.device)
    policy(batch, lambda hidden, head: hidden.sum() + head.weight.sum()).backward()
    assert len(packed) == count
    for name, parameter in policy.hf.named_parameters():
        assert torch.equal(found[name], full(parameter.grad)), name


def test_with_checkpointing_one_tensor_of_a_block_leaves(world, model_folders, packed):
    policy = build(world, model_folders, activation_offload=True, **CHECKPOINTING)
    batch = batch_of(world.device)
    policy(batch, lambda hidden_states, head: hidden_states.sum()).backward()
    shape = (1, len(batch.input_ids), 32)
    assert [tuple(t.shape) for t in packed].count(shape) >= len(policy.hf.model.layers)
    # The others are the last norm's three and some of a token or a channel.
    assert sum(t.numel() == 32 * shape[1] for t in packed) <= len(policy.hf.model.layers) + 3
    assert all(t.numel() <= 32 * shape[1] for t in packed)


def test_blocks_stay_gathered_until_their_backward_if_asked(world, model_folders):
    batch = batch_of(world.device)

    def is_gathered(*_):
        return not hasattr(policy.hf.model.layers[0].mlp.up_proj.weight, "full_tensor")

    for reshards in (True, False):
        policy = build(world, model_folders, reshard_after_forward=reshards)
        with policy.unsharded():  # as for an engine, which leaves the setting as it was
            pass
        assert policy(batch, is_gathered) is not reshards
        label_logprobs(policy, [batch])  # no backward follows
        assert not is_gathered()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_without_masters_reads_the_same_bits(world, model_folders, dtype):
    config = ModelConfig(path=str(model_folders / "qwen2-tied"), compute_dtype=dtype)
    batches = [batch_of(world.device)]
    policy, reference = build_policy(config, world), build_policy(config, world, is_trained=False)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in reference.parameters())
    buffers = dict(policy.hf.named_buffers())
    assert all(torch.equal(b, buffers[name]) for name, b in reference.hf.named_buffers())
    found, expected = label_logprobs(reference, batches), label_logprobs(policy, batches)
    assert torch.equal(found[0], expected[0])
