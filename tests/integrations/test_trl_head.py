"""TRL's models where FSDP2 wraps them, a second trainer comes, or a checkpoint is read."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL")

import trl
import trl_runs
from datasets import Dataset
from page_code import code_blocks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head
from trl_runs import SCORE_TOKEN, fixed_rollout, make_trainer

from laser_fast.evaluation.settings import read_score_settings
from laser_fast.integrations import trl_head
from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer, use_laser_kernels

pytestmark = pytest.mark.trl
PAGE = Path(trl_head.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    trl_runs.save_model(folder)
    return folder


@pytest.fixture
def temperatures(monkeypatch):
    """Those of each call of the op."""
    found, op = [], trl_head.linear_logprob_entropy

    def counted(*args, temperature, **kwargs):
        found.append(temperature.unique().tolist())
        return op(*args, temperature=temperature, **kwargs)

    monkeypatch.setattr(trl_head, "linear_logprob_entropy", counted)
    return found


def test_a_second_trainer_of_the_same_model_runs_the_op(folder, temperatures):
    options = {"folder": folder, "max_steps": 1, "temperature": 0.5, "rollout_func": fixed_rollout}
    first = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, bf16=True, **options)
    use_laser_kernels(first)
    first.train()
    num_calls = len(temperatures)
    use_laser_kernels(first)  # under accelerate's wrappers, and again without an effect
    ids = torch.ones(1, 2, dtype=torch.long)
    first.model(input_ids=ids, labels=ids, fused_lm_head=True)

    def same_model(*args, model, **kwargs):
        return LaserGRPOTrainer(*args, model=first.model, **kwargs)

    second = make_trainer(same_model, LaserConfig, **options)
    second.train()
    assert num_calls and temperatures[-1] == [0.5, 1.0]


def test_fsdp2_in_16_bits_leaves_temperatures_alone(folder, temperatures, world):
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    trl_head._patch_forward(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ids = torch.randint(7, 33, (2, 6))
    model(input_ids=ids, shift_labels=ids, unit_rows=ids > 20, fused_lm_head=True)
    assert temperatures == [pytest.approx([0.7, 1.0], abs=1e-7)]


def test_log_probs_leave_fsdp2_in_float32(folder, monkeypatch):
    trainer = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.model.peft_config = {}  # as after transformers' add_adapter
    use_laser_kernels(trainer)
    expected = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert plugin.mixed_precision_policy == expected


def test_a_resumed_run_keeps_its_reference(folder, tmp_path):
    options = {"folder": folder, "rollout_func": fixed_rollout, "output_dir": str(tmp_path)}
    options |= {"save_strategy": "steps", "save_steps": 1}
    first = make_trainer(LaserGRPOTrainer, LaserConfig, max_steps=1, learning_rate=1e-2, **options)
    first.train()
    first.save_model()
    ref_logprob = first._score.ref_logprob
    score = {"token": SCORE_TOKEN, "position": "eos", "beta": 0.2, "ref_logprob": ref_logprob}
    assert read_score_settings(tmp_path) == score  # what scoring needs, beside the weights
    again = make_trainer(LaserGRPOTrainer, LaserConfig, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert again._score.ref_logprob == ref_logprob
    stated = make_trainer(
        LaserGRPOTrainer, LaserConfig, max_steps=2, score_ref_logprob=-20.0, **options
    )
    checkpoint = str(tmp_path / "checkpoint-1")
    stated.train(resume_from_checkpoint=checkpoint)
    assert stated._score.ref_logprob == -20.0
    (tmp_path / "checkpoint-1" / "laser_fast.json").unlink()
    with pytest.raises(ValueError, match="has no laser_fast.json"):
        again.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.16.0"])
def test_other_versions_of_trl_are_refused(monkeypatch, version):
    spec = importlib.util.spec_from_file_location("other_trl_head", trl_head.__file__)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"expected trl>=1.16,<1.17, got {version}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_code_of_the_page_runs(folder, tmp_path):
    [code] = code_blocks(PAGE, "TRL")
    trainer = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder)
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in trl_runs.PROMPTS])
    names = {"trainer": trainer, "model": str(folder), "prompts": prompts}
    names["verifier"] = trl_runs.odd_sum
    code = code.replace("<|vision_start|>", SCORE_TOKEN)
    code = code.replace('"out"', f'"{tmp_path}", use_cpu=True, bf16=False')
    exec(code, names)
    assert isinstance(names["trainer"], LaserGRPOTrainer)
    assert trl_head._is_patch(trainer.model.forward)
    assert names["args"].score_token == SCORE_TOKEN
