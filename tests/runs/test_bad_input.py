"""Bad input is one sentence and exit code 2 before the first step, and nothing is overwritten."""

import os
import re
import shutil
import subprocess
import sys

import pytest
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
        (write_rows("field.jsonl", '{"question": "1", "answer": "1"}\n'), r"problem.*question"),
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
        (["--resume", "optim.lr=0.25"], r"another configuration: optim\.lr was 0\.0005 and is now"),
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
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setenv("RANK", "3")
    assert run_cli(monkeypatch, capsys) == (1, f"error: rank 3: {error}\n")
