"""Hugging Face models of a run that goes on, OUTPUT_DIR/exports/step-000050, and their upload."""

import logging
import shutil
import time
from functools import partial
from pathlib import Path
from threading import Thread

from laser_fast.log.console import evaluation_line
from laser_fast.log.run_folder import RunFolder, steps_in
from laser_fast.model.distributed import World
from laser_fast.stopping import is_asked
from laser_fast.training.export import write_model
from laser_fast.training.hub import upload
from laser_fast.training.schedule import is_due
from laser_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Exports:
    """What `checkpoint.export_every` and `checkpoint.hub_repo` ask for."""

    def __init__(self) -> None:
        self._uploads = dict[Path, Thread]()  # that go on

    def write(self, trainer: Trainer, step: int, *, is_last: bool) -> None:
        """Write the model after `step` steps if it is due and not there, and sweep. Collective.

        Its upload begins in the background; while another goes on it is left out with a warning,
        but the last one comes after it.
        """
        config, world = trainer.config, trainer.world
        every, repo = config.checkpoint.export_every, config.checkpoint.hub_repo
        folder = RunFolder(Path(config.output_dir))
        out = folder.exports / f"step-{step:06d}"
        is_asked = is_due(step, every) or (is_last and (every > 0 or repo != ""))
        if not is_asked or world.on_main(out.exists):
            return
        score = config.score.model_copy(update={"ref_logprob": trainer.score.ref_logprob})
        write_model(trainer.policy, config.model, out, world, score=score)
        if not world.is_main:
            return
        logger.info("exported %s", out)
        self._uploads = {path: each for path, each in self._uploads.items() if each.is_alive()}
        before = list(self._uploads.values())
        if repo and before and not is_last:
            logger.warning("%s is not uploaded, since the upload before it goes on", out)
        elif repo:
            report = folder.reports().get(step)
            message = evaluation_line(step, report) if report else f"after {step} steps"
            upload_it = partial(upload, out, repo, message, after=before)
            self._uploads[out] = Thread(target=upload_it, daemon=True)
            self._uploads[out].start()
        for old in list(steps_in(out.parent).values())[: -config.checkpoint.keep]:
            if old not in self._uploads:
                shutil.rmtree(old)

    def finish(self, world: World) -> None:
        """Wait for the uploads, unless asked to stop. Collective, in short ones: none times out."""
        while world.max(sum(map(Thread.is_alive, self._uploads.values())) * (not is_asked())):
            time.sleep(0.2)
