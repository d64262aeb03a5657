"""Adapters beside frozen weights equal the merged model, and nothing else is trained or kept.

Of 4-bit weights the merged model is that of their dequantized values.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, SIZES
from policy_ranks import (
    LARGEST,
    MODEL_CASES,
    OBJECTIVE,
    SEQUENCES,
    TEMPERATURE,
    adapt,
    backward,
    checkpoint_config,
    full,
    full_parameters,
    update,
)
from tiny_models import SCORE_TOKEN, VOCAB, make_model, naive_loss, save_model
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from laser_fast.config import ConfigError, ModelConfig, UpdateConfig
from laser_fast.model.flops import training_flop
from laser_fast.model.logprobs import label_logprobs
from laser_fast.model.lora import linear_layers
from laser_fast.model.nf4 import NF4_BYTES, Nf4Linear
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.model.weights import base_digest
from laser_fast.training.checkpoint import load_checkpoint, save_checkpoint
from laser_fast.training.export import write_model
from laser_fast.training.update import build_optimizer

CPU, HELPERS = torch.device("cpu"), Path(__file__).parents[1] / "helpers"
RANK, ALPHA = 3, 6.0  # a scale of 2
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks, for 4 bits
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
BITS = [pytest.param({}, id="plain")]
BITS.append(pytest.param({"lora_4bit": True}, id="4-bit", marks=needs_bitsandbytes))
SOME = {"lora_targets": ("q_proj", "down_proj")}
CASES = [
    ("qwen2-tied", {}),
    ("qwen2-untied", SOME),
    ("llama-untied", {}),
    ("qwen3-tied", {}),
    pytest.param(("qwen2-untied", SOME | {"lora_4bit": True}), marks=needs_bitsandbytes),
    pytest.param(("qwen3-tied", {"lora_4bit": True}), marks=needs_bitsandbytes),
]


def config_of(folder, **changes):
    return ModelConfig(path=str(folder), lora_rank=RANK, lora_alpha=ALPHA, **changes)


@pytest.fixture(params=CASES, ids=str)
def case(request, world, model_folders, tmp_path):
    """A policy with adapters, and the folder of its model."""
    name, keys = request.param
    folder = model_folders / name
    if "lora_4bit" in keys:
        folder, (family, tied) = tmp_path / "wide", MODEL_CASES[name]
        make_model(family, tie_word_embeddings=tied, **WIDE).save_pretrained(folder)
    return build_policy(config_of(folder, **keys), world), folder


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer."""
    save_model(tmp_path / "base", vocab_size=VOCAB, **WIDE)
    return tmp_path / "base"


def nearest_nf4(weight):
    """Each value as the nearest of nf4's levels times the largest of its 64; scales unrounded."""
    from bitsandbytes.functional import get_4bit_type

    blocks, levels = weight.reshape(-1, 64).double(), get_4bit_type("nf4", device="cpu").double()
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scales).reshape(weight.shape).float()


def microbatches():
    packer = Packer(
        budget=LARGEST,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=CPU,
    )
    return packer.microbatches(SEQUENCES)


def logprobs(policy):
    with torch.no_grad():
        return torch.cat(label_logprobs(policy, microbatches()))


def test_the_policy_starts_as_the_model_and_can_be_read_as_it(case, world, tmp_path):
    policy, folder = case
    base, streamed = AutoModelForCausalLM.from_pretrained(folder), dict(policy.stream_weights(CPU))
    quantized = {f"{n}.weight" for n, m in policy.hf.named_modules() if isinstance(m, Nf4Linear)}
    quantized = {name.replace(".base_layer.", ".") for name in quantized}
    for name, tensor in base.state_dict().items():
        if name in quantized:
            torch.testing.assert_close(streamed[name], nearest_nf4(tensor), rtol=0.02, atol=0)
            tensor.copy_(streamed[name])
        else:
            assert torch.equal(streamed[name], tensor), name
    base.save_pretrained(tmp_path / "frozen")
    frozen = logprobs(build_policy(ModelConfig(path=str(tmp_path / "frozen")), world))
    assert torch.equal(logprobs(policy), frozen)
    adapted = logprobs(adapt(policy))
    assert not torch.allclose(adapted, frozen)
    with policy.without_adapters():
        assert torch.equal(logprobs(policy), frozen)
    assert torch.equal(logprobs(policy), adapted)


