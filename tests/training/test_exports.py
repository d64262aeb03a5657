"""Models that are written and uploaded while a run goes on."""

import json
import logging
import threading
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EOS, SIZES, VOCAB, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from laser_fast.config import Config, ConfigError, ModelConfig
from laser_fast.model.policy import build_policy
from laser_fast.model.vocabulary import load_tokenizer
from laser_fast.training import export, hub
from laser_fast.training.export import Exports, write_model


def test_a_model_says_the_dtype_that_it_is_stored_in(tmp_path, world, model_folders, monkeypatch):
    """Masters are float32, of which transformers would tell instead."""
    base = model_folders / "qwen2-tied"
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "base")
    # Of such settings transformers warns, and saves no changed ones.
    hostile = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(hostile))
    tokenizer = MagicMock(eos_token_id=7)  # which ends completions in training
    tokenizer.get_vocab.return_value = {"last": hf.config.vocab_size - 1}
    monkeypatch.setattr("laser_fast.training.export.load_tokenizer", lambda path: tokenizer)
    config = ModelConfig(path=str(tmp_path / "base"))
    policy = build_policy(config, world)
    write_model(policy, config, tmp_path / "out", world)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    served = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert served.items() >= ({"eos_token_id": [hf.config.eos_token_id, 7]} | hostile).items()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(stored[name], value) for name, value in hf.state_dict().items())


def test_buffers_keep_their_dtype(tmp_path, world, monkeypatch):
    """Rounded, the biases of a router would be one number, and choose other experts."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = experts | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8}
    config = AutoConfig.for_model("glm4_moe", **SIZES, **sizes, eos_token_id=EOS)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    hf.get_buffer(bias).copy_(9 + 0.01 * torch.arange(4))
    hf.save_pretrained(tmp_path / "base")
    save_model(tmp_path / "tokenizer", vocab_size=VOCAB)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    monkeypatch.setattr(export, "load_tokenizer", lambda path: tokenizer)
    config = ModelConfig(path=str(tmp_path / "base"), compute_dtype="bfloat16")
    policy = build_policy(config, world)
    write_model(policy, config, tmp_path / "out", world)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert base[bias].dtype == torch.float32 and len(base[bias].unique()) == 4
    streamed = dict(policy.stream_weights(world.device))
    for found in (load_file(tmp_path / "out" / "model.safetensors"), streamed):
        assert torch.equal(found[bias], base[bias])


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """Names of what was uploaded, each after `uploads.gate` is open, and a trainer to export."""
    gate, found = threading.Event(), []

    def write(policy, config, out, world, **keys):
        out.mkdir(parents=True)

    class Api:
        def create_repo(self, *arguments, **keys):
            assert gate.wait(60)

        def upload_folder(self, *, folder_path, **keys):
            found.append(folder_path.name)

    monkeypatch.setattr(export, "write_model", write)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    sections = {
        "output_dir": str(tmp_path),
        "model": {"path": "m"},
        "data": {"train": "t"},
        "optim": {"steps": 9},
        "checkpoint": {"export_every": 1, "keep": 1, "hub_repo": "me/model"},
    }
    config = Config.parse(sections, source="test")
    trainer = {"config": config, "policy": None, "score": SimpleNamespace(ref_logprob=-1.0)}
    return SimpleNamespace(gate=gate, found=found, trainer=trainer)


def test_training_waits_for_no_upload_and_the_last_one_comes_last(uploads, world, tmp_path, caplog):
    trainer, writer = SimpleNamespace(world=world, **uploads.trainer), Exports()
    for step in (1, 2):
        writer.write(trainer, step, is_last=False)
    assert uploads.found == []
    assert "step-000002 is not uploaded, since the upload before it goes on" in caplog.text
    # What is still read is not deleted.
    assert sorted(p.name for p in (tmp_path / "exports").iterdir()) == [
        "step-000001",
        "step-000002",
    ]
    threading.Timer(0.5, uploads.gate.set).start()
    writer.write(trainer, 3, is_last=True)
    writer.finish(world)
    assert uploads.found == ["step-000001", "step-000003"]
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step-000003"]


def test_an_upload_that_a_stop_cuts_is_told_and_comes_again(uploads, world, monkeypatch, caplog):
    trainer, writer = SimpleNamespace(world=world, **uploads.trainer), Exports()
    writer.write(trainer, 3, is_last=True)
    with monkeypatch.context() as stopped:
        stopped.setattr(export, "is_asked", lambda: True)
        writer.finish(world)
    assert "stopped before step-000003 was uploaded; --resume goes on" in caplog.text
    monkeypatch.setattr(export, "write_model", MagicMock(side_effect=AssertionError))
    uploads.gate.set()
    writer.finish(world)
    resumed = Exports()
    resumed.write(trainer, 3, is_last=True)
    resumed.finish(world)
    assert uploads.found == ["step-000003"] * 2


def test_an_upload_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **keys):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    assert not hub.upload(tmp_path / "step-000001", "me/model", "a message")
    assert "step-000001 was not uploaded to me/model: no route to host" in caplog.text
    assert [record.levelno for record in caplog.records][-1] == logging.WARNING


def test_a_place_that_cannot_take_an_upload_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("model", "me/", "me/my model", "me/my/model"):
        with pytest.raises(ConfigError, match=f'hub repository "user/name", got "{name}"'):
            hub.check_hub(name)
    with pytest.raises(ConfigError, match="me/model while HF_HUB_OFFLINE is set; unset it"):
        hub.check_hub("me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="me/model needs a token of the hub; set HF_TOKEN"):
        hub.check_hub("me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    hub.check_hub("me/model")
