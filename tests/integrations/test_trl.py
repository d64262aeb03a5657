"""TRL's trainers with our head and with LaSeR's score, compared with TRL's own and with float64."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL")
pytest.importorskip("peft", reason="needs peft")

import trl
import trl_runs
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from tiny_models import make_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)
from trl_runs import GROUP, OFF, SCORE_TOKEN, fixed_rollout, losses, make_other, save_model

from laser_fast.integrations import trl_head
from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer, use_laser_kernels
from laser_fast.sandbox.task import write_tokenizer

pytestmark = pytest.mark.trl

GRPO_CASES = {
    "default": {},
    "reference": {"num_iterations": 2, "beta": 0.04, "temperature": 0.7},
    "lora": {"beta": 0.04, "peft_config": LoraConfig(r=4, target_modules="all-linear")},
    "masked": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "fp32-head": {"cast_lm_head_to_fp32": True, "loss_type": "grpo", "bf16": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def make(folder):
    return functools.partial(trl_runs.make_trainer, folder=folder)


@pytest.fixture
def make_laser(make):
    return functools.partial(make, LaserGRPOTrainer, LaserConfig, rollout_func=fixed_rollout)


@pytest.mark.parametrize("case", GRPO_CASES)
def test_without_a_score_it_trains_as_trl(make, case):
    options = {**GRPO_CASES[case], "max_steps": 5}
    stock = make(trl.GRPOTrainer, trl.GRPOConfig, **options)
    stock.train()  # before the other one is made, which sets the seeds
    laser = make(LaserGRPOTrainer, LaserConfig, **OFF, **options)
    use_laser_kernels(laser)  # a second time, which changes nothing
    laser.train()
    tolerance = 2e-2 if options.get("bf16") else 1e-5
    assert_same_steps(losses(laser), losses(stock), tolerance=tolerance)


def assert_same_steps(found, expected, *, tolerance=1e-5):
    for own, theirs in zip(found, expected, strict=True):
        assert own["score/ref_logprob"] < -5 and own["score/loss"] >= 0
        own = {name: value for name, value in own.items() if not name.startswith("score/")}
        assert own == pytest.approx(theirs, abs=tolerance, rel=tolerance)


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {name: p.grad.double() for name, p in trainer.model.named_parameters()}
    return loss.item(), grads


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = list(trainer.get_train_dataloader())[0]
    return trainer._prepare_inputs(rows)


def assert_same_gradients(found, expected, *, tolerance):
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert error < tolerance, name


def test_gradients_are_those_of_trl(make, make_laser):
    laser = make_laser(**OFF, temperature=0.7)
    stock = make(trl.GRPOTrainer, trl.GRPOConfig, temperature=0.7)
    inputs = first_batch(laser)
    assert inputs["score_weights"].count_nonzero() > 1
    stock.current_gradient_accumulation_steps = 2
    loss, found = gradients(laser, inputs)
    expected_loss, expected = gradients(stock, inputs)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_same_gradients(found, expected, tolerance=1e-5)


def float64_scores(trainer, inputs, model):
    """Log-probs of the score token [B] in float64, 0 where the completion does not end."""
    score_id = trainer.processing_class.convert_tokens_to_ids(SCORE_TOKEN)
    logprobs = []
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, -1]
        ends = completion[-1] in trainer.eos_token_ids
        logprobs.append(logits.log_softmax(0)[score_id] if ends else logits.new_zeros(()))
    return torch.stack(logprobs)


def test_score_term_is_that_of_float64(folder, make_laser):
    # A generation of 4 microbatches, of which an optimizer step takes 2; a cap that binds.
    options = {"steps_per_generation": 4, "temperature": 0.7, "score_max_class_weight": 1.2}
    plain = make_laser(**OFF, **options)
    laser = make_laser(score_loss_coef=0.5, score_advantage_coef=0.0, **options)
    inputs = first_batch(laser)
    first_batch(plain)
    loss, found = gradients(laser, inputs)
    policy_loss, policy = gradients(plain, inputs)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    batches = laser._buffered_inputs
    every = [float64_scores(laser, batch, model) for batch in batches]
    finished, rewards = [], []
    for batch in batches:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            length = int(mask.sum())
            finished.append(int(ids[length - 1]) in laser.eos_token_ids)
            rewards.append(float(ids[:length].sum() % 2))
    n = sum(finished)
    n_c = sum(r for r, ends in zip(rewards, finished, strict=True) if ends)
    assert 0 < n_c < n < len(finished) == 16
    reference = torch.cat(every)[torch.tensor(finished)].mean().item()
    assert laser._score.ref_logprob == pytest.approx(reference, abs=1e-5)
    expected = 0.0
    for logprob, reward, ends in list(zip(every[0], rewards, finished, strict=False)):
        weight = min(1.2, n / 2 / (n_c if reward else n - n_c)) / n * ends
        expected = expected + weight * (0.2 * (logprob - reference) - reward) ** 2
    term = 0.5 * expected * 4 / 2
    term.backward()
    assert loss - policy_loss == pytest.approx(term.item(), abs=1e-6)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients({k: found[k] - policy[k] for k in wanted}, wanted, tolerance=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}])
def test_scores_are_mixed_into_the_advantages(folder, make_laser, options):
    plain = make_laser(score_advantage_warmup_steps=1, **options)
    mixed = make_laser(score_advantage_coef=0.3, score_min_std=0.0, **options)
    first_batch(plain)
    first_batch(mixed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    batches = [batch for trainer in (plain, mixed) for batch in trainer._buffered_inputs]
    advantages, scores, keys = {}, {}, {}
    for trainer in (plain, mixed):
        for batch in trainer._buffered_inputs:
            logprobs = float64_scores(trainer, batch, model)
            for row in range(len(logprobs)):
                ids, mask = batch["completion_ids"][row], batch["completion_mask"][row].bool()
                key = tuple(ids[mask].tolist())
                advantages[trainer is mixed, key] = float(batch["advantages"][row])
                score = 0.2 * (logprobs[row] - trainer._score.ref_logprob)
                ends = key[-1] in trainer.eos_token_ids
                scores[key] = float(score.clamp(0, 1)) if ends else 0.0
                prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
                keys.setdefault(tuple(prompt.tolist()), set()).add(key)
    assert len(batches) == 4 and all(len(group) == GROUP for group in keys.values())
    for group in keys.values():
        values = torch.tensor([scores[key] for key in group], dtype=torch.float64)
        for key, score in zip(group, values, strict=True):
            own = advantages[False, key] * 0.7 + 0.3 * float((score - values.mean()) / values.std())
            assert advantages[True, key] == pytest.approx(own, abs=1e-3)


@pytest.fixture(scope="module")
def ranks_folder(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, Path(trl_runs.__file__), folder, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def of_ranks(folder, name):
    return [json.loads((folder / f"{name}-{size}.json").read_text()) for size in (1, 2)]


def test_two_ranks_train_as_one(ranks_folder):
    one, two = of_ranks(ranks_folder, "world")
    same = ("loss", "grad_norm", "reward", "score/loss", "score/ref_logprob", "score/auroc")
    for step_of_one, step_of_two in zip(one[0], two[0], strict=True):
        for name in same:
            assert step_of_two[name] == pytest.approx(step_of_one[name], rel=1e-4, abs=1e-5), name
    assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_two_ranks_without_a_score_train_as_trl(ranks_folder):
    stock, off = (
        json.loads((ranks_folder / f"{name}.json").read_text()) for name in ("stock", "off")
    )
    assert len(off) == 5
    assert_same_steps(off, stock)


def test_shards_of_fsdp2_have_the_gradients_of_the_whole(ranks_folder):
    one, two = of_ranks(ranks_folder, "sharded")
    assert len(one) == 27 and min(one.values()) > 0
    assert two == pytest.approx(one, rel=1e-4)


def test_it_learns_to_tell_right_from_wrong(make_laser):
    def rollout(prompts, trainer):  # the second token tells
        tokenizer = trainer.processing_class
        first = 7 if trainer.model.training else 14  # held out: other first tokens, other prompts
        ends = [[first + n % 5, 20 + n % 2, 9, tokenizer.eos_token_id] for n in range(len(prompts))]
        logprobs = [[0.0] * 4] * len(prompts)
        ids = tokenizer(prompts).input_ids
        return {"prompt_ids": ids, "completion_ids": ends, "logprobs": logprobs}

    def verifier(completion_ids, **_):
        return [float(ids[1] == 20) for ids in completion_ids]

    trainer = make_laser(
        rollout_func=rollout,
        reward=verifier,
        max_steps=30,
        learning_rate=3e-3,
        score_loss_coef=1.0,
        score_advantage_warmup_steps=5,
        eval_strategy="no",
    )
    trainer.train()
    steps = losses(trainer)
    assert steps[0]["score/loss"] > 0.4
    assert steps[-1]["score/loss"] < 0.1
    assert steps[-1]["score/f1"] == 1.0
    trainer.evaluate(Dataset.from_list([{"prompt": prompt} for prompt in ("8+1=", "2*9=")]))
    (held_out,) = (row for row in trainer.state.log_history if "eval_score/f1" in row)
    assert held_out["eval_score/f1"] > 0.6


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """Models with a softcap and with a logit scale beside the plain one."""
    others = {"qwen2": folder}
    for family in ("gemma2", "cohere"):
        others[family] = tmp_path_factory.mktemp(family)
        _make_family(family).save_pretrained(others[family])
        write_tokenizer(others[family])
    return others


def _make_family(family):
    tokens = {"vocab_size": 33, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    if family == "gemma2":
        config = Gemma2Config(final_logit_softcapping=2.0, head_dim=8, **tokens, **sizes)
        return Gemma2ForCausalLM(config)
    return CohereForCausalLM(CohereConfig(logit_scale=0.25, **tokens, **sizes))


@pytest.mark.parametrize(
    "name, family",
    [("RLOO", "qwen2"), ("DPO", "cohere"), ("KTO", "qwen2"), ("SFT", "gemma2"), ("SFT", "qwen2")],
)
def test_other_trainers_train_as_trl(folders, name, family, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return linear_logprob_entropy(*args, **kwargs)

    linear_logprob_entropy = trl_head.linear_logprob_entropy
    monkeypatch.setattr(trl_head, "linear_logprob_entropy", counted)
    options = {"max_steps": 4, "learning_rate": 1e-4}
    stock = make_other(name, folders[family], **options)
    stock.train()
    assert not calls
    ours = make_other(name, folders[family], **options)
    use_laser_kernels(ours)
    ours.train()
    assert len(calls) >= 4
    for found, expected in zip(losses(ours), losses(stock), strict=True):
        assert found == pytest.approx(expected, abs=2e-5, rel=2e-5)


def test_the_start_refuses_other_log_probs(make, monkeypatch):
    trainer = make(trl.GRPOTrainer, trl.GRPOConfig, max_steps=1, temperature=0.7)
    use_laser_kernels(trainer)
    op = trl_head.linear_logprob_entropy
    monkeypatch.setattr(
        trl_head, "linear_logprob_entropy", lambda *args, temperature, softcap: op(*args)
    )
    with pytest.raises(RuntimeError, match="log-probs of TRL's own head at temperature 0.7"):
        trainer.train()


def test_a_head_that_is_not_reached_is_refused(make):
    trainer = make(trl.GRPOTrainer, trl.GRPOConfig, max_steps=1)
    trainer.model.forward = lambda **_: None
    use_laser_kernels(trainer)
    with pytest.raises(RuntimeError, match="took the head away"):
        trainer.model(input_ids=None, shift_labels=torch.zeros(1, 1), fused_lm_head=True)


@pytest.mark.parametrize(
    "name, family, options, message",
    [
        ("DPO", "qwen2", {"use_weighting": True}, "use_weighting"),
        ("DPO", "gemma2", {}, "final_logit_softcapping"),
        ("SFT", "qwen2", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("SFT", "qwen2", {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ("KTO", "qwen2", {"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_the_op_cannot_honour_is_refused(folders, name, family, options, message):
    trainer = make_other(name, folders[family], **options)
    with pytest.raises(ValueError, match=message):
        use_laser_kernels(trainer)


def test_other_heads_are_refused(folder):
    trainer = make_other("SFT", folder)
    trainer.model.lm_head = torch.nn.Linear(32, 33)
    with pytest.raises(ValueError, match="a head with a bias"):
        use_laser_kernels(trainer)
    trainer.model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 33))
    with pytest.raises(ValueError, match="a head of type Sequential"):
        use_laser_kernels(trainer)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="expected one of GRPOTrainer.*got Qwen2ForCausalLM"):
        use_laser_kernels(make_model("qwen2", vocab_size=33))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"score_token": "<eos>"}, 'got "<eos>"; reserved tokens: <|reserved_0|>'),
        ({"score_token": "<|vision_start|>"}, "reserved tokens: <|reserved_0|>"),
        ({"score_ref_logprob": -2.0}, "must stay well below 0"),
        ({"score_loss_coef": 0.0}, "expected score_loss_coef >= 0 and"),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "prompt-learning adapters",
        ),
    ],
)
def test_scores_that_cannot_be_are_refused(make_laser, options, error):
    with pytest.raises(ValueError, match=error.replace("|", r"\|")):
        make_laser(**options)


def test_rewards_out_of_range_are_refused(make_laser):
    trainer = make_laser(reward=lambda completion_ids, **_: [2.0] * len(completion_ids))
    with pytest.raises(ValueError, match=r"expected rewards in \[0, 1\]"):
        first_batch(trainer)


def test_plain_arguments_are_refused(make):
    with pytest.raises(TypeError, match="expected args of type LaserConfig, got GRPOConfig"):
        make(LaserGRPOTrainer, trl.GRPOConfig)
