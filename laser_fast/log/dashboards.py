"""TensorBoard, Weights & Biases and Trackio behind one function per step."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from laser_fast.config import Config
from laser_fast.log.run_folder import RunFolder

Send = Callable[[int, Mapping[str, float]], None]


def open_dashboards(
    config: Config, folder: RunFolder, stack: ExitStack, *, resume_step: int | None, last_step: int
) -> list[Send]:
    """What sends a step to each that the config asks for; `stack` closes them.

    A resumed run, whose next step is `resume_step`, continues its curves, which end at `last_step`.
    """
    senders = [_tensorboard(folder, stack, resume_step)] if config.log.tensorboard else []
    for package in ("wandb", "trackio"):
        if getattr(config.log, package):
            senders.append(_hosted(package, config, folder, stack, last_step))
    return senders


def _tensorboard(folder: RunFolder, stack: ExitStack, resume_step: int | None) -> Send:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what the interrupted run wrote at or after the step that comes again.
    writer = SummaryWriter(str(folder.tensorboard), purge_step=resume_step)
    stack.callback(writer.close)

    def send(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


def _hosted(
    package: str, config: Config, folder: RunFolder, stack: ExitStack, last_step: int
) -> Send:
    """A run of Weights & Biases or of Trackio, which has the same interface."""
    # The id is kept in the run folder so that a resumed run finds it.
    path, name = folder.path / f"{package}_id", folder.path.name
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    identity = {"name": name, "id": path.read_text(), "dir": str(folder.path)}
    if package == "trackio":  # it knows a run only by its name
        identity = {"name": f"{name}-{path.read_text()}"}
    run = importlib.import_module(package).init(
        project=getattr(config.log, package),
        resume="allow",
        config=config.model_dump(mode="json"),
        **identity,
    )
    stack.callback(run.finish)

    def send(step: int, metrics: Mapping[str, float]) -> None:
        # Neither takes steps back, and a resumed run repeats them exactly.
        if step > last_step:
            run.log(dict(metrics), step=step)

    return send
