"""Steps that were left out because a gradient was no finite number: dumped, counted, limited."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from laser_fast.config_errors import RunError
from laser_fast.log import jsonl
from laser_fast.records import TrainingSequence

logger = logging.getLogger(__name__)


class DivergedError(RunError):
    """Too many steps in a row had no finite gradient; the last checkpoint is intact."""


@dataclass
class BadSteps:
    """How many steps in a row were bad; `limit` of them are survived."""

    folder: Path
    limit: int
    rank: int
    count: int = 0

    def record(
        self, step: int, norms: Mapping[int, float], updates: Sequence[Sequence[TrainingSequence]]
    ) -> None:
        """Take the gradient norms of a step's updates, by number, equal on all ranks.

        The sequences of an update without a finite one are written to a file of this rank.
        """
        bad = [number for number, norm in norms.items() if not math.isfinite(norm)]
        self.count = self.count + 1 if bad else 0
        for number in bad:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step:06d}-update-{number}-rank-{self.rank}.jsonl"
            jsonl.write_lines(path, map(asdict, updates[number]))
        if not bad:
            return
        said = f"step {step}: the gradient norm is not finite; its batch is in {self.folder}"
        if self.count > self.limit:
            raise DivergedError(
                f"{said}; after {self.count} such steps in a row, more than optim.max_bad_steps = "
                f"{self.limit}, the run stops; start a new one with a lower optim.lr, from here if "
                "you export the last checkpoint"
            )
        if self.rank == 0:
            logger.warning("%s; the update was skipped", said)
