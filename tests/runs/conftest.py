"""Small runs on one rank and on two, made once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A sandbox model after a short warm start, which only ends what it writes; its problems."""
    from laser_fast.log.jsonl import write_lines
    from laser_fast.sandbox.model import make_sandbox_model
    from laser_fast.sandbox.task import rows

    folder = tmp_path_factory.mktemp("sandbox") / "model"
    make_sandbox_model(folder, seed=0, steps=8)
    for split in ("train", "eval"):
        write_lines(folder / f"{split}.jsonl", rows(split, seed=0))
    return folder


@pytest.fixture(scope="session")
def write_config(model):
    """A function that writes the TOML of a small run into `folder`, and returns its path."""
    import tomli_w
    from small_runs import GROUP_SIZE, GROUPS, STEPS

    from laser_fast.sandbox.task import RESERVED_TOKENS

    def write(folder, **sections):
        data = {
            "output_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "data": {
                "train": str(model / "train.jsonl"),
                "eval": str(model / "eval.jsonl"),
                "eval_limit": 4,
                "eval_samples": 2,
                "template": "{prompt}",
                "max_prompt_tokens": 24,
                "prompts_per_step": GROUPS,
            },
            "rollout": {"max_new_tokens": 30, "group_size": GROUP_SIZE},
            "reward": {"kind": "train_ranks:reward", "workers": 1},
            "score": {
                "token": RESERVED_TOKENS[0],
                "beta": 0.2,
                "ref_logprob": -11.0,
                "loss_coef": 1.0,
                "max_grad_ratio": 1.0,
            },
            "advantage": {"score_min_std": 0.01},
            "optim": {"steps": STEPS, "lr": 5e-4, "schedule": "linear", "warmup_steps": 2},
            "checkpoint": {"every": 2, "keep": 9},
            "log": {"samples_per_step": GROUPS * GROUP_SIZE, "tensorboard": False},
        }
        for name, keys in sections.items():
            data[name] = {**data.get(name, {}), **keys} if isinstance(keys, dict) else keys
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, write_config):
    """Folder of the plain run, of the one with every extra, and of that with LoRA, on one rank."""
    from small_runs import EXTRAS, LORA

    from laser_fast.cli import train_run
    from laser_fast.config import load_config

    folder = tmp_path_factory.mktemp("one-rank")
    train_run(load_config(write_config(folder / "plain")))
    train_run(load_config(write_config(folder / "extras", **EXTRAS)))
    train_run(load_config(write_config(folder / "lora", **LORA)))
    return folder


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, model, write_config):
    """The same three runs on two ranks, packed otherwise, and two that are refused.

    One cannot be shared out; the fault of the other's model is seen on rank 0 only.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from small_runs import EXTRAS, LORA

    folder = tmp_path_factory.mktemp("two-ranks")
    untied = folder / "untied-model"
    shutil.copytree(model, untied)
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    configs = [
        write_config(folder / "plain", optim={"tokens_per_microbatch": 120}),
        write_config(folder / "extras", **EXTRAS),
        write_config(folder / "lora", **LORA),
        write_config(folder / "odd", data={"prompts_per_step": 5}),
        write_config(folder / "untied", model={"path": str(untied)}),
    ]
    command = [sys.executable, HELPERS / "train_ranks.py", *configs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder
