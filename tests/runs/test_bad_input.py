"""Bad input is one sentence and exit code 2 before the first step, and nothing is overwritten."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import run_cli

from laser_fast import cli
from laser_fast.config import load_config
from laser_fast.rollout import server_http
from laser_fast.rollout.engine import DisagreementError
from laser_fast.rollout.server_http import ServerError
from laser_fast.training import run as training_run


def write_rows(name, text):
    """A function that writes a data file and gives the overrides that read it."""

    def write(folder):
        (folder / name).write_text(text)
        return [f"data.train={folder / name}", "data.eval="]

    return write


GOOD_ROW = '{"problem": "1a+1=", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=nowhere.jsonl"], r"nowhere.jsonl"),
        (write_rows("broken.jsonl", GOOD_ROW + "{oops\n"), r"broken\.jsonl.*\b2\b"),
        (write_rows("field.jsonl", '{"text": "1", "answer": "1"}\n'), r"prompt_field.*text"),
        (write_rows("empty.jsonl", ""), r"no rows"),
        (["data.max_prompt_tokens=3"], r"no prompt is left"),
        (["data.max_prompt_tokens=100"], r"= 131 exceeds the 128 positions of the model"),
        (["data.template=chat"], r"no chat template"),
        (["score.token=<|nope|>"], r"not in the tokenizer.*<\|reserved_0\|>"),
        (["score.beta=0.09"], r"-11 \+ 1/0\.09 = 0\.111, must stay well below 0"),
        (["rollout.group_size=1"], r"rollout\.group_size"),
        (["optim.tokens_per_microbatch=53"], r"= 54; raise it to that"),
        (["optim.minibatches=7"], r"exceeds data\.prompts_per_step = 6"),
        (["optim.learning_rate=1"], r"optim\.lr"),
        (["optim.lr=fast"], r"optim\.lr"),
        (["model.path=nowhere"], r"model\.path"),
        (["reward.kind=train_ranks:rewards"], r"reward\.kind"),
        (["reward.kind=maths"], r"did you mean"),
        (["rollout.engine=vllm_server"], r"server_url"),
        (["rollout.engine=vllm_server", "rollout.server_url=h:8000"], r'HOST:PORT, got "h:8000"'),
        (["rollout.engine=vllm_server", "rollout.server_url=http://[::1"], r"server_url: Inval"),
        (["rollout.timeout_s=1e300"], r"rollout\.timeout_s"),
        (["reward.timeout_s=1e300"], r"reward\.timeout_s"),
        (["rollout.engine=vllm", "rollout.tensor_parallel=2"], r"= 2 does not divide the 1 ranks"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(overrides, message, tmp_path, write_config, monkeypatch, capsys):
    config = write_config(tmp_path)
    if callable(overrides):
        overrides = overrides(tmp_path)
    code, stderr = run_cli(monkeypatch, capsys, "train", config, *overrides)
    assert code == 2
    [line] = re.findall("^error: .*", stderr, re.MULTILINE)
    assert stderr.endswith(line + "\n")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def refused(monkeypatch, capsys, *arguments):
    """The one sentence by which the command line refuses what it is given."""
    code, stderr = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2, stderr
    [line] = re.findall("^error: .*", stderr, re.MULTILINE)
    assert stderr.endswith(line + "\n") and "LOAD REPORT" not in stderr
    return line


def weights(change):
    """Damage to the tensors of a model, which `change` edits in place."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def values(name, **changes):
    """Damage to a JSON file of a model; a value None removes its key."""

    def damage(folder):
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **changes}))

    return damage


def text(name, content):
    """Damage that replaces a file of a model."""
    return lambda folder: (folder / name).write_bytes(content)


def replaced(name, old, new):
    """Damage to the text of a file of a model."""

    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return damage


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def layers(count):
    kinds = ["full_attention"] * count
    return values("config.json", num_hidden_layers=count, layer_types=kinds)


UP = "model.layers.1.mlp.up_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
STRAY = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights(lambda t: t.pop(UP)), rf"weights of .* lack {UP};"),
        (weights(lambda t: t.clear()), r"lack lm_head.* and \d+ more;"),
        (weights(lambda t: t.update({UP: t[UP][:-1].clone()})), rf"shape in {UP} \(expected \["),
        (weights(lambda t: t.update({"more.weight": t[UP] + 0})), r"hold unexpected more\.weight"),
        (weights(lambda t: t.update({UP + "_scale": torch.ones(1)})), r"unexpected .*up_proj.*_sc"),
        (weights(lambda t: t[UP][3].fill_(torch.nan)), rf"are NaN or infinite in {UP};"),
        (weights(lambda t: t[UP].view(-1)[7:8].fill_(torch.inf)), rf"are NaN or infinite in {UP};"),
        (weights(lambda t: t.update({UP: (t[UP] * 9).to(torch.int8)})), rf"quantized.*{UP}.*I8"),
        (
            weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
            r"lm_head\.weight of their own, but config\.json says tie_word_embeddings = true",
        ),
        (values("config.json", tie_word_embeddings=False), r"lack lm_head\.weight;"),
        (layers(1), r"hold unexpected model\.layers\.1"),
        (layers(3), r"lack model\.layers\.2"),
        (values("config.json", hidden_size=64), r"wrong shape"),
        (values("config.json", hidden_size="big"), r"cannot load .*hidden_size"),
        (values("config.json", num_attention_heads=0), r"model\.path: "),
        (values("config.json", vocab_size=8), r"beyond|wrong shape"),
        (values("config.json", pad_token_id=4096), r"pad_token_id = 4096 .* beyond its \d+ embed"),
        (values("config.json", eos_token_id="<eos>"), r"cannot load .*eos_token_id"),
        (values("config.json", eos_token_id=-1), r"config\.json of .* EOS id -1; expected a numb"),
        (
            values("config.json", quantization_config={"quant_method": "gptq"}),
            r"quantized, says its config",
        ),
        (values("config.json", dtype="int8"), r"quantized, says its config"),
        (values("adapter_config.json", peft_type="LORA"), r"is of an adapter; merge it"),
        (values("config.json", model_type=["qwen2"]), r"model\.path: cannot load"),
        (text("config.json", b"[]"), r"model\.path: cannot load"),
        (text("config.json", b"\xff"), r"model\.path: cannot load"),
        (text("config.json", LFS), r"model\.path: "),
        (cut("model.safetensors", 200_000), r"model\.safetensors is truncated or broken"),
        (cut("model.safetensors", 3), r"model\.safetensors is truncated or broken"),
        (cut("model.safetensors", 0), r"model\.safetensors is truncated or broken"),
        (text("model.safetensors", LFS), r"model\.safetensors is a pointer of git-lfs"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot load the weights of"),
        (
            lambda folder: (
                (folder / "model.safetensors").unlink(),
                (folder / "model.safetensors.index.json").write_text(json.dumps(STRAY)),
            ),
            r"cannot load the weights of .*",
        ),
        (
            lambda folder: (
                (folder / "model.safetensors").unlink(),
                (folder / "pytorch_model.bin").write_bytes(b"no pickle"),
            ),
            r"pytorch_model\.bin is truncated or broken",
        ),
        (
            lambda folder: torch.save({UP: torch.ones(3).byte()}, folder / "pytorch_model.bin"),
            rf"pytorch_model\.bin holds quantized weights, such as {UP} of dtype torch\.uint8",
        ),
        (text("generation_config.json", b"{oops"), r"cannot read the generation_config\.json of"),
        (text("generation_config.json", b"[1]"), r"expected an object, got list"),
        (text("generation_config.json", b"\xff\xfe"), r"cannot read the generation_config\.json"),
        (values("generation_config.json", eos_token_id="<eos>"), r"the EOS id '<eos>'; expected a"),
        (values("generation_config.json", eos_token_id=[1, -2]), r"the EOS id -2; expected a numb"),
        (values("generation_config.json", eos_token_id=1.5), r"the EOS id 1\.5; expected a number"),
        (values("generation_config.json", eos_token_id=True), r"the EOS id True; expected a"),
        (text("tokenizer.json", b"{}"), r"no usable tokenizer"),
        (text("tokenizer.json", b"{oops"), r"no usable tokenizer"),
        (text("tokenizer.json", LFS), r"no usable tokenizer"),
        (cut("tokenizer.json", 300), r"no usable tokenizer"),
        (text("tokenizer_config.json", b"[]"), r"no usable tokenizer"),
        (values("tokenizer_config.json", pad_token="<|beyond|>"), r"padding token .* beyond the"),
        (
            replaced("tokenizer.json", '"=": 22,', '"=": 99,'),
            r"prompts have tokens up to id 99, bey",
        ),
    ],
)
def test_a_broken_model_is_one_sentence(
    damage, message, tmp_path, model, write_config, monkeypatch, capsys
):
    shutil.copytree(model, tmp_path / "model")
    damage(tmp_path / "model")
    config = write_config(tmp_path, model={"path": str(tmp_path / "model")})
    line = refused(monkeypatch, capsys, "train", config)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_missing_vllm_is_named_before_the_model_is_loaded(
    tmp_path, write_config, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = write_config(tmp_path)
    overrides = ["rollout.engine=vllm", "model.path=sandbox"]  # which would take minutes to make
    code, stderr = run_cli(monkeypatch, capsys, "train", config, *overrides)
    assert code == 2
    assert re.search(r"^error: rollout\.engine needs vLLM, which cannot be imported", stderr, re.M)
    assert not (tmp_path / "run").exists()


def test_a_missing_server_is_named_before_the_model_is_loaded(
    tmp_path, write_config, monkeypatch, capsys
):
    monkeypatch.setattr(training_run, "import_vllm", lambda: None)  # which NCCL needs
    monkeypatch.setattr(training_run, "build_policy", None)
    monkeypatch.setattr(server_http, "_PAUSE_S", 0.01)
    overrides = ["rollout.engine=vllm_server", "rollout.server_url=http://127.0.0.1:9"]
    code, stderr = run_cli(monkeypatch, capsys, "train", write_config(tmp_path), *overrides)
    assert code == 2
    assert re.search(r"^error: no vLLM server answers at rollout\.server_url", stderr, re.M)
    assert not (tmp_path / "run").exists()


def folder_state(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"is in use: it holds .*; continue that run with --resume or choose another"),
        (
            ["--resume", "optim.lr=0.25"],
            r"another configuration .*: optim\.lr was 0\.0005 and is now",
        ),
        (["--resume", "seed=1"], r"seed was 0 and is now 1"),
        (["--resume", "output_dir=nowhere"], r"holds no run to resume"),
    ],
)
def test_a_run_is_not_overwritten(one_rank, arguments, message, monkeypatch, capsys):
    before = folder_state(one_rank / "plain")
    config = one_rank / "plain" / "config.toml"
    code, stderr = run_cli(monkeypatch, capsys, "train", config, *arguments)
    assert code == 2
    assert re.search(message, stderr), stderr
    assert stderr.count("\n") == 1
    assert folder_state(one_rank / "plain") == before


def test_a_run_is_not_resumed_with_other_prompts(
    tmp_path, model, write_config, monkeypatch, capsys
):
    files = {split: shutil.copy(model / f"{split}.jsonl", tmp_path) for split in ("train", "eval")}
    optim = {"steps": 1, "warmup_steps": 0}
    config = write_config(tmp_path, data=files, optim=optim)
    cli.train_run(load_config(config))
    before = folder_state(tmp_path / "run")
    for split, file in files.items():
        content = open(file).read()
        open(file, "w").write(content.replace("1", "2", 1))  # of the same length
        line = refused(monkeypatch, capsys, "train", config, "--resume", "optim.steps=2")
        assert f"with other prompts: the rows, tokenizer or chat template of data.{split}" in line
        open(file, "w").write(content)
    assert folder_state(tmp_path / "run") == before
    cli.train_run(load_config(config, ["optim.steps=2"]), resume=True)


def test_a_run_without_a_checkpoint_cannot_be_resumed(one_rank, tmp_path, monkeypatch, capsys):
    shutil.copy(one_rank / "plain" / "run" / "config.toml", tmp_path)
    config = one_rank / "plain" / "config.toml"
    code, stderr = run_cli(
        monkeypatch, capsys, "train", config, "--resume", f"output_dir={tmp_path}"
    )
    assert code == 2
    assert "no complete checkpoint to resume from" in stderr


def test_the_command_line_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "laser_fast", "train", str(tmp_path / "none.toml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none.toml'}: ")
    assert done.stderr.count("\n") == 1


def test_print_config_is_the_resolved_configuration(tmp_path, write_config, monkeypatch, capsys):
    path = write_config(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["laser-fast", "train", str(path), "--print-config", "optim.lr=0.25"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(path, ["optim.lr=0.25"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [DisagreementError("stale weights"), ServerError("no answer")])
def test_a_run_whose_sampler_fails_says_on_which_rank(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setenv("RANK", "3")
    assert run_cli(monkeypatch, capsys) == (1, f"error: rank 3: {error}\n")
