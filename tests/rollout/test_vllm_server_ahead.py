"""Training one step off-policy against a real `vllm serve`, weights by file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from laser_fast.sandbox.task import RESERVED_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_stale_samples_are_corrected_and_everything_agrees(server, served, tmp_path):
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(served.path)},
        "data": {
            "train": "sandbox",
            "eval": "sandbox",
            "eval_limit": 4,
            "eval_samples": 2,
            "eval_every": 2,
            "template": "{prompt}",
            "max_prompt_tokens": 24,
            "prompts_per_step": 4,
        },
        "rollout": {
            "engine": "vllm_server",
            "server_url": server[0],
            "steps_ahead": 1,
            "max_new_tokens": 24,
            "group_size": 4,
            "max_disagreement": 1e-3,
        },
        "reward": {"kind": "sandbox", "workers": 1},
        # The random model's score token is likely: its beta has to be large.
        "score": {"token": RESERVED_TOKENS[0], "beta": 1.0, "loss_coef": 1.0},
        "optim": {"steps": 5, "lr": 1e-3, "tokens_per_microbatch": 10_000},
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "laser_fast", "train", tmp_path / "config.toml"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 0, 1]
    for line in lines:
        assert line["rollout/sync_disagreement"] < 1e-4
        largest, share = line["loss/importance_max"], line["loss/importance_ess"]
        if line["rollout/staleness"]:
            assert line["rollout/disagreement"] > 1e-3
            assert largest > 1.01 and share < 1 - 1e-5
        else:
            assert line["rollout/disagreement"] < 1e-4
            assert largest < 1.001 and share > 1 - 1e-6
