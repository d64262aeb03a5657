"""`laser-fast plan`: from a configuration to a table of memory and what to change."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from laser_fast.config import Config, ConfigError
from laser_fast.model.policy import load_model_config
from laser_fast.planning.advice import advise
from laser_fast.planning.memory import RESERVE_GB, WORKSPACE_MB, Plan, Setup, plan_memory
from laser_fast.planning.sizes import ModelSize, model_size


def plan_run(config: Config, *, num_gpus: int, memory_gb: float) -> Plan:
    """Plan a run on `num_gpus` GPUs of `memory_gb` (1e9 bytes) each, without reading any weights.

    Raises:
        ConfigError: the model's config cannot be read, or the run does not divide over the GPUs.
    """
    workspace = float(os.environ.get("LASER_KERNELS_WORKSPACE_MB") or WORKSPACE_MB)
    return plan_memory(
        Setup(
            config=config,
            size=_size(config),
            num_gpus=num_gpus,
            memory_gb=memory_gb,
            workspace_mb=workspace,
        )
    )


def print_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print sizes, terms with formulas, phases, and what to change when they do not fit."""
    console = console or Console()
    setup, size = plan.setup, plan.setup.size
    console.print(
        f"{setup.config.model.path}: P = {size.total:,} parameters = {size.num_layers} blocks x "
        f"B = {size.block:,} + R = {size.root:,}\n"
        f"{setup.num_gpus} GPUs of M = {setup.memory_gb:g} GB, S = {setup.num_shards} shards, "
        f"c = {setup.compute_bytes} bytes, "
        f"T = N = {setup.config.optim.tokens_per_microbatch:,} tokens, L = {size.num_layers}, "
        f"D = {size.hidden}, F = {size.mlp}, V = {size.vocab}, Dkv = {size.key}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    terms = Table("per GPU", title_justify="left")
    terms.add_column("GB", justify="right")
    terms.add_column("formula")
    for term in plan.terms.values():
        terms.add_row(term.name, _gb(term.bytes), term.formula)
    terms.add_row("reserve", _gb(RESERVE_GB * 1e9), "an allowance: context, NCCL, allocator gaps")
    phases = Table("phase")
    phases.add_column("GB", justify="right")
    phases.add_column("its terms and the reserve")
    for phase in plan.phases:
        names = ", ".join(term.name for term in phase.terms if term.bytes)
        mark = " <" if phase is plan.worst else ""
        phases.add_row(phase.name, f"{_gb(phase.bytes + RESERVE_GB * 1e9)}{mark}", names)
    console.print(terms)
    console.print(phases)
    if plan.host_bytes:
        console.print(
            f"model.cpu_offload: {plan.host_bytes / 1e9:.1f} GB of host memory per GPU for "
            "parameters, gradients and optimizer",
            highlight=False,
        )
    console.print(verdict(plan), markup=False, highlight=False, soft_wrap=True)


def verdict(plan: Plan) -> str:
    """One or two sentences: whether it fits, and if not, what to change."""
    memory = f"{plan.setup.memory_gb:g} GB"
    if plan.fits:
        return f"It fits: {plan.peak_gb:.1f} of {memory} in {plan.worst.name}."
    if plan.peak_gb > plan.setup.memory_gb:
        problem = f"{plan.worst.name} needs {plan.peak_gb:.1f} of {memory}"
    else:
        problem = (
            f"the key-value cache holds {plan.cached_sequences:.2f} of a sequence of "
            f"{plan.setup.longest} tokens"
        )
    changes, after = advise(plan)
    if not changes:
        return f"It does not fit: {problem}, and nothing here makes it fit; take a smaller model."
    return (
        f"It does not fit: {problem}. Change {', '.join(changes)}: then {after.worst.name} needs "
        f"{after.peak_gb:.1f} GB."
    )


def _gb(count: float) -> str:
    """Gigabytes to two places, of less than a tenth two digits."""
    return f"{count / 1e9:.2f}" if count == 0 or count >= 1e8 else f"{count / 1e9:.2g}"


def _size(config: Config) -> ModelSize:
    if config.model.path == "sandbox":
        from laser_fast.sandbox.model import make_sandbox_model

        with tempfile.TemporaryDirectory() as folder:
            make_sandbox_model(folder, seed=0, steps=1)
            model = config.model.model_copy(update={"path": str(Path(folder))})
            return model_size(load_model_config(model))
    try:
        return model_size(load_model_config(config.model))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; a plan needs only its config.json: without network, put that file into a "
            "folder and add model.path=FOLDER"
        ) from None
