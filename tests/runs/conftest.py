"""Small runs on one rank and on two, made once."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small model of the sandbox and its problems, see `small_runs.make_model`."""
    from small_runs import make_model

    return make_model(tmp_path_factory.mktemp("sandbox") / "model")


@pytest.fixture(scope="session")
def write_config(model):
    """A function that writes the TOML of a small run into `folder`, and returns its path."""
    from small_runs import write_config

    return partial(write_config, model)


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
