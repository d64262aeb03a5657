"""The command line: one verb per thing that a user does, in the order of the work.

A mistake of the user ends in one sentence and exit code 2.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from laser_fast.config import Config, ConfigError, MeasureConfig, dump_config, load_config
from laser_fast.config_errors import REPORTED, RunError
from laser_fast.rewards import RewardError

if TYPE_CHECKING:
    from laser_fast.evaluation.benchmarks import Benchmark
    from laser_fast.evaluation.statistics import ReportOptions

PREEMPTED = 75  # sysexits' EX_TEMPFAIL: not through, try again
_AUTO = "--resume-auto"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LaSeR: train a language model to reason and to grade its own answers.",
)


ModelName = Annotated[str, Argument(help="Hugging Face id or folder.")]
RunFile = Annotated[Path, Argument(help="TOML file of the run; or a packaged one: quickstart.")]
RunDir = Annotated[Path, Argument(help="Folder of a run.")]
Overrides = Annotated[list[str] | None, Argument(help="section.key=value, over those of the file.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in output_dir.")]
_AUTO_HELP = "Or --resume=auto: continue the run if there is one, or start it."
ResumeAuto = Annotated[bool, Option(_AUTO, help=_AUTO_HELP)]
PrintConfig = Annotated[bool, Option("--print-config", help="Only show it resolved.")]
Evaluations = Annotated[list[Path] | None, Option("--eval", help="Evaluation not below a run.")]
ConfigFile = Annotated[Path | None, Option("--config", help="TOML, such as a run's config.toml.")]
Token = Annotated[str | None, Option(help="The score token.")]
Beta = Annotated[float | None, Option(min=1e-6, help="Scale of the score.")]
RefLogprob = Annotated[str | None, Option(help="c_ref; auto: of this model's own completions.")]
EngineName = Annotated[str | None, Option("--engine", help="Sampler: hf (default) or vllm.")]
Seed = Annotated[int | None, Option(min=0, help="Names every draw.")]
DataDir = Annotated[Path | None, Option(help="Folder of NAME.jsonl files, instead of the hub.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]
Ks = Annotated[list[int] | None, Option(min=1, help="k of the report; default 1, 2, 4, ...")]
BaseRate = Annotated[float | None, Option(min=0, max=1, help="Share correct, for the class prior.")]
_NAMES = """math500, amc23, aime24, aime25, olympiadbench, gsm8k, sandbox, sandbox-hard, a data file
or a hub id; may be repeated. Rows are named by their place, an id of theirs is not read."""
Benchmarks = Annotated[list[str] | None, Option("--benchmark", "-b", help=_NAMES)]


@app.command()
def init(
    model: Annotated[str, Option(help="Hugging Face id or folder.")],
    data: Annotated[str, Option(help="Prompts: a hub id, or a jsonl, json, parquet or csv file.")],
    overrides: Overrides = None,
    held_out: Annotated[
        str | None, Option("--eval", help="Held-out ones; default: a test split or file; '': none.")
    ] = None,
    gpus: Annotated[int | None, Option(min=1, help="Number of GPUs; default: those here.")] = None,
    memory: Annotated[float | None, Option(min=0, help="Memory of one in GB; likewise.")] = None,
    lora: Annotated[bool, Option("--lora", help="Train adapters even if weights fit.")] = False,
    output: Annotated[Path, Option(help="New file.")] = Path("laser.toml"),
    measure: Annotated[bool, Option(help="Measure token, beta and c_ref.")] = True,
) -> None:
    """Write a commented configuration that fits, with all that can be found out; how to run it."""
    from laser_fast.init import LORA_RANK, find_devices, write_config

    rank = LORA_RANK if lora else None
    typed = _as_overrides(overrides, data__eval=held_out, model__lora_rank=rank)
    devices = find_devices(gpus, memory)
    for line in write_config(model, data, output, devices, measures=measure, typed=typed):
        typer.echo(line)


@app.command()
def train(
    config: RunFile,
    overrides: Overrides = None,
    resume: Resume = False,
    resume_auto: ResumeAuto = False,
    print_config: PrintConfig = False,
) -> None:
    """Train as configured; start it under torchrun to use several devices.

    Exit code 75 says that SIGTERM stopped it: with --resume=auto the same command goes on.
    """
    resolved = load_config(config, overrides or [])
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
        return
    if not train_run(resolved, resume="auto" if resume_auto else resume):
        raise typer.Exit(PREEMPTED)


def train_run(config: Config, *, resume: bool | Literal["auto"] = False) -> bool:
    """Make the files of a sandbox that the configuration asks for, train, and draw the run.

    Returns whether it is through, see `laser_fast.training.run.train`.
    """
    from laser_fast.model.distributed import open_world
    from laser_fast.sandbox.files import resolve_sandbox, write_sandbox
    from laser_fast.training.run import check_start
    from laser_fast.training.run import train as run_training

    with open_world(config.rollout.timeout_s) as world:
        resolved = resolve_sandbox(config)
        resumes = check_start(resolved, world, resume=resume)
        write_sandbox(config, world)
        return run_training(resolved, world=world, resume=resumes, on_end=_draw_run)


@app.command()
def sft(
    config: Annotated[Path, Argument(help="TOML file of the phase.")],
    overrides: Overrides = None,
    resume: Resume = False,
    resume_auto: ResumeAuto = False,
    print_config: PrintConfig = False,
) -> None:
    """Train on given responses, before `train`; start it under torchrun to use several devices.

    Exit code 75 says that SIGTERM stopped it: with --resume=auto the same command goes on.
    """
    from laser_fast.config_sft import SftConfig
    from laser_fast.model.distributed import open_world
    from laser_fast.training.sft import sft as run_sft

    resolved = SftConfig.load(config, overrides or [])
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
        return
    with open_world() as world:
        is_through = run_sft(
            resolved, world=world, resume="auto" if resume_auto else resume, on_end=_draw_run
        )
    if not is_through:
        raise typer.Exit(PREEMPTED)


def _draw_run(folder: Path) -> None:
    from laser_fast.report.page import draw_run  # which loads matplotlib

    draw_run(folder)


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, Argument(help="New folder for the Hugging Face model.")],
    adapter: Annotated[bool, Option("--adapter", help="Write the adapters alone.")] = False,
    checkpoint: Annotated[
        str, Option(help="latest, best (by checkpoint.best), a step.")
    ] = "latest",
    push: Annotated[str, Option(help="Upload it to this hub repository, too.")] = "",
) -> None:
    """Write a checkpoint of a run as a Hugging Face model, adapters merged."""
    from laser_fast.training.export import export as export_model

    path = export_model(run, out, adapter=adapter, checkpoint=checkpoint, push=push)
    typer.echo(f"{path} -> {out}")


@app.command()
def report(
    run: RunDir,
    other: Annotated[Path | None, Argument(help="Folder of a run to compare it with.")] = None,
    evaluations: Evaluations = None,
) -> None:
    """Write RUN/report.html: curves, evaluations, samples and configuration in one file."""
    from laser_fast.report.page import write_report

    typer.echo(write_report(run, other, evaluations or ()))


@app.command()
def plan(
    config: RunFile,
    gpus: Annotated[int, Option(min=1, help="Number of GPUs.")],
    memory: Annotated[float, Option(min=0, help="Memory of one GPU in GB (1e9 bytes).")],
    overrides: Overrides = None,
) -> None:
    """Show the memory that a run needs per GPU; exit code 1 if it does not fit."""
    from laser_fast.plan import plan_run, print_plan
    from laser_fast.sandbox.files import untrained_sandbox

    with untrained_sandbox(load_config(config, overrides or [])) as resolved:
        planned = plan_run(resolved, num_gpus=gpus, memory_gb=memory)
    print_plan(planned)
    if planned.misfits():
        raise typer.Exit(1)


@app.command()
def calibrate(
    model: Annotated[str, Argument(help="Hugging Face id or folder, not yet trained.")],
    data: Annotated[str, Option(help="Prompts: a benchmark, a data file or a hub id.")],
    overrides: Overrides = None,
    token: Annotated[str | None, Option(help="z_c; without it all reserved compete.")] = None,
    beta: Beta = None,
    limit: Annotated[int, Option(min=0, help="Only so many prompts, drawn; 0: all.")] = 64,
    samples: Annotated[int, Option(min=1, help="Completions per prompt.")] = 4,
    template: Annotated[list[str] | None, Option(help="chat, or a text with {prompt}.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    engine: EngineName = None,
    seed: Seed = None,
) -> None:
    """Measure c_ref on a model's own completions; print the lines for the configuration."""
    from laser_fast.evaluation.calibrate import calibrate as run_calibration
    from laser_fast.evaluation.terminal import print_calibration

    layers = {"config": config, "is_calibration": True}
    options = _as_overrides(overrides, rollout__engine=engine, seed=seed)
    [(benchmark, measured)] = _measured([data], data_dir, model, overrides=options, **layers)
    sizes = {"prompts": limit, "samples": samples}
    found = run_calibration(measured, benchmark, token=token, templates=template or (), **sizes)
    if found is not None:
        print_calibration(found, beta=beta)