def test_loss_and_gradients_are_those_of_the_merged_weights(case, world):
    """In float64, dA = s B^T dW and dB = s dW A^T, with dW from plain logits."""
    policy, folder = case
    adapt(policy)
    with policy.without_adapters():  # leaves no trace in what is trained
        logprobs(policy)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact.load_state_dict(dict(policy.stream_weights(CPU)))
    loss = naive_loss(exact.double(), SEQUENCES, OBJECTIVE, temperature=TEMPERATURE)
    loss.backward()
    found = backward(policy, world, SEQUENCES)
    torch.testing.assert_close(found["loss"].double(), loss.detach(), rtol=1e-5, atol=0)
    own = dict(policy.hf.named_parameters())
    trained = [name for name, parameter in own.items() if parameter.grad is not None]
    assert trained == [name for name in own if "lora_" in name] and trained
    for name in trained:
        layer = name.partition(".lora_")[0]
        A, B = (full(own[f"{layer}.lora_{n}.default.weight"]).double() for n in "AB")
        dW = exact.get_submodule(layer).weight.grad
        expected = ALPHA / RANK * (B.T @ dW if "lora_A" in name else dW @ A.T)
        error = (full(own[name].grad).double() - expected).norm() / expected.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("keys", BITS)
def test_engines_and_folders_get_the_merged_model(folder, world, tmp_path, keys):
    config = config_of(folder, **keys)
    policy = adapt(build_policy(config, world))
    base = AutoModelForCausalLM.from_pretrained(folder)
    streamed = dict(policy.stream_weights(CPU))
    assert streamed.keys() == base.state_dict().keys()
    write_model(policy, config, tmp_path / "merged", world)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, streamed[name]), name
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), policy.unsharded():
        actual = policy.hf(input_ids=ids).logits
        torch.testing.assert_close(actual, written(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(actual, base(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("keys", BITS)
@pytest.mark.parametrize("targets", [(), ("v_proj", "up_proj")])
def test_peft_reads_the_adapter_that_is_written(folder, world, tmp_path, targets, keys):
    from peft import PeftModel

    config = config_of(folder, lora_targets=targets, **keys)
    policy = adapt(build_policy(config, world))
    write_model(policy, config, tmp_path / "adapter", world, adapter=True)
    assert not list((tmp_path / "adapter").glob("model*"))
    quantizer = None
    if keys:
        quantizer = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantizer
    )
    # In evaluation, bitsandbytes' own layer computes in bfloat16 on some CPUs.
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), policy.unsharded():
        expected = policy.hf(input_ids=ids).logits
        torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_update_moves_adapters_alone_and_a_checkpoint_holds_them_alone(folder, world, tmp_path):
    config = config_of(folder)
    policy = build_policy(config, world)
    optimizer = build_optimizer(policy, UpdateConfig(steps=9, lr=0.05))
    before = full_parameters(policy)
    after = update(policy, world, optimizer)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    run = checkpoint_config(config, tmp_path)
    state = {"policy": policy, "optimizer": optimizer, "state": {}, "world": world}
    path = save_checkpoint(run, 1, **state)
    held = FileSystemReader(path).read_metadata().state_dict_metadata
    models = {name for name in held if name.startswith("model.")}
    assert models and all("lora_" in name for name in models)

    resumed = build_policy(config, world)
    its_optimizer = build_optimizer(resumed, UpdateConfig(steps=9, lr=0.05))
    load_checkpoint(path, policy=resumed, optimizer=its_optimizer)
    expected = update(policy, world, optimizer)
    actual = update(resumed, world, its_optimizer)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_frozen_weights_that_changed_are_named(folder):
    config = config_of(folder)
    model_config = AutoConfig.from_pretrained(folder)
    before = base_digest(config, model_config)
    assert base_digest(config, model_config) == before and list(before) == ["model.path"]
    assert base_digest(ModelConfig(path=str(folder)), model_config) == {}
    save_model(folder, vocab_size=VOCAB, seed=1)
    assert base_digest(config, model_config) != before


def test_frozen_weights_are_kept_in_the_compute_dtype_and_cost_less(folder, world):
    policy = build_policy(config_of(folder, compute_dtype="bfloat16"), world)
    for name, parameter in policy.hf.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    whole = build_policy(ModelConfig(path=str(folder)), world)
    num_base = sum(p.numel() for p in whole.hf.model.layers.parameters())
    num_adapter = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    batches = microbatches()
    tokens, rows = (sum(len(getattr(b, n)) for b in batches) for n in ("input_ids", "labels"))
    saved = 2 * (num_base * tokens + whole.hf.lm_head.weight.numel() * rows)
    found = training_flop(whole, batches) - training_flop(policy, batches)
    assert found == saved - 6 * num_adapter * tokens


def test_layers_that_are_not_there_are_named(folder, world):
    with pytest.raises(ConfigError, match="lora_targets: lm_head, w is no linear layer.*q_proj"):
        build_policy(config_of(folder, lora_targets=("lm_head", "q_proj", "w")), world)


def test_blocks_that_differ_are_refused(world, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, intermediate_size=48, mlp_only_layers=[0], **sizes, **experts
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the blocks of this model differ"):
        build_policy(config_of(tmp_path), world)


def test_experts_are_no_linear_layers():
    config = AutoConfig.for_model("qwen3_moe", **SIZES | FAMILIES["qwen3_moe"])
    with torch.device("meta"):
        found = linear_layers(AutoModelForCausalLM.from_config(config))
    assert [*found] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("package", "extra", "keys"),
    [("peft", "lora", {}), ("bitsandbytes", "qlora", {"lora_4bit": True})],
)
def test_a_missing_package_is_named(folder, world, monkeypatch, package, extra, keys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}; pip install 'laser-fast\[{extra}\]'"):
        build_policy(config_of(folder, **keys), world)


@pytest.mark.parametrize("keys", [{"lora_targets": ("q_proj",)}, {"lora_4bit": True}], ids=str)
def test_what_is_for_adapters_needs_a_rank(keys):
    with pytest.raises(ValueError, match=rf"model.{[*keys][0]} is for adapters.*; set a rank"):
        ModelConfig(path="m", **keys)


@needs_bitsandbytes
def test_rows_of_no_whole_blocks_are_refused(model_folders, world):
    with pytest.raises(ConfigError, match="layer has 32 inputs; expected a multiple of 64"):
        build_policy(config_of(model_folders / "qwen2-tied", lora_4bit=True), world)


@needs_bitsandbytes
def test_four_bits_are_what_plan_says_and_compute_as_much(world, tmp_path):
    save_model(tmp_path / "base", vocab_size=VOCAB, hidden_size=128, intermediate_size=256)
    config = config_of(tmp_path / "base", compute_dtype="bfloat16")
    plain = build_policy(config, world)
    policy = build_policy(config.model_copy(update={"lora_4bit": True}), world)
    layer = policy.hf.model.layers[0].mlp.up_proj.base_layer
    num_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    assert num_bytes - layer.mean_scale.nbytes == 128 * 256 * NF4_BYTES == 16904
    assert layer.dequantized().dtype == torch.bfloat16
    batches = microbatches()
    assert training_flop(policy, batches) == training_flop(plain, batches)


@needs_bitsandbytes
def test_four_bits_on_two_ranks(world, folder, tmp_path):
    """Rank 1 holds what rank 0 quantized, whatever is sharded; and a run goes on bit for bit."""
    command = [sys.executable, HELPERS / "qlora_ranks.py", folder, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    policy = adapt(build_policy(config_of(folder, lora_4bit=True), world))
    for name, want in policy.stream_weights(CPU):
        assert torch.equal(found["stream"][name], want), name
    backward(policy, world, SEQUENCES)
    wanted = {n: full(p.grad) for n, p in policy.hf.named_parameters() if p.requires_grad}
    assert len(found["gradients"]) == 4
    for case, gradients in found["gradients"].items():
        assert gradients.keys() == wanted.keys()
        for name, want in wanted.items():
            assert (gradients[name] - want).norm() / want.norm() < 1e-5, (case, name)
    run = found["checkpoint"]
    for name, want in run["second"].items():
        assert torch.equal(run["loaded"][name], run["first"][name]), name
        assert torch.equal(run["resumed"][name], want), name
