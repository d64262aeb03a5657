"""TensorBoard, Weights & Biases and Trackio behind one small interface."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from typing import Any

from laser_fast.config import Config
from laser_fast.log.run_folder import RunFolder


def open_dashboards(
    config: Config, folder: RunFolder, *, resume_step: int | None, last_step: int
) -> list[TensorBoard | HostedRun]:
    """Those that the config asks for; a resumed run continues its old curves.

    Args:
        config: `log` names the projects; the whole of it is shown with the run.
        folder: names the run.
        resume_step: the step that comes next in a resumed run, None in a new one.
        last_step: the last step that the interrupted run sent, -1 in a new run.
    """
    dashboards: list[TensorBoard | HostedRun] = []
    if config.log.tensorboard:
        dashboards.append(TensorBoard(folder, resume_step=resume_step))
    for package, project in (("wandb", config.log.wandb), ("trackio", config.log.trackio)):
        if project:
            run = _start_run(package, project, config, folder)
            dashboards.append(HostedRun(run, last_step=last_step))
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


class HostedRun:
    """A run of Weights & Biases or of Trackio, which has the same interface.

    Neither takes steps back, and a resumed run repeats them exactly: those that it already has are
    not sent again.
    """

    def __init__(self, run: Any, *, last_step: int):
        self._run, self._last_step = run, last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step."""
        if step > self._last_step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _start_run(package: str, project: str, config: Config, folder: RunFolder) -> Any:
    """The run of a package; its id is kept in the run folder so that a resumed run finds it."""
    path = folder.path / f"{package}_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    run_id, name = path.read_text(), folder.path.name
    # Trackio knows a run by its name alone.
    identity: dict[str, Any] = {"name": f"{name}-{run_id}"}
    if package == "wandb":
        identity = {"name": name, "id": run_id, "dir": str(folder.path)}
    return importlib.import_module(package).init(
        project=project, resume="allow", config=config.model_dump(mode="json"), **identity
    )
