"""The folder of an evaluation: what it holds, and when it may be continued or overwritten.

settings.json         what decides the samples; its presence marks the folder as taken
NAME/samples.jsonl    one line per completion, appended chunk by chunk
NAME/plots.png        drawn by the command line: accuracy against k, reliability, scores by class
report.json           all numbers; its presence marks the evaluation as finished
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.log.jsonl import read_json, replace_text, to_text
from laser_fast.log.samples import SampleRecord, read_samples, to_line, write_samples


class EvalFolder:
    """The names inside an evaluation's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.report = path / "report.json"

    def samples(self, benchmark: str) -> Path:
        """Completions of one benchmark."""
        return self.path / benchmark / "samples.jsonl"

    def read_settings(self) -> dict[str, Any]:
        """What decided the samples; empty where nothing says."""
        return read_json(self.settings) if self.settings.is_file() else {}

    def read_report(self) -> dict[str, Any]:
        """All numbers of a finished evaluation."""
        return read_json(self.report)

    def refuse_finished(self) -> None:
        """Raise a ConfigError if the folder holds a report."""
        if self.report.exists():
            raise ConfigError(
                f"{self.path} holds a finished evaluation; choose another folder, --overwrite it, "
                f"or compute it again from its samples with `laser-fast rescore {self.path} OUT`"
            )

    def prepare(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Take a new folder, or continue one that was begun with the same settings."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; name a folder for the evaluation")
        if overwrite:
            self._clear()
        self.refuse_finished()
        if self.settings.exists():
            _check_same(self.path, self.read_settings(), settings)
        elif self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} holds other files; choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.settings, to_text(settings))
        for name in settings["benchmarks"]:
            self.samples(name).parent.mkdir(exist_ok=True)

    def keep_chunks(self, benchmark: str, ids: Sequence[str], *, size: int, chunk: int) -> int:
        """Drop what a kill left of a chunk; the number of prompts that are done.

        A chunk, of `chunk` prompts, is repeated whole: completions depend on their neighbours in
        the batch, if only by rounding, and a continued evaluation gives the numbers of an
        undisturbed one. `ids` are all prompts in the order of sampling, each with `size` samples.
        """
        path = self.samples(benchmark)
        if not path.exists():
            return 0
        records = read_samples(path)
        found = [(record.prompt_id, record.sample) for record in records]
        expected = [(prompt_id, sample) for prompt_id in ids for sample in range(size)]
        if found != expected[: len(found)]:
            raise ConfigError(f"{path}: not the samples that settings.json asks for; --overwrite")
        done = len(found) // size
        if done < len(ids):
            done -= done % chunk
        # Always: a line that a kill tore is not among the records, and would meet the next one.
        write_samples(path, records[: done * size])
        return done

    def append(self, benchmark: str, records: Iterable[SampleRecord]) -> None:
        """Add one chunk and see it on the disk."""
        with open(self.samples(benchmark), "a", encoding="utf-8") as file:
            file.writelines(map(to_line, records))
            file.flush()
            os.fsync(file.fileno())

    def _clear(self) -> None:
        """Remove an earlier evaluation, and nothing else."""
        if not self.settings.is_file():
            return
        for name in self.read_settings().get("benchmarks", ()):
            folder = self.path / name
            for path in (self.samples(name), folder / "plots.png"):
                path.unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.report.unlink(missing_ok=True)
        self.settings.unlink()


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any], part: str = "") -> None:
    """Refuse to mix samples of two evaluations, whose settings, or a part of them, differ."""
    # Benchmarks last: a seed or a length, say, changes their entries too.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key == "benchmarks", key)):
        was, wanted = before.get(key), now.get(key)
        if key in ("score", "golds", "calibrated") or was == wanted:
            continue
        if isinstance(was, dict) and isinstance(wanted, dict):
            _check_same(path, was, wanted, f"{part}{key}.")
        raise ConfigError(
            f"{path} was begun with another {part}{key}: {json.dumps(was):.120} against "
            f"{json.dumps(wanted):.120}; choose another folder or --overwrite it"
        )
