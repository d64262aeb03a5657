"""The table of what came of every fault, as Markdown."""

import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence

import torch

from .drill import EVERY, Outcome

HEAD = ("fault", "place", "outcome", "steps repeated", "steps lost", "bytes lost", "seconds")
TEXT = """# What a run survives

{count} faults, {bad} of which did not end as they have to; lost: {steps} steps and {bytes} bytes.
`{command}`, {date}, {cores} CPU cores, Python {python}, torch {torch}.

A run on two ranks with a checkpoint after every {every} steps is hit by one fault after the other.
It goes on, or the same command (`--resume=auto`) is repeated. *Steps repeated* were done and are
done again. *Lost* is what an undisturbed run has and this one lacks in the end, or has otherwise:
metrics without times, samples, evaluations, and the weights and moments of every checkpoint, bit
for bit. *Seconds* are of the command that was hit.
"""


def table(outcomes: Sequence[Outcome]) -> str:
    """The Markdown text."""
    text = TEXT.format(
        count=len(outcomes),
        bad=sum(bool(found.faults) for found in outcomes),
        steps=sum(found.steps_lost for found in outcomes),
        bytes=sum(found.bytes_lost for found in outcomes),
        command=shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]]),
        date=datetime.date.today(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        every=EVERY,
    )
    lines = ["", f"| {' | '.join(HEAD)} |", "|---|---|---|---:|---:|---:|---:|"]
    for found in outcomes:
        cells = (found.row.fault, found.row.place, outcome(found), found.steps_repeated)
        cells += (found.steps_lost, found.bytes_lost, round(found.seconds))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return text + "\n".join(lines) + "\n"


def outcome(found: Outcome) -> str:
    """In words: whether it went on, and what it said."""
    if found.faults:
        return "**failed**: " + "; ".join(found.faults).replace("|", "\\|")
    ending = "goes on" if found.row.goes_on else "resumes"
    if found.row.repair is not None:
        ending = "is refused; resumes when the checkpoint is removed"
    said = re.sub(r"\S*/", "", found.said).replace("|", "\\|")
    return f"{ending}: `{said[:160]}`" if said else ending
