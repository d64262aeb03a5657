"""A tiny model of every family: packed rows, fused head and engine agree with its logits."""

import pytest
import torch
from family_models import FAMILIES, SIZES, save_family
from policy_ranks import (
    OBJECTIVE,
    PROMPTS,
    SAMPLING,
    SEQUENCES,
    TEMPERATURE,
    backward,
    full,
    make_engine,
)
from tiny_models import SCORE_TOKEN, VOCAB, naive_loss
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from laser_fast.config import ConfigError, ModelConfig
from laser_fast.model.families import checkpoint_entries, head_form, position_limit
from laser_fast.model.logprobs import last_token_logprobs, policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy, load_model_config
from laser_fast.training.sft import supervised_loss, supervised_sequences


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a random model."""
    folder = tmp_path_factory.mktemp(request.param)
    save_family(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def policy(family, world):
    return build_policy(ModelConfig(path=str(family)), world)


def load(family):
    """The model with transformers' own attention by definition, in float64."""
    return AutoModelForCausalLM.from_pretrained(
        family, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def test_a_step_is_that_of_plain_logits(policy, family, world):
    exact = load(family)
    loss = naive_loss(exact, SEQUENCES, OBJECTIVE, temperature=TEMPERATURE)
    loss.backward()
    found = backward(policy, world, SEQUENCES)
    torch.testing.assert_close(found["loss"].double(), loss.detach(), rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    for name, parameter in policy.hf.named_parameters():
        want = gradients[name]
        error = (full(parameter.grad).double() - want).norm() / want.norm()
        assert error < 1e-4, name
    policy.zero_grad()


def test_the_engine_samples_what_the_policy_reads(policy, world):
    groups = make_engine(policy.hf, unsharded=policy.unsharded).generate(PROMPTS, SAMPLING)
    packer = Packer(
        budget=64,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=SAMPLING.temperature,
        device=world.device,
    )
    completions = [c for group in groups for c in group.completions]
    for completion, (read, _) in zip(
        completions, policy_logprobs(policy, groups, packer), strict=True
    ):
        assert completion.rollout_logprobs == pytest.approx(read, abs=1e-4)


def test_several_tokens_are_read_at_once(policy, family, world):
    prompt, completion, tokens = (7, 8, 9), (10, 11, 2), [5, 30, 60]
    found = last_token_logprobs(
        policy, [(prompt, completion)], tokens, world, score_at="eos", budget=64
    )
    with torch.no_grad():
        logits = load(family)(input_ids=torch.tensor([prompt + completion])).logits
    expected = logits[0, -1].log_softmax(-1)[tokens]
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-5)


def test_weights_go_by_the_names_of_a_checkpoint(policy, family):
    from safetensors.torch import load_file

    written = load_file(family / "model.safetensors")
    streamed = dict(policy.stream_weights(torch.device("cpu")))
    tied = {"lm_head.weight"} - written.keys()
    assert streamed.keys() - tied == written.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in written.items())


def test_experts_are_taken_apart():
    stacked = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    found = dict(checkpoint_entries("layers.0.mlp.experts.gate_up_proj", stacked))
    assert list(found) == [
        f"layers.0.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1) for part in ("gate", "up")
    ]
    assert torch.equal(found["layers.0.mlp.experts.1.up_proj.weight"], stacked[1, 2:])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt_oss", {"sliding_window": None}, "whose experts are not known"),
        ("granite_swa", {"sliding_window": 4}, "windows of 4 tokens"),
        ("granite", {"logits_scaling": 2.0, "final_logit_softcapping": 3.0}, "a softcap and a div"),
    ],
)
def test_what_no_proof_would_see_is_refused(tmp_path, world, kind, changes, message):
    AutoConfig.for_model(kind, **SIZES | changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        config = ModelConfig(path=str(tmp_path))
        head_form(load_model_config(config))
        build_policy(config, world)


def test_a_body_without_blocks_is_refused(tmp_path, world):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "opt", **sizes, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="opt model, whose blocks are not at model.layers"):
        build_policy(ModelConfig(path=str(tmp_path)), world)


def test_sinks_of_attention_are_refused():
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ConfigError, match="attention sinks are not supported"):
        AttentionInterface()["laser_torch"](None, q, q, q, None, s_aux=torch.zeros(4))


@pytest.mark.parametrize(("kind", "limit"), [("longrope", 20), ("dynamic", 20), ("linear", 64)])
def test_positions_that_would_change_those_of_neighbours_are_not_offered(kind, limit):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    rope["original_max_position_embeddings"] = 20
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters=rope | factors)
    assert position_limit(config) == limit


def test_an_attention_that_is_not_known_is_refused(tmp_path, world, monkeypatch):
    """The packed kernel forgets the scale that the model asks for."""
    config = AutoConfig.for_model("granite", **SIZES, attention_multiplier=3.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    kernel = AttentionInterface()["laser_torch"]

    def forgetful(*args, scaling=None, **kwargs):
        return kernel(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "laser_torch", forgetful)
    with pytest.raises(ConfigError, match=r"differ .* nats a token; a granite model has a head or"):
        build_policy(ModelConfig(path=str(tmp_path)), world)


def test_a_supervised_loss_reads_the_head_as_it_is(policy, family, world):
    rows = [(s.prompt_ids, s.completion_ids) for s in SEQUENCES[:4]]
    exact, losses = load(family), []
    for prompt, response in rows:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([prompt + response])).logits[0]
        labels = torch.tensor(response)
        losses.append(cross_entropy(logits[len(prompt) - 1 : -1], labels, reduction="sum"))
    packer = Packer(
        budget=400, score_token_id=0, score_at="eos", temperature=1.0, device=world.device
    )
    found, _ = supervised_loss(policy, packer.pack(supervised_sequences(rows, world)))
    want = sum(losses) / sum(len(response) for _, response in rows)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


def test_a_head_that_is_not_known_is_refused(tmp_path, world, monkeypatch):
    """Its logits are scaled by something of which no config speaks."""
    from transformers import Qwen2ForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES)).save_pretrained(
        tmp_path
    )
    forward = Qwen2ForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
    with pytest.raises(ConfigError, match=r"differ .* nats a token; a qwen2 model has a head or"):
        build_policy(ModelConfig(path=str(tmp_path)), world)
