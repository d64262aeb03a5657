"""The command line: one verb per thing that a user does.

    torchrun --nproc-per-node 8 -m laser_fast train CONFIG [section.key=value ...]
    laser-fast export RUN OUT
    laser-fast calibrate MODEL --data PROMPTS
    laser-fast eval MODEL --benchmark NAME
    laser-fast score MODEL IN.jsonl OUT.jsonl
    laser-fast report RUN [RUN2] [--eval FOLDER]
    laser-fast plan CONFIG --gpus N --memory GB

A mistake of the user ends in one sentence and exit code 2.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from laser_fast.config import Config, ConfigError, dump_config, load_config
from laser_fast.rewards import RewardError
from laser_fast.rollout.agreement import DisagreementError
from laser_fast.rollout.server_http import ServerError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LaSeR: train a language model to reason and to grade its own answers.",
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, applied over the file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in output_dir.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the resolved configuration and stop.")
    ] = False,
) -> None:
    """Train as configured; start it under torchrun to use several devices."""
    resolved = load_config(config, overrides or [])
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
        return
    train_run(resolved, resume=resume)


def train_run(config: Config, *, resume: bool = False) -> None:
    """Make the files of a sandbox that the configuration asks for, train, and draw the run."""
    from laser_fast.model.distributed import open_world
    from laser_fast.report.page import write_run_files
    from laser_fast.sandbox.files import write_sandbox
    from laser_fast.training.run import check_start
    from laser_fast.training.run import train as run_training

    with open_world() as world:
        check_start(config, world, resume=resume)
        config = write_sandbox(config, world)
        run_training(config, world=world, resume=resume, on_end=write_run_files)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="New folder for the Hugging Face model.")],
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face model."""
    from laser_fast.training.export import export as export_model

    checkpoint = export_model(run, out)
    typer.echo(f"{checkpoint} -> {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    other: Annotated[
        Path | None, typer.Argument(help="Folder of a run to compare it with.")
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            help="Folder of laser-fast eval, found by itself below a run; may be repeated.",
        ),
    ] = None,
) -> None:
    """Write RUN/report.html: curves, evaluations, samples and configuration in one file."""
    from laser_fast.report.page import write_report

    typer.echo(write_report(run, other, evaluations or ()))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")],
    memory: Annotated[float, typer.Option(min=0, help="Memory of one GPU in GB (1e9 bytes).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, applied over the file.")
    ] = None,
) -> None:
    """Show the memory that a run needs per GPU; exit code 1 if it does not fit."""
    from laser_fast.plan import plan_run, print_plan

    resolved = load_config(config, overrides or [])
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        if resolved.model.path == "sandbox":
            from laser_fast.sandbox.model import make_sandbox_model

            make_sandbox_model(folder, seed=0, steps=1)
            resolved = load_config(config, [*(overrides or []), f"model.path={folder}"])
        planned = plan_run(resolved, num_gpus=gpus, memory_gb=memory)
    print_plan(planned)
    if planned.misfits():
        raise typer.Exit(1)


Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value of the configuration.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Configuration, such as a run's config.toml.")
]
Token = Annotated[str | None, typer.Option(help="The score token.")]
Beta = Annotated[float | None, typer.Option(min=0, help="Scale of the score.")]
RefLogprob = Annotated[
    str | None, typer.Option(help="c_ref; auto: the mean over this model's own completions.")
]
EngineName = Annotated[str | None, typer.Option("--engine", help="Sampler: hf (default) or vllm.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Names every draw.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with NAME.jsonl files; without it, the hub.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder, not yet trained.")],
    data: Annotated[str, typer.Option(help="Prompts: a benchmark, a data file or a hub id.")],
    overrides: Overrides = None,
    token: Annotated[
        str | None, typer.Option(help="The score token; without it all reserved ones compete.")
    ] = None,
    beta: Beta = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, at most those of the data.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 4,
    template: Annotated[
        list[str] | None, typer.Option(help="chat, or a text with {prompt}; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    engine: EngineName = None,
    seed: Seed = None,
) -> None:
    """Measure c_ref on a model's own completions; print the lines for the configuration."""
    from laser_fast.evaluation.calibrate import calibrate as run_calibration
    from laser_fast.evaluation.terminal import print_calibration

    found = run_calibration(
        model,
        data,
        token=token,
        config=config,
        overrides=_as_overrides(overrides, engine=engine, seed=seed),
        data_dir=data_dir,
        prompts=prompts,
        samples=samples,
        templates=template or (),
    )
    if found is not None:
        print_calibration(found, beta=beta)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or folder; none with --rescore.")
    ] = None,
    overrides: Overrides = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            help="math500, amc23, aime24, aime25, olympiadbench, gsm8k, sandbox, a data file or a "
            "hub id; may be repeated. Rows are named by their place, an id of theirs is not read.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder; evaluations/MODEL by default.")
    ] = None,
    data_dir: DataDir = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions per problem; the paper's by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="The first so many problems; 0: all.")] = 0,
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="k of the report; 1, 2, 4, ... by default.")
    ] = None,
    base_rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share correct for the class-prior correction."),
    ] = None,
    token: Token = None,
    beta: Beta = None,
    ref_logprob: RefLogprob = None,
    score: Annotated[bool, typer.Option(help="Read self-scores.")] = True,
    config: ConfigFile = None,
    engine: EngineName = None,
    seed: Seed = None,
    rescore: Annotated[
        Path | None,
        typer.Option(help="Compute an evaluation's folder or samples.jsonl anew, without a model."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="Grade anew with this reward kind (--rescore).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure accuracy, voting and self-verification; a killed evaluation continues."""
    from laser_fast.evaluation.statistics import ReportOptions
    from laser_fast.evaluation.terminal import print_conclusion, progress_bar

    report = ReportOptions(ks=tuple(sorted(set(k))) if k else None, base_rate=base_rate)
    if rescore is not None:
        from laser_fast.evaluation.rescore import rescore_evaluation

        unread = {
            "a model": model is not None,
            "overrides": bool(overrides),
            "--benchmark": bool(benchmark),
            "--data-dir": data_dir is not None,
            "--samples": samples is not None,
            "--limit": limit > 0,
            "--token": token is not None,
            "--no-score": not score,
            "--config": config is not None,
            "--engine": engine is not None,
            "--seed": seed is not None,
        }
        if any(unread.values()):
            given = ", ".join(name for name, is_given in unread.items() if is_given)
            raise ConfigError(
                f"--rescore reads samples that exist and takes no model; drop {given}"
            )
        if out is None:
            raise ConfigError("--rescore needs --out, a new folder")
        conclusion = rescore_evaluation(
            rescore,
            out,
            beta=beta,
            ref_logprob=ref_logprob,
            reward=reward,
            overwrite=overwrite,
            report=report,
        )
        print_conclusion(conclusion)
        return
    if model is None or reward is not None:
        raise ConfigError("eval needs a model; --reward is for --rescore, else say reward.kind=...")
    from laser_fast.evaluation.evaluate import run_evaluation

    with progress_bar(is_shown=_is_main()) as on_progress:
        conclusion = run_evaluation(
            model,
            benchmark or (),
            out or Path("evaluations") / Path(model).name,
            config=config,
            overrides=_as_overrides(
                overrides,
                token=token,
                beta=beta,
                ref_logprob=ref_logprob,
                engine=engine,
                seed=seed,
            ),
            data_dir=data_dir,
            samples=samples,
            limit=limit,
            needs_score=score,
            overwrite=overwrite,
            report=report,
            on_progress=on_progress,
        )
    if conclusion is not None:
        print_conclusion(conclusion)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder.")],
    source: Annotated[
        Path,
        typer.Argument(help="JSON lines with prompt or prompt_ids, response or completion_ids."),
    ],
    out: Annotated[Path, typer.Argument(help="The same lines with score_logprob, score, reason.")],
    overrides: Overrides = None,
    token: Token = None,
    beta: Beta = None,
    ref_logprob: RefLogprob = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the self-scores of given (prompt, response) pairs."""
    from laser_fast.evaluation.score_pairs import score_pairs
    from laser_fast.evaluation.terminal import print_totals, progress_bar

    with progress_bar(is_shown=_is_main()) as on_progress:
        totals = score_pairs(
            model,
            source,
            out,
            config=config,
            overrides=_as_overrides(overrides, token=token, beta=beta, ref_logprob=ref_logprob),
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if totals is not None:
        print_totals(totals, out)


_KEYS = {
    "token": "score.token",
    "beta": "score.beta",
    "ref_logprob": "score.ref_logprob",
    "engine": "rollout.engine",
    "seed": "seed",
}


def _as_overrides(overrides: list[str] | None, **options: str | float | None) -> list[str]:
    """The options of a verb as overrides of the configuration; spelt-out ones win."""
    given = [f"{_KEYS[name]}={value}" for name, value in options.items() if value is not None]
    return [*given, *(overrides or ())]


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a user's error is one sentence on rank 0 and exit code 2 on all.

    A run that stops because its sampler failed or holds other weights says so and exits with 1.
    """
    is_main = _is_main()
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(message)s" if is_main else "%(levelname)s: %(message)s",
    )
    try:
        app()
    except (ConfigError, RewardError) as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (DisagreementError, ServerError) as error:  # in mid-run, maybe of this rank alone
        print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        sys.exit(1)
