"""The command line: one verb per thing that a user does.

    torchrun --nproc-per-node 8 -m laser_fast train CONFIG [section.key=value ...]
    laser-fast export RUN OUT

A mistake of the user ends in one sentence and exit code 2.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from laser_fast.config import ConfigError, dump_config, load_config
from laser_fast.rewards import RewardError

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
    from laser_fast.training.run import train as run_training

    run_training(resolved, resume=resume)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="New folder for the Hugging Face model.")],
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face model."""
    from laser_fast.training.export import export as export_model

    checkpoint = export_model(run, out)
    typer.echo(f"{checkpoint} -> {out}")


def main() -> None:
    """Run the command line; a user's error is one sentence on rank 0 and exit code 2 on all."""
    is_main = int(os.environ.get("RANK", 0)) == 0
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
