"""The paper's nine runs: every value that the released scripts give, and honest twins."""

from pathlib import Path

import pytest

from laser_fast.config import Config, ConfigError, all_keys, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = ("laser", "laser_no_mixing", "grpo")

# Per model: path, z_c, c_ref, steps of plain GRPO, steps with the MSE before mixing.
MODELS = {
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "<|vision_start|>", -23.0, 200, 200),
    "orz-7b": ("Open-Reasoner-Zero/Open-Reasoner-Zero-7B", "<|vision_start|>", -23.0, 0, 200),
    "octothinker-3b-short": (
        "OctoThinker/OctoThinker-3B-Short-Base",
        "<|reserved_special_token_0|>",
        -25.0,
        200,
        200,
    ),
}

# What the three models and the three methods share.
SHARED = {
    "data.max_prompt_tokens": 2048,
    "data.prompts_per_step": 128,
    "data.eval_samples": 2,
    "data.eval_every": 20,
    "data.template": "chat",
    "data.prompt_suffix": (
        " Please reason step by step, and put your final answer within \\boxed{}."
    ),
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.max_new_tokens": 8192,
    "rollout.resample_rounds": 0,
    "rollout.gpu_memory_fraction": 0.6,
    "reward.kind": "math",
    "reward.format_gate": True,
    "reward.overlong": "score",
    "score.beta": 0.1,
    "score.max_grad_ratio": 0.0,
    "advantage.scale": "std",
    "advantage.score_min_std": 0.1,
    "loss.kind": "grpo",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.clip_dual": 3.0,
    "loss.aggregation": "token-mean",
    "loss.tis_cap": 0.0,
    "loss.kl_coef": 0.0,
    "loss.entropy_coef": 0.0,
    "optim.lr": 1e-6,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.01,
    "optim.max_grad_norm": 1.0,
    "optim.minibatches": 1,
    "checkpoint.every": 50,
    "model.gradient_checkpointing": True,
}


def _file(method: str, model: str) -> Path:
    return CONFIGS / f"{method}_{model}_8xh200.toml"


def _values(method: str, model: str) -> dict:
    """Every dotted key of a run with its value."""
    config = load_config(_file(method, model))
    values = {}
    for key in all_keys(Config):
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        values[key] = value
    return values


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_values_of_the_released_scripts(method, model):
    values = _values(method, model)
    path, token, ref_logprob, warmup, score_warmup = MODELS[model]
    assert {key: values[key] for key in SHARED} == SHARED
    assert (values["model.path"], values["score.token"]) == (path, token)
    assert values["score.ref_logprob"] == ref_logprob
    # Two epochs over DeepMath-103K: 103,110 rows.
    assert values["optim.steps"] == 103_110 // 128 * 2
    assert values["output_dir"] == f"runs/{method}_{model}"
    if method == "grpo":
        assert values["score.loss_coef"] == values["advantage.score_coef"] == 0
        return
    assert values["score.loss_coef"] == 0.1
    assert values["advantage.score_coef"] == (0.1 if method == "laser" else 0.0)
    assert values["score.warmup_steps"] == warmup
    assert values["advantage.score_warmup_steps"] == score_warmup
    # The paper does not clip: one completion of a class among 1024 weighs 512.
    assert values["score.max_class_weight"] == 128 * 8 / 2


def test_paper_configs_hold_the_papers_numbers():
    laser = load_config(_file("laser", "qwen2.5-7b"))
    assert (laser.score.loss_coef, laser.score.beta, laser.score.ref_logprob) == (0.1, 0.1, -23.0)
    assert (laser.advantage.score_coef, laser.advantage.score_min_std) == (0.1, 0.1)
    assert (laser.score.warmup_steps, laser.advantage.score_warmup_steps) == (200, 200)
    assert (laser.data.prompts_per_step, laser.rollout.group_size) == (128, 8)
    assert (laser.data.max_prompt_tokens, laser.rollout.max_new_tokens) == (2048, 8192)
    assert (laser.optim.lr, laser.optim.schedule, laser.optim.minibatches) == (1e-6, "constant", 1)
    assert (laser.loss.clip_low, laser.loss.clip_high, laser.loss.clip_dual) == (0.2, 0.2, 3.0)
    assert (laser.loss.kind, laser.loss.aggregation) == ("grpo", "token-mean")
    # The baseline differs only in the score.
    grpo = load_config(_file("grpo", "qwen2.5-7b"))
    for name in ("model", "data", "rollout", "reward", "loss", "optim"):
        assert getattr(laser, name) == getattr(grpo, name), name
    assert grpo.score.loss_coef == grpo.advantage.score_coef == 0


@pytest.mark.parametrize("model", MODELS)
def test_twins_differ_only_in_the_score(model):
    laser, no_mixing, grpo = (_values(method, model) for method in METHODS)

    def differences(other):
        return {key for key in laser if laser[key] != other[key]}

    assert differences(no_mixing) == {"output_dir", "advantage.score_coef"}
    assert differences(grpo) <= {
        "output_dir",
        "score.loss_coef",
        "score.warmup_steps",
        "score.max_class_weight",
        "advantage.score_coef",
        "advantage.score_warmup_steps",
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", list(MODELS)[1:])
def test_models_differ_only_in_the_model(model, method):
    first, other = _values(method, "qwen2.5-7b"), _values(method, model)
    assert {key for key in first if first[key] != other[key]} <= {
        "output_dir",
        "model.path",
        "score.token",
        "score.ref_logprob",
        "score.warmup_steps",
    }


def test_every_config_opens_with_purpose_and_command():
    files = sorted(CONFIGS.glob("*.toml"))
    readme = (CONFIGS / "README.md").read_text()
    assert {_file(method, model) for method in METHODS for model in MODELS} < set(files)
    for file in files:
        purpose, command, third = file.read_text().splitlines()[:3]
        assert purpose.startswith("# ") and not third.startswith("#")
        # A command that would start another file's run is worse than none.
        assert command.startswith("# Run: torchrun ")
        assert command.endswith(f"-m laser_fast train configs/{file.name}")
        assert f"`{file.name}`" in readme


def test_a_packaged_config_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in CONFIGS.glob("*.toml"):
        assert load_config(file.stem) == load_config(file)
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
    with pytest.raises(ConfigError) as caught:
        load_config("quickstrat")
    assert str(caught.value).endswith(f"; name a TOML file or one of {names}")
    # A file of that name wins.
    text = (CONFIGS / "quickstart.toml").read_text().replace("runs/quickstart", "runs/mine")
    (tmp_path / "quickstart").write_text(text)
    assert load_config("quickstart").output_dir == "runs/mine"
