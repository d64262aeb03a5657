"""A checkpoint that is written while training goes on."""

import threading

import pytest
import torch
from policy_ranks import checkpoint_config, full_parameters, make_optimizer, update

from laser_fast.config import ModelConfig
from laser_fast.config_errors import RunError
from laser_fast.model.policy import build_policy
from laser_fast.training import checkpoint
from laser_fast.training.background import BackgroundWriter
from laser_fast.training.checkpoint import (
    TrainerState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def gate(monkeypatch):
    """Writing a checkpoint waits for this."""
    write, gate = checkpoint.dcp.save, threading.Event()

    def save(*arguments, **keys):
        assert gate.wait(60)
        return write(*arguments, **keys)

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    return gate


@pytest.fixture
def save(world, model_folders, tmp_path):
    """A function that begins to save a step of `save.policy`."""
    policy = build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)
    optimizer = make_optimizer(policy)
    config = checkpoint_config(ModelConfig(path="any"), tmp_path)

    def save(step, writer):
        parts = {"policy": policy, "optimizer": optimizer, "world": world, "writer": writer}
        return save_checkpoint(config, step, state={"ref_logprob": -float(step)}, **parts)

    save.policy, save.optimizer = policy, optimizer
    return save


def test_it_holds_the_numbers_of_its_step_though_training_goes_on(
    tmp_path, world, save, gate, model_folders
):
    expected = update(save.policy, world, save.optimizer)
    moments = [s["exp_avg"].full_tensor().clone() for s in save.optimizer.state.values()]
    writer = BackgroundWriter(world, 60.0)
    writer.settle(wait=True)
    path = save(1, writer)
    after = update(save.policy, world, save.optimizer)
    assert any(not torch.equal(after[name], value) for name, value in expected.items())
    writer.settle(wait=False)  # not yet
    assert list_checkpoints(tmp_path) == [] and path.with_name(".step-000001.partial").is_dir()
    gate.set()
    writer.settle(wait=True)
    assert list_checkpoints(tmp_path) == [path]

    policy = build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)
    optimizer = make_optimizer(policy)
    state = load_checkpoint(path, policy=policy, optimizer=optimizer)  # its sums are right, too
    assert state == TrainerState(step=1, ref_logprob=-1.0)
    loaded = full_parameters(policy)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    found = [s["exp_avg"].full_tensor() for s in optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(found, moments, strict=True))


def test_the_next_one_waits_and_what_a_kill_leaves_is_swept(tmp_path, world, save, gate):
    gate.set()
    writer = BackgroundWriter(world, 60.0)
    save(1, writer)
    save(2, writer)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    writer._pending[0].result()  # written, but killed before the rename: another process saves next
    save(3, None)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000003"]


def test_a_full_disk_is_told_when_it_settles(tmp_path, world, save, monkeypatch):
    def fail(*arguments, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", fail)
    writer = BackgroundWriter(world, 60.0)
    save(1, writer)
    with pytest.raises(RunError, match="step-000001 cannot be written: .*No space left"):
        writer.settle(wait=True)
    writer.settle(wait=True)
    assert list_checkpoints(tmp_path) == []
