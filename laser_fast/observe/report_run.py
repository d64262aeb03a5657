"""What a report is made of: a run folder read as it is, finished or not, whatever is missing."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.observe import jsonl
from laser_fast.observe.run_folder import RunFolder

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRun:
    """One run as the report shows it; `config` is flat, by dotted key."""

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


def read_run(path: str | Path) -> ReportRun:
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
    return ReportRun(
        name=Path(path).resolve().name,
        config=_flat(config),
        config_text=text,
        steps=_by_step(_read(folder.metrics)),
        evaluations=_by_step(_read(folder.evaluations)),
        samples=_read(folder.samples),
        summary=_read_summary(folder.summary),
    )


def number(value: object) -> float | None:
    """A finite number, else None: missing, null, text, true and false are no values to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def curve(
    records: Sequence[Record], key: str, *, keep: Callable[[float], bool] = lambda value: True
) -> list[tuple[float, float]]:
    """(step, value) of the records that have this metric as a number that `keep` accepts."""
    found = [(record["step"], number(record.get(key))) for record in records]
    return [(step, value) for step, value in found if value is not None and keep(value)]


def _read(path: Path) -> list[dict[str, Any]]:
    return jsonl.read_lines(path) if path.is_file() else []


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return summary if isinstance(summary, dict) else {}


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
