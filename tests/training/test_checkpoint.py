"""A checkpoint gives the same next step, on as many ranks or on others."""

import errno
import io
import json
import os
import pickle
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_ranks import checkpoint_config, full, full_parameters, make_optimizer, update

from laser_fast.config import ConfigError, ModelConfig, dump_config
from laser_fast.config_errors import RunError
from laser_fast.config_sft import SftConfig
from laser_fast.model.policy import build_policy
from laser_fast.training import checkpoint
from laser_fast.training.checkpoint import (
    TrainerState,
    check_digests,
    check_run_folder,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    writing,
)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


@pytest.fixture
def fresh(world, model_folders):
    """A policy of the base model and an optimizer without history."""
    policy = build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)
    return policy, make_optimizer(policy)


def save(run, step, fresh, world, *, keep=2, **state):
    policy, optimizer = fresh
    config = checkpoint_config(ModelConfig(path="any"), run, keep=keep)
    return save_checkpoint(
        config, step, policy=policy, optimizer=optimizer, state=state, world=world
    )


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks", "four_ranks"])
def test_resumed_update_is_the_undisturbed_one(ranks, request):
    found = request.getfixturevalue(ranks)["checkpoint"]
    assert all(
        not torch.equal(found["second"][name], first) for name, first in found["first"].items()
    )
    assert_equal(found["loaded"], found["first"])
    assert_equal(found["resumed"], found["second"])
    assert found["state"] == (1, -7.25)


