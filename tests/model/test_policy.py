"""The sharded policy equals plain transformers on 1, 2 and 4 gloo ranks."""

import policy_ranks
import pytest
import torch
from policy_ranks import LARGEST, MODEL_CASES, OBJECTIVE, PROMPTS, SAMPLING, SEQUENCES, TEMPERATURE
from tiny_models import make_config, make_model, naive_loss

from laser_fast.config import ConfigError, ModelConfig
from laser_fast.model.distributed import check_world
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy, check_lengths, load_model_config
from laser_fast.model.vocabulary import load_tokenizer

SIZES = {1: "one_rank", 2: "two_ranks", 4: "four_ranks"}


@pytest.fixture(params=SIZES, ids=lambda size: f"{size} ranks")
def ranks(request):
    return request.getfixturevalue(SIZES[request.param])


@pytest.fixture(scope="module")
def exact():
    """Loss and gradients of every model from plain float64 logits, in one process."""
    found = {}
    for name, (family, tied) in MODEL_CASES.items():
        model = make_model(family, tie_word_embeddings=tied).double()
        loss = naive_loss(model, SEQUENCES, OBJECTIVE, temperature=TEMPERATURE)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        found[name] = {"loss": loss.detach(), "norm": norm, "gradients": gradients}
    return found


def assert_same_step(actual, expected, *, tolerance=1e-5):
    """Loss, norm and every gradient agree, relative to their sizes."""
    for name in ("loss", "norm"):
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=tolerance, atol=0
        )
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, want in expected["gradients"].items():
        error = (actual["gradients"][name].double() - want.double()).norm() / want.norm()
        assert error < tolerance, (name, error)


def test_gradients_equal_plain_logits(ranks, exact):
    assert ranks["gradients"].keys() >= {"qwen2-tied", "qwen2-untied"}
    for name, found in ranks["gradients"].items():
        assert_same_step(found, exact[name])


def test_every_family_is_tested(two_ranks):
    assert two_ranks["gradients"].keys() == MODEL_CASES.keys()
    tied = two_ranks["gradients"]["qwen2-tied"]["gradients"]
    assert "lm_head.weight" not in tied
    assert (tied["model.embed_tokens.weight"].norm(dim=1) > 0).sum() > 90  # rows of the head too


def test_world_size_changes_nothing(one_rank, two_ranks, four_ranks):
    for name in ("qwen2-tied", "qwen2-untied"):
        for other in (two_ranks, four_ranks):
            found, expected = other["gradients"][name], one_rank["gradients"][name]
            assert_same_step(found, expected)


def test_budget_and_packing_order_change_nothing(ranks):
    expected = ranks["gradients"]["qwen2-tied"]
    small = ranks["variants"]["small budget"]
    assert small["num_batches"] > expected["num_batches"]
    for name in ("small budget", "reversed", "shared out"):
        assert_same_step(ranks["variants"][name], expected)


def test_ranks_compute_about_as_many_tokens_and_no_more(two_ranks, four_ranks):
    for ranks in (two_ranks, four_ranks):
        as_they_come = ranks["gradients"]["qwen2-tied"]["num_tokens"]
        shared_out = ranks["variants"]["shared out"]["num_tokens"]
        assert max(shared_out) < max(as_they_come)
        assert sum(shared_out) <= sum(as_they_come)


@pytest.mark.parametrize("variant", ["gradient_checkpointing", *policy_ranks.MEMORY_SAVERS])
def test_memory_savers_change_nothing(two_ranks, variant):
    assert_same_step(two_ranks["variants"][variant], two_ranks["gradients"]["qwen2-tied"])


def test_a_reference_without_masters_reads_the_same_bits(two_ranks):
    masters, rounded = two_ranks["references"]
    assert all(map(torch.equal, masters, rounded)) and len(masters) > 1


def test_checkpointed_blocks_run_again_in_the_backward(two_ranks):
    num_batches = two_ranks["variants"]["gradient_checkpointing"]["num_batches"]
    assert two_ranks["recomputed_calls"] == 2 * num_batches


def test_replicas_change_nothing(four_ranks):
    assert four_ranks["mesh"] == (2, 2)
    assert_same_step(four_ranks["variants"]["replicas"], four_ranks["gradients"]["qwen2-tied"])


def test_replicas_are_joined_once_per_update(four_ranks):
    found, plain = four_ranks["accumulated"], four_ranks["gradients"]["qwen2-tied"]
    assert found["num_batches"] > 1
    assert found["num_all_reduces"] == four_ranks["num_shards"]
    for name, want in plain["gradients"].items():
        assert (found["gradients"][name] - want).norm() / want.norm() < 1e-5, name


def test_half_precision_compute_has_float32_masters(two_ranks, exact):
    found = two_ranks["bfloat16"]
    assert two_ranks["bfloat16_masters"] == {torch.float32}
    assert {g.dtype for g in found["gradients"].values()} == {torch.float32}
    error = abs(found["loss"] / exact["qwen2-untied"]["loss"] - 1)
    assert 1e-5 < error < 0.05  # it did compute in bfloat16
    for name, want in exact["qwen2-untied"]["gradients"].items():
        got = found["gradients"][name].double()
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99, name


