"""TensorBoard, Weights & Biases and Trackio behind one small interface."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Protocol

from laser_fast.config import Config
from laser_fast.observe.run_folder import RunFolder


class Dashboard(Protocol):
    """Somewhere to send the numbers of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send finite numbers; steps do not decrease."""

    def close(self) -> None:
        """Flush and leave."""


def open_dashboards(
    config: Config, folder: RunFolder, *, resume_step: int | None, last_step: int
) -> list[Dashboard]:
    """Those that the config asks for; a resumed run continues its old curves.

    Args:
        config: `log` names the projects; the whole of it is shown with the run.
        folder: names the run.
        resume_step: the step that comes next in a resumed run, None in a new one.
        last_step: the last step that the interrupted run sent, -1 in a new run.
    """
    dashboards: list[Dashboard] = []
    if config.log.tensorboard:
        dashboards.append(TensorBoard(folder, resume_step=resume_step))
    if config.log.wandb:
        dashboards.append(Wandb(config, folder, last_step=last_step))
    if config.log.trackio:
        dashboards.append(Trackio(config, folder, last_step=last_step))
    return dashboards


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: RunFolder, *, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what the interrupted run wrote at or after the step that comes again.
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; it cannot take back steps, and a resumed run repeats them exactly.

    So the steps that it already has are not sent again.
    """

    def __init__(self, config: Config, folder: RunFolder, *, last_step: int):
        import wandb

        self._last_step = last_step

        self._run = wandb.init(
            project=config.log.wandb,
            name=folder.path.name,
            id=_run_id(folder, "wandb"),
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step."""
        if step > self._last_step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class Trackio:
    """A run of Trackio, named after the run folder; repeated steps are not sent again."""

    def __init__(self, config: Config, folder: RunFolder, *, last_step: int):
        import trackio

        self._last_step = last_step

        self._run = trackio.init(
            project=config.log.trackio,
            name=f"{folder.path.name}-{_run_id(folder, 'trackio')}",
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step."""
        if step > self._last_step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _run_id(folder: RunFolder, name: str) -> str:
    """The dashboard's id of this run, kept in the run folder so that a resumed run finds it."""
    path = folder.path / f"{name}_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
