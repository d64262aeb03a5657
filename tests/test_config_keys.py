"""The keys of the configuration: how many, documented, and each read while the software runs."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import torch

from laser_fast.config import Config, MeasureConfig, RolloutConfig, all_keys
from laser_fast.records import SpecialTokens

# Class -> dotted prefix of its keys; a measurement's sections are named like a run's.
PREFIXES = {Config: "", MeasureConfig: ""} | {
    field.annotation: f"{name}."
    for kind in (Config, MeasureConfig)
    for name, field in kind.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}


@pytest.fixture
def read(monkeypatch):
    """The keys that modules of ours read from now on; a check of the configuration is no read."""
    found = set()

    def record(section, name):
        if type(section) in PREFIXES:
            reader = sys._getframe(1).f_globals["__name__"]
            if reader.startswith("laser_fast.") and not reader.startswith("laser_fast.config"):
                found.add(PREFIXES[type(section)] + name)
        return object.__getattribute__(section, name)

    for kind in PREFIXES:
        monkeypatch.setattr(kind, "__getattribute__", record)
    return found


def test_sections_and_number_of_keys():
    sections = list(dict.fromkeys(key.split(".")[0] for key in all_keys(Config) if "." in key))
    assert sections == (
        ["model", "data", "rollout", "reward", "score", "optim", "advantage", "loss"]
        + ["checkpoint", "log"]
    )
    assert [key for key in all_keys(Config) if "." not in key] == ["seed", "output_dir"]
    assert len(all_keys(Config)) <= 110


def test_keys_that_users_rely_on():
    promised = """
        seed output_dir optim.steps optim.lr data.train data.eval data.prompts_per_step
        rollout.engine rollout.group_size rollout.temperature rollout.max_new_tokens
        rollout.max_disagreement rollout.score reward.kind reward.timeout_s score.token score.beta
        score.ref_logprob score.loss_coef score.warmup_steps score.max_class_weight
        score.max_grad_ratio advantage.scale advantage.score_coef advantage.score_min_std
        advantage.score_warmup_steps loss.kind loss.clip_low loss.clip_high loss.aggregation
        loss.tis_cap loss.kl_coef loss.entropy_coef checkpoint.every checkpoint.keep
        log.tensorboard log.wandb log.trackio
    """
    assert set(promised.split()) <= set(all_keys(Config))


@pytest.mark.parametrize("key", all_keys(Config))
def test_every_key_is_documented(key):
    text = all_keys(Config)[key]
    assert text.endswith(".") and text.isascii() and "\n" not in text and len(text) > 20


def test_every_key_is_read_somewhere(read, tmp_path, monkeypatch):
    from laser_fast.cli import train_run
    from laser_fast.rollout.vllm import VllmEngine
    from laser_fast.rollout.vllm_server import VllmServerEngine
    from laser_fast.sandbox.model import make_sandbox_model
    from laser_fast.sandbox.task import rows

    make_sandbox_model(tmp_path / "model", seed=0, steps=8)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows("eval", seed=0)[:8]))
    function = "def reward(completions): return [float(len(c) > 9) for c in completions]\n"
    (tmp_path / "length_reward.py").write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "lora_rank": 2, "activation_offload": True},
        "data": {"train": str(problems), "eval": str(problems), "template": "{prompt}"},
        "rollout": {"max_new_tokens": 24, "group_size": 2, "resample_rounds": 1},
        "reward": {"kind": "length_reward:reward", "overlong": "penalty", "overlong_buffer": 4},
        "score": {"token": "<|reserved_0|>", "beta": 0.2, "ref_logprob": -11.0},
        "loss": {"kl_coef": 0.1, "entropy_coef": 0.01},
        "optim": {"steps": 2, "schedule": "linear", "warmup_steps": 1},
    }
    config["model"] |= {"reshard_after_forward": False}
    config["data"] |= {"max_prompt_tokens": 24, "prompts_per_step": 2, "eval_samples": 2}
    config["data"]["pass_rate"] = [0.0, 0.9]
    train_run(Config.parse(config, source="test"))

    # What only vLLM reads, with something in its place.
    tokens = SpecialTokens(score_token_id=2, eos_token_ids=(1,), pad_token_id=0, vocab_size=33)
    monkeypatch.setattr(VllmServerEngine, "_check_server", MagicMock())
    monkeypatch.setattr(VllmServerEngine, "_check_processor", MagicMock())
    server = RolloutConfig(engine="vllm_server", server_url="http://127.0.0.1:1")
    VllmServerEngine(server, tokens, max_model_len=2048)
    monkeypatch.setattr("laser_fast.rollout.vllm.import_vllm", MagicMock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    VllmEngine("model", RolloutConfig(engine="vllm"), tokens, max_model_len=2048)
    assert not sorted(all_keys(Config).keys() - read)


def test_a_check_or_a_copy_is_no_read(read):
    sections = {"model": {"path": "m"}, "data": {"train": "t"}, "optim": {"steps": 1}}
    config = Config.parse({"output_dir": "o", **sections}, source="test")
    assert config.model_copy(update={"seed": 1}).model_dump()["loss"]["kind"] == "grpo"
    assert config.loss.kind == "grpo"  # this test is no module of ours
    assert not read