def test_an_update_stays_fused_after_a_checkpoint_of_one_that_was_not(tmp_path, fresh, world):
    policy, optimizer = fresh
    trained = list(policy.parameters())
    older = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1, fused=False)
    update(policy, world, older)
    path = save(tmp_path, 1, (policy, older), world)
    before = [group["fused"] for group in optimizer.param_groups]
    load_checkpoint(path, policy=policy, optimizer=optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == before != [False]
    for parameter in trained:
        assert_equal(
            *({k: full(v) for k, v in o.state[parameter].items()} for o in (optimizer, older))
        )
    update(policy, world, optimizer)


@pytest.mark.parametrize(("saved_on", "ranks"), [(2, "two_ranks"), (4, "four_ranks")])
def test_checkpoint_loads_on_another_world_size(
    saved_on, ranks, request, ranks_folder, fresh, world
):
    found = request.getfixturevalue(ranks)["checkpoint"]
    policy, optimizer = fresh
    path = latest_checkpoint(ranks_folder / f"run-{saved_on}")
    assert load_checkpoint(path, policy=policy, optimizer=optimizer).step == 1
    assert_equal(full_parameters(policy), found["first"])
    # AdamW's moments too: the next update is the same, up to the order of its sums.
    for name, got in update(policy, world, optimizer).items():
        torch.testing.assert_close(got, found["second"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_checkpoint_is_whole_and_named_by_its_step(tmp_path, fresh, world):
    path = save(tmp_path, 7, fresh, world, ref_logprob=-11.5, cap={"policy_square": 0.25})
    assert path == tmp_path / "checkpoints" / "step-000007"
    assert latest_checkpoint(tmp_path) == path
    assert SftConfig.load(path / "config.toml").output_dir == str(tmp_path)
    state = {"step": 7, "ref_logprob": -11.5, "cap": {"policy_square": 0.25}}
    assert json.loads((path / "trainer.json").read_text()) == state
    assert load_checkpoint(path, policy=fresh[0], optimizer=fresh[1]) == TrainerState(**state)
    assert [p.name for p in path.parent.iterdir()] == ["step-000007"]  # no temporary folder


def test_only_the_newest_are_kept(tmp_path, fresh, world):
    for step in (999_999, 1_000_000, 1_000_001):  # by number, not by name
        save(tmp_path, step, fresh, world, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


def test_a_partial_checkpoint_is_ignored_and_replaced(tmp_path, fresh, world):
    save(tmp_path, 1, fresh, world)
    partial = tmp_path / "checkpoints" / ".step-000002.partial"
    partial.mkdir()
    (partial / "stale").write_text("of a run that was killed")
    (tmp_path / "checkpoints" / "step-000003.partial").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000001"
    path = save(tmp_path, 2, fresh, world)
    assert latest_checkpoint(tmp_path) == path
    assert not (path / "stale").exists()
    assert not partial.exists()


def test_saving_a_step_twice_keeps_the_first(tmp_path, fresh, world):
    path = save(tmp_path, 1, fresh, world, ref_logprob=-1.0)
    assert save(tmp_path, 1, fresh, world, ref_logprob=-2.0) == path
    assert json.loads((path / "trainer.json").read_text())["ref_logprob"] == -1.0


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint to resume from"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_before_the_first_update(tmp_path, world, model_folders):
    """A run stopped in its first step: AdamW has yet to count its first update."""
    config = ModelConfig(path=str(model_folders / "qwen2-tied"))
    found = {}
    for name in ("undisturbed", "saved", "resumed"):
        policy = build_policy(config, world)
        optimizer = make_optimizer(policy)
        if name == "saved":
            for parameter in policy.parameters():  # those of an update that did not come
                parameter.grad = torch.ones_like(parameter)
            save(tmp_path, 0, (policy, optimizer), world)
        if name == "resumed":
            load_checkpoint(latest_checkpoint(tmp_path), policy=policy, optimizer=optimizer)
        found[name] = update(policy, world, optimizer)
        assert {int(full(state["step"])) for state in optimizer.state.values()} == {1}, name
    assert_equal(found["saved"], found["undisturbed"])
    assert_equal(found["resumed"], found["undisturbed"])


class Payload:
    """Leaves a trace when a pickle of it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_reading_a_checkpoint_runs_none_of_its_pickles(tmp_path, fresh, world):
    path, trace = save(tmp_path, 1, fresh, world), tmp_path / "trace"
    (path / "SHA256SUMS").unlink()  # as whoever changes a checkpoint on purpose would
    whole = (path / ".metadata").read_bytes()

    def load(reason):
        with pytest.raises(ConfigError, match=f"cannot be read.*{reason}.*remove the folder"):
            load_checkpoint(path, policy=fresh[0], optimizer=fresh[1])
        assert not trace.exists()

    (path / ".metadata").write_bytes(pickle.dumps(Payload(str(trace))))
    load("posix.mkdir")
    (path / ".metadata").write_bytes(whole[: len(whole) // 2])
    load("")
    (path / ".metadata").write_bytes(whole)
    # A value of the optimizer, such as a learning rate, is a pickle within the shard.
    metadata = pickle.loads(whole)
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn.endswith(".lr"))
    buffer = io.BytesIO()
    torch.save(Payload(str(trace)), buffer)
    metadata.storage_data[index] = replace(
        place, offset=(path / place.relative_path).stat().st_size, length=len(buffer.getvalue())
    )
    with (path / place.relative_path).open("ab") as file:
        file.write(buffer.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    load("lr is no plain value")


def test_a_missing_shard_is_named(tmp_path, fresh, world):
    path = save(tmp_path, 1, fresh, world)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match="__0_0.distcp"):
        load_checkpoint(path, policy=fresh[0], optimizer=fresh[1])


def test_what_a_killed_run_left_is_swept(tmp_path, fresh, world):
    for name in (".step-000003.partial", ".step-000009.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path, 4, fresh, world)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, fresh, world):
    config = checkpoint_config(ModelConfig(path="any"), tmp_path)
    (tmp_path / "config.toml").write_text(dump_config(config))
    path = save(tmp_path, 1, fresh, world)
    for resume in ("auto", True):
        assert check_run_folder(config, world, resume=resume)
    other = (path / "config.toml").read_text().replace("lr = 1e-06", "lr = 0.5")
    (path / "config.toml").write_text(other)
    for resume in ("auto", True):
        with pytest.raises(ConfigError, match=r"step-000001/config.toml: optim.lr was 0.5 and is"):
            check_run_folder(config, world, resume=resume)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_from_other_errors(code):
    with pytest.raises(RunError, match=r"run cannot be written: .*; make room, resume"):
        with writing(Path("run")):
            raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError):
        with writing(Path("run")):
            raise OSError(errno.ENOENT, "gone")


@pytest.mark.parametrize("name", ["__0_0.distcp", "trainer.json", "config.toml", ".metadata"])
def test_a_flipped_byte_is_found_and_its_file_named(tmp_path, fresh, world, name):
    path = save(tmp_path, 1, fresh, world, cap={"policy_square": 0.25})
    subprocess.run(["sha256sum", "--check", "--status", "SHA256SUMS"], cwd=path, check=True)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    named = ".*" if name == ".metadata" else f"{name} is not as it was written.*"
    with pytest.raises(ConfigError, match=f"step-000001 cannot be read: {named}remove the folder"):
        load_checkpoint(path, policy=fresh[0], optimizer=fresh[1])


def test_a_changed_state_is_found_before_it_is_read(tmp_path, fresh, world):
    path = save(tmp_path, 1, fresh, world)
    for content in ("[]", "null", '{"step": 1, "digests": []}'):
        (path / "trainer.json").write_text(content)
        with pytest.raises(ConfigError, match="trainer.json is not as it was written"):
            check_digests(path, {"data.train": "0"})
    (path / "SHA256SUMS").unlink()  # as of an older version
    for content, fault in (
        ("[]", "Input should be"),
        ("{}", "step: Field required"),
        ('{"step": 1, "digests": []}', "digests: Input should be"),
        ('{"step": 1, "cap": {"ratio": "x"}}', "cap: ratio: Input should be"),
        ('{"step": 1, "curriculum": {"places": [0, 0]}}', "curriculum: outside: Field required"),
        ('{"step": 1, "curriculum": {"places": [0], "outside": []}}', "curriculum: places: 1: "),
    ):
        (path / "trainer.json").write_text(content)
        with pytest.raises(ConfigError, match=f"step-000001 cannot be read: {fault}"):
            check_digests(path, {"data.train": "0"})


@pytest.mark.parametrize("size", [None, 7])
def test_a_shard_that_rank_0_does_not_see_whole_is_found_before_the_rename(
    tmp_path, fresh, world, monkeypatch, size
):
    save(tmp_path, 1, fresh, world)
    write = checkpoint.dcp.save

    def save_elsewhere(state, checkpoint_id, **keys):
        metadata = write(state, checkpoint_id=checkpoint_id, **keys)
        (checkpoint_id / "__0_0.distcp").unlink()
        if size:
            (checkpoint_id / "__0_0.distcp").write_bytes(b"x" * size)
        return metadata

    monkeypatch.setattr(checkpoint.dcp, "save", save_elsewhere)
    with pytest.raises(RunError, match="does not see .* __0_0.distcp; put output_dir on a file"):
        save(tmp_path, 2, fresh, world)
    assert latest_checkpoint(tmp_path).name == "step-000001"


def test_an_old_checkpoint_that_is_half_deleted_has_no_name(tmp_path, fresh, world, monkeypatch):
    save(tmp_path, 1, fresh, world)
    remove = checkpoint.shutil.rmtree

    def die(path):
        raise OSError("killed")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(OSError, match="killed"):
        save(tmp_path, 2, fresh, world, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    save(tmp_path, 3, fresh, world, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, fresh, world):
    save(tmp_path, 1, fresh, world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(RunError, match="step-000002 cannot be written: .*; make room") as found:
            save(tmp_path, 2, fresh, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(found.value)
    assert latest_checkpoint(tmp_path).name == "step-000001"
    save(tmp_path, 2, fresh, world)
