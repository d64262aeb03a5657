"""What runs and evaluations have written, read leniently: older versions wrote it too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_fast.config_errors import ConfigError, read_toml
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.settings import dotted_keys
from laser_fast.log import jsonl
from laser_fast.log.run_folder import RunFolder

Record = Mapping[str, Any]
MEAN = "mean over benchmarks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run has logged; `config` is flat, by dotted key."""

    name: str
    config: Record
    config_text: str
    steps: Sequence[Record] = ()  # one record each, as in evaluations
    evaluations: Sequence[Record] = ()
    samples: Sequence[Record] = ()
    summary: Record = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A folder of `laser-fast eval`; `run` is the place of the run that it lies below."""

    name: str
    run: int | None
    settings: Record
    score: Record | None
    benchmarks: Mapping[str, Record]  # reports, and the mean over them
    samples: Mapping[str, Sequence[Record]]


def read_run(path: str | Path) -> Run:
    """Read a run folder; a run that is still going, or was killed, lacks files and that is fine."""
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise ConfigError(
            f"{path} holds no run ({folder.config.name} is missing); name the output_dir of a run"
        )
    return Run(
        name=folder.path.resolve().name,
        # Not load_config: the run of an older version may have keys that are gone.
        config=dotted_keys(read_toml(folder.config)),
        config_text=folder.config.read_text(encoding="utf-8"),
        steps=_by_step(folder.metrics),
        evaluations=_by_step(folder.evaluations),
        samples=jsonl.read_lines(folder.samples) if folder.samples.is_file() else [],
        summary=jsonl.read_json(folder.summary) if folder.summary.is_file() else {},
    )


def read_evaluations(runs: Sequence[Path], named: Sequence[Path]) -> list[Evaluation]:
    """The evaluations, with settings.json and report.json, below runs, and those that are named."""
    places: list[tuple[Path, str, int | None]] = [
        (path.parent, str(path.parent.relative_to(folder)), index)
        for index, folder in enumerate(runs)
        for path in sorted(folder.rglob("report.json"))
        if (path.parent / "settings.json").is_file()
    ]
    places += [(path, str(path), None) for path in named]
    return [_read(*place) for place in places]


def _read(folder: Path, name: str, run: int | None) -> Evaluation:
    """One folder of `laser-fast eval`; a ConfigError says what is missing or broken."""
    files = EvalFolder(folder)
    for file in (files.settings, files.report):
        if not file.is_file():
            raise ConfigError(
                f"{folder} holds no finished evaluation ({file.name} is missing); name the folder "
                "that laser-fast eval wrote"
            )
    report, settings = files.read_report(), files.read_settings()
    if not isinstance(report.get("benchmarks"), dict):
        raise ConfigError(f"{files.report}: expected the key benchmarks")
    benchmarks, keys = report["benchmarks"], ("score", "reward", "finish_reason")
    samples = {
        benchmark: [{key: line.get(key) for key in keys} for line in jsonl.read_lines(path)]
        for benchmark in benchmarks
        if (path := files.samples(benchmark)).is_file()
    }
    if "average" in report:
        benchmarks = {**benchmarks, MEAN: report["average"]}
    return Evaluation(name, run, settings, report.get("score"), benchmarks, samples)


def number(value: object) -> float | None:
    """A finite number, else None: missing, null, text, true and false are no values to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _by_step(path: Path) -> list[Record]:
    """Ordered by step, the last record of a step wins; what has no step cannot be drawn."""
    lines = jsonl.read_lines(path) if path.is_file() else []
    found = {line["step"]: line for line in lines if number(line.get("step")) is not None}
    return [found[step] for step in sorted(found)]
