"""laser-fast plan as a command: what it prints, and what it refuses."""

import json
import sys

import pytest
from model_shapes import QWEN_7B

from laser_fast.cli import main


def _run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["laser-fast", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    model = tmp_path / "[bold]qwen"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN_7B))
    config = "configs/laser_qwen2.5-7b_8xh200.toml"
    options = (config, "--gpus", "8", f"model.path={model}")
    assert _run(monkeypatch, *options, "--memory", "141") == 0
    shown = capsys.readouterr().out
    assert f"{model}: P = 7,615,616,512 parameters" in shown
    assert "4 W / S, float32 masters" in shown
    assert "3.808" in shown and "It fits" in shown  # 4 x 7.616e9 / 8
    assert _run(monkeypatch, *options, "--memory", "40") == 1
    assert "It does not fit: " in capsys.readouterr().out


def test_model_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "missing"
    options = ("configs/quickstart.toml", f"model.path={path}", "--gpus", "2", "--memory", "8")
    assert _run(monkeypatch, *options) == 2
    error = capsys.readouterr().err
    assert "cannot load" in error and "model.path=FOLDER" in error


def test_sandbox_needs_no_folder(monkeypatch, capsys):
    assert _run(monkeypatch, "configs/quickstart.toml", "--gpus", "2", "--memory", "8") == 0
    assert "P = 529,920 parameters = 2 blocks" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "memory", "wrong"), [(0, 80, "--gpus"), (8, -1, "--memory")])
def test_no_gpu_is_refused(monkeypatch, capsys, gpus, memory, wrong):
    assert _run(monkeypatch, "configs/quickstart.toml", "--gpus", gpus, "--memory", memory) == 2
    assert wrong in capsys.readouterr().err
