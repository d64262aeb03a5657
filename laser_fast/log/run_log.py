"""Everything that a run tells: console, metrics.jsonl, samples.jsonl, dashboards, summary.

Metric keys are `<stage>/<name>` with the stages of a step: reward, score, advantage, loss,
rollout, step; beside them time/<stage>, memory/peak_gb and throughput/tokens_per_s. `eval/<name>`
goes to the dashboards and, without the prefix, to evaluations.jsonl.

Steps count from 0: step s is the one after s updates, and so is evaluation s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laser_fast.algorithm.score import self_reward_score
from laser_fast.config import Config, ConfigError, dump_config
from laser_fast.log import jsonl
from laser_fast.log.console import StepConsole, print_summary, summarize_run
from laser_fast.log.dashboards import open_dashboards
from laser_fast.log.run_folder import RunFolder, read_run
from laser_fast.records import Group
from laser_fast.report.charts import draw_curves
from laser_fast.report.page import write_report


class RunLog:
    """The log of one run, for rank 0 only; every line is on disk when its call returns.

    Use it in a `with` statement: whatever ends the run, the files are closed and the curves drawn.
    """

    def __init__(self, output_dir: str | Path, config: Config, *, resume_step: int | None = None):
        """Write config.toml and open the files.

        Args:
            output_dir: the run folder, checked before by `open_run_folder`.
            config: the resolved configuration.
            resume_step: the step that comes next in a resumed run. What the interrupted run
                logged at or after it is dropped, so that nothing is counted twice.

        Raises:
            ConfigError: a new run in a folder that another run has taken in the meantime.
        """
        self.folder = RunFolder(Path(output_dir))
        self._config = config
        self.folder.path.mkdir(parents=True, exist_ok=True)
        last_step = -1
        if resume_step is None:
            self._claim()
        else:
            jsonl.replace_text(self.folder.config, dump_config(config))
            last_step = self._rewind(resume_step)
        self._metrics = self.folder.metrics.open("a", encoding="utf-8", buffering=1)
        self._samples = self.folder.samples.open("a", encoding="utf-8", buffering=1)
        self._dashboards = open_dashboards(
            config, self.folder, resume_step=resume_step, last_step=last_step
        )
        self._console = StepConsole(config.optim.steps, first_step=resume_step or 0)

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a finished step; None, nan and infinity become null."""
        metrics = jsonl.plain_value(metrics)
        self._metrics.write(jsonl.to_line({"step": step, **metrics}))
        self._send(step, metrics)
        self._console.show_step(step, metrics)

    def log_samples(
        self,
        step: int,
        groups: Sequence[Group],
        rewards: Sequence[float | None],
        *,
        decode: Callable[[Sequence[int]], str],
        ref_logprob: float,
    ) -> None:
        """Write `log.samples_per_step` completions, evenly spread over the groups.

        `rewards` holds one entry per completion, flattened over `groups`. A completion without
        score log-prob has score null.
        """
        members = [(group.prompt, member) for group in groups for member in group.completions]
        for index in spread_indices(len(members), self._config.log.samples_per_step):
            prompt, completion = members[index]
            score = None
            if completion.score_logprob is not None:
                score = self_reward_score(
                    completion.score_logprob,
                    beta=self._config.score.beta,
                    ref_logprob=ref_logprob,
                )
            record = {
                "step": step,
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "completion": decode(completion.completion_ids),
                "reward": rewards[index],
                "score": score,
                "finish_reason": completion.finish_reason,
            }
            self._samples.write(jsonl.to_line(record))

    def log_evaluation(self, step: int, report: Mapping[str, Any]) -> None:
        """Log an evaluation after `step` updates; `report` is `evaluation.report.summarize`'s."""
        report = jsonl.plain_value(report)
        with self.folder.evaluations.open("a", encoding="utf-8") as file:
            file.write(jsonl.to_line({"step": step, **report}))
        self._send(step, {f"eval/{key}": value for key, value in report.items()})
        shown = "  ".join(
            f"{label} {report[key]:.3f}"
            for label, key in (("accuracy", "accuracy"), ("F1", "f1"), ("AUROC", "auroc"))
            if report.get(key) is not None
        )
        self._console.show(f"evaluation after {step} steps: {shown}")

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Reports by the number of updates before them, those of an interrupted run included."""
        if not self.folder.evaluations.exists():
            return {}
        return {line.pop("step"): line for line in jsonl.read_lines(self.folder.evaluations)}

    def finish(self, *, wall_seconds: float) -> dict[str, Any]:
        """Write summary.json, curves.png and report.html, print the result; returns the summary."""
        steps = self._config.optim.steps
        reports = self.evaluations()
        before, after = reports.get(0), reports.get(steps)
        summary = summarize_run(before, after, steps=steps, wall_seconds=wall_seconds)
        jsonl.replace_text(self.folder.summary, jsonl.to_text(summary))
        self.close()
        report = write_report(self.folder.path)
        print_summary(before, after, summary, curves=self.folder.curves, report=report)
        return summary

    def close(self) -> None:
        """Close files and dashboards and draw the curves so far; a second call does nothing."""
        if self._metrics.closed:
            return
        self._console.close()
        self._metrics.close()
        self._samples.close()
        for dashboard in self._dashboards:
            dashboard.close()
        run = read_run(self.folder.path)
        if run.steps:
            draw_curves(run, self.folder.curves)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> None:
        """Create config.toml; of two runs that start at once in one folder, one fails here."""
        try:
            with self.folder.config.open("x", encoding="utf-8") as file:
                file.write(dump_config(self._config))
        except FileExistsError:
            raise ConfigError(
                f"output_dir {self.folder.path} is in use by another run; choose another one"
            ) from None

    def _rewind(self, resume_step: int) -> int:
        """Drop what comes again; returns the last step that was logged, -1 if none."""
        last_step = -1
        if self.folder.metrics.exists():
            logged = [line["step"] for line in jsonl.read_lines(self.folder.metrics)]
            last_step = max(logged, default=-1)
        jsonl.keep_lines(self.folder.metrics, lambda line: line["step"] < resume_step)
        jsonl.keep_lines(self.folder.samples, lambda line: line["step"] < resume_step)
        jsonl.keep_lines(self.folder.evaluations, lambda line: line["step"] <= resume_step)
        return last_step

    def _send(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers, without the undefined ones, to the dashboards."""
        numbers = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float)
        }
        for dashboard in self._dashboards:
            dashboard.log(step, numbers)


class NullLog:
    """The log of the other ranks: takes everything, writes nothing."""

    def log_step(self, *_: object, **__: object) -> None:
        """Ignore the step."""

    log_samples = log_evaluation = close = __exit__ = log_step

    def finish(self, **_: object) -> dict[str, Any]:
        """Return an empty summary."""
        return {}

    def __enter__(self) -> NullLog:
        return self


def spread_indices(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spread from 0."""
    count = min(total, count)
    return [index * total // count for index in range(count)]
