"""`laser-fast plan`: the memory that a run needs on one GPU, and what to change if it is short."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from laser_fast.config_errors import ConfigError
from laser_fast.model.policy import load_model_config
from laser_fast.plan.advice import advise, print_plan, proposals, verdict
from laser_fast.plan.memory import WORKSPACE_MB, Plan, count_adapters, count_parameters

if TYPE_CHECKING:
    from laser_fast.config import Config

__all__ = ["Plan", "advise", "plan_run", "print_plan", "proposals", "verdict"]


def plan_run(config: Config, *, num_gpus: int, memory_gb: float) -> Plan:
    """Plan a run on `num_gpus` GPUs of `memory_gb` (1e9 bytes) each; reads no weights."""
    try:
        model = load_model_config(config.model)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; a plan needs only its config.json: without network, put that file into a "
            "folder and add model.path=FOLDER"
        ) from None
    workspace = float(os.environ.get("LASER_KERNELS_WORKSPACE_MB") or WORKSPACE_MB)
    counts, adapters = count_parameters(model), count_adapters(model, config.model)
    return Plan(config, model, *counts, num_gpus, memory_gb, workspace, *adapters)