def test_streamed_weights_are_the_whole_state_dict(ranks):
    expected = make_model("qwen2").state_dict()
    assert "lm_head.weight" in expected  # tied, and still sent under both names
    for stream in (ranks["stream"], ranks.get("replicas_stream", ranks["stream"])):
        assert stream.keys() == expected.keys()
        for name, want in expected.items():
            assert type(stream[name]) is torch.Tensor
            assert torch.equal(stream[name], want), name


def test_streamed_weights_come_in_the_compute_dtype(two_ranks):
    expected = make_model("qwen2", tie_word_embeddings=False).state_dict()
    assert two_ranks["bfloat16_stream"].keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(two_ranks["bfloat16_stream"][name], want.bfloat16()), name


def test_generation_from_shards_is_generation_from_the_model(ranks):
    engine = policy_ranks.make_engine(make_model("qwen2"))
    everything = engine.generate(PROMPTS, SAMPLING)
    assert {c.is_finished for g in everything for c in g.completions} == {True, False}
    for rank, groups in enumerate(ranks["rollout"]["groups"]):
        assert len(groups) == rank + 1  # ranks were out of step
        for group, expected in zip(groups, everything, strict=False):
            assert group.prompt == expected.prompt
            for got, want in zip(group.completions, expected.completions, strict=True):
                assert got.completion_ids == want.completion_ids
                assert got.rollout_logprobs == pytest.approx(want.rollout_logprobs, abs=1e-5)
                assert got.score_logprob == pytest.approx(want.score_logprob, abs=1e-5)


def test_training_goes_on_after_generation(ranks):
    rollout = ranks["rollout"]
    assert all(rollout["is_sharded"])
    assert_same_step(rollout["after"], rollout["before"], tolerance=1e-7)


def test_unsharded_gives_full_parameters_back_as_shards(world, model_folders):
    policy = build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)
    with pytest.raises(RuntimeError, match="generation failed"), policy.unsharded():
        assert type(policy.hf.lm_head.weight) is torch.nn.Parameter
        raise RuntimeError("generation failed")
    assert all(hasattr(p, "full_tensor") for p in policy.parameters())


def test_only_labelled_rows_reach_the_head(world, model_folders):
    policy = build_policy(ModelConfig(path=str(model_folders / "qwen2-untied")), world)
    packer = Packer(
        budget=9 * LARGEST,
        score_token_id=5,
        score_at="eos",
        temperature=1.0,
        device=torch.device("cpu"),
    )
    batch = packer.pack(SEQUENCES[:3])
    num_scored = sum(s.score_at is not None for s in SEQUENCES[:3])
    num_rows = sum(len(s.completion_ids) for s in SEQUENCES[:3]) + num_scored
    shapes = policy(batch, lambda hidden_states, head: (hidden_states.shape, head.weight.shape))
    assert shapes == ((num_rows, 32), (97, 32))


@pytest.mark.parametrize(
    ("sections", "size", "message"),
    [
        ({"model": {"replicas": 3}}, 4, "model.replicas = 3 does not divide the 4 ranks"),
        (
            {"rollout": {"engine": "vllm", "tensor_parallel": 2}},
            3,
            "rollout.tensor_parallel = 2 does not divide the 3 ranks",
        ),
        ({"data": {"prompts_per_step": 6}}, 4, "prompts_per_step = 6 does not divide over 4 ranks"),
    ],
)
def test_the_world_must_divide(sections, size, message):
    config = make_config(**{"data": {"prompts_per_step": 12}} | sections)
    with pytest.raises(ConfigError, match=message):
        check_world(config, size)
    check_world(config, 6)


def test_lengths_must_fit_the_model():
    config = make_config()
    check_lengths(config, config.max_sequence_tokens)
    with pytest.raises(ConfigError, match=r"\+ 1 score position = 35 exceeds the 34 positions"):
        check_lengths(config, 34)
    config = make_config(score={"position": "last"})
    with pytest.raises(ConfigError, match="max_new_tokens = 34 exceeds the 33 positions"):
        check_lengths(config, 33)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "gpt2"}', "is a gpt2 model; expected a causal language model for text"),
        ('{"model_type": "gemma3"}', "is a gemma3 model; expected"),
        ('{"model_type": "t5"}', "is a t5 model; expected"),
        ('{"model_type": "qwen3_next"}', "has layers of linear_attention"),
        (None, "model.path: cannot load"),
    ],
)
def test_models_that_the_policy_cannot_train_are_refused(tmp_path, config, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        load_model_config(ModelConfig(path=str(tmp_path)))


def test_a_missing_attention_kernel_is_named_with_its_extra(world, model_folders):
    config = ModelConfig(path=str(model_folders / "qwen2-tied"), attention="flash_attention_2")
    with pytest.raises(ConfigError, match=r"needs flash-attn; pip install 'laser-fast\[flash\]'"):
        build_policy(config, world)


def test_code_that_a_model_ships_is_not_even_asked_about(tmp_path, monkeypatch):
    # transformers asks on a terminal, for 15 s, and runs it for a "y".
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    config = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="contains custom code"):
        load_model_config(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    settings = '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
