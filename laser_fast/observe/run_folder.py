"""The folder of a run: what it holds, whether it is free, and which config may continue it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError, LogConfig, all_keys, load_config

# A resumed run must repeat the undisturbed one, so only keys that leave its numbers alone may
# change: how long it goes on, where it writes, and what costs memory or time. The evaluation data
# stays, since the summary compares before with after.
_FREE_SECTIONS = ("log.", "checkpoint.")
_FREE_KEYS = frozenset(
    {
        "output_dir",
        "optim.steps",
        "optim.tokens_per_microbatch",
        "model.gradient_checkpointing",
        "model.cpu_offload",
        "model.compile",
        "model.replicas",
        "data.eval_every",
        "reward.workers",
        "rollout.max_num_seqs",
        "rollout.max_disagreement",
        "rollout.tensor_parallel",
        "rollout.gpu_memory_fraction",
        "rollout.server_url",
        "rollout.sync_buffer_mb",
    }
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The names inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; its presence marks the folder as taken."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object per training step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object per evaluation; `step` counts the updates before it."""
        return self.path / "evaluations.jsonl"

    @property
    def samples(self) -> Path:
        """Completions with reward and score, a few per step."""
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        """The result of the run."""
        return self.path / "summary.json"

    @property
    def curves(self) -> Path:
        """The run at a glance."""
        return self.path / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Everything that `--resume` and `export` need."""
        return self.path / "checkpoints"

    def contents(self) -> tuple[Path, ...]:
        """Everything that a run writes here."""
        return (
            self.config,
            self.metrics,
            self.evaluations,
            self.samples,
            self.summary,
            self.curves,
            self.tensorboard,
            self.checkpoints,
        )


def open_run_folder(config: Config, *, resume: bool) -> RunFolder:
    """Check, before any model is loaded, that the run can write where and what it wants to.

    Reads only, so every rank may call it; rank 0's `RunLog` writes config.toml later, when a
    barrier or any collective has let the other ranks pass this check.

    Raises:
        ConfigError: a new run whose folder holds a run or is no folder; a resumed one whose folder
            holds none or whose config differs; a dashboard whose package is missing.
    """
    folder = RunFolder(Path(config.output_dir))
    _check_dashboards(config.log)
    if resume:
        _check_resume(folder, config)
        return folder
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"output_dir {folder.path} is a file; choose a folder")
    for taken in folder.contents():
        if taken.exists():
            raise ConfigError(
                f"output_dir {folder.path} is in use: it holds {taken.name}; continue that run "
                "with --resume or choose another output_dir"
            )
    return folder


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, with old and new value, that forbid continuing a run of `old` with `new`.

    Free to change are `output_dir` (a moved folder), `optim.steps` (train longer; a decaying
    schedule then decays towards the new end), `log.*`, `checkpoint.*`, and keys that cost memory
    or time but leave the numbers alone up to rounding, such as `optim.tokens_per_microbatch`.
    """
    before, after = _flat(old), _flat(new)
    return {
        key: (before[key], after[key])
        for key in all_keys()
        if before[key] != after[key] and not _is_free(key)
    }


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.startswith(_FREE_SECTIONS)


def _check_resume(folder: RunFolder, config: Config) -> None:
    if not folder.config.is_file():
        raise ConfigError(
            f"output_dir {folder.path} holds no run to resume ({folder.config.name} is missing); "
            "leave --resume out to start one, or point output_dir to the run"
        )
    differences = config_differences(load_config(folder.config), config)
    if differences:
        listed = ", ".join(
            f"{key} was {old!r} and is now {new!r}" for key, (old, new) in differences.items()
        )
        raise ConfigError(
            f"the run in {folder.path} cannot be resumed with another configuration: {listed}; "
            "restore the old values or start a new run in another output_dir"
        )


def _check_dashboards(log: LogConfig) -> None:
    for name in ("wandb", "trackio"):
        if getattr(log, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'log.{name} needs the package {name}; pip install "laser-fast[{name}]" or set '
                f'log.{name} = ""'
            )


def _flat(config: Config) -> dict[str, Any]:
    values = {}
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value
    return values
