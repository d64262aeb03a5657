"""The optimizer's update from accumulated gradients, the same in every kind of training."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from laser_fast.config import UpdateConfig
from laser_fast.config_errors import needs_package
from laser_fast.model.distributed import World
from laser_fast.model.policy import Policy

# Earlier ones keep a DTensorSpec of every parameter and update (pytorch/pytorch#188174); with 2.13
# no more are alive after 1,000 updates of 80 parameters than after 50.
IS_FUSED = torch.__version__ >= "2.13"


def build_optimizer(policy: Policy, config: UpdateConfig) -> Optimizer:
    """AdamW over the sharded float32 masters, those that are trained.

    torch's fused one from 2.13 on, also on a CPU: 3.7 times as fast there (6.3 million parameters
    on one core), at differences of 2e-8, and with 200 MB less at its peak for 100 MB of parameters.
    Moments of 8 bits go back from a checkpoint to another number of ranks only if the rows of every
    shard fill blocks of 256.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    if config.state_bits == 32:
        return AdamW(trained, lr=config.lr, fused=IS_FUSED or None, **options)
    return import_adamw8bit()(trained, lr=config.lr, **options)


def import_adamw8bit() -> Callable[..., Optimizer]:
    """AdamW8bit of torchao; a ConfigError says what installs it."""
    with needs_package("torchao", "optim.state_bits = 8", extra="torchao"):
        from torchao.optim import AdamW8bit
    return AdamW8bit


def gradient_norm(policy: Policy) -> float:
    """Norm of the accumulated gradients over all parameters. Collective."""
    norm = get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def apply_gradients(
    policy: Policy, optimizer: Optimizer, world: World, config: UpdateConfig, *, lr: float
) -> float:
    """Clip the accumulated gradients, apply and clear them; returns their norm before clipping.

    Gradients without a finite norm, which is nan then, are dropped on all ranks alike. Collective.
    """
    norm = gradient_norm(policy)
    if world.max(int(not math.isfinite(norm))):
        norm = math.nan
    else:
        clip_grads_with_norm_(policy.parameters(), config.max_grad_norm, torch.tensor(norm))
        for parameters in optimizer.param_groups:
            if isinstance(parameters["lr"], Tensor):  # of torchao, whose update is compiled
                parameters["lr"].fill_(lr)
            else:
                parameters["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
