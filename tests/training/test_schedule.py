"""The learning rate of every step, by hand, and what AdamW is given."""

import pytest
import torch
from tiny_models import make_config

from laser_fast.training.schedule import learning_rate
from laser_fast.training.update import build_optimizer


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [8.0] * 10),
        ({"warmup_steps": 4}, [2.0, 4.0, 6.0, 8.0] + [8.0] * 6),
        # After the warm-up, ten equal parts of the way to 0 ...
        ({"schedule": "linear"}, [8.0 - 0.8 * step for step in range(10)]),
        # ... or to a quarter of the peak, over the eight steps that are left.
        (
            {"schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.25},
            [4.0, 8.0, 8.0, 7.25, 6.5, 5.75, 5.0, 4.25, 3.5, 2.75],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 6, "min_lr_ratio": 0.5},
            [8 / 6, 16 / 6, 4.0, 32 / 6, 40 / 6, 8.0, 8.0]
            + [6 + 2 * 0.5**0.5, 6.0, 6 - 2 * 0.5**0.5],
        ),
        ({"schedule": "linear", "warmup_steps": 10}, [0.8 * step for step in range(1, 11)]),
    ],
    ids=str,
)
def test_learning_rates(keys, expected):
    config = make_config(optim={"steps": 10, "lr": 8.0, **keys}).optim
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(expected)


def test_optimizer_settings():
    config = make_config(optim={"lr": 0.1, "betas": [0.8, 0.9], "weight_decay": 0.3}).optim
    module = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(module, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    [group] = optimizer.param_groups
    assert set(group["params"]) == set(module.parameters())
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.8, 0.9), 0.3)