@app.command(name="eval")
def evaluate(
    model: ModelName,
    overrides: Overrides = None,
    benchmark: Benchmarks = None,
    out: Annotated[Path | None, Option(help="New folder; evaluations/MODEL by default.")] = None,
    data_dir: DataDir = None,
    samples: Annotated[int | None, Option(min=1, help="Per problem; default: the paper's.")] = None,
    limit: Annotated[int, Option(min=0, help="Only the first problems; 0: all.")] = 0,
    k: Ks = None,
    base_rate: BaseRate = None,
    token: Token = None,
    beta: Beta = None,
    ref_logprob: RefLogprob = None,
    score: Annotated[bool, Option(help="Read self-scores.")] = True,
    config: ConfigFile = None,
    engine: EngineName = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure accuracy, voting and self-verification; a killed evaluation continues."""
    from laser_fast.evaluation.evaluate import run_evaluation
    from laser_fast.evaluation.terminal import progress_bar
    from laser_fast.report.page import show_evaluation

    scores = {"score__token": token, "score__beta": beta, "score__ref_logprob": ref_logprob}
    options = _as_overrides(overrides, **scores, rollout__engine=engine, seed=seed)
    with progress_bar(is_shown=_is_main()) as on_progress:
        folder = run_evaluation(
            _measured(benchmark or (), data_dir, model, config=config, overrides=options),
            out or Path("evaluations") / Path(model).name,
            _report_options(k, base_rate),
            samples=samples,
            limit=limit,
            needs_score=score,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if folder is not None:
        show_evaluation(folder)


@app.command()
def rescore(
    source: Annotated[Path, Argument(help="Folder of an evaluation, or a samples.jsonl.")],
    out: Annotated[Path, Argument(help="New folder.")],
    k: Ks = None,
    base_rate: BaseRate = None,
    beta: Beta = None,
    ref_logprob: RefLogprob = None,
    reward: Annotated[str | None, Option(help="Grade again with this reward kind.")] = None,
    store: Annotated[Path | None, Option(help="Model folder that gets the threshold.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute an evaluation again from its samples, without a model."""
    from laser_fast.evaluation.rescore import rescore_evaluation
    from laser_fast.report.page import show_evaluation

    report = _report_options(k, base_rate)
    scores: dict[str, Any] = {"beta": beta, "ref_logprob": ref_logprob, "reward": reward}
    folder = rescore_evaluation(source, out, report, **scores, store=store, overwrite=overwrite)
    show_evaluation(folder)


@app.command()
def score(
    model: ModelName,
    source: Annotated[Path, Argument(help="JSON lines: prompt[_ids]; response or completion_ids.")],
    out: Annotated[Path, Argument(help="The same lines with score_logprob, score, reason.")],
    overrides: Overrides = None,
    token: Token = None,
    beta: Beta = None,
    ref_logprob: RefLogprob = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the self-scores of given (prompt, response) pairs."""
    from laser_fast.evaluation.score_pairs import score_pairs
    from laser_fast.evaluation.settings import NOT_SCORED, build_config
    from laser_fast.evaluation.terminal import print_totals, progress_bar

    scores = {"score__token": token, "score__beta": beta, "score__ref_logprob": ref_logprob}
    given = _as_overrides(overrides, **scores)
    measured = build_config(model, config=config, overrides=given, unread=NOT_SCORED)
    with progress_bar(is_shown=_is_main()) as on_progress:
        totals = score_pairs(measured, source, out, overwrite=overwrite, on_progress=on_progress)
    if totals is not None:
        print_totals(totals, out)


def _as_overrides(overrides: list[str] | None, **options: str | float | None) -> list[str]:
    """The options of a verb, score__beta for score.beta, as overrides; spelt-out ones win."""
    given = {key.replace("__", "."): value for key, value in options.items() if value is not None}
    return [*(f"{key}={value}" for key, value in given.items()), *(overrides or ())]


def _report_options(k: list[int] | None, base_rate: float | None) -> ReportOptions:
    from laser_fast.evaluation.statistics import ReportOptions

    return ReportOptions(ks=tuple(sorted(set(k or ()))) or None, base_rate=base_rate)


def _measured(
    names: Sequence[str], data_dir: Path | None, model: str, **layers: Any
) -> list[tuple[Benchmark, MeasureConfig]]:
    """The benchmarks that the names mean, each with its configuration."""
    from laser_fast.evaluation.benchmarks import find_benchmark
    from laser_fast.evaluation.settings import build_config
    from laser_fast.sandbox.files import cached_rows
    from laser_fast.sandbox.task import TASKS, Split

    split: Split = "train" if layers.get("is_calibration") else "eval"
    tasks = TASKS.keys() & names
    files = {t: cached_rows(split, build_config(model, **layers).seed, t) for t in tasks}
    found = [find_benchmark(name, data_dir=data_dir, files=files) for name in names]
    return [(benchmark, build_config(model, benchmark, **layers)) for benchmark in found]


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a user's error is one sentence on rank 0 and exit code 2 on all.

    A run that cannot go on, as without its sampler, says so and exits with 1.
    """
    is_main = _is_main()
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(message)s" if is_main else "%(levelname)s: %(message)s",
    )
    # A flag that also takes a word is no option that this library has.
    typed = {"--resume=auto": _AUTO} if sys.argv[1:2] in (["train"], ["sft"]) else {}
    arguments = [typed.get(argument, argument) for argument in sys.argv[1:]]
    try:
        sys.exit(app(arguments or ["--help"], standalone_mode=False) or 0)
    except Exception as error:
        is_reported = REPORTED in getattr(error, "__notes__", ())  # of several ranks
        if hasattr(error, "format_message"):  # the library's, of a wrong option or argument
            error = ConfigError(f"{error.format_message().rstrip('.')}; see --help")
        if isinstance(error, OSError) and error.filename:
            error = ConfigError(f"{str(error.filename)!r:.200}: {error.strerror}")
        if isinstance(error, ConfigError | RewardError):
            if is_main and not is_reported:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if not is_reported and not isinstance(error, RunError):
            raise
        if not is_reported:
            print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        sys.exit(1)
