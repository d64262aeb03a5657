"""The sandboxes as files: what their words stand for in a configuration or a command.

model.path = "sandbox" is OUTPUT_DIR/sandbox/seedN/model, and data.train and data.eval are
train.jsonl and eval.jsonl beside it, and so for every task. They follow from `config.seed` N; a
resumed run finds what the first one made.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from uuid import uuid4

from laser_fast.config import Config
from laser_fast.model.distributed import World
from laser_fast.sandbox.model import make_sandbox_model
from laser_fast.sandbox.task import TASKS, Split, rows


def resolve_sandbox(config: Config) -> Config:
    """The configuration with the files in place of the words; writes nothing."""

    def path(name: str | dict[str, float], file: str) -> Any:
        if isinstance(name, dict):
            return {path(task, file): weight for task, weight in name.items()}
        return str(_path(config, name, file)) if name in TASKS else name

    model, data = config.model, config.data
    model = model.model_copy(update={"path": path(model.path, "model")})
    paths = {split: path(getattr(data, split), f"{split}.jsonl") for split in get_args(Split)}
    data = data.model_copy(update=paths)
    return config.model_copy(update={"model": model, "data": data})


def _path(config: Config, task: str, file: str) -> Path:
    return Path(config.output_dir) / task / f"seed{config.seed}" / file


def write_sandbox(config: Config, world: World) -> Config:
    """Make the files that the configuration asks for, if they are missing, and resolve it.

    Collective: the ranks share the warm start of the model, and the first one writes.
    """
    resolved = resolve_sandbox(config)
    # The maximum is also a barrier: every rank has looked before the first one writes.
    is_missing = world.max(int(not Path(resolved.model.path).exists()))
    if is_missing and (task := config.model.path) in TASKS:
        make_sandbox_model(resolved.model.path, task=task, seed=config.seed, world=world)
    for split in get_args(Split):
        named = getattr(config.data, split)
        for task in {*TASKS} & {*([named] if isinstance(named, str) else named)}:
            if world.is_main:
                path = _path(config, task, f"{split}.jsonl")
                write_rows(path, split, seed=config.seed, task=task)
    world.barrier()
    return resolved


@contextmanager
def untrained_sandbox(config: Config) -> Iterator[Config]:
    """Resolve the configuration to files for a while, with weights that nothing has trained."""
    with TemporaryDirectory(prefix="sandbox-") as folder:
        resolved = resolve_sandbox(config.model_copy(update={"output_dir": folder}))
        if config.model.path in TASKS:
            make_sandbox_model(resolved.model.path, seed=0, steps=0)
        yield resolved


def cached_rows(split: Split, seed: int, task: str = "sandbox") -> Path:
    """The problems of a split as a file in the user's cache, made if missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "laser_fast" / task / f"{split}-seed{seed}.jsonl"
    write_rows(path, split, seed=seed, task=task)
    return path


def write_rows(path: Path, split: Split, *, seed: int, task: str) -> None:
    """Write the problems of a split as JSON lines, unless the file holds them already."""
    text = "".join(json.dumps(row) + "\n" for row in rows(split, seed=seed, task=task))
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
    unfinished.write_text(text)
    unfinished.replace(path)
