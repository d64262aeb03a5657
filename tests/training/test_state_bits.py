"""AdamW's moments in 8 bits: what is refused, and on two ranks with torchao, where it is there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_config, make_model
from torch import nn

from laser_fast.config import ConfigError, UpdateConfig
from laser_fast.training.run import check_start
from laser_fast.training.update import IS_FUSED, build_optimizer

HELPERS = Path(__file__).parents[1] / "helpers"


def test_eight_bits_need_torchao(monkeypatch, tmp_path, world):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    config = make_config(optim={"steps": 1, "state_bits": 8})
    config = config.model_copy(update={"output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"optim.state_bits = 8 needs torchao; pip install 'las"):
        build_optimizer(nn.Linear(2, 2), config.optim)
    with pytest.raises(ConfigError, match="needs torchao"):  # before anything is loaded
        check_start(config, world, resume=False)
    with pytest.raises(ValueError, match="state_bits"):
        UpdateConfig(steps=1, state_bits=4)


def test_no_checkpoint_of_eight_bits_is_written_in_the_background():
    """torchao's moments have no operation that copies them (0.18)."""
    with pytest.raises(ConfigError, match="asynchronous cannot copy moments of 8 bits"):
        make_config(optim={"steps": 1, "state_bits": 8}, checkpoint={"asynchronous": True})


def test_fused_update_is_adamws_own():
    policy = nn.Linear(300, 70)
    plain = nn.Linear(300, 70)
    plain.load_state_dict(policy.state_dict())
    config = UpdateConfig(steps=1, lr=0.01, weight_decay=0.1)
    fused = build_optimizer(policy, config)
    assert fused.defaults["fused"] is (True if IS_FUSED else None)
    exact = torch.optim.AdamW(plain.double().parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for own, other in zip(policy.parameters(), plain.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.double()
        fused.step()
        exact.step()
    for own, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=1e-6)


def test_two_ranks_save_and_load_eight_bits(tmp_path):
    pytest.importorskip("torchao")
    # 512 x 32 and 32 x 512 are quantized, whose shards have 4096 values or more; the others stay.
    make_model("qwen2", intermediate_size=512).save_pretrained(tmp_path / "model")
    command = [sys.executable, HELPERS / "state_ranks.py", tmp_path / "model"]
    done = subprocess.run(
        [*command, tmp_path / "run", tmp_path / "out.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, want in found["32 bits"].items():  # the first update rounds the moments afterwards
        torch.testing.assert_close(found["8 bits"][name], want, rtol=1e-5, atol=1e-6)
    for name, want in found["undisturbed"].items():
        assert torch.equal(found["resumed"][name], want), name
    moved = found["undisturbed"]["model.norm.weight"] - found["8 bits"]["model.norm.weight"]
    assert moved.abs().max() > 0.01  # the second update had its own learning rate
