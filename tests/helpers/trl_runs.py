"""TRL trainers on a tiny model and fixed completions, for test_trl.py.

    python trl_runs.py MODEL OUT

writes what 1 and 2 ranks make of the same completions: world-N.json, and of the same rows where
FSDP2 shards the model: sharded-N.json; and what 2 ranks log under TRL's trainer and under ours
without a score: stock.json and off.json.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import torch
import trl
from datasets import Dataset
from fork_ranks import run_ranks
from tiny_models import save_model as save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer
from laser_fast.integrations.trl_head import _patch_forward
from laser_fast.sandbox.task import EOS_TOKEN, TOKENS

SCORE_TOKEN = "<|reserved_0|>"
EOS = TOKENS.index(EOS_TOKEN)
GROUP = 4
OFF = {"score_loss_coef": 0.0, "score_advantage_coef": 0.0}
PROMPTS = ("1+2=", "3*4+1=", "7=", "2*2+5*1=")
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": 1e-5,
    "seed": 1,
    "per_device_train_batch_size": 4,
}
GRPO = {"num_generations": GROUP, "max_completion_length": 10, "gradient_accumulation_steps": 2}


def save_model(folder, **sizes):
    """A model that finds the score token improbable, as pretrained ones do."""

    def adapt(model):
        with torch.no_grad():
            ids = torch.randint(7, 33, (64, 8))
            ids[:, -1] = EOS
            mean = model.model(ids).last_hidden_state[:, -1].mean(0)
            direction = mean / mean.square().sum()
            model.lm_head.weight[TOKENS.index(SCORE_TOKEN)] -= 12 * direction
            model.lm_head.weight[EOS] += 3 * direction

    torch.manual_seed(0)
    save(folder, adapt=adapt, tie_word_embeddings=False, **sizes)


def odd_sum(completion_ids, **_):
    """The verifier: whether the ids add up to an odd number."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def fixed_rollout(prompts, trainer):
    """Completions that depend on step, prompt and place in the whole batch only."""
    tokenizer, completions = trainer.processing_class, []
    first = trainer.accelerator.process_index * len(prompts)
    for number, prompt in enumerate(prompts, start=first):
        rng = random.Random(f"{prompt} {number} {trainer.state.global_step}")
        length = rng.randint(2, 9)
        ids = [rng.randrange(7, 33) for _ in range(length)]
        is_finished = rng.random() < 0.8
        completions.append(ids[:-1] + [tokenizer.eos_token_id] if is_finished else ids)
    return {
        "prompt_ids": tokenizer(prompts).input_ids,
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def make_trainer(trainer, config, folder, *, reward=odd_sum, data=PROMPTS, **options):
    """A GRPO trainer of the model in `folder`; `options` are those of its configuration."""
    warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
    names = ("rollout_func", "peft_config", "compute_loss_func")
    passed = {name: options.pop(name) for name in names if name in options}
    if issubclass(config, LaserConfig):
        options = {"score_token": SCORE_TOKEN, "score_beta": 0.2} | options
    defaults = COMMON | {"output_dir": str(Path(folder, "out"))}
    if issubclass(config, GRPOConfig):
        defaults |= GRPO
    return trainer(
        model=str(folder),
        reward_funcs=reward,
        args=config(**defaults | options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in data * 4]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **passed,
    )


def make_other(name, folder, *, compute_loss_func=None, **options):
    """An RLOO, DPO, KTO or SFT trainer."""
    config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    if name == "RLOO":
        options = {"num_generations": GROUP, "max_completion_length": 10} | options
        return make_trainer(trainer, config, folder, **options)
    answers = ("3", "13", "7", "9")
    rows = {
        "DPO": {"chosen": list(answers), "rejected": ["4+", "1=2", "77", "1"]},
        "KTO": {"completion": list(answers), "label": [True, False, True, False]},
        "SFT": {"completion": list(answers)},
    }
    passed = {"compute_loss_func": compute_loss_func} if compute_loss_func else {}
    return trainer(
        model=str(folder),
        args=config(**COMMON | {"output_dir": str(Path(folder, "out"))} | options),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS), **rows[name]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **passed,
    )


def losses(trainer):
    """What each step logged, without times."""
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if "time" not in k and v is not None} for row in steps]


def _train(folder, out, size):
    trainer = make_trainer(
        LaserGRPOTrainer,
        LaserConfig,
        folder,
        rollout_func=fixed_rollout,
        max_steps=3,
        num_generations=8,  # two ranks split a group
        per_device_train_batch_size=8 // size,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        score_loss_coef=0.5,
        score_advantage_coef=0.4,
        score_min_std=0.0,
        score_advantage_warmup_steps=1,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.model.state_dict()
        norms = {name: float(weight.double().norm()) for name, weight in weights.items()}
        Path(out, f"world-{size}.json").write_text(json.dumps([losses(trainer), norms]))


def _compare(folder, out):
    for name, trainer, config, own in (
        ("stock", GRPOTrainer, GRPOConfig, {}),
        ("off", LaserGRPOTrainer, LaserConfig, OFF),
    ):
        run = make_trainer(trainer, config, folder, max_steps=5, **own)
        run.train()
        if run.accelerator.is_main_process:
            Path(out, f"{name}.json").write_text(json.dumps(losses(run)))


def _shard(folder, out, size):
    """Norms of the gradients of a model that FSDP2 shards; accelerate does so on GPUs only."""
    mesh = init_device_mesh("cpu", (size,))
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    _patch_forward(model)
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    torch.manual_seed(0)
    ids = torch.randint(7, 33, (4, 9))
    labels = ids.roll(-1, dims=1).index_fill(1, torch.tensor([0, 1, 8]), -100)
    labels[:, 7] = TOKENS.index(SCORE_TOKEN)
    unit_rows = labels == TOKENS.index(SCORE_TOKEN)
    own = slice(mesh.get_local_rank(), None, size)
    outputs = model(
        input_ids=ids[own], shift_labels=labels[own], unit_rows=unit_rows[own], fused_lm_head=True
    )
    loss = (outputs.log_probs - 0.1 * outputs.entropy).sum() * size  # gradients are averaged
    loss.backward()
    norms = {name: float(p.grad.full_tensor().norm()) for name, p in model.named_parameters()}
    if mesh.get_local_rank() == 0:
        Path(out, f"sharded-{size}.json").write_text(json.dumps(norms))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for size in (1, 2):
        run_ranks(size, _train, *sys.argv[1:], size)
        run_ranks(size, _shard, *sys.argv[1:], size)
    run_ranks(2, _compare, *sys.argv[1:])
