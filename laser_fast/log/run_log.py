"""Everything that a run tells: console, metrics.jsonl, samples.jsonl, dashboards, summary.

`laser_fast.log.metrics` lists the keys of a step; `time/<stage>` is beside them. Dashboards know
the numbers of an evaluation as `eval/<name>`. Step s, and evaluation s, comes after s updates.
"""

import importlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError, dump_config
from laser_fast.config_sft import SftConfig
from laser_fast.log import jsonl, samples
from laser_fast.log.console import StepConsole, evaluation_line, print_summary, summarize_run
from laser_fast.log.run_folder import RunFolder
from laser_fast.log.samples import SampleRecord

Send = Callable[[int, Mapping[str, float]], None]  # to a dashboard: a step and its numbers


class Log(ExitStack):
    """The log of all ranks but 0: it takes everything and writes nothing. Use it in a `with`."""

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a finished step; None, nan and infinity become null."""

    def log_samples(self, records: Iterable[SampleRecord]) -> None:
        """Write these completions of a step."""

    def log_evaluation(self, step: int, report: Mapping[str, Any]) -> None:
        """Log an evaluation after `step` updates, a flat report as of `evaluation.statistics`."""

    def finish(self, steps: int, *, wall_seconds: float) -> None:
        """Write and print the result after the last step."""


class RunLog(Log):
    """The log of rank 0; every line is on disk when its call returns."""

    def __init__(
        self, output_dir: str | Path, config: Config | SftConfig, *, resume_step: int | None = None
    ):
        """Write config.toml and open the files in a folder that `open_run_folder` has checked.

        A resumed run goes on at `resume_step`; what the interrupted one logged from there on is
        dropped. A ConfigError says that another run has taken the folder in the meantime.
        """
        super().__init__()
        self.folder = RunFolder(Path(output_dir))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        last_step = -1
        if resume_step is None:
            # Of two runs that start at once in one folder, one fails here.
            try:
                with self.folder.config.open("x", encoding="utf-8") as file:
                    file.write(dump_config(config))
            except FileExistsError:
                raise ConfigError(
                    f"output_dir {self.folder.path} is in use by another run; choose another one"
                ) from None
        else:
            jsonl.replace_text(self.folder.config, dump_config(config))
            last_step = self._rewind(resume_step)
        self._metrics, self._samples = (
            self.enter_context(path.open("a", encoding="utf-8", buffering=1))
            for path in (self.folder.metrics, self.folder.samples)
        )
        self._senders = [self._open_tensorboard(resume_step)] if config.log.tensorboard else []
        for package in ("wandb", "trackio"):
            if getattr(config.log, package):
                self._senders.append(self._open_hosted(package, config, last_step))
        self._console = StepConsole(config.optim.steps, first_step=resume_step or 0)
        self.callback(self._console.close)

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:  # noqa: D102
        metrics = jsonl.plain_value(metrics)
        self._metrics.write(jsonl.to_line({"step": step, **metrics}))
        self._send(step, metrics)
        self._console.show_step(step, metrics)

    def log_samples(self, records: Iterable[SampleRecord]) -> None:  # noqa: D102
        self._samples.writelines(map(samples.to_line, records))

    def log_evaluation(self, step: int, report: Mapping[str, Any]) -> None:  # noqa: D102
        report = jsonl.plain_value(report)
        # That of the step at which a run resumes may come again.
        jsonl.keep_lines(self.folder.evaluations, lambda line: line["step"] != step)
        with self.folder.evaluations.open("a", encoding="utf-8") as file:
            file.write(jsonl.to_line({"step": step, **report}))
        self._send(step, {f"eval/{key}": value for key, value in report.items()})
        self._console.show(evaluation_line(step, report))

    def finish(self, steps: int, *, wall_seconds: float) -> None:  # noqa: D102
        reports = self.folder.reports()
        before, after = reports.get(0, {}), reports.get(steps, {})
        summary = summarize_run(before, after, steps=steps, wall_seconds=wall_seconds)
        jsonl.replace_text(self.folder.summary, jsonl.to_text(summary))
        self.close()
        print_summary(before, after, steps=steps, seconds=wall_seconds)

    def _rewind(self, resume_step: int) -> int:
        """Drop what comes again; returns the last step that was logged, -1 if none."""
        files = self.folder
        logged = jsonl.read_lines(files.metrics) if files.metrics.exists() else []
        for path in (files.metrics, files.samples):
            jsonl.keep_lines(path, lambda line: line["step"] < resume_step)
        jsonl.keep_lines(files.evaluations, lambda line: line["step"] <= resume_step)
        return max((line["step"] for line in logged), default=-1)

    def _open_tensorboard(self, resume_step: int | None) -> Send:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what the interrupted run wrote at or after the step that comes again.
        writer = SummaryWriter(str(self.folder.tensorboard), purge_step=resume_step)
        self.callback(writer.close)

        def send(step: int, metrics: Mapping[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return send

    def _open_hosted(self, package: str, config: Config | SftConfig, last_step: int) -> Send:
        """A run of Weights & Biases or of Trackio, which has the same interface."""
        # The id is kept in the run folder so that a resumed run finds it.
        folder = self.folder.path
        path, name = folder / f"{package}_id", folder.name
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        identity = {"name": name, "id": path.read_text(), "dir": str(folder)}
        if package == "trackio":  # it knows a run only by its name
            identity = {"name": f"{name}-{path.read_text()}"}
        init, project = importlib.import_module(package).init, getattr(config.log, package)
        values = config.model_dump(mode="json")
        run = init(project=project, resume="allow", config=values, **identity)
        self.callback(run.finish)

        def send(step: int, metrics: Mapping[str, float]) -> None:
            # Neither takes steps back, and a resumed run, whose curves go on, repeats them exactly.
            if step > last_step:
                run.log(dict(metrics), step=step)

        return send

    def _send(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers, without the undefined ones, to the dashboards."""
        numbers = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float)
        }
        for send in self._senders:
            send(step, numbers)
