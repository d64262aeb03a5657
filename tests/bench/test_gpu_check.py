"""The shell script's own work: limits, failures, files and the last table."""

import json
import os
import subprocess
import sys

import pytest

from bench.provenance import ROOT

# Stands in for the interpreter: one step succeeds, one crashes, one hangs, the others do nothing.
INTERPRETER = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.exit({no_gpu})
if arguments[1] == "bench.targets":
    os.execv("{python}", ["{python}", *arguments])
path = arguments[arguments.index("--json") + 1]
name = os.path.basename(path)
if name == "gpu_tests.json":
    rows = [{{"test": "a", "outcome": "passed", "reason": ""}}]
    json.dump({{"header": {{"op": "gpu_tests", "device": "GPU"}}, "rows": rows}}, open(path, "w"))
elif name == "loss_7b.json":
    sys.exit("the driver is gone")
elif name == "last_token_7b.json":
    time.sleep(60)
"""


def check(tmp_path, *, no_gpu=0, seconds="12"):
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable, no_gpu=no_gpu))
    interpreter.chmod(0o755)
    environment = os.environ | {"PYTHON": str(interpreter), "GPU_CHECK_SECONDS": seconds}
    return subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_survives_failing_and_hanging_steps(tmp_path):
    result = check(tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    steps = {path.stem for path in out.glob("*.json")}
    assert (
        len(steps) == 13
        and {"csrc", "gpu_tests", "loss_7b", "train_step", "rollout_score"} <= steps
    )
    assert all((out / f"{step}.md").exists() for step in steps - {"gpu_tests"})
    assert json.loads((out / "loss_7b.json").read_text())["rows"] == []
    assert "the driver is gone" in (out / "loss_7b.md").read_text()
    assert "last_token_7b: exit code 124" in result.stdout
    assert "exit code no-time" in (out / "logprob_7b.md").read_text()  # the hang took all of it
    table = result.stdout[result.stdout.index("| target |") :]
    assert "| GPU tests that fail | 0 | 1 passed, 0 failed, 0 skipped | met | GPU |" in table
    assert "| scoring, 7B head, N 8192, over one bare GEMM | 1.10x | not measured |" in table
    assert (out / "targets.md").read_text() == table


def test_refuses_a_machine_without_a_gpu(tmp_path):
    result = check(tmp_path, no_gpu=1)
    assert result.returncode == 1 and "expected a PyTorch that sees an NVIDIA GPU" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_explains_its_use(arguments):
    result = subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 2 and "bench/gpu_check.sh OUT" in result.stdout
