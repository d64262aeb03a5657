"""The folder of a run: whether it is free, which config may continue it, and what it says."""

from __future__ import annotations

import importlib.util
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError, LogConfig, all_keys, load_config
from laser_fast.log import jsonl

Record = Mapping[str, Any]

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


class RunFolder:
    """The names inside a run folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.toml"  # resolved; its presence marks the folder as taken
        self.metrics = path / "metrics.jsonl"  # one JSON object per training step
        self.evaluations = path / "evaluations.jsonl"  # one each; `step` counts the updates before
        self.samples = path / "samples.jsonl"  # completions with reward and score, a few per step
        self.summary = path / "summary.json"  # the result
        self.curves = path / "curves.png"  # the run at a glance
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"  # everything that --resume and export need

    def contents(self) -> tuple[Path, ...]:
        """Everything that a run writes here."""
        return tuple(path for name, path in vars(self).items() if name != "path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run has logged; `config` is flat, by dotted key."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    steps: Sequence[Record] = ()  # by step, one record each
    evaluations: Sequence[Record] = ()  # by step, one record each
    samples: Sequence[Record] = ()
    summary: Record = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The algorithm, from the two coefficients that switch the score on."""
        if not number(self.config.get("score.loss_coef")):
            return "GRPO"
        if not number(self.config.get("advantage.score_coef")):
            return "LaSeR without advantage mixing"
        return "LaSeR"


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


def read_run(path: str | Path) -> Run:
    """Read a run folder; a run that is still going, or was killed, lacks files and that is fine.

    Raises:
        ConfigError: the folder holds no run, or a file of it is broken.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise ConfigError(
            f"{path} holds no run ({folder.config.name} is missing); name the output_dir of a run"
        )
    text = folder.config.read_text(encoding="utf-8")
    try:
        # Not load_config: the run of an older version may have keys that are gone.
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{folder.config}: not valid TOML: {error}") from None
    metrics, evaluations, samples = (
        jsonl.read_lines(file) if file.is_file() else []
        for file in (folder.metrics, folder.evaluations, folder.samples)
    )
    return Run(
        name=folder.path.resolve().name,
        config=_flat(config),
        config_text=text,
        steps=_by_step(metrics),
        evaluations=_by_step(evaluations),
        samples=samples,
        summary=jsonl.read_json(folder.summary) if folder.summary.is_file() else {},
    )


def number(value: object) -> float | None:
    """A finite number, else None: missing, null, text, true and false are no values to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, with old and new value, that forbid continuing a run of `old` with `new`.

    Free to change are `output_dir` (a moved folder), `optim.steps` (train longer; a decaying
    schedule then decays towards the new end), `log.*`, `checkpoint.*`, and keys that cost memory
    or time but leave the numbers alone up to rounding, such as `optim.tokens_per_microbatch`.
    With `rollout.steps_ahead` the step after a checkpoint is on-policy, so `checkpoint.every`
    stays.
    """
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    return {
        key: (before[key], after[key])
        for key in all_keys()
        if before[key] != after[key] and not _is_free(key, new)
    }


def _is_free(key: str, config: Config) -> bool:
    if key == "checkpoint.every" and config.rollout.steps_ahead:
        return False
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


def _by_step(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ordered by step, the last record of a step wins; what has no step cannot be drawn."""
    found = {record["step"]: record for record in records if number(record.get("step")) is not None}
    return [found[step] for step in sorted(found)]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value
    return values
