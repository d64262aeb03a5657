"""The command line with `rollout.engine=vllm`: two ranks of training with the real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs or none"),
]


@pytest.fixture(scope="module")
def run_folder(served, tmp_path_factory):
    root = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + ["-m", "laser_fast", "train", str(root / "configs" / "quickstart.toml")]
        # A random model in place of the warm-started one, which takes minutes to make; its score
        # token is far too likely for the beta of the quickstart.
        + [f"model.path={served.path}", "score.beta=1.0", "data.eval_limit=6"]
        + ["rollout.engine=vllm", "data.prompts_per_step=8", "advantage.score_warmup_steps=0"]
        + ["optim.steps=3", "optim.warmup_steps=0", f"output_dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_step_agrees_with_the_policy(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss/policy" in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    for row in steps:
        assert row["rollout/disagreement"] < 1e-4
        assert row["rollout/sync_disagreement"] < 1e-4
        assert row["rollout/tokens"] > 0


def test_the_run_ends_with_a_checkpoint(run_folder):
    assert list((run_folder / "checkpoints").iterdir())
