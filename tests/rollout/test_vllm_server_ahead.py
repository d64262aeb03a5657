"""Training one step off-policy against a real `vllm serve`, weights by file."""

import json

import pytest

from laser_fast.config import parse_config
from laser_fast.data.sandbox import RESERVED_TOKENS
from laser_fast.training import objective
from laser_fast.training.run import train

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_stale_samples_are_corrected_and_everything_agrees(server, served, tmp_path, monkeypatch):
    seen = []  # importance weights, by loss call
    tis_weights = objective.tis_weights

    def spy(*arguments, **options):
        seen.append(tis_weights(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(objective, "tis_weights", spy)
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
        "reward": {"kind": "laser_fast.data.sandbox:reward", "workers": 1},
        # The random model's score token is likely: its beta has to be large.
        "score": {"token": RESERVED_TOKENS[0], "beta": 1.0, "loss_coef": 1.0},
        "optim": {"steps": 5, "lr": 1e-3, "tokens_per_microbatch": 10_000},
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False},
    }
    train(parse_config(config, source="test"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 0, 1]
    assert len(seen) == len(lines)
    for line, weights in zip(lines, seen, strict=True):
        assert line["rollout/sync_disagreement"] < 1e-4
        off = (weights - 1).abs().max()
        if line["rollout/staleness"]:
            assert line["rollout/disagreement"] > 1e-3 and off > 1e-2
        else:
            assert line["rollout/disagreement"] < 1e-4 and off < 1e-3
