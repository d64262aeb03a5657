"""The folder of a run: what lies in it, whether it is free, and which config may continue it."""

import importlib.util
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from laser_fast.config import Config, ConfigError, all_keys
from laser_fast.config_sft import SftConfig
from laser_fast.log import jsonl

AnyConfig = TypeVar("AnyConfig", Config, SftConfig)

_FREE_SECTIONS = ("log.", "checkpoint.")
_FREE_KEYS = frozenset((
    "output_dir", "optim.steps", "optim.tokens_per_microbatch", "model.gradient_checkpointing",
    "model.cpu_offload", "model.compile", "model.replicas", "data.eval_every", "reward.workers",
    "rollout.max_num_seqs", "rollout.max_disagreement", "rollout.tensor_parallel",
    "rollout.gpu_memory_fraction", "rollout.server_url", "rollout.sync_buffer_mb",
    "optim.max_bad_steps", "rollout.timeout_s", "reward.max_failed", "reward.batch_timeout_s",
    "model.activation_offload", "model.reshard_after_forward",
))  # fmt: skip


def steps_in(folder: Path) -> dict[int, Path]:
    """What is whole of the `step-000050` in a folder, by its step, oldest first."""
    steps = {path.name.removeprefix("step-"): path for path in folder.glob("step-*")}
    return dict(sorted((int(step), path) for step, path in steps.items() if step.isdecimal()))


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
        self.exports = path / "exports"  # Hugging Face models of checkpoint.export_every
        self.bad_steps = path / "bad_steps"  # batches whose gradient was no finite number

    def contents(self) -> tuple[Path, ...]:
        """Everything that a run writes here."""
        return tuple(path for name, path in vars(self).items() if name != "path")

    def reports(self) -> dict[int, dict[str, Any]]:
        """Evaluations by the number of updates before them."""
        lines = jsonl.read_lines(self.evaluations) if self.evaluations.exists() else []
        return {line.pop("step"): line for line in lines}


def open_run_folder(config: AnyConfig, *, resume: bool) -> RunFolder:
    """Check, before any model is loaded, that the run can write where and what it wants to.

    Reads only, so every rank may call it; rank 0's `RunLog` writes config.toml later, when a
    barrier or any collective has let the other ranks pass this check.
    """
    folder = RunFolder(Path(config.output_dir))
    for name in ("wandb", "trackio"):
        if getattr(config.log, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'log.{name} needs the package {name}; pip install "laser-fast[{name}]" or set '
                f'log.{name} = ""'
            )
    if resume:
        check_resume(folder.config, config)
    elif folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"output_dir {folder.path} is a file; choose a folder")
    elif taken := [path.name for path in folder.contents() if path.exists()]:
        raise ConfigError(
            f"output_dir {folder.path} is in use: it holds {taken[0]}; continue that run with "
            "--resume or choose another output_dir"
        )
    return folder


def moved_config(config: AnyConfig, folder: Path, *, recorded: str = "") -> AnyConfig:
    """A configuration of a run that lies in `folder` now, and lay in `recorded` or its output_dir.

    Model and data below the old folder have moved with it; a hub id that looks so has not.
    """
    before, model, data = Path(recorded or config.output_dir), config.model, config.data

    def moved(text: str | dict[str, float]) -> Any:
        if isinstance(text, dict):
            return {moved(name): weight for name, weight in text.items()}
        if not text or not Path(text).is_relative_to(before):
            return text
        path = folder / Path(text).relative_to(before)
        return str(path) if path.exists() else text

    model = model.model_copy(update={"path": moved(model.path)})
    sources = {key: getattr(data, key) for key in ("train", "eval") if hasattr(data, key)}
    data = data.model_copy(update={key: moved(name) for key, name in sources.items()})
    return config.model_copy(update={"output_dir": str(folder), "model": model, "data": data})


def resumed_config(config: AnyConfig) -> AnyConfig:
    """What to resume with, where `config` may still name files of the folder before it moved."""
    folder = RunFolder(Path(config.output_dir))
    return moved_config(config, folder.path, recorded=type(config).load(folder.config).output_dir)


def config_differences(old: AnyConfig, new: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """The keys, with old and new value, that forbid continuing a run of `old` with `new`.

    A resumed run must repeat the undisturbed one, so only keys that leave its numbers alone may
    change: where it writes, `optim.steps` (a decaying schedule then decays towards the new end),
    and what costs memory or time. The summary compares before with after on the same data.
    """
    known = all_keys(type(new))
    free = _FREE_KEYS | {key for key in known if key.startswith(_FREE_SECTIONS)}
    if isinstance(new, Config) and new.rollout.steps_ahead:
        # The step after a checkpoint is on-policy.
        free -= {"checkpoint.every", "checkpoint.best"}
        free -= {"data.eval_every"} if new.checkpoint.best else set()
    keys = [key for key in known if key not in free]
    values = zip(keys, attrgetter(*keys)(old), attrgetter(*keys)(new), strict=True)
    return {key: (before, now) for key, before, now in values if before != now}


def check_resume(file: Path, config: AnyConfig) -> None:
    """Refuse to continue, in its output_dir, a run of another configuration than that of a file."""
    if not file.is_file():
        raise ConfigError(
            f"output_dir {config.output_dir} holds no run to resume ({file} is missing); "
            "leave --resume out to start one, or point output_dir to the run"
        )
    recorded = moved_config(type(config).load(file), Path(config.output_dir))
    if changed := config_differences(recorded, resumed_config(config)):
        listed = [f"{key} was {old!r} and is now {new!r}" for key, (old, new) in changed.items()]
        raise ConfigError(
            f"the run cannot be resumed with another configuration than that of {file}: "
            f"{', '.join(listed)}; restore the old values or start a new run in another output_dir"
        )
